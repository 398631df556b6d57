package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

const heldAddsASecond = 800

// timedQueue times claims.
type timedQueue struct {
	*outbox.PGStore
	mu   sync.Mutex
	took []float64 // in ms
}

func (q *timedQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	start := time.Now()
	res, err := q.PGStore.Claim(ctx, opts)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.took = append(q.took, ms(time.Since(start)))
	return res, err
}

func (q *timedQueue) lap() []float64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	took := q.took
	q.took = nil
	return took
}

// held measures adding and delivering before, while and after a transaction elsewhere
// is open, because of which no dead row can be removed. Autovacuum is on.
func held(ctx context.Context, b *bench) (err error) {
	p, err := b.newPlace(ctx, "held", 24)
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), p)) }()
	if err != nil {
		return err
	}
	if err := p.migrate(ctx); err != nil {
		return err
	}
	if err := b.exec(ctx, fillSQL(p.table(), "sent", 1, b.preload), "VACUUM ANALYZE "+p.table()); err != nil {
		return err
	}
	// Not every server has it.
	exact := b.exec(ctx, "CREATE EXTENSION IF NOT EXISTS pgstattuple") == nil

	store, err := p.store(false)
	if err != nil {
		return err
	}
	h := &heldRun{b: b, p: p, queue: &timedQueue{PGStore: store}, watch: newStopwatch(), exact: exact}
	p.next.Store(int64(b.preload)) // what is there is sent
	h.add = func(ctx context.Context, tx pgx.Tx, i int64) error {
		_, err := store.AddNotification(ctx, tx, notification(i, 1))
		return err
	}
	r, err := relay.New(h.queue, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
		h.watch.send(n.BookingID, time.Now())
		return "", nil
	}), relay.Config{Logger: logger})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- r.Run(ctx) }()

	err = h.phases(ctx)
	cancel()
	return errors.Join(err, <-stopped)
}

type heldRun struct {
	b     *bench
	p     *place
	queue *timedQueue
	watch *stopwatch
	add   op
	exact bool // dead rows can be counted
}

func (h *heldRun) phases(ctx context.Context) error {
	rows := [][]string{{"", "seconds", "adds/s", "commit to Send p50 ms", "p99 ms", "largest backlog", "backlog at the end",
		"claim p50 ms", "p99 ms", "dead rows by statistics", "counted", "table", "indexes"}}
	phase := func(name string, d time.Duration) (map[string]float64, error) {
		values, row, err := h.phase(ctx, name, d)
		rows = append(rows, row)
		return values, err
	}
	if _, err := phase("before", h.b.beside); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, h.b.url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT pg_current_xact_id()"); err != nil {
		return err
	}
	during, err := phase("during", h.b.hold)
	if err != nil {
		return err
	}
	if err := tx.Rollback(ctx); err != nil {
		return err
	}
	if _, err := phase("after", h.b.beside); err != nil {
		return err
	}
	if h.b.hold > time.Minute {
		h.b.rep.printf("\n")
	}
	h.b.rep.table(rows)
	h.b.rep.atLeast("transaction held open: adds a second", during["adds_per_second"], 0.99*heldAddsASecond)
	h.b.rep.atMost("transaction held open: backlog at its end (a second of adds)", during["backlog"], heldAddsASecond)
	return nil
}

// phase adds for d and says what came of it; of a long one, a line a minute.
func (h *heldRun) phase(ctx context.Context, name string, d time.Duration) (map[string]float64, []string, error) {
	var sends, claims []float64
	adds, most := 0, 0
	h.queue.lap()
	h.watch.lap()
	start := time.Now()
	for minute := 1; ; minute++ {
		left := d - time.Since(start)
		if left <= 0 {
			break
		}
		n, err := pace(ctx, heldAddsASecond, 16, min(left, time.Minute), h.addOne)
		if err != nil {
			return nil, nil, err
		}
		took, largest, backlog := h.watch.lap()
		claimed := h.queue.lap()
		adds, most = adds+n, max(most, largest)
		sends, claims = append(sends, took...), append(claims, claimed...)
		if d > time.Minute {
			dead, err := one[int64](ctx, h.b.db, "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = $1::regclass", h.p.table())
			if err != nil {
				return nil, nil, err
			}
			h.b.rep.printf("- %s, minute %d: %d adds, commit to Send p50 %s ms, p99 %s ms, backlog %d, claim p50 %s ms, p99 %s ms, %d dead rows\n", name, minute, n,
				number(quantile(took, 0.5)), number(quantile(took, 0.99)), backlog, number(quantile(claimed, 0.5)), number(quantile(claimed, 0.99)), dead)
		}
	}
	took := time.Since(start)
	_, _, backlog := h.watch.lap()

	values := map[string]float64{"adds_per_second": float64(adds) / took.Seconds(), "backlog": float64(backlog), "largest_backlog": float64(most)}
	if len(sends) > 0 && len(claims) > 0 {
		values["p50_ms"], values["p99_ms"] = quantile(sends, 0.5), quantile(sends, 0.99)
		values["claim_p50_ms"], values["claim_p99_ms"] = quantile(claims, 0.5), quantile(claims, 0.99)
	}
	var table, indexes float64
	counted := "not known"
	var dead int64
	err := h.b.db.QueryRow(ctx, `SELECT n_dead_tup, pg_table_size(relid)::float8, pg_indexes_size(relid)::float8
		FROM pg_stat_user_tables WHERE relid = $1::regclass`, h.p.table()).Scan(&dead, &table, &indexes)
	if err == nil && h.exact {
		var n int64
		n, err = one[int64](ctx, h.b.db, "SELECT dead_tuple_count FROM pgstattuple($1::regclass)", h.p.table())
		counted, values["dead_rows_counted"] = fmt.Sprint(n), float64(n)
	}
	values["dead_rows"], values["table_bytes"], values["index_bytes"] = float64(dead), table, indexes
	h.b.rep.value("", name, 0, values)
	mib := func(bytes float64) string { return number(bytes/(1<<20)) + " MiB" }
	return values, []string{name, fmt.Sprintf("%.0f", took.Seconds()), number(values["adds_per_second"]),
		number(values["p50_ms"]), number(values["p99_ms"]), fmt.Sprint(most), fmt.Sprint(backlog),
		number(values["claim_p50_ms"]), number(values["claim_p99_ms"]), fmt.Sprint(dead), counted, mib(table), mib(indexes)}, err
}

func (h *heldRun) addOne(ctx context.Context) error { return h.p.timedAdd(ctx, h.add, h.watch) }
