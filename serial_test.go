package outbox_test

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// patience bounds the wait for what happens at once.
const patience = 30 * time.Second

// call is something that was done, with its result. Done to a model it says in what the
// model would have returned something else. end is a time at which it was over.
type call func(m *model, end time.Time) string

// unit is what has one place in a serial order: a transaction, or a call on the store's
// own pool. It took that place in one of the steps from first to last.
type unit struct {
	what        string
	first, last int
	calls       []call
	undone      bool // rolled back in the end, and right as far as it went
}

// party is a booking service's transaction.
type party struct {
	name    string
	tx      pgx.Tx
	held    []outbox.Key      // locked until it ends
	tries   []outbox.Key      // those of the statement under way
	pending <-chan stepResult // nil: it is idle
	waited  bool              // the statement under way
	calls   []call
	begun   int // adds
	over    bool
}

type stepResult struct {
	call call
	err  error
}

// rivals interleaves transactions, statement by statement.
type rivals struct {
	*machine
	t        *rapid.T
	ctx      context.Context
	level    pgx.TxIsoLevel
	parties  []*party
	operator *party // of Requeue, the one call on the store's pool that waits
	pool     *pgxpool.Pool
	requeues *outbox.PGStore // on a connection of its own, whose pid is
	pid      uint32

	adds     adds
	reached  *tally
	at       int          // the step under way
	requeued int          // by the last requeue
	keep     []outbox.Key // what idle transactions hold throughout the step
	since    int          // the step in which the requeue that is pending began
	units    []unit
}

// adds are the adds of a transaction.
type adds string

const (
	anyAdds  adds = "any"
	oneBatch adds = "one batch each"      // so nobody may come into a deadlock
	opposed  adds = "batches, opposed"    // likewise; see rivals.oppose
	singles  adds = "several single ones" // in any order, so deadlocks are to be expected
)

// once: nobody adds twice.
func (a adds) once() bool { return a == oneBatch || a == opposed }

// explained looks for a serial order of the units that keeps to their steps, and in which
// all calls return what they did, and that ends in the table. It returns "", or what
// one of the orders failed of.
func explained(m *model, units []unit, table map[outbox.Key]*row, end time.Time) string {
	if len(units) == 0 {
		return m.clone().look(table, end)
	}
	why := ""
	for i, u := range units {
		if slices.ContainsFunc(units, func(v unit) bool { return v.last < u.first }) {
			continue
		}
		next := m.clone()
		differs := ""
		for _, c := range u.calls {
			if differs = c(next, end); differs != "" {
				break
			}
		}
		if differs == "" {
			if u.undone {
				next = m.clone()
			}
			if differs = explained(next, slices.Delete(slices.Clone(units), i, i+1), table, end); differs == "" {
				return ""
			}
			why = differs
		} else if why == "" {
			why = u.what + ": " + differs
		}
	}
	return why
}

// returned compares an add's result with the model's.
func (m *model) returned(want added, got outbox.AddResult, end time.Time) string {
	read := *want.row
	read.Notification = got.Notification
	if differs := m.meet(want.row, &read, end); differs != "" {
		return differs
	}
	if want.outcome != got.Outcome || want.inFlight != got.InFlight {
		return fmt.Sprintf("%s was %s (in flight %t) and should have been %s (%t)", want.row.Key(), got.Outcome, got.InFlight, want.outcome, want.inFlight)
	}
	return ""
}

// add begins an add, or a batch.
func (r *rivals) add(p *party) {
	if r.adds != singles && (r.adds.once() || rapid.Bool().Draw(r.t, "batch")) {
		keys := rapid.SliceOfN(r.keys, 1, 5).Draw(r.t, "batch")
		r.addMany(p, keys)
		return
	}
	keys := r.keys
	if r.adds == singles && len(p.held) == 1 && !once(r.t, 4, "any key") {
		keys = keys.Filter(func(key outbox.Key) bool { return !slices.Contains(p.held, key) })
	}
	key := keys.Draw(r.t, "key")
	n := r.drawNew(r.t, key)
	p.begun, p.tries = p.begun+1, []outbox.Key{key}
	r.begin(p, func() (call, error) {
		got, err := r.store.AddNotification(r.ctx, p.tx, n)
		return func(m *model, end time.Time) string { return m.returned(m.add(n), got, end) }, err
	})
}

// addMany begins a batch.
func (r *rivals) addMany(p *party, keys []outbox.Key) {
	ns := make([]outbox.NewNotification, len(keys))
	for i, key := range keys {
		ns[i] = r.drawNew(r.t, key)
	}
	p.begun, p.tries = p.begun+1, keys
	r.begin(p, func() (call, error) {
		got, err := r.store.AddNotifications(r.ctx, p.tx, ns)
		return func(m *model, end time.Time) string {
			for i, want := range m.addMany(ns) {
				if differs := m.returned(want, got[i], end); differs != "" {
					return differs
				}
			}
			return ""
		}, err
	})
}

// oppose begins with two batches of the same keys in opposite orders, between which the
// first transaction holds one in their middle. Did they lock as they were given, each would
// have the key that the other wants next but one.
func (r *rivals) oppose(keys []outbox.Key) {
	there := slices.Clone(keys)
	slices.Reverse(there)
	for i, keys := range [][]outbox.Key{keys[1:2], keys, there} {
		r.at++
		r.addMany(r.parties[i], keys)
		r.wait()
	}
	if r.parties[1].waited && r.parties[2].waited {
		r.reached.add("opposed batches that waited", 1)
	}
}

// begin runs the next statement of p on another goroutine.
func (r *rivals) begin(p *party, fn func() (call, error)) {
	c := make(chan stepResult, 1)
	p.pending, p.waited = c, false
	go func() {
		done, err := fn()
		c <- stepResult{done, err}
	}()
}

// end commits or rolls back.
func (r *rivals) end(p *party) {
	p.over = true
	u := unit{what: p.name, first: r.at, last: r.at, calls: p.calls}
	if rapid.IntRange(0, 3).Draw(r.t, "commit") == 0 {
		require.NoError(r.t, p.tx.Rollback(r.ctx))
		u.undone = true
	} else if err := p.tx.Commit(r.ctx); err != nil {
		r.refused(p, err)
		return
	}
	if u.undone {
		r.reached.add("transactions rolled back", 1)
	} else {
		r.reached.add("transactions committed", 1)
	}
	r.units = append(r.units, u)
}

// refused checks that PostgreSQL may end a transaction so.
func (r *rivals) refused(p *party, err error) {
	p.over = true
	_ = p.tx.Rollback(r.ctx)
	require.True(r.t, outbox.IsRetryable(err), "%s: %v", p.name, err)
	var pg *pgconn.PgError
	require.ErrorAs(r.t, err, &pg)
	r.reached.add("transactions refused: "+pg.Code, 1)
	if pg.Code == "40P01" {
		require.False(r.t, r.adds.once(), "a deadlock of batches: %v", err)
	} else {
		require.NotEqual(r.t, pgx.ReadCommitted, r.level, "%v", err)
	}
}

// wait waits until each statement is done, or waits for a transaction that is idle: in a circle
// of transactions that wait for each other one is about to be refused.
func (r *rivals) wait() {
	all := append(slices.Clone(r.parties), r.operator)
	r.keep = nil
	for _, p := range r.parties {
		if !p.over && p.pending == nil {
			r.keep = append(r.keep, p.held...)
		}
	}
	for deadline := time.After(patience); ; {
		idle, busy := map[uint32]bool{}, []uint32{}
		for _, p := range all {
			if p.pending != nil {
				select {
				case res := <-p.pending:
					r.finish(p, res)
				default:
				}
			}
			switch pid := r.pidOf(p); {
			case p.pending != nil:
				busy = append(busy, pid)
			case !p.over && p != r.operator:
				idle[pid] = true
			}
		}
		if len(busy) == 0 {
			return
		}
		blockers := map[uint32][]uint32{}
		rows, err := r.db.Query(r.ctx, "SELECT pid, pg_blocking_pids(pid::int) FROM unnest($1::bigint[]) AS pid", busy)
		require.NoError(r.t, err)
		var pid uint32
		var by []uint32
		_, err = pgx.ForEachRow(rows, []any{&pid, &by}, func() error {
			blockers[pid] = slices.Clone(by)
			return nil
		})
		require.NoError(r.t, err)
		if !slices.ContainsFunc(busy, func(pid uint32) bool { return !reaches(blockers, pid, idle, len(busy)) }) {
			for _, p := range all {
				if p.pending != nil && !p.waited {
					p.waited = true
					r.reached.add("statements that waited", 1)
				}
			}
			return
		}
		select {
		case <-deadline:
			require.FailNow(r.t, "a statement neither ended nor came to wait for a transaction")
		case <-time.After(time.Millisecond):
		}
	}
}

// reaches reports whether pid waits, by way of others, for one that is idle.
func reaches(blockers map[uint32][]uint32, pid uint32, idle map[uint32]bool, hops int) bool {
	return idle[pid] || hops >= 0 && slices.ContainsFunc(blockers[pid], func(by uint32) bool { return reaches(blockers, by, idle, hops-1) })
}

func (r *rivals) pidOf(p *party) uint32 {
	if p == r.operator {
		return r.pid
	}
	return p.tx.Conn().PgConn().PID()
}

// finish takes the result of a statement.
func (r *rivals) finish(p *party, res stepResult) {
	p.pending = nil
	switch {
	case p == r.operator:
		require.NoError(r.t, res.err)
		if r.requeued > 0 {
			r.reached.add("requeued", 1)
			require.NotContains(r.t, r.keep, p.tries[0], "requeued while the transaction of an add was open")
		}
		r.reached.add("calls: requeue", 1)
		r.units = append(r.units, unit{"requeue", r.since, r.at, []call{res.call}, false})
	case res.err != nil:
		r.refused(p, res.err)
	default:
		p.calls, p.held = append(p.calls, res.call), append(p.held, p.tries...)
	}
	p.tries = nil
}

// locked are the keys that open transactions have locked, and those that
// a statement under way may have locked, or not yet.
func (r *rivals) locked() (held, perhaps []outbox.Key) {
	for _, p := range r.parties {
		if !p.over {
			held, perhaps = append(held, p.held...), append(perhaps, p.tries...)
		}
	}
	return held, append(perhaps, r.operator.tries...)
}

// claimNow claims all that is free.
func (r *rivals) claimNow() {
	opts := r.drawClaim(r.t)
	r.lost, opts.Limit, opts.Since = false, 100, time.Time{}
	held, perhaps := r.locked()
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	got, err := r.store.Claim(ctx, opts)
	require.NoError(r.t, err, "it waits for nobody")
	came := map[int64]bool{}
	for _, c := range got.Claimed {
		r.leases = append(r.leases, c.Lease)
		came[c.ID] = true
	}
	for _, n := range got.Failed {
		came[n.ID] = true
	}
	r.unit("claim", func(m *model, end time.Time) string {
		skipped := slices.Clone(held)
		for _, key := range perhaps {
			if row := m.rows[key]; row != nil && !came[row.ID] {
				skipped = append(skipped, key)
			}
		}
		took, failed := m.claim(opts, skipped...)
		if len(took) != len(got.Claimed) || len(failed) != len(got.Failed) {
			return fmt.Sprintf("claimed %d and failed %d, and should have %d and %d", len(got.Claimed), len(got.Failed), len(took), len(failed))
		}
		for _, c := range took {
			i := slices.IndexFunc(got.Claimed, func(g outbox.Claimed) bool { return g.ID == c.row.ID })
			if i < 0 {
				return fmt.Sprintf("did not claim %s", c.row.Key())
			}
			read := *c.row
			read.Notification = got.Claimed[i].Notification
			if differs := m.meet(c.row, &read, end); differs != "" {
				return differs
			}
			if !reflect.DeepEqual(c.result(), got.Claimed[i]) {
				return fmt.Sprintf("claimed %+v and should have %+v", got.Claimed[i], c.result())
			}
		}
		for _, f := range failed {
			i := slices.IndexFunc(got.Failed, func(n outbox.Notification) bool { return n.ID == f.ID })
			if i < 0 {
				return fmt.Sprintf("did not fail %s", f.Key())
			}
			read := *f
			read.Notification = got.Failed[i]
			if differs := m.meet(f, &read, end); differs != "" {
				return differs
			}
		}
		return ""
	})
}

// settleNow settles what is free.
func (r *rivals) settleNow() {
	var sts []outbox.Settlement
	for _, l := range r.someLeases(r.t) {
		sts = append(sts, r.drawSettlement(r.t, l))
	}
	held, perhaps := r.locked()
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	got, err := r.store.Settle(ctx, sts)
	require.NoError(r.t, err, "it waits for nobody")
	r.unit("settle", func(m *model, _ time.Time) string {
		for i, s := range sts {
			var want outbox.LeaseResult
			if row := m.held(s.Lease); row != nil && (slices.Contains(held, row.Key()) || got[i] == outbox.LeaseHeld && slices.Contains(perhaps, row.Key())) {
				want = outbox.LeaseHeld
			} else {
				want = m.settle(s)
			}
			if got[i] != want {
				return fmt.Sprintf("%v is %s and should be %s", s, got[i], want)
			}
		}
		return ""
	})
}

// purgeNow purges what is free, unless it is open what that is: the count does not tell.
func (r *rivals) purgeNow() {
	opts := drawPurge(r.t)
	held, perhaps := r.locked()
	if len(perhaps) > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	got, err := r.store.Purge(ctx, opts)
	require.NoError(r.t, err, "it waits for nobody")
	r.unit("purge", func(m *model, _ time.Time) string {
		if want := m.purge(opts, held...); got != want {
			return fmt.Sprintf("purged %d and should have %d", got, want)
		}
		return ""
	})
}

// unit adds a call that was made and ended in this step.
func (r *rivals) unit(what string, c call) {
	r.reached.add("calls: "+what, 1)
	r.units = append(r.units, unit{what, r.at, r.at, []call{c}, false})
}

// requeueLater begins to requeue a key. Of several keys each would have a place of its own
// in the order: a row that is pending is passed over without being locked.
func (r *rivals) requeueLater() {
	key := r.keys.Draw(r.t, "requeue")
	if held, _ := r.locked(); len(held) > 0 && !once(r.t, 3, "any key") {
		key = rapid.SampledFrom(held).Draw(r.t, "requeue of a key that is held")
	}
	r.since, r.operator.tries = r.at, []outbox.Key{key}
	r.begin(r.operator, func() (call, error) {
		got, err := r.requeues.Requeue(r.ctx, key)
		r.requeued = got
		return func(m *model, _ time.Time) string {
			if want := m.requeue([]outbox.Key{key}); got != want {
				return fmt.Sprintf("requeued %d and should have %d", got, want)
			}
			return ""
		}, err
	})
}

// next makes one step of somebody who can make one, or of those alone that have a
// transaction to end.
func (r *rivals) next(ending bool) (more bool) {
	r.at++
	var idle []*party
	for _, p := range r.parties {
		if !p.over && p.pending == nil {
			idle = append(idle, p)
		}
	}
	if ending && len(idle) == 0 {
		return false
	}
	n := rapid.IntRange(0, 2*len(idle)).Draw(r.t, "who")
	switch {
	case ending:
		r.end(idle[min(n/2, len(idle)-1)])
	case n < 2*len(idle):
		p := idle[n/2]
		if p.begun == 3 || p.begun > 0 && (r.adds.once() || r.adds == anyAdds && once(r.t, 3, "end")) {
			r.end(p)
		} else {
			r.add(p)
		}
	default:
		switch call := rapid.IntRange(0, 3).Draw(r.t, "call"); {
		case call == 0 && len(r.leases) > 0:
			r.settleNow()
		case call == 1 && r.operator.pending == nil:
			r.requeueLater()
		case call == 2:
			r.purgeNow()
		default:
			r.claimNow()
		}
	}
	r.wait()
	return true
}

// serialFloors are what TestSerial comes to at least.
func serialFloors(level pgx.TxIsoLevel) map[string]int {
	floors := map[string]int{
		"runs explained":              100,
		"statements that waited":      60,
		"transactions committed":      60,
		"transactions rolled back":    20,
		"opposed batches that waited": 4,
		"calls: claim":                30,
		"calls: settle":               4,
		"calls: purge":                12,
		"calls: requeue":              20,
		"requeued":                    4,
	}
	if level != pgx.ReadCommitted {
		floors["transactions refused: 40001"] = 30
	}
	return floors
}

// TestSerial interleaves two to four transactions and calls on the store's own pool, in any
// order and with any of them waiting for any other, and looks for a serial order that explains
// what all calls returned and what is in the table at the end.
//
// At every isolation level there is one, and it is the order in which they ended. An add
// leaves the row of its key locked until its transaction ends, whatever it
// found and whether it wrote anything; nothing else is read that a result depends on. So
// the transactions of booking services are two-phase as they are, which makes READ COMMITTED
// as good as SERIALIZABLE for all that they learn from adds (not for what else they read). The
// stricter levels refuse some: 40001. A deadlock, 40P01, takes somebody who adds twice.
//
// Claims, settles and purges pass over rows that are locked, and wait for nobody. They have
// their place in the order where they were made, with what was locked then left out.
//
// Mutations that turn it red, in CI:
//
//	no ON CONFLICT in addSQL, in insertSQL     the unique violation; not at SERIALIZABLE, which makes it 40001
//	no FOR UPDATE in addSQL, in addManySQL     all levels
//	no FOR UPDATE in lookupSQL                 READ COMMITTED, SERIALIZABLE
//	no SKIP LOCKED in claimSQL, in leasedSQL   all levels: a claim, a settle that waits
//	ORDER BY random() in addManySQL            all levels: a deadlock of batches
//	every other batch from its last shape on   all levels: a deadlock of batches
//
// Not: DO NOTHING in addManySQL, of which TestAddNotifications takes the steps one by one,
// no SKIP LOCKED in purgeSQL, and no FOR UPDATE in requeueSQL, which takes two operators.
func TestSerial(t *testing.T) {
	t.Parallel()
	deadlocks := newTally() // of single adds in opposite orders, at all levels
	t.Cleanup(func() { deadlocks.atLeast(t, map[string]int{"transactions refused: 40P01": 4}) })
	for i, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		t.Run(strings.ReplaceAll(string(level), " ", "_"), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			quick := func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["deadlock_timeout"] = "10ms" }
			pool := pgtest.NewPool(t, db.URL, quick)
			one := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.MaxConns = 1 })
			requeues, err := outbox.NewPGStore(one, outbox.Config{Logger: discard})
			require.NoError(t, err)
			reached := newTally()
			check(t, 1_000_000*uint64(i+1), func(t *rapid.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				kind := rapid.SampledFrom([]adds{singles, anyAdds, oneBatch, opposed}).Draw(t, "adds")
				keys := rapid.Permutation(modelKeys).Draw(t, "keys")[:rapid.IntRange(2, 4).Draw(t, "of")]
				parties := rapid.IntRange(2, 4).Draw(t, "transactions")
				switch kind {
				case singles:
					keys = keys[:2]
				case opposed:
					parties = max(parties, 3)
					keys = rapid.Permutation(rapid.SampledFrom([][]outbox.Key{modelKeys, modelKeys[:3]}).Draw(t, "of any shape")).Draw(t, "keys")[:3]
				}
				r := &rivals{machine: newMachine(t, db, rapid.IntRange(0, outbox.Guesses-1).Draw(t, "guess"), keys),
					t: t, ctx: ctx, level: level, adds: kind, reached: reached, pool: pool, requeues: requeues, operator: &party{name: "requeue"}}
				require.NoError(t, one.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&r.pid))
				defer func() {
					cancel() // ends the statements that are still under way, if the test has failed
					for _, p := range append(r.parties, r.operator) {
						if p.pending != nil {
							<-p.pending
						}
						if p.tx != nil {
							_ = p.tx.Rollback(context.Background())
						}
					}
				}()

				if !once(t, 4, "empty") {
					r.committed(t, func(tx pgx.Tx) func() { return r.addIn(t, tx, true) })
					for range rapid.IntRange(0, 12).Draw(t, "before") {
						r.step(t)
						r.look(t)
					}
					for range rapid.IntRange(0, 4).Draw(t, "settled by hand") {
						r.settleByHand(t)
					}
					r.look(t)
				}
				for i := range parties {
					tx, err := pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: level})
					require.NoError(t, err)
					r.parties = append(r.parties, &party{name: "transaction " + itoa(i+1), tx: tx})
				}
				if kind == opposed {
					r.oppose(keys)
				}
				least := 3
				if kind == singles {
					least = 8
				}
				for range rapid.IntRange(least, 12).Draw(t, "steps") {
					r.next(false)
				}
				for r.next(true) {
				}
				table, end, err := readTable(ctx, db)
				require.NoError(t, err)
				if why := explained(r.model, r.units, table, end); why != "" {
					t.Fatalf("no serial order explains it: %s", why)
				}
				reached.add("runs explained", 1)
			})
			const deadlock = "transactions refused: 40P01"
			deadlocks.add(deadlock, reached.counts[deadlock])
			reached.atLeast(t, serialFloors(level))
		})
	}
}
