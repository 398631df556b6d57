package outbox_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// sqlState returns the code of the PgError that err must have in it.
func sqlState(t testing.TB, err error) string {
	t.Helper()
	var pg *pgconn.PgError
	require.ErrorAs(t, err, &pg)
	return pg.Code
}

// laterAdd adds in tx on another goroutine.
func laterAdd(t testing.TB, db *pgtest.DB, tx pgx.Tx, n outbox.NewNotification) <-chan pgtest.Result[outbox.AddResult] {
	ctx := t.Context()
	return pgtest.Later(func() (outbox.AddResult, error) { return db.Store.AddNotification(ctx, tx, n) })
}

func TestRivals(t *testing.T) {
	t.Parallel()
	testRivals(t, 0)
}

func testRivals(t *testing.T, guess int) {
	newDB := guessing(pgtest.NewDB, guess)

	t.Run("that_commits_leaves_its_row_to_be_refreshed", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		theirs, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		changed := rejected
		changed.Payload = "mine"
		c := laterAdd(t, db, mine, changed)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		require.Equal(t, theirs.Notification.ID, res.Notification.ID)
		require.EqualValues(t, 2, res.Notification.Version)
		require.NoError(t, mine.Commit(t.Context()))
		require.JSONEq(t, `"mine"`, string(db.Get(t, rejected.Key()).Payload))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("that_commits_a_settled_row_leaves_it_existing", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := rival.Exec(t.Context(), "INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status) VALUES ('reject', 7, 42, 'sent')")
		require.NoError(t, err)
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeExisting, res.Outcome)
		require.NoError(t, mine.Commit(t.Context()))
	})

	t.Run("that_rolls_back_leaves_the_key_to_us", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Rollback(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NoError(t, mine.Commit(t.Context()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("that_dies_leaves_the_key_to_us", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.True(t, pgtest.One[bool](t, db, "SELECT pg_terminate_backend($1::int)", rival.Conn().PgConn().PID()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NoError(t, mine.Commit(t.Context()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("that_settles_the_row_is_waited_for", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		db.Add(t, rejected)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := rival.Exec(t.Context(), "UPDATE outbox_notifications SET status = 'sent', receipt = 'tg:1', sent_version = 1")
		require.NoError(t, err)
		changed := rejected
		changed.Payload = "too late"
		c := laterAdd(t, db, mine, changed)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeExisting, res.Outcome)
		require.Equal(t, "tg:1", res.Notification.Receipt)
		require.EqualValues(t, 1, res.Notification.Version)
	})

	t.Run("that_refreshes_the_row_is_waited_for_and_built_upon", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		db.Add(t, rejected)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		first, second := rejected, outbox.NewNotification{Type: "reject", BookingID: 7, CandidateTgID: 42, RecruiterTgID: 5}
		first.Payload = "first"
		_, err := db.Store.AddNotification(t.Context(), rival, first)
		require.NoError(t, err)
		c := laterAdd(t, db, mine, second)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.EqualValues(t, 3, res.Notification.Version)
		require.JSONEq(t, `"first"`, string(res.Notification.Payload))
		require.EqualValues(t, 5, res.Notification.RecruiterTgID)
	})

	t.Run("is_kept_waiting_by_a_settled_row_that_was_returned", func(t *testing.T) {
		// What the caller was told holds until it commits: FOR UPDATE whatever the status.
		t.Parallel()
		db := newDB(t)
		db.Add(t, rejected)
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		for _, add := range []func(pgx.Tx) error{
			func(tx pgx.Tx) error { _, err := db.Store.AddNotification(t.Context(), tx, rejected); return err },
			func(tx pgx.Tx) error {
				_, err := db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{rejected})
				return err
			},
		} {
			mine := db.MustBegin(t)
			require.NoError(t, add(mine))
			ctx := t.Context()
			c := pgtest.Later(func() (pgconn.CommandTag, error) {
				return db.Exec(ctx, "UPDATE outbox_notifications SET status = 'sent'")
			})
			db.WaitBlocked(t, 1)
			require.NoError(t, mine.Commit(t.Context()))
			_, err := pgtest.Await(t, c)
			require.NoError(t, err)
		}
	})

	t.Run("that_purges_the_row_leaves_the_key_to_us", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		old := db.Add(t, rejected).Notification.ID
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := rival.Exec(t.Context(), "DELETE FROM outbox_notifications")
		require.NoError(t, err)
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NotEqual(t, old, res.Notification.ID)
		require.NoError(t, mine.Commit(t.Context()))
	})

	t.Run("that_creates_and_purges_the_row_between_our_looks", func(t *testing.T) {
		// Our first statement waits for the rival's insert and does nothing; before
		// our second one the row is gone again.
		t.Parallel()
		db := newDB(t)
		gate := newGatedDB(t, db)
		rival := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		mine := pgtest.Begin(t, gate.pool, pgx.TxOptions{})
		second := 2
		if guess > 1 {
			second = 3 // the guess neither waits for a rival's insert nor sees it
		}
		gate.before(second, func() {
			_, err := db.Exec(context.Background(), "DELETE FROM outbox_notifications")
			require.NoError(t, err)
		})
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NoError(t, mine.Commit(t.Context()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("that_purges_and_creates_anew_is_refreshed", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		db.Add(t, rejected)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := rival.Exec(t.Context(), "DELETE FROM outbox_notifications")
		require.NoError(t, err)
		theirs, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		c := laterAdd(t, db, mine, rejected)
		db.WaitBlocked(t, 1)
		require.NoError(t, rival.Commit(t.Context()))
		res, err := pgtest.Await(t, c)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		require.Equal(t, theirs.Notification.ID, res.Notification.ID)
	})

	for _, rivals := range []int{2, 32} {
		t.Run(fmt.Sprintf("%d_on_the_same_new_keys_end_in_one_row_each", rivals), func(t *testing.T) {
			t.Parallel()
			db := newDB(t)
			const keys = 20
			created := make([]int, keys)
			var mu sync.Mutex
			for key := range keys {
				var wg sync.WaitGroup
				for r := range rivals {
					wg.Go(func() {
						n := outbox.NewNotification{Type: "race", BookingID: int64(key + 1), Payload: r}
						if key%2 == 1 {
							n.BookingID, n.CandidateTgID = 0, int64(key)
						}
						var res outbox.AddResult
						var err error
						if r%4 == 3 {
							err = pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) error {
								many, err := db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{n})
								if err == nil {
									res = many[0]
								}
								return err
							})
						} else {
							res, err = db.TryAdd(t.Context(), n)
						}
						if err != nil {
							t.Errorf("key %d, rival %d: %v", key, r, err)
							return
						}
						if res.Outcome == outbox.OutcomeCreated {
							mu.Lock()
							created[key]++
							mu.Unlock()
						}
					})
				}
				wg.Wait()
			}
			for key, n := range created {
				require.Equal(t, 1, n, "key %d", key)
			}
			require.Equal(t, keys, db.Count(t))
		})
	}
}

// TestIsolation is the table that the README publishes.
func TestIsolation(t *testing.T) {
	t.Parallel()
	testIsolation(t, 0)
}

func testIsolation(t *testing.T, guess int) {
	newDB := guessing(pgtest.EmptiedDB, guess)
	type step func(t *testing.T, db *pgtest.DB, rival pgx.Tx)
	add := func(payload any) step {
		return func(t *testing.T, db *pgtest.DB, rival pgx.Tx) {
			n := rejected
			n.Payload = payload
			_, err := db.Store.AddNotification(t.Context(), rival, n)
			require.NoError(t, err)
		}
	}
	exec := func(sql string) step {
		return func(t *testing.T, _ *pgtest.DB, rival pgx.Tx) {
			_, err := rival.Exec(t.Context(), sql)
			require.NoError(t, err)
		}
	}
	commit := func(t *testing.T, tx pgx.Tx) { require.NoError(t, tx.Commit(t.Context())) }
	rollback := func(t *testing.T, tx pgx.Tx) { require.NoError(t, tx.Rollback(t.Context())) }
	const (
		created   = string(outbox.OutcomeCreated)
		refreshed = string(outbox.OutcomeRefreshed)
		existing  = string(outbox.OutcomeExisting)
		retry     = "40001"
	)
	for _, c := range []struct {
		name      string
		there     bool // the row is there before either begins
		rival     step
		end       func(*testing.T, pgx.Tx)
		committed string // under READ COMMITTED
		strict    string // under REPEATABLE READ and SERIALIZABLE
	}{
		{"the rival creates the row and commits", false, add("r"), commit, refreshed, retry},
		{"the rival creates the row and rolls back", false, add("r"), rollback, created, created},
		{"the rival refreshes the row and commits", true, add("r"), commit, refreshed, retry},
		{"the rival refreshes the row and rolls back", true, add("r"), rollback, refreshed, refreshed},
		{"the rival finds nothing to change and commits", true, add("mine"), commit, refreshed, refreshed},
		{"the rival settles the row and commits", true, exec("UPDATE outbox_notifications SET status = 'sent'"), commit, existing, retry},
		{"the rival settles the row and rolls back", true, exec("UPDATE outbox_notifications SET status = 'sent'"), rollback, refreshed, refreshed},
		{"the rival deletes the row and commits", true, exec("DELETE FROM outbox_notifications"), commit, created, retry},
		{"the rival deletes the row and rolls back", true, exec("DELETE FROM outbox_notifications"), rollback, refreshed, refreshed},
	} {
		for level, want := range map[pgx.TxIsoLevel]string{
			pgx.ReadCommitted: c.committed, pgx.RepeatableRead: c.strict, pgx.Serializable: c.strict,
		} {
			for _, when := range []string{"during", "before"} { // the rival ends during our add, or before it
				for _, batch := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%s/%s/batch=%v", c.name, level, when, batch), func(t *testing.T) {
						t.Parallel()
						db := newDB(t)
						mineN := rejected
						mineN.Payload = "mine"
						if c.there {
							db.Add(t, mineN)
						}
						mine := pgtest.Begin(t, db.Pool, pgx.TxOptions{IsoLevel: level})
						pgtest.One[int](t, mine, "SELECT count(*) FROM outbox_notifications") // takes the snapshot
						rival := db.MustBegin(t)
						c.rival(t, db, rival)
						ctx := t.Context()
						work := func() (outbox.AddResult, error) {
							if !batch {
								return db.Store.AddNotification(ctx, mine, mineN)
							}
							res, err := db.Store.AddNotifications(ctx, mine, []outbox.NewNotification{mineN})
							if err != nil {
								return outbox.AddResult{}, err
							}
							return res[0], nil
						}
						var pending <-chan pgtest.Result[outbox.AddResult]
						if when == "during" {
							pending = pgtest.Later(work)
							db.WaitBlocked(t, 1)
							c.end(t, rival)
						} else {
							c.end(t, rival)
							pending = pgtest.Later(work)
						}
						res, err := pgtest.Await(t, pending)
						if want == retry {
							require.Equal(t, retry, sqlState(t, err))
							require.True(t, outbox.IsRetryable(err))
							return
						}
						require.NoError(t, err)
						require.Equal(t, want, string(res.Outcome))
						commit(t, mine)
						require.Equal(t, 1, db.Count(t))
						require.Equal(t, res.Notification, db.Get(t, rejected.Key()))
					})
				}
			}
		}
	}
}

func TestWaiting(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		setting string
		code    string
		says    string
	}{
		"lock_timeout":      {"SET lock_timeout = '20ms'", "55P03", "another transaction held the row"},
		"statement_timeout": {"SET statement_timeout = '20ms'", "57014", "statement_timeout"},
	} {
		t.Run(name+"_ends_the_wait", func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			rival, mine := db.MustBegin(t), db.MustBegin(t)
			_, err := db.Store.AddNotification(t.Context(), rival, rejected)
			require.NoError(t, err)
			_, err = mine.Exec(t.Context(), c.setting)
			require.NoError(t, err)
			_, err = db.Store.AddNotification(t.Context(), mine, rejected)
			require.Equal(t, c.code, sqlState(t, err))
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, `"reject" booking 7 candidate 42`)
			require.False(t, outbox.IsRetryable(err))
		})
	}

	t.Run("ends_with_the_context", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		rival, mine := db.MustBegin(t), db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), rival, rejected)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		c := pgtest.Later(func() (outbox.AddResult, error) { return db.Store.AddNotification(ctx, mine, rejected) })
		db.WaitBlocked(t, 1)
		cancel()
		_, err = pgtest.Await(t, c)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, err, "outbox: add notification")
		require.NoError(t, rival.Commit(t.Context()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("in_a_circle_is_a_deadlock_that_can_be_retried", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		a, b := outbox.NewNotification{Type: "a"}, outbox.NewNotification{Type: "b"}
		one, two := db.MustBegin(t), db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), one, a)
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), two, b)
		require.NoError(t, err)
		c1, c2 := laterAdd(t, db, one, b), laterAdd(t, db, two, a)
		_, err1 := pgtest.Await(t, c1)
		_, err2 := pgtest.Await(t, c2)
		require.True(t, (err1 == nil) != (err2 == nil), "one of two is the victim: %v; %v", err1, err2)
		deadlock := cmp.Or(err1, err2)
		require.Equal(t, "40P01", sqlState(t, deadlock))
		require.True(t, outbox.IsRetryable(deadlock))
	})
}

func TestErrors(t *testing.T) {
	t.Parallel()
	add := func(t *testing.T, db *pgtest.DB, opts pgx.TxOptions) error {
		_, err := db.Store.AddNotification(t.Context(), pgtest.Begin(t, db.Pool, opts), rejected)
		require.Error(t, err)
		_, many := db.Store.AddNotifications(t.Context(), pgtest.Begin(t, db.Pool, opts), []outbox.NewNotification{rejected})
		require.Equal(t, sqlState(t, err), sqlState(t, many))
		require.False(t, outbox.IsRetryable(err))
		return err
	}

	t.Run("read-only_transaction", func(t *testing.T) {
		t.Parallel()
		err := add(t, pgtest.NewDB(t), pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.Equal(t, "25006", sqlState(t, err))
		require.ErrorContains(t, err, "the transaction is read-only")
	})
	t.Run("missing_table", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		err := add(t, db, pgx.TxOptions{})
		require.Equal(t, "42P01", sqlState(t, err))
		require.ErrorContains(t, err, `there is no table "public"."outbox_notifications", run Migrate first`)
		big := rejected
		big.BookingID = 1 << 40
		_, err = db.Store.AddNotification(t.Context(), db.MustBegin(t), big)
		require.Equal(t, "42P01", sqlState(t, err))
		_, err = db.Store.Get(t.Context(), rejected.Key())
		require.ErrorContains(t, err, "run Migrate first")
	})
	t.Run("table_not_migrated", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		require.ErrorContains(t, add(t, db, pgx.TxOptions{}), "is not migrated, run Migrate first")
	})
	t.Run("no_privilege", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		role := pgtest.Name("nobody")
		db.MustExec(t, "CREATE ROLE "+role)
		t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP ROLE "+role)) })
		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "SET LOCAL ROLE "+role)
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), tx, rejected)
		require.Equal(t, "42501", sqlState(t, err))
		require.ErrorContains(t, err, "the database role may not do this")
		require.NoError(t, tx.Rollback(t.Context()))
	})
	t.Run("aborted_transaction", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "SELECT 1/0")
		require.Error(t, err)
		_, err = db.Store.AddNotification(t.Context(), tx, rejected)
		require.Equal(t, "25P02", sqlState(t, err))
		require.ErrorContains(t, err, "an earlier error has aborted the transaction")
	})
	t.Run("ended_transaction", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := db.MustBegin(t)
		require.NoError(t, tx.Commit(t.Context()))
		_, err := db.Store.AddNotification(t.Context(), tx, rejected)
		require.ErrorIs(t, err, pgx.ErrTxClosed)
	})
	t.Run("lost_connection", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := db.MustBegin(t)
		require.True(t, pgtest.One[bool](t, db, "SELECT pg_terminate_backend($1::int)", tx.Conn().PgConn().PID()))
		_, err := db.Store.AddNotification(t.Context(), tx, rejected)
		require.Error(t, err)
		require.False(t, errors.Is(err, outbox.ErrInvalid))
		require.Zero(t, db.Count(t))
	})
}
