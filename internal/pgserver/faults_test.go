package pgserver

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// startDurable starts a server on which a commit survives a crash. Its table
// "unlogged" tells a crash from a shutdown: recovery empties it.
func startDurable(t *testing.T) (*Server, *pgx.Conn) {
	t.Helper()
	opts := options(t)
	opts.Settings = map[string]string{"synchronous_commit": "on"}
	s := start(t, opts)
	conn := connect(t, s.URL)
	_, err := conn.Exec(t.Context(), `CREATE TABLE logged (v text); CREATE UNLOGGED TABLE unlogged (v text);
		INSERT INTO logged VALUES ('x'); INSERT INTO unlogged VALUES ('x')`)
	require.NoError(t, err)
	return s, conn
}

// busy begins a transaction on a connection of its own, writes in it, and leaves its
// backend running a query that would not end in the time of a test.
func busy(t *testing.T, s *Server, watch *pgx.Conn) <-chan error {
	t.Helper()
	conn := connect(t, s.URL)
	_, err := conn.Exec(t.Context(), "BEGIN; INSERT INTO logged VALUES ('uncommitted')")
	require.NoError(t, err)
	pid := conn.PgConn().PID()
	ctx := t.Context()
	ended := make(chan error, 1)
	go func() {
		_, err := conn.Exec(ctx, "SELECT pg_sleep(3600)")
		ended <- err
	}()
	require.Eventually(t, func() bool {
		return queryString(t, watch, "SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = $1", pid) == "PgSleep"
	}, 30*time.Second, time.Millisecond)
	return ended
}

func contents(t *testing.T, conn *pgx.Conn, table string) string {
	t.Helper()
	return queryString(t, conn, "SELECT coalesce(string_agg(v, ' ' ORDER BY v), '') FROM "+table)
}

func TestServer_Crash(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	gone := goneAfterStop(t, s, conn)
	url := s.URL
	for _, want := range []string{"x", "x y", "x y y"} { // it can be done again
		ended := busy(t, s, conn)
		require.NoError(t, s.Crash(t.Context()))
		require.Error(t, <-ended)
		_, err := conn.Exec(t.Context(), "SELECT 1")
		require.Error(t, err, "an idle connection is lost too")

		require.Equal(t, url, s.URL)
		conn = connect(t, s.URL)
		require.Equal(t, want, contents(t, conn, "logged"))
		require.Empty(t, contents(t, conn, "unlogged"), "it was not shut down")
		_, err = conn.Exec(t.Context(), "INSERT INTO logged VALUES ('y'); INSERT INTO unlogged VALUES ('y')")
		require.NoError(t, err)
	}
	require.NoError(t, s.Stop())
	require.True(t, gone())
	require.ErrorContains(t, s.Crash(t.Context()), "the server was stopped")
}

func TestServer_Restart(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	for range 2 {
		began := queryString(t, conn, "SELECT pg_postmaster_start_time()::text")
		ended := busy(t, s, conn)
		require.NoError(t, s.Restart(t.Context()))
		require.ErrorContains(t, <-ended, "57P01")
		_, err := conn.Exec(t.Context(), "SELECT 1")
		require.Error(t, err, "an idle connection is lost too")

		conn = connect(t, s.URL)
		require.Equal(t, "x", contents(t, conn, "logged"))
		require.Equal(t, "x", contents(t, conn, "unlogged"), "it was shut down")
		require.NotEqual(t, began, queryString(t, conn, "SELECT pg_postmaster_start_time()::text"))
	}
}

func TestServer_Pause(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	require.NoError(t, s.Resume(t.Context()), "it is not paused")
	for range 2 {
		require.NoError(t, s.Pause(t.Context()))
		require.NoError(t, s.Pause(t.Context()), "a second call")

		ctx := t.Context()
		answered := make(chan error, 1)
		go func() {
			_, err := conn.Exec(ctx, "INSERT INTO logged VALUES ('y')")
			answered <- err
		}()
		hurried, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err := pgx.Connect(hurried, s.URL)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded, "it does not refuse: it does not answer")
		require.Empty(t, answered)
		require.ErrorIs(t, s.Crash(ctx), ErrPaused)
		require.ErrorIs(t, s.Restart(ctx), ErrPaused)

		require.NoError(t, s.Resume(ctx))
		require.NoError(t, <-answered, "the connection was never lost")
	}
	require.Equal(t, "x y y", contents(t, conn, "logged"))
	require.NoError(t, s.Crash(t.Context()), "it is not paused any more")
}

func TestServer_Stop_ends_a_paused_server(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	gone := goneAfterStop(t, s, conn)
	require.NoError(t, s.Pause(t.Context()))
	began := time.Now()
	require.NoError(t, s.Stop())
	t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
	require.True(t, gone())
}
