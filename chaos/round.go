package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/relay"
)

// server is what can be broken beneath a round. *[pgserver.Server] is one.
type server interface {
	Crash(context.Context) error
	Restart(context.Context) error
	Pause(context.Context) error
	Resume(context.Context) error
}

type options struct {
	seed   uint64
	server server        // nil: one that is started, and stopped in the end
	url    string        // of the server's superuser; it may have several hosts
	dir    string        // for the journals
	length time.Duration // of the faults of a round
	keep   bool          // the journals, also where nothing is wrong
	report *report       // to be filled; nil: a new one

	broken string // one of breaks, which all workers have; "": none

	failovers string    // the kind of all rounds; "": none
	failover  *failover // of this round
}

// round is one database with its processes, from its creation until it has been checked.
type round struct {
	opts    options
	number  int
	dir     string
	url     string // of the round's database
	spec    spec   // what its processes have in common
	mode    string
	pool    *pgxpool.Pool
	store   *outbox.PGStore
	journal *ledger.Journal

	proxies      proxies
	provider     *standIn
	workers      []*slot
	bookers      []*slot
	serializable []bool // bookers, by index

	pulse      pulse
	breaking   sync.Mutex // the server
	background sync.WaitGroup
	stopping   chan struct{} // closed when no fault is to last any longer

	mu    sync.Mutex
	born  []birth
	fault error // of the rig itself
}

type birth struct {
	slot *slot
	name string
	at   time.Time
}

// result is what a round has shown.
type result struct {
	number  int
	mode    string
	history ledger.History
	verdict ledger.Verdict

	failover *failover // nil: there was none
}

// runRound runs one round, which depends on the seed and its number alone, as far as
// it is for us to say.
func runRound(ctx context.Context, opts options, number int) (res result, err error) {
	rng := newRand(opts.seed, number)
	r := &round{opts: opts, number: number, proxies: newProxies(), stopping: make(chan struct{})}
	r.draw(rng)
	if opts.failover != nil {
		opts.failover.draw(r)
	}
	if r.dir, err = os.MkdirTemp(opts.dir, fmt.Sprintf("round-%d-", number)); err != nil {
		return res, err
	}
	if r.journal, err = ledger.Create(filepath.Join(r.dir, "driver.jsonl")); err != nil {
		return res, err
	}
	defer func() { _ = r.journal.Close() }() // all has been written through
	name, err := r.createDatabase(ctx)
	if err != nil {
		return res, err
	}
	defer r.pool.Close()
	if r.provider, err = serveProvider(r.spec.Sends, filepath.Join(r.dir, "provider.jsonl")); err != nil {
		return res, err
	}
	r.spec.Provider = r.provider.addr
	for i := range 4 {
		var s *slot
		if s, err = r.newSlot("worker", i, rand.New(rand.NewPCG(rng.Uint64(), 0))); err != nil {
			return res, err
		}
		defer s.hangUp()
		r.workers = append(r.workers, s)
	}
	for i := range 3 {
		var s *slot
		if s, err = r.newSlot("booker", i, rand.New(rand.NewPCG(rng.Uint64(), 0))); err != nil {
			return res, err
		}
		defer s.hangUp()
		r.bookers = append(r.bookers, s)
	}
	r.play(ctx, rng)
	if err := r.provider.close(); err != nil {
		r.fail(err)
	}
	res = result{number: number, mode: r.mode}
	if res.history, err = r.history(); err != nil {
		return res, errors.Join(err, r.fault)
	}
	check := ledger.Check
	if opts.failover != nil {
		check = opts.failover.check
	}
	res.verdict = check(res.history)
	r.pool.Close()
	sound := len(res.verdict.Violations) == 0 && r.fault == nil
	if !sound || r.opts.keep {
		if err := res.write(filepath.Join(r.dir, "database.json")); err != nil {
			r.fail(err)
		}
	} else {
		err = os.RemoveAll(r.dir)
	}
	err = errors.Join(err, r.opts.onServer("DROP DATABASE "+name+" WITH (FORCE)"))
	return res, errors.Join(err, r.fault)
}

// write writes down what the database had.
func (res result) write(path string) error {
	text, err := json.MarshalIndent(map[string]any{"rows": res.history.Rows, "booked": res.history.Booked, "changes": res.history.Changes}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// newRand is where all that is random in a round comes from.
func newRand(seed uint64, round int) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(round))) }

// draw draws what kind of round it is.
func (r *round) draw(rng *rand.Rand) {
	r.spec.Delivery = relay.Delivery(r.number % 2)
	r.spec.Lease = time.Duration(1000+rng.IntN(1000)) * time.Millisecond
	r.spec.Sends = rng.Uint64()
	r.spec.Concurrency = []int{1, 4, 10}[rng.IntN(3)]
	r.spec.BatchSize = []int{3, 10, 0}[rng.IntN(3)]
	r.spec.MaxAttempts = []int{6, 25, -1}[rng.IntN(3)]
	r.mode = "AtLeastOnce"
	reconcile := rng.IntN(3) == 0
	if r.spec.Delivery == relay.AtMostOnce {
		r.mode = "AtMostOnce"
		r.spec.BatchSize = min(r.spec.BatchSize, 3)
	} else if reconcile {
		r.mode, r.spec.Reconcile = "AtLeastOnce, Reconciler", true
	}
	r.serializable = []bool{false, rng.IntN(2) == 0, true}
}

// onServer runs a statement outside of any round's database.
func (o options) onServer(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, o.url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return pgserver.Exec(ctx, conn, sql)
}

func (r *round) createDatabase(ctx context.Context) (name string, err error) {
	name = fmt.Sprintf("chaos_%d_%d", os.Getpid(), r.number)
	if err := r.opts.onServer("CREATE DATABASE " + name); err != nil {
		return "", err
	}
	u, err := url.Parse(r.opts.url)
	if err != nil {
		return "", err
	}
	u.Path = "/" + name
	r.url = u.String()
	cfg, err := pgxpool.ParseConfig(r.url)
	if err != nil {
		return "", err
	}
	cfg.MaxConns = 12
	cfg.ConnConfig.ConnectTimeout = 2 * time.Second
	if r.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return "", err
	}
	if err := r.compareClocks(ctx); err != nil {
		return "", err
	}
	if r.store, err = outbox.NewPGStore(r.pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)}); err != nil {
		return "", err
	}
	if err := r.store.Migrate(ctx); err != nil {
		return "", err
	}
	_, err = r.pool.Exec(ctx, bookingsSQL+";"+ledger.ChangesSQL)
	return name, err
}

// compareClocks returns an error unless the server has our clock.
func (r *round) compareClocks(ctx context.Context) error {
	var there time.Time
	before := time.Now()
	if err := r.pool.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&there); err != nil {
		return err
	}
	return sameClock(before, there, time.Now())
}

// sameClock returns an error unless the server's time, of which it cuts off what is less
// than a microsecond, was between two of ours.
func sameClock(before, there, after time.Time) error {
	var off time.Duration
	switch {
	case there.Before(before.Truncate(time.Microsecond)):
		off = there.Sub(before)
	case there.After(after):
		off = there.Sub(after)
	default:
		return nil
	}
	return fmt.Errorf("the server's clock is %v off ours, and the check needs both to be one: a server in a virtual machine has another", off)
}

// play lets processes and faults loose for a while, heals everything, and has all that is
// pending delivered.
func (r *round) play(ctx context.Context, rng *rand.Rand) {
	r.spec.Epoch = time.Now()
	for _, s := range append(r.workers, r.bookers...) {
		s.keep(false)
	}
	watching, stopWatching := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { r.watchServer(watching) })
	beating, stopBeating := context.WithCancel(context.WithoutCancel(ctx))
	var heart sync.WaitGroup
	heart.Go(func() { r.heartbeat(beating) })
	r.awaitAccept(ctx)
	limited, cancel := context.WithTimeout(ctx, r.opts.length)
	defer cancel()
	if r.opts.failover != nil {
		r.opts.failover.inject(limited, r)
	} else {
		r.inject(limited, rng)
	}

	close(r.stopping)
	var ending sync.WaitGroup
	for _, s := range r.bookers {
		ending.Go(func() { s.end(5 * time.Second) })
	}
	for _, s := range r.workers {
		ending.Go(func() { s.end(15 * time.Second) })
	}
	ending.Wait()
	r.background.Wait()
	if err := r.drain(context.WithoutCancel(ctx)); err != nil {
		r.fail(err)
	}
	stopWatching()
	watch.Wait()
	for _, s := range r.workers {
		s.end(15 * time.Second)
	}
	stopBeating() // after the last kill, for which it tells of stalls
	heart.Wait()
	r.background.Wait()
}

// heartbeat keeps the pulse of this process.
func (r *round) heartbeat(ctx context.Context) {
	ticks := time.NewTicker(beat)
	defer ticks.Stop()
	for ctx.Err() == nil {
		r.pulse.beat(func(time.Time) {})
		select {
		case <-ticks.C:
		case <-ctx.Done():
		}
	}
}

// startPatience is how long it may take until a message is accepted.
const startPatience = 30 * time.Second

// awaitAccept waits until the processes are at work: a round is about what happens to
// them then, however long it took to start them.
func (r *round) awaitAccept(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for ctx.Err() == nil && !r.provider.busy() {
		<-time.After(10 * time.Millisecond)
	}
}

// drainPatience is for how long a drain may make no progress. All that is pending is due
// within seconds, and two workers deliver several in each.
const drainPatience = 30 * time.Second

// drain delivers all that is pending, with workers that nothing happens to. It goes on for
// as long as that becomes less. What is left when it does not is for the check, to which
// the history is drained then too: with nothing in the way of the workers, it is lost.
func (r *round) drain(ctx context.Context) error {
	if err := r.endSessions(ctx); err != nil {
		return err
	}
	for _, s := range r.workers[:2] {
		s.keep(true)
	}
	lowest := -1
	for progress := time.Now(); time.Since(progress) < drainPatience; {
		pending, err := r.pending(ctx)
		if err == nil && pending == 0 {
			return nil
		}
		if err == nil && (lowest < 0 || pending < lowest) {
			lowest, progress = pending, time.Now()
		}
		<-time.After(50 * time.Millisecond)
	}
	return nil
}

func (r *round) pending(ctx context.Context) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = r.pool.QueryRow(ctx, "SELECT count(*) FROM outbox_notifications WHERE status = 'pending'").Scan(&n)
	return n, err
}

// endSessions ends those of callers that died, which may hold rows, or commit yet.
func (r *round) endSessions(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		var left int
		err := r.pool.QueryRow(ctx, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name LIKE 'r%.%'`).Scan(&left)
		if err == nil && left == 0 {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("sessions of the dead do not end: %w", errors.Join(err, ctx.Err()))
		}
		<-time.After(20 * time.Millisecond)
	}
}

// watchServer notes when the server did not answer in time, whoever was to blame.
func (r *round) watchServer(ctx context.Context) {
	last := time.Now()
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(ctx, time.Second)
		err := r.pool.Ping(call)
		cancel()
		now := time.Now()
		if (err != nil || ledger.Between(last, now) > 300*time.Millisecond) && ctx.Err() == nil {
			r.note(ledger.Fault{Kind: "stall of the server", From: last, Observed: true})
		}
		last = now
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// sleep pauses for d, or until the round is to end.
func (r *round) sleep(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.stopping:
	}
}

func (r *round) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = errors.Join(r.fault, err)
}

func (r *round) write(records ...ledger.Record) {
	if err := r.journal.Append(records...); err != nil {
		r.fail(err)
	}
}

// note notes a fault that is just over.
func (r *round) note(f ledger.Fault) {
	if f.To.IsZero() {
		f.To = time.Now()
	}
	if f.From.IsZero() {
		f.From = f.To
	}
	r.write(ledger.Record{Fault: &f})
}

// begun notes that a process was born.
func (r *round) begun(s *slot, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.born = append(r.born, birth{s, name, time.Now()})
}

// noteSlot notes a fault that was of whoever was in a slot. It counts once.
func (r *round) noteSlot(s *slot, kind string, from time.Time) {
	to := time.Now()
	var names []string
	r.mu.Lock()
	for i := len(r.born) - 1; i >= 0; i-- {
		if b := r.born[i]; b.slot == s {
			names = append(names, b.name)
			if b.at.Before(from) {
				break
			}
		}
	}
	r.mu.Unlock()
	for i, name := range names {
		r.note(ledger.Fault{Kind: kind, Worker: name, From: from, To: to, Observed: i > 0})
	}
}

// history is all that was written down.
func (r *round) history() (h ledger.History, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	h = ledger.History{Delivery: r.spec.Delivery, Reconciled: r.spec.Reconcile, Lease: r.spec.Lease, MaxAttempts: r.spec.MaxAttempts, Permanent: []string{refused}, Watched: true, Drained: true}
	files, err := filepath.Glob(filepath.Join(r.dir, "*.jsonl"))
	if err != nil {
		return h, err
	}
	for _, f := range files {
		records, err := ledger.Read(f)
		if err != nil {
			return h, err
		}
		h.Records = append(h.Records, records...)
	}
	for f := (outbox.Filter{Limit: 1000}); ; {
		page, err := r.store.List(ctx, f)
		if err != nil {
			return h, err
		}
		h.Rows = append(h.Rows, page...)
		if len(page) < f.Limit {
			break
		}
		f.After = page[len(page)-1].ID
	}
	if h.Changes, err = ledger.ReadChanges(ctx, r.pool); err != nil {
		return h, err
	}
	rows, err := r.pool.Query(ctx, "SELECT request, type, booking_id, candidate_tg_id, id, version, outcome, content FROM booked")
	if err != nil {
		return h, err
	}
	h.Booked, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (c ledger.Commit, err error) {
		err = row.Scan(&c.Request, &c.Key.Type, &c.Key.BookingID, &c.Key.CandidateTgID, &c.ID, &c.Version, &c.Outcome, &c.Content)
		return c, err
	})
	return h, err
}
