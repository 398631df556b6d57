package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/seed3357934d/outbox"
)

const (
	firstPause   = 4 * time.Millisecond   // between two claims, after one that found something
	turnPatience = time.Second            // in waiting for other relays' claims
	longestTurn  = 100 * time.Millisecond // between two looks whether they are over
	largestBatch = 1000                   // where BatchSize is left to the relay
	quickDrain   = 250 * time.Millisecond // half a batch gone so soon: the next may be larger
	slowDrain    = time.Second            // so late: smaller
	maxSettle    = 1000                   // rows in one statement
	longestHeld  = 50 * time.Millisecond  // before a row is tried again that a caller holds
	longestPause = 5 * time.Second        // in an outage
	gatherTime   = time.Millisecond       // for results to come together, while more is being sent
	claimGrace   = time.Second            // for a claim to end by itself when ctx has ended
	heedTime     = time.Second            // for a Send to heed the end of its ctx
	closingTime  = 5 * time.Second        // for noting the last results
)

// item is a row that this relay has claimed and not yet settled.
type item struct {
	*outbox.Claimed
	claimed time.Time // just before the claim
	until   time.Time // the lease does not end before this

	notBefore  time.Time          // when to try again to send or to settle what is held
	tries      int                // how often it was held, or failed to be settled
	cancel     context.CancelFunc // of its Send, while there is one
	settlement outbox.Settlement
	held       bool // when it was last to be settled
	maybeDone  bool // a settle failed that may have taken effect
	unclaimed  bool // handed back as the relay ends, as if it had never been claimed
}

// run is one call of Run or RunOnce.
//
// One goroutine claims, Concurrency of them send, one settles and one renews leases.
// While a batch is being sent the next is being claimed and the last one settled.
type run struct {
	*Relay

	// Each holds one signal: there is something to send, to settle, room to claim for,
	// or less under way.
	toSend, toSettle, room, progress chan struct{}

	mu        sync.Mutex
	batch     int                // rows that may wait, BatchSize or more
	live      map[*item]struct{} // all that is waiting, taken or finished
	waiting   []*item            // to be sent, in this order
	taken     int                // from waiting, and not yet finished or put back
	finished  []*item            // to be settled, in this order
	unsettled int                // finished, and what is being settled just now
	workers   int
	suspect   *item // the one waiting or being sent, see outbox.Suspects
	held      int   // of unsettled: their rows are held by callers
	closed    bool  // nothing more will be claimed
	ended     bool  // nothing more will be sent
	settled   int   // rows, since the start
}

func newRun(r *Relay) *run {
	signal := func() chan struct{} { return make(chan struct{}, 1) }
	return &run{
		Relay: r, batch: r.cfg.BatchSize, live: make(map[*item]struct{}),
		toSend: signal(), toSettle: signal(), room: signal(), progress: signal(),
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// do delivers what claim claims, until that returns and all is settled, or until
// ctx ends and what is under way has been brought to an end.
func (r *run) do(ctx context.Context, claim func(context.Context) error) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	sendCtx, cancelSends := afterwards(ctx, r.cfg.ShutdownTimeout)
	defer cancelSends()

	var others sync.WaitGroup
	others.Go(func() { r.settle(background) })
	others.Go(func() { r.renew(background) })
	r.workers = r.cfg.Concurrency
	for range r.cfg.Concurrency {
		go r.work(ctx, sendCtx)
	}

	err := claim(ctx)
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	signal(r.toSend)
	r.await(ctx, func() bool { return len(r.waiting) == 0 && r.taken == 0 })
	r.handBack()

	heed, cancel := afterwards(sendCtx, heedTime)
	defer cancel()
	r.await(heed, func() bool { return r.taken == 0 })
	closing, cancel := afterwards(ctx, closingTime)
	defer cancel()
	closing, cancel = context.WithTimeout(closing, r.cfg.Lease)
	defer cancel()
	r.await(closing, func() bool { return r.unsettled == 0 })
	stop()
	others.Wait()
	r.await(closing, func() bool { return r.workers == r.taken })

	r.mu.Lock()
	defer r.mu.Unlock()
	if r.taken > 0 {
		err = errors.Join(err, fmt.Errorf("relay: %d deliveries did not end, their outcome is unknown", r.taken))
	}
	if r.unsettled > 0 {
		err = errors.Join(err, fmt.Errorf("relay: the results of %d deliveries could not be noted", r.unsettled))
	}
	return err
}

// afterwards returns a context that ends d after ctx has ended.
func afterwards(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		_ = sleep(out, d)
		cancel()
	})
	return out, func() {
		stop()
		cancel()
	}
}

// sleep pauses for d, or returns ctx's error if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// await waits until reached, asked under the lock, is true, or ctx ends.
func (r *run) await(ctx context.Context, reached func() bool) {
	for {
		r.mu.Lock()
		yes := reached()
		r.mu.Unlock()
		if yes {
			return
		}
		select {
		case <-r.progress:
		case <-ctx.Done():
			return
		}
	}
}
