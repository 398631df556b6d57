package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// stopwatch measures from commit to Send, which may come before the commit's answer:
// that is no time at all. It is safe for concurrent use.
type stopwatch struct {
	mu        sync.Mutex
	committed map[int64]time.Time
	sent      map[int64]time.Time
	took      []float64 // in ms
	backlog   int       // committed and not sent
	most      int       // of backlog
}

func newStopwatch() *stopwatch {
	return &stopwatch{committed: map[int64]time.Time{}, sent: map[int64]time.Time{}}
}

func (w *stopwatch) commit(id int64, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.backlog++
	w.most = max(w.most, w.backlog)
	if sent, ok := w.sent[id]; ok {
		delete(w.sent, id)
		w.took = append(w.took, max(0, ms(sent.Sub(at))))
		return
	}
	w.committed[id] = at
}

func (w *stopwatch) send(id int64, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.backlog--
	if committed, ok := w.committed[id]; ok {
		delete(w.committed, id)
		w.took = append(w.took, ms(at.Sub(committed)))
		return
	}
	w.sent[id] = at
}

// lap returns what was measured since the last one, the largest backlog and the one now.
func (w *stopwatch) lap() (took []float64, most, backlog int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	took, w.took = w.took, nil
	most, w.most = w.most, w.backlog
	return took, most, w.backlog
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// pace calls do n times a second for d, from a number of goroutines, and waits for
// them. What falls behind is made up for. It returns how often it called.
func pace(ctx context.Context, perSecond, workers int, d time.Duration, do func(ctx context.Context) error) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	due := make(chan struct{})
	var done atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range due {
				if err := do(ctx); err != nil {
					cancel(err)
					return
				}
				done.Add(1)
			}
		})
	}
	start := time.Now()
	every := time.Second / time.Duration(perSecond)
	timer := time.NewTimer(0)
	defer timer.Stop()
feed:
	for n := 0; n < int(d/every); n++ {
		timer.Reset(time.Until(start.Add(time.Duration(n) * every)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			break feed
		}
		if n > 0 && time.Since(start) > d {
			break // the server cannot keep up with us
		}
		select {
		case due <- struct{}{}:
		case <-ctx.Done():
			break feed
		}
	}
	close(due)
	wg.Wait()
	return int(done.Load()), context.Cause(ctx)
}

// deliverer is a contender of the latency section: run delivers what add adds until ctx
// ends and calls sent for each.
type deliverer struct {
	name string
	make func(ctx context.Context, p *place) (add op, run func(ctx context.Context, sent func(id int64)) error, err error)
}

func ourDeliverer(name string, notify bool) deliverer {
	return deliverer{name, func(ctx context.Context, p *place) (op, func(context.Context, func(int64)) error, error) {
		if err := p.migrate(ctx); err != nil {
			return nil, nil, err
		}
		store, err := p.store(notify)
		if err != nil {
			return nil, nil, err
		}
		add := func(ctx context.Context, tx pgx.Tx, i int64) error {
			_, err := store.AddNotification(ctx, tx, notification(i, 1))
			return err
		}
		return add, func(ctx context.Context, sent func(int64)) error {
			r, err := relay.New(store, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
				sent(n.BookingID)
				return "", nil
			}), relay.Config{Listen: notify, Logger: logger})
			if err != nil {
				return err
			}
			return r.Run(ctx)
		}, nil
	}}
}

func riverDeliverer(name string, tuned bool) deliverer {
	return deliverer{name, func(ctx context.Context, p *place) (op, func(context.Context, func(int64)) error, error) {
		inserter, err := newRiver(ctx, p, river.Config{})
		add := func(ctx context.Context, tx pgx.Tx, i int64) error {
			_, err := inserter.InsertTx(ctx, tx, riverJobOf(i, 1), unique)
			return err
		}
		return add, func(ctx context.Context, sent func(int64)) error {
			workers := river.NewWorkers()
			river.AddWorker(workers, river.WorkFunc(func(_ context.Context, job *river.Job[riverJob]) error {
				sent(job.Args.BookingID)
				return nil
			}))
			cfg := riverTuned(workers)
			if !tuned {
				cfg.FetchCooldown, cfg.FetchPollInterval = 0, 0
			}
			client, err := newRiver(ctx, p, cfg)
			if err != nil {
				return err
			}
			if err := client.Start(context.WithoutCancel(ctx)); err != nil {
				return err
			}
			<-ctx.Done()
			return client.Stop(context.WithoutCancel(ctx))
		}, err
	}}
}

const addsASecond = 100

func latency(ctx context.Context, b *bench) (err error) {
	deliverers := []deliverer{
		ourDeliverer("relay, polling", false),
		ourDeliverer("relay, NOTIFY", true),
		riverDeliverer("River, NOTIFY, default configuration", false),
		riverDeliverer("River, NOTIFY, FetchCooldown 2 ms", true),
	}
	var places []*place
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...)) }()
	adds := make([]op, len(deliverers))
	runs := make([]func(context.Context, func(int64)) error, len(deliverers))
	for i, d := range deliverers {
		p, err := b.newPlace(ctx, fmt.Sprintf("latency_%d", i), 12)
		places = append(places, p)
		if err != nil {
			return err
		}
		if adds[i], runs[i], err = d.make(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
	}
	took := make([][]float64, len(deliverers))
	for round := range b.latencyRounds {
		for k := range deliverers {
			i := (round + k) % len(deliverers)
			laps, err := b.latencyOf(ctx, places[i], adds[i], runs[i])
			if err != nil {
				return fmt.Errorf("%s: %w", deliverers[i].name, err)
			}
			b.rep.value("", deliverers[i].name, round, map[string]float64{
				"p50_ms": quantile(laps, 0.5), "p99_ms": quantile(laps, 0.99), "messages": float64(len(laps))})
			took[i] = append(took[i], laps...)
		}
	}
	rows := [][]string{{"", "p50 ms", "p90 ms", "p99 ms", "largest ms", "messages"}}
	for i, d := range deliverers {
		rows = append(rows, []string{d.name, number(quantile(took[i], 0.5)), number(quantile(took[i], 0.9)),
			number(quantile(took[i], 0.99)), number(quantile(took[i], 1)), fmt.Sprint(len(took[i]))})
	}
	b.rep.table(rows)
	b.rep.atMost("commit to Send with NOTIFY, p50 in ms", quantile(took[1], 0.5), 5)
	b.rep.atMost("commit to Send by polling, p99 in ms (PollInterval)", quantile(took[0], 0.99), 1000)
	return nil
}

// latencyOf adds for a while, of which the first tenth does not count, and returns how
// long each message took in ms.
func (b *bench) latencyOf(ctx context.Context, p *place, add op, run func(context.Context, func(int64)) error) ([]float64, error) {
	watch := newStopwatch()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopped := make(chan error, 1)
	go func() {
		err := run(ctx, func(id int64) { watch.send(id, time.Now()) })
		cancel(err)
		stopped <- err
	}()
	one := func(ctx context.Context) error { return p.timedAdd(ctx, add, watch) }
	if _, err := pace(ctx, addsASecond, 4, b.latency/10, one); err != nil {
		return nil, err
	}
	if err := watch.drained(ctx); err != nil {
		return nil, err
	}
	watch.lap()
	if _, err := pace(ctx, addsASecond, 4, b.latency, one); err != nil {
		return nil, err
	}
	err := watch.drained(ctx)
	took, _, _ := watch.lap()
	cancel(nil)
	return took, errors.Join(err, <-stopped)
}

// drained waits until everything that was committed is sent.
func (w *stopwatch) drained(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		w.mu.Lock()
		left := w.backlog
		w.mu.Unlock()
		if left == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
