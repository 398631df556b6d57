package relay

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/seed3357934d/outbox"
)

// claimOn claims until ctx ends.
func (r *run) claimOn(ctx context.Context) error {
	var (
		trouble   = outage{log: r.log, doing: "claim"}
		token     = outbox.NewToken()
		repeating bool    // a claim with this token had no answer
		given     []int64 // rows that the token was good for while it is repeated: none is to get it twice
		pause     = firstPause
		ever      bool
		horizon   horizon
		patience  = turnPatience // how long to wait for a turn
		busySince time.Time      // another is claiming; zero: none was
		took      time.Duration  // by the last full claim
		full      time.Time      // when that was answered; zero: taken into account, or there was none since
	)
	for ctx.Err() == nil {
		limit := r.capacity()
		if limit == 0 {
			select {
			case <-r.room:
			case <-ctx.Done():
			}
			continue
		}
		// A repeated claim is to find all that there is of its token.
		inTurn := !repeating && (busySince.IsZero() || time.Since(busySince) < patience)
		began := time.Now()
		if !full.IsZero() {
			limit += r.adapt(began.Sub(full))
			full = time.Time{}
		}
		var since time.Time
		if !repeating {
			since = horizon.since()
		}
		res, err := r.claim(ctx, outbox.ClaimOptions{Token: token, Repeated: repeating, Limit: limit, InTurn: inTurn, Since: since, Except: given})
		switch {
		case errors.Is(err, errBusy):
			trouble.ended()
			if busySince.IsZero() {
				busySince = began
			}
			_ = sleep(ctx, jitter(min(max(took, firstPause), longestTurn)))
			continue
		case err != nil && ctx.Err() != nil:
			continue // which ends the loop
		case errors.Is(err, outbox.ErrInvalid), errors.Is(err, outbox.ErrSetup) && !ever:
			return err
		case err != nil:
			// Its rows may have been claimed all the same: the next claim has the same token.
			repeating = true
			trouble.began(err)
			_ = sleep(ctx, trouble.pause())
			if errors.Is(err, context.DeadlineExceeded) {
				r.awaitAnswer(ctx, &trouble)
				// The database answers, but not to this. What the claim leased after all comes
				// back at the end of its lease.
				if since.IsZero() && horizon.timedOut(r.callTimeout()) {
					token, repeating, given = outbox.NewToken(), false, nil
				}
			}
			continue
		}
		trouble.ended()
		ever = true
		horizon.claimed(since, time.Since(began), len(res.ids), len(res.ids) >= limit, res.last)
		if inTurn {
			patience = turnPatience
		} else if !busySince.IsZero() {
			patience = 0 // who is claiming may be stuck
		}
		busySince = time.Time{}
		if repeating && len(res.ids) >= limit && len(given) < mostRepeats*limit { // more of its rows may be left
			given = append(given, res.ids...)
		} else {
			token, repeating, given = outbox.NewToken(), false, nil
		}
		switch {
		case len(res.ids) >= limit:
			full = time.Now()
			pause, took = 0, full.Sub(began)
			continue
		case res.suspect: // others may have stood behind more of them
			pause = 0
			continue
		}
		r.startSmall()
		switch {
		case len(res.ids) > 0:
			pause = min(firstPause, r.cfg.PollInterval)
		default:
			pause = min(max(pause+pause/2, firstPause), r.cfg.PollInterval)
		}
		timer := time.NewTimer(jitter(pause))
		select {
		case <-r.wake:
			pause = 0
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil
}

// adapt fits the size of the batches, where that is left to the relay, to how long half of
// one took to be taken for sending, and returns how many rows more may be claimed now.
func (r *run) adapt(drained time.Duration) (more int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.batch
	switch {
	case !r.adaptive:
	case drained < quickDrain:
		r.batch = min(2*r.batch, largestBatch)
	case drained > slowDrain:
		r.batch = max(r.batch/2, r.cfg.BatchSize)
	}
	return max(r.batch-before, 0)
}

// startSmall ends what adapt has done, as the backlog has ended: the next may be of slower messages.
func (r *run) startSmall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.batch = r.cfg.BatchSize
}

// errBusy: another relay was claiming.
var errBusy = errors.New("another is claiming")

// jitter is d less up to a fifth, so that relays do not march in step.
func jitter(d time.Duration) time.Duration { return d - rand.N(d/5+1) }

// suspects is what a claim takes of them: one is sent at a time.
func (r *run) suspects() outbox.Suspects {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.cfg.MaxAttempts <= 1: // none is the last, or none is left
		return outbox.TakeSuspects
	case r.suspect != nil:
		return outbox.LeaveSuspects
	default:
		return outbox.OneSuspect
	}
}

// awaitAnswer asks the database until it answers. A claim that had no answer in time may
// be with a frozen server still. More of them would be carried out side by side when that
// goes on, and of the rows that they lease the repeat would return one claim's worth: the
// others would be leased to nobody.
func (r *run) awaitAnswer(ctx context.Context, trouble *outage) {
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(ctx, r.callTimeout())
		_, err := r.queue.Extend(call, []outbox.Lease{{}}, r.cfg.Lease) // of no row
		cancel()
		if err == nil {
			_ = sleep(ctx, 100*time.Millisecond) // for the claim to end
			return
		}
		trouble.began(err)
		_ = sleep(ctx, trouble.pause())
	}
}

// capacity is how many rows to claim now: 0 until half of what may wait has been
// taken to be sent, so that claims are of a fair size.
func (r *run) capacity() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	batch := r.batch
	free := batch - len(r.waiting)
	// Results are not to pile up in an outage; more of those may that wait for callers.
	bound := 2*batch + r.cfg.Concurrency
	if free < (batch+1)/2 || r.unsettled-r.held >= bound || r.held >= 10*bound {
		return 0
	}
	return free
}

// mostRepeats is how many full claims a token is good for, after the one that had no answer.
// Its rows had fallen due before all others, and are among the first found.
const mostRepeats = 10

// claimed is what a claim found.
type claimed struct {
	ids     []int64   // those that it failed included
	suspect bool      // one of them is
	last    time.Time // when the last of them fell due
}

// claim claims by opts, which it completes. In turn with others it may return errBusy.
func (r *run) claim(ctx context.Context, opts outbox.ClaimOptions) (c claimed, err error) {
	// When ctx ends, the answer should still be heard: nobody else knows these rows are free.
	grace, cancel := afterwards(ctx, claimGrace)
	defer cancel()
	grace, cancel = context.WithTimeout(grace, r.callTimeout())
	defer cancel()
	began := time.Now()
	opts.Lease, opts.Types, opts.MaxAttempts = r.cfg.Lease, r.cfg.Types, max(r.cfg.MaxAttempts, 0)
	opts.AtMostOnce, opts.Reconcile = r.cfg.Delivery == AtMostOnce, r.reconcile != nil
	opts.Except, opts.Suspects = append(r.ids(), opts.Except...), r.suspects()
	if opts.Repeated && opts.Suspects == outbox.OneSuspect {
		opts.Suspects = outbox.LeaveSuspects // those that are left count, and the claim would seem to have found less
	}
	res, err := r.queue.Claim(grace, opts)
	if err == nil && res.Busy {
		err = errBusy
	}
	if err != nil {
		return c, err
	}
	c.last = res.Last
	for _, n := range res.Failed {
		c.ids = append(c.ids, n.ID)
		r.logFailed(n, n.LastError)
	}
	items := make([]item, len(res.Claimed))
	r.mu.Lock()
	for i := range items {
		it := &items[i]
		*it = item{Claimed: &res.Claimed[i], claimed: began, until: began.Add(r.cfg.Lease)}
		r.live[it] = struct{}{}
		c.ids = append(c.ids, it.ID)
		if it.Suspect && r.cfg.MaxAttempts > 1 {
			r.suspect, c.suspect = it, true
			r.waiting = slices.Insert(r.waiting, 0, it) // nobody's death but its own is to fail it
			continue
		}
		r.waiting = append(r.waiting, it)
	}
	r.settled += len(res.Failed)
	r.mu.Unlock()
	signal(r.toSend)
	return c, nil
}

// acquitted is called under the lock when the Send of it is over, or it will not be
// sent: the next suspect may be.
func (r *run) acquitted(it *item) {
	if it == r.suspect {
		r.suspect = nil
		r.Wake()
	}
}

// forget is called under the lock when it is no longer this relay's. Its callers say
// so by fewer.
func (r *run) forget(it *item) {
	delete(r.live, it)
	r.acquitted(it)
	if it.held {
		r.held--
	}
}

// fewer tells those who wait for it that this relay has fewer rows.
func (r *run) fewer() {
	signal(r.room)
	signal(r.progress)
}

// ids returns the rows of this relay. Their leases may have ended by the time that
// the database gets to a claim, however well they are renewed now: a server that was
// frozen does first of all what it was last asked, also if nobody waits for the
// answer. The rows are not to be sent again by the one that knows their result.
func (r *run) ids() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make([]int64, 0, len(r.live))
	for it := range r.live {
		ids = append(ids, it.ID)
	}
	return ids
}

// callTimeout bounds each call of the queue, so that a dead connection does not
// cost the leases.
func (r *run) callTimeout() time.Duration { return r.cfg.Lease / 3 }

// outage reports the begin and the end of a trouble, and once a minute in between.
// It belongs to one goroutine.
type outage struct {
	log      *slog.Logger
	doing    string
	failures int
	since    time.Time
	logged   time.Time
}

func (o *outage) began(err error) {
	now := time.Now()
	if o.failures++; o.failures == 1 {
		o.since = now
	}
	if o.failures == 1 || now.Sub(o.logged) >= time.Minute {
		o.logged = now
		o.log.LogAttrs(context.Background(), slog.LevelWarn, "outbox: the relay cannot "+o.doing+" and tries again",
			slog.String("error", err.Error()), slog.Int("failures", o.failures), slog.Duration("for", now.Sub(o.since)))
	}
}

func (o *outage) ended() {
	if o.failures > 0 {
		o.log.LogAttrs(context.Background(), slog.LevelInfo, "outbox: the relay can "+o.doing+" again",
			slog.Int("failures", o.failures), slog.Duration("after", time.Since(o.since)))
		o.failures = 0
	}
}

// pause is 50 ms after the first failure, doubled up to 5 s, half of it random.
func (o *outage) pause() time.Duration {
	d := min(50*time.Millisecond<<min(max(o.failures-1, 0), 10), longestPause)
	return d/2 + rand.N(d/2)
}
