package outbox_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// What docs/errors.md says of each SQLSTATE. What a relay makes of them is tested in
// package relay.
//
// Mutations tried, and what each turns red:
//
//	42501 not taken for ErrSetup             TestTroubles/42501_no_rights, TestRowSecurity
//	40P01 not IsRetryable                    TestDeadlocks
//	a connection that only reads kept        TestReadOnly

// TestTroubles has each kind of call meet each answer.
func TestTroubles(t *testing.T) {
	t.Parallel()
	for _, trouble := range pgtest.Troubles {
		t.Run(trouble.Code+"_"+trouble.Name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			db.Add(t, rejected)
			pool, begin := trouble.Victim(t, db)
			store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
			require.NoError(t, err)
			end := begin()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // all together take a few seconds
			defer cancel()

			// meets calls until the trouble is met: what is cut off is told so once.
			meets := func(operation string, call func() error) {
				t.Helper()
				var err error
				require.Eventually(t, func() bool {
					err = call()
					return err == nil || sqlStateOf(err) == trouble.Code
				}, time.Minute, time.Millisecond, operation)
				require.Error(t, err, operation)
				require.ErrorContains(t, err, "outbox: "+operation)
				require.NotEmpty(t, trouble.Says)
				require.ErrorContains(t, err, trouble.Says)
				require.Equal(t, trouble.Setup, errors.Is(err, outbox.ErrSetup), "%v", err)
				require.False(t, outbox.IsRetryable(err))
				require.NotErrorIs(t, err, outbox.ErrInvalid)
			}
			lease := outbox.Lease{ID: 1, Token: outbox.NewToken()}
			meets("claim", func() error {
				_, err := store.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
				return err
			})
			meets("extend leases", func() error {
				_, err := store.Extend(ctx, []outbox.Lease{lease}, time.Hour)
				return err
			})
			meets("settle", func() error {
				_, err := store.Settle(ctx, []outbox.Settlement{{Lease: lease, Verdict: outbox.Delivered}})
				return err
			})
			meets("requeue", func() error {
				_, err := store.Requeue(ctx, rejected.Key())
				return err
			})
			meets("requeue matching", func() error {
				_, err := store.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusFailed})
				return err
			})
			meets("purge", func() error {
				_, err := store.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Hour})
				return err
			})
			reads := map[string]func() error{
				"get":   func() error { _, err := store.Get(ctx, rejected.Key()); return err },
				"list":  func() error { _, err := store.List(ctx, outbox.Filter{}); return err },
				"stats": func() error { _, err := store.Stats(ctx); return err },
			}
			for operation, call := range reads {
				if trouble.OnlyWrites {
					require.NoError(t, call(), operation)
				} else {
					meets(operation, call)
				}
			}
			if trouble.OnlyWrites || trouble.Code == "42P01" {
				require.NoError(t, store.Migrate(ctx), "the number of the last migration is there")
			} else if trouble.Code == "57014" || trouble.Code == "55P03" {
				require.Equal(t, trouble.Code, sqlState(t, store.Migrate(ctx)))
			} else {
				err := store.Migrate(ctx)
				require.Equal(t, trouble.Code, sqlState(t, err))
				require.ErrorContains(t, err, "outbox: migrate: ")
				require.ErrorContains(t, err, trouble.Says)
				require.Equal(t, trouble.Setup, errors.Is(err, outbox.ErrSetup), "%v", err)
			}

			if trouble.Connecting {
				_, err := pool.Begin(ctx)
				require.Equal(t, trouble.Code, sqlState(t, err), "no add comes to be called")
			} else {
				adds := map[string]func(tx pgx.Tx) error{
					`add notification "reject" booking 7 candidate 42: `: func(tx pgx.Tx) error {
						_, err := store.AddNotification(ctx, tx, changedReject)
						return err
					},
					"add notifications: ": func(tx pgx.Tx) error {
						_, err := store.AddNotifications(ctx, tx, []outbox.NewNotification{changedReject, {Type: "new"}})
						return err
					},
				}
				for operation, add := range adds {
					meets(operation, func() error {
						// On a busy machine a short timeout may hit what waits for nobody.
						tx, err := pool.Begin(ctx)
						for sqlStateOf(err) == trouble.Code {
							tx, err = pool.Begin(ctx)
						}
						require.NoError(t, err)
						defer func() { _ = tx.Rollback(context.Background()) }()
						addErr := add(tx)
						_, err = tx.Exec(ctx, "SELECT 1")
						for sqlStateOf(err) == trouble.Code {
							_, err = tx.Exec(ctx, "SELECT 1")
						}
						require.Equal(t, "25P02", sqlState(t, err), "the transaction is aborted")
						return addErr
					})
				}
			}

			end()
			if trouble.Code == "25006" {
				pool.Reset() // of the callers' connections, as docs/errors.md says
			}
			n := db.Get(t, rejected.Key())
			require.Equal(t, outbox.StatusPending, n.Status)
			require.Zero(t, n.Attempts)
			require.EqualValues(t, 1, n.Version)
			require.Equal(t, 1, db.Count(t))
			require.Eventually(t, func() bool { // connections may have been cut off, or closed as they only read
				return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					_, err := store.AddNotification(ctx, tx, changedReject)
					return err
				}) == nil
			}, time.Minute, time.Millisecond)
			var res outbox.ClaimResult
			require.Eventually(t, func() bool { // for the same reason
				res, err = store.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
				return err == nil
			}, time.Minute, time.Millisecond)
			require.Len(t, res.Claimed, 1)
			require.Equal(t, 1, res.Claimed[0].Notification.Attempts)
		})
	}
}

var changedReject = func() outbox.NewNotification {
	n := rejected
	n.CorrelationID = "req-2"
	return n
}()

func sqlStateOf(err error) string {
	var pg interface{ SQLState() string }
	if errors.As(err, &pg) {
		return pg.SQLState()
	}
	return ""
}

// TestReadOnly has a store on what only reads, whoever says so.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	t.Run("a_callers_transaction_that_only_reads_is_told_apart", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		tx := pgtest.Begin(t, db.Pool, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		_, err := db.Store.AddNotification(t.Context(), tx, rejected)
		require.Equal(t, "25006", sqlState(t, err))
		require.ErrorContains(t, err, "the transaction is read-only")
		require.NotErrorIs(t, err, outbox.ErrSetup)
		require.False(t, outbox.IsRetryable(err))
	})
	t.Run("connections_that_only_read_leave_the_pool_of_those_who_deliver", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		readOnly := true // as long as the name leads to the standby
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			cfg.MaxConns = 1
			cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				if !readOnly {
					return nil
				}
				_, err := conn.Exec(ctx, "SET default_transaction_read_only = on")
				return err
			}
		})
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		for range 3 {
			_, err = store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
			require.Equal(t, "25006", sqlState(t, err))
		}
		readOnly = false
		_, err = store.Settle(t.Context(), []outbox.Settlement{{Lease: outbox.Lease{ID: 1}, Verdict: outbox.Delivered}})
		require.NoError(t, err, "the connection of the last claim is gone")
	})
}

// TestDeadlocks has real ones.
func TestDeadlocks(t *testing.T) {
	t.Parallel()
	t.Run("between_adds_end_one_with_an_error_that_is_retryable", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		one, other := db.MustBegin(t), db.MustBegin(t)
		a, b := outbox.NewNotification{Type: "a"}, outbox.NewNotification{Type: "b"}
		_, err := db.Store.AddNotification(t.Context(), one, a)
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), other, b)
		require.NoError(t, err)
		waiting := pgtest.Later(func() (outbox.AddResult, error) { return db.Store.AddNotification(t.Context(), one, b) })
		db.WaitBlocked(t, 1)
		_, errOther := db.Store.AddNotification(t.Context(), other, a)
		if errOther != nil {
			require.NoError(t, other.Rollback(t.Context()))
		}
		_, errOne := pgtest.Await(t, waiting)
		require.NotEqual(t, errOne == nil, errOther == nil, "one of them goes on")
		err = errOne
		if err == nil {
			err = errOther
		}
		require.Equal(t, "40P01", sqlState(t, err))
		require.True(t, outbox.IsRetryable(err))
		require.ErrorContains(t, err, "run the whole transaction again")
	})
	t.Run("of_a_claim_with_somebody_who_locks_the_table_are_over_after_another_try", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			cfg.MaxConns = 1
			cfg.ConnConfig.RuntimeParams["deadlock_timeout"] = "10s" // when it looks, once: the circle has to be closed by then
		}), outbox.Config{Logger: discard})
		require.NoError(t, err)
		_, err = store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Microsecond}) // its statements are prepared
		require.NoError(t, err)
		other := db.MustBegin(t)
		_, err = other.Exec(t.Context(), "SET LOCAL deadlock_timeout = '1min'") // so that the claim is the one that ends
		require.NoError(t, err)
		_, err = other.Exec(t.Context(), "LOCK TABLE outbox_notifications")
		require.NoError(t, err)
		claim := pgtest.Later(func() (outbox.ClaimResult, error) {
			return store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour, InTurn: true})
		})
		db.WaitBlocked(t, 1) // for the table, with the lock of its turn
		_, err = other.Exec(t.Context(), "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", db.Store.ClaimLock())
		require.NoError(t, err, "the claim has let go of it")
		require.NoError(t, other.Rollback(t.Context()))
		_, err = pgtest.Await(t, claim)
		require.NoError(t, err)
	})
}

// TestTerminated has a waiting call lose its connection.
func TestTerminated(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		operation string
		add       func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error
	}{
		"one": {`outbox: add notification "reject" booking 7 candidate 42: `, func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error {
			_, err := s.AddNotification(ctx, tx, rejected)
			return err
		}},
		"many": {"outbox: add notifications: ", func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error {
			_, err := s.AddNotifications(ctx, tx, []outbox.NewNotification{rejected, {Type: "other"}})
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			held := db.MustBegin(t)
			_, err := db.Store.AddNotification(t.Context(), held, rejected)
			require.NoError(t, err)
			tx := db.MustBegin(t)
			pid := tx.Conn().PgConn().PID()
			waiting := pgtest.Later(func() (struct{}, error) { return struct{}{}, c.add(t.Context(), db.Store, tx) })
			db.WaitBlocked(t, 1)
			require.True(t, pgtest.One[bool](t, db, "SELECT pg_terminate_backend($1::int)", pid))
			_, err = pgtest.Await(t, waiting)
			require.Equal(t, "57P01", sqlState(t, err))
			require.ErrorContains(t, err, c.operation)
			require.ErrorContains(t, err, "an administrator ended the connection: ")
			require.NotErrorIs(t, err, outbox.ErrSetup)
			require.False(t, outbox.IsRetryable(err), "whether a commit took effect is not known in general")
			require.Error(t, tx.Commit(t.Context()))
			require.NoError(t, held.Commit(t.Context()))
			require.Equal(t, 1, db.Count(t))
		})
	}
}

// TestOldSchema has calls meet a table that lacks what a migration brings.
func TestOldSchema(t *testing.T) {
	t.Parallel()
	type call = func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error
	adds := map[string]call{
		"add notification": func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error {
			_, err := s.AddNotification(ctx, tx, rejected)
			return err
		},
		"add notifications": func(ctx context.Context, s *outbox.PGStore, tx pgx.Tx) error {
			_, err := s.AddNotifications(ctx, tx, []outbox.NewNotification{rejected, {Type: "other"}})
			return err
		},
	}
	lease := outbox.Lease{ID: 1, Token: outbox.NewToken()}
	others := map[string]call{
		"claim": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
			return err
		},
		"extend leases": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Extend(ctx, []outbox.Lease{lease}, time.Hour)
			return err
		},
		"settle": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Settle(ctx, []outbox.Settlement{{Lease: lease, Verdict: outbox.Delivered}})
			return err
		},
		"requeue": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Requeue(ctx, rejected.Key())
			return err
		},
		"purge": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Hour})
			return err
		},
		"get": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Get(ctx, rejected.Key())
			return err
		},
		"list": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.List(ctx, outbox.Filter{})
			return err
		},
		"stats": func(ctx context.Context, s *outbox.PGStore, _ pgx.Tx) error {
			_, err := s.Stats(ctx)
			return err
		},
	}
	meets := func(t *testing.T, db *pgtest.DB, code string, calls ...map[string]call) {
		t.Helper()
		for _, of := range calls {
			for operation, do := range of {
				tx := db.MustBegin(t)
				err := do(t.Context(), db.Store, tx)
				require.Error(t, err, operation)
				require.Equal(t, code, sqlState(t, err), operation)
				require.ErrorIs(t, err, outbox.ErrSetup)
				require.ErrorContains(t, err, "outbox: "+operation)
				require.ErrorContains(t, err, `the table "public"."outbox_notifications" is not migrated, run Migrate first: `)
				require.False(t, outbox.IsRetryable(err))
				require.NoError(t, tx.Rollback(t.Context()))
			}
		}
	}
	t.Run("42703_the_columns_of_this_library_are_missing", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable, pgx.QueryExecModeSimpleProtocol)
		meets(t, db, "42703", adds, others)
		require.NoError(t, db.Store.Migrate(t.Context()))
		db.Add(t, rejected)
	})
	t.Run("42P10_the_unique_index_of_the_key_is_missing", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications DROP CONSTRAINT "+pgtest.One[string](t, db,
			"SELECT conname FROM pg_constraint WHERE conrelid = 'outbox_notifications'::regclass AND contype = 'u'"))
		for guess := range outbox.Guesses {
			db.Store.AlwaysGuess(guess)
			meets(t, db, "42P10", adds)
		}
	})
}

// TestFull has a server of its own that has no connection left.
func TestFull(t *testing.T) {
	t.Parallel()
	_, db := pgtest.StartServerWith(t, func(o *pgserver.Options) {
		o.Settings["max_connections"], o.Settings["superuser_reserved_connections"] = "5", "0"
	})
	db.Add(t, rejected)
	db.Reset()
	var others []*pgx.Conn
	t.Cleanup(func() {
		for _, conn := range others {
			_ = conn.Close(context.Background())
		}
	})
	require.Eventually(t, func() bool { // those of the pool may be closing
		conn, err := pgx.Connect(t.Context(), db.URL)
		if err == nil {
			others = append(others, conn)
		}
		return len(others) == 5
	}, time.Minute, time.Millisecond)

	_, err := db.Begin(t.Context())
	require.Equal(t, "53300", sqlState(t, err), "no add comes to be called")
	calls := map[string]func() error{
		"claim": func() error {
			_, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
			return err
		},
		"get":     func() error { _, err := db.Store.Get(t.Context(), rejected.Key()); return err },
		"stats":   func() error { _, err := db.Store.Stats(t.Context()); return err },
		"requeue": func() error { _, err := db.Store.Requeue(t.Context(), rejected.Key()); return err },
	}
	for operation, call := range calls {
		err := call()
		require.Error(t, err, operation)
		require.Equal(t, "53300", sqlState(t, err), operation)
		require.ErrorContains(t, err, "outbox: "+operation)
		require.ErrorContains(t, err, "has no connection left: ")
		require.ErrorContains(t, err, "too many clients already")
		require.NotErrorIs(t, err, outbox.ErrSetup)
		require.False(t, outbox.IsRetryable(err))
	}
	require.NoError(t, others[0].Close(t.Context()))
	require.Eventually(t, func() bool { // as soon as the server has noticed
		_, err := db.Store.Get(t.Context(), rejected.Key())
		return err == nil
	}, time.Minute, time.Millisecond)
}
