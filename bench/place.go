package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
)

// place is where one contender works: a schema and a pool of its own, so that none
// inherits another's bloat.
type place struct {
	b      *bench
	schema string
	pool   *pgxpool.Pool
	next   atomic.Int64 // counts operations
}

// newPlace makes a schema with a business table.
func (b *bench) newPlace(ctx context.Context, schema string, conns int) (*place, error) {
	pool, err := b.pool(ctx, conns)
	if err != nil {
		return nil, err
	}
	return &place{b: b, schema: schema, pool: pool}, b.exec(ctx, "CREATE SCHEMA "+schema,
		"CREATE TABLE "+schema+".business (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text NOT NULL)")
}

func (p *place) table() string { return p.schema + ".outbox_notifications" }

// logger has lines formatted as in a service, and thrown away.
var logger = slog.New(slog.NewTextHandler(io.Discard, nil))

// store is this library in the place, with its log on.
func (p *place) store(notify bool) (*outbox.PGStore, error) {
	return outbox.NewPGStore(p.pool, outbox.Config{
		Schema: p.schema, Notify: notify, Logger: logger,
	})
}

// migrate makes the table of this library, for others too.
func (p *place) migrate(ctx context.Context) error {
	store, err := p.store(false)
	if err != nil {
		return err
	}
	return store.Migrate(ctx)
}

// settle has the planner know the tables, and keeps autovacuum from coming by in one
// contender's rounds.
func (p *place) settle(ctx context.Context) error {
	rows, err := p.b.db.Query(ctx, "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = $1", p.schema)
	if err != nil {
		return err
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, t := range tables {
		if err := p.b.exec(ctx, "ALTER TABLE "+t+" SET (autovacuum_enabled = off)", "VACUUM ANALYZE "+t); err != nil {
			return err
		}
	}
	return nil
}

// op does what is measured in a transaction, the i-th time.
type op func(ctx context.Context, tx pgx.Tx, i int64) error

type beginner interface {
	Begin(context.Context) (pgx.Tx, error)
}

// business runs the transaction of a booking service.
func (p *place) business(do op) func(context.Context, beginner) error {
	insert := "INSERT INTO " + p.schema + ".business (note) VALUES ($1)"
	return func(ctx context.Context, db beginner) error {
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, insert, "the candidate asked for another day"); err != nil {
				return err
			}
			return do(ctx, tx, p.next.Add(1))
		})
	}
}

// many runs do alone in a transaction.
func (p *place) many(do op) func(context.Context, beginner) error {
	return func(ctx context.Context, db beginner) error {
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { return do(ctx, tx, p.next.Add(1)) })
	}
}

// prewarms is how often each connection runs a transaction beforehand: more often than
// PostgreSQL makes a plan for the values at hand before it considers one for all, five
// times, and that after a run of adds that has this library's store guess, sixteen.
const prewarms = 25

// workers returns the work of a contender: conns connections run transactions until
// the time is up, each of which counts as ops operations.
func (p *place) workers(ctx context.Context, conns, ops int, run func(context.Context, beginner) error) (func(context.Context, time.Duration) (int, time.Duration, error), error) {
	// All connections are taken before the first is used, so that each gets its turn.
	var held []*pgxpool.Conn
	defer func() {
		for _, c := range held {
			c.Release()
		}
	}()
	for range conns {
		c, err := p.pool.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		held = append(held, c)
	}
	var taken atomic.Int64
	warm := together(conns, func(time.Time) error {
		c := held[taken.Add(1)-1]
		for range prewarms {
			if err := run(ctx, c); err != nil {
				return err
			}
		}
		return nil
	})
	if warm.error != nil {
		return nil, warm.error
	}
	return func(ctx context.Context, d time.Duration) (int, time.Duration, error) {
		var done atomic.Int64
		err := together(conns, func(start time.Time) error {
			for first := true; first || time.Since(start) < d; first = false { // none is no number to divide by
				if err := run(ctx, p.pool); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
		return int(done.Load()) * ops, err.took, err.error
	}, nil
}

type outcome struct {
	took time.Duration
	error
}

// together has n goroutines do the same, and waits for all.
func together(n int, do func(start time.Time) error) outcome {
	errs := make([]error, n)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() { errs[i] = do(start) })
	}
	wg.Wait()
	return outcome{time.Since(start), errors.Join(errs...)}
}

// message is a payload of some 200 bytes.
type message struct {
	Template string `json:"template"`
	Position string `json:"position"`
	Slot     string `json:"slot"`
	Timezone string `json:"timezone"`
	Place    string `json:"place"`
	Note     string `json:"note"`
	Revision int64  `json:"revision"`
}

func messageOf(revision int64) message {
	return message{"interview_moved", "Backend engineer, payments", "2026-03-14T10:00:00+03:00", "Europe/Moscow",
		"Office 4, room 12, second floor", "Please answer by the evening of the day before", revision}
}

const kind = "interview_moved"

// The i-th key, for i from 1 to the prime. Multiplying modulo a prime scatters the
// keys, each of which comes once; SQL does the same.
const (
	prime      = 1<<31 - 1
	bookingMul = 48271
	candMul    = 69621
	keySQL     = `i * 48271 % 2147483647, 1000000000 + i * 69621 % 2147483647`
)

func booking(i int64) int64   { return i * bookingMul % prime }
func candidate(i int64) int64 { return 1_000_000_000 + i*candMul%prime }
func recruiter(i int64) int64 { return 200_000 + i%1000 }

func correlation(i int64) string { return fmt.Sprintf("req-%d", booking(i)) }

// notification is the i-th, as this library takes it. Revision 0 is what fill writes.
func notification(i, revision int64) outbox.NewNotification {
	return outbox.NewNotification{Type: kind, BookingID: booking(i), CandidateTgID: candidate(i),
		RecruiterTgID: recruiter(i), Payload: messageOf(revision), CorrelationID: correlation(i)}
}

// payloadLiteral is a payload for SQL.
func payloadLiteral() string {
	payload, err := json.Marshal(messageOf(0))
	if err != nil {
		panic(err) // of a struct of strings
	}
	return "'" + string(payload) + "'"
}

// fillSQL writes notifications from the first to the last number.
func fillSQL(table, status string, first, last int) string {
	rest := "0, 0, NULL::timestamptz"
	if status == "sent" {
		rest = "1, 1, now()"
	}
	return fmt.Sprintf(`INSERT INTO %s (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id, status, attempts, sent_version, sent_at)
		SELECT '%s', %s, 200000 + i %% 1000, %s, 'req-' || i * 48271 %% 2147483647, '%s', %s
		FROM generate_series(%d::bigint, %d) AS i`, table, kind, keySQL, payloadLiteral(), status, rest, first, last)
}

// preloaded is a place with the table of this library and its first rows.
func (b *bench) preloaded(ctx context.Context, schema, status string, conns int) (*place, error) {
	p, err := b.newPlace(ctx, schema, conns)
	if err != nil {
		return p, err
	}
	if err := p.migrate(ctx); err != nil {
		return p, err
	}
	if err := b.exec(ctx, fillSQL(p.table(), status, 1, b.preload)); err != nil {
		return p, err
	}
	return p, p.settle(ctx)
}

// timedAdd runs a transaction of [place.business] that adds, and notes its commit.
func (p *place) timedAdd(ctx context.Context, add op, watch *stopwatch) error {
	var id int64
	err := p.business(func(ctx context.Context, tx pgx.Tx, i int64) error {
		id = booking(i)
		return add(ctx, tx, i)
	})(ctx, p.pool)
	if err == nil {
		watch.commit(id, time.Now())
	}
	return err
}
