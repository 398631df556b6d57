package relay

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/seed3357934d/outbox"
)

// work sends waiting rows until none will come any more, or ctx ends.
func (r *run) work(ctx, sendCtx context.Context) {
	over := false
	defer func() {
		if !over { // the sender called runtime.Goexit
			go r.work(ctx, sendCtx)
			return
		}
		r.mu.Lock()
		r.workers--
		r.mu.Unlock()
		signal(r.toSend) // for the next one to end
		signal(r.progress)
	}()
	trouble := outage{log: r.log, doing: "renew a lease"}
	for {
		it := r.next(ctx)
		if it == nil {
			over = true
			return
		}
		if r.ready(ctx, it, &trouble) {
			r.deliver(sendCtx, it)
		}
	}
}

// next takes the first waiting row that may be tried. It returns nil when none will
// come, or ctx ends.
func (r *run) next(ctx context.Context) *item {
	for ctx.Err() == nil {
		it, wait := r.take()
		if it != nil {
			return it
		}
		r.mu.Lock()
		over := r.closed && len(r.waiting) == 0
		r.mu.Unlock()
		if over {
			return nil
		}
		waitFor(ctx, r.toSend, wait)
	}
	return nil
}

// take takes the first waiting row that may be tried. Where there is none, it says
// how long to wait for one, -1 if none waits.
func (r *run) take() (it *item, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait = -1
	for i, it := range r.waiting {
		if !it.notBefore.IsZero() {
			if d := time.Until(it.notBefore); d > 0 {
				if wait < 0 || d < wait {
					wait = d
				}
				continue
			}
		}
		if i == 0 {
			r.waiting = r.waiting[1:]
		} else {
			r.waiting = slices.Delete(r.waiting, i, i+1)
		}
		r.taken++
		if len(r.waiting) > 0 {
			signal(r.toSend) // for another worker
		}
		if len(r.waiting) <= r.batch/2 {
			signal(r.room)
		}
		return it, 0
	}
	return nil, wait
}

// waitFor waits for a signal, at most for d unless that is negative, or until ctx ends.
func waitFor(ctx context.Context, c <-chan struct{}, d time.Duration) {
	var timeout <-chan time.Time
	if d >= 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-c:
	case <-timeout:
	case <-ctx.Done():
	}
}

// ready waits for the limiter and makes sure that the lease of it holds. Where it is
// false the row has been dealt with, or waits again.
func (r *run) ready(ctx context.Context, it *item, trouble *outage) bool {
	if r.cfg.Limiter != nil {
		if err := r.cfg.Limiter.Wait(ctx); err != nil {
			r.wait(it, r.cfg.PollInterval)
			if _, ends := ctx.Deadline(); !ends && ctx.Err() == nil { // else it may end before the row's turn
				r.log.LogAttrs(ctx, slog.LevelError, "outbox: the limiter lets nothing pass", slog.String("error", err.Error()))
			}
			_ = sleep(ctx, r.cfg.PollInterval)
			return false
		}
	}
	for {
		r.mu.Lock()
		_, mine := r.live[it]
		left := leaseLeft(it)
		r.mu.Unlock()
		if !mine {
			r.untake() // the lease was lost meanwhile
			return false
		}
		if left >= min(r.cfg.SendTimeout, r.cfg.Lease/2) {
			break
		}
		// The process was frozen or the database away; else the lease had been renewed.
		held, err := r.extend(ctx, []*item{it})
		if err != nil {
			if ctx.Err() == nil {
				trouble.began(err)
			}
			if sleep(ctx, trouble.pause()) != nil {
				r.wait(it, 0)
				return false
			}
			continue
		}
		trouble.ended()
		if held {
			it.tries++
			r.wait(it, growingPause(it.tries, longestHeld))
			return false
		}
	}
	n := &it.Notification
	if !n.NotAfter.IsZero() && !it.Expired && time.Since(it.claimed) >= n.NotAfter.Sub(n.LockedAt) {
		// It is for the next claim to fail it, as an add may have moved NotAfter meanwhile.
		r.finish(it, handedBack(it))
		return false
	}
	return true
}

// wait puts it back behind those that wait to be sent, for d.
func (r *run) wait(it *item, d time.Duration) {
	r.mu.Lock()
	_, mine := r.live[it]
	ended := r.ended
	if mine && !ended {
		it.notBefore = time.Now().Add(d)
		r.waiting = append(r.waiting, it)
	}
	r.mu.Unlock()
	if mine && ended {
		it.unclaimed = true
		r.finish(it, handedBack(it))
		return
	}
	r.untake()
	signal(r.toSend)
}

// untake says that a row that was taken has been put back or lost.
func (r *run) untake() {
	r.mu.Lock()
	r.taken--
	r.mu.Unlock()
	signal(r.progress)
}

// growingPause is how long to leave a row alone the n-th time: 10 ms, doubled up to
// most.
func growingPause(n int, most time.Duration) time.Duration {
	return min(5*time.Millisecond<<min(n, 20), most)
}

// deliver sends one message. Whatever the sender does, it ends with a settlement.
func (r *run) deliver(ctx context.Context, it *item) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.SendTimeout)
	r.mu.Lock()
	_, mine := r.live[it]
	it.cancel = cancel
	r.mu.Unlock()
	if !mine { // lost in this moment
		cancel()
		r.untake()
		return
	}
	var st outbox.Settlement
	returned := false
	defer func() {
		if !returned { // the sender called runtime.Goexit
			st = r.judge(ctx, it, inspect(errGoexit))
		}
		cancel()
		r.finish(it, st)
	}()
	st = r.attempt(ctx, it)
	returned = true
}

// handBack gives back what still waits, and has all that is put back given back, too.
func (r *run) handBack() {
	r.mu.Lock()
	r.ended = true
	waiting := r.waiting
	r.waiting = nil
	r.taken += len(waiting)
	r.mu.Unlock()
	for _, it := range waiting {
		it.unclaimed = true
		r.finish(it, handedBack(it))
	}
}

func handedBack(it *item) outbox.Settlement {
	return outbox.Settlement{Verdict: outbox.HandedBack, Unknown: it.UnknownVersion > 0}
}

// finish has it, which was taken, settled.
func (r *run) finish(it *item, st outbox.Settlement) {
	st.Lease = it.Lease
	r.mu.Lock()
	it.settlement, it.tries, it.notBefore = st, 0, time.Time{}
	r.acquitted(it)
	r.finished = append(r.finished, it)
	r.unsettled++
	r.taken--
	r.mu.Unlock()
	signal(r.toSettle)
	signal(r.progress)
}
