package relay_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// The relay on a real PostgreSQL: here with adds, callers and other relays in its
// way, in faults_test.go with processes, connections and servers that die.
//
// Mutations tried, and what each turns red:
//
//	claim without SKIP LOCKED               TestCallerHoldsTheRow, TestManyRelays
//	a refresh clears lease and token        TestAddWhileDelivering
//	an identical add raises the version     TestAddWhileDelivering, TestCallerHoldsTheRow, TestManyRelays
//	the process's clock ends the lease      TestNoArgumentIsATime
//	no renewal                              TestLeasesAreRenewed, TestNoArgumentIsATime
//	rows not handed back                    TestShutdownInABatch
//	claim without Except                    TestCallerHoldsTheRow
//	NOTIFY of each add                      TestNotify/is_sent_four_times_a_second_at_most
//	the payload of a NOTIFY is ignored      TestNotify/does_not_wake_the_relay_of_another_schema
//	Listen without its probe                TestNotify/that_a_pooler_swallows_…

func TestMain(m *testing.M) {
	if spec := os.Getenv(workerVariable); spec != "" {
		work(spec)
		return
	}
	pgtest.Main(m)
}

// patience bounds the wait for what should happen soon.
const patience = 30 * time.Second

// shortLease is for tests that wait for its end. A busy machine has to answer within a third
// of it, on a new connection.
const shortLease = 3 * time.Second

func until(t testing.TB, what string, reached func() bool) {
	t.Helper()
	require.Eventually(t, reached, patience, 5*time.Millisecond, what)
}

// elapsed waits until d has passed since began, for what only time brings about.
func elapsed(t testing.TB, began time.Time, d time.Duration) {
	t.Helper()
	require.Eventually(t, func() bool { return time.Since(began) > d }, d+patience, 10*time.Millisecond)
}

// run runs r until stop, or the end of the test. It must not return before.
func run(t testing.TB, r *relay.Relay) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	end := sync.OnceValue(func() error { // to fail in here would be a panic, and the end of all tests
		defer cancel()
		select {
		case err := <-done:
			return fmt.Errorf("relay: Run returned before its ctx ended: %w", err)
		default:
		}
		cancel()
		return <-done
	})
	stop = func() { require.NoError(t, end()) }
	t.Cleanup(stop)
	return stop
}

// delivery is one message as the provider got it.
type delivery struct {
	ID, Version, SentVersion int64
	Receipt, Text            string // Receipt: that of SentVersion
}

// provider is a sender that keeps what it accepted.
type provider struct {
	before func(ctx context.Context, n outbox.Notification) error // of accepting; its error refuses

	mu  sync.Mutex
	got map[int64][]delivery
}

func (p *provider) Send(ctx context.Context, n outbox.Notification) (string, error) {
	if p.before != nil {
		if err := p.before(ctx, n); err != nil {
			return "", err
		}
	}
	var content struct{ Text string }
	_ = json.Unmarshal(n.Payload, &content)
	return p.accept(delivery{n.ID, n.Version, n.SentVersion, n.Receipt, content.Text}), nil
}

func (p *provider) accept(d delivery) (receipt string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.got == nil {
		p.got = make(map[int64][]delivery)
	}
	p.got[d.ID] = append(p.got[d.ID], d)
	return fmt.Sprintf("message %d of %d", len(p.got[d.ID]), d.ID)
}

func (p *provider) of(id int64) []delivery {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got[id])
}

// accepted returns how many messages were accepted, and how often those of the key
// that got most.
func (p *provider) accepted() (total, most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ds := range p.got {
		total += len(ds)
		most = max(most, len(ds))
	}
	return total, most
}

func (p *provider) total() int { total, _ := p.accepted(); return total }

// requireOnce asserts that n messages were accepted, each once.
func (p *provider) requireOnce(t testing.TB, n int) {
	t.Helper()
	total, most := p.accepted()
	require.Equal(t, n, total)
	require.Equal(t, min(n, 1), most, "a message was sent more than once")
}

// gate stops whoever comes through until it is opened.
type gate struct {
	reached, opened chan struct{}
	reach           sync.Once
	Open            func()
}

func newGate(t testing.TB) *gate {
	g := &gate{reached: make(chan struct{}), opened: make(chan struct{})}
	g.Open = sync.OnceFunc(func() { close(g.opened) })
	context.AfterFunc(t.Context(), g.Open) // before cleanups, which wait for relays
	return g
}

func (g *gate) pass() {
	g.reach.Do(func() { close(g.reached) })
	<-g.opened
}

func (g *gate) await(t testing.TB) {
	t.Helper()
	select {
	case <-g.reached:
	case <-time.After(patience):
		require.FailNow(t, "nobody came to the gate")
	}
}

// hookedQueue calls functions, where not nil, at the moments of a delivery.
type hookedQueue struct {
	*outbox.PGStore
	afterClaim   func(outbox.ClaimResult)
	beforeSettle func([]outbox.Settlement)
	afterSettle  func([]outbox.LeaseResult)
}

func (q *hookedQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	res, err := q.PGStore.Claim(ctx, opts)
	if q.afterClaim != nil && len(res.Claimed) > 0 {
		q.afterClaim(res)
	}
	return res, err
}

func (q *hookedQueue) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	if q.beforeSettle != nil {
		q.beforeSettle(settlements)
	}
	res, err := q.PGStore.Settle(context.WithoutCancel(ctx), settlements) // a hook may have outlasted the timeout
	if q.afterSettle != nil && err == nil {
		q.afterSettle(res)
	}
	return res, err
}

type text struct{ Text string }

// message is the i-th notification of a test, with its first content.
func message(i int) outbox.NewNotification {
	return outbox.NewNotification{Type: "reject", BookingID: int64(i), Payload: text{"first"}}
}

// addMany adds messages 1 to n.
func addMany(t testing.TB, db *pgtest.DB, n int) {
	t.Helper()
	ns := make([]outbox.NewNotification, n)
	for i := range ns {
		ns[i] = message(i + 1)
	}
	for chunk := range slices.Chunk(ns, 2000) {
		db.AddMany(t, chunk...)
	}
}

func count(t testing.TB, db *pgtest.DB, where string) int {
	t.Helper()
	return pgtest.One[int](t, db, "SELECT count(*) FROM outbox_notifications WHERE "+where)
}

func untilSettled(t testing.TB, db *pgtest.DB) {
	t.Helper()
	until(t, "all is settled", func() bool { return count(t, db, "status = 'pending'") == 0 })
}

const leased = "lease_token IS NOT NULL AND lease_until > clock_timestamp()"

// held is leased whose end may have passed: a busy machine can take longer than a lease to look.
const held = "lease_token IS NOT NULL AND lease_until IS NOT NULL"

func TestAddWhileDelivering(t *testing.T) {
	t.Parallel()
	inAnHour := time.Now().Add(time.Hour).Truncate(time.Microsecond).UTC()
	same, changed, postponed := message(1), message(1), message(1)
	changed.Payload = text{"second"}
	postponed.NotBefore = inAnHour
	both := changed
	both.NotBefore = inAnHour
	first := delivery{Version: 1, Text: "first"}
	second := delivery{Version: 2, SentVersion: 1, Receipt: "message 1 of 1", Text: "second"}
	secondAfterFailure := delivery{Version: 2, Text: "second"}
	refused := errors.New("refused")

	type outcome struct {
		got         []delivery
		status      outbox.Status
		version     int64
		sentVersion int64
		attempts    int
		nextRetry   time.Time
	}
	sentOnce := outcome{got: []delivery{first}, status: outbox.StatusSent, version: 1, sentVersion: 1, attempts: 1}
	sentBoth := outcome{got: []delivery{first, second}, status: outbox.StatusSent, version: 2, sentVersion: 2, attempts: 1}
	waits := outcome{got: []delivery{first}, status: outbox.StatusPending, version: 2, sentVersion: 1, nextRetry: inAnHour}
	onlySecond := outcome{got: []delivery{secondAfterFailure}, status: outbox.StatusSent, version: 2, sentVersion: 2, attempts: 1}

	for _, c := range []struct {
		name    string
		add     outbox.NewNotification
		moments []string
		sendErr error // of the first Send
		want    outcome
	}{
		{name: "identical", add: same, moments: []string{"claimed", "sending", "accepted"}, want: sentOnce},
		{name: "changed", add: changed, moments: []string{"claimed", "sending", "accepted"}, want: sentBoth},
		{name: "postponed", add: postponed, moments: []string{"claimed", "sending", "accepted"}, want: sentOnce},
		{name: "changed_and_postponed", add: both, moments: []string{"claimed", "sending", "accepted"}, want: waits},
		{name: "identical", add: same, moments: []string{"settled"}, want: sentOnce},
		{name: "changed", add: changed, moments: []string{"settled"}, want: sentOnce},
		{name: "postponed", add: postponed, moments: []string{"settled"}, want: sentOnce},
		{name: "identical_and_the_delivery_fails", add: same, sendErr: refused, moments: []string{"claimed", "sending"},
			want: outcome{got: []delivery{first}, status: outbox.StatusSent, version: 1, sentVersion: 1, attempts: 2}},
		{name: "changed_and_the_delivery_fails", add: changed, sendErr: refused, moments: []string{"claimed", "sending"}, want: onlySecond},
		{name: "identical_and_the_delivery_fails_for_good", add: same, sendErr: relay.Permanent(refused), moments: []string{"claimed", "sending"},
			want: outcome{status: outbox.StatusFailed, version: 1, attempts: 1}},
		{name: "changed_and_the_delivery_fails_for_good", add: changed, sendErr: relay.Permanent(refused), moments: []string{"claimed", "sending"}, want: onlySecond},
		{name: "postponed_and_the_delivery_fails", add: postponed, sendErr: refused, moments: []string{"sending"},
			want: outcome{status: outbox.StatusPending, version: 1, attempts: 1, nextRetry: inAnHour}},
	} {
		for _, moment := range c.moments {
			t.Run(moment+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				db := pgtest.NewDB(t)
				gates := map[string]*gate{"claimed": newGate(t), "sending": newGate(t), "accepted": newGate(t)}
				for at, g := range gates {
					if at != moment {
						g.Open()
					}
				}
				var sends atomic.Int64
				p := &provider{before: func(context.Context, outbox.Notification) error {
					gates["sending"].pass()
					if sends.Add(1) == 1 {
						return c.sendErr
					}
					return nil
				}}
				q := &hookedQueue{PGStore: db.Store,
					afterClaim:   func(outbox.ClaimResult) { gates["claimed"].pass() },
					beforeSettle: func([]outbox.Settlement) { gates["accepted"].pass() }}
				id := db.Add(t, message(1)).Notification.ID
				run(t, newRelay(t, q, p, relay.Config{Backoff: func(int) time.Duration { return time.Millisecond }}))

				if moment == "settled" {
					untilSettled(t, db)
					before := db.Get(t, same.Key())
					res := db.Add(t, c.add)
					require.Equal(t, outbox.AddResult{Notification: before, Outcome: outbox.OutcomeExisting}, res)
				} else {
					gates[moment].await(t)
					res := db.Add(t, c.add)
					require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
					require.True(t, res.InFlight)
					require.Equal(t, c.want.version, res.Notification.Version)
					require.Equal(t, 1, res.Notification.Attempts)
					require.False(t, res.Notification.LockedAt.IsZero())
					gates[moment].Open()
				}

				var n outbox.Notification
				until(t, "the row comes to rest", func() bool {
					n = db.Get(t, same.Key())
					return n.Status == c.want.status && n.LockedAt.IsZero() && n.SentVersion == c.want.sentVersion
				})
				require.Equal(t, c.want, outcome{got: withoutID(p.of(id)), status: n.Status, version: n.Version, sentVersion: n.SentVersion,
					attempts: n.Attempts, nextRetry: n.NextRetryAt})
				require.Zero(t, count(t, db, "lease_token IS NOT NULL OR lease_until IS NOT NULL"))
				if k := len(p.of(id)); k > 0 {
					require.Equal(t, fmt.Sprintf("message %d of %d", k, id), n.Receipt)
				}
				if c.want.status == outbox.StatusPending { // the rest of its life
					require.Equal(t, outbox.OutcomeRefreshed, db.Add(t, same).Outcome)
					untilSettled(t, db)
					last := p.of(id)[len(p.of(id))-1]
					require.Equal(t, db.Get(t, same.Key()).Version, last.Version)
					require.Equal(t, "first", last.Text)
				}
			})
		}
	}
}

// withoutID makes deliveries of one row, which has id 1 in a new database, comparable.
func withoutID(ds []delivery) []delivery {
	for i := range ds {
		ds[i].ID = 0
	}
	return ds
}

func TestCallerHoldsTheRow(t *testing.T) {
	t.Parallel()
	held := message(1)
	changed := held
	changed.Payload = text{"second"}
	end := map[string]func(testing.TB, pgx.Tx){
		"commits":    func(t testing.TB, tx pgx.Tx) { require.NoError(t, tx.Commit(t.Context())) },
		"rolls_back": func(t testing.TB, tx pgx.Tx) { require.NoError(t, tx.Rollback(t.Context())) },
	}
	for name, finish := range end {
		t.Run("during_the_claim_and_others_are_delivered_until_it_"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addMany(t, db, 50)
			tx := db.MustBegin(t)
			res, err := db.Store.AddNotification(t.Context(), tx, changed)
			require.NoError(t, err)
			require.False(t, res.InFlight)
			p := &provider{}
			run(t, newRelay(t, db.Store, p, relay.Config{BatchSize: 7}))
			until(t, "the others are sent", func() bool { return count(t, db, "status = 'sent'") == 49 })
			require.Empty(t, p.of(res.Notification.ID))
			finish(t, tx)
			untilSettled(t, db)
			p.requireOnce(t, 50)
			n := db.Get(t, held.Key())
			require.Equal(t, n.Version, n.SentVersion)
			require.Equal(t, 1, n.Attempts)
			want := map[string]string{"commits": "second", "rolls_back": "first"}[name]
			require.Equal(t, want, p.of(n.ID)[0].Text)
		})

		t.Run("during_the_settle_and_others_are_delivered_until_it_"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addMany(t, db, 50)
			id := db.Get(t, held.Key()).ID
			p, sending, heldBack := &provider{}, newGate(t), newGate(t)
			p.before = func(_ context.Context, n outbox.Notification) error {
				if n.ID == id {
					sending.pass()
				}
				return nil
			}
			q := &hookedQueue{PGStore: db.Store, afterSettle: func(res []outbox.LeaseResult) {
				if slices.Contains(res, outbox.LeaseHeld) {
					heldBack.pass()
				}
			}}
			heldBack.Open()
			run(t, newRelay(t, q, p, relay.Config{BatchSize: 7}))
			sending.await(t)
			tx := db.MustBegin(t)
			res, err := db.Store.AddNotification(t.Context(), tx, held)
			require.NoError(t, err)
			require.True(t, res.InFlight)
			sending.Open()
			heldBack.await(t)
			until(t, "the others are settled", func() bool { return count(t, db, "status = 'sent'") == 49 })
			finish(t, tx)
			untilSettled(t, db)
			p.requireOnce(t, 50)
			require.Equal(t, 1, db.Get(t, held.Key()).Attempts)
		})

		t.Run("for_longer_than_the_lease_and_it_is_sent_once_when_it_"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			db.Add(t, held)
			p, sending := &provider{}, newGate(t)
			p.before = func(context.Context, outbox.Notification) error { sending.pass(); return nil }
			run(t, newRelay(t, db.Store, p, relay.Config{Lease: shortLease, SendTimeout: shortLease * 9 / 10}))
			sending.await(t)
			tx := db.MustBegin(t)
			_, err := db.Store.AddNotification(t.Context(), tx, held)
			require.NoError(t, err)
			sending.Open()
			until(t, "the lease ends, as nobody can renew it", func() bool { return count(t, db, leased) == 0 })
			finish(t, tx)
			untilSettled(t, db)
			p.requireOnce(t, 1)
			require.Equal(t, 1, db.Get(t, held.Key()).Attempts)
		})
	}

	t.Run("for_longer_than_the_lease_and_of_two_relays_one_settles_it", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, held)
		p, sending := &provider{}, newGate(t)
		p.before = func(context.Context, outbox.Notification) error { sending.pass(); return nil }
		first := relay.Config{Lease: 2 * shortLease, SendTimeout: 2 * shortLease * 9 / 10} // a stall of one may end in a third delivery
		second := first
		second.PollInterval = 5 * time.Millisecond
		run(t, newRelay(t, db.Store, p, first))
		sending.await(t)
		run(t, newRelay(t, db.Store, p, second))
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), tx, held)
		require.NoError(t, err)
		sending.Open()
		until(t, "the lease ends, as nobody can renew it", func() bool { return count(t, db, leased) == 0 })
		require.NoError(t, tx.Commit(t.Context()))
		untilSettled(t, db)
		// The one with the result need not be the first to come by.
		require.LessOrEqual(t, p.total(), 2)
		n := db.Get(t, held.Key())
		require.Equal(t, outbox.StatusSent, n.Status)
		require.EqualValues(t, 1, n.SentVersion)
	})

	t.Run("without_a_lease_of_its_own_waiting_for_it", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), tx, held) // not committed: there is no row for others
		require.NoError(t, err)
		p := &provider{}
		run(t, newRelay(t, db.Store, p, relay.Config{}))
		db.Add(t, message(2))
		until(t, "the other is sent", func() bool { return count(t, db, "status = 'sent'") == 1 })
		require.NoError(t, tx.Rollback(t.Context()))
		db.Add(t, message(3))
		untilSettled(t, db)
		p.requireOnce(t, 2)
	})
}

// TestReconcilerWithoutAnAnswer: what is asked about in vain is older than what the row has,
// which goes out when the attempts are over, and no sooner than the Reconciler wants to
// be asked again.
//
// Mutations: st.Asked left out of attempt, asked IS NOT TRUE out of settleSQL.
func TestReconcilerWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	db.Add(t, message(1))
	_, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute})
	require.NoError(t, err)
	db.MustExec(t, "UPDATE outbox_notifications SET lease_until = now()")
	newer := message(1)
	newer.Payload = "newer"
	require.Equal(t, int64(2), db.Add(t, newer).Notification.Version)

	const pause = 50 * time.Millisecond
	var times []time.Time
	s := &reconciler{answer: func() (string, bool, error) {
		times = append(times, time.Now())
		return "", false, relay.RetryAfter(errors.New("busy"), pause)
	}}
	stop := run(t, newRelay(t, db.Store, s, relay.Config{MaxAttempts: 2, PollInterval: time.Millisecond, Backoff: func(int) time.Duration { return 0 }}))
	untilSettled(t, db)
	stop()
	require.Equal(t, []int64{1, 1, 1}, s.asked)
	require.Equal(t, []int64{2}, s.sent)
	for i := range 2 {
		require.GreaterOrEqual(t, times[i+1].Sub(times[i]), pause)
	}
	require.Equal(t, outbox.StatusSent, db.Get(t, newer.Key()).Status)
}

// Two hundred rows a batch from eight relays: what one holds the others pass over.
func TestManyRelays(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	const rows = 20_000
	addMany(t, db, rows)
	held := db.Get(t, message(rows/2).Key())
	tx := db.MustBegin(t)
	_, err := db.Store.AddNotification(t.Context(), tx, message(rows/2))
	require.NoError(t, err)
	p := &provider{}
	for range 8 {
		run(t, newRelay(t, db.Store, p, relay.Config{BatchSize: 200, Concurrency: 50}))
	}
	require.Eventually(t, func() bool { return count(t, db, "status = 'pending'") == 1 }, 3*patience, 20*time.Millisecond)
	require.Empty(t, p.of(held.ID))
	p.requireOnce(t, rows-1)
	require.NoError(t, tx.Commit(t.Context()))
	// It may have fallen due before what claims look at while whole ones are slow, for a minute.
	require.Eventually(t, func() bool { return count(t, db, "status = 'pending'") == 0 }, 3*patience, 20*time.Millisecond)
	p.requireOnce(t, rows)
	require.Equal(t, rows, count(t, db, "status = 'sent' AND attempts = 1 AND sent_version = 1"))
}

func TestStricterDefaultIsolation(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"repeatable read", "serializable"} {
		t.Run(strings.ReplaceAll(level, " ", "_"), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			const rows = 500
			addMany(t, db, rows)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = level
			})
			require.Equal(t, level, pgtest.One[string](t, pool, "SHOW transaction_isolation"))
			store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
			require.NoError(t, err)
			p := &provider{}
			for range 4 {
				run(t, newRelay(t, store, p, relay.Config{BatchSize: 20}))
			}
			untilSettled(t, db)
			p.requireOnce(t, rows)
			require.Equal(t, rows, count(t, db, "status = 'sent' AND attempts = 1"))
		})
	}
}

func TestLeasesAreRenewed(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	const rows, lease = 10, 10 * time.Second
	addMany(t, db, rows)
	slow, quick, g := &provider{}, &provider{}, newGate(t)
	slow.before = func(context.Context, outbox.Notification) error { g.pass(); return nil }
	run(t, newRelay(t, db.Store, slow, relay.Config{Concurrency: 1, BatchSize: rows, Lease: lease}))
	g.await(t)
	began := time.Now()
	run(t, newRelay(t, db.Store, quick, relay.Config{Lease: lease, PollInterval: 50 * time.Millisecond}))
	elapsed(t, began, 2*lease)
	g.Open()
	untilSettled(t, db)
	slow.requireOnce(t, rows)
	quick.requireOnce(t, 0)
}

func TestPoolOfOne(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	const rows = 50
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.MaxConns = 1 })
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard, Notify: true})
	require.NoError(t, err)
	// The sender adds a message for each of the first through the same pool.
	p := &provider{before: func(ctx context.Context, n outbox.Notification) error {
		if n.BookingID > rows {
			return nil
		}
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			_, err := store.AddNotification(ctx, tx, message(int(n.BookingID)+rows))
			return err
		})
	}}
	addMany(t, db, rows)
	var log logBook
	run(t, newRelay(t, store, p, relay.Config{Listen: true, Logger: log.logger()}))
	until(t, "all are sent", func() bool { return count(t, db, "status = 'sent'") == 2*rows })
	p.requireOnce(t, 2*rows)
	require.Zero(t, log.count("level=WARN"))
}

func TestShutdownInABatch(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	const rows, sending = 20, 3
	addMany(t, db, rows)
	g := newGate(t)
	var begun atomic.Int64
	p := &provider{before: func(context.Context, outbox.Notification) error { begun.Add(1); g.pass(); return nil }}
	stop := run(t, newRelay(t, db.Store, p, relay.Config{Concurrency: sending, BatchSize: rows}))
	until(t, "the batch is under way", func() bool { return begun.Load() == sending && count(t, db, leased) == rows })
	stopped := make(chan struct{})
	go func() { defer close(stopped); stop() }()
	until(t, "the rest is handed back while messages are being sent", func() bool {
		return count(t, db, "status = 'pending' AND attempts = 0 AND locked_at IS NULL AND lease_token IS NULL AND lease_until IS NULL "+
			"AND lease_version IS NULL AND next_retry_at IS NULL") == rows-sending
	})
	g.Open()
	<-stopped
	require.Equal(t, sending, count(t, db, "status = 'sent'"))
	p.requireOnce(t, sending)

	// A default lease is longer than the patience for this.
	run(t, newRelay(t, db.Store, p, relay.Config{}))
	untilSettled(t, db)
	p.requireOnce(t, rows)
	require.Equal(t, rows, count(t, db, "status = 'sent' AND attempts = 1"))
}

// argumentLog keeps the arguments of all statements.
type argumentLog struct {
	mu   sync.Mutex
	args map[string][]any
}

func (l *argumentLog) TraceQueryStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.args == nil {
		l.args = make(map[string][]any)
	}
	l.args[d.SQL] = append(l.args[d.SQL], d.Args...)
	return ctx
}

func (l *argumentLog) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (l *argumentLog) TraceBatchStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	for _, q := range d.Batch.QueuedQueries {
		l.TraceQueryStart(ctx, nil, pgx.TraceQueryStartData{SQL: q.SQL, Args: q.Arguments})
	}
	return ctx
}

func (l *argumentLog) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (l *argumentLog) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

// The process's clock may be off by any amount: what decides is the database's. (Since, of a
// claim, is a time that the database said.)
func TestNoArgumentIsATime(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	var log argumentLog
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log })
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
	require.NoError(t, err)
	addMany(t, db, 40)
	g := newGate(t)
	p := &provider{before: func(_ context.Context, n outbox.Notification) error {
		switch n.BookingID % 4 {
		case 1:
			return errors.New("refused")
		case 2:
			return relay.Permanent(errors.New("refused"))
		case 3:
			return relay.RetryAfter(errors.New("refused"), time.Minute)
		}
		if n.BookingID == 40 {
			g.pass()
		}
		return nil
	}}
	stop := run(t, newRelay(t, store, p, relay.Config{Lease: shortLease, SendTimeout: shortLease * 9 / 10, Types: []string{"reject"}}))
	g.await(t)
	until(t, "the lease is renewed", func() bool {
		log.mu.Lock()
		defer log.mu.Unlock()
		return slices.ContainsFunc(slices.Collect(maps.Keys(log.args)), func(sql string) bool {
			return strings.Contains(sql, "UPDATE") && !strings.Contains(sql, "verdict") && strings.Contains(sql, "WITH given")
		})
	})
	g.Open()
	until(t, "the rest is tried", func() bool { return count(t, db, "attempts = 0 OR "+leased) == 0 })
	stop()

	log.mu.Lock()
	defer log.mu.Unlock()
	require.GreaterOrEqual(t, len(log.args), 3, "claim, extend and settle")
	for sql, args := range log.args {
		for _, arg := range args {
			requireNoTime(t, sql, reflect.ValueOf(arg))
		}
	}
}

// requireNoTime looks into slices and pointers, and takes a number of more than 30
// years in microseconds for a point in time.
func requireNoTime(t testing.TB, sql string, v reflect.Value) {
	t.Helper()
	if !v.IsValid() {
		return
	}
	switch v.Interface().(type) {
	case time.Time, pgtype.Timestamptz, pgtype.Timestamp, pgtype.Date, pgtype.Time:
		require.Fail(t, "an argument is a time", "%v in %s", v, sql)
	}
	switch v.Kind() {
	case reflect.Slice:
		for i := range v.Len() {
			requireNoTime(t, sql, v.Index(i))
		}
	case reflect.Pointer, reflect.Interface:
		requireNoTime(t, sql, v.Elem())
	case reflect.Int64, reflect.Int:
		require.Less(t, v.Int(), int64(30*365*24*time.Hour/time.Microsecond), "a number looks like a time in %s", sql)
	case reflect.String:
		_, err := time.Parse("2006-01-02", v.String()[:min(10, v.Len())])
		require.Error(t, err, "a string looks like a time in %s", sql)
	}
}

func TestSetup(t *testing.T) {
	t.Parallel()
	runs := func(t *testing.T, pool *pgxpool.Pool) error {
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		err = newRelay(t, store, accept, relay.Config{}).Run(ctx)
		require.NoError(t, ctx.Err(), "Run goes on")
		_, onceErr := newRelay(t, store, accept, relay.Config{}).RunOnce(ctx)
		require.ErrorIs(t, onceErr, outbox.ErrSetup)
		return err
	}
	t.Run("without_the_table_Run_returns", func(t *testing.T) {
		t.Parallel()
		err := runs(t, pgtest.NewEmptyDB(t).Pool)
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, `there is no table "public"."outbox_notifications", run Migrate first`)
	})
	t.Run("with_an_older_table_Run_returns", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications DROP COLUMN lease_version")
		err := runs(t, db.Pool)
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "is not migrated, run Migrate first")
	})

	// The role goes after the database in which it has rights.
	limited := func(t *testing.T) (db *pgtest.DB, pool *pgxpool.Pool, role string) {
		role = pgtest.Name("outbox_relay")
		require.NoError(t, pgtest.OnServer("CREATE ROLE "+role))
		t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP ROLE "+role)) })
		db = pgtest.NewDB(t)
		pool = pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["role"] = role })
		return db, pool, role
	}
	t.Run("without_rights_Run_returns", func(t *testing.T) {
		t.Parallel()
		_, pool, _ := limited(t)
		err := runs(t, pool)
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "the database role may not do this")
		require.ErrorContains(t, err, "permission denied for table outbox_notifications")
	})
	t.Run("rights_lost_later_are_waited_for", func(t *testing.T) {
		t.Parallel()
		db, pool, role := limited(t)
		grant := "GRANT SELECT, UPDATE ON outbox_notifications TO " + role
		db.MustExec(t, grant)
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		db.Add(t, message(1))
		var log logBook
		p := &provider{}
		run(t, newRelay(t, store, p, relay.Config{Logger: log.logger()}))
		untilSettled(t, db)
		db.MustExec(t, "REVOKE UPDATE ON outbox_notifications FROM "+role)
		until(t, "it says so", func() bool { return log.count("cannot claim and tries again") == 1 })
		require.Equal(t, 1, log.count("permission denied"))
		db.Add(t, message(2))
		db.MustExec(t, grant)
		untilSettled(t, db)
		p.requireOnce(t, 2)
		until(t, "it says so", func() bool { return log.count("can claim again") == 1 })
	})
}

// wokenQueue finds nothing unless it was woken since its last look: a relay on it never
// delivers by polling.
type wokenQueue struct {
	*outbox.PGStore
	mu sync.Mutex
	// How often it was woken, and how many of these a claim that has ended had heard of.
	wakes, looked int
}

func (q *wokenQueue) Listen(ctx context.Context, wake func()) error {
	for {
		err := q.PGStore.Listen(ctx, func() {
			q.mu.Lock()
			q.wakes++
			q.mu.Unlock()
			wake()
		})
		if !errors.Is(err, outbox.ErrNoNotifications) { // the relay would pause for ten minutes
			return err
		}
	}
}

func (q *wokenQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	wakes, looked := q.counts()
	if looked == wakes {
		return outbox.ClaimResult{}, nil
	}
	r, err := q.PGStore.Claim(ctx, opts)
	if err == nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.looked = wakes
	}
	return r, err
}

func (q *wokenQueue) counts() (wakes, looked int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.wakes, q.looked
}

// untilLooked waits until it was woken that often and has looked since: what is added
// from now on is not found before it is woken again.
func (q *wokenQueue) untilLooked(t testing.TB, wakes int) {
	t.Helper()
	until(t, "it listens", func() bool {
		w, looked := q.counts()
		return w == wakes && looked == wakes
	})
}

// notifier is a store of its own that notifies of its first add.
func notifier(t testing.TB, pool *pgxpool.Pool, schema string) *outbox.PGStore {
	t.Helper()
	s, err := outbox.NewPGStore(pool, outbox.Config{Schema: schema, Logger: discard, Notify: true})
	require.NoError(t, err)
	return s
}

func addWith(t testing.TB, pool *pgxpool.Pool, s *outbox.PGStore, n outbox.NewNotification) {
	t.Helper()
	require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		_, err := s.AddNotification(t.Context(), tx, n)
		return err
	}))
}

// hear returns a connection on which all NOTIFYs of the outboxes arrive.
func hear(t testing.TB, db *pgtest.DB) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), db.URL)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	_, err = conn.Exec(t.Context(), "LISTEN outbox_notifications")
	require.NoError(t, err)
	return conn
}

// heard returns what arrived up to and without a mark that it sends itself.
func heard(t testing.TB, db *pgtest.DB, conn *pgx.Conn) (payloads []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	db.MustExec(t, "SELECT pg_notify('outbox_notifications', 'mark')")
	for {
		n, err := conn.WaitForNotification(ctx)
		require.NoError(t, err)
		if n.Payload == "mark" {
			return payloads
		}
		payloads = append(payloads, n.Payload)
	}
}

func TestNotify(t *testing.T) {
	t.Parallel()
	t.Run("wakes_a_relay_that_would_not_look_for_long", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		q, p := &wokenQueue{PGStore: db.Store}, &provider{}
		run(t, newRelay(t, q, p, relay.Config{Listen: true, PollInterval: time.Hour}))
		q.untilLooked(t, 1)
		addWith(t, db.Pool, notifier(t, db.Pool, ""), message(1))
		untilSettled(t, db)
		wakes, _ := q.counts()
		require.Equal(t, 2, wakes)
	})

	t.Run("is_sent_four_times_a_second_at_most", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		conn, s := hear(t, db), notifier(t, db.Pool, "")
		began, total := time.Now(), atomic.Int64{}
		var adders sync.WaitGroup
		for range 8 {
			adders.Go(func() {
				for time.Since(began) < 2*time.Second || total.Load() < 100 {
					addWith(t, db.Pool, s, message(int(total.Add(1))))
				}
			})
		}
		adders.Wait()
		took := time.Since(began)
		got := len(heard(t, db, conn))
		require.LessOrEqual(t, got, int(took/(250*time.Millisecond))+1)
		require.GreaterOrEqual(t, got, 2)
		require.Greater(t, int(total.Load()), 2*got, "there was a load")
	})

	t.Run("of_a_rolled_back_add_is_not_sent", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		conn := hear(t, db)
		tx := db.MustBegin(t)
		_, err := notifier(t, db.Pool, "").AddNotification(t.Context(), tx, message(1))
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Empty(t, heard(t, db, conn))
		addWith(t, db.Pool, notifier(t, db.Pool, ""), message(1))
		require.Equal(t, []string{"public"}, heard(t, db, conn))
	})

	t.Run("does_not_wake_the_relay_of_another_schema", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		other := notifier(t, db.Pool, "other")
		require.NoError(t, other.Migrate(t.Context()))
		queues := map[string]*wokenQueue{"public": {PGStore: db.Store}, "other": {PGStore: other}}
		p := &provider{}
		for _, q := range queues {
			run(t, newRelay(t, q, p, relay.Config{Listen: true}))
			q.untilLooked(t, 1)
		}
		addWith(t, db.Pool, notifier(t, db.Pool, ""), message(1))
		untilSettled(t, db)
		// Notifications arrive in order: by the time of its own it has passed over the first.
		addWith(t, db.Pool, other, message(1))
		until(t, "the other is sent", func() bool {
			n, err := other.Get(t.Context(), message(1).Key())
			return err == nil && n.Status == outbox.StatusSent
		})
		for name, q := range queues {
			wakes, _ := q.counts()
			require.Equal(t, 2, wakes, name)
		}
	})

	t.Run("is_heard_again_after_the_loss_of_the_connection", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		q, p, log := &wokenQueue{PGStore: db.Store}, &provider{}, logBook{}
		run(t, newRelay(t, q, p, relay.Config{Listen: true, PollInterval: time.Hour, Logger: log.logger()}))
		for i := range 3 {
			q.untilLooked(t, 2*i+1)
			addWith(t, db.Pool, notifier(t, db.Pool, ""), message(i))
			untilSettled(t, db)
			const listeners = " FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %' AND pid <> pg_backend_pid()"
			until(t, "the one before is gone", func() bool { return pgtest.One[int](t, db, "SELECT count(*)"+listeners) == 1 })
			require.True(t, pgtest.One[bool](t, db, "SELECT pg_terminate_backend(pid)"+listeners))
		}
		until(t, "it says so", func() bool { return log.count("can listen for NOTIFY again") == 3 })
		require.Equal(t, 3, log.count("cannot listen for NOTIFY"))
	})

	t.Run("that_a_pooler_swallows_is_reported_once_and_polling_delivers", func(t *testing.T) {
		t.Parallel()
		if pgtest.Server() == nil {
			t.Log("left out: no PgBouncer can be put before the server of OUTBOX_TEST_DATABASE_URL")
			return
		}
		at, stop, err := pgtest.Server().StartPgBouncer(t.Context())
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, stop()) })
		db := pgtest.NewDB(t)
		bouncer, err := url.Parse(at)
		require.NoError(t, err)
		bouncer.Path = "/" + pgtest.One[string](t, db, "SELECT current_database()")
		pool := pgtest.NewPool(t, bouncer.String(), nil)
		store := notifier(t, pool, "")
		// It may refuse a login while it looks up another's user.
		until(t, "PgBouncer takes logins", func() bool { return pool.Ping(t.Context()) == nil })

		p, log := &provider{}, logBook{}
		run(t, newRelay(t, store, p, relay.Config{Listen: true, Logger: log.logger()}))
		for i := 1; i <= 3; i++ {
			addWith(t, pool, store, message(i))
			untilSettled(t, db)
		}
		until(t, "it says so", func() bool { return log.count("by polling alone") == 1 })
		addWith(t, pool, store, message(4))
		untilSettled(t, db)
		p.requireOnce(t, 4)
		// A login that was refused is logged too.
		require.Equal(t, 1, log.count(outbox.ErrNoNotifications.Error()))
		require.Equal(t, 1, log.count("by polling alone"))
	})
}
