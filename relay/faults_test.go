package relay_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// Mutations tried, and what each turns red:
//
//	settle without the token check          TestFrozenWorker
//	attempts counted when settling          TestKilledWorker, TestPoison, TestFrozenWorker, TestAddWhileDelivering
//	results dropped on a settle error       TestServerFaults
//	claim without Except                    TestServerFaults/a_pause_…
//	another token for a repeated claim      TestServerFaults/a_pause_…
//	claims repeated without an answer       TestServerFaults/a_pause_…, in nine runs of twelve
//	suspects not kept apart                 TestPoison/in_a_batch_with_others

// workerVariable has the test binary be a worker: a process with a relay, to be
// killed or frozen. Its value is a workerSpec.
const workerVariable = "OUTBOX_RELAY_TEST_WORKER"

type workerSpec struct {
	URL         string
	HoldAt      moment // wait there for a line on the standard input
	Concurrency int
	Lease       time.Duration
	BatchSize   int
	Attempts    int    // at most
	DieOf       string // the type of message whose Send ends the process
}

type moment string

const (
	claimed  moment = "claimed"  // but nothing is known of it outside the database
	sending  moment = "sending"  // and not accepted
	accepted moment = "accepted" // and not settled
)

var moments = []moment{claimed, sending, accepted}

// worker is what runs in such a process. On its standard output it says what it is
// about to do and what it did, and its log. What it has written reaches the test
// even if it is killed at once.
type worker struct {
	*outbox.PGStore
	workerSpec
	released chan struct{}
}

func work(spec string) {
	w := &worker{released: make(chan struct{})}
	must := func(err error) {
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	must(json.Unmarshal([]byte(spec), &w.workerSpec))
	go func() {
		in := bufio.NewReader(os.Stdin)
		if _, err := in.ReadString('\n'); err == nil {
			close(w.released)
			_, _ = in.ReadString('\n')
		}
		os.Exit(0) // the test has ended
	}()
	pool, err := pgxpool.New(context.Background(), w.URL)
	must(err)
	w.PGStore, err = outbox.NewPGStore(pool, outbox.Config{Logger: discard})
	must(err)
	r, err := relay.New(w, w, relay.Config{Concurrency: max(w.Concurrency, 1), BatchSize: w.BatchSize, Lease: w.Lease, MaxAttempts: w.Attempts,
		Logger: slog.New(slog.NewTextHandler(os.Stdout, nil))})
	must(err)
	must(r.Run(context.Background()))
}

func (w *worker) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	res, err := w.PGStore.Claim(ctx, opts)
	if len(res.Claimed) > 0 {
		fmt.Println(claimed, len(res.Claimed))
		w.hold(claimed)
	}
	return res, err
}

func (w *worker) Send(_ context.Context, n outbox.Notification) (string, error) {
	fmt.Println(sending, n.ID)
	if n.Type == w.DieOf {
		os.Exit(3)
	}
	w.hold(sending)
	fmt.Println(accepted, n.ID)
	return "", nil
}

func (w *worker) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	w.hold(accepted)
	return w.PGStore.Settle(context.WithoutCancel(ctx), settlements) // it may have been held beyond the timeout
}

func (w *worker) hold(at moment) {
	if at == w.HoldAt {
		<-w.released
	}
}

// process is a worker as the test has it.
type process struct {
	*os.Process
	in     io.Writer
	exited chan struct{}

	mu    sync.Mutex
	lines []string
}

// startWorker starts a worker that does not outlive the test. What it has accepted goes
// to p as well.
func startWorker(t testing.TB, p *provider, spec workerSpec) *process {
	t.Helper()
	value, err := json.Marshal(spec)
	require.NoError(t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workerVariable+"="+string(value))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	w := &process{Process: cmd.Process, in: in, exited: make(chan struct{})}
	go func() {
		defer close(w.exited)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			w.mu.Lock()
			w.lines = append(w.lines, scan.Text())
			w.mu.Unlock()
			var id int64
			if _, err := fmt.Sscanf(scan.Text(), string(accepted)+" %d", &id); err == nil {
				p.accept(delivery{ID: id})
			}
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() { w.kill() })
	return w
}

// kill is kill -9. All that the worker said is known when it returns.
func (w *process) kill() {
	_ = w.Kill() // it may have exited
	<-w.exited
}

func (w *process) said(line string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.lines {
		if strings.Contains(l, line) {
			n++
		}
	}
	return n
}

func (w *process) release(t testing.TB) {
	t.Helper()
	_, err := fmt.Fprintln(w.in)
	require.NoError(t, err)
}

// askable is a provider that can be asked.
type askable struct {
	*provider
	asked atomic.Int64
}

func (r *askable) Reconcile(_ context.Context, n outbox.Notification, version int64) (string, bool, error) {
	r.asked.Add(1)
	if version != n.Version {
		return "", false, errors.New("asked about another version")
	}
	return "found", len(r.of(n.ID)) > 0, nil
}

func TestKilledWorker(t *testing.T) {
	t.Parallel()
	// Each mode has messages of its own type, all of which the worker has when it is killed.
	modes := map[string]relay.Delivery{"AtLeastOnce": relay.AtLeastOnce, "AtMostOnce": relay.AtMostOnce,
		"AtLeastOnce_and_ask": relay.AtLeastOnce, "AtMostOnce_and_ask": relay.AtMostOnce}
	for _, at := range moments {
		t.Run("once_"+string(at)+"_leaves_its_messages_to_another", func(t *testing.T) {
			t.Parallel()
			db, p := pgtest.NewDB(t), &provider{}
			for mode := range modes {
				db.Add(t, outbox.NewNotification{Type: mode})
			}
			w := startWorker(t, p, workerSpec{URL: db.URL, HoldAt: at, Concurrency: len(modes), Lease: shortLease})
			until(t, "it has them", func() bool {
				return w.said(string(claimed)+" 4") == 1 && (at == claimed || w.said(string(at)+" ") == len(modes))
			})
			require.Equal(t, len(modes), count(t, db, held))
			w.kill()
			require.Equal(t, len(modes), count(t, db, "status = 'pending' AND attempts = 1"), "counted by the claim")
			before := p.total() // messages accepted before the kill
			require.Equal(t, at == accepted, before > 0)

			ask := &askable{provider: p}
			for mode, d := range modes {
				sender := relay.Sender(p)
				if strings.HasSuffix(mode, "ask") {
					sender = ask
				}
				run(t, newRelay(t, db.Store, sender, relay.Config{Delivery: d, Types: []string{mode}}))
			}
			untilSettled(t, db)
			for mode, d := range modes {
				n := db.Get(t, outbox.Key{Type: mode})
				got := len(p.of(n.ID))
				switch {
				case strings.HasSuffix(mode, "ask"):
					require.Equal(t, outbox.StatusSent, n.Status, mode)
					require.EqualValues(t, 1, n.SentVersion)
					require.Equal(t, 1, got, "it was asked about")
					want := fmt.Sprintf("message 1 of %d", n.ID)
					if at == accepted {
						want = "found"
					}
					require.Equal(t, want, n.Receipt)
				case d == relay.AtLeastOnce:
					require.Equal(t, outbox.StatusSent, n.Status, mode)
					require.Equal(t, 2, n.Attempts)
					require.Equal(t, before/len(modes)+1, got)
				default:
					require.Equal(t, outbox.StatusFailed, n.Status, mode)
					require.Contains(t, n.LastError, "outcome unknown")
					require.Equal(t, 1, n.Attempts)
					require.Equal(t, before/len(modes), got)
				}
			}
			require.EqualValues(t, 2, ask.asked.Load())
		})
	}
}

func TestPoison(t *testing.T) {
	t.Parallel()
	// The poison comes first, so that it is in the batch of the others each time.
	for name, batch := range map[string]int{"alone_in_its_batch": 1, "in_a_batch_with_others": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			const rows, attempts = 20, 3
			poison := outbox.NewNotification{Type: "poison"}
			db.Add(t, poison)
			addMany(t, db, rows)
			p := &provider{}
			deaths := 0
			for w := (*process)(nil); count(t, db, "status = 'pending'") > 0; {
				if w == nil {
					w = startWorker(t, p, workerSpec{URL: db.URL, Lease: 2 * shortLease, BatchSize: batch, Attempts: attempts, DieOf: poison.Type})
				}
				select {
				case <-w.exited:
					deaths++
					require.LessOrEqual(t, deaths, attempts)
					w = nil
				case <-time.After(10 * time.Millisecond):
				}
			}
			require.Equal(t, attempts, deaths)
			n := db.Get(t, poison.Key())
			require.Equal(t, outbox.StatusFailed, n.Status)
			require.Equal(t, attempts, n.Attempts)
			require.Contains(t, n.LastError, "out of attempts: the last delivery left no result")
			require.Equal(t, rows, count(t, db, "status = 'sent'"))
		})
	}
}

// addSteadily adds messages 1, 2 and so on, n at least and until stop is called, which
// returns how many there are. Each is added again until that succeeds: as a caller would,
// it tries anew what may have been committed.
func addSteadily(t testing.TB, db *pgtest.DB, n int) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	added := 0
	var enough atomic.Bool
	var adder sync.WaitGroup
	adder.Go(func() {
		for i := 1; (i <= n || !enough.Load()) && ctx.Err() == nil; {
			// Longer than a server stands still: to add a row again just as it goes on would lock
			// it, and a claim that is repeated then would pass it over.
			bounded, cancel := context.WithTimeout(ctx, patience)
			if _, err := db.TryAdd(bounded, message(i)); err == nil {
				i++
				added++
			}
			cancel()
		}
	})
	t.Cleanup(func() { cancel(); adder.Wait() })
	return func() int {
		enough.Store(true)
		adder.Wait()
		return added
	}
}

// progress waits until p has accepted some more.
func progress(t testing.TB, p *provider) {
	t.Helper()
	before := p.total()
	until(t, "messages are delivered", func() bool { return p.total() > before })
}

// requireUnspent asserts that all n messages were sent once each, by one attempt each.
func requireUnspent(t testing.TB, db *pgtest.DB, p *provider, n int) {
	t.Helper()
	untilSettled(t, db)
	p.requireOnce(t, n)
	require.Equal(t, n, count(t, db, "status = 'sent' AND attempts = 1 AND version = 1"))
}

func TestServerFaults(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*pgserver.Server, context.Context) error{
		"crash": (*pgserver.Server).Crash, "restart": (*pgserver.Server).Restart,
	} {
		t.Run(name+"_loses_nothing_and_spends_no_attempts", func(t *testing.T) {
			t.Parallel()
			server, db := pgtest.StartServer(t)
			const rows = 2000
			p := &provider{}
			for range 3 { // an outage is shorter than a lease
				run(t, newRelay(t, db.Store, p, relay.Config{BatchSize: 20}))
			}
			stop := addSteadily(t, db, rows)
			for range 2 {
				progress(t, p)
				require.NoError(t, fault(server, t.Context()))
			}
			n := stop()
			untilSettledAfterCuts(t, db)
			requireUnspent(t, db, p, n)
		})
	}

	t.Run("terminated_connections_lose_nothing_and_spend_no_attempts", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		const rows = 2000
		p := &provider{}
		for range 3 {
			run(t, newRelay(t, db.Store, p, relay.Config{BatchSize: 20, Listen: true}))
		}
		stop := addSteadily(t, db, rows)
		killer := pgtest.NewPool(t, pgtest.DatabaseURL("postgres"), nil)
		for range 20 {
			progress(t, p)
			_, err := killer.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
				db.Config().ConnConfig.Database)
			require.NoError(t, err)
		}
		n := stop()
		untilSettledAfterCuts(t, db)
		requireUnspent(t, db, p, n)
	})

	t.Run("a_pause_longer_than_a_lease_loses_nothing_and_spends_no_attempts", func(t *testing.T) {
		t.Parallel()
		server, db := pgtest.StartServer(t)
		const rows, lease = 1000, 9 * time.Second // a repeated claim has a third of it
		p := &provider{}
		var log logBook
		run(t, newRelay(t, db.Store, p, relay.Config{BatchSize: 20, Concurrency: 2, Lease: lease, Logger: log.logger()}))
		stop := addSteadily(t, db, rows)
		for i := range 2 {
			progress(t, p)
			began := time.Now()
			resume := pgtest.Pause(t, server)
			until(t, "it says so", func() bool { return log.count("tries again") > i })
			elapsed(t, began, lease+lease/2)
			resume()
		}
		requireUnspent(t, db, p, stop())
	})
}

// untilSettledAfterCuts is untilSettled on a pool whose connections may have been cut. Only
// when the relays have settled everything are those closed that nobody has used since.
func untilSettledAfterCuts(t testing.TB, db *pgtest.DB) {
	t.Helper()
	until(t, "all is settled", func() bool {
		n, err := pgxCount(t, db)
		return err == nil && n == 0
	})
	pgtest.Reset(t, db.Pool)
}

// pgxCount counts pending rows on a pool whose connections may just have been cut.
func pgxCount(t testing.TB, db *pgtest.DB) (n int, err error) {
	err = db.QueryRow(t.Context(), "SELECT count(*) FROM outbox_notifications WHERE status = 'pending'").Scan(&n)
	return n, err
}
