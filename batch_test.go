package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

func TestAddNotifications(t *testing.T) {
	t.Parallel()
	testAddNotifications(t, 0)
}

func testAddNotifications(t *testing.T, guess int) {
	newDB := guessing(pgtest.NewDB, guess)

	t.Run("answers_in_the_order_given", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
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
		db := newDB(t)
		require.Empty(t, db.AddMany(t))
	})

	t.Run("is_rolled_back_as_a_whole", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "a"}, {Type: "b"}})
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Zero(t, db.Count(t))
	})

	// A batch leaves what single calls in the same order leave, and says so.
	t.Run("folds_a_key_given_twice_as_two_calls_would", func(t *testing.T) {
		t.Parallel()
		db, singly := newDB(t), newDB(t)
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

	// Fails when a guess for one shape of key is put right after the next shape is locked.
	t.Run("does_not_deadlock_with_one_that_guesses_otherwise", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		guessing, err := outbox.NewPGStore(db.Pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		guessing.AlwaysGuess(1)
		ns := []outbox.NewNotification{{Type: "a", BookingID: 1, CandidateTgID: 1}, {Type: "a", BookingID: 1}, {Type: "a", CandidateTgID: 1}, {Type: "a"}}
		for round := range 12 {
			db.MustExec(t, "DELETE FROM outbox_notifications")
			db.Add(t, ns[round%len(ns)])
			var wg sync.WaitGroup
			for worker := range 6 {
				store := []*outbox.PGStore{db.Store, guessing}[worker%2]
				wg.Go(func() {
					assert.NoError(t, pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) error {
						_, err := store.AddNotifications(t.Context(), tx, ns)
						return err
					}))
				})
			}
			wg.Wait()
		}
	})

	t.Run("opposite_orders_do_not_deadlock", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
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
		db := newDB(t)
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

	// Fails when refresh is read as a whole before created inserts (UNION ALL begins with
	// FROM refreshed), and when the insert does nothing on a conflict.
	t.Run("locks_a_row_or_inserts_it_before_it_looks_at_the_next", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		batch := []outbox.NewNotification{{Type: "k", BookingID: 1}, {Type: "k", BookingID: 2}, {Type: "k", BookingID: 3}, {Type: "k", BookingID: 4}}
		db.AddMany(t, batch[0], batch[2])
		rivalOn1, rivalOn3, mine := db.MustBegin(t), db.MustBegin(t), db.MustBegin(t)
		for tx, n := range map[pgx.Tx]outbox.NewNotification{rivalOn1: batch[0], rivalOn3: batch[2]} {
			_, err := db.Store.AddNotification(t.Context(), tx, n)
			require.NoError(t, err)
		}
		taken := func(n outbox.NewNotification) bool {
			tx := db.MustBegin(t)
			_, err := tx.Exec(t.Context(), "SET LOCAL lock_timeout = '10ms'")
			require.NoError(t, err)
			_, err = db.Store.AddNotification(t.Context(), tx, n)
			require.NoError(t, tx.Rollback(t.Context()))
			if err != nil {
				require.Equal(t, "55P03", sqlState(t, err))
			}
			return err != nil
		}
		ctx := t.Context()
		c := pgtest.Later(func() ([]outbox.AddResult, error) { return db.Store.AddNotifications(ctx, mine, batch) })
		waitsFor(t, db, mine, rivalOn1)
		require.False(t, taken(batch[1]), "inserted before the one before it was locked")
		require.NoError(t, rivalOn1.Commit(t.Context()))
		waitsFor(t, db, mine, rivalOn3)
		require.True(t, taken(batch[0]))
		require.True(t, taken(batch[1]), "not inserted before the next one was looked at")
		require.False(t, taken(batch[3]))
		require.NoError(t, rivalOn3.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		for i, want := range []outbox.Outcome{outbox.OutcomeRefreshed, outbox.OutcomeCreated, outbox.OutcomeRefreshed, outbox.OutcomeCreated} {
			require.Equal(t, want, res[i].Outcome, i)
		}
	})

	// Fails when created inserts found keys as well.
	t.Run("finds_a_key_anywhere_in_a_batch", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		number := int64(0)
		for name, key := range map[string]func(n *outbox.NewNotification, i int64){
			"both":      func(n *outbox.NewNotification, i int64) { n.BookingID, n.CandidateTgID = 7, i },
			"bookings":  func(n *outbox.NewNotification, i int64) { n.BookingID, n.CandidateTgID = i, -i },
			"booking":   func(n *outbox.NewNotification, i int64) { n.BookingID = i },
			"candidate": func(n *outbox.NewNotification, i int64) { n.CandidateTgID = i },
			"types":     func(n *outbox.NewNotification, i int64) { n.Type += itoa(int(i)) },
			"several":   func(n *outbox.NewNotification, i int64) { n.Type, n.BookingID = n.Type+itoa(int(i%2)), 1000-i },
		} {
			for _, there := range [][]int{{0}, {4}, {9}, {0, 9}, {}, {3, 4, 5}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}} {
				number += 100
				ns := make([]outbox.NewNotification, 10)
				for i := range ns {
					ns[i] = outbox.NewNotification{Type: name, Payload: number, RecruiterTgID: 5}
					key(&ns[i], number+int64(i))
				}
				for _, i := range there {
					db.Add(t, ns[i])
				}
				last := pgtest.One[int64](t, db, "SELECT last_value FROM outbox_notifications_id_seq")
				for i, res := range db.AddMany(t, ns...) {
					want := outbox.OutcomeCreated
					if slices.Contains(there, i) {
						want = outbox.OutcomeRefreshed
					}
					require.Equal(t, want, res.Outcome, "%s: %d of %v", name, i, there)
					require.Equal(t, db.Get(t, ns[i].Key()), res.Notification)
				}
				drawn := pgtest.One[int64](t, db, "SELECT last_value FROM outbox_notifications_id_seq") - last
				require.LessOrEqual(t, drawn, int64(len(ns)-len(there)), "%s: %v", name, there)
			}
		}
	})

	// Fails when asGivenSQL does not mind triggers, precisions, defaults or the isolation
	// level, and when freshColumns leaves out sent_version.
	t.Run("returns_the_row_as_it_is_and_not_as_it_was_given", func(t *testing.T) {
		t.Parallel()
		at := time.Date(2031, 1, 1, 0, 0, 0, 654321000, time.UTC)
		for name, alter := range map[string]string{
			"plain": "SELECT",
			"trigger": `CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.recruiter_tg_id = 6; NEW.payload_json = '[]';
				NEW.correlation_id = 'c'; NEW.attempts = 3; NEW.not_after = NULL; NEW.version = 9; RETURN NEW; END $$;
				CREATE TRIGGER meddle BEFORE INSERT ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION meddle()`,
			"precision": "ALTER TABLE outbox_notifications ALTER next_retry_at TYPE timestamptz(3), ALTER not_after TYPE timestamptz(0), ALTER created_at TYPE timestamptz(0)",
			"not after": "ALTER TABLE outbox_notifications ALTER not_after TYPE timestamptz(0)",
			"default":   "ALTER TABLE outbox_notifications ALTER sent_version SET DEFAULT 4, ALTER last_error SET DEFAULT 'none'",
		} {
			for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead} {
				db := newDB(t)
				for pass := range 2 {
					if pass == 0 && name != "trigger" {
						continue // pgx's prepared statements do not survive such a change
					}
					tx := pgtest.Begin(t, db.Pool, pgx.TxOptions{IsoLevel: level})
					pgtest.One[int](t, tx, "SELECT count(*) FROM outbox_migrations") // takes the snapshot
					if pass == 1 {
						db.MustExec(t, alter)
					}
					ns := make([]outbox.NewNotification, 61) // enough for given columns to be left out, and one twice
					for i := range ns {
						ns[i] = outbox.NewNotification{Type: "given", BookingID: int64(100*pass + i%60 + 1), RecruiterTgID: 5, Payload: "p", CorrelationID: "x",
							NotBefore: at, NotAfter: at.Add(time.Hour)}
					}
					res, err := db.Store.AddNotifications(t.Context(), tx, ns)
					require.NoError(t, err)
					require.NoError(t, tx.Commit(t.Context()))
					require.Equal(t, outbox.OutcomeRefreshed, res[60].Outcome)
					for i, n := range ns[:60] {
						require.Equal(t, outbox.AddResult{Notification: db.Get(t, n.Key()), Outcome: outbox.OutcomeCreated}, res[i], "%s, %s", name, level)
					}
				}
			}
		}
	})

	// Fails when encodePayload does not copy raw JSON.
	t.Run("keeps_nothing_of_the_callers_memory", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		raw := json.RawMessage(`{"a":1}`)
		ns := make([]outbox.NewNotification, 60)
		for i := range ns {
			ns[i] = outbox.NewNotification{Type: "raw", BookingID: int64(i + 1), Payload: raw}
			if i%2 == 0 {
				ns[i].Payload = &raw
			}
		}
		res := db.AddMany(t, ns...)
		copy(raw, `{"b":2}`)
		for _, r := range res {
			require.Equal(t, `{"a":1}`, string(r.Notification.Payload))
		}
	})

	t.Run("refuses_more_payload_than_a_message_can_hold", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
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
