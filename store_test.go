package outbox_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"math"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// Mutations of the code that turn tests red:
//
//	no ON CONFLICT in addSQL                   TestRivals, TestIsolation
//	ON CONFLICT without a target               TestAddNotification/surfaces_another_unique_violation
//	AND status = 'pending' in found            TestAddNotification/returns_a_sent_row_unchanged, .../failed
//	no FOR UPDATE in found                     TestRivals, TestIsolation
//	one lookup instead of maxLookups           TestRivals, TestIsolation
//	lease_token, lease_until or locked_at NULL,
//	or attempts 0, in refreshed                TestAddNotification/keeps_the_lease_of_a_delivery_under_way
//	now() for clock_timestamp()                TestAddNotification/asks_the_clock_and_not_the_transaction...
//	no status = 'pending' in refresh           TestAddNotification/returns_a_sent_row_unchanged, .../failed
//	AND dirty dropped                          TestAddNotification/writes_nothing_when_nothing_changes
//	version + 1 always                         TestAddNotification/counts_a_version_only_for_recruiter_and_payload
//	the cast to jsonb unguarded                TestAddNotification/survives_a_stored_payload_that_jsonb_refuses
//	check returns nil                          TestInvalid
//	\u0000, depth, range left out of the check TestInvalid, FuzzPayload
//	DO NOTHING in addManySQL                   TestAddNotifications/locks_a_rivals_new_row_in_its_turn
//	no sort in addMany                         TestAddNotifications/opposite_orders_do_not_deadlock
//	no FOR UPDATE in addManySQL                TestRivals/is_kept_waiting_by_a_settled_row_that_was_returned
//	found keys inserted, too, in addManySQL    TestAddNotification/draws_no_id_for_a_repeat
//	fold: version++, together, firstPayload    TestAddNotifications/folds_a_key_given_twice_as_two_calls_would
//	no ORDER BY ... LIMIT 1 in a lookup        TestPlan
//	IS NOT DISTINCT FROM in a lookup           TestPlan
//	UNIQUE without NULLS NOT DISTINCT          TestMigrate, TestRivals
//	no search for shared keys                  TestAdoption/refuses_shared_keys_and_changes_nothing
//	no advisory lock, or the default isolation TestMigrate/is_safe_from_many_processes_at_once...
//	other unique indexes not looked for        TestAdoption/refuses_...
//	old constraints left                       TestAdoption/replaces_a_constraint_...
//	a key without a row not an error           TestAddNotification/says_when_a_trigger_leaves_it_without_a_row
//	no lock_timeout                            TestMigrate/waits_for_locks_without_holding_others_up
//	no pg_temp at the end of the search_path   TestMigrate/is_not_misled_by_the_search_path...
//	booking ids not held against the column    TestAdoption/refuses_a_booking_id_that_an_integer_column...
//	RunInTx without IsRetryable or a bound     TestRunInTx

var rejected = outbox.NewNotification{
	Type: "reject", BookingID: 7, CandidateTgID: 42, RecruiterTgID: 99,
	Payload: map[string]any{"slot": "10:00"}, CorrelationID: "req-1",
}

func TestAddNotification(t *testing.T) {
	t.Parallel()
	testAddNotification(t, 0)
}

func testAddNotification(t *testing.T, guess int) {
	newDB := guessing(pgtest.NewDB, guess)

	t.Run("creates_a_pending_row", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		before := pgtest.One[time.Time](t, db, "SELECT now()")
		n := rejected
		n.NotBefore = before.Add(time.Hour)
		n.NotAfter = before.Add(2 * time.Hour)
		res := db.Add(t, n)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.False(t, res.InFlight)
		got := res.Notification
		require.NotZero(t, got.ID)
		require.False(t, got.CreatedAt.Before(before))
		require.Equal(t, outbox.Notification{
			ID: got.ID, CreatedAt: got.CreatedAt,
			Type: "reject", BookingID: 7, CandidateTgID: 42, RecruiterTgID: 99,
			Payload: json.RawMessage(`{"slot":"10:00"}`), CorrelationID: "req-1",
			Status: outbox.StatusPending, Version: 1,
			NextRetryAt: n.NotBefore.UTC(), NotAfter: n.NotAfter.UTC(),
		}, got)
		require.Equal(t, got, db.Get(t, n.Key()))
		require.Equal(t, n.Key(), got.Key())
	})

	t.Run("stores_what_is_not_given_as_NULL", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		for i, payload := range []any{nil, map[string]any{}, struct{}{}, json.RawMessage("null"), json.RawMessage(" { } "),
			json.RawMessage(nil), (*json.RawMessage)(nil), map[string]any(nil), (*int)(nil)} {
			n := outbox.NewNotification{Type: "digest" + itoa(i), Payload: payload}
			res := db.Add(t, n)
			require.Equal(t, outbox.OutcomeCreated, res.Outcome)
			require.Nil(t, res.Notification.Payload)
			require.Equal(t, 7, pgtest.One[int](t, db, `SELECT num_nulls(booking_id, candidate_tg_id, recruiter_tg_id, payload_json,
				correlation_id, next_retry_at, not_after) FROM outbox_notifications WHERE id = $1`, res.Notification.ID))
		}
	})

	t.Run("stores_raw_JSON_as_it_is", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		raw := json.RawMessage(`{ "b" : 1.50, "a":"<é>" , "a":2}`)
		require.Equal(t, raw, db.Add(t, outbox.NewNotification{Type: "raw", Payload: raw}).Notification.Payload)
		require.Equal(t, raw, db.Add(t, outbox.NewNotification{Type: "pointer", Payload: &raw}).Notification.Payload)
		require.Equal(t, json.RawMessage(`5`), db.Add(t, outbox.NewNotification{Type: "scalar", Payload: 5}).Notification.Payload)
	})

	t.Run("tells_keys_apart_by_every_part", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		keys := []outbox.Key{
			{Type: "a"}, {Type: "b"}, {Type: "A"}, {Type: "a "},
			{Type: "a", BookingID: 1}, {Type: "a", BookingID: 2}, {Type: "a", BookingID: -1},
			{Type: "a", CandidateTgID: 1}, {Type: "a", CandidateTgID: -1001234567890},
			{Type: "a", BookingID: 1, CandidateTgID: 1}, {Type: "a", BookingID: 1, CandidateTgID: 2},
			{Type: "a", BookingID: math.MaxInt64, CandidateTgID: math.MinInt64},
			{Type: "a", BookingID: math.MinInt64, CandidateTgID: math.MaxInt64},
			{Type: strings.Repeat("ю", 50)},
		}
		for pass, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
			for _, k := range keys {
				res := db.Add(t, outbox.NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
				require.Equal(t, want, res.Outcome, "pass %d, %s", pass, k)
				require.Equal(t, k, res.Notification.Key())
			}
		}
		require.Equal(t, len(keys), db.Count(t))
	})

	t.Run("refreshes_only_what_is_given", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		n := rejected
		n.NotAfter = time.Now().Add(time.Hour).Truncate(time.Microsecond)
		first := db.Add(t, n).Notification

		res := db.Add(t, outbox.NewNotification{Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID,
			Payload: map[string]any{}})
		require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		require.Equal(t, first, res.Notification)

		later := n.NotAfter.Add(time.Hour)
		res = db.Add(t, outbox.NewNotification{Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID,
			RecruiterTgID: 100, Payload: json.RawMessage(`[1]`), CorrelationID: "req-2", NotAfter: later})
		want := first
		want.RecruiterTgID, want.Payload, want.CorrelationID, want.NotAfter, want.Version = 100, json.RawMessage(`[1]`), "req-2", later.UTC(), 2
		require.Equal(t, outbox.AddResult{Notification: want, Outcome: outbox.OutcomeRefreshed}, res)
		require.Equal(t, want, db.Get(t, n.Key()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("counts_a_version_only_for_recruiter_and_payload", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		db.Add(t, rejected)
		version := int64(1)
		for _, step := range []struct {
			what   string
			change func(*outbox.NewNotification)
			rises  bool
		}{
			{"nothing", func(*outbox.NewNotification) {}, false},
			{"correlation id", func(n *outbox.NewNotification) { n.CorrelationID = "req-9" }, false},
			{"not before", func(n *outbox.NewNotification) { n.NotBefore = time.Now().Add(time.Hour) }, false},
			{"not after", func(n *outbox.NewNotification) { n.NotAfter = time.Now().Add(time.Hour) }, false},
			{"the spelling of the payload", func(n *outbox.NewNotification) { n.Payload = json.RawMessage(` {"slot" : "10:0\u0030"}`) }, false},
			{"recruiter", func(n *outbox.NewNotification) { n.RecruiterTgID = 1 }, true},
			{"payload", func(n *outbox.NewNotification) { n.RecruiterTgID = 1; n.Payload = "x" }, true},
			{"both", func(n *outbox.NewNotification) { n.RecruiterTgID = 2; n.Payload = "y" }, true},
		} {
			n := rejected
			step.change(&n)
			if step.rises {
				version++
			}
			require.Equal(t, version, db.Add(t, n).Notification.Version, step.what)
		}
	})

	t.Run("makes_a_postponed_or_retried_row_due_as_told", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		n := rejected
		n.NotBefore = time.Now().Add(time.Hour).Truncate(time.Microsecond)
		require.True(t, n.NotBefore.Equal(db.Add(t, n).Notification.NextRetryAt))
		require.Zero(t, db.Add(t, rejected).Notification.NextRetryAt)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = 3, next_retry_at = now() + interval '1 day', last_error = 'chat not found'")
		got := db.Add(t, rejected).Notification
		require.Zero(t, got.NextRetryAt)
		require.Zero(t, got.Attempts)
		require.Equal(t, "chat not found", got.LastError)
		require.EqualValues(t, 1, got.Version)
		require.True(t, n.NotBefore.Equal(db.Add(t, n).Notification.NextRetryAt))
	})

	t.Run("writes_nothing_when_nothing_changes", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		n := rejected
		n.NotBefore, n.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		first := db.Add(t, n)
		where := "SELECT ctid::text || ' ' || xmin FROM outbox_notifications"
		before := pgtest.One[string](t, db, where)
		res := db.Add(t, n)
		require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		require.Equal(t, first.Notification, res.Notification)
		require.Equal(t, before, pgtest.One[string](t, db, where))
		db.AddMany(t, n, n)
		require.Equal(t, before, pgtest.One[string](t, db, where))
	})

	for _, status := range []outbox.Status{outbox.StatusSent, outbox.StatusFailed} {
		t.Run("returns_a_"+string(status)+"_row_unchanged", func(t *testing.T) {
			t.Parallel()
			db := newDB(t)
			db.Add(t, rejected)
			db.MustExec(t, `UPDATE outbox_notifications SET status = $1, attempts = 2, sent_version = 1, receipt = 'tg:5',
				last_error = 'e', sent_at = now(), next_retry_at = now(), locked_at = now()`, status)
			before := db.Get(t, rejected.Key())
			where := "SELECT ctid::text || ' ' || xmin FROM outbox_notifications"
			version := pgtest.One[string](t, db, where)
			for _, n := range []outbox.NewNotification{rejected, {Type: "reject", BookingID: 7, CandidateTgID: 42, RecruiterTgID: 1,
				Payload: "new", CorrelationID: "new", NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}} {
				require.Equal(t, outbox.AddResult{Notification: before, Outcome: outbox.OutcomeExisting}, db.Add(t, n))
				require.Equal(t, []outbox.AddResult{{Notification: before, Outcome: outbox.OutcomeExisting}}, db.AddMany(t, n))
			}
			require.Equal(t, version, pgtest.One[string](t, db, where), "the row was written")
			require.Equal(t, 1, db.Count(t))
		})
	}

	t.Run("keeps_the_lease_of_a_delivery_under_way", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		id := db.Add(t, rejected).Notification.ID
		lease(t, db, id, "1 minute")
		token, before := leaseOf(t, db, id), db.Get(t, rejected.Key())
		require.NotEmpty(t, token)
		require.Equal(t, 1, before.Attempts)

		res := db.Add(t, rejected)
		require.Equal(t, outbox.AddResult{Notification: before, Outcome: outbox.OutcomeRefreshed, InFlight: true}, res)

		changed := rejected
		changed.Payload, changed.NotBefore = "moved", time.Now().Add(time.Hour).Truncate(time.Microsecond)
		res = db.Add(t, changed)
		want := before
		want.Payload, want.Version, want.NextRetryAt = json.RawMessage(`"moved"`), 2, changed.NotBefore.UTC()
		require.Equal(t, outbox.AddResult{Notification: want, Outcome: outbox.OutcomeRefreshed, InFlight: true}, res)
		require.Equal(t, token, leaseOf(t, db, id))

		changed.Payload = "moved again"
		res = db.AddMany(t, changed)[0]
		want.Payload, want.Version = json.RawMessage(`"moved again"`), 3
		require.Equal(t, outbox.AddResult{Notification: want, Outcome: outbox.OutcomeRefreshed, InFlight: true}, res)
		require.Equal(t, token, leaseOf(t, db, id))
	})

	t.Run("asks_the_clock_and_not_the_transaction_whether_a_lease_has_ended", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		changed := rejected
		changed.Payload = "changed"
		for _, n := range []outbox.NewNotification{rejected, changed} {
			id := db.Add(t, rejected).Notification.ID
			tx := db.MustBegin(t)
			pgtest.One[time.Time](t, tx, "SELECT now()")
			db.MustExec(t, `UPDATE outbox_notifications SET lease_token = gen_random_uuid(), locked_at = now(),
				lease_until = clock_timestamp() WHERE id = $1`, id)
			res, err := db.Store.AddNotification(t.Context(), tx, n)
			require.NoError(t, err)
			require.False(t, res.InFlight)
			require.NoError(t, tx.Rollback(t.Context()))
		}
	})

	for name, lock := range map[string]string{
		"clears_an_expired_lease":                       "lease_token = gen_random_uuid(), lease_until = now() - interval '1 ms'",
		"clears_a_lock_without_a_token":                 "lease_until = now() + interval '1 hour'",
		"clears_a_lock_made_by_another_worker":          "status = 'pending'",
		"clears_a_lease_without_an_end":                 "lease_token = gen_random_uuid()",
		"clears_an_expired_lease_of_a_message_unlocked": "lease_token = gen_random_uuid(), lease_until = now() - interval '1 ms', locked_at = NULL",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := newDB(t)
			for i, add := range []func(outbox.NewNotification) outbox.AddResult{
				func(n outbox.NewNotification) outbox.AddResult { return db.Add(t, n) },
				func(n outbox.NewNotification) outbox.AddResult { return db.AddMany(t, n)[0] },
			} {
				n := outbox.NewNotification{Type: "reject" + itoa(i)}
				id := add(n).Notification.ID
				db.MustExec(t, "UPDATE outbox_notifications SET attempts = 4, locked_at = now() WHERE id = $1", id)
				db.MustExec(t, "UPDATE outbox_notifications SET "+lock+" WHERE id = $1", id)
				res := add(n)
				require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
				require.False(t, res.InFlight)
				require.Zero(t, res.Notification.LockedAt)
				require.Zero(t, res.Notification.Attempts)
				require.EqualValues(t, 1, res.Notification.Version)
				require.Equal(t, 0, pgtest.One[int](t, db, "SELECT num_nonnulls(locked_at, lease_until) FROM outbox_notifications WHERE id = $1", id))
			}
		})
	}

	t.Run("leaves_nothing_behind_after_a_rollback", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		tx := db.MustBegin(t)
		res, err := db.Store.AddNotification(t.Context(), tx, rejected)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Zero(t, db.Count(t))
		_, err = db.Store.Get(t.Context(), rejected.Key())
		require.ErrorIs(t, err, outbox.ErrNotFound)

		first := db.Add(t, rejected).Notification
		changed := rejected
		changed.Payload = "moved"
		tx = db.MustBegin(t)
		_, err = db.Store.AddNotification(t.Context(), tx, changed)
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Equal(t, first, db.Get(t, rejected.Key()))
	})

	t.Run("sees_what_its_own_transaction_added", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		tx := db.MustBegin(t)
		for i, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed, outbox.OutcomeRefreshed} {
			n := rejected
			n.Payload = i
			res, err := db.Store.AddNotification(t.Context(), tx, n)
			require.NoError(t, err)
			require.Equal(t, want, res.Outcome)
			require.EqualValues(t, i+1, res.Notification.Version)
		}
		require.NoError(t, tx.Commit(t.Context()))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("goes_with_the_savepoint_it_was_called_in", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		tx := db.MustBegin(t)
		inner, err := tx.Begin(t.Context())
		require.NoError(t, err)
		_, err = db.Store.AddNotification(t.Context(), inner, rejected)
		require.NoError(t, err)
		require.NoError(t, inner.Rollback(t.Context()))

		inner, err = tx.Begin(t.Context())
		require.NoError(t, err)
		kept := rejected
		kept.Payload = "kept"
		res, err := db.Store.AddNotification(t.Context(), inner, kept)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		require.NoError(t, inner.Commit(t.Context()))

		inner, err = tx.Begin(t.Context())
		require.NoError(t, err)
		res, err = db.Store.AddNotification(t.Context(), inner, rejected)
		require.NoError(t, err)
		require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		require.NoError(t, inner.Rollback(t.Context()))

		require.NoError(t, tx.Commit(t.Context()))
		require.JSONEq(t, `"kept"`, string(db.Get(t, rejected.Key()).Payload))
	})

	t.Run("surfaces_another_unique_violation", func(t *testing.T) {
		// Only a conflict of the key is taken for a duplicate.
		t.Parallel()
		db := newDB(t)
		db.MustExec(t, "CREATE UNIQUE INDEX ON outbox_notifications (correlation_id)")
		db.Add(t, outbox.NewNotification{Type: "a", CorrelationID: "same"})
		_, err := db.TryAdd(t.Context(), outbox.NewNotification{Type: "b", CorrelationID: "same"})
		require.Equal(t, "23505", sqlState(t, err))
	})

	t.Run("survives_a_stored_payload_that_jsonb_refuses", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		for _, stored := range []string{`{"a":"\u0000"}`, `"\ud800"`, `"\udc00"`, `1e999999`, `[1e-99999]`} {
			n := outbox.NewNotification{Type: "python"}
			db.MustExec(t, "DELETE FROM outbox_notifications")
			db.MustExec(t, "INSERT INTO outbox_notifications (type, payload_json) VALUES ('python', $1::text::json)", stored)
			res := db.Add(t, n)
			require.Equal(t, stored, string(res.Notification.Payload))
			n.Payload = json.RawMessage(`{"a":1}`)
			res = db.Add(t, n)
			require.EqualValues(t, 2, res.Notification.Version)
			require.JSONEq(t, `{"a":1}`, string(res.Notification.Payload))

			db.MustExec(t, "UPDATE outbox_notifications SET payload_json = $1::text::json", stored)
			require.EqualValues(t, 3, db.AddMany(t, n)[0].Notification.Version)
		}
	})

	t.Run("says_when_a_trigger_leaves_it_without_a_row", func(t *testing.T) {
		t.Parallel()
		for body, says := range map[string]string{
			"RETURN NULL":                            "a trigger or a policy",
			"NEW.type = lower(NEW.type); RETURN NEW": "",
		} {
			db := newDB(t)
			db.MustExec(t, `CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN `+body+`; END $$;
				CREATE TRIGGER meddle BEFORE INSERT ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION meddle()`)
			tx := db.MustBegin(t)
			_, err := db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "Reject"}, {Type: "Confirm"}})
			require.ErrorContains(t, err, "a trigger")
			if says != "" {
				_, err = db.Store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "Reject"})
				require.ErrorContains(t, err, says)
			}
		}
	})

	t.Run("draws_no_id_for_a_repeat", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		first := db.Add(t, outbox.NewNotification{Type: "a"}).Notification.ID
		for range 5 {
			db.Add(t, outbox.NewNotification{Type: "a"})
			db.AddMany(t, outbox.NewNotification{Type: "a"})
		}
		require.Equal(t, first+1, db.Add(t, outbox.NewNotification{Type: "b"}).Notification.ID)
	})

	t.Run("logs_an_existing_row_without_its_payload", func(t *testing.T) {
		t.Parallel()
		db := newDB(t)
		var logged bytes.Buffer
		store, err := outbox.NewPGStore(db.Pool, outbox.Config{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
		require.NoError(t, err)
		db.Store = store
		db.Add(t, rejected)
		db.Add(t, rejected)
		require.Empty(t, logged.String())
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		db.Add(t, rejected)
		require.Contains(t, logged.String(), "level=INFO")
		require.Contains(t, logged.String(), "type=reject booking_id=7 candidate_tg_id=42 status=sent correlation_id=req-1")
		require.NotContains(t, logged.String(), "slot")
		logged.Reset()
		db.AddMany(t, rejected, rejected, outbox.NewNotification{Type: "new"})
		require.Equal(t, 1, strings.Count(logged.String(), "\n"))
		require.Contains(t, logged.String(), "existing=2 of=3")
	})
}

func TestNewPGStore(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	for name, c := range map[string]struct {
		pool  *pgxpool.Pool
		cfg   outbox.Config
		field string
	}{
		"nil pool":               {nil, outbox.Config{}, "pool"},
		"NUL in schema":          {db.Pool, outbox.Config{Schema: "a\x00b"}, "Schema"},
		"bad UTF-8 in schema":    {db.Pool, outbox.Config{Schema: "a\xff"}, "Schema"},
		"$user":                  {db.Pool, outbox.Config{Schema: "$user"}, "Schema"},
		"a schema of PostgreSQL": {db.Pool, outbox.Config{Schema: "pg_outbox"}, "Schema"},
		"64 bytes of schema":     {db.Pool, outbox.Config{Schema: strings.Repeat("a", 64)}, "Schema"},
		"negative payload":       {db.Pool, outbox.Config{MaxPayloadBytes: -1}, "MaxPayloadBytes"},
		"payload over 16 MiB":    {db.Pool, outbox.Config{MaxPayloadBytes: 16<<20 + 1}, "MaxPayloadBytes"},
	} {
		_, err := outbox.NewPGStore(c.pool, c.cfg)
		requireInvalid(t, err, c.field, -1, name)
	}
}

// requireInvalid requires an error about bad input in the field.
func requireInvalid(t testing.TB, err error, field string, index int, what string) {
	t.Helper()
	require.ErrorIs(t, err, outbox.ErrInvalid, what)
	var bad *outbox.InvalidError
	require.ErrorAs(t, err, &bad, what)
	require.Equal(t, field, bad.Field, what)
	require.NotEmpty(t, bad.Reason, what)
	require.Equal(t, index, bad.Index, what)
	require.True(t, strings.HasPrefix(err.Error(), "outbox: "), err.Error())
	require.Contains(t, err.Error(), field)
}

// TestInvalid shows that bad input is refused before any SQL: the transaction,
// which any error of PostgreSQL would abort, goes on, and no statement was run.
func TestInvalid(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	var log statementLog
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log })
	store, err := outbox.NewPGStore(pool, outbox.Config{MaxPayloadBytes: 1000, Logger: discard})
	require.NoError(t, err)
	deep := strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000)
	wide, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
	require.NoError(t, err)

	year := func(y int) time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }
	raw := func(s string) func(*outbox.NewNotification) {
		return func(n *outbox.NewNotification) { n.Payload = json.RawMessage(s) }
	}
	value := func(v any) func(*outbox.NewNotification) {
		return func(n *outbox.NewNotification) { n.Payload = v }
	}
	for name, c := range map[string]struct {
		spoil func(*outbox.NewNotification)
		field string
	}{
		"empty type":                {func(n *outbox.NewNotification) { n.Type = "" }, "Type"},
		"type of 51":                {func(n *outbox.NewNotification) { n.Type = strings.Repeat("ю", 51) }, "Type"},
		"NUL in type":               {func(n *outbox.NewNotification) { n.Type = "a\x00" }, "Type"},
		"bad UTF-8 in type":         {func(n *outbox.NewNotification) { n.Type = "a\xc3" }, "Type"},
		"surrogate in type":         {func(n *outbox.NewNotification) { n.Type = "\xed\xa0\x80" }, "Type"},
		"correlation id of 65":      {func(n *outbox.NewNotification) { n.CorrelationID = strings.Repeat("ю", 65) }, "CorrelationID"},
		"NUL in correlation id":     {func(n *outbox.NewNotification) { n.CorrelationID = "\x00" }, "CorrelationID"},
		"bad UTF-8 correlation id":  {func(n *outbox.NewNotification) { n.CorrelationID = "\xff" }, "CorrelationID"},
		"not after before":          {func(n *outbox.NewNotification) { n.NotBefore, n.NotAfter = year(2030), year(2029) }, "NotAfter"},
		"not before year 0":         {func(n *outbox.NewNotification) { n.NotBefore = year(0) }, "NotBefore"},
		"not before year 10000":     {func(n *outbox.NewNotification) { n.NotBefore = year(10000) }, "NotBefore"},
		"not after year 300000":     {func(n *outbox.NewNotification) { n.NotAfter = year(300000) }, "NotAfter"},
		"payload too long":          {value(strings.Repeat("a", 1000)), "Payload"},
		"raw payload too long":      {raw(`"` + strings.Repeat("a", 1000) + `"`), "Payload"},
		"payload not JSON":          {raw(`{`), "Payload"},
		"payload empty":             {raw(``), "Payload"},
		"payload of two values":     {raw(`1 2`), "Payload"},
		"payload single quotes":     {raw(`{'a':1}`), "Payload"},
		"payload NaN":               {raw(`NaN`), "Payload"},
		"payload trailing comma":    {raw(`[1,]`), "Payload"},
		"payload control character": {raw("\"\n\""), "Payload"},
		"payload escaped NUL":       {raw(`"\u0000"`), "Payload"},
		"payload raw NUL":           {raw("\"\x00\""), "Payload"},
		"payload NUL in a string":   {value(map[string]string{"a": "\x00"}), "Payload"},
		"payload NUL in a key":      {value(map[string]string{"\x00": "a"}), "Payload"},
		"payload high surrogate":    {raw(`"\ud800"`), "Payload"},
		"payload low surrogate":     {raw(`"\udc00"`), "Payload"},
		"payload bad UTF-8":         {raw("\"\xff\""), "Payload"},
		"payload bad UTF-8 string":  {value("\xff"), "Payload"},
		"payload huge number":       {raw(`1e131072`), "Payload"},
		"payload tiny number":       {raw(`1e-16384`), "Payload"},
		"payload json.Number":       {value(json.Number("1e999999999999999999999")), "Payload"},
		"payload deep":              {raw(strings.Repeat("[", 400) + "1" + strings.Repeat("]", 399)), "Payload"},
		"payload channel":           {value(make(chan int)), "Payload"},
		"payload infinity":          {value(math.Inf(1)), "Payload"},
	} {
		n := rejected
		c.spoil(&n)
		tx := pgtest.Begin(t, pool, pgx.TxOptions{})
		log.reset()
		_, err = store.AddNotification(t.Context(), tx, n)
		requireInvalid(t, err, c.field, -1, name)
		_, err = store.AddNotifications(t.Context(), tx, []outbox.NewNotification{rejected, n, rejected})
		requireInvalid(t, err, c.field, 1, name)
		require.Empty(t, log.all(), name)
		_, err = store.AddNotification(t.Context(), tx, rejected)
		require.NoError(t, err, "the transaction does not go on after: %s", name)
		require.NoError(t, tx.Rollback(t.Context()))
	}

	tx := db.MustBegin(t)
	for _, payload := range []string{deep, strings.Repeat(`{"a":`, 1001) + "1" + strings.Repeat("}", 1001)} {
		_, err = wide.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "a", Payload: json.RawMessage(payload)})
		requireInvalid(t, err, "Payload", -1, "deep")
	}
	_, err = wide.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "a",
		Payload: json.RawMessage(strings.Repeat("[", 1000) + strings.Repeat("]", 1000))})
	require.NoError(t, err)

	for _, none := range []pgx.Tx{nil, (*pgxpool.Tx)(nil)} {
		_, err = store.AddNotification(t.Context(), none, rejected)
		requireInvalid(t, err, "tx", -1, "nil tx")
		_, err = store.AddNotifications(t.Context(), none, nil)
		requireInvalid(t, err, "tx", -1, "nil tx")
	}
	var unsupported *json.UnsupportedTypeError
	_, err = store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "a", Payload: make(chan int)})
	require.ErrorAs(t, err, &unsupported)
	_, err = store.Get(t.Context(), outbox.Key{})
	requireInvalid(t, err, "Type", -1, "get")
}

// TestLargestPayload shows that PostgreSQL takes any document that the highest
// limit lets through: those that grow most as jsonb.
func TestLargestPayload(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	store, err := outbox.NewPGStore(db.Pool, outbox.Config{MaxPayloadBytes: 16 << 20, Logger: discard})
	require.NoError(t, err)
	db.MustExec(t, "ALTER TABLE outbox_notifications ALTER payload_json SET STORAGE EXTERNAL") // compressing them takes long
	// Each ends in a blank and a bracket or quote, so that the byte before it can go.
	fill := func(open, unit, end string) json.RawMessage {
		n := (16<<20 - len(open) - len(end)) / len(unit)
		return json.RawMessage(open + strings.Repeat(unit, n-1) + strings.TrimSuffix(unit, ",") + end)
	}
	for name, payload := range map[string]json.RawMessage{
		"numbers": fill("[", "1,", "]"),
		"pairs":   fill("{", `"":1,`, "}"),
		"string":  fill(`"`, "a", `"`),
	} {
		tx := db.MustBegin(t)
		_, err = store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: name, Payload: payload})
		require.NoError(t, err, name)
		require.NotZero(t, pgtest.One[int](t, tx, "SELECT pg_column_size(payload_json::jsonb) FROM outbox_notifications WHERE type = $1", name))
		if name == "string" { // one that differs is compared as jsonb
			other := append(slices.Clone(payload[:len(payload)-2]), '"')
			res, err := store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: name, Payload: other})
			require.NoError(t, err)
			require.EqualValues(t, 2, res.Notification.Version)
		}
		require.NoError(t, tx.Rollback(t.Context()))
	}
}

// TestImports keeps the root package to pgx, what that needs, and the standard
// library: booking services import it everywhere.
func TestImports(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	require.NoError(t, err)
	for path := range strings.FieldsSeq(string(out)) {
		require.Regexp(t, `^(github\.com/jackc/|golang\.org/x/|github\.com/seed3357934d/outbox(/migrations)?$)`, path)
	}
}
