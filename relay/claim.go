package relay

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/seed3357934d/outbox"
)

// claimOn claims until ctx ends.
func (r *run) claimOn(ctx context.Context) error {
	var (
		trouble  = outage{log: r.log, doing: "claim"}
		normal   = newRequest(r.othersThanSuspects())
		suspects = newRequest(outbox.OnlySuspects)
		pause    = firstPause
		ever     bool
	)
	for ctx.Err() == nil {
		req := normal
		if r.suspectDue() {
			req = suspects
			req.limit = 1
		} else if req.limit == 0 {
			if req.limit = r.capacity(); req.limit == 0 {
				select {
				case <-r.room:
				case <-ctx.Done():
				}
				continue
			}
		}
		found, err := r.claim(ctx, req)
		switch {
		case err != nil && ctx.Err() != nil:
			continue // which ends the loop
		case errors.Is(err, outbox.ErrInvalid), errors.Is(err, outbox.ErrSetup) && !ever:
			return err
		case err != nil:
			// Its rows may have been claimed all the same: the request is repeated as it was.
			trouble.began(err)
			_ = sleep(ctx, trouble.pause())
			if errors.Is(err, context.DeadlineExceeded) {
				r.awaitAnswer(ctx, &trouble)
			}
			continue
		}
		trouble.ended()
		ever = true
		limit := req.limit
		req.renew()
		if req == suspects {
			continue
		}
		switch {
		case found >= limit:
			pause = 0
			continue
		case found > 0:
			pause = min(firstPause, r.cfg.PollInterval)
		default:
			pause = min(max(pause+pause/2, firstPause), r.cfg.PollInterval)
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

// request is a claim, to be repeated with the same token and limit until it is
// answered.
type request struct {
	token    outbox.Token
	limit    int // 0: to be decided
	suspects outbox.Suspects
}

func newRequest(suspects outbox.Suspects) *request {
	return &request{token: outbox.NewToken(), suspects: suspects}
}

// renew makes it another request.
func (q *request) renew() { q.token, q.limit = outbox.NewToken(), 0 }

// othersThanSuspects is what the claims of whole batches are for. With one attempt
// there is none left for a suspect, and where they are unlimited none is the last.
func (r *run) othersThanSuspects() outbox.Suspects {
	if r.cfg.MaxAttempts > 1 {
		return outbox.LeaveSuspects
	}
	return outbox.TakeSuspects
}

// suspectDue reports whether it is time to look for a suspect: one is sent at a time,
// the next as soon as it has been settled.
func (r *run) suspectDue() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.cfg.MaxAttempts <= 1 || r.suspect != nil || now.Before(r.nextSuspect) {
		return false
	}
	r.nextSuspect = now.Add(r.cfg.PollInterval)
	return true
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
	// Results are not to pile up in an outage, nor behind callers that hold their rows.
	if free < (batch+1)/2 || r.unsettled >= 2*batch {
		return 0
	}
	return free
}

// claim claims what req says and returns how many rows it found, those that it failed
// included.
func (r *run) claim(ctx context.Context, req *request) (int, error) {
	// When ctx ends, the answer should still be heard: nobody else knows these rows are free.
	grace, cancel := afterwards(ctx, claimGrace)
	defer cancel()
	grace, cancel = context.WithTimeout(grace, r.callTimeout())
	defer cancel()
	began := time.Now()
	res, err := r.queue.Claim(grace, outbox.ClaimOptions{
		Limit: req.limit, Lease: r.cfg.Lease, Token: req.token, Types: r.cfg.Types, MaxAttempts: max(r.cfg.MaxAttempts, 0),
		AtMostOnce: r.cfg.Delivery == AtMostOnce, Reconcile: r.reconcile != nil, Except: r.ids(), Suspects: req.suspects,
	})
	if err != nil {
		return 0, err
	}
	for _, n := range res.Failed {
		r.logFailed(n, n.LastError)
	}
	items := make([]item, len(res.Claimed))
	r.mu.Lock()
	for i := range items {
		it := &items[i]
		*it = item{Claimed: &res.Claimed[i], claimed: began, until: began.Add(r.cfg.Lease)}
		r.live[it] = struct{}{}
		r.waiting = append(r.waiting, it)
		if req.suspects == outbox.OnlySuspects {
			r.suspect = it
		}
	}
	r.settled += len(res.Failed)
	r.mu.Unlock()
	signal(r.toSend)
	return len(res.Claimed) + len(res.Failed), nil
}

// forget is called under the lock when it is no longer this relay's. Its callers say
// so by fewer.
func (r *run) forget(it *item) {
	delete(r.live, it)
	if it == r.suspect {
		r.suspect, r.nextSuspect = nil, time.Time{}
		r.Wake()
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
