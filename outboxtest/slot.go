package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// slot holds a relay, and another one when that has died.
type slot struct {
	*torture
	number int

	mu     sync.Mutex
	life   *life
	moment ledger.Moment // at which the fault strikes; "": none is armed
	until  time.Time     // the fault is given up
}

// life is one relay, from its start to its death.
type life struct {
	worker *ledger.Worker
	cancel context.CancelFunc

	mu     sync.Mutex
	thawed chan struct{} // closed when it is not frozen
}

// live runs relays until ctx ends.
func (s *slot) live(ctx context.Context) {
	var lives sync.WaitGroup
	defer lives.Wait()
	batch := 20
	if s.Delivery == relay.AtMostOnce { // a death fails all that was claimed
		batch = 6
	}
	for n := 1; ctx.Err() == nil; n++ {
		l := &life{thawed: make(chan struct{})}
		close(l.thawed)
		l.worker = &ledger.Worker{Name: fmt.Sprintf("relay %d, life %d", s.number+1, n), Journal: s.journal, Split: true,
			Hook: func(ctx context.Context, m ledger.Moment) error { return s.hook(ctx, l, m) }}
		var runCtx context.Context
		runCtx, l.cancel = context.WithCancel(ctx)
		s.mu.Lock()
		s.life = l
		s.mu.Unlock()
		q := &gatedQueue{slot: s, life: l, queue: l.worker.Queue(s.store)}
		r, err := relay.New(q, l.worker.Sender(s.sends.of(s.sender)), relay.Config{
			Concurrency: 4, BatchSize: batch, PollInterval: 50 * time.Millisecond, Lease: s.lease, SendTimeout: s.SendTimeout,
			ShutdownTimeout: time.Millisecond, MaxAttempts: maxAttempts, Backoff: func(int) time.Duration { return 20 * time.Millisecond },
			Delivery: s.Delivery, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			panic(err) // the configuration above is known to be right
		}
		ended := make(chan struct{})
		lives.Go(func() {
			defer close(ended)
			_ = r.Run(runCtx) // what it leaves behind is the next one's
		})
		select { // a dead one takes its time to end
		case <-runCtx.Done():
		case <-ended:
		}
		l.cancel()
	}
}

// arm has a fault strike the relay at the next such moment: one in four freezes it, the
// others kill it.
func (s *slot) arm(m ledger.Moment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.moment == "" || time.Now().After(s.until) {
		patience := s.lease / 5
		if rare(m) {
			patience = s.lease
		}
		s.moment, s.until = m, time.Now().Add(patience)
	}
}

// rare reports whether the moment has to be waited for: leases are renewed when they are a
// third over.
func rare(m ledger.Moment) bool { return m == ledger.MidRenew || m == ledger.AfterRenew }

func (s *slot) disarm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moment = ""
}

func (s *slot) armed() ledger.Moment {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().After(s.until) {
		return ""
	}
	return s.moment
}

// hook is called at each moment of a life.
func (s *slot) hook(ctx context.Context, l *life, m ledger.Moment) error {
	if err := l.await(ctx); err != nil {
		return err
	}
	// Moments that are rare are given an occasion. Results come together while others are
	// being settled.
	switch armed := s.armed(); {
	case m == ledger.BeforeSend && rare(armed):
		_ = pause(ctx, s.lease/4)
	case m == ledger.BeforeSettle && armed == ledger.MidSettle:
		_ = pause(ctx, 20*time.Millisecond)
	}
	s.mu.Lock()
	if s.moment != m || s.life != l || time.Now().After(s.until) {
		s.mu.Unlock()
		return nil
	}
	s.moment = ""
	s.torture.mu.Lock()
	s.struck++
	freeze := s.struck%4 == 3
	s.torture.mu.Unlock()
	now := time.Now()
	if !freeze {
		l.worker.Die()
		died := time.Now()
		s.mu.Unlock()
		s.fault(ledger.Fault{Kind: "died " + string(m), Worker: l.worker.Name, From: now, To: died})
		l.cancel()
		return ledger.ErrDead
	}
	s.mu.Unlock()
	d := s.lease + s.lease/2
	s.fault(ledger.Fault{Kind: "froze " + string(m), Worker: l.worker.Name, From: now, To: now.Add(d)})
	l.freeze(d)
	return l.await(ctx)
}

// freeze has the relay stand still for d.
func (l *life) freeze(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	thawed := make(chan struct{})
	l.thawed = thawed
	time.AfterFunc(d, func() { close(thawed) })
}

// await waits while the relay is frozen. What had a time limit finds it passed. Where it is
// not frozen, the end of ctx is nothing to the relay here.
func (l *life) await(ctx context.Context) error {
	l.mu.Lock()
	thawed := l.thawed
	l.mu.Unlock()
	select {
	case <-thawed:
		return nil
	default:
	}
	select {
	case <-thawed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// gatedQueue stands still while its relay is frozen.
type gatedQueue struct {
	slot  *slot
	life  *life
	queue relay.Queue
}

func (q *gatedQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (res outbox.ClaimResult, err error) {
	err = q.call(ctx, func() error {
		res, err = q.queue.Claim(ctx, opts)
		return err
	})
	return res, err
}

func (q *gatedQueue) Extend(ctx context.Context, leases []outbox.Lease, d time.Duration) (res []outbox.LeaseResult, err error) {
	err = q.call(ctx, func() error {
		res, err = q.queue.Extend(ctx, leases, d)
		return err
	})
	return res, err
}

func (q *gatedQueue) Settle(ctx context.Context, settlements []outbox.Settlement) (res []outbox.LeaseResult, err error) {
	err = q.call(ctx, func() error {
		res, err = q.queue.Settle(ctx, settlements)
		return err
	})
	return res, err
}

// call makes a call unless the relay is frozen. A call that failed, or was so slow that
// leases may have ended, is a fault that explains a duplicate.
func (q *gatedQueue) call(ctx context.Context, fn func() error) error {
	if err := q.life.await(ctx); err != nil {
		return err
	}
	began := time.Now()
	err := fn()
	if !errors.Is(err, ledger.ErrDead) && (err != nil || time.Since(began) > q.slot.lease/6) {
		q.slot.fault(ledger.Fault{Kind: "slow or failed call", Worker: q.life.worker.Name, From: began, To: time.Now(), Observed: true})
	}
	return err
}
