package outboxtest

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// Delivery is what [Deliver] did. The notifications are as they were claimed, with the
// Status, Receipt and LastError that they have now.
type Delivery struct {
	Sent    []outbox.Notification // accepted
	Failed  []outbox.Notification // for good: refused, expired, out of attempts
	Retried []outbox.Notification // for now: due again for the next Deliver
}

// Deliver delivers all that is due, through a relay in the default configuration, one
// message at a time, the oldest first, and returns when nothing is left.
//
// Each message is tried once: one that fails for now is due again when Deliver returns,
// without a backoff, so that each call is one attempt; the tenth is the last. Only
// [relay.RetryAfter] puts it off, for as long as it says. Content that is added while
// its message is being sent is delivered as well, or, if that failed, by the next Deliver.
// What is due later stays, by the database's clock. A Send has 10 seconds.
//
// Rows that an open transaction has added or holds locked are passed over: commit or roll
// back first.
//
// Other configurations, such as AtMostOnce, are had with [relay.New] and
// [relay.Relay.RunOnce]; another relay on the same database takes part of the work.
func Deliver(t testing.TB, store relay.Queue, sender relay.Sender) Delivery {
	needT(t)
	t.Helper()
	switch {
	case isNil(store):
		t.Fatalf("outboxtest: Deliver: store is nil")
	case noSender(sender):
		t.Fatalf("outboxtest: Deliver: sender is nil")
	}
	q := &round{Queue: store, claimed: make(map[outbox.Lease]outbox.Notification)}
	r, err := relay.New(q, sender, relay.Config{
		Concurrency: 1, SendTimeout: 10 * time.Second, Backoff: func(int) time.Duration { return 0 }, Logger: logger(t),
		// Until the end of the round leases keep what is to be tried again from being claimed.
		Lease: time.Hour,
	})
	if err != nil {
		t.Fatalf("outboxtest: %v", err)
	}
	ctx := context.WithoutCancel(t.Context())
	for n := 1; n > 0; {
		if n, err = r.RunOnce(ctx); err != nil {
			t.Fatalf("outboxtest: deliver: %v", err)
		}
	}
	if err := q.end(ctx); err != nil {
		t.Fatalf("outboxtest: deliver: %v", err)
	}
	return q.did
}

// isNil reports whether v is nil, or holds a pointer that is.
func isNil(v any) bool {
	r := reflect.ValueOf(v)
	return v == nil || r.Kind() == reflect.Pointer && r.IsNil()
}

// noSender reports whether s is nil, or one of ours that is. Another type may do with nil.
func noSender(s relay.Sender) bool {
	switch s := s.(type) {
	case nil:
		return true
	case *Sender:
		return s == nil
	case relay.SenderFunc:
		return s == nil
	}
	return false
}

// round is a queue that settles what is to be tried again at its end.
type round struct {
	relay.Queue
	mu      sync.Mutex
	claimed map[outbox.Lease]outbox.Notification
	later   []outbox.Settlement
	did     Delivery
}

func (q *round) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	res, err := q.Queue.Claim(ctx, opts)
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range res.Claimed {
		q.claimed[c.Lease] = c.Notification
	}
	q.did.Failed = append(q.did.Failed, res.Failed...)
	return res, err
}

func (q *round) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	results := make([]outbox.LeaseResult, len(settlements))
	var now []outbox.Settlement
	var at []int
	for i, st := range settlements {
		if st.Verdict != outbox.Retry {
			now, at = append(now, st), append(at, i)
		}
	}
	settled, err := q.Queue.Settle(ctx, now)
	if err != nil {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, res := range settled {
		results[at[i]] = res
		q.note(now[i], res)
	}
	for i, st := range settlements {
		if st.Verdict == outbox.Retry {
			results[i] = outbox.LeaseDone
			q.later = append(q.later, st)
		}
	}
	return results, nil
}

// note takes down, under the lock, what has become of a lease.
func (q *round) note(st outbox.Settlement, res outbox.LeaseResult) {
	n := q.claimed[st.Lease]
	if res == outbox.LeaseHeld || res == outbox.LeaseStale {
		return
	}
	into := &q.did.Retried
	switch st.Verdict {
	case outbox.Delivered:
		n.Status, n.Receipt = outbox.StatusSent, st.Receipt
		into = &q.did.Sent
	case outbox.Failed:
		n.Status, n.LastError = outbox.StatusFailed, st.Error
		into = &q.did.Failed
	case outbox.Retry:
		n.LastError = st.Error
	default: // handed back
		return
	}
	if res == outbox.LeaseSuperseded {
		n.Status = outbox.StatusPending
	}
	*into = append(*into, n)
}

// end settles what is to be tried again. A row that a caller holds is waited for.
func (q *round) end(ctx context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for deadline := time.Now().Add(patience); len(q.later) > 0; {
		results, err := q.Queue.Settle(ctx, q.later)
		if err != nil {
			return err
		}
		var held []outbox.Settlement
		for i, res := range results {
			if res == outbox.LeaseHeld {
				held = append(held, q.later[i])
				continue
			}
			q.note(q.later[i], res)
		}
		if q.later = held; len(held) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d rows were held by open transactions for %v", len(held), patience)
		}
		<-time.After(10 * time.Millisecond)
	}
	return nil
}
