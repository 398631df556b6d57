package pgserver

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// Mutations tried, and what each turns red:
//
//	a standby keeps the setting of its primary   TestServer_Synchronous
//	standby names not set                        TestServer_Synchronous
//	Detach does nothing                          TestServer_Promote
//	CatchUp does nothing                         TestServer_StartStandby, in some runs
//	Kill as Crash does it                        TestServer_Promote
//
// Not noticed: that Synchronous and StartStandby wait until their doing is in force, and
// the checkpoints.

func startStandby(t *testing.T, primary *Server) *Server {
	t.Helper()
	standby, err := primary.StartStandby(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, standby.Stop()) })
	return standby
}

func insert(t *testing.T, conn *pgx.Conn, v string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // it may wait for a standby
	defer cancel()
	_, err := conn.Exec(ctx, "INSERT INTO logged VALUES ($1)", v)
	require.NoError(t, err)
}

func port(t *testing.T, url string) uint16 {
	t.Helper()
	cfg, err := pgx.ParseConfig(url)
	require.NoError(t, err)
	return cfg.Port
}

// connectedTo returns the port of the server that the pool leads to.
func connectedTo(ctx context.Context, pool *pgxpool.Pool) (port uint16, err error) {
	err = pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		addr, err := netip.ParseAddrPort(conn.Conn().PgConn().Conn().RemoteAddr().String())
		if err != nil {
			return err
		}
		port = addr.Port()
		_, err = conn.Exec(ctx, "CREATE TEMPORARY TABLE IF NOT EXISTS it_takes_writes ()")
		return err
	})
	return port, err
}

func TestServer_StartStandby(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	require.ErrorContains(t, s.Promote(t.Context()), "not started as a standby")
	standby := startStandby(t, s)
	require.NotEqual(t, s.URL, standby.URL)
	require.Equal(t, s.Kind, standby.Kind)

	insert(t, conn, "y")
	require.NoError(t, standby.CatchUp(t.Context()))
	reader := connect(t, standby.URL)
	require.Equal(t, "x y", contents(t, reader, "logged"), "it streams, and answers queries")
	_, err := reader.Exec(t.Context(), "INSERT INTO logged VALUES ('z')")
	require.ErrorContains(t, err, "25006")
	require.Equal(t, queryString(t, conn, "SHOW max_connections"), queryString(t, reader, "SHOW max_connections"))

	other := startStandby(t, s)
	require.Equal(t, "x y", contents(t, connect(t, other.URL), "logged"), "there can be more than one")

	require.NoError(t, standby.Crash(t.Context()))
	insert(t, conn, "z")
	require.NoError(t, standby.CatchUp(t.Context()), "it goes on after a crash")
	require.Equal(t, "x y z", contents(t, connect(t, standby.URL), "logged"))

	gone := goneAfterStop(t, standby, connect(t, standby.URL))
	require.NoError(t, standby.Stop())
	require.True(t, gone())
	require.ErrorContains(t, standby.Promote(t.Context()), "the server was stopped")
	insert(t, conn, "the primary needs no standby")
}

func TestServer_Promote(t *testing.T) {
	t.Parallel()
	s, conn := startDurable(t)
	standby := startStandby(t, s)
	pool, err := pgxpool.New(t.Context(), WritableURL(standby, s))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	at, err := connectedTo(t.Context(), pool)
	require.NoError(t, err)
	require.Equal(t, port(t, s.URL), at, "the one that takes writes")

	insert(t, conn, "kept")
	require.NoError(t, standby.CatchUp(t.Context()))
	require.NoError(t, standby.Detach(t.Context()))
	insert(t, conn, "lost")
	require.NoError(t, s.Pause(t.Context()))
	require.NoError(t, s.Kill(t.Context()), "a paused one too")
	require.NoError(t, s.Kill(t.Context()), "a second call")
	_, err = pgx.Connect(t.Context(), s.URL)
	require.ErrorContains(t, err, "refused")
	require.ErrorContains(t, s.Crash(t.Context()), "the server was killed")

	require.NoError(t, standby.Promote(t.Context()))
	promoted := connect(t, standby.URL)
	require.Equal(t, "kept x", contents(t, promoted, "logged"))
	insert(t, promoted, "new")
	require.Eventually(t, func() bool {
		at, err = connectedTo(t.Context(), pool)
		return err == nil
	}, 30*time.Second, time.Millisecond, "connections that were open are lost, then it follows")
	require.Equal(t, port(t, standby.URL), at)
	require.Error(t, standby.Promote(t.Context()), "it is a primary by now")

	next := startStandby(t, standby)
	require.Equal(t, "kept new x", contents(t, connect(t, next.URL), "logged"), "it can have a standby itself")
	require.NoError(t, s.Stop())
}

func TestServer_Synchronous(t *testing.T) {
	t.Parallel()
	lax := start(t, options(t))
	require.ErrorContains(t, lax.Synchronous(t.Context()), `synchronous_commit is "off"`)

	s, conn := startDurable(t)
	standby := startStandby(t, s)
	require.NoError(t, s.Synchronous(t.Context()))
	insert(t, conn, "acknowledged")

	require.NoError(t, standby.Pause(t.Context()))
	ctx, pid := t.Context(), conn.PgConn().PID()
	committed := make(chan error, 1)
	go func() {
		_, err := conn.Exec(ctx, "INSERT INTO logged VALUES ('waited for')")
		committed <- err
	}()
	watch := connect(t, s.URL)
	require.Eventually(t, func() bool {
		return queryString(t, watch, "SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = $1", pid) == "SyncRep"
	}, 30*time.Second, time.Millisecond)
	require.Empty(t, committed)
	require.Equal(t, "acknowledged x", contents(t, watch, "logged"), "nobody sees it before")
	require.NoError(t, standby.Resume(t.Context()))
	require.NoError(t, <-committed)

	require.NoError(t, s.Kill(t.Context()))
	require.NoError(t, standby.Promote(t.Context()))
	promoted := connect(t, standby.URL)
	require.Equal(t, "acknowledged waited for x", contents(t, promoted, "logged"))
	insert(t, promoted, "it waits for no standby")

	next := startStandby(t, standby)
	require.NoError(t, standby.Synchronous(t.Context()))
	insert(t, promoted, "it waits for this one")
	last := startStandby(t, standby) // copied from one that waits
	require.NoError(t, next.Stop())
	require.NoError(t, standby.Kill(t.Context()))
	require.NoError(t, last.Promote(t.Context()))
	insert(t, connect(t, last.URL), "it does not wait either")
}
