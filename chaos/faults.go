package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
)

// weighed is a fault that the driver injects, and how often beside the others.
type weighed struct {
	weight int
	// draw draws all that is random, and returns what then takes place.
	draw func(r *round, rng *rand.Rand) func()
}

var driverFaults = []weighed{
	{14, func(r *round, rng *rand.Rand) func() { return r.kill(r.anyOf(r.workers, rng)) }},
	{8, func(r *round, rng *rand.Rand) func() { return r.kill(r.anyOf(r.bookers, rng)) }},
	{12, func(r *round, rng *rand.Rand) func() { return r.freeze(r.anyOf(r.workers, rng), rng) }},
	{4, func(r *round, rng *rand.Rand) func() { return r.freeze(r.anyOf(r.bookers, rng), rng) }},
	{40, func(r *round, rng *rand.Rand) func() { return r.spoil(r.anyOf(r.workers, rng), rng) }},
	{14, func(r *round, rng *rand.Rand) func() { return r.spoil(r.anyOf(r.bookers, rng), rng) }},
	{5, func(r *round, rng *rand.Rand) func() {
		return r.exhaust(r.anyOf(append(r.workers, r.bookers...), rng), rng)
	}},
	{6, func(r *round, rng *rand.Rand) func() {
		return r.backends("pg_terminate_backend of one session", true, terminateSQL, rng)
	}},
	{3, func(r *round, rng *rand.Rand) func() {
		return r.backends("pg_terminate_backend storm", false, terminateSQL, rng)
	}},
	{6, func(r *round, rng *rand.Rand) func() {
		return r.backends("pg_cancel_backend storm", false, cancelSQL, rng)
	}},
	{12, func(r *round, rng *rand.Rand) func() { return r.lockRow(rng) }},
	{2, func(r *round, rng *rand.Rand) func() { return r.lockTable(rng) }},
	{3, func(r *round, rng *rand.Rand) func() { return r.snapshot(rng) }},
	{6, func(r *round, rng *rand.Rand) func() { return r.providerDown(rng) }},
	{1, func(r *round, rng *rand.Rand) func() { return r.tooManyConnections(rng) }},
	{1, func(r *round, rng *rand.Rand) func() { return r.killBackend(rng) }},
	{1, func(r *round, rng *rand.Rand) func() { return r.onServer(serverKilled, r.opts.server.Crash) }},
	{1, func(r *round, rng *rand.Rand) func() { return r.onServer("server restarted", r.opts.server.Restart) }},
	{2, func(r *round, rng *rand.Rand) func() { return r.pause(rng) }},
	{30, func(r *round, rng *rand.Rand) func() { return r.requeue(rng) }},
	{8, func(r *round, rng *rand.Rand) func() { return r.purge(rng) }},
}

const serverKilled = "server killed with -9"

const (
	terminateSQL = "SELECT count(pg_terminate_backend(pid)) FROM sessions"
	cancelSQL    = "SELECT count(pg_cancel_backend(pid)) FROM sessions"
)

// inject draws faults and has them take place, until ctx ends.
func (r *round) inject(ctx context.Context, rng *rand.Rand) {
	total := 0
	for _, f := range driverFaults {
		total += f.weight
	}
	for ctx.Err() == nil {
		n := rng.IntN(total)
		for _, f := range driverFaults {
			if n -= f.weight; n < 0 {
				do := f.draw(r, rng)
				r.background.Go(do)
				break
			}
		}
		r.sleep(milliseconds(rng, 80, 320))
	}
}

func (r *round) anyOf(slots []*slot, rng *rand.Rand) *slot { return slots[rng.IntN(len(slots))] }

func milliseconds(rng *rand.Rand, from, to int) time.Duration {
	return time.Duration(from+rng.IntN(to-from)) * time.Millisecond
}

func (r *round) kill(s *slot) func() {
	return func() {
		if l := s.current(); l != nil {
			s.kill(l, ledger.Fault{Kind: "kill -9 of a " + s.role})
		}
	}
}

func (r *round) freeze(s *slot, rng *rand.Rand) func() {
	d := r.spec.Lease + time.Duration(rng.Int64N(int64(r.spec.Lease)))
	return func() {
		l := s.current()
		if l == nil {
			return
		}
		from := time.Now()
		if !s.signal(l, syscall.SIGSTOP) {
			return
		}
		r.sleep(d)
		s.signal(l, syscall.SIGCONT)
		r.note(ledger.Fault{Kind: "SIGSTOP of a " + s.role, Worker: l.name, From: from, Halts: true})
	}
}

// spoil spoils the connections of a process.
func (r *round) spoil(s *slot, rng *rand.Rand) func() {
	stream := []string{"upstream", "downstream"}[rng.IntN(2)]
	half := map[string]string{"upstream": "requests", "downstream": "answers"}[stream]
	short, long := milliseconds(rng, 50, 400), milliseconds(rng, 200, 1500)
	bytes, latency := 200+rng.IntN(3000), 20+rng.IntN(300)
	kinds := []struct {
		name string
		t    toxic
		d    time.Duration
	}{
		{"latency", toxic{Type: "latency", Attributes: map[string]int{"latency": latency, "jitter": latency / 2}}, long},
		{"half-open, " + half + " lost", toxic{Type: "timeout", Attributes: map[string]int{"timeout": 0}}, long},
		{half + " lost, then closed", toxic{Type: "timeout", Attributes: map[string]int{"timeout": 100}}, short},
		{"connection reset", toxic{Type: "reset_peer", Attributes: map[string]int{"timeout": 0}}, short},
		{"narrow bandwidth", toxic{Type: "bandwidth", Attributes: map[string]int{"rate": 8}}, long},
		{"sliced packets", toxic{Type: "slicer", Attributes: map[string]int{"average_size": 32, "size_variation": 16, "delay": 3000}}, long},
		{"cut in the middle of a message", toxic{Type: "limit_data", Attributes: map[string]int{"bytes": bytes}}, short},
		{"connection refused", toxic{}, short},
	}
	k := kinds[rng.IntN(len(kinds))]
	k.t.Stream = stream
	return func() {
		from := time.Now()
		var err error
		done, px := true, s.through()
		if k.t.Type == "" {
			done, err = px.refuse(k.d)
		} else {
			err = px.spoil(k.t, k.d)
		}
		if errors.Is(err, errStuck) {
			done, err = true, s.reroute(px)
		}
		if err != nil {
			r.fail(fmt.Errorf("%s: %w", k.name, err))
		}
		if err != nil || !done {
			return
		}
		r.noteSlot(s, k.name+" for a "+s.role, from)
	}
}

// exhaust has a process's pool be held by others.
func (r *round) exhaust(s *slot, rng *rand.Rand) func() {
	d := milliseconds(rng, 200, 1500)
	return func() {
		if l := s.current(); l != nil {
			_, _ = fmt.Fprintf(l.stdin, "hold %d\n", d.Milliseconds()) // it notes it, if it lives
		}
	}
}

// salt has the server choose among what is there as we have drawn.
func salt(rng *rand.Rand) string { return strconv.FormatUint(rng.Uint64(), 36) }

// backends runs a statement on sessions of workers and bookers, or one of them.
func (r *round) backends(kind string, one bool, sql string, rng *rand.Rand) func() {
	salt := salt(rng)
	with := "WITH sessions AS (SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'r%.%' ORDER BY md5(pid::text || $1)"
	if one {
		with += " LIMIT 1"
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		from := time.Now()
		var n int
		if err := r.pool.QueryRow(ctx, with+") "+sql, salt).Scan(&n); err == nil && n > 0 {
			r.note(ledger.Fault{Kind: kind, From: from})
		}
	}
}

// lockRow is a caller that keeps a pending row locked past the lease.
func (r *round) lockRow(rng *rand.Rand) func() {
	d, salt := r.spec.Lease+milliseconds(rng, 100, 800), salt(rng)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), d+2*time.Second)
		defer cancel()
		_ = pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { // what it locks is free when the server fails
			var key outbox.Key
			from := time.Now()
			if err := tx.QueryRow(ctx, `SELECT type, coalesce(booking_id, 0), coalesce(candidate_tg_id, 0) FROM outbox_notifications
				WHERE status = 'pending' ORDER BY md5(id::text || $1) LIMIT 1 FOR UPDATE SKIP LOCKED`, salt).
				Scan(&key.Type, &key.BookingID, &key.CandidateTgID); err != nil {
				return err
			}
			r.sleep(d)
			r.note(ledger.Fault{Kind: "row locked past the lease", Key: key, From: from})
			return nil
		})
	}
}

// lockTable has everybody wait, or pass over every row.
func (r *round) lockTable(rng *rand.Rand) func() {
	d := milliseconds(rng, 100, 1200)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), d+2*time.Second)
		defer cancel()
		_ = pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { // as in lockRow
			from := time.Now()
			_, err := tx.Exec(ctx, "LOCK TABLE outbox_notifications IN EXCLUSIVE MODE")
			if err == nil {
				r.sleep(d)
			}
			// Also without the lock: who comes later has queued up behind us.
			r.note(ledger.Fault{Kind: "table locked", From: from, Observed: err != nil})
			return err
		})
	}
}

// snapshot holds the oldest snapshot of the cluster.
func (r *round) snapshot(rng *rand.Rand) func() {
	d := milliseconds(rng, 1000, 4000)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), d+2*time.Second)
		defer cancel()
		_ = pgx.BeginTxFunc(ctx, r.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error { // as in lockRow
			from := time.Now()
			if _, err := tx.Exec(ctx, "SELECT FROM bookings LIMIT 1"); err != nil {
				return err
			}
			r.sleep(d)
			r.note(ledger.Fault{Kind: "snapshot held", From: from, To: from, Harmless: true})
			return nil
		})
	}
}

func (r *round) providerDown(rng *rand.Rand) func() {
	d := milliseconds(rng, 100, 1000)
	return func() {
		if !r.provider.down.CompareAndSwap(false, true) {
			return
		}
		from := time.Now()
		r.sleep(d)
		r.provider.down.Store(false)
		r.note(ledger.Fault{Kind: "provider down", From: from, Harmless: true})
	}
}

// tooManyConnections takes all that the server has left.
func (r *round) tooManyConnections(rng *rand.Rand) func() {
	d := milliseconds(rng, 200, 1000)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		from := time.Now()
		for range 200 {
			conn, err := pgx.Connect(ctx, r.url)
			if sqlState(err) == "53300" {
				r.sleep(d)
				r.note(ledger.Fault{Kind: "too many connections", From: from})
				return
			}
			if err != nil {
				return
			}
			defer conn.Close(context.Background())
		}
	}
}

// killBackend kills a process of the server, of a worker's or booker's session, upon which
// the server ends all others and recovers.
func (r *round) killBackend(rng *rand.Rand) func() {
	salt := salt(rng)
	return r.onServer("server process of a session killed with -9", func(ctx context.Context) error {
		conn, err := pgx.Connect(ctx, r.url)
		if err != nil {
			return errNothingBroken // the server is down, by another fault
		}
		defer conn.Close(ctx)
		var pid int
		if err := conn.QueryRow(ctx, `SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'r%.%'
			ORDER BY state = 'idle', md5(pid::text || $1) LIMIT 1`, salt).Scan(&pid); err != nil {
			return errNothingBroken // nobody is there, or the server is not
		}
		_, err = conn.Exec(ctx, fmt.Sprintf("COPY (SELECT 1) TO PROGRAM 'kill -9 %d'", pid))
		if state := sqlState(err); state != "" && state != "57P02" { // by which the server ends the others
			return errNothingBroken // it had ended, or this connection was hit first
		}
		for ctx.Err() == nil {
			if err := r.pool.Ping(ctx); err == nil {
				return nil
			}
			<-time.After(20 * time.Millisecond)
		}
		return ctx.Err()
	})
}

// errNothingBroken is of a fault that did not take place.
var errNothingBroken = errors.New("nothing was broken")

// onServer breaks the server, if nothing else does just now.
func (r *round) onServer(name string, do func(context.Context) error) func() {
	return func() {
		kind := name
		if !r.breaking.TryLock() {
			return
		}
		defer r.breaking.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		from := time.Now()
		err := do(ctx)
		if errors.Is(err, errNothingBroken) {
			return
		}
		if err != nil {
			// The machine may be too busy. What counts is that the server is there afterwards.
			fmt.Fprintf(os.Stderr, "round %d: %s, and is killed: %v\n", r.number, kind, err)
			rescue, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := errors.Join(r.opts.server.Resume(rescue), r.opts.server.Crash(rescue)); err != nil {
				r.fail(fmt.Errorf("%s: %w", kind, err))
			}
			kind = serverKilled
		}
		r.note(ledger.Fault{Kind: kind, From: from})
	}
}

func (r *round) pause(rng *rand.Rand) func() {
	d := milliseconds(rng, 100, 2500)
	return r.onServer("server frozen", func(ctx context.Context) error {
		if err := r.opts.server.Pause(ctx); err != nil {
			return err
		}
		r.sleep(d)
		return r.opts.server.Resume(ctx)
	})
}

// requeue is the operator, who has some rows sent once more. It is no fault.
func (r *round) requeue(rng *rand.Rand) func() {
	n, offset := 1+rng.IntN(3), rng.IntN(31)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		rows, err := r.pool.Query(ctx, `SELECT type, coalesce(booking_id, 0), coalesce(candidate_tg_id, 0) FROM outbox_notifications
			WHERE status IN ('sent', 'failed') ORDER BY id DESC LIMIT 1 OFFSET $1`, offset)
		if err != nil {
			return
		}
		keys, err := pgx.CollectRows(rows, pgx.RowToStructByPos[outbox.Key])
		if err != nil {
			return
		}
		for range n {
			for _, key := range keys {
				from := time.Now()
				n, err := r.store.Requeue(ctx, key)
				record := ledger.Requeue{Key: key, From: from}
				if err == nil {
					record.To, record.Done = time.Now(), true
				}
				if err != nil || n > 0 {
					r.write(ledger.Record{Requeue: &record})
				}
			}
		}
	}
}

// purge is the operator, who has payloads or rows purged that were sent a moment ago. It is no fault.
func (r *round) purge(rng *rand.Rand) func() {
	opts := outbox.PurgeOptions{OlderThan: milliseconds(rng, 10, 1500), Delete: rng.IntN(2) == 0, BatchSize: []int{0, 7, 50}[rng.IntN(3)]}
	if rng.IntN(2) == 0 {
		opts.Types = types[:1+rng.IntN(len(types))]
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		record := ledger.Purge{Delete: opts.Delete, From: time.Now()}
		if _, err := r.store.Purge(ctx, opts); err == nil {
			record.To = time.Now()
		}
		r.write(ledger.Record{Purge: &record})
	}
}
