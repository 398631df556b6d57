package relay_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// Mutations tried, and what each turns red:
//
//	commits that do not wait for the standby    TestFailover_loses_.../synchronous
//	the booking on another connection           TestFailover_loses_.../asynchronous
//	another token for a repeated claim          TestStandbyStalls
//
// What a stale settle would do is shown where nothing depends on chance: TestFailover_asynchronous
// of the root package.

// bookedSQL is where callers write down what they have added, in the same transaction.
const bookedSQL = `CREATE TABLE booked (request text PRIMARY KEY, type text, booking_id bigint, candidate_tg_id bigint, id bigint, version bigint, outcome text, content text)`

// caller adds for a few bookings, over and over, each time until it is answered, and keeps
// a journal of it.
type caller struct {
	name    string
	pool    *pgxpool.Pool
	store   *outbox.PGStore
	journal *ledger.Journal
}

func (c *caller) call(ctx context.Context, rng *rand.Rand) error {
	for i := 0; ctx.Err() == nil; i++ {
		n := outbox.NewNotification{Type: "reject", BookingID: int64(i/4*3 + rng.IntN(12) + 1), Payload: map[string]string{"content": fmt.Sprintf("%s.%d", c.name, i)}}
		rec := ledger.Commit{Caller: c.name, Request: fmt.Sprintf("%s.%d", c.name, i), Key: n.Key(), Content: fmt.Sprintf(`{"content":"%s.%d"}`, c.name, i)}
		for rec.Result != ledger.Committed && ctx.Err() == nil {
			if err := c.attempt(ctx, n, rec.Request, &rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// attempt runs one transaction, which takes effect once however often it is run. The error
// is one of the journal.
func (c *caller) attempt(ctx context.Context, n outbox.NewNotification, request string, rec *ledger.Commit) error {
	rec.Result, rec.From, rec.To = ledger.Unknown, time.Now(), time.Time{}
	began := *rec
	if err := c.journal.Append(ledger.Record{Commit: &began}); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	committing := false
	err := outbox.RunInTx(bounded, c.pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
		committing = false
		err := tx.QueryRow(bounded, "SELECT id, version, outcome FROM booked WHERE request = $1", request).Scan(&rec.ID, &rec.Version, &rec.Outcome)
		if err == nil { // it was committed before
			committing = true
			return nil
		}
		if !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		res, err := c.store.AddNotification(bounded, tx, n)
		if err != nil {
			return err
		}
		rec.ID, rec.Version, rec.Outcome = res.Notification.ID, res.Notification.Version, res.Outcome
		_, err = tx.Exec(bounded, "INSERT INTO booked VALUES ($1, $2, $3, $4, $5, $6, $7, $8)", request, rec.Key.Type, rec.Key.BookingID,
			rec.Key.CandidateTgID, rec.ID, rec.Version, rec.Outcome, rec.Content)
		committing = err == nil
		return err
	})
	switch {
	case err == nil:
		rec.Result = ledger.Committed
	case !committing:
		rec.Result = ledger.RolledBack
	}
	ended := *rec
	ended.To = time.Now()
	return c.journal.Append(ledger.Record{Commit: &ended})
}

// TestFailover_loses_... has callers and relays at work while the primary is killed for good
// and the standby promoted. They have one URL, and nobody tells them.
func TestFailover_loses_nothing_that_was_synchronous_and_only_the_end_of_what_was_not(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"synchronous", "asynchronous"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			pair := pgtest.StartPair(t)
			pair.MustExec(t, bookedSQL)
			pair.MustExec(t, ledger.ChangesSQL)
			if kind == "synchronous" {
				require.NoError(t, pair.Primary.Synchronous(t.Context()))
			}
			path := filepath.Join(t.TempDir(), "journal")
			journal, err := ledger.Create(path)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, journal.Close()) }) // after the relays have stopped

			cfg := relay.Config{Lease: 10 * time.Second, PollInterval: 20 * time.Millisecond, BatchSize: 10, Logger: discard}
			p := &provider{}
			var stopRelays [2]func()
			for i := range stopRelays {
				w := &ledger.Worker{Name: fmt.Sprintf("relay%d", i), Journal: journal, Accepts: true}
				stopRelays[i] = run(t, newRelay(t, w.Queue(pair.Store), w.Sender(p), cfg))
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var callers sync.WaitGroup
			var failed [3]error
			for i := range failed {
				c := &caller{name: fmt.Sprintf("caller%d", i), pool: pair.Pool, store: pair.Store, journal: journal}
				rng := rand.New(rand.NewPCG(uint64(i), 0))
				callers.Go(func() { failed[i] = c.call(ctx, rng) })
			}
			for range 3 {
				progress(t, p)
			}
			if kind == "asynchronous" {
				pair.Sever(t)
				// One more than there are callers: one of them has an answer that will be lost.
				booked := func() int { return pgtest.One[int](t, pair.DB, "SELECT count(*) FROM booked") }
				before := booked()
				until(t, "callers go on", func() bool { return booked() > before+len(failed) })
				progress(t, p) // with what will never have been
			}
			f := ledger.Failover{Killed: time.Now()}
			require.NoError(t, pair.Primary.Kill(t.Context()))
			require.NoError(t, pair.Standby.Promote(t.Context()))
			f.Promoted = time.Now()
			for range 3 {
				progress(t, p)
			}
			stop()
			callers.Wait()
			for _, err := range failed {
				require.NoError(t, err)
			}
			require.NoError(t, journal.Append(ledger.Record{Fault: &ledger.Fault{Kind: "failover", From: f.Killed, To: time.Now()}}))
			pgtest.Reset(t, pair.Pool)
			untilSettled(t, pair.DB)
			for _, stop := range stopRelays { // the last settle may not be in the journal yet
				stop()
			}

			h := ledger.History{Delivery: cfg.Delivery, Lease: cfg.Lease, Drained: true}
			h.Records, err = ledger.Read(path)
			require.NoError(t, err)
			h.Rows = all(t, pair.Store)
			h.Changes, err = ledger.ReadChanges(t.Context(), pair)
			require.NoError(t, err)
			rows, err := pair.Query(t.Context(), "SELECT request, type, booking_id, candidate_tg_id, id, version, outcome, content FROM booked")
			require.NoError(t, err)
			h.Booked, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (c ledger.Commit, err error) {
				err = row.Scan(&c.Request, &c.Key.Type, &c.Key.BookingID, &c.Key.CandidateTgID, &c.ID, &c.Version, &c.Outcome, &c.Content)
				return c, err
			})
			require.NoError(t, err)
			whole, lost := h, ledger.Losses{}
			if kind == "asynchronous" {
				h, lost = h.Survived(f)
			}
			v := ledger.Check(h)
			t.Logf("%d adds, %d accepted, %d twice; lost: %+v", v.Adds, v.Accepted, v.DuplicatesAllowed, lost)
			for _, violation := range append(v.Violations, lost.Violations...) {
				t.Error(violation)
				for _, line := range whole.Of(violation.Key, violation.ID) {
					t.Log(line)
				}
			}
			require.NotZero(t, v.Adds)
			if kind == "asynchronous" {
				require.NotZero(t, lost.Adds+lost.Claims, "it is about what is lost")
			}
		})
	}
}

// A claim that is lost has never been, whatever was sent by it: no way of delivery, nor
// asking the provider about what was begun, helps against an asynchronous failover.
func TestFailover_asynchronous_sends_again_what_a_lost_claim_sent(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t)
	p := &provider{}
	ask := &askable{provider: p}
	modes := map[string]relay.Config{"AtLeastOnce": {}, "AtMostOnce": {Delivery: relay.AtMostOnce}, "AtLeastOnce_and_ask": {}}
	for mode := range modes {
		pair.Add(t, outbox.NewNotification{Type: mode})
	}
	pair.Sever(t)
	pair.Add(t, outbox.NewNotification{Type: "vanishes"})
	deliver := func(mode string) {
		t.Helper()
		sender := relay.Sender(p)
		if mode == "AtLeastOnce_and_ask" {
			sender = ask
		}
		cfg := modes[mode]
		cfg.Types = []string{mode}
		settled, err := newRelay(t, pair.Store, sender, cfg).RunOnce(t.Context())
		require.NoError(t, err)
		require.Equal(t, 1, settled)
	}
	for mode := range modes {
		deliver(mode)
	}
	deliver("vanishes")
	vanished := pair.Get(t, outbox.Key{Type: "vanishes"})
	require.Equal(t, outbox.StatusSent, vanished.Status)

	pair.FailOver(t)
	pgtest.Reset(t, pair.Pool)
	for mode := range modes {
		before := pair.Get(t, outbox.Key{Type: mode})
		require.Equal(t, outbox.StatusPending, before.Status)
		require.Zero(t, before.Attempts)
		deliver(mode)
		require.Len(t, p.of(before.ID), 2, mode)
	}
	require.Zero(t, ask.asked.Load(), "nothing says that something was begun")
	_, err := pair.Store.Get(t.Context(), vanished.Key())
	require.ErrorIs(t, err, outbox.ErrNotFound, "and it was sent")
	require.Len(t, p.of(vanished.ID), 1)
}

// all lists all rows.
func all(t testing.TB, store *outbox.PGStore) (rows []outbox.Notification) {
	t.Helper()
	for f := (outbox.Filter{Limit: 1000}); ; f.After = rows[len(rows)-1].ID {
		page, err := store.List(t.Context(), f)
		require.NoError(t, err)
		if len(page) == 0 {
			return rows
		}
		rows = append(rows, page...)
	}
}

// failingQueue counts the claims that failed, once they have ended on the server as well:
// before that, one holds what it has found, and a repeat would find nothing.
type failingQueue struct {
	*outbox.PGStore
	t      testing.TB
	pool   *pgxpool.Pool
	failed atomic.Int64
}

func (q *failingQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	res, err := q.PGStore.Claim(ctx, opts)
	if err != nil {
		assert.Eventually(q.t, func() bool {
			var ended bool
			askErr := q.pool.QueryRow(context.WithoutCancel(ctx), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity
				WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid())`).Scan(&ended)
			return askErr == nil && ended
		}, patience, 5*time.Millisecond, "the claim does not end on the server")
		q.failed.Add(1)
	}
	return res, err
}

// A synchronous standby that does not answer keeps commits waiting, and nothing else. pgx
// cancels the wait of a claim that it gives up, which is committed then, on the primary alone.
func TestStandbyStalls_and_nothing_is_sent_nor_an_attempt_spent(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t)
	require.NoError(t, pair.Primary.Synchronous(t.Context()))
	const rows = 20
	addMany(t, pair.DB, rows)
	resume := pgtest.Pause(t, pair.Standby)
	p, q := &provider{}, &failingQueue{PGStore: pair.Store, t: t, pool: pair.Pool}
	run(t, newRelay(t, q, p, relay.Config{Lease: 6 * time.Second, PollInterval: 100 * time.Millisecond, Delivery: relay.AtMostOnce, Logger: discard}))
	until(t, "claims have no answer", func() bool { return q.failed.Load() > 1 })
	require.Equal(t, rows, count(t, pair.DB, held))
	require.Zero(t, p.total(), "what the standby does not have is not sent")
	resume()
	requireUnspent(t, pair.DB, p, rows)
}
