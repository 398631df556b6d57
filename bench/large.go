package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

// largePlace is a place with many rows: sent ones, as many pending ones due tomorrow, and
// few that are due.
type largePlace struct {
	*place
	store *outbox.PGStore
	rows  int
	about string
}

const (
	scattered = 2000 // keys that repeats of settled ones are about, all over the table
	claimRows = 100
)

// large compares what things cost in a small table with what they cost in large ones.
// Adds are many to a transaction, as a commit would hide what they cost. Repeats are
// about as many rows in each, whose pages have been written to since the checkpoint:
// page images are a matter of how many pages are in use, not of how many there are.
func large(ctx context.Context, b *bench) (err error) {
	var places []*place
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...)) }()
	build := func(schema, about string, sent, later int) (*largePlace, error) {
		start := time.Now()
		p, err := b.newPlace(ctx, schema, 4)
		places = append(places, p)
		if err != nil {
			return nil, err
		}
		if err := p.migrate(ctx); err != nil {
			return nil, err
		}
		store, err := p.store(false)
		if err != nil {
			return nil, err
		}
		if err := b.fillLarge(ctx, p, sent, later); err != nil {
			return nil, err
		}
		size, err := one[string](ctx, b.db, "SELECT pg_size_pretty(pg_table_size($1::regclass)) || ' and indexes of ' || pg_size_pretty(pg_indexes_size($1::regclass))", p.table())
		b.rep.printf("- %d rows sent, %d due tomorrow: %s, filled in %.0f s\n", sent, later, size, time.Since(start).Seconds())
		return &largePlace{p, store, sent, about}, err
	}
	small, err := build("small", "", b.small, 0)
	if err != nil {
		return err
	}
	sent, err := build("large", fmt.Sprintf("%d sent rows", b.large), b.large, 0)
	if err != nil {
		return err
	}
	later, err := build("later", fmt.Sprintf("with %d rows due tomorrow,", b.later), b.small, b.later)
	if err != nil {
		return err
	}
	b.rep.printf("\nThey are small, large and later, in this order. The cost in the small table is 1; the ratios are of costs.\n\n")
	if err := b.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}

	rows := [][]string{{"work", "in", "µs", "ratio of cost", "quartiles", "server CPU µs", "ratio of it"}}
	const limit = 1.2
	for _, m := range []struct {
		name   string
		with   []*largePlace
		claims bool // one at a time, on rows that are put back in between
		work   func(ctx context.Context, p *largePlace) (ops int, err error)
		target bool
		warm   int // operations after which all pages are in memory and in the WAL
	}{
		{"claim that finds nothing", []*largePlace{small, sent, later}, false, claimNothing, true, 0},
		{"claim of 100", []*largePlace{small, sent, later}, true, claimSome, true, 0},
		{"Stats", []*largePlace{small, sent}, false, stats, true, 0},
		{"add, new key", []*largePlace{small, sent}, false, b.addMany(func(p *largePlace, i int64) (int64, int64) { return p.unused(i), i }), true, scattered},
		{"bare insert of a new key", []*largePlace{small, sent}, false, b.insertMany, false, scattered},
		{"add, repeat of a pending key", []*largePlace{small, sent}, false, b.addMany(func(p *largePlace, i int64) (int64, int64) { return p.pendingKey(i), i }), true, scattered},
		{"add, repeat of a settled key", []*largePlace{small, sent}, false, b.addMany(func(p *largePlace, i int64) (int64, int64) { return p.settledKey(i), 0 }), true, scattered},
		{"bare select for update of a settled key", []*largePlace{small, sent}, false, b.lockMany, false, scattered},
	} {
		if m.claims {
			for _, p := range m.with {
				if err := b.exec(ctx, fillSQL(p.table(), "pending", p.rows+1, p.rows+claimRows), "VACUUM ANALYZE "+p.table()); err != nil {
					return err
				}
			}
		}
		var cs []contender
		for _, p := range m.with {
			c := contender{name: p.schema, work: func(ctx context.Context, d time.Duration) (int, time.Duration, error) {
				start := time.Now()
				for ops := 0; ; {
					n, err := m.work(ctx, p)
					ops += n
					if took := time.Since(start); err != nil || m.claims || took > d {
						return ops, took, err
					}
				}
			}}
			if m.claims {
				c.before = func(ctx context.Context) error { return b.putBack(ctx, p) }
			}
			for range prewarms { // whatever is claimed is put back before the next
				if c.before != nil {
					if err := c.before(ctx); err != nil {
						return err
					}
				}
				if _, _, err := c.work(ctx, 0); err != nil {
					return fmt.Errorf("%s: %w", m.name, err)
				}
			}
			for warm := 0; warm < min(m.warm, p.rows); {
				n, _, err := c.work(ctx, 0)
				if err != nil {
					return fmt.Errorf("%s: %w", m.name, err)
				}
				warm += n
			}
			cs = append(cs, c)
		}
		rounds := b.rounds
		if m.claims {
			rounds = b.claimRounds
		}
		samples, err := interleave(ctx, b.meter, cs, rounds, b.round)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if m.claims {
			for _, p := range m.with {
				if err := b.putBack(ctx, p); err != nil {
					return err
				}
			}
		}
		cost := func(s sample) float64 { return 1 / s.speed() }
		for i, p := range m.with {
			for round, s := range samples[i] {
				b.rep.Records = append(b.rep.Records, record{Section: b.rep.section, Case: m.name, Contender: p.schema, Round: round, sample: &s})
			}
			ratio := spreadOf(ratios(samples[i], samples[0], cost))
			row := []string{m.name, p.schema, number(1e6 * median(each(samples[i], cost))),
				fmt.Sprintf("%.3f", ratio.median), fmt.Sprintf("%.2f–%.2f", ratio.q1, ratio.q3)}
			if b.meter.knowsServer {
				row = append(row, number(median(each(samples[i], sample.serverUS))), fmt.Sprintf("%.2f", median(ratios(samples[i], samples[0], sample.serverUS))))
			} else {
				row = append(row, "", "")
			}
			rows = append(rows, row)
			if i > 0 && m.target {
				b.rep.atMost(fmt.Sprintf("cost of %s, %s over %d sent rows", m.name, p.about, b.small), ratio.median, limit)
			}
		}
	}
	b.rep.table(rows)
	return nil
}

// fillLarge writes the rows before it makes the indexes.
func (b *bench) fillLarge(ctx context.Context, p *place, sent, later int) error {
	rows, err := b.db.Query(ctx, `SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
		WHERE indrelid = $1::regclass AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)`, p.table())
	if err != nil {
		return err
	}
	type index struct{ Name, Def string }
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		return err
	}
	rows, err = b.db.Query(ctx, `SELECT conname::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = $1::regclass AND contype IN ('p', 'u')`, p.table())
	if err != nil {
		return err
	}
	constraints, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		return err
	}
	var drop, build []string
	for _, i := range indexes {
		drop, build = append(drop, "DROP INDEX "+i.Name), append(build, i.Def)
	}
	for _, c := range constraints {
		drop = append(drop, "ALTER TABLE "+p.table()+" DROP CONSTRAINT "+c.Name)
		build = append(build, "ALTER TABLE "+p.table()+" ADD CONSTRAINT "+c.Name+" "+c.Def)
	}
	if err := b.exec(ctx, drop...); err != nil {
		return err
	}
	const short = `'{"slot":"10:00"}'` // the long payload would measure the disk
	if err := b.exec(ctx, strings.Replace(fillSQL(p.table(), "sent", 1, sent), payloadLiteral(), short, 1)); err != nil {
		return err
	}
	if later > 0 {
		fill := strings.Replace(fillSQL(p.table(), "pending", sent+10_000_001, sent+10_000_000+later), payloadLiteral(), short, 1)
		fill = strings.Replace(fill, "sent_at)", "next_retry_at)", 1)
		fill = strings.Replace(fill, "NULL::timestamptz", "now() + interval '1 day'", 1)
		if err := b.exec(ctx, fill); err != nil {
			return err
		}
	}
	if err := b.exec(ctx, build...); err != nil {
		return err
	}
	return p.settle(ctx)
}

// Numbers of keys. Those that are pending follow the ones that were sent; new ones
// follow far behind both.
func (p *largePlace) pendingKey(i int64) int64 { return int64(p.rows) + 1 + i%claimRows }
func (p *largePlace) unused(i int64) int64     { return 1_000_000_000 + i }

func (p *largePlace) settledKey(i int64) int64 {
	apart := max(1, p.rows/scattered)
	return 1 + i%scattered*int64(apart)%int64(p.rows)
}

// putBack ends the leases of a claim, as if it had not been, and clears away after it.
func (b *bench) putBack(ctx context.Context, p *largePlace) error {
	return b.exec(ctx, "UPDATE "+p.table()+` SET attempts = 0, locked_at = NULL, lease_token = NULL, lease_until = NULL, lease_version = NULL
		WHERE status = 'pending' AND lease_token IS NOT NULL`, "VACUUM "+p.table())
}

func claim(ctx context.Context, p *largePlace, want int) error {
	res, err := p.store.Claim(ctx, outbox.ClaimOptions{Limit: claimRows, Lease: time.Minute, MaxAttempts: 10})
	if err == nil && len(res.Claimed) != want {
		err = fmt.Errorf("%d claimed, not %d", len(res.Claimed), want)
	}
	return err
}

func claimNothing(ctx context.Context, p *largePlace) (int, error) { return 1, claim(ctx, p, 0) }
func claimSome(ctx context.Context, p *largePlace) (int, error)    { return 1, claim(ctx, p, claimRows) }

func stats(ctx context.Context, p *largePlace) (int, error) {
	_, err := p.store.Stats(ctx)
	return 1, err
}

const addsInTx = 20

func (b *bench) addMany(pick func(p *largePlace, i int64) (int64, int64)) func(context.Context, *largePlace) (int, error) {
	return func(ctx context.Context, p *largePlace) (int, error) {
		return addsInTx, pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
			for range addsInTx {
				if _, err := p.store.AddNotification(ctx, tx, notification(pick(p, p.next.Add(1)))); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func (b *bench) insertMany(ctx context.Context, p *largePlace) (int, error) {
	sql := insertSQL(p.table())
	return addsInTx, pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		for range addsInTx {
			i := p.next.Add(1)
			var id int64
			if err := insertBare(ctx, tx, sql, p.unused(i), messageOf(i), &id); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bench) lockMany(ctx context.Context, p *largePlace) (int, error) {
	sql := `SELECT id, status FROM ` + p.table() + ` ` + keyed + ` FOR UPDATE`
	return addsInTx, pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		for range addsInTx {
			key := p.settledKey(p.next.Add(1))
			var id int64
			var status string
			if err := tx.QueryRow(ctx, sql, kind, booking(key), candidate(key)).Scan(&id, &status); err != nil {
				return err
			}
		}
		return nil
	})
}
