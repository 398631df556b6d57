package pgtest

import (
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

// Pair is a primary and a standby that streams from it. The pool of DB leads to whichever
// takes writes.
type Pair struct {
	*DB
	Primary, Standby *pgserver.Server
}

// StartPair starts a pair for this test alone, with a migrated database. Replication is
// asynchronous.
func StartPair(t testing.TB) *Pair {
	t.Helper()
	p := &Pair{}
	p.Primary, _ = StartServer(t)
	var err error
	p.Standby, err = p.Primary.StartStandby(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Standby.Stop()) })
	p.DB = open(t, pgserver.WritableURL(p.Primary, p.Standby))
	require.NoError(t, p.Standby.CatchUp(t.Context()))
	return p
}

// Sever ends the replication, so that what is committed from now on is lost when the
// pair fails over.
func (p *Pair) Sever(t testing.TB) {
	t.Helper()
	require.NoError(t, p.Standby.CatchUp(t.Context()))
	require.NoError(t, p.Standby.Detach(t.Context()))
}

// FailOver kills the primary for good and promotes the standby. Pools find out by
// themselves.
func (p *Pair) FailOver(t testing.TB) {
	t.Helper()
	require.NoError(t, p.Primary.Kill(t.Context()))
	require.NoError(t, p.Standby.Promote(t.Context()))
}

// Reset closes a pool's connections to a server that is gone, for tests that are about
// something else.
func Reset(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	pool.Reset()
	require.NoError(t, pool.Ping(t.Context()))
}
