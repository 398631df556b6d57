package outboxtest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// TortureConfig configures [Torture]. The zero value is ready for use.
type TortureConfig struct {
	// Seed decides what is added and which faults are injected, and in which order. 0: a
	// random one. It is printed; goroutines meet as they do, so a failure may need
	// some runs with its seed to come again.
	Seed uint64

	// Duration is for how long faults are injected: for up to three times as long where a
	// slow machine does not get to a hundred, and half a minute more where it does not get
	// to ten and has found nothing wrong yet. With fewer the test fails. 0 is 5 s. Then what
	// is left is delivered without, for up to half a minute.
	Duration time.Duration

	// Notification returns what to add for the i-th key, with content that the sender
	// understands. It is called again for content to refresh it with, which r may vary; the
	// key has to be the same for the same i and another one for every other. It is called
	// from several goroutines, each with an r of its own. nil: type "torture", a booking for
	// each i, and a small JSON object.
	Notification func(i int, r *rand.Rand) outbox.NewNotification

	// Accepted returns how often the provider, or what stands for it, has accepted n, in
	// that version; never a negative number. It is asked about all that was given to Send,
	// when all is over. Without it a Send that returns nil counts as accepted, and one that
	// returns an error does not: a sender that swallows messages, or reports errors for what
	// was accepted, is not found out, and the log says so.
	Accepted func(n outbox.Notification) int

	// Delivery and SendTimeout are those of the relays, and of your own, preferably.
	// 0 is AtLeastOnce, and 300 ms; at most 10 s.
	Delivery    relay.Delivery
	SendTimeout time.Duration
}

const (
	tortureRelays  = 3
	tortureCallers = 4
	heedPatience   = 2 * time.Second // for a Send to return when its ctx has ended
	maxAttempts    = -1              // of the relays: none
	enoughFaults   = 100
	fewFaults      = 10 // with fewer, nothing is proved
)

// Torture delivers some hundreds of notifications by sender, under faults, and checks
// that every promise of the outbox was kept: what was committed was sent, or failed with a
// reason; what was rolled back was not; and nothing was accepted twice but where a fault
// between the provider's accept and the note of it explains that (AtLeastOnce), or
// nothing at all (AtMostOnce).
//
// Meanwhile several goroutines add, repeat, change, roll back and requeue (unless the
// sender is a [relay.Reconciler]), in a database of
// its own (see [NewPool]), and three relays deliver. They die after a claim, before a
// Send, after an accept, before, amid and after settling and renewing, and are replaced;
// they freeze for longer than their lease; connections of all are cut; and the ctx of a Send
// ends early. To die means that nothing of the relay reaches the database any more, that the
// ctx of its Sends ends, and that their results are lost. Faults are injected around the
// sender, never in it: a provider that fails or hangs is up to it.
//
// It reports, by t.Errorf, with the seed: what was lost, what was sent twice, an add that
// failed as no fault explains, a Send that has not returned 2 s after its ctx had ended,
// panics, and receipts that PostgreSQL cannot keep; and a run that proved nothing, because
// nothing was accepted, or hardly a fault struck.
//
// What it cannot find:
//
//   - without [TortureConfig].Accepted, whether the provider has what Send says it has;
//   - what Accepted does not tell: the wrong text, the wrong person;
//   - a receipt that is another message's: many providers number the messages of each chat,
//     and a constant is a receipt, too;
//   - a goroutine of the sender that goes on after Send has returned, if what it does
//     is accepted in the end;
//   - a ctx that is not heeded, where the provider answers within 2 s after its end: have
//     what stands for the provider hang now and then;
//   - data races, which are for -race to find.
//
// A run takes up to three times Duration and then as long as it takes to deliver what is
// left, which a sender that does not accept draws out to half a minute: 7 to 15 seconds by
// default where all is well, up to a minute where not. One that passes logs one paragraph.
func Torture(t testing.TB, sender relay.Sender, cfg TortureConfig) {
	needT(t)
	t.Helper()
	tt := newTorture(t, sender, cfg)
	t.Logf("outboxtest: Torture with seed %d", tt.Seed)
	tt.run(t)
	tt.report(t)
}

// torture is one call of Torture.
type torture struct {
	TortureConfig
	sender  relay.Sender
	pool    *pgxpool.Pool
	store   *outbox.PGStore
	admin   *pgx.Conn
	journal *ledger.Journal
	path    string
	lease   time.Duration

	slots    [tortureRelays]*slot
	sends    sends
	patience time.Duration // for what is left to be delivered
	grace    time.Duration // for the few faults without which nothing is proved
	calm     atomic.Bool   // no more faults are injected
	drained  bool          // nothing is left to deliver
	stuck    bool          // something is, that is due
	waited   time.Duration // for that

	mu     sync.Mutex
	keys   []outbox.NewNotification // by i, as first returned
	number map[outbox.Key]int       // i, by key
	faults map[string]int
	struck int // relays, by arm
}

const bookedSQL = `CREATE TABLE torture_booked (request text PRIMARY KEY, record json NOT NULL)`

func newTorture(t testing.TB, sender relay.Sender, cfg TortureConfig) *torture {
	t.Helper()
	cfg.Seed = cmp.Or(cfg.Seed, rand.Uint64())
	cfg.Duration = cmp.Or(cfg.Duration, 5*time.Second)
	cfg.SendTimeout = cmp.Or(cfg.SendTimeout, 300*time.Millisecond)
	switch {
	case noSender(sender):
		t.Fatalf("outboxtest: Torture: sender is nil")
	case cfg.Duration < 0:
		t.Fatalf("outboxtest: Torture: Duration %v is negative", cfg.Duration)
	case cfg.SendTimeout < 0 || cfg.SendTimeout > 10*time.Second:
		t.Fatalf("outboxtest: Torture: SendTimeout %v is not between 0 and 10s", cfg.SendTimeout)
	case cfg.Delivery != relay.AtLeastOnce && cfg.Delivery != relay.AtMostOnce:
		t.Fatalf("outboxtest: Torture: Delivery %d is neither AtLeastOnce nor AtMostOnce", cfg.Delivery)
	}
	if cfg.Notification == nil {
		cfg.Notification = func(i int, r *rand.Rand) outbox.NewNotification {
			return outbox.NewNotification{Type: "torture", BookingID: int64(i + 1), Payload: map[string]any{"text": fmt.Sprintf("message %d", i), "nonce": r.Uint32()}}
		}
	}
	tt := &torture{TortureConfig: cfg, sender: sender, number: make(map[outbox.Key]int), faults: make(map[string]int), patience: patience, grace: 30 * time.Second, lease: max(1500*time.Millisecond, 3*cfg.SendTimeout)}
	tt.pool = NewPool(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("outboxtest: Torture: %v", err)
		}
	}
	var err error
	tt.store, err = outbox.NewPGStore(tt.pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	must(err)
	ctx, cancel := within(t)
	defer cancel()
	_, err = tt.pool.Exec(ctx, bookedSQL)
	must(err)
	tt.admin, err = pgx.ConnectConfig(ctx, tt.pool.Config().ConnConfig)
	must(err)
	tt.path = filepath.Join(t.TempDir(), "journal")
	tt.journal, err = ledger.Create(tt.path)
	must(err)
	tt.sends.torture = tt
	return tt
}

func (tt *torture) complain(kind, format string, args ...any) {
	tt.sends.mu.Lock()
	defer tt.sends.mu.Unlock()
	tt.sends.complaints.add(kind, format, args...)
}

func (tt *torture) rand(who uint64) *rand.Rand { return rand.New(rand.NewPCG(tt.Seed, who)) }

// fault notes one that was injected, or that was observed, which is not counted.
func (tt *torture) fault(f ledger.Fault) {
	_ = tt.journal.Note(ledger.Record{Fault: &f}) // its loss shows as a duplicate that nothing explains
	if f.Observed {
		return
	}
	tt.mu.Lock()
	defer tt.mu.Unlock()
	tt.faults[f.Kind]++
}

// run runs all of it, and returns when everything has ended but for a Send that does not.
func (tt *torture) run(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	defer cancel()
	storm, end := context.WithTimeout(ctx, 3*tt.Duration+tt.grace)
	defer end()
	var background, storming sync.WaitGroup
	background.Go(func() { tt.watchStalls(ctx) })
	relays, stop := context.WithCancel(ctx)
	for i := range tt.slots {
		tt.slots[i] = &slot{torture: tt, number: i}
		background.Go(func() { tt.slots[i].live(relays) })
	}
	for i := range tortureCallers {
		storming.Go(func() { tt.call(storm, ctx, i) })
	}
	// A Reconciler tells what was delivered before a requeue from what was delivered after it
	// as little as the outbox does.
	if _, ok := tt.sender.(relay.Reconciler); !ok {
		storming.Go(func() { tt.requeue(storm, ctx) })
	}
	storming.Go(func() {
		defer end()
		tt.inject(storm, ctx)
	})
	storming.Wait()
	for _, s := range tt.slots {
		s.disarm()
	}
	tt.calm.Store(true)
	tt.drain(ctx)
	stop()
	cancel()
	background.Wait()
	_ = tt.admin.Close(context.WithoutCancel(ctx))
}

// drain waits until nothing is left that is due, or will be soon, for a shorter time where
// the sender has shown to be a bad one, or has accepted nothing for so long that all
// that was due soon, or leased, has had its turn.
func (tt *torture) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, tt.patience)
	defer cancel()
	began := time.Now()
	defer func() { tt.waited = time.Since(began) }()
	for progress, accepted := began, -1; ; {
		var due, later bool
		err := tt.pool.QueryRow(ctx, `SELECT coalesce(bool_or(soon), false), coalesce(bool_or(NOT soon), false)
			FROM (SELECT lease_token IS NOT NULL OR coalesce(next_retry_at, created_at) <= now() + interval '10 s' AS soon
				FROM outbox_notifications WHERE status = 'pending') AS p`).Scan(&due, &later)
		if err == nil && !due {
			tt.drained = !later
			return
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			tt.stuck = true
			return
		}
		tt.sends.mu.Lock()
		if now := tt.sends.succeeded; now != accepted {
			progress, accepted = time.Now(), now
		}
		tt.sends.mu.Unlock()
		if time.Since(progress) > 20*time.Second+2*tt.lease { // a relay that met slow claims looks at everything after 20 of them
			tt.stuck = true
			return
		}
		if tt.sends.bad() && time.Since(began) > tt.patience/6 {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// watchStalls notes when this process stood still for so long that leases may have ended.
func (tt *torture) watchStalls(ctx context.Context) {
	for last := time.Now(); pause(ctx, 20*time.Millisecond) == nil; last = time.Now() {
		if ledger.Between(last, time.Now()) > tt.lease/10 {
			tt.fault(ledger.Fault{Kind: "stall", From: last, To: time.Now(), Observed: true})
		}
	}
}

// call is a caller: it adds until storm ends.
func (tt *torture) call(storm, ctx context.Context, number int) {
	r := tt.rand(uint64(100 + number))
	for n := 0; storm.Err() == nil; n++ {
		size := 1
		if r.IntN(10) == 0 {
			size = 2 + r.IntN(4)
		}
		request := fmt.Sprintf("%d-%d", number, n)
		tt.transaction(ctx, r, fmt.Sprintf("caller %d", number), request, size)
		_ = pause(storm, time.Duration(r.IntN(10))*time.Millisecond)
	}
}

// pick returns what to add: a new key, or one that was added lately.
func (tt *torture) pick(r *rand.Rand) outbox.NewNotification {
	tt.mu.Lock()
	i := len(tt.keys)
	if i > 0 && r.IntN(3) == 0 {
		i -= 1 + r.IntN(min(i, 20))
	}
	if i < len(tt.keys) && r.IntN(3) == 0 {
		defer tt.mu.Unlock()
		return tt.keys[i]
	}
	tt.mu.Unlock()
	n := tt.Notification(i, r)
	tt.mu.Lock()
	defer tt.mu.Unlock()
	if i == len(tt.keys) {
		tt.keys = append(tt.keys, n)
		if first, ok := tt.number[n.Key()]; ok {
			tt.complain("bad Notification", "%d and %d have the same key %v", first, i, n.Key())
		} else {
			tt.number[n.Key()] = i
		}
	}
	if first := tt.keys[i]; first.Key() != n.Key() {
		tt.complain("bad Notification", "of %d it has returned two keys, %v and %v", i, first.Key(), n.Key())
	}
	return n
}

var errIntended = errors.New("rolled back by intent")

// transaction adds in one transaction, which it may roll back, and writes down what it knows.
func (tt *torture) transaction(ctx context.Context, r *rand.Rand, caller, request string, size int) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ns := make([]outbox.NewNotification, 0, size)
	for range size {
		if n := tt.pick(r); !slices.ContainsFunc(ns, func(o outbox.NewNotification) bool { return o.Key() == n.Key() }) {
			ns = append(ns, n)
		}
	}
	rollBack := r.IntN(8) == 0
	from := time.Now()
	commits := make([]ledger.Commit, len(ns))
	for i, n := range ns {
		content, _ := json.Marshal(n.Payload) // what cannot be marshalled is refused by the add
		commits[i] = ledger.Commit{Caller: caller, Request: request, Key: n.Key(), Content: string(content), Result: ledger.Unknown, From: from}
	}
	tt.note(commits)
	result := ledger.RolledBack
	ours := false // what was called last
	err := func() error {
		tx, err := tt.pool.Begin(ctx)
		if err != nil {
			return err
		}
		defer tx.Rollback(context.WithoutCancel(ctx))
		results := make([]outbox.AddResult, 1)
		ours = true
		if len(ns) == 1 {
			results[0], err = tt.store.AddNotification(ctx, tx, ns[0])
		} else {
			results, err = tt.store.AddNotifications(ctx, tx, ns)
		}
		if err != nil {
			return err
		}
		ours = false
		for i, res := range results {
			n := res.Notification
			commits[i].ID, commits[i].Version, commits[i].Outcome, commits[i].Content = n.ID, n.Version, res.Outcome, string(n.Payload)
			if _, err := tx.Exec(ctx, "INSERT INTO torture_booked VALUES ($1, $2)", fmt.Sprintf("%s/%d", request, i), commits[i]); err != nil {
				return err
			}
		}
		if rollBack {
			return errIntended
		}
		result, ours = ledger.Unknown, true
		if err := tx.Commit(ctx); err != nil {
			return err
		}
		result = ledger.Committed
		return nil
	}()
	if errors.Is(err, outbox.ErrInvalid) {
		tt.complain("bad Notification", "what it has returned is refused: %v", err)
	}
	code := ""
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) {
		code = pg.Code
	}
	if ours && unexplained(code) {
		tt.complain("add failed", "%v", err)
	}
	to := time.Now()
	for i := range commits {
		commits[i].Result, commits[i].To, commits[i].Code = result, to, code
	}
	tt.note(commits)
}

// unexplained reports whether a SQLSTATE is none of what a cut connection, a server that has
// too few, or the end of a ctx make. 40001 is the caller's to run again, on a server whose
// transactions are SERIALIZABLE by default.
func unexplained(code string) bool {
	return code != "" && code != "40001" && !slices.Contains([]string{"08", "53", "57"}, code[:2])
}

func (tt *torture) note(commits []ledger.Commit) {
	records := make([]ledger.Record, len(commits))
	for i := range commits {
		c := commits[i]
		records[i].Commit = &c
	}
	_ = tt.journal.Note(records...) // its loss shows in the check
}

// requeue is an operator.
func (tt *torture) requeue(storm, ctx context.Context) {
	r := tt.rand(200)
	for pause(storm, time.Duration(20+r.IntN(100))*time.Millisecond) == nil {
		tt.mu.Lock()
		if len(tt.keys) == 0 {
			tt.mu.Unlock()
			continue
		}
		key := tt.keys[r.IntN(len(tt.keys))].Key()
		tt.mu.Unlock()
		rq := ledger.Requeue{Key: key, From: time.Now()}
		n, err := tt.store.Requeue(ctx, key)
		if n == 0 && err == nil {
			continue
		}
		rq.Done, rq.To = err == nil, time.Now()
		if err != nil {
			rq.To = time.Time{} // it may come to pass yet
		}
		_ = tt.journal.Note(ledger.Record{Requeue: &rq})
	}
}

// inject arms the relays, and cuts connections, until it is enough, or storm ends.
func (tt *torture) inject(storm, ctx context.Context) {
	r := tt.rand(300)
	began := time.Now()
	enough := func() bool {
		n, d := tt.injected(), time.Since(began)
		return d >= tt.Duration && n >= enoughFaults || d >= 3*tt.Duration && (n >= fewFaults || tt.sends.bad())
	}
	for n, cut := 1, 0; !enough() && pause(storm, time.Duration(10+r.IntN(30))*time.Millisecond) == nil; n++ {
		// Not often: relays pause after it, and on a slow machine would do nothing else.
		if n%40 == 0 && tt.sends.begun()-cut >= 10 {
			cut = tt.sends.begun()
			f := ledger.Fault{Kind: "connections cut", From: time.Now()}
			_, err := tt.admin.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND pid <> pg_backend_pid() AND pg_catalog.hashint8extended(pid, $2) & 1023 <= $1`,
				307+r.IntN(717), int64(r.Uint64())) // a third of them to all
			f.To = time.Now()
			if err == nil {
				tt.fault(f)
			}
			continue
		}
		s := tt.slots[r.IntN(len(tt.slots))]
		m := ledger.Moments[r.IntN(len(ledger.Moments))]
		if rare(m) && r.IntN(3) > 0 {
			m = ledger.AfterClaim
		}
		s.arm(m)
	}
}

// injected is how many faults there were.
func (tt *torture) injected() (n int) {
	tt.mu.Lock()
	defer tt.mu.Unlock()
	for _, of := range tt.faults {
		n += of
	}
	return n
}

// report checks the ledger and tells.
func (tt *torture) report(t testing.TB) {
	t.Helper()
	err := tt.journal.Close()
	h := ledger.History{Delivery: tt.Delivery, Lease: tt.lease, MaxAttempts: maxAttempts, Drained: tt.drained}
	_, h.Reconciled = tt.sender.(relay.Reconciler)
	if err == nil {
		h.Records, err = ledger.Read(tt.path)
	}
	if err == nil {
		h.Rows, h.Booked, err = tt.read(t)
	}
	if err != nil {
		t.Fatalf("outboxtest: Torture: %v", err)
	}
	h.Records = append(h.Records, tt.sends.judge()...)
	wrong := &tt.sends.complaints
	if tt.stuck {
		for _, n := range h.Rows {
			if n.Status == outbox.StatusPending && !n.NextRetryAt.After(time.Now()) {
				wrong.add("still not delivered", "%v, %v after the last fault, at attempt %d; the last error is %q", n.Key(), tt.waited.Round(time.Second), n.Attempts, short(n.LastError))
			}
		}
	}
	v := ledger.Check(h)
	told := make(map[string]bool)
	for _, violation := range v.Violations {
		what := fmt.Sprintf("%s of %v", violation.Kind, violation.Key)
		if told[what] || violation.Kind == ledger.Duplicate && tt.sends.contradicted[violation.Key] {
			continue
		}
		text := fmt.Sprintf("key %v, id %d: %s", violation.Key, violation.ID, noReceipts.Replace(violation.Text))
		if len(told) == 0 {
			text += "\n    " + strings.Join(around(violation.Text, h.Of(violation.Key, violation.ID)), "\n    ")
		}
		told[what] = true
		wrong.add(string(violation.Kind), "%s", text)
	}
	if len(wrong.kinds) == 0 {
		if v.Accepted == 0 {
			wrong.add("nothing was proved", "the sender has accepted nothing")
		}
		if n := tt.injected(); n < fewFaults {
			wrong.add("nothing was proved", "%d faults have struck in %v: give it a longer Duration", n, 3*tt.Duration+tt.grace)
		}
	}
	if len(wrong.kinds) == 0 {
		var kinds []string
		for _, kind := range slices.Sorted(maps.Keys(tt.faults)) {
			kinds = append(kinds, fmt.Sprintf("%s %d", kind, tt.faults[kind]))
		}
		lost := "nothing lost"
		if tt.Accepted == nil {
			lost = "nothing lost by what Send has returned; whether the provider has it was not checked, as TortureConfig.Accepted was not given"
		}
		t.Logf("outboxtest: Torture with seed %d: %d adds of %d keys were committed, %d messages accepted, of them %d twice as a fault explains and %d as they were requeued; "+
			"%d rows were sent and %d failed, %d stale settles refused, %s. %d faults: %s.",
			tt.Seed, v.Adds, len(h.Rows), v.Accepted, v.DuplicatesAllowed, v.DuplicatesOnPurpose, v.Sent, v.Failed, v.StaleRefused, lost, tt.injected(), strings.Join(kinds, ", "))
		return
	}
	t.Errorf("outboxtest: Torture with seed %d:%v", tt.Seed, wrong)
}

// noReceipts words what the ledger says of an accept that gave none.
var noReceipts = strings.NewReplacer(`accepted as ""`, "accepted with no receipt", ` and as ""`, " and with no receipt", `receipt ""`, "no receipt")

var acceptLine = regexp.MustCompile(`accept of version (\d+) as ("(?:[^"\\]|\\.)*") from `)

const (
	maxHistory = 40  // lines
	maxLine    = 500 // characters
)

// around returns the lines of a history that are closest to the accepts which text, a
// violation, is about, or to the end if it is about none.
func around(text string, history []string) []string {
	lines := make([]string, len(history))
	distance := make([]int, len(history))
	marks := []int{}
	for i, line := range history {
		lines[i] = cut(line, maxLine)
		m := acceptLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if strings.Contains(text, "version "+m[1]+" ") && (strings.Contains(text, " as "+m[2]) || !strings.Contains(text, "accepted as")) {
			marks = append(marks, i)
		}
		if m[2] == `""` {
			lines[i] = cut(strings.Replace(line, ` as "" from `, " with no receipt from ", 1), maxLine)
		}
	}
	if len(marks) == 0 {
		marks = []int{len(history) - 1}
	}
	order := make([]int, len(history))
	for i := range order {
		order[i], distance[i] = i, len(history)
		for _, m := range marks {
			distance[i] = min(distance[i], max(i-m, m-i))
		}
	}
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(distance[i], distance[j]) })
	order = order[:min(len(order), maxHistory)]
	slices.Sort(order)
	var kept []string
	next := 0
	leftOut := func(to int) {
		if to > next {
			kept = append(kept, fmt.Sprintf("… %d lines left out", to-next))
		}
	}
	for _, i := range order {
		leftOut(i)
		kept, next = append(kept, lines[i]), i+1
	}
	leftOut(len(history))
	return kept
}

// read reads the table, and what was committed with it.
func (tt *torture) read(t testing.TB) (rows []outbox.Notification, booked []ledger.Commit, err error) {
	ctx, cancel := within(t)
	defer cancel()
	if err := tt.pool.Ping(ctx); err != nil { // connections that were cut
		return nil, nil, err
	}
	f := outbox.Filter{Limit: 1000}
	for {
		page, err := tt.store.List(ctx, f)
		if err != nil {
			return nil, nil, err
		}
		rows = append(rows, page...)
		if len(page) < f.Limit {
			break
		}
		f.After = page[len(page)-1].ID
	}
	found, err := tt.pool.Query(ctx, "SELECT record FROM torture_booked")
	if err != nil {
		return nil, nil, err
	}
	booked, err = pgx.CollectRows(found, pgx.RowTo[ledger.Commit])
	if booked == nil {
		booked = []ledger.Commit{}
	}
	return rows, booked, err
}
