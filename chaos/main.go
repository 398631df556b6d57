// Command chaos breaks everything around the library by a seed, and checks by ledgers
// that nothing was lost and nothing went out twice that should not. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/internal/pgserver"
)

func main() {
	if spec := os.Getenv(roleVariable); spec != "" {
		os.Exit(runChild(spec))
	}
	os.Exit(command())
}

// limits say when to end. What is zero does not limit.
type limits struct {
	first  int // round
	rounds int
	time   time.Duration
}

func command() int {
	seed := flag.Uint64("seed", 0, "chooses all faults; 0: a random one, which is printed")
	first := flag.Int("round", 0, "the first round; with -rounds 1 only that one")
	rounds := flag.Int("rounds", 0, "how many rounds; 0: as many as the time allows")
	minutes := flag.Float64("minutes", 0, "no round begins after so long; 0: 3 if -rounds is not given")
	length := flag.Duration("length", 12*time.Second, "how long faults are injected in a round")
	dir := flag.String("out", "", "directory for the journals, which are kept where something is wrong; default: a temporary one")
	failovers := flag.String("failover", "", "rounds that kill the primary and promote a standby: sync, async or both")
	keep := flag.Bool("keep", false, "keep the journals of every round")
	flag.Parse()
	if flag.NArg() > 0 || *rounds < 0 || *first < 0 || *minutes < 0 || *length <= 0 || *failovers != "" && failoverKinds[*failovers] == nil {
		fmt.Fprintln(os.Stderr, "chaos: bad arguments, see -help")
		return 2
	}
	lim := limits{*first, *rounds, time.Duration(*minutes * float64(time.Minute))}
	if lim.rounds == 0 && lim.time == 0 {
		lim.time = 3 * time.Minute
	}
	opts := options{seed: *seed, dir: *dir, length: *length, keep: *keep, failovers: *failovers}
	if opts.seed == 0 {
		opts.seed = rand.Uint64N(1e9) + 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	ok, err := run(ctx, opts, lim, os.Stdout)
	switch {
	case err == nil && ok:
		fmt.Println("PASS: nothing lost, no duplicate that is not allowed, nothing else violated")
		return 0
	case ok && errors.Is(err, errInterrupted):
		fmt.Fprintln(os.Stderr, "chaos:", err)
		return 1
	case err != nil:
		fmt.Fprintln(os.Stderr, "chaos:", err)
	}
	fmt.Fprintln(os.Stderr, "chaos: FAILED")
	return 1
}

var errInterrupted = errors.New("interrupted")

// again is how a round is run again.
func (o options) again(round int) string {
	text := fmt.Sprintf("make chaos SEED=%d ROUND=%d ROUNDS=1", o.seed, round)
	if version := os.Getenv("OUTBOX_TEST_POSTGRES"); version != "" {
		text = fmt.Sprintf("OUTBOX_TEST_POSTGRES=%s %s", version, text)
	}
	if o.failovers != "" {
		text += " FAILOVER=" + o.failovers
	}
	return text + fmt.Sprintf(" ARGS='-length %v'", o.length)
}

// maxFailed is after how many rounds that failed by themselves there is no use in going
// on. Nothing was violated in these, as far as they went.
const maxFailed = 3

// settings are those of the server. What was committed survives its death.
var settings = map[string]string{
	"synchronous_commit": "on", "max_connections": "60", "deadlock_timeout": "50ms",
}

// run runs rounds on a server of its own, and reports whether nothing was violated.
func run(ctx context.Context, opts options, lim limits, out io.Writer) (ok bool, err error) {
	if opts.dir == "" {
		if opts.dir, err = os.MkdirTemp("", "outbox-chaos-"); err != nil {
			return false, err
		}
		defer func() { _ = os.Remove(opts.dir) }() // it stays if something is in it
	} else if err := os.MkdirAll(opts.dir, 0o755); err != nil {
		return false, err
	}
	play, kind := runRound, "a server of the caller's"
	switch {
	case opts.failovers != "":
		play, kind = runFailover, "failovers"
	case opts.server == nil:
		server, startErr := pgserver.Start(ctx, pgserver.Options{
			Version: os.Getenv("OUTBOX_TEST_POSTGRES"), Settings: settings,
			Logf: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
		})
		if startErr != nil {
			return false, startErr
		}
		defer func() { err = errors.Join(err, server.Stop()) }()
		opts.server, opts.url, kind = server, server.URL, server.Kind
	}
	fmt.Fprintf(out, "seed %d, %s\n", opts.seed, kind)
	rep := newReport()
	if opts.report != nil {
		rep = opts.report
	}
	began := time.Now()
	var failed []error // of the rig itself
	ok = true
	for n := lim.first; ctx.Err() == nil; n++ {
		if lim.rounds > 0 && n == lim.first+lim.rounds || lim.time > 0 && time.Since(began) > lim.time {
			break
		}
		from := time.Now()
		res, err := play(ctx, opts, n)
		if res.mode != "" {
			rep.add(res)
			v := res.verdict
			fmt.Fprintf(out, "round %d, %s, %v: %d adds, %d accepted, duplicates %d allowed and %d on purpose, %d stale settles refused, %d violations\n",
				n, res.mode, time.Since(from).Round(100*time.Millisecond), v.Adds, v.Accepted, v.DuplicatesAllowed, v.DuplicatesOnPurpose, v.StaleRefused, len(v.Violations))
			if res.failover != nil {
				fmt.Fprintf(out, "  %v\n", res.failover)
			}
		}
		if len(res.verdict.Violations) > 0 {
			ok = false
			printViolations(out, res, 10)
		}
		if ctx.Err() != nil {
			break // it was cut short, and what it lacks says nothing
		}
		if err == nil && len(res.verdict.Violations) == 0 {
			err = res.idle()
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("round %d: %w", n, err))
		}
		if err != nil || !ok {
			fmt.Fprintf(out, "round %d FAILED, the journals are in %s; run it again with %s\n", n, opts.dir, opts.again(n))
		}
		if !ok || len(failed) == maxFailed {
			break
		}
	}
	rep.print(out, opts.seed, time.Since(began))
	if missing := rep.missing(); opts.failovers == "" && rep.injected() >= longRun && len(missing) > 0 {
		failed = append(failed, fmt.Errorf("%d faults, and none of the kinds %q", rep.injected(), missing))
	}
	if ctx.Err() != nil {
		failed = append(failed, errInterrupted)
	}
	return ok, errors.Join(failed...)
}

// idle is an error if a round has done nothing, and so has shown nothing.
func (res result) idle() error {
	injected := slices.ContainsFunc(res.history.Records, func(r ledger.Record) bool { return r.Fault != nil && !r.Fault.Observed })
	switch {
	case res.verdict.Adds == 0:
		return errors.New("nothing was added")
	case res.verdict.Accepted == 0:
		return errors.New("the provider accepted nothing")
	case !injected:
		return errors.New("no fault was injected")
	case res.failover != nil && res.failover.first == 0:
		return errors.New("the new primary delivered nothing")
	}
	return nil
}
