package relay

import (
	"context"
	"log/slog"
	"time"

	"github.com/seed3357934d/outbox"
)

// settle settles what is finished, as much at a time as has come together, until ctx
// ends.
func (r *run) settle(ctx context.Context) {
	trouble := outage{log: r.log, doing: "settle"}
	limit := maxSettle
	for ctx.Err() == nil {
		batch, wait := r.takeFinished(limit)
		if len(batch) == 0 {
			waitFor(ctx, r.toSettle, wait)
			if r.busy() {
				_ = sleep(ctx, gatherTime)
			}
			continue
		}
		settlements := make([]outbox.Settlement, len(batch))
		for i, it := range batch {
			settlements[i] = it.settlement
		}
		call, cancel := context.WithTimeout(ctx, r.callTimeout())
		results, err := r.queue.Settle(call, settlements)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			// If one row is to blame, halves leave the others free of it.
			limit = max(1, len(batch)/2)
			r.settleAgain(batch)
			trouble.began(err)
			if len(batch) > 1 {
				_ = sleep(ctx, trouble.pause())
			} else {
				r.logUnsettled(batch[0], err)
				_ = sleep(ctx, longestPause/100) // its own pause grows
			}
			continue
		}
		trouble.ended()
		limit = min(2*limit, maxSettle)
		r.noteSettled(batch, results)
	}
}

// busy reports whether more is being sent.
func (r *run) busy() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.waiting)+r.taken > 0
}

// takeFinished takes up to limit rows that are to be settled now; where there are
// none, it says how long to wait for the first, -1 if there is none at all.
func (r *run) takeFinished(limit int) (batch []*item, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait = -1
	rest := r.finished[:0]
	for _, it := range r.finished {
		d := time.Duration(0)
		if !it.notBefore.IsZero() {
			d = time.Until(it.notBefore)
		}
		switch {
		case d <= 0 && len(batch) < limit:
			batch = append(batch, it)
			continue
		case wait < 0 || d < wait:
			wait = max(d, 0)
		}
		rest = append(rest, it)
	}
	clear(r.finished[len(rest):])
	r.finished = rest
	return batch, wait
}

// settleAgain puts back what a failed call may or may not have settled.
func (r *run) settleAgain(batch []*item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, it := range batch {
		it.maybeDone = true
	}
	if len(batch) > 1 {
		r.finished = append(batch, r.finished...)
		return
	}
	batch[0].tries++
	batch[0].notBefore = time.Now().Add(growingPause(batch[0].tries, longestPause))
	r.finished = append(r.finished, batch[0])
}

// logUnsettled tells which row it is that alone cannot be settled.
func (r *run) logUnsettled(it *item, err error) {
	if it.tries == 3 {
		r.log.LogAttrs(context.Background(), slog.LevelError, "outbox: the result of a delivery cannot be noted, to be tried again",
			append(attrs(it.Notification), slog.String("verdict", string(it.settlement.Verdict)), slog.String("error", err.Error()))...)
	}
}

// noteSettled takes note of what became of a batch.
func (r *run) noteSettled(batch []*item, results []outbox.LeaseResult) {
	wake := false
	r.mu.Lock()
	for i, it := range batch {
		if results[i] == outbox.LeaseHeld {
			if !it.held {
				it.held = true
				r.held++
			}
			it.tries++
			it.notBefore = time.Now().Add(growingPause(it.tries, longestHeld))
			r.finished = append(r.finished, it)
			continue
		}
		r.forget(it)
		r.unsettled--
		if results[i] != outbox.LeaseStale && !it.unclaimed {
			r.settled++
		}
		// Something is due at once: newer content, or content that the provider turned out not to have.
		wake = wake || results[i] == outbox.LeaseSuperseded || it.settlement.Verdict == outbox.HandedBack && !it.unclaimed
	}
	r.mu.Unlock()
	r.fewer()
	for i, it := range batch {
		r.logSettled(it, results[i])
	}
	if wake {
		r.Wake()
	}
}
