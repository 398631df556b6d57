package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io"
	"net/url"
	"os"
	"regexp"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

//go:embed testdata/day.txt
var wholeDay string

// serverURL is the server that all tests share, each in a database of its own.
var serverURL string

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	server, err := pgserver.Start(ctx, pgserver.Options{
		Version: os.Getenv("OUTBOX_TEST_POSTGRES"),
		Logf:    func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
	})
	if err != nil {
		return 1, err
	}
	defer func() {
		if stopErr := server.Stop(); err == nil {
			err = stopErr
		}
	}()
	serverURL = server.URL
	before := goleak.IgnoreCurrent()
	if code = m.Run(); code == 0 {
		err = goleak.Find(before)
	}
	return code, err
}

var databases atomic.Int64

// newDB creates a database that goes when the test ends, and returns its URL.
func newDB(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("booking_%d", databases.Add(1))
	exec(t, "CREATE DATABASE "+name)
	t.Cleanup(func() { exec(t, "DROP DATABASE "+name+" WITH (FORCE)") })
	u, err := url.Parse(serverURL)
	require.NoError(t, err)
	u.Path = "/" + name
	return u.String()
}

// exec runs a statement outside any test's database.
func exec(t *testing.T, sql string) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), serverURL)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(context.Background(), sql)
	require.NoError(t, err)
}

func connectTo(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// contents lists the schemas of a database and the relations in them.
func contents(t *testing.T, conn *pgx.Conn) []string {
	t.Helper()
	rows, err := conn.Query(t.Context(), `
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
	url := newDB(t)
	conn := connectTo(t, url)
	before := contents(t, conn)

	var stdout, stderr bytes.Buffer
	require.Zero(t, run(t.Context(), url, &stdout, &stderr), "%s", &stderr)
	require.Equal(t, wholeDay, stdout.String())
	require.Empty(t, stderr.String())
	require.Equal(t, before, contents(t, conn))
}

// writerFunc is called before each write.
type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestRun_leaves_nothing_behind_wherever_it_is_cancelled(t *testing.T) {
	t.Parallel()
	url := newDB(t)
	conn := connectTo(t, url)
	before := contents(t, conn)

	scenes := regexp.MustCompile(`(?m)^\d\d:\d\d `)
	for cutAt := range len(scenes.FindAllString(wholeDay, -1)) + 1 { // 0: before the first
		ctx, cancel := context.WithCancel(t.Context())
		if cutAt == 0 {
			cancel()
		}
		scene := 0
		var stderr bytes.Buffer
		code := run(ctx, url, writerFunc(func(p []byte) {
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
		require.Equal(t, before, contents(t, conn), "cut off in scene %d", cutAt)
	}
}

func TestRun_leaves_nothing_behind_when_cancelled_in_requests(t *testing.T) {
	t.Parallel()
	url := newDB(t)
	conn, rival := connectTo(t, url), connectTo(t, url)
	before := contents(t, conn)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	locked := make(chan error, 1)
	stdout := writerFunc(func(p []byte) {
		if bytes.HasPrefix(p, []byte("11:00")) { // 20 requests are about to be made
			var schema string
			err := rival.QueryRow(ctx, `SELECT nspname FROM pg_namespace WHERE nspname LIKE 'outbox\_example\_%'`).Scan(&schema)
			if err == nil {
				_, err = rival.Exec(ctx, "BEGIN; LOCK TABLE "+schema+".bookings")
			}
			locked <- err
		}
	})
	var stderr bytes.Buffer
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, url, stdout, &stderr) }()

	require.NoError(t, <-locked)
	require.Eventually(t, func() bool {
		var blocked int
		err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&blocked)
		return err == nil && blocked == rushRequests
	}, 30*time.Second, time.Millisecond, "the requests did not come to wait for the lock")
	cancel()
	_, err := rival.Exec(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	require.Equal(t, 1, <-ended)
	require.Equal(t, "booking: context canceled\n", stderr.String())
	require.Equal(t, before, contents(t, conn))
}

func TestRun_reports_a_bad_DATABASE_URL_in_one_line_without_the_password(t *testing.T) {
	t.Parallel()
	server, err := pgx.ParseConfig(serverURL)
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
