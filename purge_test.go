package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/migrations"
)

// Mutations of the code that turn tests red:
//
//	another condition on the status, or none   TestPurge/touches_only_..., .../walks_...
//	created_at for a missing sent_at           TestPurge/touches_only_..., .../works_in_a_table_of_another_service
//	no age, no types                           TestPurge/touches_only_...
//	no purged_at IS NULL, or when deleting     TestPurge/takes_..., .../forgets_the_key_...
//	nothing asked again once it is locked      TestPurge/leaves_a_row_that_was_requeued_..., .../purges_each_row_...
//	no SKIP LOCKED, or no lock                 TestPurge/waits_for_nobody_...
//	payload, error or receipt kept             TestPurge/takes_payload_error_and_receipt_...
//	no mark                                    TestPurge/takes_..., .../leaves_slim_rows_out_of_a_requeue
//	no limit                                   TestPurge/walks_..., .../keeps_what_is_done_...
//	another order of the page                  TestPurge/walks_..., .../returns_what_is_done_...
//	from id 0 on                               TestPurge/walks_...
//	an end at the first batch without any      TestPurge/walks_...
//	the type asked a second time               TestPurgePlan
//	no look at the type of purged_at           TestUpgrade/refuses_a_purged_at_that_is_no_time
//	slim rows let into a requeue               TestPurge/leaves_slim_rows_out_of_a_requeue
//	what is slim goes by the mark alone        TestPurge/takes_a_slim_row_that_was_filled_again_...

// The tests purge what was sent a day ago; longAgo is twice that.
const (
	day     = 24 * time.Hour
	longAgo = "now() - interval '2 days'"
)

// both are the two ways to purge.
var both = map[string]outbox.PurgeOptions{"strip": {OlderThan: day}, "delete": {OlderThan: day, Delete: true}}

// addSent adds rows that were sent long ago, with booking ids from 1.
func addSent(t testing.TB, db *pgtest.DB, n int) {
	t.Helper()
	db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, payload_json, status, sent_version, receipt, sent_at)
		SELECT 'reject', i, i, '{"slot": "10:00"}', 'sent', 1, 'm' || i, `+longAgo+` FROM generate_series(1, $1::int) AS i`, n)
}

// unpurged returns how many rows are neither slim nor deleted.
func unpurged(t testing.TB, db *pgtest.DB) int {
	t.Helper()
	return pgtest.One[int](t, db, "SELECT count(*) FROM outbox_notifications WHERE purged_at IS NULL")
}

// purgeGate is a function that halts a statement at the row with id 2 while closeGate
// has it closed.
const purgeGate = `
	CREATE FUNCTION gate(id bigint) RETURNS bool LANGUAGE plpgsql AS $$
	BEGIN
		IF id = 2 THEN PERFORM pg_advisory_xact_lock(1); END IF;
		RETURN true;
	END $$;`

func closeGate(t testing.TB, db *pgtest.DB) (open func()) {
	t.Helper()
	gate := db.MustBegin(t)
	_, err := gate.Exec(t.Context(), "SELECT pg_advisory_xact_lock(1)")
	require.NoError(t, err)
	return func() {
		t.Helper()
		require.NoError(t, gate.Rollback(t.Context()))
	}
}

func TestPurge(t *testing.T) {
	t.Parallel()

	t.Run("takes_payload_error_and_receipt_and_keeps_the_rest_for_repeats", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		n := rejected
		n.NotAfter = time.Now().Add(time.Hour)
		db.Add(t, n)
		deliver(t, db, outbox.Retry)
		db.MustExec(t, "UPDATE outbox_notifications SET next_retry_at = NULL")
		deliver(t, db, outbox.Delivered)
		db.MustExec(t, "UPDATE outbox_notifications SET sent_at = "+longAgo)
		sent := db.Get(t, n.Key())
		require.NotEmpty(t, sent.Payload)
		require.NotEmpty(t, sent.LastError)
		require.NotEmpty(t, sent.Receipt)

		began := pgtest.One[time.Time](t, db, "SELECT now()")
		count, err := db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: day})
		require.NoError(t, err)
		require.Equal(t, 1, count)
		slim := sent
		slim.Payload, slim.LastError, slim.Receipt = nil, "", ""
		require.Equal(t, slim, db.Get(t, n.Key()))
		require.True(t, pgtest.One[bool](t, db, `SELECT num_nulls(payload_json, last_error, receipt) = 3
			AND purged_at BETWEEN $1 AND now() FROM outbox_notifications`, began))

		before := rowText(t, db, slim.ID)
		n.Payload = "other"
		res := db.Add(t, n)
		require.Equal(t, outbox.OutcomeExisting, res.Outcome)
		require.Equal(t, slim, res.Notification)
		require.Equal(t, outbox.OutcomeExisting, db.AddMany(t, n)[0].Outcome)
		count, err = db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: day})
		require.NoError(t, err)
		require.Zero(t, count, "nothing is left to take")
		require.Equal(t, before, rowText(t, db, slim.ID))
	})

	t.Run("forgets_the_key_with_Delete_and_a_repeat_is_sent_again", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		first := db.Add(t, rejected).Notification
		late := claim(t, db, outbox.ClaimOptions{}).Claimed[0]
		endLeases(t, db)
		deliver(t, db, outbox.Delivered)
		db.MustExec(t, "UPDATE outbox_notifications SET sent_at = "+longAgo)
		_, err := db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: day})
		require.NoError(t, err)

		count, err := db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: day, Delete: true})
		require.NoError(t, err)
		require.Equal(t, 1, count, "slim rows are deleted too")
		require.Zero(t, db.Count(t))
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale}, settle(t, db, outbox.Settlement{Lease: late.Lease, Verdict: outbox.Delivered}))

		res := db.Add(t, rejected)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NotEqual(t, first.ID, res.Notification.ID)
		require.JSONEq(t, `{"slot": "10:00"}`, string(claim(t, db, outbox.ClaimOptions{}).Claimed[0].Notification.Payload))
	})

	for name, opts := range both {
		t.Run("touches_only_what_was_sent_long_enough_ago/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			ripe := map[string]bool{}
			for what, set := range map[string]string{
				"sent":                 "status = 'sent', sent_at = now() - interval '1 day'",
				"sent of another type": "status = 'sent', sent_at = now() - interval '1 year', type = 'other'",
				"sent later":           "status = 'sent', sent_at = now()",
				"sent by another":      "status = 'sent', sent_at = NULL",
				"sent in future":       "status = 'sent', sent_at = 'infinity'",
				"pending":              "status = 'pending', sent_at = " + longAgo,
				"in flight":            "status = 'pending', sent_at = " + longAgo + ", lease_token = gen_random_uuid(), lease_until = now() + interval '1 hour', lease_version = 1",
				"failed":               "status = 'failed', sent_at = " + longAgo + ", sent_version = 1",
				"of another":           "status = 'cancelled', sent_at = " + longAgo,
			} {
				id := db.Add(t, outbox.NewNotification{Type: what, Payload: what}).Notification.ID
				db.MustExec(t, "UPDATE outbox_notifications SET created_at = now() - interval '2 years', "+set+" WHERE id = $1", id)
				ripe[what] = what == "sent"
			}
			// A minute from here on, and again before the second purge: it may take that long to get there.
			later := func() {
				db.MustExec(t, "UPDATE outbox_notifications SET sent_at = now() - interval '1 day' + interval '1 minute' WHERE payload_json::text = '\"sent later\"'")
			}
			later()
			rows := func(of bool) (texts []string) {
				for what, is := range ripe {
					if is == of {
						texts = append(texts, pgtest.One[string](t, db, `SELECT coalesce((SELECT ctid || ' ' || o::text
							FROM outbox_notifications AS o WHERE payload_json::text = $1), 'gone')`, `"`+what+`"`))
					}
				}
				return texts
			}
			before := rows(false)
			require.NotContains(t, before, "gone")
			opts := opts // subtests run side by side
			opts.Types = []string{"sent", "sent later", "sent by another", "sent in future", "pending", "in flight", "failed", "of another"}
			count, err := db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 1, count)
			require.ElementsMatch(t, before, rows(false))
			require.Equal(t, []string{"gone"}, rows(true))

			later()
			opts.Types = nil
			count, err = db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 1, count, "of another type")
			count, err = db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: 1<<63 - 1, Delete: true})
			require.NoError(t, err)
			require.Zero(t, count)
		})

		t.Run("walks_through_the_table_in_transactions_of_a_batch/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 90)
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'failed' WHERE id BETWEEN 11 AND 35") // more than two batches without any
			db.MustExec(t, "UPDATE outbox_notifications SET id = id + 1000000 WHERE id > 50")
			db.MustExec(t, "UPDATE outbox_notifications SET id = id - 1000000 WHERE id BETWEEN 6 AND 10")
			db.MustExec(t, `CREATE TABLE seen (id bigint, xid text);
				CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN
					INSERT INTO seen VALUES (OLD.id, txid_current());
					RETURN coalesce(NEW, OLD);
				END $$;
				CREATE TRIGGER note BEFORE UPDATE OR DELETE ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION note()`)
			var log statementLog
			store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log }), outbox.Config{Logger: discard})
			require.NoError(t, err)
			opts := opts
			opts.BatchSize = 10
			count, err := store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 65, count)
			require.Len(t, log.all(), 10) // the last finds nothing
			require.Equal(t, "5,10,10,10,10,10,10", pgtest.One[string](t, db, `SELECT string_agg(n::text, ',' ORDER BY n)
				FROM (SELECT count(*) AS n FROM seen GROUP BY xid) AS t`))
			require.Equal(t, 25, pgtest.One[int](t, db, "SELECT count(*) FROM outbox_notifications WHERE payload_json IS NOT NULL"))
		})

		t.Run("keeps_what_is_done_when_its_context_ends_and_goes_on_when_called_again/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 95)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.Tracer = &afterQueries{n: 3, do: cancel}
			}), outbox.Config{Logger: discard})
			require.NoError(t, err)
			opts := opts
			opts.BatchSize = 10
			count, err := store.Purge(ctx, opts)
			require.ErrorIs(t, err, context.Canceled)
			require.ErrorContains(t, err, "outbox: purge: ")
			require.Equal(t, 30, count)
			count, err = store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 65, count)
			require.Zero(t, unpurged(t, db))
		})

		t.Run("returns_what_is_done_beside_an_error/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 60)
			db.MustExec(t, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;
				CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON outbox_notifications FOR EACH ROW WHEN (OLD.id = 55) EXECUTE FUNCTION refuse()`)
			opts := opts
			opts.BatchSize = 10
			count, err := db.Store.Purge(t.Context(), opts)
			require.ErrorContains(t, err, "not this one")
			require.Equal(t, 50, count)
			require.Equal(t, 10, unpurged(t, db))
		})

		t.Run("runs_a_batch_again_whose_commit_fails_and_passes_over_none/"+name, func(t *testing.T) {
			// When the commit fails, the result has been read already.
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 30)
			db.MustExec(t, `CREATE SEQUENCE runs; CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN
					IF nextval('runs') = 1 THEN RAISE SQLSTATE '40001'; END IF;
					RETURN NULL;
				END $$;
				CREATE CONSTRAINT TRIGGER fail_once AFTER UPDATE OR DELETE ON outbox_notifications DEFERRABLE INITIALLY DEFERRED
					FOR EACH ROW WHEN (OLD.id = 15) EXECUTE FUNCTION fail_once()`)
			opts := opts
			opts.BatchSize = 10
			count, err := db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 30, count)
			require.Zero(t, unpurged(t, db))
			require.EqualValues(t, 2, pgtest.One[int64](t, db, "SELECT last_value FROM runs"))
		})

		t.Run("waits_for_nobody_and_leaves_what_others_hold_to_the_next_call/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 6)
			holder := db.MustBegin(t)
			for _, id := range []int64{2, 5} {
				res, err := db.Store.AddNotification(t.Context(), holder, outbox.NewNotification{Type: "reject", BookingID: id, CandidateTgID: id})
				require.NoError(t, err)
				require.Equal(t, outbox.OutcomeExisting, res.Outcome)
			}
			count, err := pgtest.Await(t, pgtest.Later(func() (int, error) { return db.Store.Purge(t.Context(), opts) }))
			require.NoError(t, err)
			require.Equal(t, 4, count)
			require.NoError(t, holder.Commit(t.Context()))
			require.Equal(t, 2, unpurged(t, db))
			count, err = db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 2, count)
		})

		for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
			t.Run("leaves_a_row_that_was_requeued_before_it_was_locked/"+name+"/"+isolation, func(t *testing.T) {
				// A policy halts the statement at row 2, when its snapshot is taken. 3 and 4 are
				// requeued then, and 4 is sent once more; 5 is changed and still ripe.
				t.Parallel()
				db := pgtest.NewDB(t)
				addSent(t, db, 6)
				db.MustExec(t, purgeGate+`
					CREATE POLICY gate ON outbox_notifications USING (gate(id));
					ALTER TABLE outbox_notifications ENABLE ROW LEVEL SECURITY;
					GRANT ALL ON outbox_notifications TO pg_monitor`)
				pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
					cfg.ConnConfig.RuntimeParams["role"] = "pg_monitor"
					cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = isolation
				})
				store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
				require.NoError(t, err)
				open := closeGate(t, db)
				purged := pgtest.Later(func() (int, error) { return store.Purge(t.Context(), opts) })
				db.WaitBlocked(t, 1)
				count, err := db.Store.Requeue(t.Context(), outbox.Key{Type: "reject", BookingID: 3, CandidateTgID: 3}, outbox.Key{Type: "reject", BookingID: 4, CandidateTgID: 4})
				require.NoError(t, err)
				require.Equal(t, 2, count)
				db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent', sent_at = now() WHERE id = 4")
				db.MustExec(t, "UPDATE outbox_notifications SET correlation_id = 'changed' WHERE id = 5")
				open()
				count, err = pgtest.Await(t, purged)
				require.NoError(t, err)
				require.Equal(t, 4, count)
				require.Equal(t, "3,4", pgtest.One[string](t, db, `SELECT string_agg(id::text, ',' ORDER BY id)
					FROM outbox_notifications WHERE payload_json IS NOT NULL AND purged_at IS NULL`))
				require.Len(t, claim(t, db, outbox.ClaimOptions{}).Claimed, 1)
			})
		}

		t.Run("has_a_requeue_that_waited_for_it_find_nothing_to_send/"+name, func(t *testing.T) {
			// A trigger halts the purge at row 2, when it has locked all of them.
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 3)
			db.MustExec(t, purgeGate+`
				CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM gate(OLD.id); RETURN coalesce(NEW, OLD); END $$;
				CREATE TRIGGER gate BEFORE UPDATE OR DELETE ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION gate()`)
			open := closeGate(t, db)
			purged := pgtest.Later(func() (int, error) { return db.Store.Purge(t.Context(), opts) })
			db.WaitBlocked(t, 1)
			requeued := pgtest.Later(func() (int, error) {
				return db.Store.Requeue(t.Context(), outbox.Key{Type: "reject", BookingID: 3, CandidateTgID: 3}, outbox.Key{Type: "reject", BookingID: 1, CandidateTgID: 1})
			})
			db.WaitBlocked(t, 2)
			open()
			count, err := pgtest.Await(t, purged)
			require.NoError(t, err)
			require.Equal(t, 3, count)
			count, err = pgtest.Await(t, requeued)
			require.NoError(t, err)
			require.Zero(t, count)
			require.Empty(t, claim(t, db, outbox.ClaimOptions{}).Claimed)
		})

		t.Run("purges_each_row_for_one_of_many_at_once/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addSent(t, db, 2000)
			opts := opts
			opts.BatchSize = 50
			var waits []<-chan pgtest.Result[int]
			for range 8 {
				waits = append(waits, pgtest.Later(func() (int, error) { return db.Store.Purge(t.Context(), opts) }))
			}
			sum := 0
			for _, c := range waits {
				count, err := pgtest.Await(t, c)
				require.NoError(t, err)
				sum += count
			}
			require.Equal(t, 2000, sum)
			require.Zero(t, unpurged(t, db))
		})

		t.Run("works_in_a_table_of_another_service/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, pythonTable)
			for i := range 3 {
				db.MustExec(t, pythonInsert, 1+i, "reject", 42)
			}
			require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent', created_at = "+longAgo)
			count, err := db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Zero(t, count, "nobody knows when they were sent")
			db.MustExec(t, "UPDATE outbox_notifications SET sent_at = created_at WHERE status = 'sent' AND sent_at IS NULL")
			count, err = db.Store.Purge(t.Context(), opts)
			require.NoError(t, err)
			require.Equal(t, 3, count)
		})
	}

	t.Run("leaves_slim_rows_out_of_a_requeue", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusSent, 8)
		db.MustExec(t, "UPDATE outbox_notifications SET sent_at = now() - id * interval '6 hours', payload_json = '1'")
		count, err := db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: 27 * time.Hour}) // of all four shapes
		require.NoError(t, err)
		require.Equal(t, 4, count)
		before := rowText(t, db, 5)
		list, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent, Types: []string{keys[0].Type, keys[4].Type}})
		require.NoError(t, err)
		require.Equal(t, []int64{1, 2}, ids(list))
		count, err = db.Store.Requeue(t.Context(), keys...)
		require.NoError(t, err)
		require.Equal(t, 2, count)
		list, err = db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent})
		require.NoError(t, err)
		require.Empty(t, list)
		require.Equal(t, before, rowText(t, db, 5))
		for _, c := range claim(t, db, outbox.ClaimOptions{}).Claimed {
			require.NotEmpty(t, c.Notification.Payload)
		}
	})

	t.Run("takes_a_slim_row_that_was_filled_again_for_a_full_one", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addSent(t, db, 1)
		purge := outbox.PurgeOptions{OlderThan: day}
		for range 2 {
			n, err := db.Store.Purge(t.Context(), purge)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'pending'") // as another service may
			key := outbox.Key{Type: "reject", BookingID: 1, CandidateTgID: 1}
			again := outbox.NewNotification{Type: key.Type, BookingID: 1, CandidateTgID: 1, Payload: json.RawMessage(`{"slot":"11:00"}`)}
			require.Equal(t, outbox.OutcomeRefreshed, db.Add(t, again).Outcome)
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'failed'")
			n, err = db.Store.Requeue(t.Context(), key)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'failed'")
			list, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed})
			require.NoError(t, err)
			require.Len(t, list, 1)
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent', sent_at = "+longAgo)
		}
	})

	t.Run("refuses_bad_options_before_any_SQL", func(t *testing.T) {
		t.Parallel()
		store := neverUsed(t)
		for what, c := range map[string]struct {
			field string
			opts  outbox.PurgeOptions
		}{
			"no age":           {"OlderThan", outbox.PurgeOptions{}},
			"no age, deleting": {"OlderThan", outbox.PurgeOptions{Delete: true}},
			"negative":         {"OlderThan", outbox.PurgeOptions{OlderThan: -day}},
			"no microsecond":   {"OlderThan", outbox.PurgeOptions{OlderThan: time.Microsecond - 1}},
			"no type at all":   {"Types", outbox.PurgeOptions{OlderThan: day, Types: []string{}}},
			"NUL":              {"Types", outbox.PurgeOptions{OlderThan: day, Types: []string{"a", "b\x00"}}},
			"UTF-8":            {"Types", outbox.PurgeOptions{OlderThan: day, Types: []string{"\xff"}}},
			"negative batch":   {"BatchSize", outbox.PurgeOptions{OlderThan: day, BatchSize: -1}},
			"too many":         {"BatchSize", outbox.PurgeOptions{OlderThan: day, BatchSize: 10_001}},
		} {
			count, err := store.Purge(t.Context(), c.opts)
			requireInvalid(t, err, c.field, -1, what)
			require.Zero(t, count)
		}
	})

	t.Run("needs_the_right_to_delete_only_to_delete", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addSent(t, db, 2)
		role := pgtest.Name("purger")
		db.MustExec(t, "CREATE ROLE "+role+"; GRANT SELECT, UPDATE ON outbox_notifications TO "+role)
		t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP ROLE "+role)) })
		t.Cleanup(func() {
			_, err := db.Exec(context.Background(), "DROP OWNED BY "+role)
			require.NoError(t, err)
		})
		store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["role"] = role }),
			outbox.Config{Logger: discard})
		require.NoError(t, err)
		count, err := store.Purge(t.Context(), both["strip"])
		require.NoError(t, err)
		require.Equal(t, 2, count)
		_, err = store.Purge(t.Context(), both["delete"])
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "outbox: purge: the database role may not do this")
		require.Equal(t, 2, db.Count(t))
		db.MustExec(t, "GRANT DELETE ON outbox_notifications TO "+role)
		count, err = store.Purge(t.Context(), both["delete"])
		require.NoError(t, err)
		require.Equal(t, 2, count)
	})

	t.Run("names_itself_and_the_remedy_where_there_is_no_table", func(t *testing.T) {
		t.Parallel()
		_, err := pgtest.NewEmptyDB(t).Store.Purge(t.Context(), both["strip"])
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "outbox: purge: there is no table")
	})

	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe,
		pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run("works_in_every_exec_mode_and_schema/"+mode.String(), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.DefaultQueryExecMode = mode })
			store, err := outbox.NewPGStore(pool, outbox.Config{Schema: `odd "{where}" {table}`, Logger: discard})
			require.NoError(t, err)
			require.NoError(t, store.Migrate(t.Context()))
			_, err = pool.Exec(t.Context(), `INSERT INTO "odd ""{where}"" {table}".outbox_notifications (type, booking_id, status, sent_at)
				SELECT 'o''d"d\,{}' || i % 2, i, 'sent', `+longAgo+` FROM generate_series(1, 8) AS i`)
			require.NoError(t, err)
			for i, opts := range []outbox.PurgeOptions{
				{OlderThan: day, Types: []string{`o'd"d\,{}0`, "none"}}, {OlderThan: time.Microsecond, BatchSize: 2},
				{OlderThan: day, Types: []string{`o'd"d\,{}1`}, Delete: true, BatchSize: 3}, {OlderThan: time.Microsecond, Delete: true},
			} {
				count, err := store.Purge(t.Context(), opts)
				require.NoError(t, err)
				require.Equal(t, 4, count, i)
			}
		})
	}
}

// afterQueries calls do when n queries have ended.
type afterQueries struct {
	n    int64
	do   func()
	seen atomic.Int64
}

func (a *afterQueries) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (a *afterQueries) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {
	if a.seen.Add(1) == a.n {
		a.do()
	}
}

// TestPurgePlan shows on 300,000 rows, with an index of the other service beside ours,
// that a batch reads by the primary key only, in plans for given values and in generic
// ones alike.
func TestPurgePlan(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	db.MustExec(t, "CREATE INDEX ix_outbox_notifications_status ON outbox_notifications (status)")
	db.Fill(t, `INSERT INTO outbox_notifications (type, booking_id, status, sent_at)
		SELECT CASE WHEN i % 10000 = 0 THEN 'rare' ELSE 'type' || i % 5 END, i, CASE WHEN i % 100 = 0 THEN 'failed' ELSE 'sent' END,
			CASE WHEN i % 100 > 0 THEN now() - (300000 - i) * interval '1 minute' END
		FROM generate_series(1, 300000) AS i`)
	for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
		for name, opts := range both {
			for _, types := range []string{"NULL", "'{rare}'", "'{type1,type2}'"} {
				for _, after := range []int{-1 << 63, 150000} {
					t.Run(fmt.Sprintf("%s/%s/%s/%d", mode, name, types, after), func(t *testing.T) {
						tx := db.MustBegin(t)
						_, err := tx.Exec(t.Context(), "SET LOCAL plan_cache_mode = "+mode)
						require.NoError(t, err)
						_, err = tx.Exec(t.Context(), "PREPARE it AS "+db.Store.PurgeSQL(opts))
						require.NoError(t, err)
						var doc []struct{ Plan planNode }
						require.NoError(t, json.Unmarshal(pgtest.One[json.RawMessage](t, tx,
							fmt.Sprintf("EXPLAIN (FORMAT JSON) EXECUTE it (%d, 1000, %s, %d)", after, types, day.Microseconds())), &doc))
						_, err = tx.Exec(t.Context(), "DEALLOCATE it") // it outlives the transaction
						require.NoError(t, err)
						require.NoError(t, tx.Rollback(t.Context()))
						var scans []string
						for _, s := range doc[0].Plan.scans() {
							require.Contains(t, s.Type, "Index", "%+v", s)
							require.Equal(t, "outbox_notifications_pkey", s.Index, "%+v", s)
							scans = append(scans, s.IndexCond)
						}
						require.Len(t, scans, 3, "the page, what is ripe in it, and what is locked of that")
						all := strings.Join(scans, "; ")
						require.Equal(t, 1, strings.Count(all, "id > "), all)
						require.Equal(t, 2, strings.Count(all, "id = ANY"), all)
					})
				}
			}
		}
	}
}

// TestBeforeMigration3 is about processes of this version in a schema that has not
// got the mark of slim rows yet.
func TestBeforeMigration3(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	for _, name := range []string{"0001_outbox_notifications.up.sql", "0002_delivery.up.sql"} {
		sql, err := migrations.FS.ReadFile(name)
		require.NoError(t, err)
		db.MustExec(t, string(sql))
	}

	db.Add(t, rejected)
	db.AddMany(t, rejected, outbox.NewNotification{Type: "other"})
	deliver(t, db, outbox.Delivered)
	require.Equal(t, outbox.OutcomeExisting, db.Add(t, rejected).Outcome)
	_, err := db.Store.List(t.Context(), outbox.Filter{})
	require.NoError(t, err)
	_, err = db.Store.Stats(t.Context())
	require.NoError(t, err)

	_, err = db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: time.Microsecond})
	require.ErrorIs(t, err, outbox.ErrSetup)
	require.ErrorContains(t, err, "not migrated")
	_, err = db.Store.Requeue(t.Context(), rejected.Key())
	require.ErrorIs(t, err, outbox.ErrSetup)
	_, err = db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent})
	require.ErrorIs(t, err, outbox.ErrSetup)

	filenode := pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'outbox_notifications'")
	require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
	require.Equal(t, filenode, pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'outbox_notifications'"), "the table was rewritten")
	require.Equal(t, 3, pgtest.One[int](t, db, "SELECT max(version) FROM outbox_migrations"))
	count, err := db.Store.Purge(t.Context(), outbox.PurgeOptions{OlderThan: time.Microsecond})
	require.NoError(t, err)
	require.Equal(t, 2, count)
}
