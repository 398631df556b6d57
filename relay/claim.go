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
		trouble = outage{log: r.log, doing: "claim"}
		token   = outbox.NewToken()
		pause   = firstPause
		ever    bool
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
		found, err := r.claim(ctx, token, limit)
		switch {
		case err != nil && ctx.Err() != nil:
			continue // which ends the loop
		case errors.Is(err, outbox.ErrInvalid), errors.Is(err, outbox.ErrSetup) && !ever:
			return err
		case err != nil:
			// Its rows may have been claimed all the same: the next claim has the same token.
			trouble.began(err)
			_ = sleep(ctx, trouble.pause())
			if errors.Is(err, context.DeadlineExceeded) {
				r.awaitAnswer(ctx, &trouble)
			}
			continue
		}
		trouble.ended()
		ever = true
		token = outbox.NewToken()
		switch {
		case found >= limit:
			pause = 0
		case found > 0:
			pause = min(firstPause, r.cfg.PollInterval)
		default:
			pause = min(max(pause+pause/2, firstPause), r.cfg.PollInterval)
		}
		if pause == 0 {
			continue
		}
		timer := time.NewTimer(pause - rand.N(pause/5+1)) // so that relays do not march in step
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
	batch := r.cfg.BatchSize
	free := batch - len(r.waiting)
	// What cannot be settled yet is not to pile up behind callers that hold its rows.
	if r.failing || free < (batch+1)/2 || len(r.live) >= 4*batch+r.cfg.Concurrency {
		return 0
	}
	return free
}

// claim claims up to limit rows and returns how many it found, those that it failed
// included.
func (r *run) claim(ctx context.Context, token outbox.Token, limit int) (int, error) {
	// When ctx ends, the answer should still be heard: nobody else knows these rows are free.
	grace, cancel := afterwards(ctx, claimGrace)
	defer cancel()
	grace, cancel = context.WithTimeout(grace, r.callTimeout())
	defer cancel()
	began := time.Now()
	res, err := r.queue.Claim(grace, outbox.ClaimOptions{
		Limit: limit, Lease: r.cfg.Lease, Token: token, Types: r.cfg.Types, MaxAttempts: max(r.cfg.MaxAttempts, 0),
		AtMostOnce: r.cfg.Delivery == AtMostOnce, Reconcile: r.reconcile != nil, Except: r.except(),
	})
	if err != nil {
		return 0, err
	}
	for _, n := range res.Failed {
		r.logFailed(n, n.LastError)
	}
	items := make([]item, len(res.Claimed))
	var siblings []*item
	r.mu.Lock()
	for i := range items {
		it := &items[i]
		*it = item{Claimed: &res.Claimed[i], claimed: began, until: began.Add(r.cfg.Lease)}
		r.live[it] = struct{}{}
		switch {
		case !r.suspected(it):
		case r.suspect == nil:
			r.suspect = it
		default:
			siblings = append(siblings, it)
			r.apart = append(r.apart, it.ID)
			continue
		}
		r.waiting = append(r.waiting, it)
	}
	r.settled += len(res.Failed)
	r.taken += len(siblings)
	r.mu.Unlock()
	for _, it := range siblings {
		r.finish(it, outbox.Settlement{Verdict: outbox.HandedBack, Unknown: true})
	}
	signal(r.toSend)
	return len(res.Claimed) + len(res.Failed), nil
}

// suspected reports whether it is on its last attempt and the one before left no
// result. It may be a message that kills its process; more likely it waited in the same batch
// as one, which cost it attempts all the same. So that it is not failed for that, such
// rows are delivered one after the other, each while the others have been handed back.
func (r *run) suspected(it *item) bool {
	return it.UnknownVersion > 0 && r.cfg.MaxAttempts > 0 && it.Notification.Attempts >= r.cfg.MaxAttempts
}

// alone reports whether it is not suspected, or no other row at hand is.
func (r *run) alone(it *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if it != r.suspect {
		return true
	}
	for other := range r.live {
		if other != it && r.suspected(other) {
			return false
		}
	}
	return true
}

// forget is called under the lock when it is no longer this relay's.
func (r *run) forget(it *item) {
	delete(r.live, it)
	if it == r.suspect {
		r.suspect, r.apart = nil, nil
		r.Wake()
	}
}

// except returns the rows of this relay. Their leases may have ended by the time that the
// database gets to a claim, however well they are renewed now: a server that was frozen
// does first of all what it was last asked, also if nobody waits for the answer. The rows
// are not to be sent again by the one that knows their result. Nor are those to be
// claimed that wait for a suspect's end.
func (r *run) except() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := slices.Clone(r.apart)
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
	d := min(50*time.Millisecond<<min(max(o.failures-1, 0), 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}
