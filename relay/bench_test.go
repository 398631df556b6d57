package relay_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// BenchmarkDeliver compares relays that deliver 20,000 rows to a sender that does
// nothing with a hand-written loop that has neither lease nor token nor attempts,
// in turns. It reports the median of the turns' ratios, 1 being as fast as the loop, and
// what each writes to the WAL for a message.
func BenchmarkDeliver(b *testing.B) {
	const rows = 20_000
	for _, c := range []struct {
		relays int
		cfg    relay.Config
	}{
		{1, relay.Config{BatchSize: 100}},
		{1, relay.Config{BatchSize: 1000}},
		{4, relay.Config{BatchSize: 1000}},
	} {
		b.Run(fmt.Sprintf("relays=%d/batch=%d", c.relays, c.cfg.BatchSize), func(b *testing.B) {
			db := pgtest.NewDB(b)
			fill := func() {
				for _, sql := range []string{"TRUNCATE outbox_notifications", `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, payload_json)
					SELECT 'reject', i, i, '{"slot":"10:00"}' FROM generate_series(1, 20000) i`, "VACUUM ANALYZE outbox_notifications", "CHECKPOINT"} {
					db.MustExec(b, sql)
				}
			}
			// timed returns how long work takes, in seconds, and the bytes of WAL for each row.
			timed := func(work func()) (float64, float64) {
				fill()
				before, start := pgtest.One[float64](b, db, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8"), time.Now()
				work()
				took := time.Since(start).Seconds()
				return took, (pgtest.One[float64](b, db, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8") - before) / rows
			}
			var ratios, speeds, wals, loopWALs []float64
			for b.Loop() {
				loop, loopWAL := timed(func() { deliverByHand(b, db) })
				ours, wal := timed(func() { deliverAll(b, db, rows, c.relays, c.cfg) })
				ratios, speeds = append(ratios, loop/ours), append(speeds, rows/ours)
				wals, loopWALs = append(wals, wal), append(loopWALs, loopWAL)
			}
			b.ReportMetric(median(ratios), "ratio")
			b.ReportMetric(median(speeds), "messages/s")
			b.ReportMetric(median(wals), "WAL_bytes/message")
			b.ReportMetric(median(loopWALs), "loop_WAL_bytes/message")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// deliverByHand is the loop to compare with.
func deliverByHand(b *testing.B, db *pgtest.DB) {
	ctx := b.Context()
	for {
		rows, err := db.Query(ctx, `UPDATE outbox_notifications SET locked_at = now() WHERE id IN (
			SELECT id FROM outbox_notifications WHERE status = 'pending' AND locked_at IS NULL
			ORDER BY coalesce(next_retry_at, created_at, '-infinity'), id LIMIT 500 FOR UPDATE SKIP LOCKED)
			RETURNING id, type, booking_id, candidate_tg_id, payload_json`)
		require.NoError(b, err)
		var ids []int64
		var id, booking, candidate int64
		var typ string
		var payload []byte
		_, err = pgx.ForEachRow(rows, []any{&id, &typ, &booking, &candidate, &payload}, func() error {
			ids = append(ids, id)
			return nil
		})
		require.NoError(b, err)
		if len(ids) == 0 {
			return
		}
		_, err = db.Exec(ctx, "UPDATE outbox_notifications SET status = 'sent', sent_at = now(), locked_at = NULL WHERE id = ANY($1)", ids)
		require.NoError(b, err)
	}
}

// deliverAll has relays deliver rows and returns when the last is settled.
func deliverAll(b *testing.B, db *pgtest.DB, rows int64, relays int, cfg relay.Config) {
	ctx, cancel := context.WithCancel(b.Context())
	q := &countingQueue{PGStore: db.Store, done: cancel}
	q.left.Store(rows)
	var sent atomic.Int64
	var wg sync.WaitGroup
	for range relays {
		r := newRelay(b, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			sent.Add(1)
			return "", nil
		}), cfg)
		wg.Go(func() {
			if err := r.Run(ctx); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	require.Equal(b, rows, sent.Load())
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
	if q.left.Add(-settled) <= 0 {
		q.done()
	}
	return res, err
}

// BenchmarkLatency measures the time from the return of a commit to Send, at 100
// transactions a second, with polling alone and with NOTIFY.
func BenchmarkLatency(b *testing.B) {
	for _, c := range []struct {
		name string
		cfg  relay.Config
	}{
		{"polling", relay.Config{}},
		{"notify", relay.Config{Listen: true}},
		{"polling_now_and_then", relay.Config{}},
		{"notify_now_and_then", relay.Config{Listen: true}},
	} {
		b.Run(c.name, func(b *testing.B) {
			db := pgtest.NewDB(b)
			store, err := outbox.NewPGStore(db.Pool, outbox.Config{Notify: c.cfg.Listen, Logger: discard})
			require.NoError(b, err)
			var sent sync.Map // when, by booking
			r := newRelay(b, store, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
				sent.Store(n.BookingID, time.Now())
				return "", nil
			}), c.cfg)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error, 1)
			go func() { done <- r.Run(ctx) }()

			every := 10 * time.Millisecond
			if c.name[len(c.name)-4:] == "then" {
				every = 3 * time.Second
			}
			var committed []time.Time
			ticker := time.NewTicker(every)
			defer ticker.Stop()
			for b.Loop() {
				<-ticker.C
				require.NoError(b, pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
					_, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "reject", BookingID: int64(len(committed) + 1)})
					return err
				}))
				committed = append(committed, time.Now())
			}
			took := make([]float64, len(committed))
			for i, at := range committed {
				var when any
				require.Eventually(b, func() (ok bool) {
					when, ok = sent.Load(int64(i + 1))
					return ok
				}, time.Minute, time.Millisecond)
				took[i] = float64(when.(time.Time).Sub(at).Microseconds()) / 1000
			}
			cancel()
			require.NoError(b, <-done)
			slices.Sort(took)
			b.ReportMetric(took[len(took)/2], "p50_ms")
			b.ReportMetric(took[len(took)*99/100], "p99_ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
