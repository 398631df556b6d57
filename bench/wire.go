package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// turnCounter counts how often a client of a server began to write after it had
// read: its round trips.
type turnCounter struct{ turns atomic.Int64 }

func (c *turnCounter) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	counted := &countedConn{Conn: conn, counter: c}
	counted.answered.Store(true)
	return counted, nil
}

type countedConn struct {
	net.Conn
	counter  *turnCounter
	answered atomic.Bool
}

func (c *countedConn) Write(p []byte) (int, error) {
	if c.answered.Swap(false) {
		c.counter.turns.Add(1)
	}
	return c.Conn.Write(p)
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.answered.Store(true)
	}
	return n, err
}

// wire counts on one connection, within one transaction. All pages are warm, so
// that the WAL has no page images: they are a matter of checkpoints.
func wire(ctx context.Context, b *bench) error {
	warm := *b
	warm.preload = min(b.preload, 2*b.wire)
	b = &warm
	const insert = "bare insert of a new key"
	cases := []struct {
		name, status string
		pick         pick
		adders       []adder
	}{
		{"new key", "sent", b.newKey, []adder{bareInsert, twoStatements, ours, riverPlain, riverUnique, watermillPublish}},
		{"repeat of a pending key, changed", "pending", b.changedKey, []adder{bareUpdate, twoStatements, ours, riverUnique}},
		{"repeat of a pending key, unchanged", "pending", b.unchangedKey, []adder{twoStatements, ours, riverUnique}},
		{"repeat of a settled key", "sent", b.changedKey, []adder{bareSelect, lockingSelect, ours, riverUnique}},
	}
	rows := [][]string{{"work", "", "round trips", "WAL bytes", "ratio to a " + insert}}
	var floor float64
	for _, c := range cases {
		for i, a := range c.adders {
			trips, wal, err := b.countWire(ctx, a, fmt.Sprintf("wire_%d", i), c.status, c.pick)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", c.name, a.name, err)
			}
			if floor == 0 {
				floor = wal // of the very first, the bare insert
			}
			b.rep.value(c.name, a.name, 0, map[string]float64{"round_trips": trips, "wal_bytes": wal})
			rows = append(rows, []string{c.name, a.name, fmt.Sprintf("%.4g", trips), number(wal), fmt.Sprintf("%.3f", wal/floor)})
			if a.name == ours.name {
				b.rep.atMost("round trips, "+c.name, trips, 1)
				b.rep.atMost("WAL of an add over that of a bare insert, "+c.name, wal/floor, 1)
			}
		}
	}
	b.rep.table(rows)
	return nil
}

func (b *bench) countWire(ctx context.Context, a adder, schema, status string, pick pick) (trips, wal float64, err error) {
	p, do, err := a.make(ctx, b, schema, status, 2)
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), p)) }()
	if err != nil {
		return 0, 0, err
	}
	add := do(pick)
	cfg, err := pgx.ParseConfig(b.url)
	if err != nil {
		return 0, 0, err
	}
	var counter turnCounter
	cfg.DialFunc = counter.dial
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))

	// Everything is written to before it counts. What the server writes to the WAL by
	// itself now and then is no add's: the least of some counts is without it.
	const counts = 3
	wal = math.Inf(1)
	for left := b.preload/b.wire + 1 + counts; left > 0; left-- {
		var bytes float64
		if trips, bytes, err = b.countAdds(ctx, conn, &counter, p, add); err != nil {
			return 0, 0, err
		}
		if left <= counts {
			wal = min(wal, bytes)
		}
	}
	return trips, math.Round(wal), nil // index pages split now and then, which is worth a fraction of a byte
}

func (b *bench) countAdds(ctx context.Context, conn *pgx.Conn, counter *turnCounter, p *place, add op) (trips, wal float64, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_current_xact_id()"); err != nil {
			return err
		}
		before, err := walPosition(ctx, b.db)
		if err != nil {
			return err
		}
		turns := counter.turns.Load()
		for range b.wire {
			if err := add(ctx, tx, p.next.Add(1)); err != nil {
				return err
			}
		}
		trips = float64(counter.turns.Load()-turns) / float64(b.wire)
		after, err := walPosition(ctx, b.db)
		wal = (after - before) / float64(b.wire)
		return err
	})
	return trips, wal, err
}

func walPosition(ctx context.Context, pool *pgxpool.Pool) (float64, error) {
	return one[float64](ctx, pool, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8")
}
