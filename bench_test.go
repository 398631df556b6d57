package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// BenchmarkAdd compares transactions that insert a business row and add a
// notification with such that run a bare statement in its place, in turns of 50 ms.
// It reports the median of the turns' ratios; 1 is as fast as the bare statement.
//
// The test server does not wait for its disk, so what the statements themselves
// cost weighs more here than in production.
func BenchmarkAdd(b *testing.B) {
	const (
		bareInsert = `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, payload_json)
			VALUES ($1, $2, $3, $4::text::json) ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING`
		bareUpdate = `UPDATE outbox_notifications SET payload_json = $4::text::json WHERE type = $1 AND booking_id = $2 AND candidate_tg_id = $3`
		bareSelect = `SELECT id, status FROM outbox_notifications WHERE type = $1 AND booking_id = $2 AND candidate_tg_id = $3 AND $4::text IS NOT NULL`
	)
	const rows = 10_000
	for _, c := range []struct {
		name, floor, status string
		next                func(i int64) (booking int64)
	}{
		{"new_vs_insert", bareInsert, "", func(i int64) int64 { return 1_000_000 + i }},
		{"pending_vs_update", bareUpdate, "pending", func(i int64) int64 { return 1 + i%rows }},
		{"settled_vs_select", bareSelect, "sent", func(i int64) int64 { return 1 + i%rows }},
	} {
		for _, conns := range []int{1, 8} {
			b.Run(fmt.Sprintf("%s/conns=%d", c.name, conns), func(b *testing.B) {
				db := pgtest.NewDB(b)
				db.MustExec(b, "CREATE TABLE business (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text)")
				if c.status != "" {
					db.MustExec(b, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, payload_json, status)
						SELECT 'reject', i, i, '{"slot":0}', $1 FROM generate_series(1, $2) i`, c.status, rows)
				}
				db.MustExec(b, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status)
					SELECT 'other', i, i, 'sent' FROM generate_series(1, $1) i`, rows)
				db.MustExec(b, "VACUUM ANALYZE") // not of an empty table: for one, scanning it is a good plan
				pool := pgtest.NewPool(b, db.URL, func(cfg *pgxpool.Config) { cfg.MaxConns = int32(conns) })
				var n atomic.Int64
				run := func(work func(ctx context.Context, tx pgx.Tx, booking int64, payload string) error) float64 {
					var done atomic.Int64
					var wg sync.WaitGroup
					start := time.Now()
					for range conns {
						wg.Go(func() {
							for time.Since(start) < 50*time.Millisecond {
								i := n.Add(1)
								err := pgx.BeginFunc(b.Context(), pool, func(tx pgx.Tx) error {
									if _, err := tx.Exec(b.Context(), "INSERT INTO business (note) VALUES ($1)", "x"); err != nil {
										return err
									}
									return work(b.Context(), tx, c.next(i), fmt.Sprintf(`{"slot":%d}`, i))
								})
								if err != nil {
									b.Error(err)
									return
								}
								done.Add(1)
							}
						})
					}
					wg.Wait()
					return float64(done.Load()) / time.Since(start).Seconds()
				}
				bare := func(ctx context.Context, tx pgx.Tx, booking int64, payload string) error {
					_, err := tx.Exec(ctx, c.floor, "reject", booking, booking, payload)
					return err
				}
				add := func(ctx context.Context, tx pgx.Tx, booking int64, payload string) error {
					_, err := db.Store.AddNotification(ctx, tx, outbox.NewNotification{
						Type: "reject", BookingID: booking, CandidateTgID: booking, Payload: json.RawMessage(payload)})
					return err
				}
				run(bare)
				run(add) // both are prepared
				var floors, adds, ratios []float64
				for b.Loop() {
					f, a := run(bare), run(add)
					floors, adds, ratios = append(floors, f), append(adds, a), append(ratios, a/f)
				}
				require.NotEmpty(b, ratios)
				b.ReportMetric(median(floors), "bare_tx/s")
				b.ReportMetric(median(adds), "add_tx/s")
				b.ReportMetric(median(ratios), "ratio")
				b.ReportMetric(0, "ns/op") // a turn is of a fixed length
			})
		}
	}
}

// BenchmarkAddMany compares transactions that insert a business row and add 1,000
// notifications in one batch with such that insert 1,000 new rows by one bare
// statement in its place, turn by turn. It reports the median of the turns' ratios; 1
// is as fast as the bare insert of new rows, also where the batch repeats keys that are
// there. Marshalling the payloads, of some 200 bytes, is part of both.
func BenchmarkAddMany(b *testing.B) {
	const (
		rows, size = 100_000, 1000
		bareInsert = `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id)
			SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::json[], $6::text[])
			ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING RETURNING id`
	)
	type moved struct {
		Text    string    `json:"text"`
		Slot    time.Time `json:"slot"`
		Contact string    `json:"contact"`
		Vacancy string    `json:"vacancy"`
		Link    string    `json:"link"`
		Number  int       `json:"number"`
	}
	number := 0
	batch := func(first int) []outbox.NewNotification {
		number++
		ns := make([]outbox.NewNotification, size)
		for i := range ns {
			ns[i] = outbox.NewNotification{
				Type: "moved", BookingID: int64(first + i), CandidateTgID: int64(first + i), RecruiterTgID: 77, CorrelationID: "req-1",
				Payload: moved{"Your interview has been moved to another time", time.Date(2031, 5, 6, 10, i%60, 0, 0, time.UTC),
					"Anna Petrova", "Backend developer (Go)", "https://jobs.example/b/10042", number},
			}
		}
		return ns
	}
	bare := func(ctx context.Context, tx pgx.Tx, ns []outbox.NewNotification) error {
		types, payloads, correlations := make([]string, size), make([]string, size), make([]string, size)
		bookings, candidates, recruiters := make([]int64, size), make([]int64, size), make([]int64, size)
		for i, n := range ns {
			payload, err := json.Marshal(n.Payload)
			if err != nil {
				return err
			}
			types[i], payloads[i], correlations[i] = n.Type, string(payload), n.CorrelationID
			bookings[i], candidates[i], recruiters[i] = n.BookingID, n.CandidateTgID, n.RecruiterTgID
		}
		added, err := tx.Query(ctx, bareInsert, types, bookings, candidates, recruiters, payloads, correlations)
		if err != nil {
			return err
		}
		_, err = pgx.CollectRows(added, pgx.RowTo[int64])
		return err
	}
	for _, c := range []struct {
		name string
		keys func(turn int) (first int)
	}{
		{"new_vs_insert", func(turn int) int { return 10_000_000 + (2*turn+1)*size }},
		{"pending_vs_insert", func(turn int) int { return 1 + turn*size%rows }},
	} {
		b.Run(c.name, func(b *testing.B) {
			db := pgtest.NewDB(b)
			db.MustExec(b, "CREATE TABLE business (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text)")
			for first := 1; first <= rows; first += size {
				db.AddMany(b, batch(first)...)
			}
			db.MustExec(b, "VACUUM ANALYZE")
			turn := 0
			run := func(first int, add func(context.Context, pgx.Tx, []outbox.NewNotification) error) float64 {
				ns := batch(first)
				start := time.Now()
				require.NoError(b, pgx.BeginFunc(b.Context(), db.Pool, func(tx pgx.Tx) error {
					if _, err := tx.Exec(b.Context(), "INSERT INTO business (note) VALUES ($1)", "x"); err != nil {
						return err
					}
					return add(b.Context(), tx, ns)
				}))
				return time.Since(start).Seconds()
			}
			add := func(ctx context.Context, tx pgx.Tx, ns []outbox.NewNotification) error {
				_, err := db.Store.AddNotifications(ctx, tx, ns)
				return err
			}
			both := func() (floor, added float64) {
				turn++ // new keys of both are the last of the index at their time
				return run(10_000_000+2*turn*size, bare), run(c.keys(turn), add)
			}
			for range 6 {
				both() // all is prepared, with the plans that stay
			}
			var floors, adds, ratios []float64
			for b.Loop() {
				f, a := both()
				floors, adds, ratios = append(floors, f*1e6), append(adds, a*1e6), append(ratios, f/a)
			}
			b.ReportMetric(median(floors), "bare_us")
			b.ReportMetric(median(adds), "add_us")
			b.ReportMetric(median(ratios), "ratio")
			b.ReportMetric(0, "ns/op") // it is that of both together
		})
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
