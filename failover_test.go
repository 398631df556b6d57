package outbox_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// Here replication is ended on purpose before what is to be lost, so that nothing depends
// on how fast it was. Mutations tried, and what each turns red:
//
//	the token left out of leasedSQL            .../an_id_..., /a_version_..., /a_claim_that_was_lost_...,
//	                                           /a_claim_repeated_in_pages_..., /leases_go_by_the_clock_...
//	supersededSQL false                        .../a_lease_that_survived_with_another_version_2
//	Except for rows with a token alone, also   .../a_claim_repeated_in_pages_...
//	when repeated
//	oursSQL of what was settled                TestFailover_asynchronous, before it fails over
//	extendSQL adds to lease_until              .../leases_go_by_the_clock_...

// verdicts are all that a relay can say of a lease.
var verdicts = []outbox.Settlement{
	{Verdict: outbox.Delivered, Receipt: "late"}, {Verdict: outbox.Retry, Error: "late"},
	{Verdict: outbox.Retry, Error: "late", Unknown: true}, {Verdict: outbox.Failed, Error: "late"}, {Verdict: outbox.HandedBack},
}

// requireStale asserts that nothing that is said of the lease changes the row with its id.
func requireStale(t *testing.T, db *pgtest.DB, lease outbox.Lease) {
	t.Helper()
	row := func() string {
		return pgtest.One[string](t, db, "SELECT coalesce((SELECT o::text FROM outbox_notifications o WHERE id = $1), 'none')", lease.ID)
	}
	before := row()
	for _, st := range verdicts {
		st.Lease = lease
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale}, settle(t, db, st), st.Verdict)
	}
	res, err := db.Store.Extend(t.Context(), []outbox.Lease{lease}, time.Hour)
	require.NoError(t, err)
	require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale}, res)
	require.Equal(t, before, row())
}

// text is a notification of that type with a payload to tell it by.
func text(typ, payload string) outbox.NewNotification {
	return outbox.NewNotification{Type: typ, BookingID: 1, Payload: json.RawMessage(`{"text":"` + payload + `"}`)}
}

// claimType claims what there is of one type, and hides it from everybody for an hour.
func claimType(t *testing.T, db *pgtest.DB, typ string) []outbox.Claimed {
	t.Helper()
	return claim(t, db, outbox.ClaimOptions{Types: []string{typ}}).Claimed
}

func claimOneOf(t *testing.T, db *pgtest.DB, typ string) outbox.Claimed {
	t.Helper()
	got := claimType(t, db, typ)
	require.Len(t, got, 1)
	return got[0]
}

func TestFailover_asynchronous(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t)
	db := pair.DB
	repeated := func(typ string, token outbox.Token, limit int, except ...int64) outbox.ClaimOptions {
		return outbox.ClaimOptions{Types: []string{typ}, Token: token, Limit: limit, Except: except, Repeated: true}
	}

	// What survives.
	for _, typ := range []string{"kept", "refreshed", "version", "version claimed", "claimed", "again kept", "again lost", "settled", "clock"} {
		db.Add(t, text(typ, "one"))
	}
	pages := []outbox.NewNotification{text("pages", "one"), text("pages", "two")}
	pages[1].BookingID = 2
	db.AddMany(t, pages...)
	kept, refreshed, settled, clock := claimOneOf(t, db, "kept"), claimOneOf(t, db, "refreshed"), claimOneOf(t, db, "settled"), claimOneOf(t, db, "clock")
	againKept, againLost, paged := outbox.NewToken(), outbox.NewToken(), outbox.NewToken()
	require.Len(t, claim(t, db, outbox.ClaimOptions{Types: []string{"again kept"}, Token: againKept}).Claimed, 1) // the answer is lost

	// What does not.
	pair.Sever(t)
	require.True(t, db.Add(t, text("refreshed", "two, lost")).InFlight)
	versions := map[string]outbox.Claimed{}
	for _, typ := range []string{"version", "version claimed"} {
		require.EqualValues(t, 2, db.Add(t, text(typ, "two, lost")).Notification.Version)
		versions[typ] = claimOneOf(t, db, typ)
	}
	claimed := claimOneOf(t, db, "claimed")
	require.Len(t, claim(t, db, outbox.ClaimOptions{Types: []string{"again lost"}, Token: againLost}).Claimed, 1) // the answer is lost
	require.Len(t, claim(t, db, outbox.ClaimOptions{Types: []string{"pages"}, Token: paged}).Claimed, 2)          // the answer is lost
	page := claim(t, db, repeated("pages", paged, 1)).Claimed[0]                                                  // this one comes
	require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: settled.Lease, Verdict: outbox.Delivered}))
	lost := map[int64]outbox.Claimed{} // by id
	for i := range 100 {               // PostgreSQL logs a sequence 32 values ahead: those are not given again
		n := text("lost", "lost")
		n.BookingID = int64(i + 1)
		db.Add(t, n)
	}
	for _, c := range claimType(t, db, "lost") {
		lost[c.ID] = c
	}
	require.Len(t, lost, 100)

	pair.FailOver(t)
	pgtest.Reset(t, db.Pool)

	t.Run("an_id_that_is_given_again_to_another_key", func(t *testing.T) {
		require.Empty(t, claimType(t, db, "lost"))
		for again := 0; again < 10; {
			n := text("another", "another")
			n.CandidateTgID = int64(again + 1)
			id := db.Add(t, n).Notification.ID
			if old, ok := lost[id]; ok {
				again++
				requireStale(t, db, old.Lease)
				c := claimOneOf(t, db, "another")
				require.Equal(t, id, c.ID)
				requireStale(t, db, old.Lease)
				require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered}))
			}
		}
	})

	t.Run("a_version_that_is_given_again_to_another_content", func(t *testing.T) {
		for typ, old := range versions {
			require.EqualValues(t, 1, db.Get(t, old.Notification.Key()).Version, "the refresh is lost")
			requireStale(t, db, old.Lease)
			n := db.Add(t, text(typ, "two")).Notification
			require.EqualValues(t, old.Notification.Version, n.Version)
			require.Equal(t, old.ID, n.ID)
			if typ == "version claimed" {
				c := claimOneOf(t, db, typ)
				defer func() {
					require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered}))
				}()
			}
			requireStale(t, db, old.Lease)
			require.JSONEq(t, `{"text":"two"}`, string(db.Get(t, n.Key()).Payload))
			require.Equal(t, outbox.StatusPending, db.Get(t, n.Key()).Status)
		}
	})

	t.Run("a_claim_that_was_lost_and_made_anew_by_another", func(t *testing.T) {
		requireStale(t, db, claimed.Lease)
		anew := claimOneOf(t, db, "claimed")
		require.Equal(t, 1, anew.Notification.Attempts, "the lost attempt is not counted")
		require.Zero(t, anew.UnknownVersion, "nobody knows of it")
		requireStale(t, db, claimed.Lease)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: anew.Lease, Verdict: outbox.Delivered, Receipt: "anew"}))
		requireStale(t, db, claimed.Lease)
		require.Equal(t, "anew", db.Get(t, anew.Notification.Key()).Receipt)
	})

	t.Run("a_claim_that_survived", func(t *testing.T) {
		require.Empty(t, claimType(t, db, "kept"), "it is a lease here too")
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: kept.Lease, Verdict: outbox.Delivered}))
		require.Equal(t, outbox.StatusSent, db.Get(t, kept.Notification.Key()).Status)
	})

	t.Run("a_lease_that_survived_with_another_version_2", func(t *testing.T) {
		require.True(t, db.Add(t, text("refreshed", "two")).InFlight)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseSuperseded}, settle(t, db, outbox.Settlement{Lease: refreshed.Lease, Verdict: outbox.Delivered}))
		n := claimOneOf(t, db, "refreshed").Notification
		require.JSONEq(t, `{"text":"two"}`, string(n.Payload))
		require.EqualValues(t, 1, n.SentVersion)
	})

	t.Run("a_settlement_that_was_lost_is_made_again_by_who_knows_it_and_by_nobody_else", func(t *testing.T) {
		require.Equal(t, outbox.StatusPending, db.Get(t, settled.Notification.Key()).Status)
		require.Empty(t, claimType(t, db, "settled"), "before its lease has ended")
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: settled.Lease, Verdict: outbox.Delivered}))
	})

	t.Run("a_repeated_claim_that_survived_counts_no_other_attempt", func(t *testing.T) {
		got := claim(t, db, repeated("again kept", againKept, 100)).Claimed
		require.Len(t, got, 1)
		require.Equal(t, againKept, got[0].Token)
		require.Equal(t, 1, got[0].Notification.Attempts)
	})

	t.Run("a_repeated_claim_that_was_lost_is_a_first_one", func(t *testing.T) {
		got := claim(t, db, repeated("again lost", againLost, 100)).Claimed
		require.Len(t, got, 1)
		require.Equal(t, againLost, got[0].Token)
		require.Equal(t, 1, got[0].Notification.Attempts)
	})

	t.Run("a_claim_repeated_in_pages_leases_no_row_twice_by_one_token", func(t *testing.T) {
		got := claim(t, db, repeated("pages", paged, 100, page.ID)).Claimed
		require.Len(t, got, 1)
		require.NotEqual(t, page.ID, got[0].ID)
		requireStale(t, db, page.Lease)
		next := claimOneOf(t, db, "pages") // when the relay has heard that its lease is gone
		require.Equal(t, page.ID, next.ID)
		requireStale(t, db, page.Lease)
	})

	t.Run("leases_go_by_the_clock_of_the_server_that_there_is", func(t *testing.T) {
		until := func() time.Duration {
			return pgtest.One[time.Duration](t, db, "SELECT lease_until - clock_timestamp() FROM outbox_notifications WHERE id = $1", clock.ID)
		}
		db.MustExec(t, "UPDATE outbox_notifications SET lease_until = lease_until + interval '1 day' WHERE id = $1", clock.ID) // it is a day behind
		res, err := db.Store.Extend(t.Context(), []outbox.Lease{clock.Lease}, time.Minute)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, res)
		require.LessOrEqual(t, until(), time.Minute)

		db.MustExec(t, "UPDATE outbox_notifications SET lease_until = lease_until - interval '1 day' WHERE id = $1", clock.ID) // it is a day ahead
		res, err = db.Store.Extend(t.Context(), []outbox.Lease{clock.Lease}, time.Hour)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, res, "as nobody else came first")
		require.Empty(t, claimType(t, db, "clock"))
		db.MustExec(t, "UPDATE outbox_notifications SET lease_until = lease_until - interval '1 day' WHERE id = $1", clock.ID)
		require.EqualValues(t, 1, claimOneOf(t, db, "clock").UnknownVersion)
		requireStale(t, db, clock.Lease)
	})
}

// commitLater commits tx and waits until that waits for a standby.
func commitLater(ctx context.Context, t *testing.T, watch *pgxpool.Pool, tx pgx.Tx) <-chan pgtest.Result[struct{}] {
	t.Helper()
	pid := tx.Conn().PgConn().PID()
	done := pgtest.Later(func() (struct{}, error) { return struct{}{}, tx.Commit(ctx) })
	waitForStandby(t, watch, pid)
	return done
}

// waitForStandby waits until that session waits for a standby.
func waitForStandby(t *testing.T, watch *pgxpool.Pool, pid uint32) {
	t.Helper()
	require.Eventually(t, func() bool {
		return pgtest.One[bool](t, watch, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep')", pid)
	}, 30*time.Second, time.Millisecond)
}

// A commit that nobody answers is unknown to its caller. Two ways of giving it up are not
// like that: PostgreSQL then says that it was committed, and with a warning that it may be
// nowhere else.
func TestFailover_a_wait_for_the_standby_that_is_given_up(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t)
	require.NoError(t, pair.Primary.Synchronous(t.Context()))
	db := pair.DB
	add := func(pool *pgxpool.Pool, typ string) pgx.Tx {
		tx := pgtest.Begin(t, pool, pgx.TxOptions{})
		_, err := db.Store.AddNotification(t.Context(), tx, text(typ, "one"))
		require.NoError(t, err)
		return tx
	}
	visible := func(typ string) bool {
		return pgtest.One[bool](t, db, "SELECT EXISTS (SELECT FROM outbox_notifications WHERE type = $1)", typ)
	}
	require.NoError(t, add(db.Pool, "acknowledged").Commit(t.Context()))
	pair.Sever(t)

	tx := add(db.Pool, "timed out")
	ctx, cancel := context.WithCancel(t.Context())
	timedOut := commitLater(ctx, t, db.Pool, tx)
	require.False(t, visible("timed out"), "nobody sees it before")
	cancel()
	_, err := pgtest.Await(t, timedOut)
	require.ErrorIs(t, err, context.Canceled, "unknown")
	require.Eventually(t, func() bool { return visible("timed out") }, 30*time.Second, time.Millisecond, "pgx cancels what it gives up")

	tx = add(db.Pool, "terminated")
	pid := tx.Conn().PgConn().PID()
	terminated := commitLater(t.Context(), t, db.Pool, tx)
	require.True(t, pgtest.One[bool](t, db, "SELECT pg_terminate_backend($1)", pid))
	_, err = pgtest.Await(t, terminated)
	require.Error(t, err, "unknown")

	// Somebody cancels what hangs.
	var notice string
	warned := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notice = n.Message }
	})
	tx = add(warned, "canceled")
	pid = tx.Conn().PgConn().PID()
	canceled := commitLater(t.Context(), t, db.Pool, tx)
	require.True(t, pgtest.One[bool](t, db, "SELECT pg_cancel_backend($1)", pid))
	_, err = pgtest.Await(t, canceled)
	require.NoError(t, err, "acknowledged")
	require.Contains(t, notice, "canceling wait for synchronous replication")
	require.True(t, visible("canceled"))

	// Or pgx is configured to cancel what its ctx ends.
	cancels := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
			return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, CancelRequestDelay: 0, DeadlineDelay: time.Minute}
		}
	})
	tx = add(cancels, "canceled by pgx")
	ctx, cancel = context.WithCancel(t.Context())
	byPgx := commitLater(ctx, t, db.Pool, tx)
	cancel()
	_, err = pgtest.Await(t, byPgx)
	require.NoError(t, err, "acknowledged")
	require.True(t, visible("canceled by pgx"))

	// A claim is a commit too, and a later one: what it answers is as safe as itself.
	claims := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.MaxConns = 1 })
	pid = pgtest.One[uint32](t, claims, "SELECT pg_backend_pid()")
	store, err := outbox.NewPGStore(claims, outbox.Config{})
	require.NoError(t, err)
	answered := pgtest.Later(func() (outbox.ClaimResult, error) {
		return store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour, Types: []string{"canceled"}})
	})
	waitForStandby(t, db.Pool, pid)
	require.Empty(t, answered, "it waits for the standby to have the add, too")

	pair.FailOver(t)
	_, err = pgtest.Await(t, answered)
	require.Error(t, err)
	pgtest.Reset(t, db.Pool)
	require.True(t, visible("acknowledged"))
	for _, typ := range []string{"timed out", "terminated", "canceled", "canceled by pgx"} {
		require.False(t, visible(typ), typ)
	}
}

// TestHotStandby has a store on a standby's own URL, as docs/errors.md says of each call.
//
// Mutations tried, and what each turns red:
//
//	a connection that only reads kept     .../default_transaction_isolation_...
//	Listen's probe not through onConn     .../listening_finds_the_primary_...
func TestHotStandby(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t)
	pair.Add(t, rejected)
	pair.MustExec(t, `CREATE SCHEMA old; CREATE TABLE old.outbox_migrations (version int);
		INSERT INTO old.outbox_migrations VALUES (1)`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, pair.Standby.CatchUp(t.Context()))

	const works, onlyReads, unsupported = "", "25006", "0A000"
	lease := outbox.Lease{ID: 1, Token: outbox.NewToken()}
	migrate := func(ctx context.Context, pool *pgxpool.Pool, schema string) error {
		store, err := outbox.NewPGStore(pool, outbox.Config{Schema: schema, Logger: discard})
		require.NoError(t, err)
		return store.Migrate(ctx)
	}
	calls := []struct {
		name         string
		answers      string
		serializable string // answers where that is the default
		closes       bool   // the connection, when it only reads
		do           func(ctx context.Context, store *outbox.PGStore, pool *pgxpool.Pool) error
	}{
		{"get", works, unsupported, false, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Get(ctx, rejected.Key())
			return err
		}},
		{"list", works, unsupported, false, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.List(ctx, outbox.Filter{})
			return err
		}},
		{"stats", works, works, false, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Stats(ctx)
			return err
		}},
		{"migrate_what_is_current", works, unsupported, false, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			return store.Migrate(ctx)
		}},
		{"migrate_what_is_not", unsupported, unsupported, false, func(ctx context.Context, _ *outbox.PGStore, pool *pgxpool.Pool) error {
			return migrate(ctx, pool, "old")
		}},
		{"migrate_nothing", unsupported, unsupported, false, func(ctx context.Context, _ *outbox.PGStore, pool *pgxpool.Pool) error {
			return migrate(ctx, pool, "none")
		}},
		{"add", onlyReads, unsupported, false, func(ctx context.Context, store *outbox.PGStore, pool *pgxpool.Pool) error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := store.AddNotification(ctx, tx, rejected)
				return err
			})
		}},
		{"add_many", onlyReads, unsupported, false, func(ctx context.Context, store *outbox.PGStore, pool *pgxpool.Pool) error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := store.AddNotifications(ctx, tx, []outbox.NewNotification{rejected, {Type: "new"}})
				return err
			})
		}},
		{"claim", onlyReads, unsupported, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
			return err
		}},
		{"extend", onlyReads, unsupported, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Extend(ctx, []outbox.Lease{lease}, time.Hour)
			return err
		}},
		{"settle", onlyReads, unsupported, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Settle(ctx, []outbox.Settlement{{Lease: lease, Verdict: outbox.Delivered}})
			return err
		}},
		{"requeue", onlyReads, onlyReads, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Requeue(ctx, rejected.Key())
			return err
		}},
		{"requeue_matching", onlyReads, unsupported, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusFailed})
			return err
		}},
		{"purge", onlyReads, unsupported, true, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			_, err := store.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Hour})
			return err
		}},
		{"listen", onlyReads, onlyReads, false, func(ctx context.Context, store *outbox.PGStore, _ *pgxpool.Pool) error {
			return store.Listen(ctx, func() {}) // its own connection is refused, before the pool's is used
		}},
	}
	for _, isolation := range []string{"read committed", "serializable"} {
		t.Run("default_transaction_isolation_"+isolation, func(t *testing.T) {
			t.Parallel()
			pool := pgtest.NewPool(t, pair.Standby.URL, func(cfg *pgxpool.Config) {
				cfg.MaxConns = 1
				cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = isolation
			})
			store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
			require.NoError(t, err)
			for _, call := range calls {
				want := call.answers
				if isolation == "serializable" {
					want = call.serializable
				}
				before := backend(t, pool)
				err := call.do(t.Context(), store, pool)
				require.Equal(t, want, sqlStateOf(err), "%s: %v", call.name, err)
				require.Equal(t, want == works, err == nil, "%s: %v", call.name, err)
				require.NotErrorIs(t, err, outbox.ErrSetup, call.name)
				closed := call.closes && want == onlyReads
				require.Equal(t, closed, backend(t, pool) != before, "%s: is the connection another?", call.name)
			}
		})
	}

	t.Run("listening_finds_the_primary_though_the_pool_is_on_the_standby", func(t *testing.T) {
		t.Parallel()
		primary, err := pgx.ParseConfig(pair.Primary.URL)
		require.NoError(t, err)
		moved := false // the name of the primary, to it
		pool := pgtest.NewPool(t, pair.Standby.URL, func(cfg *pgxpool.Config) {
			cfg.MaxConns = 1
			cfg.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
				if moved {
					c.Host, c.Port = primary.Host, primary.Port
				}
				return nil
			}
		})
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		require.NoError(t, pool.Ping(t.Context()))
		moved = true
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		require.Equal(t, "25006", sqlState(t, store.Listen(ctx, cancel)), "the NOTIFY of the probe")
		require.ErrorIs(t, store.Listen(ctx, cancel), context.Canceled, "it listens")
	})
}

// backend is the process of the server that a pool of one connection leads to. It takes
// no snapshot, which is refused where serializable is the default.
func backend(t *testing.T, pool *pgxpool.Pool) (pid uint32) {
	t.Helper()
	require.NoError(t, pool.AcquireFunc(t.Context(), func(conn *pgxpool.Conn) error {
		pid = conn.Conn().PgConn().PID()
		return nil
	}))
	return pid
}
