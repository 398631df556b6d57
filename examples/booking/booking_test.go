package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io"
	"regexp"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/pgtest"
)

//go:embed testdata/day.txt
var wholeDay string

func TestMain(m *testing.M) { pgtest.Main(m) }

// contents lists the schemas of a database and the relations in them.
func contents(t *testing.T, db *pgtest.DB) []string {
	t.Helper()
	rows, err := db.Query(t.Context(), `
		SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\_%'
		UNION ALL
		SELECT relnamespace::regnamespace || '.' || relname FROM pg_class
		WHERE relnamespace::regnamespace::text NOT LIKE 'pg\_%' AND relnamespace <> 'information_schema'::regnamespace
		ORDER BY 1`)
	require.NoError(t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return names
}

func TestRun(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	before := contents(t, db)

	var stdout, stderr bytes.Buffer
	require.Zero(t, run(t.Context(), db.URL, &stdout, &stderr), "%s", &stderr)
	require.Equal(t, wholeDay, stdout.String())
	require.Empty(t, stderr.String())
	require.Equal(t, before, contents(t, db))
}

// writerFunc is called before each write.
type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestRun_leaves_nothing_behind_wherever_it_is_cancelled(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	before := contents(t, db)

	scenes := regexp.MustCompile(`(?m)^\d\d:\d\d `)
	for cutAt := range len(scenes.FindAllString(wholeDay, -1)) + 1 { // 0: before the first
		ctx, cancel := context.WithCancel(t.Context())
		if cutAt == 0 {
			cancel()
		}
		scene := 0
		var stderr bytes.Buffer
		code := run(ctx, db.URL, writerFunc(func(p []byte) {
			if scenes.Match(p) {
				if scene++; scene == cutAt {
					cancel()
				}
			}
		}), &stderr)
		cancel()
		require.Equal(t, 1, code)
		require.Equal(t, cutAt, scene)
		require.Equal(t, "booking: context canceled\n", stderr.String())
		require.Equal(t, before, contents(t, db), "cut off in scene %d", cutAt)
	}
}

func TestRun_leaves_nothing_behind_when_cancelled_in_requests(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	rival := db.MustBegin(t)
	before := contents(t, db)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	locked := make(chan error, 1)
	stdout := writerFunc(func(p []byte) {
		if bytes.HasPrefix(p, []byte("11:00")) { // 20 requests are about to be made
			var schema string
			err := rival.QueryRow(ctx, `SELECT nspname FROM pg_namespace WHERE nspname LIKE 'outbox\_example\_%'`).Scan(&schema)
			if err == nil {
				_, err = rival.Exec(ctx, "LOCK TABLE "+schema+".bookings")
			}
			locked <- err
		}
	})
	var stderr bytes.Buffer
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, db.URL, stdout, &stderr) }()

	require.NoError(t, <-locked)
	db.WaitBlocked(t, rushRequests)
	cancel()
	require.NoError(t, rival.Rollback(t.Context()))
	require.Equal(t, 1, <-ended)
	require.Equal(t, "booking: context canceled\n", stderr.String())
	require.Equal(t, before, contents(t, db))
}

func TestRun_reports_a_bad_DATABASE_URL_in_one_line_without_the_password(t *testing.T) {
	t.Parallel()
	server, err := pgx.ParseConfig(pgtest.DatabaseURL("postgres"))
	require.NoError(t, err)
	here := fmt.Sprintf("%s:%d", server.Host, server.Port)
	tests := []struct{ name, url, want string }{
		{"not a URL", "localhost secret", "DATABASE_URL: not of the form"},
		{"bad port", "postgres://user:secret@localhost:port/db", "DATABASE_URL: not of the form"},
		{"password not encoded", "postgres://user:secret/secret@localhost/db", "DATABASE_URL: not of the form"},
		{"unknown option", "postgres://user:secret@localhost/db?sslmode=perhaps", "DATABASE_URL: not of the form"},
		{"nobody listens", "postgres://user:secret@127.0.0.1:1/db", "connection refused"},
		{"no such host", "postgres://user:secret@host.invalid/db", "cannot connect to host.invalid as user"},
		{"no such user", "postgres://user:secret@" + here + "/postgres?sslmode=disable", `role "user" does not exist`},
		{"no such database", "postgres://postgres:secret@" + here + "/db?sslmode=disable", `database "db" does not exist`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			require.Equal(t, 1, run(t.Context(), tt.url, io.Discard, &stderr))
			require.Regexp(t, `\Abooking: [^\n]+\n\z`, stderr.String())
			require.Contains(t, stderr.String(), tt.want)
			require.NotContains(t, stderr.String(), "secret")
		})
	}
}
