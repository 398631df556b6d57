package outbox_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// Mutations of the code that turn tests red, each for the right reason:
//
//	another condition on the status in
//	requeueSQL, or none                        TestRequeue/leaves_alone_...
//	no FOR UPDATE in requeueSQL                TestRequeue/counts_a_row_for_one_of_two_at_once
//	SKIP LOCKED in requeueSQL                  TestRequeue/waits_..., .../runs_again_after_a_deadlock...
//	the update by ctid                         TestRequeue/builds_upon_what_a_rival_left,
//	                                           TestRequeueMatching/leaves_a_row_that_no_longer_matches...
//	no sort in Requeue                         TestRequeue/locks_in_the_order_of_batches
//	any line of requeuedSQL left out           TestRequeue/has_a_sent_row..., .../makes_it_due_now...
//	sent_version or receipt cleared always     TestRequeue/keeps_what_was_delivered_of_a_failed_row
//	not_after cleared always, or never         TestRequeue/clears_a_NotAfter_...
//	now() for clock_timestamp()                TestRequeue/asks_the_clock_and_not_the_transaction...
//	the pool for the transaction               TestRequeue/is_all_or_nothing
//	no retry, or n kept from the run before    TestRequeue/runs_again_after_a_deadlock...
//	no ReadCommitted                           TestRequeue/waits_even_where_the_default_isolation_is_stricter
//	no check of keys, no index in its error    TestRequeue/refuses_a_bad_key...
//	no return for no keys                      TestRequeue/runs_nothing_for_no_keys
//	no SKIP LOCKED in requeueMatchingSQL       TestRequeueMatching/passes_over_rows_that_others_hold...
//	no lock there                              TestRequeueMatching/requeues_each_row_for_one_of_many..., .../leaves_a_row...
//	no ORDER BY there, no sort of the result   TestRequeueMatching/requeues_what_matches..., .../requeues_just_what_List_gives
//	no status required                         TestRequeueMatching/requires_the_status_by_name
//	a condition left out, or >= for >          TestList/gives_just_the_rows_that_match...
//	After left out                             TestList/pages_through_what_exists_once...
//	no ORDER BY in listSQL or pendingSQL       TestList/gives_just_the_rows_that_match...
//	Limit clamped, another default             TestList/refuses_a_bad_filter..., .../gives_just_...
//	no coalesce of created_at                  TestList/takes_a_row_without_created_at...
//	not all types in allTypesSQL               TestList/finds_a_booking_under_all_of_its_types
//	in flight without a token, or for good     TestStats/count_by_type_...
//	due, oldest or next with those in flight   TestStats/count_by_type_...
//	infinity taken for an age                  TestStats/count_by_type_...
//	other statuses counted as sent             TestStats/count_by_type_...
//	totals of one type                         TestStats/count_by_type_...
//	READ COMMITTED in Stats                    TestStats/are_of_one_moment
//	sent rows always counted                   TestOperatePlan/Stats
//	no counter beside reltuples                TestOperatePlan/Stats_of_a_large_table_that_was_never_analyzed
//	the status a parameter                     TestOperatePlan/.../failed...
//	no OFFSET 0 in pendingSQL                  TestOperatePlan/.../pending_types...
//	a booking not by a subquery, or not by
//	its types                                  TestOperatePlan/.../booking...

// deliver claims what is due and settles it.
func deliver(t testing.TB, db *pgtest.DB, verdict outbox.Verdict) {
	t.Helper()
	res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 100, Lease: time.Minute})
	require.NoError(t, err)
	require.NotEmpty(t, res.Claimed)
	var settlements []outbox.Settlement
	for _, c := range res.Claimed {
		s := outbox.Settlement{Lease: c.Lease, Verdict: verdict}
		if verdict == outbox.Delivered {
			s.Receipt = fmt.Sprintf("message %d.%d", c.ID, c.Notification.Version)
		} else {
			s.Error = "blocked by the user"
		}
		settlements = append(settlements, s)
	}
	results, err := db.Store.Settle(t.Context(), settlements)
	require.NoError(t, err)
	for _, r := range results {
		require.NotContains(t, []outbox.LeaseResult{outbox.LeaseHeld, outbox.LeaseStale}, r)
	}
}

// rowText is all that is stored of a row, and where: it tells of any write.
func rowText(t testing.TB, db *pgtest.DB, id int64) string {
	t.Helper()
	return pgtest.One[string](t, db, "SELECT ctid || ' ' || o::text FROM outbox_notifications AS o WHERE id = $1", id)
}

// seed inserts rows of a status, of keys of all four shapes in turn.
func seed(t testing.TB, db *pgtest.DB, status outbox.Status, n int) []outbox.Key {
	t.Helper()
	var keys []outbox.Key
	for i := range int64(n) {
		k := outbox.Key{Type: fmt.Sprintf("%s%d", status, i%3), BookingID: 10 + i, CandidateTgID: 10 + i}
		switch i % 4 {
		case 1:
			k.BookingID = 0
		case 2:
			k.CandidateTgID = 0
		case 3:
			k = outbox.Key{Type: fmt.Sprintf("%s only %d", status, i)}
		}
		db.Add(t, outbox.NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
		keys = append(keys, k)
	}
	db.MustExec(t, "UPDATE outbox_notifications SET status = $1 WHERE starts_with(type, $1)", string(status))
	return keys
}

func ids(ns []outbox.Notification) []int64 {
	list := []int64{}
	for _, n := range ns {
		list = append(list, n.ID)
	}
	return list
}

func TestRequeue(t *testing.T) {
	t.Parallel()

	t.Run("has_a_sent_row_delivered_afresh", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		n := rejected
		n.NotAfter = time.Now().Add(time.Hour)
		db.Add(t, n)
		deliver(t, db, outbox.Retry)
		deliver(t, db, outbox.Delivered)
		sent := db.Get(t, n.Key())
		require.Equal(t, outbox.StatusSent, sent.Status)
		require.NotZero(t, sent.SentAt)
		require.Equal(t, 2, sent.Attempts)

		count, err := db.Store.Requeue(t.Context(), n.Key())
		require.NoError(t, err)
		require.Equal(t, 1, count)
		want := sent
		want.Status, want.Attempts = outbox.StatusPending, 0
		want.SentVersion, want.Receipt, want.SentAt = 0, "", time.Time{}
		require.NotEmpty(t, want.LastError)
		require.NotZero(t, want.NotAfter)
		require.Equal(t, want, db.Get(t, n.Key()))
		require.Equal(t, 2, pgtest.One[int](t, db, "SELECT num_nulls(receipt, sent_at) FROM outbox_notifications"))

		deliver(t, db, outbox.Delivered)
		require.Equal(t, outbox.StatusSent, db.Get(t, n.Key()).Status)
	})

	t.Run("keeps_what_was_delivered_of_a_failed_row", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute})
		require.NoError(t, err)
		newer := rejected
		newer.Payload = "newer"
		db.Add(t, newer)
		_, err = db.Store.Settle(t.Context(), []outbox.Settlement{{Lease: res.Claimed[0].Lease, Verdict: outbox.Delivered, Receipt: "m1"}})
		require.NoError(t, err)
		deliver(t, db, outbox.Failed)
		failed := db.Get(t, rejected.Key())
		require.Equal(t, outbox.StatusFailed, failed.Status)

		count, err := db.Store.Requeue(t.Context(), rejected.Key())
		require.NoError(t, err)
		require.Equal(t, 1, count)
		want := failed
		want.Status, want.Attempts = outbox.StatusPending, 0
		require.EqualValues(t, 1, want.SentVersion)
		require.Equal(t, "m1", want.Receipt)
		require.Equal(t, "blocked by the user", want.LastError)
		require.Equal(t, want, db.Get(t, rejected.Key()))
	})

	t.Run("makes_it_due_now_without_any_lock_or_lease", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		id := db.Add(t, rejected).Notification.ID
		db.MustExec(t, `UPDATE outbox_notifications SET status = 'failed', next_retry_at = now() + interval '1 day', locked_at = now(),
			lease_token = gen_random_uuid(), lease_until = now() + interval '1 day', lease_version = 1`)
		count, err := db.Store.Requeue(t.Context(), rejected.Key())
		require.NoError(t, err)
		require.Equal(t, 1, count)
		require.Equal(t, 5, pgtest.One[int](t, db, `SELECT num_nulls(next_retry_at, locked_at, lease_token, lease_until, lease_version)
			FROM outbox_notifications WHERE id = $1`, id))
		deliver(t, db, outbox.Delivered)
	})

	t.Run("clears_a_NotAfter_that_has_passed_and_keeps_a_later_one", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := append(seed(t, db, outbox.StatusFailed, 2), seed(t, db, outbox.StatusSent, 2)...)
		db.MustExec(t, `UPDATE outbox_notifications SET not_after = now() + CASE WHEN id % 2 = 0 THEN interval '1 hour' ELSE interval '-1 second' END`)
		count, err := db.Store.Requeue(t.Context(), keys...)
		require.NoError(t, err)
		require.Equal(t, 4, count)
		for _, k := range keys {
			n := db.Get(t, k)
			require.Equal(t, n.ID%2 != 0, n.NotAfter.IsZero(), "%v", n)
		}
		res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 10, Lease: time.Minute})
		require.NoError(t, err)
		require.Len(t, res.Claimed, 4)
		require.Empty(t, res.Failed)
	})

	t.Run("asks_the_clock_and_not_the_transaction_whether_NotAfter_has_passed", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		id := db.Add(t, rejected).Notification.ID
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'failed'")
		holder := db.MustBegin(t)
		_, err := holder.Exec(t.Context(), "UPDATE outbox_notifications SET last_error = 'held' WHERE id = $1", id)
		require.NoError(t, err)
		requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), rejected.Key()) })
		db.WaitBlocked(t, 1)
		// Later than the start of the transaction that waits, but passed when it goes on.
		_, err = holder.Exec(t.Context(), "UPDATE outbox_notifications SET not_after = clock_timestamp() WHERE id = $1", id)
		require.NoError(t, err)
		require.NoError(t, holder.Commit(t.Context()))
		count, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, 1, count)
		require.Zero(t, db.Get(t, rejected.Key()).NotAfter)
	})

	t.Run("leaves_alone_and_does_not_count_what_is_not_settled", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		pending := db.Add(t, outbox.NewNotification{Type: "pending", NotBefore: time.Now().Add(time.Hour)}).Notification
		inFlight := db.Add(t, outbox.NewNotification{Type: "in flight", BookingID: 1}).Notification
		lease(t, db, inFlight.ID, "1 minute")
		foreign := db.Add(t, outbox.NewNotification{Type: "cancelled", CandidateTgID: 1}).Notification
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'cancelled' WHERE id = $1", foreign.ID)
		before := []string{rowText(t, db, pending.ID), rowText(t, db, inFlight.ID), rowText(t, db, foreign.ID)}
		count, err := db.Store.Requeue(t.Context(), pending.Key(), inFlight.Key(), foreign.Key(),
			outbox.Key{Type: "missing"}, outbox.Key{Type: "pending", BookingID: 1 << 40, CandidateTgID: 1})
		require.NoError(t, err)
		require.Zero(t, count)
		require.Equal(t, before, []string{rowText(t, db, pending.ID), rowText(t, db, inFlight.ID), rowText(t, db, foreign.ID)})
	})

	t.Run("takes_just_the_keys_given_of_every_shape", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		for i := range 16 {
			k := outbox.NewNotification{Type: "a"}
			if i >= 8 {
				k.Type = "b"
			}
			k.BookingID, k.CandidateTgID = int64(i>>1%4%2), -int64(i%2)
			k.RecruiterTgID = int64(i) + 1
			db.Add(t, k)
		}
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		for _, k := range []outbox.Key{{Type: "a"}, {Type: "a", BookingID: 1}, {Type: "a", CandidateTgID: -1}, {Type: "a", BookingID: 1, CandidateTgID: -1}} {
			count, err := db.Store.Requeue(t.Context(), k)
			require.NoError(t, err)
			require.Equal(t, 1, count)
			require.Equal(t, []outbox.Key{k}, keysOf(t, db, outbox.StatusPending))
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		}
	})

	t.Run("counts_a_key_given_twice_once", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusSent, 5)
		count, err := db.Store.Requeue(t.Context(), append(keys, keys...)...)
		require.NoError(t, err)
		require.Equal(t, 5, count)
		count, err = db.Store.Requeue(t.Context(), keys...)
		require.NoError(t, err)
		require.Zero(t, count)
	})

	t.Run("runs_a_number_of_statements_that_does_not_grow", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusFailed, 200)
		var log statementLog
		store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log }), outbox.Config{Logger: discard})
		require.NoError(t, err)
		count, err := store.Requeue(t.Context(), keys...)
		require.NoError(t, err)
		require.Equal(t, 200, count)
		require.Len(t, log.all(), 6) // begin, the four shapes, commit
	})

	t.Run("refuses_a_bad_key_by_its_index_before_any_SQL", func(t *testing.T) {
		t.Parallel()
		store := neverUsed(t)
		good := outbox.Key{Type: "good"}
		for what, typ := range map[string]string{"empty": "", "NUL": "a\x00b", "UTF-8": "a\xff", "long": strings.Repeat("ю", 51)} {
			_, err := store.Requeue(t.Context(), good, good, outbox.Key{Type: typ, BookingID: 1})
			requireInvalid(t, err, "Type", 2, what)
		}
	})

	t.Run("runs_nothing_for_no_keys", func(t *testing.T) {
		t.Parallel()
		count, err := neverUsed(t).Requeue(t.Context())
		require.NoError(t, err)
		require.Zero(t, count)
	})

	t.Run("is_all_or_nothing", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusSent, 4)
		// The last shape to be requeued.
		db.MustExec(t, "ALTER TABLE outbox_notifications ADD CHECK (status <> 'pending' OR booking_id IS NOT NULL OR candidate_tg_id IS NOT NULL)")
		count, err := db.Store.Requeue(t.Context(), keys...)
		require.Equal(t, "23514", sqlState(t, err))
		require.ErrorContains(t, err, "outbox: requeue: ")
		require.Zero(t, count)
		require.Len(t, keysOf(t, db, outbox.StatusSent), 4)
	})

	t.Run("waits_for_a_caller_that_holds_a_row", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		deliver(t, db, outbox.Delivered)
		holder := db.MustBegin(t)
		res, err := db.Store.AddNotification(t.Context(), holder, rejected)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeExisting, res.Outcome)
		requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), rejected.Key()) })
		db.WaitBlocked(t, 1)
		require.Equal(t, outbox.StatusSent, db.Get(t, rejected.Key()).Status)
		require.NoError(t, holder.Commit(t.Context()))
		count, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, 1, count)
	})

	t.Run("is_bounded_by_its_context_while_it_waits", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		deliver(t, db, outbox.Delivered)
		holder := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), holder, rejected)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(ctx, rejected.Key()) })
		db.WaitBlocked(t, 1)
		cancel()
		_, err = pgtest.Await(t, requeued)
		require.ErrorIs(t, err, context.Canceled)
	})

	t.Run("builds_upon_what_a_rival_left", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusFailed, 8)
		holder := db.MustBegin(t)
		_, err := holder.Exec(t.Context(), `UPDATE outbox_notifications SET last_error = 'the rival''s',
			status = CASE WHEN candidate_tg_id IS NULL THEN 'pending' ELSE status END`)
		require.NoError(t, err)
		requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), keys...) })
		db.WaitBlocked(t, 1)
		require.NoError(t, holder.Commit(t.Context()))
		count, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, 4, count, "half are no longer failed")
		for _, k := range keys {
			n := db.Get(t, k)
			require.Equal(t, outbox.StatusPending, n.Status)
			require.Equal(t, "the rival's", n.LastError)
		}
	})

	t.Run("counts_a_row_for_one_of_two_at_once", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusFailed, 8)
		holder := db.MustBegin(t)
		_, err := holder.Exec(t.Context(), "SELECT FROM outbox_notifications FOR UPDATE")
		require.NoError(t, err)
		backwards := slices.Clone(keys)
		slices.Reverse(backwards)
		a := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), keys...) })
		b := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), backwards...) })
		db.WaitBlocked(t, 2)
		require.NoError(t, holder.Rollback(t.Context()))
		countA, err := pgtest.Await(t, a)
		require.NoError(t, err)
		countB, err := pgtest.Await(t, b)
		require.NoError(t, err)
		require.Equal(t, 8, countA+countB)
	})

	t.Run("locks_in_the_order_of_batches", func(t *testing.T) {
		// While it waits for the first key of that order it holds none of the others.
		t.Parallel()
		order := []outbox.Key{
			{Type: "B", BookingID: 1, CandidateTgID: 1}, {Type: "a", BookingID: -1, CandidateTgID: 1},
			{Type: "a", BookingID: 2, CandidateTgID: -1}, {Type: "a", BookingID: 2, CandidateTgID: 1}, {Type: "é", BookingID: 1, CandidateTgID: 1},
			{Type: "A", CandidateTgID: 1}, {Type: "A", BookingID: 1}, {Type: "A"},
		}
		db := pgtest.NewDB(t)
		for _, k := range order {
			db.Add(t, outbox.NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
		}
		deliver(t, db, outbox.Delivered)
		for i, first := range order {
			holder := db.MustBegin(t)
			_, err := db.Store.AddNotification(t.Context(), holder, outbox.NewNotification{Type: first.Type, BookingID: first.BookingID, CandidateTgID: first.CandidateTgID})
			require.NoError(t, err)
			given := slices.Clone(order)
			slices.Reverse(given)
			ctx, cancel := context.WithCancel(t.Context())
			requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(ctx, given...) })
			db.WaitBlocked(t, 1)
			require.Equal(t, len(order)-i-1, pgtest.One[int](t, db, `SELECT count(*) FROM (SELECT FROM outbox_notifications
				WHERE type || coalesce(booking_id, 0) || coalesce(candidate_tg_id, 0) <> $1 FOR UPDATE SKIP LOCKED) AS free`,
				fmt.Sprintf("%s%d%d", first.Type, first.BookingID, first.CandidateTgID)), "waiting for %s", first)
			cancel()
			_, err = pgtest.Await(t, requeued)
			require.ErrorIs(t, err, context.Canceled)
			require.NoError(t, holder.Rollback(t.Context()))
			waitIdle(t, db)
		}
	})

	t.Run("runs_again_after_a_deadlock_with_single_adds", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		// Of two shapes, so that the first is requeued, and counted, before the deadlock.
		first, second := outbox.NewNotification{Type: "a", BookingID: 1, CandidateTgID: 1}, outbox.NewNotification{Type: "b", BookingID: 1}
		db.AddMany(t, first, second)
		deliver(t, db, outbox.Delivered)
		db.MustExec(t, `CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				PERFORM pg_advisory_xact_lock(1);
				RETURN NEW;
			END $$;
			CREATE TRIGGER gate BEFORE UPDATE ON outbox_notifications FOR EACH ROW WHEN (OLD.type = 'a') EXECUTE FUNCTION gate()`)
		caller := db.MustBegin(t)
		_, err := caller.Exec(t.Context(), "SET LOCAL deadlock_timeout = '1min'") // so that the other is the victim
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), caller, second)
		require.NoError(t, err)
		// A wait is looked at once, after a while: that of the requeue has to close the circle.
		open := closeGate(t, db)
		requeued := pgtest.Later(func() (int, error) { return db.Store.Requeue(t.Context(), first.Key(), second.Key()) })
		db.WaitBlocked(t, 1) // with the lock of the first
		added := pgtest.Later(func() (outbox.AddResult, error) { return db.Store.AddNotification(t.Context(), caller, first) })
		db.WaitBlocked(t, 2)
		open()
		_, err = pgtest.Await(t, added)
		require.NoError(t, err)
		require.NoError(t, caller.Commit(t.Context()))
		count, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, 2, count)
	})

	t.Run("waits_even_where_the_default_isolation_is_stricter", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		deliver(t, db, outbox.Failed)
		var log statementLog
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			cfg.ConnConfig.Tracer = &log
			cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = "serializable"
		})
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		holder := db.MustBegin(t)
		_, err = holder.Exec(t.Context(), "UPDATE outbox_notifications SET last_error = 'held'")
		require.NoError(t, err)
		requeued := pgtest.Later(func() (int, error) { return store.Requeue(t.Context(), rejected.Key()) })
		db.WaitBlocked(t, 1)
		require.NoError(t, holder.Commit(t.Context()))
		count, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, 1, count)
		require.Len(t, log.all(), 3, "run once")
	})
}

// waitIdle waits until no other session of the database has a transaction open:
// cancelling a context does not wait for the server.
func waitIdle(t testing.TB, db *pgtest.DB) {
	t.Helper()
	require.Eventually(t, func() bool {
		return pgtest.One[int](t, db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL AND backend_type = 'client backend'`) == 0
	}, 30*time.Second, time.Millisecond, "a session did not end its transaction")
}

// keysOf are the keys with the status, by id.
func keysOf(t testing.TB, db *pgtest.DB, status outbox.Status) []outbox.Key {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT type, coalesce(booking_id, 0), coalesce(candidate_tg_id, 0)
		FROM outbox_notifications WHERE status = $1 ORDER BY id`, string(status))
	require.NoError(t, err)
	keys, err := pgx.CollectRows(rows, pgx.RowToStructByPos[outbox.Key])
	require.NoError(t, err)
	return keys
}

func TestRequeueMatching(t *testing.T) {
	t.Parallel()

	t.Run("requeues_what_matches_lowest_id_first_and_returns_it_as_it_is_now", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		failed := seed(t, db, outbox.StatusFailed, 30)
		seed(t, db, outbox.StatusSent, 3)
		db.MustExec(t, `UPDATE outbox_notifications SET receipt = 'm', sent_version = 1, last_error = 'error', attempts = 7,
			next_retry_at = now(), not_after = now() - interval '1 hour', locked_at = now()`)
		var got []outbox.Notification
		f := outbox.Filter{Status: outbox.StatusFailed, Limit: 8}
		for _, want := range []int{8, 8, 8, 6, 0} {
			page, err := db.Store.RequeueMatching(t.Context(), f)
			require.NoError(t, err)
			require.Len(t, page, want)
			got = append(got, page...)
		}
		for i, n := range got {
			require.Equal(t, failed[i], n.Key())
			require.Equal(t, db.Get(t, n.Key()), n)
			require.Equal(t, outbox.Notification{
				ID: n.ID, Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID, CreatedAt: n.CreatedAt,
				Status: outbox.StatusPending, Version: 1, SentVersion: 1, Receipt: "m", LastError: "error",
			}, n)
		}
		require.Len(t, keysOf(t, db, outbox.StatusSent), 3)

		sent, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent})
		require.NoError(t, err)
		require.Len(t, sent, 3)
		require.Zero(t, sent[0].SentVersion)
		require.Empty(t, sent[0].Receipt)
	})

	t.Run("requeues_just_what_List_gives", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		seedForFilters(t, db)
		for _, status := range []outbox.Status{outbox.StatusSent, outbox.StatusFailed} {
			for _, f := range filters(status, 4) {
				f.Limit = 9
				f.After = 20
				want, err := db.Store.List(t.Context(), f)
				require.NoError(t, err)
				before := keysOf(t, db, outbox.StatusPending)
				got, err := db.Store.RequeueMatching(t.Context(), f)
				require.NoError(t, err)
				require.Equal(t, ids(want), ids(got), filterName(f))
				require.Len(t, keysOf(t, db, outbox.StatusPending), len(before)+len(got))
				db.MustExec(t, "UPDATE outbox_notifications SET status = $1 WHERE id = ANY ($2)", string(status), ids(got))
			}
		}
	})

	t.Run("requires_the_status_by_name", func(t *testing.T) {
		t.Parallel()
		store := neverUsed(t)
		for _, status := range []outbox.Status{"", outbox.StatusPending, "cancelled"} {
			_, err := store.RequeueMatching(t.Context(), outbox.Filter{Status: status, BookingID: 1})
			requireInvalid(t, err, "Status", -1, string(status))
		}
		_, err := store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed, Limit: 1001})
		requireInvalid(t, err, "Limit", -1, "")
	})

	t.Run("passes_over_rows_that_others_hold_and_takes_the_next", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		keys := seed(t, db, outbox.StatusSent, 6)
		holder := db.MustBegin(t)
		for _, k := range []outbox.Key{keys[0], keys[2]} {
			_, err := db.Store.AddNotification(t.Context(), holder, outbox.NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
			require.NoError(t, err)
		}
		got, err := pgtest.Await(t, pgtest.Later(func() ([]outbox.Notification, error) {
			return db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent, Limit: 3})
		}))
		require.NoError(t, err)
		require.Equal(t, []int64{2, 4, 5}, ids(got))
		require.NoError(t, holder.Rollback(t.Context()))
		got, err = db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent, Limit: 3})
		require.NoError(t, err)
		require.Equal(t, []int64{1, 3, 6}, ids(got))
	})

	t.Run("leaves_a_row_that_no_longer_matches_when_it_comes_to_it", func(t *testing.T) {
		// A policy halts the statement at row 2, when its snapshot is taken. What it
		// finds then was changed since: 3 and 4 are no longer failed, 5 still is.
		t.Parallel()
		db := pgtest.NewDB(t)
		seed(t, db, outbox.StatusFailed, 6)
		db.MustExec(t, `
			CREATE FUNCTION gate(id bigint) RETURNS bool LANGUAGE plpgsql AS $$
			BEGIN
				IF id = 2 THEN PERFORM pg_advisory_xact_lock(1); END IF;
				RETURN true;
			END $$;
			CREATE POLICY gate ON outbox_notifications USING (gate(id));
			ALTER TABLE outbox_notifications ENABLE ROW LEVEL SECURITY;
			GRANT ALL ON outbox_notifications TO pg_monitor`)
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["role"] = "pg_monitor" })
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		gate := db.MustBegin(t)
		_, err = gate.Exec(t.Context(), "SELECT pg_advisory_xact_lock(1)")
		require.NoError(t, err)
		requeued := pgtest.Later(func() ([]outbox.Notification, error) {
			return store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed})
		})
		db.WaitBlocked(t, 1)
		db.MustExec(t, `UPDATE outbox_notifications SET last_error = 'newer', status = CASE id WHEN 3 THEN 'sent' WHEN 4 THEN 'pending' ELSE status END
			WHERE id IN (3, 4, 5)`)
		require.NoError(t, gate.Rollback(t.Context()))
		got, err := pgtest.Await(t, requeued)
		require.NoError(t, err)
		require.Equal(t, []int64{1, 2, 5, 6}, ids(got))
		require.Equal(t, "newer", got[2].LastError)
		require.Len(t, keysOf(t, db, outbox.StatusSent), 1)
	})

	t.Run("requeues_each_row_for_one_of_many_at_once", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, status) SELECT 'a', i, 'failed' FROM generate_series(1, 2000) AS i`)
		var waits []<-chan pgtest.Result[[]int64]
		for range 8 {
			waits = append(waits, pgtest.Later(func() ([]int64, error) {
				var mine []int64
				for {
					page, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed, Limit: 50})
					if err != nil || len(page) == 0 {
						return mine, err
					}
					mine = append(mine, ids(page)...)
				}
			}))
		}
		var all []int64
		for _, c := range waits {
			mine, err := pgtest.Await(t, c)
			require.NoError(t, err)
			all = append(all, mine...)
		}
		slices.Sort(all)
		require.Len(t, slices.Compact(slices.Clone(all)), len(all), "none twice")
		rest, err := db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed, Limit: 1000})
		require.NoError(t, err)
		require.Len(t, all, 2000-len(rest))
	})
}

// filters are all combinations of what a filter can have but for the status.
func filters(status outbox.Status, bookingID int64) []outbox.Filter {
	var fs []outbox.Filter
	for i := range 16 {
		f := outbox.Filter{Status: status}
		if i&1 != 0 {
			f.Types = []string{"type3", "rare"}
		}
		if i&2 != 0 {
			f.BookingID = bookingID
		}
		if i&4 != 0 {
			f.OlderThan = 10 * time.Hour
		}
		if i&8 != 0 {
			f.NewerThan = 30 * time.Hour
		}
		fs = append(fs, f)
	}
	return fs
}

func filterName(f outbox.Filter) string {
	var parts []string
	for _, p := range []struct {
		name  string
		given bool
	}{{"any", f.Status == ""}, {string(f.Status), f.Status != ""}, {"types", f.Types != nil}, {"booking", f.BookingID != 0},
		{"older", f.OlderThan != 0}, {"newer", f.NewerThan != 0}} {
		if p.given {
			parts = append(parts, p.name)
		}
	}
	return strings.Join(parts, "_")
}

const seeded = 900

// seedForFilters inserts rows of which every filter matches some: of 4 statuses, 4
// types, 7 bookings and none, up to 40 hours old.
func seedForFilters(t testing.TB, db *pgtest.DB) {
	t.Helper()
	db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status, created_at)
		SELECT (ARRAY['type1', 'type2', 'rare', 'type3'])[1 + abs(hashint4(i)) % 4], nullif(abs(hashint4(i + 1000)) % 8, 0), i,
			(ARRAY['pending', 'sent', 'failed', 'cancelled', 'sent'])[1 + abs(hashint4(i + 2000)) % 5],
			now() - abs(hashint4(i + 3000)) % 40 * interval '1 hour' - interval '1 minute'
		FROM generate_series(1, $1::int) AS i`, seeded)
}

func TestList(t *testing.T) {
	t.Parallel()

	t.Run("gives_just_the_rows_that_match_by_rising_id", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		seedForFilters(t, db)
		all, err := db.Store.List(t.Context(), outbox.Filter{Limit: 1000})
		require.NoError(t, err)
		require.Len(t, all, seeded)
		now := pgtest.One[time.Time](t, db, "SELECT now()")
		for _, status := range []outbox.Status{"", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed} {
			for _, f := range filters(status, 5) {
				for _, after := range []int64{0, 123, seeded} {
					for _, limit := range []int{0, 3, 1000} {
						f.After, f.Limit = after, limit
						var want []outbox.Notification
						for _, n := range all {
							age := now.Sub(n.CreatedAt)
							if n.ID > after && (f.Status == "" || n.Status == f.Status) &&
								(f.Types == nil || slices.Contains(f.Types, n.Type)) && (f.BookingID == 0 || n.BookingID == f.BookingID) &&
								(f.OlderThan == 0 || age >= f.OlderThan) && (f.NewerThan == 0 || age < f.NewerThan) {
								want = append(want, n)
							}
						}
						require.True(t, after > 0 || len(want) > 0, filterName(f))
						if limit == 0 {
							limit = 100
						}
						want = want[:min(len(want), limit)]
						got, err := db.Store.List(t.Context(), f)
						require.NoError(t, err)
						require.Equal(t, want, got, "%s after %d limit %d", filterName(f), after, f.Limit)
					}
				}
			}
		}
	})

	t.Run("finds_a_booking_under_all_of_its_types", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		var want []outbox.Key
		for i := range 60 {
			typ := []string{"a", "A", "é", "z ", "я"}[i%5] + itoa(i)
			db.Add(t, outbox.NewNotification{Type: typ, BookingID: 1<<40 + int64(i%2), CandidateTgID: int64(i % 3)})
			if i%2 == 0 {
				want = append(want, outbox.Key{Type: typ, BookingID: 1 << 40, CandidateTgID: int64(i % 3)})
			}
		}
		got, err := db.Store.List(t.Context(), outbox.Filter{BookingID: 1 << 40})
		require.NoError(t, err)
		var keys []outbox.Key
		for _, n := range got {
			keys = append(keys, n.Key())
		}
		require.Equal(t, want, keys)
		none, err := pgtest.NewDB(t).Store.List(t.Context(), outbox.Filter{BookingID: 1})
		require.NoError(t, err)
		require.Empty(t, none)
	})

	t.Run("pages_through_what_exists_once_while_others_insert_and_delete", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		seedForFilters(t, db)
		for _, f := range []outbox.Filter{{}, {Status: outbox.StatusPending}, {Status: outbox.StatusSent, Types: []string{"type1"}}, {BookingID: 3}} {
			f.Limit = 1000
			existing, err := db.Store.List(t.Context(), f)
			require.NoError(t, err)
			f.Limit = 7
			var got []int64
			for i := 0; ; i++ {
				require.Less(t, i, seeded, "it does not end")
				page, err := db.Store.List(t.Context(), f)
				require.NoError(t, err)
				if len(page) == 0 {
					break
				}
				got = append(got, ids(page)...)
				f.After = page[len(page)-1].ID
				if i < 5 { // two rows that may match, and the loss of one that was listed
					db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status)
						SELECT 'type1', 3, (SELECT max(id) FROM outbox_notifications) * 1000 + n, CASE n WHEN 1 THEN 'pending' ELSE 'sent' END
						FROM generate_series(1, 2) AS n`)
					db.MustExec(t, "DELETE FROM outbox_notifications WHERE id = $1", page[0].ID)
				}
			}
			require.GreaterOrEqual(t, len(got), len(existing))
			require.Equal(t, ids(existing), got[:len(existing)])
			require.Len(t, slices.Compact(slices.Clone(got)), len(got), "none twice")
		}
	})

	t.Run("takes_a_row_without_created_at_for_older_than_anything", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications ALTER COLUMN created_at DROP NOT NULL")
		db.MustExec(t, "INSERT INTO outbox_notifications (type, created_at) VALUES ('a', NULL)")
		for _, status := range []outbox.Status{"", outbox.StatusPending} {
			got, err := db.Store.List(t.Context(), outbox.Filter{Status: status, OlderThan: 1<<63 - 1})
			require.NoError(t, err)
			require.Len(t, got, 1)
			got, err = db.Store.List(t.Context(), outbox.Filter{Status: status, NewerThan: 1<<63 - 1})
			require.NoError(t, err)
			require.Empty(t, got)
		}
	})

	t.Run("waits_for_nobody_and_sees_what_is_committed", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		want := db.Add(t, rejected).Notification
		holder := db.MustBegin(t)
		newer := rejected
		newer.Payload = "newer"
		_, err := db.Store.AddNotifications(t.Context(), holder, []outbox.NewNotification{newer, {Type: "other"}})
		require.NoError(t, err)
		got, err := pgtest.Await(t, pgtest.Later(func() ([]outbox.Notification, error) { return db.Store.List(t.Context(), outbox.Filter{}) }))
		require.NoError(t, err)
		require.Equal(t, []outbox.Notification{want}, got)
	})

	t.Run("refuses_a_bad_filter_before_any_SQL", func(t *testing.T) {
		t.Parallel()
		store := neverUsed(t)
		for what, c := range map[string]struct {
			field string
			f     outbox.Filter
		}{
			"unknown status":    {"Status", outbox.Filter{Status: "Failed"}},
			"no type at all":    {"Types", outbox.Filter{Types: []string{}}},
			"NUL":               {"Types", outbox.Filter{Types: []string{"a", "b\x00"}}},
			"UTF-8":             {"Types", outbox.Filter{Types: []string{"\xff"}}},
			"negative older":    {"OlderThan", outbox.Filter{OlderThan: -1}},
			"negative newer":    {"NewerThan", outbox.Filter{NewerThan: -1}},
			"no microsecond":    {"NewerThan", outbox.Filter{NewerThan: time.Microsecond - 1}},
			"an empty span":     {"NewerThan", outbox.Filter{OlderThan: time.Hour, NewerThan: time.Hour}},
			"a negative limit":  {"Limit", outbox.Filter{Limit: -1}},
			"too high a limit":  {"Limit", outbox.Filter{Limit: 1001}},
			"far too high, too": {"Limit", outbox.Filter{Limit: 1 << 40}},
		} {
			_, err := store.List(t.Context(), c.f)
			requireInvalid(t, err, c.field, -1, what)
		}
	})

	t.Run("names_itself_and_the_remedy_where_there_is_no_table", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		_, err := db.Store.List(t.Context(), outbox.Filter{})
		require.ErrorContains(t, err, "outbox: list: there is no table")
		_, err = db.Store.Stats(t.Context())
		require.ErrorContains(t, err, "outbox: stats: there is no table")
		_, err = db.Store.Requeue(t.Context(), outbox.Key{Type: "a"})
		require.ErrorContains(t, err, "outbox: requeue: there is no table")
		_, err = db.Store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent})
		require.ErrorContains(t, err, "outbox: requeue matching: there is no table")
	})
}

func TestStats(t *testing.T) {
	t.Parallel()

	t.Run("of_an_empty_table_are_zero", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		before := pgtest.One[time.Time](t, db, "SELECT clock_timestamp()")
		st, err := db.Store.Stats(t.Context())
		require.NoError(t, err)
		require.False(t, st.At.Before(before))
		require.Equal(t, outbox.Stats{At: st.At, Types: map[string]outbox.TypeStats{}}, st)
	})

	t.Run("count_by_type_what_is_due_in_flight_due_later_and_failed", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, `
			INSERT INTO outbox_notifications (type, booking_id, status, created_at, next_retry_at, lease_token, lease_until, locked_at)
			SELECT type, row_number() OVER (), status, now() - created::interval,
				CASE WHEN retry LIKE '%infinity' THEN retry::timestamptz ELSE now() + retry::interval END,
				CASE WHEN token THEN gen_random_uuid() END, now() + lease::interval, now()
			FROM (VALUES
				('a', 'pending', '1 hour', NULL, false, NULL),            -- due, a lock without a token
				('a', 'pending', '9 hours', '-10 minutes', false, NULL),  -- due for 10 minutes
				('a', 'pending', '1 hour', '3 hours', false, NULL),       -- later
				('a', 'pending', '1 hour', '2 hours', false, NULL),       -- later
				('a', 'pending', '8 hours', NULL, true, '1 hour'),        -- in flight
				('a', 'pending', '8 hours', '1 hour', true, '1 hour'),    -- in flight, put off since
				('a', 'pending', '1 hour', '4 hours', true, NULL),        -- later, the last outcome unknown
				('a', 'failed', '1 hour', NULL, false, NULL),
				('a', 'sent', '1 hour', NULL, false, NULL),
				('b', 'pending', '2 hours', NULL, true, '-1 second'),     -- due, its lease ran out
				('b', 'sent', '1 hour', NULL, false, NULL),
				('c', 'failed', '1 hour', NULL, false, NULL),
				('c', 'failed', '1 hour', NULL, false, NULL),
				('d', 'sent', '1 hour', NULL, false, NULL),
				('e', 'cancelled', '1 hour', NULL, false, NULL),
				('f', 'pending', '1 hour', 'infinity', false, NULL),      -- later, or never
				('g', 'pending', '1 hour', '-infinity', false, NULL),     -- due, since no time at all
				('h', 'pending', '1 hour', '5 hours', false, NULL),       -- later
				('i', 'pending', '1 hour', '6 hours', false, NULL),       -- later
				('j', 'pending', '1 hour', '7 hours', false, NULL)        -- later
			) AS v (type, status, created, retry, token, lease)`)
		inserted := pgtest.One[time.Time](t, db, "SELECT created_at + interval '1 hour' FROM outbox_notifications WHERE type = 'd'")
		st, err := db.Store.Stats(t.Context())
		require.NoError(t, err)
		since := st.At.Sub(inserted)
		require.Positive(t, since)
		next := inserted.Add(2 * time.Hour).UTC()
		require.Equal(t, outbox.Stats{
			At: st.At,
			TypeStats: outbox.TypeStats{
				Pending: 13, Due: 4, InFlight: 2, Failed: 3, OldestDue: 2*time.Hour + since, NextDue: next,
			},
			Types: map[string]outbox.TypeStats{
				"a": {Pending: 7, Due: 2, InFlight: 2, Failed: 1, OldestDue: time.Hour + since, NextDue: next},
				"b": {Pending: 1, Due: 1, OldestDue: 2*time.Hour + since},
				"c": {Failed: 2},
				"f": {Pending: 1},
				"g": {Pending: 1, Due: 1},
				"h": {Pending: 1, NextDue: next.Add(3 * time.Hour)},
				"i": {Pending: 1, NextDue: next.Add(4 * time.Hour)},
				"j": {Pending: 1, NextDue: next.Add(5 * time.Hour)},
			},
			Sent: 3,
		}, st)
		res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 100, Lease: time.Minute})
		require.NoError(t, err)
		require.Len(t, res.Claimed, int(st.Due), "due is what a claim takes")
	})

	t.Run("are_of_one_moment", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		seed(t, db, outbox.StatusPending, 8)
		g := newGatedDB(t, db)
		store, err := outbox.NewPGStore(g.pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		for _, statement := range []int{3, 4} { // after BEGIN and what takes the snapshot
			want, err := db.Store.Stats(t.Context())
			require.NoError(t, err)
			g.before(statement, func() {
				db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent' WHERE id IN (SELECT id FROM outbox_notifications WHERE status = 'pending' LIMIT 2)")
			})
			got, err := store.Stats(t.Context())
			require.NoError(t, err)
			require.Equal(t, want.Pending, got.Pending)
			require.Equal(t, want.Sent, got.Sent)
		}
	})

	t.Run("wait_for_nobody_and_write_nothing", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, rejected)
		holder := db.MustBegin(t)
		_, err := holder.Exec(t.Context(), "UPDATE outbox_notifications SET status = 'sent'")
		require.NoError(t, err)
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on" })
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		st, err := pgtest.Await(t, pgtest.Later(func() (outbox.Stats, error) { return store.Stats(t.Context()) }))
		require.NoError(t, err)
		require.EqualValues(t, 1, st.Due)
		_, err = store.List(t.Context(), outbox.Filter{})
		require.NoError(t, err)
		_, err = store.Requeue(t.Context(), rejected.Key())
		var pg *pgconn.PgError
		require.True(t, errors.As(err, &pg) && pg.Code == "25006", "%v", err)
	})
}

// TestOperateInExecModes shows that the operator's statements mean the same however pgx
// sends their parameters, and in a schema that is not on the search_path.
func TestOperateInExecModes(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe,
		pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.DefaultQueryExecMode = mode })
			store, err := outbox.NewPGStore(pool, outbox.Config{Schema: `odd "{where}" {table}`, Logger: discard})
			require.NoError(t, err)
			require.NoError(t, store.Migrate(t.Context()))
			odd := outbox.NewNotification{Type: `o'd"d\,{}`, BookingID: 1 << 40, CandidateTgID: -5}
			require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
				_, err := store.AddNotifications(t.Context(), tx, []outbox.NewNotification{odd, {Type: "other"}})
				return err
			}))
			st, err := store.Stats(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 2, st.Due)
			require.Contains(t, st.Types, odd.Type)
			for _, status := range []outbox.Status{outbox.StatusPending, outbox.StatusFailed, outbox.StatusSent} {
				_, err := pool.Exec(t.Context(), `UPDATE "odd ""{where}"" {table}".outbox_notifications SET status = $1`, string(status))
				require.NoError(t, err)
				for _, f := range filters(status, odd.BookingID) {
					if f.Types != nil {
						f.Types = []string{odd.Type, "none"}
					}
					f.OlderThan = min(f.OlderThan, time.Microsecond)
					want := 2
					if f.Types != nil || f.BookingID != 0 {
						want = 1
					}
					list, err := store.List(t.Context(), f)
					require.NoError(t, err)
					require.Len(t, list, want, filterName(f))
				}
				count, err := store.Requeue(t.Context(), odd.Key(), outbox.Key{Type: "other"})
				require.NoError(t, err)
				if status == outbox.StatusPending {
					require.Zero(t, count)
				} else {
					require.Equal(t, 2, count)
				}
			}
			_, err = pool.Exec(t.Context(), `UPDATE "odd ""{where}"" {table}".outbox_notifications SET status = 'sent'`)
			require.NoError(t, err)
			list, err := store.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusSent, Types: []string{odd.Type}})
			require.NoError(t, err)
			require.Len(t, list, 1)
		})
	}
}

// TestOperatePlan shows on 1,000,000 rows, nearly all of them sent, how the operator's
// statements read the table, in plans for given values and in generic ones alike.
func TestOperatePlan(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	// Half have no booking, nearly half no candidate, as in TestPlan; those that are
	// pending are at the end.
	db.Fill(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status, created_at)
		SELECT CASE WHEN i % 20000 = 0 THEN 'rare' WHEN i % 4 = 0 THEN 'type1' ELSE 'type' || 2 + i % 20 END,
			CASE WHEN i % 8 < 4 THEN i / 8 + 1 END, CASE WHEN i % 8 >= 4 OR i % 100 = 11 THEN i END,
			CASE WHEN i > 998000 THEN 'pending' WHEN i % 1000 = 0 THEN 'failed' ELSE 'sent' END,
			now() - (1000000 - i) * interval '1 second'
		FROM generate_series(1, 1000000) i`)

	// explain returns the scans of the table, each as its index and condition.
	explain := func(t *testing.T, mode, options, sql, args string) []string {
		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "SET LOCAL plan_cache_mode = "+mode)
		require.NoError(t, err)
		_, err = tx.Exec(t.Context(), "PREPARE it AS "+sql)
		require.NoError(t, err)
		var doc []struct{ Plan planNode }
		require.NoError(t, json.Unmarshal(pgtest.One[json.RawMessage](t, tx, fmt.Sprintf("EXPLAIN (%s, FORMAT JSON) EXECUTE it %s", options, args)), &doc))
		_, err = tx.Exec(t.Context(), "DEALLOCATE it") // it outlives the transaction
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(t.Context()))
		var scans []string
		for _, s := range doc[0].Plan.scans() {
			if s.Type == "Bitmap Heap Scan" {
				continue // named by the index scan below it
			}
			require.Contains(t, s.Type, "Index", "%+v", s)
			scans = append(scans, strings.TrimPrefix(s.Index, "outbox_notifications_")+": "+s.IndexCond)
		}
		return scans
	}
	requireScans := func(t *testing.T, scans []string, want ...string) {
		t.Helper()
		require.Len(t, scans, len(want), "%q", scans)
		for _, w := range want {
			index, condition, _ := strings.Cut(w, ": ")
			require.True(t, slices.ContainsFunc(scans, func(s string) bool {
				return strings.HasPrefix(s, index+": ") && strings.Contains(s, condition)
			}), "no scan of %s among %q", w, scans)
		}
	}
	modes := []string{"force_custom_plan", "force_generic_plan"}
	given := func(f outbox.Filter) string {
		types := "NULL"
		if f.Types != nil {
			types = "'{" + strings.Join(f.Types, ",") + "}'"
		}
		return fmt.Sprintf("(0, 100, %s, %d, %d, %d)", types, f.BookingID, f.OlderThan.Microseconds(), f.NewerThan.Microseconds())
	}
	// Without ANALYZE the subquery that goes from type to type is not shown.
	options := func(f outbox.Filter) string { return fmt.Sprint("ANALYZE ", f.BookingID != 0) }
	// How a filter leads to its rows.
	wanted := func(f outbox.Filter) []string {
		var want []string
		if f.BookingID != 0 {
			want = append(want, "key: booking_id = ")
			if f.Types == nil {
				want = append(want, "key: ", "key: type") // from type to type
			}
		}
		switch {
		case f.Status == outbox.StatusFailed:
			return append(want, "failed: id ")
		case f.BookingID != 0:
			return append(want, "pkey: id = ANY")
		case f.Status == outbox.StatusPending:
			return append(want, "due: ", "pkey: id = ANY")
		}
		return append(want, "pkey: id > ")
	}

	for _, mode := range modes {
		for _, status := range []outbox.Status{"", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed} {
			for _, f := range filters(status, 4242) {
				t.Run(mode+"/List/"+filterName(f), func(t *testing.T) {
					requireScans(t, explain(t, mode, options(f), db.Store.ListSQL(f), given(f)), wanted(f)...)
				})
				if status == outbox.StatusSent || status == outbox.StatusFailed {
					t.Run(mode+"/RequeueMatching/"+filterName(f), func(t *testing.T) {
						requireScans(t, explain(t, mode, options(f), db.Store.RequeueMatchingSQL(f), given(f)), append(wanted(f), "pkey: id = ANY")...)
					})
				}
			}
		}
		for _, key := range []outbox.Key{{Type: "type1", BookingID: 11, CandidateTgID: 45}, {Type: "type1", BookingID: 13}, {Type: "type1", CandidateTgID: 8}, {Type: "type1"}} {
			t.Run(mode+"/Requeue/"+strings.ReplaceAll(key.String(), `"`, ""), func(t *testing.T) {
				scans := explain(t, mode, "ANALYZE off", db.Store.RequeueSQL(key), fmt.Sprintf(
					"(array_fill('%s'::text, ARRAY[1000]), array_fill(%d::bigint, ARRAY[1000]), array_fill(%d::bigint, ARRAY[1000]))", key.Type, key.BookingID, key.CandidateTgID))
				requireScans(t, scans, "key: candidate_tg_id ", "pkey: id = ANY")
				require.Contains(t, strings.Join(scans, " "), "booking_id ")
			})
		}
	}

	t.Run("Stats", func(t *testing.T) {
		requireScans(t, explain(t, "force_custom_plan", "ANALYZE off", db.Store.DepthSQL(), ""), "due: ", "failed: ")
		var log statementLog
		store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log }), outbox.Config{Logger: discard})
		require.NoError(t, err)
		st, err := store.Stats(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 2000, st.Pending)
		require.EqualValues(t, 998, st.Failed)
		require.True(t, st.SentEstimated)
		require.InEpsilon(t, 997002, st.Sent, 0.02)
		for _, sql := range log.all() {
			require.NotContains(t, sql, "'sent'")
		}
	})

	t.Run("Stats_of_a_large_table_that_was_never_analyzed", func(t *testing.T) {
		large := pgtest.NewDB(t)
		large.MustExec(t, "ALTER TABLE outbox_notifications SET (autovacuum_enabled = off)")
		large.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, status)
			SELECT 'a', i, CASE WHEN i % 100 = 0 THEN 'pending' ELSE 'sent' END FROM generate_series(1, 300000) AS i`)
		require.Eventually(t, func() bool { // PostgreSQL's counters come with a delay
			st, err := large.Store.Stats(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 3000, st.Pending)
			require.True(t, st.SentEstimated)
			return st.Sent == 297000
		}, 30*time.Second, 50*time.Millisecond)
	})
}
