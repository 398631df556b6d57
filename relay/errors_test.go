package relay_test

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// erringQueue keeps the last error of each kind of call.
type erringQueue struct {
	*outbox.PGStore
	mu            sync.Mutex
	claim, settle string
}

func (q *erringQueue) lastErrors() (claim, settle string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.claim, q.settle
}

func (q *erringQueue) note(last *string, err error) {
	if err != nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		*last = err.Error()
	}
}

func (q *erringQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	res, err := q.PGStore.Claim(ctx, opts)
	q.note(&q.claim, err)
	return res, err
}

func (q *erringQueue) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	res, err := q.PGStore.Settle(ctx, settlements)
	q.note(&q.settle, err)
	return res, err
}

// TestTroubles has a relay meet each answer of PostgreSQL's while it delivers. What calls
// return is tested in package outbox, what servers do that end in faults_test.go.
//
// Mutations tried, and what each turns red:
//
//	a connection that only reads kept        TestTroubles/25006_...
func TestTroubles(t *testing.T) {
	t.Parallel()
	for _, trouble := range pgtest.Troubles {
		t.Run(trouble.Code+"_"+trouble.Name+"_costs_no_attempt_and_loses_nothing", func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			pool, begin := trouble.Victim(t, db)
			store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
			require.NoError(t, err)
			queue := &erringQueue{PGStore: store}
			sending := newGate(t)
			var sends atomic.Int64
			p := &provider{before: func(context.Context, outbox.Notification) error {
				sends.Add(1)
				sending.pass()
				return nil
			}}
			addMany(t, db, 20)
			var log logBook
			run(t, newRelay(t, queue, p, relay.Config{Concurrency: 2, BatchSize: 2, Logger: log.logger()}))
			until(t, "they are being sent", func() bool { return sends.Load() == 2 })
			end := begin()
			sending.Open()
			until(t, "it is met", func() bool {
				claim, settle := queue.lastErrors()
				return strings.Contains(claim, "SQLSTATE "+trouble.Code) && strings.Contains(settle, "SQLSTATE "+trouble.Code) &&
					strings.Contains(claim, trouble.Says) && strings.Contains(settle, trouble.Says)
			})
			until(t, "it says so", func() bool {
				return log.count("cannot settle and tries again") > 0 && log.count("cannot claim and tries again") > 0
			})
			end()
			until(t, "all is settled", func() bool {
				n, err := pgxCount(t, db)
				return err == nil && n == 0
			})
			requireUnspent(t, db, p, 20)
			until(t, "it says that it has ended", func() bool {
				return log.count("can settle again") > 0 && log.count("can claim again") > 0
			})
		})
	}
}

// TestNoEntry has a server of its own refuse new connections: with a wrong password, and
// while it shuts down.
func TestNoEntry(t *testing.T) {
	t.Parallel()
	server, db := pgtest.StartServer(t)
	queue := &erringQueue{PGStore: db.Store}
	p := &provider{}
	var log logBook
	addMany(t, db, 1)
	run(t, newRelay(t, queue, p, relay.Config{Logger: log.logger()}))
	untilSettled(t, db)
	admin, err := pgx.Connect(t.Context(), db.URL)
	require.NoError(t, err)
	t.Cleanup(func() { _ = admin.Close(context.Background()) })
	cutOff := func() { // but not those that are still to say who they are, which PostgreSQL 18 lists
		t.Helper()
		_, err := admin.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename IS NOT NULL AND backend_type = 'client backend'")
		require.NoError(t, err)
	}
	delivers := func(i int) {
		t.Helper()
		until(t, "connections are made", func() bool {
			_, err := db.TryAdd(t.Context(), message(i))
			return err == nil
		})
		until(t, "it is delivered", func() bool {
			n, err := pgxCount(t, db)
			return err == nil && n == 0
		})
		requireUnspent(t, db, p, i)
	}

	require.NoError(t, server.Shell(t.Context(), `cd "$PGDATA" && cp pg_hba.conf hba && echo 'host all all all scram-sha-256' >pg_hba.conf`))
	_, err = admin.Exec(t.Context(), "ALTER ROLE postgres PASSWORD 'another'")
	require.NoError(t, err)
	_, err = admin.Exec(t.Context(), "SELECT pg_reload_conf()")
	require.NoError(t, err)
	until(t, "the password is wrong", func() bool {
		cutOff()
		claim, _ := queue.lastErrors()
		return strings.Contains(claim, "SQLSTATE 28P01")
	})
	require.NoError(t, server.Shell(t.Context(), `cd "$PGDATA" && cp hba pg_hba.conf`))
	_, err = admin.Exec(t.Context(), "SELECT pg_reload_conf()")
	require.NoError(t, err)
	delivers(2)

	require.NoError(t, server.Shell(t.Context(), `read pid <"$PGDATA/postmaster.pid" && kill -TERM $pid`)) // waits for clients to leave
	until(t, "the server is shutting down", func() bool {
		cutOff()
		claim, _ := queue.lastErrors()
		return strings.Contains(claim, "SQLSTATE 57P03")
	})
	require.NoError(t, server.Restart(t.Context()))
	delivers(3)
}
