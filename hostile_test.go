package outbox_test

import (
	"context"
	"encoding/json"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// Mutations tried, and what each turns red:
//
//	a varchar column not cast, or oid = regclass      TestHostileSearchPath/before_others
//	types not qualified                               TestHostileSearchPath
//	now() unqualified                                 TestHostileSearchPath/before_pg_catalog
//	status = 'pending' in the index of migrations     TestHostileSearchPath/in_the_schema_that_is_migrated
//	types qualified after the name is put in          TestSchemaNames/.../a::text
//	a schema's name in quotes only, not sanitized     TestSchemaNames
//	its length in characters                          TestSchemaNames/that_it_cannot_are_refused
//	another schema's payload heard in Listen          TestSchemaNames

// shadowOperatorsSQL makes, in the schema {schema}, every operator that PostgreSQL has
// not got for two types that statements of ours may meet, under the names of those it has.
// Where an operand is not of the very type of PostgreSQL's operator, one of these is
// nearer. Nobody but its owner may call its function, which PostgreSQL sees to before a
// statement begins, whatever of it comes to be executed; and it raises an exception.
const shadowOperatorsSQL = `
DO $do$
DECLARE
	l text; r text; op text;
	types text[] := '{varchar,text,name,"\"char\"",int2,int4,int8,float4,float8,bool,json,jsonb,uuid,timestamptz,interval,oid,regclass,regtype,tid,
		"text[]","varchar[]","int2[]","int8[]","tid[]"}';
BEGIN
	FOREACH l IN ARRAY types LOOP
		FOREACH r IN ARRAY types LOOP
			CONTINUE WHEN (l LIKE '%[]') <> (r LIKE '%[]');
			EXECUTE format('CREATE FUNCTION {schema}.operator(%s, %s) RETURNS boolean LANGUAGE plpgsql AS $$
				BEGIN RAISE EXCEPTION ''a shadow operator was called''; END $$', l, r);
			FOREACH op IN ARRAY '{=,<>,<,<=,>,>=,||,~,+,-,*,/}'::text[] LOOP
				IF to_regoperator(format('pg_catalog.%s(%s,%s)', op, l, r)) IS NULL THEN
					EXECUTE format('CREATE OPERATOR {schema}.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = {schema}.operator)', op, l, r);
				END IF;
			END LOOP;
		END LOOP;
	END LOOP;
END
$do$;
`

// shadowFunctionsSQL makes, in the schema {schema}, functions of the same names and
// arguments as those of PostgreSQL, and some with arguments that are nearer than its "any".
const shadowFunctionsSQL = `
DO $do$
DECLARE
	f record;
BEGIN
	FOR f IN
		SELECT proname, oidvectortypes(proargtypes) AS args FROM pg_proc
		WHERE pronamespace = 'pg_catalog'::regnamespace AND NOT 'pg_catalog."any"'::regtype = ANY (proargtypes)
			AND NOT 'internal'::regtype = ANY (proargtypes)
			AND proname IN ('now', 'clock_timestamp', 'unnest', 'octet_length', 'bool_or', 'current_setting', 'to_regclass', 'set_config',
				'pg_try_advisory_xact_lock', 'hashtextextended', 'pg_notify', 'array_cat', 'min', 'max', 'isfinite', 'pg_relation_size',
				'pg_stat_get_live_tuples', 'array_agg', 'string_agg', 'array_to_string', 'format_type', 'pg_get_indexdef', 'current_schema',
				'pg_my_temp_schema', 'format')
		UNION ALL
		VALUES ('num_nonnulls', 'timestamptz, timestamptz'), ('num_nulls', 'bigint, text, text, timestamptz, timestamptz'),
			('array_agg', 'smallint'), ('array_agg', 'int8'), ('array_agg', 'int4'), ('unnest', 'smallint[]'), ('count', 'int8'),
			('unnest', 'text[]'), ('unnest', 'int8[]'), ('unnest', 'uuid[]'), ('unnest', 'json[]'), ('unnest', 'timestamptz[]'), ('unnest', 'boolean[]'),
			('format', 'text, text'), ('format', 'text, name'), ('format', 'text, name, name'), ('format', 'text, regclass'),
			('format', 'text, regclass, text'), ('format', 'text, text, int4'), ('format', 'text, name, text, int4'),
			('array_to_string', 'text[], text'), ('array_to_string', 'int8[], text'), ('array_cat', 'tid[], tid[]')
	LOOP
		EXECUTE format('CREATE FUNCTION {schema}.%I(%s) RETURNS text LANGUAGE plpgsql AS $$
			BEGIN RAISE EXCEPTION ''a shadow function was called''; END $$', f.proname, f.args);
	END LOOP;
END
$do$;
`

// shadowTypesSQL makes types that nothing can be cast to.
const shadowTypesSQL = `
CREATE DOMAIN {schema}.text AS pg_catalog.text CHECK (false);
CREATE DOMAIN {schema}.json AS pg_catalog.json CHECK (false);
CREATE DOMAIN {schema}.jsonb AS pg_catalog.jsonb CHECK (false);
CREATE DOMAIN {schema}.uuid AS pg_catalog.uuid CHECK (false);
CREATE DOMAIN {schema}.bool AS pg_catalog.bool CHECK (false);
CREATE DOMAIN {schema}.float8 AS pg_catalog.float8 CHECK (false);
CREATE DOMAIN {schema}.timestamptz AS pg_catalog.timestamptz CHECK (false);
`

// shadowTablesSQL makes tables that nobody but their owner may use.
const shadowTablesSQL = `
CREATE TABLE {schema}.outbox_notifications (LIKE public.outbox_notifications INCLUDING ALL);
CREATE TABLE {schema}.outbox_migrations (version integer);
`

// temporaryTablesSQL makes tables that stand before all others, and before the types of
// their names.
const temporaryTablesSQL = `
CREATE TEMPORARY TABLE outbox_notifications (mine text);
CREATE TEMPORARY TABLE outbox_migrations (mine text);
CREATE TEMPORARY TABLE text (); CREATE TEMPORARY TABLE json (); CREATE TEMPORARY TABLE jsonb (); CREATE TEMPORARY TABLE uuid ();
CREATE TEMPORARY TABLE timestamptz (); CREATE TEMPORARY TABLE bool (); CREATE TEMPORARY TABLE float8 ();
CREATE TEMPORARY TABLE regclass (); CREATE TEMPORARY TABLE oid (); CREATE TEMPORARY TABLE pg_class (); CREATE TEMPORARY TABLE pg_attribute ()`

// newRole makes a role that goes with the test.
func newRole(t testing.TB, name string) (role string) {
	t.Helper()
	role = pgtest.Name(name)
	require.NoError(t, pgtest.OnServer("CREATE ROLE "+role))
	t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP ROLE "+role)) }) // after its database
	return role
}

// as returns a pool on the database whose connections are that role's from their start.
func as(t testing.TB, db *pgtest.DB, role string, configure func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	return pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.RuntimeParams["role"] = role
		if configure != nil {
			configure(cfg)
		}
	})
}

// TestHostileSearchPath shows that all statements mean the table that is the outbox, and
// PostgreSQL's own functions, types and operators, whatever else there is.
func TestHostileSearchPath(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, path, shadows string }{
		// PostgreSQL looks into pg_catalog first, but takes what is nearest.
		{"before_others", "shadow", shadowOperatorsSQL + shadowFunctionsSQL + shadowTypesSQL + shadowTablesSQL},
		{"before_pg_catalog", "shadow, pg_catalog", shadowFunctionsSQL + shadowTypesSQL + shadowTablesSQL},
	} {
		for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeSimpleProtocol} {
			t.Run(c.name+"/"+strings.ReplaceAll(mode.String(), " ", "_"), func(t *testing.T) {
				t.Parallel()
				role := newRole(t, "caller")
				db := pgtest.NewDB(t)
				_, err := db.Exec(t.Context(), "CREATE SCHEMA shadow;"+strings.ReplaceAll(c.shadows, "{schema}", "shadow")+
					`REVOKE ALL ON ALL FUNCTIONS IN SCHEMA shadow FROM PUBLIC; GRANT USAGE ON SCHEMA shadow TO PUBLIC;
					GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_notifications TO `+role+`; GRANT SELECT ON outbox_migrations TO `+role,
					pgx.QueryExecModeSimpleProtocol)
				require.NoError(t, err)
				pool := as(t, db, role, func(cfg *pgxpool.Config) {
					cfg.ConnConfig.RuntimeParams["search_path"] = c.path
					cfg.ConnConfig.DefaultQueryExecMode = mode
					cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
						_, err := conn.Exec(ctx, temporaryTablesSQL, pgx.QueryExecModeSimpleProtocol)
						return err
					}
				})
				_, err = pool.Exec(t.Context(), "SELECT * FROM shadow.outbox_notifications")
				require.Equal(t, "42501", sqlState(t, err))
				_, err = pool.Exec(t.Context(), "SELECT shadow.now()")
				require.Equal(t, "42501", sqlState(t, err))
				if c.path == "shadow" {
					_, err = pool.Exec(t.Context(), "SELECT type = pg_catalog.format('a') FROM public.outbox_notifications WHERE false")
					require.Equal(t, "42501", sqlState(t, err), "the shadow is nearer")
				}
				useAll(t, pool, "")
			})
		}
	}
	t.Run("in_the_schema_that_is_migrated", func(t *testing.T) {
		t.Parallel()
		for before, owned := range map[string]string{"": "", pythonTable + ";": "ALTER TABLE public.outbox_notifications OWNER TO {role}"} {
			role := newRole(t, "migrator")
			db := pgtest.NewEmptyDB(t)
			_, err := db.Exec(t.Context(), before+"GRANT USAGE, CREATE ON SCHEMA public TO "+role, pgx.QueryExecModeSimpleProtocol)
			require.NoError(t, err)
			_, err = db.Exec(t.Context(), "SET LOCAL search_path = pg_catalog;"+strings.ReplaceAll(shadowOperatorsSQL+shadowFunctionsSQL+shadowTypesSQL, "{schema}", "public")+
				"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;"+strings.Replace(owned, "{role}", role, 1), pgx.QueryExecModeSimpleProtocol)
			require.NoError(t, err)
			pool := as(t, db, role, func(cfg *pgxpool.Config) {
				cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
					_, err := conn.Exec(ctx, temporaryTablesSQL, pgx.QueryExecModeSimpleProtocol)
					return err
				}
			})
			require.NoError(t, outbox.Migrate(t.Context(), pool))
			require.Zero(t, db.Count(t))
		}
	})
}

// useAll calls everything of a store, with each of the guesses; with all if none is given.
func useAll(t *testing.T, pool *pgxpool.Pool, schema string, guesses ...int) {
	if len(guesses) == 0 {
		for guess := range outbox.Guesses {
			guesses = append(guesses, guess)
		}
	}
	ctx := t.Context()
	inTx := func(fn func(tx pgx.Tx)) {
		t.Helper()
		require.NoError(t, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { fn(tx); return nil }))
	}
	shapes := []outbox.Key{{}, {BookingID: 7}, {CandidateTgID: 42}, {BookingID: math.MaxInt64, CandidateTgID: 42}}
	for _, guess := range guesses {
		store, err := outbox.NewPGStore(pool, outbox.Config{Schema: schema, Notify: true, Logger: discard})
		require.NoError(t, err)
		require.NoError(t, store.Migrate(ctx))
		store.AlwaysGuess(guess)
		typ := "guess" + itoa(guess)
		var keys []outbox.Key
		for _, k := range shapes {
			one := outbox.NewNotification{Type: typ, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID, Payload: jsonText("1")}
			for _, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed, outbox.OutcomeRefreshed} {
				inTx(func(tx pgx.Tx) {
					res, err := store.AddNotification(ctx, tx, one)
					require.NoError(t, err)
					require.Equal(t, want, res.Outcome)
				})
				if want == outbox.OutcomeRefreshed {
					one.Payload, one.CorrelationID = jsonText("2"), "c"
				}
			}
			batched := one
			batched.Type += " batched"
			again := batched
			again.Payload = jsonText("3")
			for _, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
				inTx(func(tx pgx.Tx) {
					res, err := store.AddNotifications(ctx, tx, []outbox.NewNotification{batched, again, one})
					require.NoError(t, err)
					require.Equal(t, want, res[0].Outcome)
				})
			}
			keys = append(keys, one.Key(), batched.Key())
		}
		many := make([]outbox.NewNotification, 60) // enough to ask the catalog about
		for i := range many {
			many[i] = outbox.NewNotification{Type: typ + " many", BookingID: int64(i + 1), CandidateTgID: 1}
		}
		inTx(func(tx pgx.Tx) {
			_, err := store.AddNotifications(ctx, tx, many)
			require.NoError(t, err)
		})

		opts := outbox.ClaimOptions{Limit: 100, Lease: time.Hour, Types: []string{typ, typ + " batched"}, MaxAttempts: 3, InTurn: true,
			Since: time.Now().Add(-time.Hour), Except: []int64{math.MaxInt64}, Suspects: outbox.OneSuspect, AtMostOnce: guess%2 == 0, Reconcile: guess > 1}
		res, err := store.Claim(ctx, opts)
		require.NoError(t, err)
		require.Len(t, res.Claimed, len(keys))
		var leases []outbox.Lease
		var settlements []outbox.Settlement
		for i, c := range res.Claimed {
			leases = append(leases, c.Lease)
			verdict := []outbox.Verdict{outbox.Delivered, outbox.Failed, outbox.Retry, outbox.HandedBack}[i/2%4]
			s := outbox.Settlement{Lease: c.Lease, Verdict: verdict, Unknown: verdict == outbox.Retry}
			if verdict == outbox.Retry {
				s.RetryIn = time.Hour
			}
			settlements = append(settlements, s)
		}
		extended, err := store.Extend(ctx, append(leases, outbox.Lease{ID: 1}), time.Hour)
		require.NoError(t, err)
		require.Equal(t, outbox.LeaseStale, extended[len(leases)])
		settled, err := store.Settle(ctx, append(settlements, outbox.Settlement{Lease: outbox.Lease{ID: 1}, Verdict: outbox.Failed}))
		require.NoError(t, err)
		require.Equal(t, outbox.LeaseDone, settled[0])

		for _, k := range keys {
			n, err := store.Get(ctx, k)
			require.NoError(t, err)
			require.Equal(t, k, n.Key())
		}
		for _, status := range []outbox.Status{"", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed} {
			for _, booking := range []int64{0, 7} {
				for _, types := range [][]string{nil, {typ, typ + " batched"}} {
					f := outbox.Filter{Status: status, BookingID: booking, Types: types, OlderThan: time.Microsecond, NewerThan: time.Hour}
					_, err := store.List(ctx, f)
					require.NoError(t, err)
				}
			}
		}
		inTx(func(tx pgx.Tx) { // settled ones
			for _, k := range keys {
				_, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
				require.NoError(t, err)
			}
		})
		stats, err := store.Stats(ctx)
		require.NoError(t, err)
		require.EqualValues(t, 2, stats.Types[typ].Failed+stats.Types[typ+" batched"].Failed)
		requeued, err := store.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusFailed, Types: []string{typ, typ + " batched"}})
		require.NoError(t, err)
		require.Len(t, requeued, 2)
		n, err := store.Requeue(ctx, keys...)
		require.NoError(t, err)
		require.Equal(t, 2, n)
		for _, del := range []bool{false, true} {
			_, err := store.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Hour, Types: []string{typ}, Delete: del})
			require.NoError(t, err)
		}
	}

	store, err := outbox.NewPGStore(pool, outbox.Config{Schema: schema, Notify: true, Logger: discard})
	require.NoError(t, err)
	listening, cancel := context.WithTimeout(ctx, time.Minute)
	wakes := 0
	require.ErrorIs(t, store.Listen(listening, func() {
		if wakes++; wakes == 2 {
			cancel()
			return
		}
		inTx(func(tx pgx.Tx) {
			_, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "heard"})
			require.NoError(t, err)
		})
	}), context.Canceled)
}

// jsonText is a payload that is text.
type jsonText string

// TestSchemaNames uses several outboxes of one database.
func TestSchemaNames(t *testing.T) {
	t.Parallel()
	names := []string{
		"public", "Outbox", "outbox", "select", "user", "a.b", `"`, `a"."b`, "two words ", "\tтаб", "Ω",
		strings.Repeat("n", 63), strings.Repeat("ю", 31) + "x", `'; DROP TABLE outbox_notifications; --`, "$1", "$$", `\`,
		"{table}", "{key}", "{keys}", "{where}", "a::text", "%s%v",
	}
	t.Run("that_PostgreSQL_can_hold_are_used_as_they_are", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		var group sync.WaitGroup
		for _, name := range names {
			store, err := outbox.NewPGStore(db.Pool, outbox.Config{Schema: name, Logger: discard})
			require.NoError(t, err)
			group.Go(func() {
				for range 2 {
					assert.NoError(t, store.Migrate(t.Context()), name)
				}
			})
		}
		group.Wait()
		require.Equal(t, len(names), pgtest.One[int](t, db, `SELECT count(*) FROM pg_namespace n JOIN pg_class c ON relnamespace = n.oid
			WHERE nspname = ANY ($1) AND relname = 'outbox_notifications'`, names))
		for i, name := range names {
			t.Run(name, func(t *testing.T) {
				if strings.ContainsAny(name, "{$%:") { // what it can do depends on the statement
					useAll(t, db.Pool, name)
				} else {
					useAll(t, db.Pool, name, i%outbox.Guesses)
				}
				store, err := outbox.NewPGStore(db.Pool, outbox.Config{Schema: name})
				require.NoError(t, err)
				stats, err := store.Stats(t.Context())
				require.NoError(t, err)
				rows := pgtest.One[int](t, db, "SELECT count(*) FROM "+pgx.Identifier{name, "outbox_notifications"}.Sanitize())
				require.EqualValues(t, rows, stats.Pending+stats.Failed+stats.Sent, "these and no others")
			})
		}
	})
	t.Run("that_it_cannot_are_refused", func(t *testing.T) {
		t.Parallel()
		pool := neverUsedPool(t)
		for name, reason := range map[string]string{
			strings.Repeat("n", 64): "64 bytes, over PostgreSQL's limit of 63", strings.Repeat("ю", 32): "64 bytes", strings.Repeat("ю", 1000): "2000 bytes",
			"pg_catalog": "means something else", "pg_": "means something else", "$user": "means something else", "information_schema": "means something else",
			"a\x00b": "", "\xff": "",
		} {
			_, err := outbox.NewPGStore(pool, outbox.Config{Schema: name})
			requireInvalid(t, err, "Schema", -1, reason)
		}
	})
}

// neverUsedPool returns a pool that no connection is taken from.
func neverUsedPool(t testing.TB) *pgxpool.Pool {
	t.Helper()
	return pgtest.NewPool(t, "postgres://nobody@127.0.0.1:1/nothing", nil)
}

// TestSQLIsData stores what is SQL, or would end a literal, wherever a text can be stored.
func TestSQLIsData(t *testing.T) {
	t.Parallel()
	texts := []string{
		`'; DROP TABLE outbox_notifications; --`, `"; DROP TABLE x; --`, `\'; SELECT 1/0; --`, `\`, `'`, `''`, `$1`, `$$`, `E'\''`, `{NULL,"a"}`, `NULL`, `()`,
		"-- ", "/*", "{table}", "{key}", `\u0027`, "\u2028\u00a0", "\U0001F600", "line\nbreak\r\ttab", "%s", "?", ":name", "@x", " ",
	}
	for mode := pgx.QueryExecModeCacheStatement; mode <= pgx.QueryExecModeSimpleProtocol; mode++ {
		for _, conforming := range []string{"on", "off"} {
			t.Run(strings.ReplaceAll(mode.String(), " ", "_")+"/standard_conforming_strings_"+conforming, func(t *testing.T) {
				t.Parallel()
				db := pgtest.NewDB(t)
				pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
					cfg.ConnConfig.DefaultQueryExecMode = mode
					cfg.ConnConfig.RuntimeParams["standard_conforming_strings"] = conforming
				})
				store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
				require.NoError(t, err)
				if mode == pgx.QueryExecModeSimpleProtocol && conforming == "off" {
					tx := pgtest.Begin(t, pool, pgx.TxOptions{})
					_, err := store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "refused"})
					require.ErrorContains(t, err, `outbox: add notification "refused": `)
					require.ErrorContains(t, err, "standard_conforming_strings")
					_, err = tx.Exec(t.Context(), "SET LOCAL standard_conforming_strings = on")
					require.NoError(t, err, "the transaction goes on")
					_, err = store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "refused"})
					require.NoError(t, err)
					require.NoError(t, tx.Commit(t.Context()))
					require.Equal(t, 1, db.Count(t))
					return
				}
				var ns []outbox.NewNotification
				for i, s := range texts {
					ns = append(ns, outbox.NewNotification{Type: s, CorrelationID: s, Payload: s},
						outbox.NewNotification{Type: s, BookingID: int64(i + 1), CorrelationID: s, Payload: map[string]string{s: s}})
				}
				require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
					for _, n := range ns[:len(ns)/2] {
						for range 2 {
							res, err := store.AddNotification(t.Context(), tx, n)
							require.NoError(t, err)
							require.EqualValues(t, 1, res.Notification.Version)
						}
					}
					_, err := store.AddNotifications(t.Context(), tx, ns)
					return err
				}))
				require.Equal(t, len(ns), db.Count(t))
				res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1000, Lease: time.Hour, Types: texts})
				require.NoError(t, err)
				require.Len(t, res.Claimed, len(ns))
				var settlements []outbox.Settlement
				for _, c := range res.Claimed {
					s := outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered, Receipt: c.Notification.Type}
					if c.Notification.BookingID != 0 {
						s = outbox.Settlement{Lease: c.Lease, Verdict: outbox.Failed, Error: c.Notification.Type}
					}
					settlements = append(settlements, s)
				}
				_, err = store.Settle(t.Context(), settlements)
				require.NoError(t, err)
				for _, n := range ns {
					got, err := store.Get(t.Context(), n.Key())
					require.NoError(t, err)
					payload, err := json.Marshal(n.Payload)
					require.NoError(t, err)
					require.Equal(t, string(payload), string(got.Payload))
					require.Equal(t, n.Type, got.Type)
					require.Equal(t, n.Type, got.CorrelationID)
					require.Equal(t, n.Type, got.Receipt+got.LastError)
				}
			})
		}
	}
}

// TestAnotherService has the README's warnings of one that writes to the table, too.
func TestAnotherService(t *testing.T) {
	t.Parallel()
	t.Run("loses_a_change_during_a_delivery_unless_it_raises_the_version", func(t *testing.T) {
		t.Parallel()
		for raise, want := range map[string]outbox.Status{"": outbox.StatusSent, ", version = version + 1": outbox.StatusPending} {
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, pythonTable, pgx.QueryExecModeSimpleProtocol)
			require.NoError(t, db.Store.Migrate(t.Context()))
			db.Add(t, rejected)
			res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
			require.NoError(t, err)
			db.MustExec(t, `UPDATE outbox_notifications SET payload_json = '{"slot": "11:00"}', attempts = 0, locked_at = NULL`+raise)
			_, err = db.Store.Settle(t.Context(), []outbox.Settlement{{Lease: res.Claimed[0].Lease, Verdict: outbox.Delivered}})
			require.NoError(t, err)
			require.Equal(t, want, db.Get(t, rejected.Key()).Status, raise)
		}
	})
	t.Run("cannot_delete_bookings_whose_foreign_key_is_set_null", func(t *testing.T) {
		t.Parallel()
		for action, fails := range map[string]bool{"SET NULL": true, "CASCADE": false} {
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, strings.Replace(pythonTable, "ON DELETE CASCADE", "ON DELETE "+action, 1), pgx.QueryExecModeSimpleProtocol)
			require.NoError(t, db.Store.Migrate(t.Context()))
			for _, booking := range []int64{1, 2} {
				db.Add(t, outbox.NewNotification{Type: "reject", BookingID: booking, CandidateTgID: 42})
			}
			_, err := db.Exec(t.Context(), "DELETE FROM bookings WHERE id <= 2")
			if !fails {
				require.NoError(t, err, action)
				continue
			}
			require.Equal(t, "23505", sqlState(t, err), action)
		}
	})
}
