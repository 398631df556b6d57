package relay

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/seed3357934d/outbox"
)

// renew keeps the leases of all that is not settled, until ctx ends.
func (r *run) renew(ctx context.Context) {
	trouble := outage{log: r.log, doing: "renew leases"}
	for sleep(ctx, r.cfg.Lease/6) == nil {
		tried := make(map[*item]bool) // what is held is not tried twice in a row
		for {
			var soon []*item
			r.mu.Lock()
			for it := range r.live {
				// What may have been settled is not to be leased again.
				if leaseLeft(it) < r.cfg.Lease*2/3 && !tried[it] && (!it.maybeDone || !it.settlement.Unknown) && len(soon) < maxSettle {
					soon = append(soon, it)
					tried[it] = true
				}
			}
			r.mu.Unlock()
			if len(soon) == 0 {
				break
			}
			if _, err := r.extend(ctx, soon); err != nil {
				if ctx.Err() == nil {
					trouble.began(err)
				}
				break // again after a pause
			}
			trouble.ended()
		}
	}
}

// extend renews leases. held: some rows are locked by callers and were not. What
// turns out to be another's is given up.
func (r *run) extend(ctx context.Context, items []*item) (held bool, err error) {
	leases := make([]outbox.Lease, len(items))
	for i, it := range items {
		leases[i] = it.Lease
	}
	call, cancel := context.WithTimeout(ctx, r.callTimeout())
	defer cancel()
	began := time.Now()
	results, err := r.queue.Extend(call, leases, r.cfg.Lease)
	if err != nil {
		return false, err
	}
	var dropped []*item
	r.mu.Lock()
	for i, it := range items {
		switch results[i] {
		case outbox.LeaseDone:
			it.until = began.Add(r.cfg.Lease)
		case outbox.LeaseHeld:
			held = true
		case outbox.LeaseStale:
			if r.lose(it) {
				dropped = append(dropped, it)
			}
		}
	}
	r.mu.Unlock()
	r.fewer()
	for _, it := range dropped {
		r.log.LogAttrs(ctx, slog.LevelWarn, "outbox: a lease was lost before its message was sent", attrs(it.Notification)...)
	}
	return held, nil
}

// lose gives up, under the lock, a row that another has claimed: what waits is
// dropped, which it reports, and a Send under way is told to end. What is finished is
// left for its settlement to show.
func (r *run) lose(it *item) (dropped bool) {
	if _, mine := r.live[it]; !mine {
		return false // two calls have found it out
	}
	if it.cancel != nil || it.settlement.Verdict != "" {
		if it.cancel != nil {
			it.cancel()
		}
		it.until = time.Now().Add(r.cfg.Lease) // not to be asked about again soon
		return false
	}
	r.forget(it)
	if i := slices.Index(r.waiting, it); i >= 0 {
		r.waiting = slices.Delete(r.waiting, i, i+1)
	}
	return true
}

// leaseLeft is how long the lease of it holds at least. The monotonic clock stands
// still while a machine is suspended, and the wall clock may jump: the worse of the
// two only costs a renewal.
func leaseLeft(it *item) time.Duration {
	now := time.Now()
	return min(it.until.Sub(now), it.until.Round(0).Sub(now.Round(0)))
}
