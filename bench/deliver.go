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

// deliver compares relays with a loop that has neither lease nor token nor attempts.
// What was sent is counted in memory: a query for that can be the slowest part.
func deliver(ctx context.Context, b *bench) (err error) {
	var places []*place
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...)) }()
	var cs []contender

	// Each round delivers all there is, so it has no length.
	add := func(name string, prepare, fill func(context.Context, *place) error, work func(context.Context, *place) (time.Duration, error)) error {
		p, err := b.newPlace(ctx, fmt.Sprintf("deliver_%d", len(places)), 20)
		places = append(places, p)
		if err != nil {
			return err
		}
		if err := prepare(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		cs = append(cs, contender{
			name:   name,
			before: func(ctx context.Context) error { return errors.Join(fill(ctx, p), p.settle(ctx)) },
			work: func(ctx context.Context, _ time.Duration) (int, time.Duration, error) {
				took, err := work(ctx, p)
				if err != nil {
					err = fmt.Errorf("%s: %w", name, err)
				}
				return b.deliver, took, err
			},
		})
		return nil
	}
	migrate := func(ctx context.Context, p *place) error { return p.migrate(ctx) }
	fill := func(ctx context.Context, p *place) error {
		return b.exec(ctx, "TRUNCATE "+p.table(), fillSQL(p.table(), "pending", 1, b.deliver))
	}
	relays := func(n int, cfg relay.Config) func(context.Context, *place) (time.Duration, error) {
		return func(ctx context.Context, p *place) (time.Duration, error) { return b.deliverByRelays(ctx, p, n, cfg) }
	}
	// In the order of the index that there is, so that it is not held up by rows that are sent.
	const floor = "loop by hand, 500 at a time, oldest due first"
	err = errors.Join(
		add(floor, migrate, fill, b.deliverByHand("ORDER BY coalesce(next_retry_at, created_at, '-infinity'), id ")),
		add("the same by id", migrate, fill, b.deliverByHand("ORDER BY id ")),
		add("the same in any order", migrate, fill, b.deliverByHand("")),
		add("1 relay, default configuration", migrate, fill, relays(1, relay.Config{})),
		add("1 relay, BatchSize 1000", migrate, fill, relays(1, relay.Config{BatchSize: 1000})),
		add("4 relays, BatchSize 1000", migrate, fill, relays(4, relay.Config{BatchSize: 1000})),
		add("River", makeRiver, b.fillRiver, b.deliverByRiver),
		add("watermill-sql", makeWatermill, b.fillWatermill, b.deliverByWatermill),
	)
	if err != nil {
		return err
	}
	if err := b.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	ratio, err := b.compare(ctx, "", "messages", floor, cs, b.deliverRounds)
	if err != nil {
		return err
	}
	b.rep.atLeast(fmt.Sprintf("deliver %d, 1 relay, default configuration", b.deliver), ratio["1 relay, default configuration"], 1.5)
	b.rep.atLeast(fmt.Sprintf("deliver %d, 1 relay, BatchSize 1000", b.deliver), ratio["1 relay, BatchSize 1000"], 1.5)
	b.rep.atLeast(fmt.Sprintf("deliver %d, 4 relays, BatchSize 1000", b.deliver), ratio["4 relays, BatchSize 1000"], 2)
	return nil
}

// deliverByHand is the loop to compare with.
func (b *bench) deliverByHand(order string) func(context.Context, *place) (time.Duration, error) {
	return func(ctx context.Context, p *place) (time.Duration, error) {
		start := time.Now()
		for sent := 0; sent < b.deliver; {
			rows, err := p.pool.Query(ctx, `UPDATE `+p.table()+` SET locked_at = now() WHERE id IN (
				SELECT id FROM `+p.table()+` WHERE status = 'pending' AND locked_at IS NULL `+order+`LIMIT 500 FOR UPDATE SKIP LOCKED)
				RETURNING id, type, booking_id, candidate_tg_id, payload_json`)
			if err != nil {
				return 0, err
			}
			var ids []int64
			var id, booking, candidate int64
			var typ string
			var payload []byte
			if _, err = pgx.ForEachRow(rows, []any{&id, &typ, &booking, &candidate, &payload}, func() error {
				ids = append(ids, id)
				return nil
			}); err != nil {
				return 0, err
			}
			if len(ids) == 0 {
				return 0, errors.New("nothing is left too early")
			}
			if _, err := p.pool.Exec(ctx, "UPDATE "+p.table()+" SET status = 'sent', sent_at = now(), locked_at = NULL WHERE id = ANY($1)", ids); err != nil {
				return 0, err
			}
			sent += len(ids)
		}
		return time.Since(start), nil
	}
}

// deliverByRelays has n relays of one process deliver everything, and returns when the
// last is settled.
func (b *bench) deliverByRelays(ctx context.Context, p *place, n int, cfg relay.Config) (time.Duration, error) {
	store, err := p.store(false)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var settled time.Time
	q := &countingQueue{PGStore: store, done: func() { settled = time.Now(); cancel() }}
	q.left.Store(int64(b.deliver))
	cfg.Logger = logger
	var relays []*relay.Relay
	for range n {
		r, err := relay.New(q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) { return "", nil }), cfg)
		if err != nil {
			return 0, err
		}
		relays = append(relays, r)
	}
	start := time.Now()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i, r := range relays {
		wg.Go(func() { errs[i] = r.Run(ctx) })
	}
	wg.Wait()
	if left := q.left.Load(); left != 0 {
		return 0, errors.Join(fmt.Errorf("%d are left", left), errors.Join(errs...))
	}
	return settled.Sub(start), errors.Join(errs...)
}

// countingQueue calls done when a number of rows has been settled.
type countingQueue struct {
	*outbox.PGStore
	left atomic.Int64
	done func()
}

func (q *countingQueue) Settle(ctx context.Context, sts []outbox.Settlement) ([]outbox.LeaseResult, error) {
	res, err := q.PGStore.Settle(ctx, sts)
	settled := int64(0)
	for _, r := range res {
		if r == outbox.LeaseDone {
			settled++
		}
	}
	if settled > 0 && q.left.Add(-settled) == 0 {
		q.done()
	}
	return res, err
}

func makeRiver(ctx context.Context, p *place) error {
	_, err := newRiver(ctx, p, river.Config{})
	return err
}

func (b *bench) fillRiver(ctx context.Context, p *place) error {
	return b.exec(ctx, "TRUNCATE "+p.schema+".river_job", fmt.Sprintf(`INSERT INTO %s.river_job (kind, max_attempts, args)
		SELECT '%s', 25, jsonb_build_object('type', '%[2]s', 'booking_id', i, 'candidate_tg_id', i, 'recruiter_tg_id', i, 'correlation_id', 'req-' || i, 'payload', %[3]s::jsonb)
		FROM generate_series(1, %[4]d) AS i`, p.schema, kind, payloadLiteral(), b.deliver))
}

// riverTuned is how River's own benchmark sets its client for throughput.
func riverTuned(workers *river.Workers) river.Config {
	return river.Config{
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 2000}},
		Workers:           workers,
		FetchCooldown:     2 * time.Millisecond,
		FetchPollInterval: 20 * time.Millisecond,
	}
}

// deliverByRiver counts jobs when they are completed in the database.
func (b *bench) deliverByRiver(ctx context.Context, p *place) (took time.Duration, err error) {
	workers := river.NewWorkers()
	river.AddWorker(workers, river.WorkFunc(func(context.Context, *river.Job[riverJob]) error { return nil }))
	client, err := newRiver(ctx, p, riverTuned(workers))
	if err != nil {
		return 0, err
	}
	completed, unsubscribe := client.SubscribeConfig(&river.SubscribeConfig{ChanSize: b.deliver + 1000, Kinds: []river.EventKind{river.EventKindJobCompleted}})
	defer unsubscribe()
	start := time.Now()
	if err := client.Start(ctx); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, client.Stop(context.WithoutCancel(ctx))) }()
	for range b.deliver {
		select {
		case <-completed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return time.Since(start), nil
}

func makeWatermill(_ context.Context, p *place) error {
	_, err := newWatermill(p, 0)
	return err
}

func (b *bench) fillWatermill(ctx context.Context, p *place) error {
	return b.exec(ctx, "TRUNCATE "+watermillSchema(p, 0).MessagesTable(kind),
		"TRUNCATE "+watermillOffsets(p).MessagesOffsetsTable(kind), watermillFillSQL(p, b.deliver))
}

// deliverByWatermill counts messages when they are acknowledged; the offset of the last
// ones is written after that.
func (b *bench) deliverByWatermill(ctx context.Context, p *place) (took time.Duration, err error) {
	sub, err := newWatermill(p, 1000)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, sub.Close()) }()
	start := time.Now()
	messages, err := sub.Subscribe(ctx, kind)
	if err != nil {
		return 0, err
	}
	for range b.deliver {
		select {
		case m := <-messages:
			m.Ack()
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return time.Since(start), nil
}
