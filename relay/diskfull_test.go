//go:build !installed

package relay_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

// A disk of a bounded size takes a container, so the suite without Docker has none of
// this: it is built with the tag installed.

// startOnSmallDisk starts a server with a tablespace small, of 8 MiB.
func startOnSmallDisk(t testing.TB) (*pgserver.Server, *pgtest.DB) {
	t.Helper()
	server, db := pgtest.StartServerWith(t, func(opts *pgserver.Options) { opts.SmallDisk = 8 << 20 })
	require.NoError(t, server.Shell(t.Context(), "mkdir /small/data"))
	db.MustExec(t, "CREATE TABLESPACE small LOCATION '/small/data'")
	return server, db
}

// fill fills the disk of the tablespace small, until the table ballast is dropped.
func fill(t testing.TB, db *pgtest.DB) {
	t.Helper()
	db.MustExec(t, "CREATE TABLE ballast (filler text) TABLESPACE small")
	db.MustExec(t, "ALTER TABLE ballast ALTER filler SET STORAGE PLAIN")
	for filled := false; !filled; {
		_, err := db.Exec(t.Context(), "INSERT INTO ballast SELECT repeat('x', 7000) FROM generate_series(1, 50)")
		if filled = err != nil; filled {
			require.Contains(t, err.Error(), "SQLSTATE 53100")
		}
	}
}

// TestDiskFull has the disk of the data, and that of the log, run full under load.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	// book makes a booking and adds message i, as a service does.
	book := func(ctx context.Context, db *pgtest.DB, i int) error {
		return pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "INSERT INTO bookings VALUES ($1)", i); err != nil {
				return err
			}
			_, err := db.Store.AddNotification(ctx, tx, message(i))
			return err
		})
	}

	t.Run("of_data_fails_adds_with_their_bookings_and_loses_nothing", func(t *testing.T) {
		t.Parallel()
		_, db := startOnSmallDisk(t)
		db.MustExec(t, "CREATE TABLE bookings (id int)")
		db.MustExec(t, "ALTER TABLE outbox_notifications SET TABLESPACE small")
		db.MustExec(t, "ALTER TABLE outbox_notifications SET (autovacuum_enabled = off)") // which would make room

		accepting := newGate(t)
		p := &provider{before: func(context.Context, outbox.Notification) error {
			accepting.pass()
			return nil
		}}
		queue := &erringQueue{PGStore: db.Store}
		var log logBook
		addMany(t, db, 2000)
		db.MustExec(t, "INSERT INTO bookings SELECT generate_series(1, 2000)")
		run(t, newRelay(t, queue, p, relay.Config{Logger: log.logger()}))
		accepting.await(t)

		fill(t, db)
		// What is left in pages that are there is used up.
		failed, added := error(nil), 2000
		for failed == nil {
			if failed = book(t.Context(), db, added+1); failed == nil {
				added++
			}
		}
		require.ErrorContains(t, failed, fmt.Sprintf(`outbox: add notification "reject" booking %d: `, added+1))
		require.ErrorContains(t, failed, "SQLSTATE 53100")
		require.ErrorContains(t, failed, "the server's disk is full")
		require.NotErrorIs(t, failed, outbox.ErrSetup)
		require.False(t, outbox.IsRetryable(failed))
		require.Equal(t, added, pgtest.One[int](t, db, "SELECT count(*) FROM bookings"), "the booking is rolled back with it")

		accepting.Open()
		until(t, "the relay meets it", func() bool { return log.count("tries again") > 0 && log.count("SQLSTATE 53100") > 0 })
		db.MustExec(t, "DROP TABLE ballast")
		until(t, "all is settled", func() bool { return count(t, db, "status = 'pending'") == 0 })
		require.NoError(t, book(t.Context(), db, added+1))
		requireUnspent(t, db, p, added+1)
	})

	t.Run("of_data_fails_requeues_and_a_batch_of_a_purge_whole", func(t *testing.T) {
		t.Parallel()
		_, db := startOnSmallDisk(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications SET TABLESPACE small")
		const rows = 1000
		db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, payload_json, status, sent_at, sent_version)
			SELECT 'reject', i, jsonb_build_object('filler', repeat('x', 500)), 'sent', now() - interval '2 days', 1 FROM generate_series(1, $1) AS i`, rows)
		const allSQL = "SELECT string_agg(n::text, '|' ORDER BY id) FROM outbox_notifications AS n"
		all := pgtest.One[string](t, db, allSQL)
		fill(t, db)
		keys := make([]outbox.Key, rows)
		for i := range keys {
			keys[i] = message(i + 1).Key()
		}
		old := outbox.PurgeOptions{OlderThan: 24 * time.Hour}
		calls := []struct {
			name string
			call func() (int, error)
		}{
			{"requeue", func() (int, error) { return db.Store.Requeue(t.Context(), keys...) }},
			{"requeue matching", func() (int, error) {
				res, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent})
				return len(res), err
			}},
			{"purge", func() (int, error) { return db.Store.Purge(t.Context(), old) }},
		}
		for _, c := range calls {
			n, err := c.call()
			require.ErrorContains(t, err, "outbox: "+c.name+": ")
			require.ErrorContains(t, err, "SQLSTATE 53100")
			require.ErrorContains(t, err, "the server's disk is full")
			require.False(t, outbox.IsRetryable(err))
			require.Zero(t, n)
			require.Equal(t, all, pgtest.One[string](t, db, allSQL))
		}
		// There is a way out without another disk: what is deleted takes no room.
		old.Delete = true
		n, err := db.Store.Purge(t.Context(), old)
		require.NoError(t, err)
		require.Equal(t, rows, n)
	})

	t.Run("of_data_fails_a_migration_whole", func(t *testing.T) {
		t.Parallel()
		server, db := startOnSmallDisk(t)
		fill(t, db)
		pool := pgtest.NewPool(t, server.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["default_tablespace"] = "small" })
		store, err := outbox.NewPGStore(pool, outbox.Config{Schema: "later", Logger: discard})
		require.NoError(t, err)
		err = store.Migrate(t.Context())
		require.ErrorContains(t, err, "outbox: migrate: ")
		require.ErrorContains(t, err, "SQLSTATE 53100")
		require.ErrorContains(t, err, "the server's disk is full")
		require.True(t, pgtest.One[bool](t, db, "SELECT to_regclass('later.outbox_notifications') IS NULL"))
		db.MustExec(t, "DROP TABLE ballast")
		require.NoError(t, store.Migrate(t.Context()))
	})

	t.Run("of_the_log_stops_the_server_and_loses_nothing", func(t *testing.T) {
		t.Parallel()
		server, db := pgtest.StartServerWith(t, func(opts *pgserver.Options) {
			opts.SmallDisk = 48 << 20 // three files of the log are 16 MiB each
			opts.Settings["max_wal_size"], opts.Settings["min_wal_size"] = "32MB", "32MB"
		})
		db.MustExec(t, "CREATE TABLE bookings (id int)")
		// The log is moved between two runs of the server. Without the file that has its
		// version it does not start.
		require.NoError(t, server.Restart(t.Context()))
		require.NoError(t, server.Shell(t.Context(), `cd "$PGDATA" && read pid <postmaster.pid && mv PG_VERSION /tmp/ && kill -INT $pid &&
			while kill -0 $pid 2>&-; do sleep 0.01; done && mv pg_wal /small/wal && ln -s /small/wal pg_wal && mv /tmp/PG_VERSION .`))
		require.Eventually(t, func() bool { return db.Ping(t.Context()) == nil }, patience, 10*time.Millisecond)
		require.NoError(t, server.Shell(t.Context(), "head -c 8M /dev/zero >/small/ballast"))
		db.MustExec(t, "SELECT pg_create_physical_replication_slot('holds_the_log', true)")

		p := &provider{}
		var log logBook
		run(t, newRelay(t, db.Store, p, relay.Config{Logger: log.logger(), Lease: 5 * time.Minute})) // an outage is shorter than a lease
		booked := 0
		failed := error(nil)
		for failed == nil {
			if failed = book(t.Context(), db, booked+1); failed == nil {
				booked++
			}
			_, _ = db.Exec(t.Context(), "SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 300000))")
		}
		until(t, "the relay meets it", func() bool { return log.count("tries again") > 0 })
		require.Error(t, db.Ping(t.Context()), "the server is down, and stays so")
		require.NoError(t, server.Shell(t.Context(), "rm /small/ballast"))
		require.Eventually(t, func() bool {
			_, err := db.Exec(t.Context(), "SELECT pg_drop_replication_slot('holds_the_log') FROM pg_replication_slots")
			return err == nil
		}, 2*patience, 10*time.Millisecond)
		// Whether the last commit took effect was not known.
		if pgtest.One[bool](t, db, "SELECT EXISTS (SELECT FROM bookings WHERE id = $1)", booked+1) {
			booked++
		}
		require.NoError(t, book(t.Context(), db, booked+1))
		require.Equal(t, booked+1, pgtest.One[int](t, db, "SELECT count(*) FROM bookings"))
		require.Equal(t, booked+1, db.Count(t))
		requireUnspent(t, db, p, booked+1)
	})
}
