package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/internal/pgserver"
)

// failover is a round in which the primary is killed for good and its standby promoted,
// beside processes that are killed. All processes have the URL of both.
type failover struct {
	synchronous      bool
	detach           bool // asynchronous: nothing of the last moments arrives
	primary, standby *pgserver.Server
	before, last     time.Duration // until the kill, and of that detached
	rngs             [2]*rand.Rand // of what dies before and afterwards

	of     ledger.Failover
	losses ledger.Losses
	first  time.Duration // from the kill to the first message of a claim on the new primary
}

// failoverKinds are what -failover may be.
var failoverKinds = map[string]func(number int) (synchronous bool){
	"sync":  func(int) bool { return true },
	"async": func(int) bool { return false },
	"both":  func(number int) bool { return number/2%2 == 0 }, // either with each way of delivery
}

// runFailover is runRound on servers of its own.
func runFailover(ctx context.Context, opts options, number int) (res result, err error) {
	rng := rand.New(rand.NewPCG(opts.seed, ^uint64(number)))
	f := &failover{synchronous: failoverKinds[opts.failovers](number)}
	f.detach = rng.IntN(3) > 0 && !f.synchronous
	f.before, f.last = milliseconds(rng, 1000, 3000), milliseconds(rng, 0, 500)
	for i := range f.rngs { // how often each is asked depends on the time
		f.rngs[i] = rand.New(rand.NewPCG(rng.Uint64(), 0))
	}
	f.primary, err = pgserver.Start(ctx, pgserver.Options{Version: os.Getenv("OUTBOX_TEST_POSTGRES"), Settings: settings})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, f.primary.Stop()) }()
	if f.standby, err = f.primary.StartStandby(ctx); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, f.standby.Stop()) }()
	if f.synchronous {
		if err := f.primary.Synchronous(ctx); err != nil {
			return res, err
		}
	}
	opts.server, opts.url, opts.failover = f.primary, pgserver.WritableURL(f.primary, f.standby), f
	res, err = runRound(ctx, opts, number)
	res.failover = f
	return res, err
}

// draw completes what a round has drawn.
func (f *failover) draw(r *round) {
	kind := "synchronous"
	if !f.synchronous {
		// The provider is asked by id and version, which an asynchronous failover gives again.
		r.spec.Reconcile = false
		kind = "asynchronous"
	}
	r.mode = fmt.Sprintf("%s failover, %s", kind, deliveryNames[r.spec.Delivery])
}

var deliveryNames = []string{"AtLeastOnce", "AtMostOnce"}

// inject kills processes, and in between the primary.
func (f *failover) inject(ctx context.Context, r *round) {
	kill := func(ctx context.Context, rng *rand.Rand) {
		for ctx.Err() == nil {
			slots := r.workers
			if rng.IntN(3) == 0 {
				slots = r.bookers
			}
			do := r.kill(r.anyOf(slots, rng))
			select {
			case <-time.After(milliseconds(rng, 300, 1500)):
				do()
			case <-ctx.Done():
			}
		}
	}
	before, cancel := context.WithTimeout(ctx, f.before)
	kill(before, f.rngs[0])
	cancel()
	if err := f.failOver(ctx, r); err != nil {
		r.fail(err)
		return
	}
	kill(ctx, f.rngs[1])
	// The new primary has its time, however long it took to get there.
	if rest := 2*time.Second - time.Since(f.of.Promoted); rest > 0 && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), rest)
		defer cancel()
		kill(after, f.rngs[1])
	}
}

func (f *failover) failOver(ctx context.Context, r *round) error {
	ctx = context.WithoutCancel(ctx)
	f.of.CaughtUp = time.Now()
	if err := f.standby.CatchUp(ctx); err != nil { // the database is there
		return err
	}
	if f.detach {
		last := time.After(f.last)
		if err := f.standby.Detach(ctx); err != nil {
			return err
		}
		<-last
	}
	f.of.Killed = time.Now()
	if err := f.primary.Kill(ctx); err != nil {
		return err
	}
	if err := f.standby.Promote(ctx); err != nil {
		return err
	}
	f.of.Promoted = time.Now()
	r.note(ledger.Fault{Kind: "primary killed, standby promoted", From: f.of.Killed})
	return nil
}

// check checks what is left.
func (f *failover) check(h ledger.History) ledger.Verdict {
	for _, r := range h.Records {
		if a := r.Accept; a != nil && a.Claimed.After(f.of.Promoted) {
			if d := a.At.Sub(f.of.Killed); f.first == 0 || d < f.first {
				f.first = d
			}
		}
	}
	if f.synchronous {
		return ledger.Check(h)
	}
	h, f.losses = h.Survived(f.of)
	v := ledger.Check(h)
	v.Violations = append(v.Violations, f.losses.Violations...)
	v.StaleRefused += f.losses.Refused
	return v
}

func (f *failover) String() string {
	text := fmt.Sprintf("promoted after %v, delivered after %v", f.of.Promoted.Sub(f.of.Killed).Round(time.Millisecond), f.first.Round(time.Millisecond))
	if l := f.losses; !f.synchronous {
		text += fmt.Sprintf("; lost: %d acknowledged adds, %d claims, %d settlements; %d messages of which nothing is known, %d of them sent again; %d stale settles of lost claims refused",
			l.Adds, l.Claims, l.Settles, l.Sent, l.Again, l.Refused)
	}
	return text
}

// printFailovers sums up the failovers of either kind, in Markdown.
func printFailovers(out io.Writer, all []*failover) {
	if len(all) == 0 {
		return
	}
	fmt.Fprint(out, "\n| failovers | rounds | from the kill to the first delivery: median | longest | acknowledged adds lost | claims lost | settlements lost | messages of which nothing is known | sent again of these | stale settles refused |\n")
	fmt.Fprint(out, "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, synchronous := range []bool{true, false} {
		var first []time.Duration
		var sum ledger.Losses
		for _, f := range all {
			if f.synchronous != synchronous {
				continue
			}
			first = append(first, f.first)
			sum.Adds += f.losses.Adds
			sum.Claims += f.losses.Claims
			sum.Settles += f.losses.Settles
			sum.Sent += f.losses.Sent
			sum.Again += f.losses.Again
			sum.Refused += f.losses.Refused
		}
		if len(first) == 0 {
			continue
		}
		slices.Sort(first)
		kind := "synchronous"
		if !synchronous {
			kind = "asynchronous"
		}
		fmt.Fprintf(out, "| %s | %d | %v | %v | %d | %d | %d | %d | %d | %d |\n", kind, len(first), first[len(first)/2].Round(time.Millisecond),
			first[len(first)-1].Round(time.Millisecond), sum.Adds, sum.Claims, sum.Settles, sum.Sent, sum.Again, sum.Refused)
	}
}
