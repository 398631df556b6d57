package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"

	"github.com/seed3357934d/outbox"
)

// batcher is a contender that adds many in one transaction. Repeats says that it is
// about keys that are pending.
type batcher struct {
	name    string
	repeats bool
	make    func(ctx context.Context, b *bench, schema string) (*place, func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error, error)
}

// handBatcher runs bare statements on the table of this library.
func handBatcher(name string, repeats bool, do func(table string) func(context.Context, pgx.Tx, []int64, int64) error) batcher {
	return batcher{name, repeats, func(ctx context.Context, b *bench, schema string) (*place, func(context.Context, pgx.Tx, []int64, int64) error, error) {
		p, err := b.preloaded(ctx, schema, "pending", 2)
		if err != nil {
			return p, nil, err
		}
		return p, do(p.table()), nil
	}}
}

func ourBatcher(repeats bool) batcher {
	return batcher{"outbox", repeats, func(ctx context.Context, b *bench, schema string) (*place, func(context.Context, pgx.Tx, []int64, int64) error, error) {
		p, err := b.preloaded(ctx, schema, "pending", 2)
		if err != nil {
			return p, nil, err
		}
		store, err := p.store(false)
		return p, func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error {
			ns := make([]outbox.NewNotification, len(keys))
			for i, key := range keys {
				ns[i] = notification(key, revision)
			}
			_, err := store.AddNotifications(ctx, tx, ns)
			return err
		}, err
	}}
}

func riverBatcher(name string, repeats bool, opts *river.InsertOpts, insert func(context.Context, *riverClient, pgx.Tx, []river.InsertManyParams) error) batcher {
	return batcher{name, repeats, func(ctx context.Context, b *bench, schema string) (*place, func(context.Context, pgx.Tx, []int64, int64) error, error) {
		p, client, err := b.riverPlace(ctx, schema, "pending", 2)
		return p, func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error {
			jobs := make([]river.InsertManyParams, len(keys))
			for i, key := range keys {
				jobs[i] = river.InsertManyParams{Args: riverJobOf(key, revision), InsertOpts: opts}
			}
			return insert(ctx, client, tx, jobs)
		}, err
	}}
}

func riverMany(ctx context.Context, c *riverClient, tx pgx.Tx, jobs []river.InsertManyParams) error {
	_, err := c.InsertManyTx(ctx, tx, jobs)
	return err
}

func riverFast(ctx context.Context, c *riverClient, tx pgx.Tx, jobs []river.InsertManyParams) error {
	_, err := c.InsertManyFastTx(ctx, tx, jobs)
	return err
}

// columns are the parameters of a statement that unnests them, in the order of the
// keys, in which two such batches cannot deadlock each other.
func columns(keys []int64, revision int64) ([]any, error) {
	keys = slices.Clone(keys)
	slices.SortFunc(keys, func(a, b int64) int { return int(booking(a) - booking(b)) })
	n := len(keys)
	types, bookings, candidates, recruiters := make([]string, n), make([]int64, n), make([]int64, n), make([]int64, n)
	payloads, correlations := make([]string, n), make([]string, n)
	for i, key := range keys {
		payload, err := json.Marshal(messageOf(revision))
		if err != nil {
			return nil, err
		}
		types[i], bookings[i], candidates[i], recruiters[i] = kind, booking(key), candidate(key), recruiter(key)
		payloads[i], correlations[i] = string(payload), correlation(key)
	}
	return []any{types, bookings, candidates, recruiters, payloads, correlations}, nil
}

// drain reads the rows of a statement whose ids nobody needs here.
func drain(ctx context.Context, tx pgx.Tx, sql string, args []any) error {
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	_, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	return err
}

const unnested = `unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[])
	AS n (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id)`

var (
	unnestInsert = handBatcher("unnest insert", false, func(table string) func(context.Context, pgx.Tx, []int64, int64) error {
		sql := `INSERT INTO ` + table + ` (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id)
			SELECT type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json::json, correlation_id FROM ` + unnested + `
			ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING RETURNING id`
		return func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error {
			args, err := columns(keys, revision)
			if err != nil {
				return err
			}
			return drain(ctx, tx, sql, args)
		}
	})

	unnestUpdate = handBatcher("unnest update", true, func(table string) func(context.Context, pgx.Tx, []int64, int64) error {
		sql := `UPDATE ` + table + ` AS t SET recruiter_tg_id = n.recruiter_tg_id, payload_json = n.payload_json::json,
				correlation_id = n.correlation_id, version = version + 1, next_retry_at = NULL
			FROM ` + unnested + `
			WHERE t.type = n.type AND t.booking_id = n.booking_id AND t.candidate_tg_id = n.candidate_tg_id RETURNING t.id`
		return func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error {
			args, err := columns(keys, revision)
			if err != nil {
				return err
			}
			return drain(ctx, tx, sql, args)
		}
	})

	pgxBatch = handBatcher("pgx.Batch of bare inserts", false, func(table string) func(context.Context, pgx.Tx, []int64, int64) error {
		sql := insertSQL(table)
		return func(ctx context.Context, tx pgx.Tx, keys []int64, revision int64) error {
			var batch pgx.Batch
			for _, key := range keys {
				payload, err := json.Marshal(messageOf(revision))
				if err != nil {
					return err
				}
				var id int64
				batch.Queue(sql, kind, booking(key), candidate(key), recruiter(key), payload, correlation(key)).
					QueryRow(func(row pgx.Row) error { return row.Scan(&id) })
			}
			return tx.SendBatch(ctx, &batch).Close()
		}
	})
)

func batches(ctx context.Context, b *bench) error {
	if err := b.compareBatches(ctx, "new keys", 0.95,
		unnestInsert, pgxBatch, ourBatcher(false),
		riverBatcher("River InsertManyTx, unique", false, unique, riverMany),
		riverBatcher("River InsertManyFastTx, unique", false, unique, riverFast),
		riverBatcher("River InsertManyFastTx, not unique", false, nil, riverFast)); err != nil {
		return err
	}
	return b.compareBatches(ctx, "repeats of pending keys", 0.5,
		unnestInsert, unnestUpdate, ourBatcher(true),
		riverBatcher("River InsertManyTx, unique", true, unique, riverMany))
}

func (b *bench) compareBatches(ctx context.Context, name string, want float64, batchers ...batcher) (err error) {
	var places []*place
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...)) }()
	var cs []contender
	for i, c := range batchers {
		p, do, err := c.make(ctx, b, fmt.Sprintf("batch_%d", i))
		places = append(places, p)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		work, err := p.workers(ctx, 1, b.batch, p.many(func(ctx context.Context, tx pgx.Tx, i int64) error {
			keys := make([]int64, b.batch)
			for k := range keys {
				key := i*int64(b.batch) + int64(k)
				if c.repeats {
					keys[k] = 1 + key%int64(b.preload)
				} else {
					keys[k] = int64(b.preload) + key
				}
			}
			return do(ctx, tx, keys, i)
		}))
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		cs = append(cs, contender{name: c.name, work: work})
	}
	if err := b.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	b.rep.printf("%s, %d in a transaction:\n\n", name, b.batch)
	ratio, err := b.compare(ctx, name, "notifications", unnestInsert.name, cs, b.rounds)
	if err != nil {
		return err
	}
	b.rep.atLeast(fmt.Sprintf("%d in one transaction, %s", b.batch, name), ratio["outbox"], want)
	return nil
}
