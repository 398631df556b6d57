package outbox_test

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// payloadSeeds are JSON documents and what comes close, by the rule they touch.
var payloadSeeds = []string{
	``, ` `, `null`, `true`, `false`, `nul`, `nulls`, `True`, `0`, `-0`, `-`, `01`, `1.`, `.1`, `1.5`, `1e5`, `1E+5`, `1e-5`, `1e`, `1e+`, `+1`, `0x1`,
	`1e131071`, `1e131072`, `10e131071`, `1e-16383`, `1e-16384`, `0.1e-16383`, `0e999999`, `1e99999999999999999999`, `-1e-99999999999999999999`,
	`""`, `"`, `"a`, `"\"`, `"\""`, `"\/\b\f\n\r\t\\"`, `"\a"`, `"\u"`, `"\u12"`, `"\u12g4"`, `"\u0000"`, `"\\u0000"`, `"\u0001"`, `"\u001f"`, `"\uFFFD"`, `"\uFFFF"`,
	`"\ud83d\ude00"`, `"\uD83D\uDE00"`, `"\ud83d"`, `"\ude00"`, `"\ud83dx"`, `"\ud83d\n"`, `"\ud83d\u0041"`, `"\ud83d\ud83d\ude00"`, `"\\ud83d\ude00"`, `"\\\ud83d\ude00"`,
	"\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\x7f\"", "\"\x1f\"", "\"\t\"", "\"\x00\"", "\x00", "\"\u2028\ufeff\"", "\ufeff1",
	`[]`, `[ ]`, `[1]`, `[1,]`, `[,1]`, `[1 2]`, `[`, `]`, `[]]`, `[[[[]]]]`, `[1}`,
	`{}`, `{ }`, `{"a":1}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{a:1}`, `{1:1}`, `{"a":1 "b":2}`, `{"a":1,"a":2}`, `{"":{"":[{}]}}`, `{`, `}`, `{"a":1]`,
	` { "a" : [ 1 , "b" ] } `, "\n[\r\t1]\n", "[1\v]", "[1\u00a0]", `//`, `/**/1`, `{"a":1}{"b":2}`, `NaN`, `Infinity`, `'a'`,
	`{"text":"Перенос на 10:00","at":"2026-11-23T10:00:00+03:00","n":[1,2.50,-3e2]}`,
	strings.Repeat("[", 1000) + strings.Repeat("]", 1000), strings.Repeat("[", 1001) + strings.Repeat("]", 1001),
	strings.Repeat(`{"a":`, 999) + "1" + strings.Repeat("}", 999), strings.Repeat("1", 131072), strings.Repeat("1", 131073), "0." + strings.Repeat("1", 16384),
}

// jsonbTakes asks PostgreSQL, sent as bytes since a text parameter may not be
// what the client thinks it is.
func jsonbTakes(t testing.TB, pool *pgxpool.Pool, doc []byte, typ string) bool {
	t.Helper()
	var ok bool
	err := pool.QueryRow(context.Background(), "SELECT takes_"+typ+"($1::bytea)", doc).Scan(&ok)
	require.NoError(t, err)
	return ok
}

const takesFunctions = `
CREATE FUNCTION takes_jsonb(doc bytea) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN PERFORM convert_from(doc, 'UTF8')::jsonb; RETURN true; EXCEPTION WHEN others THEN RETURN false; END $$;
CREATE FUNCTION takes_json(doc bytea) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN PERFORM convert_from(doc, 'UTF8')::json; RETURN true; EXCEPTION WHEN others THEN RETURN false; END $$`

// FuzzPayload compares the check of a payload with PostgreSQL: what the check
// accepts jsonb accepts, and so what jsonb refuses the check refuses. The check
// may refuse more only where it says so: depth, and exponents of zero. It also
// holds the guard before the cast of a stored payload against that cast.
func FuzzPayload(f *testing.F) {
	db := pgtest.NewDB(f)
	db.MustExec(f, takesFunctions)
	for _, seed := range payloadSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		err := outbox.CheckPayload(doc)
		takes := jsonbTakes(t, db.Pool, doc, "jsonb")
		if err == nil && !takes {
			t.Fatalf("the check accepts what jsonb refuses: %q", doc)
		}
		if err != nil && takes && !strings.Contains(err.Error(), "nested deeper") && !strings.Contains(err.Error(), "out of jsonb's range") {
			t.Fatalf("the check refuses what jsonb accepts: %q: %v", doc, err)
		}
		if !takes && jsonbTakes(t, db.Pool, doc, "json") && !pgtest.One[bool](t, db,
			"SELECT "+outbox.MaybeNotJSONBSQL+" FROM (SELECT convert_from($1::bytea, 'UTF8')::json) AS stored (payload_json)", doc) {
			t.Fatalf("the guard lets through what jsonb refuses: %q", doc)
		}
	})
}
