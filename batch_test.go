package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

func TestAddNotifications(t *testing.T) {
	t.Parallel()

	t.Run("answers_in_the_order_given", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, outbox.NewNotification{Type: "m", BookingID: 500})
		db.Add(t, outbox.NewNotification{Type: "m", BookingID: 501})
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent' WHERE booking_id = 501")
		var ns []outbox.NewNotification
		for i := range 3000 {
			n := outbox.NewNotification{Type: "m", BookingID: int64(i + 1), Payload: i}
			switch i % 5 {
			case 1:
				n.BookingID, n.CandidateTgID = 0, int64(i+1)
			case 2:
				n.CandidateTgID = -int64(i + 1)
			case 3:
				n.Type, n.BookingID = fmt.Sprint("m", i), 0
			}
			ns = append(ns, n)
		}
		rand.Shuffle(len(ns), func(i, j int) { ns[i], ns[j] = ns[j], ns[i] })
		for pass, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
			results := db.AddMany(t, ns...)
			require.Len(t, results, len(ns))
			for i, res := range results {
				require.Equal(t, ns[i].Key(), res.Notification.Key())
				switch {
				case ns[i].Key() == outbox.Key{Type: "m", BookingID: 501}:
					require.Equal(t, outbox.OutcomeExisting, res.Outcome)
				case ns[i].Key() == outbox.Key{Type: "m", BookingID: 500}:
					require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
				default:
					require.Equal(t, want, res.Outcome, "pass %d", pass)
					require.JSONEq(t, fmt.Sprint(ns[i].Payload), string(res.Notification.Payload))
				}
			}
		}
		require.Equal(t, 3000, db.Count(t))
	})

	t.Run("takes_an_empty_slice", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		require.Empty(t, db.AddMany(t))
	})

	t.Run("is_rolled_back_as_a_whole", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "a"}, {Type: "b"}})
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Zero(t, db.Count(t))
	})

	// A batch leaves what single calls in the same order leave, and says so.
	t.Run("folds_a_key_given_twice_as_two_calls_would", func(t *testing.T) {
		t.Parallel()
		db, singly := pgtest.NewDB(t), pgtest.NewDB(t)
		at := time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
		payloads := []any{nil, nil, json.RawMessage(`{"a":1}`), json.RawMessage(`{ "a": 1.0 }`), json.RawMessage(`{"a":2}`), json.RawMessage(`[]`)}
		recruiters := []int64{0, 0, 1, 2}
		for round := range 150 {
			r := rand.New(rand.NewPCG(uint64(round), 1))
			key := outbox.NewNotification{Type: "fold", BookingID: int64(round + 1)}
			start := r.IntN(5)
			for _, d := range []*pgtest.DB{db, singly} {
				if start == 0 {
					continue // a new key
				}
				n := key
				n.Payload, n.RecruiterTgID = payloads[round%len(payloads)], recruiters[round%len(recruiters)]
				id := d.Add(t, n).Notification.ID
				switch start {
				case 1:
					lease(t, d, id, "1 hour")
				case 2:
					d.MustExec(t, "UPDATE outbox_notifications SET status = 'sent' WHERE id = $1", id)
				case 3:
					d.MustExec(t, "UPDATE outbox_notifications SET attempts = 2, locked_at = now() WHERE id = $1", id)
				}
			}
			var ns []outbox.NewNotification
			for range 1 + r.IntN(4) {
				n := key
				n.Payload, n.RecruiterTgID = payloads[r.IntN(len(payloads))], recruiters[r.IntN(len(recruiters))]
				if r.IntN(3) == 0 {
					n.CorrelationID = fmt.Sprint("c", r.IntN(3))
				}
				if r.IntN(3) == 0 {
					n.NotBefore = at.Add(time.Duration(r.IntN(3)) * time.Hour)
				}
				if r.IntN(3) == 0 {
					n.NotAfter = at.Add(time.Duration(3+r.IntN(3)) * time.Hour)
				}
				ns = append(ns, n)
			}
			got := db.AddMany(t, ns...)
			var want []outbox.AddResult
			for _, n := range ns {
				want = append(want, singly.Add(t, n))
			}
			for i := range ns {
				require.Equal(t, want[i].Outcome, got[i].Outcome, "round %d", round)
				require.Equal(t, want[i].InFlight, got[i].InFlight, "round %d", round)
				requireSameContent(t, want[len(want)-1].Notification, got[i].Notification, fmt.Sprintf("round %d: %+v", round, ns))
			}
		}
	})

	t.Run("opposite_orders_do_not_deadlock", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		var ns []outbox.NewNotification
		for i := range 60 {
			ns = append(ns, outbox.NewNotification{Type: "a", BookingID: int64(i)}, outbox.NewNotification{Type: "b", CandidateTgID: int64(i)},
				outbox.NewNotification{Type: "c", BookingID: int64(i + 1), CandidateTgID: int64(i)})
		}
		backwards := slices.Clone(ns)
		slices.Reverse(backwards)
		ctx := t.Context()
		for round := range 30 {
			// Half of the keys are there, so that batches lock rows and insert others;
			// then all are.
			if round%2 == 0 {
				db.MustExec(t, "DELETE FROM outbox_notifications WHERE id % 2 = 0")
			}
			var waits []<-chan pgtest.Result[any]
			for worker := range 6 {
				waits = append(waits, pgtest.Later(func() (any, error) {
					return nil, pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
						batch := ns
						if worker%2 == 0 {
							batch = backwards
						}
						if worker == 5 {
							batch = batch[10:100]
						}
						_, err := db.Store.AddNotifications(ctx, tx, batch)
						return err
					})
				}))
			}
			for _, c := range waits {
				_, err := pgtest.Await(t, c)
				require.NoError(t, err)
			}
			if round%2 == 1 {
				require.Equal(t, len(ns), db.Count(t))
			}
		}
	})

	t.Run("locks_a_rivals_new_row_in_its_turn", func(t *testing.T) {
		// The rival's row is not in the batch's snapshot. Once the batch has passed it,
		// it holds it: the rival's successor waits for the batch.
		t.Parallel()
		db := pgtest.NewDB(t)
		batch := []outbox.NewNotification{{Type: "a"}, {Type: "b"}, {Type: "c"}}
		rivalOnA, rivalOnC, mine := db.MustBegin(t), db.MustBegin(t), db.MustBegin(t)
		for tx, n := range map[pgx.Tx]outbox.NewNotification{rivalOnA: batch[0], rivalOnC: batch[2]} {
			_, err := db.Store.AddNotification(t.Context(), tx, n)
			require.NoError(t, err)
		}
		ctx := t.Context()
		c := pgtest.Later(func() ([]outbox.AddResult, error) { return db.Store.AddNotifications(ctx, mine, batch) })
		db.WaitBlocked(t, 1)
		require.NoError(t, rivalOnA.Commit(t.Context()))
		waitsFor(t, db, mine, rivalOnC)

		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "SET lock_timeout = '10ms'")
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), tx, batch[0])
		require.Equal(t, "55P03", sqlState(t, err), "a row that the batch has passed is free")

		require.NoError(t, rivalOnC.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, []outbox.Outcome{outbox.OutcomeRefreshed, outbox.OutcomeCreated, outbox.OutcomeRefreshed},
			[]outbox.Outcome{res[0].Outcome, res[1].Outcome, res[2].Outcome})
	})

	t.Run("refuses_more_payload_than_a_message_can_hold", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		payload := json.RawMessage(`"` + string(slices.Repeat([]byte("a"), 1<<20-2)) + `"`)
		ns := make([]outbox.NewNotification, 65)
		for i := range ns {
			ns[i] = outbox.NewNotification{Type: "big", BookingID: int64(i + 1), Payload: payload}
		}
		_, err := db.Store.AddNotifications(t.Context(), db.MustBegin(t), ns)
		requireInvalid(t, err, "Payload", 64, "batch")
	})
}

// waitsFor waits until tx waits for a lock that holder has.
func waitsFor(t *testing.T, db *pgtest.DB, tx, holder pgx.Tx) {
	t.Helper()
	require.Eventually(t, func() bool {
		return pgtest.One[bool](t, db, "SELECT $2::int = ANY (pg_blocking_pids($1::int))", tx.Conn().PgConn().PID(), holder.Conn().PgConn().PID())
	}, 30*time.Second, time.Millisecond)
}

// requireSameContent compares rows of two databases, payloads as jsonb.
func requireSameContent(t testing.TB, want, got outbox.Notification, what string) {
	t.Helper()
	if want.Payload != nil && got.Payload != nil {
		require.JSONEq(t, string(want.Payload), string(got.Payload), what)
		want.Payload, got.Payload = nil, nil
	}
	require.Equal(t, want.LockedAt.IsZero(), got.LockedAt.IsZero(), what)
	want.ID, want.CreatedAt, want.LockedAt = got.ID, got.CreatedAt, got.LockedAt
	require.Equal(t, want, got, what)
}

func TestRunInTx(t *testing.T) {
	t.Parallel()
	level := pgx.TxOptions{IsoLevel: pgx.Serializable}

	t.Run("commits_what_rivals_under_SERIALIZABLE_add", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		ctx := t.Context()
		var waits []<-chan pgtest.Result[outbox.Outcome]
		for i := range 8 {
			waits = append(waits, pgtest.Later(func() (outcome outbox.Outcome, err error) {
				err = outbox.RunInTx(ctx, db.Pool, level, func(tx pgx.Tx) error {
					n := rejected
					n.Payload = i
					res, err := db.Store.AddNotification(ctx, tx, n)
					outcome = res.Outcome
					return err
				})
				return outcome, err
			}))
		}
		created := 0
		for _, c := range waits {
			outcome, err := pgtest.Await(t, c)
			require.NoError(t, err)
			if outcome == outbox.OutcomeCreated {
				created++
			}
		}
		require.Equal(t, 1, created)
		require.EqualValues(t, 8, db.Get(t, rejected.Key()).Version)
	})

	serializationFailure := func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE serialization_failure; END $$")
		return fmt.Errorf("wrapped: %w", err)
	}

	t.Run("gives_up_after_ten_runs", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		runs := 0
		err := outbox.RunInTx(t.Context(), db.Pool, level, func(tx pgx.Tx) error {
			runs++
			return serializationFailure(t.Context(), tx)
		})
		require.Equal(t, 10, runs)
		require.ErrorContains(t, err, "outbox: the transaction failed 10 times")
		require.True(t, outbox.IsRetryable(err))
	})

	t.Run("runs_nothing_again_that_is_not_retryable", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		for _, sql := range []string{"SELECT 1/0", "DO $$ BEGIN RAISE unique_violation; END $$", "DO $$ BEGIN RAISE lock_not_available; END $$"} {
			runs := 0
			err := outbox.RunInTx(t.Context(), db.Pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
				runs++
				_, err := db.Store.AddNotification(t.Context(), tx, rejected)
				require.NoError(t, err)
				_, err = tx.Exec(t.Context(), sql)
				return err
			})
			require.Error(t, err)
			require.Equal(t, 1, runs)
			require.Zero(t, db.Count(t))
		}
	})

	t.Run("runs_a_failed_commit_again", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, `CREATE TABLE once (runs int); INSERT INTO once VALUES (0);
			CREATE SEQUENCE runs;
			CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF nextval('runs') < 3 THEN RAISE serialization_failure; END IF; RETURN NULL; END $$;
			CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON outbox_notifications DEFERRABLE INITIALLY DEFERRED
				FOR EACH ROW EXECUTE FUNCTION refuse()`)
		runs := 0
		require.NoError(t, outbox.RunInTx(t.Context(), db.Pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
			runs++
			_, err := db.Store.AddNotification(t.Context(), tx, rejected)
			return err
		}))
		require.Equal(t, 3, runs)
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("stops_when_its_context_ends", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		ctx, cancel := context.WithCancel(t.Context())
		runs := 0
		err := outbox.RunInTx(ctx, db.Pool, level, func(tx pgx.Tx) error {
			runs++
			err := serializationFailure(t.Context(), tx)
			cancel()
			return err
		})
		require.Equal(t, 1, runs)
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, "40001", sqlState(t, err))
		require.False(t, outbox.IsRetryable(err), "nothing is to be run again")
	})

	t.Run("rolls_back_a_panic", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		require.PanicsWithValue(t, "boom", func() {
			_ = outbox.RunInTx(t.Context(), db.Pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
				_, err := db.Store.AddNotification(t.Context(), tx, rejected)
				require.NoError(t, err)
				panic("boom")
			})
		})
		require.Zero(t, db.Count(t))
		require.Zero(t, db.Stat().AcquiredConns())
	})

	t.Run("refuses_nothing_to_run", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		requireInvalid(t, outbox.RunInTx(t.Context(), nil, level, func(pgx.Tx) error { return nil }), "pool", -1, "nil pool")
		requireInvalid(t, outbox.RunInTx(t.Context(), db.Pool, level, nil), "fn", -1, "nil fn")
	})
}
