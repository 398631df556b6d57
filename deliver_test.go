package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// Mutations of deliver_pg.go and store_pg.go that were tried, and what turns red:
//
//	claim without SKIP LOCKED                  TestClaim/waits_for_nobody_who_holds_a_row, which hangs
//	attempts + 1 left out, or counted again    TestClaim/leases_due_rows_and_counts_the_attempt,
//	when a claim is repeated by its token      .../repeated_with_its_token_...
//	the lease's end computed by the worker     TestClaim/leases_due_rows_..., TestDeliveryTakesNoTimes
//	leases, due times, Types, Except or the    TestClaim/passes_over_..., /takes_only_..., /leaves_rows_..., /takes_the_oldest_...
//	order left out of the claim
//	expired, out of attempts, at most once or  TestClaim/decides_on/...
//	reconcile left out of givenUpSQL
//	countsAnewSQL false, or left out of one    TestClaim/decides_on/..._newer_version_...
//	of its three places; or in a repeat, or    /repeated_counts_newer_content_anew
//	to reconcile for ever
//	Repeated ignored                           TestClaim/repeated_leaves_what_its_caller_holds
//	asked IS NOT TRUE left out                 TestSettle/asked_...; TestUnknownOutcome/asked_about_in_vain_...
//	lease_until IS NOT NULL left out where a   TestClaim/repeated_takes_what_was_settled_as_unknown_...
//	suspect stays one
//	one token for rows with and without an     TestClaim/leases_due_rows_..., /decides_on/...
//	earlier lease
//	status || '' = 'pending' in the claim      TestClaimPlan
//	due >= Since left out                      TestClaim/leaves_what_fell_due_before_Since; TestClaimPlan
//	Last from the rows claimed alone           TestClaim/leaves_what_fell_due_before_Since
//	InTurn ignored, no lock but in turn, or    TestClaim/takes_turns_...
//	Busy never said
//	stillPendingSQL status = 'pending'         TestSettlePlan
//	the token left out of leasedSQL            TestSettle/*/claimed_by_another, TestExtend
//	the status left out of leasedSQL           TestSettle/*/settled_by_hand
//	settle without SKIP LOCKED                 TestSettle/settles_many_..., TestExtend, which hang
//	supersededSQL false                        TestSettle/*/changed
//	attempts kept when superseded              TestSettle/*/changed
//	greatest left out of next_retry_at         TestSettle/error/put_off
//	an attempt kept by a hand-back             TestSettle/handback/nothing
//	sent_version = version                     TestSettle/ok/changed
//	held reported as stale                     TestSettle/settles_many_...
//	the token dropped where unknown            TestSettle/unknown/..., TestUnknownOutcome
//	refreshSQL clears the lease                TestAddNotification/keeps_the_lease_...
//	refreshSQL clears the token of a lease     TestUnknownOutcome, TestSettle/ok/ended_and_changed
//	that has ended
//	more than one suspect in a claim           TestClaim/tells_suspects_from_others
//	$11 of a claim repeated kept as it is      TestClaim/repeated_takes_newer_content_...
//	no t.lease_token = g.token                 TestSettle/tells_two_leases_of_a_row_apart
//	no coalesce for retry_in                   TestSettle/puts_a_retry_without_a_pause_...
//	a settled row with our token taken for     TestClaim/repeated_does_not_take_...
//	claimed before
//	no second run of a claim after 40001       TestClaim/gives_a_row_to_one_of_many

// addRows adds n due notifications with the bookings 1 to n.
func addRows(t testing.TB, db *pgtest.DB, n int) {
	t.Helper()
	ns := make([]outbox.NewNotification, n)
	for i := range ns {
		ns[i] = outbox.NewNotification{Type: "reject", BookingID: int64(i + 1), Payload: json.RawMessage(`{"v":1}`)}
	}
	db.AddMany(t, ns...)
}

func booking(id int64) outbox.Key { return outbox.Key{Type: "reject", BookingID: id} }

// claim claims with a lease of an hour.
func claim(t testing.TB, db *pgtest.DB, opts outbox.ClaimOptions) outbox.ClaimResult {
	t.Helper()
	if opts.Limit == 0 {
		opts.Limit = 100
	}
	if opts.Lease == 0 {
		opts.Lease = time.Hour
	}
	res, err := db.Store.Claim(t.Context(), opts)
	require.NoError(t, err)
	return res
}

// claimOne adds a notification and claims it.
func claimOne(t testing.TB, db *pgtest.DB) outbox.Claimed {
	t.Helper()
	addRows(t, db, 1)
	res := claim(t, db, outbox.ClaimOptions{})
	require.Len(t, res.Claimed, 1)
	return res.Claimed[0]
}

func settle(t testing.TB, db *pgtest.DB, sts ...outbox.Settlement) []outbox.LeaseResult {
	t.Helper()
	res, err := db.Store.Settle(t.Context(), sts)
	require.NoError(t, err)
	require.Len(t, res, len(sts))
	return res
}

// endLeases makes the leases of all rows run out.
func endLeases(t testing.TB, db *pgtest.DB) {
	t.Helper()
	db.MustExec(t, "UPDATE outbox_notifications SET lease_until = now() - interval '1 microsecond' WHERE lease_token IS NOT NULL")
}

// bookings are those of what was claimed, in order.
func bookings(res outbox.ClaimResult) []int64 {
	ids := []int64{}
	for _, c := range res.Claimed {
		ids = append(ids, c.Notification.BookingID)
	}
	return ids
}

// whole is the row with all its columns, as text.
func whole(t testing.TB, db *pgtest.DB, key outbox.Key) string {
	t.Helper()
	return pgtest.One[string](t, db, "SELECT o::text FROM outbox_notifications o WHERE type = $1 AND booking_id = $2", key.Type, key.BookingID)
}

func TestClaim(t *testing.T) {
	t.Parallel()
	t.Run("leases_due_rows_and_counts_the_attempt", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, CandidateTgID: 2, RecruiterTgID: 3, Payload: json.RawMessage(`{"a":1}`), CorrelationID: "c"})
		before := pgtest.One[time.Time](t, db, "SELECT clock_timestamp()")
		res := claim(t, db, outbox.ClaimOptions{Lease: 90 * time.Second})
		require.Empty(t, res.Failed)
		require.Len(t, res.Claimed, 1)
		c := res.Claimed[0]
		n := c.Notification
		require.Equal(t, n, db.Get(t, n.Key()), "the row as it stands")
		require.Equal(t, n.ID, c.ID)
		require.Equal(t, 1, n.Attempts)
		require.Zero(t, c.UnknownVersion)
		require.False(t, n.LockedAt.Before(before))
		until := pgtest.One[time.Time](t, db, "SELECT lease_until FROM outbox_notifications")
		require.Equal(t, 90*time.Second, until.Sub(n.LockedAt))
		require.Equal(t, c.Token.String(), strings.ReplaceAll(pgtest.One[string](t, db, "SELECT lease_token::text FROM outbox_notifications"), "-", ""))
		require.Empty(t, claim(t, db, outbox.ClaimOptions{}).Claimed, "leased")
	})

	t.Run("takes_the_oldest_due_first_and_no_more_than_asked", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 6)
		db.MustExec(t, "UPDATE outbox_notifications SET created_at = now() - interval '1 hour' * booking_id")
		db.MustExec(t, "UPDATE outbox_notifications SET next_retry_at = now() - interval '1 second' WHERE booking_id = 6")
		db.MustExec(t, "UPDATE outbox_notifications SET next_retry_at = now() - interval '150 minutes' WHERE booking_id = 1")
		require.Equal(t, []int64{5, 4}, bookings(claim(t, db, outbox.ClaimOptions{Limit: 2})))
		require.Equal(t, []int64{3, 1, 2}, bookings(claim(t, db, outbox.ClaimOptions{Limit: 3})))
		require.Equal(t, []int64{6}, bookings(claim(t, db, outbox.ClaimOptions{Limit: 3})))
	})

	t.Run("passes_over_what_is_not_due_settled_or_leased", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 7)
		for id, set := range map[int]string{
			1: "next_retry_at = now() + interval '1 minute'",
			2: "status = 'sent'",
			3: "status = 'failed'",
			4: "status = 'archived'",
			5: "lease_token = gen_random_uuid(), lease_until = now() + interval '1 minute'",
			6: "locked_at = now()", // another service's lock is no lease
			7: "lease_token = gen_random_uuid(), lease_until = now()",
		} {
			db.MustExec(t, "UPDATE outbox_notifications SET "+set+" WHERE booking_id = $1", id)
		}
		require.Equal(t, []int64{6, 7}, bookings(claim(t, db, outbox.ClaimOptions{})))
	})

	t.Run("takes_only_the_types_asked_for", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		for _, typ := range []string{"a", "b", "c"} {
			db.Add(t, outbox.NewNotification{Type: typ})
		}
		res := claim(t, db, outbox.ClaimOptions{Types: []string{"a", "c"}})
		require.Len(t, res.Claimed, 2)
		require.Equal(t, "a", res.Claimed[0].Notification.Type)
		require.Equal(t, "c", res.Claimed[1].Notification.Type)
	})

	t.Run("leaves_rows_that_its_caller_may_yet_settle", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 3)
		cs := claim(t, db, outbox.ClaimOptions{}).Claimed
		endLeases(t, db)
		require.Equal(t, []int64{1, 3}, bookings(claim(t, db, outbox.ClaimOptions{Except: []int64{cs[1].ID}})))
	})

	t.Run("leaves_what_fell_due_before_Since", func(t *testing.T) {
		db := pgtest.NewDB(t)
		addRows(t, db, 5)
		due := func(booking int) time.Time { // not when the row was added
			return time.Date(2020, 1, booking, 0, 0, 0, 1000, time.UTC)
		}
		for i := 1; i <= 4; i++ {
			db.MustExec(t, "UPDATE outbox_notifications SET created_at = $2::text::timestamptz WHERE booking_id = $1", i, due(i).Format(time.RFC3339Nano))
		}
		db.MustExec(t, "UPDATE outbox_notifications SET created_at = '-infinity' WHERE booking_id = 5")
		db.MustExec(t, "UPDATE outbox_notifications SET not_after = now() WHERE booking_id = 4")
		res := claim(t, db, outbox.ClaimOptions{Since: due(2), Limit: 2})
		require.Equal(t, []int64{2, 3}, bookings(res))
		require.Equal(t, due(3), res.Last)
		res = claim(t, db, outbox.ClaimOptions{Since: due(2)})
		require.Empty(t, res.Claimed)
		require.Len(t, res.Failed, 1)
		require.Equal(t, due(4), res.Last)
		res = claim(t, db, outbox.ClaimOptions{Since: due(3)})
		require.Empty(t, res.Claimed)
		require.Zero(t, res.Last)
		res = claim(t, db, outbox.ClaimOptions{Limit: 1})
		require.Equal(t, []int64{5}, bookings(res))
		require.Zero(t, res.Last)
		require.Equal(t, []int64{1}, bookings(claim(t, db, outbox.ClaimOptions{})))
	})

	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run(fmt.Sprintf("takes_turns_in_every_exec_mode/%v", mode), func(t *testing.T) {
			db := pgtest.NewDB(t)
			addRows(t, db, 3)
			store, err := outbox.NewPGStore(pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.DefaultQueryExecMode = mode
			}), outbox.Config{Logger: discard})
			require.NoError(t, err)
			for i := range 3 {
				res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour, InTurn: true, Since: time.Unix(int64(i), 0)})
				require.NoError(t, err)
				require.False(t, res.Busy)
				require.Equal(t, []int64{int64(i + 1)}, bookings(res))
			}
		})
	}

	// A claim stops halfway, as a frozen process may make it.
	for _, first := range []bool{false, true} {
		t.Run(fmt.Sprintf("takes_turns_with_one_that_is_stuck/in_turn_%v", first), func(t *testing.T) {
			db := pgtest.NewDB(t)
			db.MustExec(t, `CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NEW; END $$`)
			addRows(t, db, 2)
			require.False(t, claim(t, db, outbox.ClaimOptions{Limit: 1, InTurn: true}).Busy)
			db.MustExec(t, "CREATE TRIGGER stop BEFORE UPDATE ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION stop()")
			tx := db.MustBegin(t)
			_, err := tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock(42)")
			require.NoError(t, err)
			stuck := make(chan error, 1)
			go func() {
				res, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour, InTurn: first})
				if err == nil && len(res.Claimed) != 1 {
					err = fmt.Errorf("claimed %d", len(res.Claimed))
				}
				stuck <- err
			}()
			db.WaitBlocked(t, 1)
			db.AddMany(t, outbox.NewNotification{Type: "reject", BookingID: 3})
			res := claim(t, db, outbox.ClaimOptions{InTurn: true})
			require.True(t, res.Busy)
			require.Empty(t, res.Claimed)
			require.NoError(t, tx.Rollback(t.Context()))
			require.NoError(t, <-stuck)
			db.MustExec(t, "DROP TRIGGER stop ON outbox_notifications")
			tx = db.MustBegin(t)
			_, err = tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", db.Store.ClaimLock())
			require.NoError(t, err)
			require.True(t, claim(t, db, outbox.ClaimOptions{InTurn: true}).Busy)
			res = claim(t, db, outbox.ClaimOptions{})
			require.False(t, res.Busy)
			require.Equal(t, []int64{3}, bookings(res), "out of turn")
			require.NoError(t, tx.Rollback(t.Context()))
			require.False(t, claim(t, db, outbox.ClaimOptions{InTurn: true}).Busy, "nothing is left, but nobody is claiming")
		})
	}

	t.Run("waits_for_nobody_who_holds_a_row", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 3)
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "reject", BookingID: 2})
		require.NoError(t, err)
		require.Equal(t, []int64{1, 3}, bookings(claim(t, db, outbox.ClaimOptions{})))
		require.NoError(t, tx.Commit(t.Context()))
		require.Equal(t, []int64{2}, bookings(claim(t, db, outbox.ClaimOptions{})))
	})

	t.Run("takes_rows_of_an_older_table_with_empty_columns", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications ALTER attempts DROP NOT NULL, ALTER created_at DROP NOT NULL")
		addRows(t, db, 1)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = NULL, created_at = NULL")
		res := claim(t, db, outbox.ClaimOptions{MaxAttempts: 1})
		require.Len(t, res.Claimed, 1)
		require.Equal(t, 1, res.Claimed[0].Notification.Attempts)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: res.Claimed[0].Lease, Verdict: outbox.Retry}))
	})

	t.Run("takes_a_row_again_when_its_lease_has_ended_and_tells_that_its_outcome_is_unknown", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		first := claimOne(t, db)
		endLeases(t, db)
		res := claim(t, db, outbox.ClaimOptions{MaxAttempts: 10})
		require.Len(t, res.Claimed, 1)
		second := res.Claimed[0]
		require.NotEqual(t, first.Token, second.Token)
		require.Equal(t, 2, second.Notification.Attempts)
		require.EqualValues(t, 1, second.UnknownVersion)
	})

	t.Run("repeated_with_its_token_returns_its_rows_without_another_attempt", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		lost := claimOne(t, db) // version 1 of booking 1, by a relay that died
		endLeases(t, db)
		addRows(t, db, 2)
		token := outbox.NewToken()
		first := claim(t, db, outbox.ClaimOptions{Token: token, Lease: time.Minute})
		second := claim(t, db, outbox.ClaimOptions{Token: token, Lease: time.Hour, MaxAttempts: 1, AtMostOnce: true})
		require.Len(t, second.Claimed, 2)
		for i := range 2 {
			require.Equal(t, first.Claimed[i].Lease, second.Claimed[i].Lease)
			require.Equal(t, first.Claimed[i].UnknownVersion, second.Claimed[i].UnknownVersion)
			require.Equal(t, first.Claimed[i].Notification.Attempts, second.Claimed[i].Notification.Attempts)
		}
		require.EqualValues(t, 1, second.Claimed[0].UnknownVersion)
		require.Zero(t, second.Claimed[1].UnknownVersion)
		require.NotEqual(t, lost.Token, second.Claimed[0].Token)
		require.True(t, pgtest.One[bool](t, db, "SELECT bool_and(lease_until > now() + interval '50 minutes') FROM outbox_notifications"))
	})

	t.Run("repeated_with_its_token_is_for_the_content_of_now", func(t *testing.T) {
		t.Parallel()
		for name, c := range map[string]struct {
			ranOut  bool // a lease had run out on the row before
			opts    outbox.ClaimOptions
			unknown int64
		}{
			"new":                 {},
			"after_a_crash":       {ranOut: true},
			"to_reconcile":        {opts: outbox.ClaimOptions{Reconcile: true}},
			"to_reconcile_crash":  {ranOut: true, opts: outbox.ClaimOptions{Reconcile: true}, unknown: 1},
			"at_most_once":        {opts: outbox.ClaimOptions{AtMostOnce: true}},
			"reconcile_and_crash": {ranOut: true, opts: outbox.ClaimOptions{AtMostOnce: true, Reconcile: true}, unknown: 1},
		} {
			db := pgtest.NewDB(t)
			addRows(t, db, 1)
			if c.ranOut {
				db.MustExec(t, "UPDATE outbox_notifications SET "+leaseEnded)
			}
			c.opts.Token = outbox.NewToken()
			require.Len(t, claim(t, db, c.opts).Claimed, 1, name) // the answer is lost
			require.True(t, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)}).InFlight)
			got := claim(t, db, c.opts).Claimed[0]
			require.EqualValues(t, 2, got.Notification.Version, name)
			require.Equal(t, c.unknown, got.UnknownVersion, name)
			want, version := outbox.LeaseDone, int64(2)
			if c.unknown > 0 {
				want, version = outbox.LeaseSuperseded, c.unknown // of which it was asked
			}
			require.Equal(t, []outbox.LeaseResult{want}, settle(t, db, outbox.Settlement{Lease: got.Lease, Verdict: outbox.Delivered}), name)
			require.Equal(t, version, db.Get(t, booking(1)).SentVersion, name)
		}
	})

	t.Run("repeated_takes_newer_content_for_no_suspect", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		opts := outbox.ClaimOptions{MaxAttempts: 2, Token: outbox.NewToken()}
		c := claim(t, db, opts).Claimed[0]
		require.True(t, c.Suspect)
		require.EqualValues(t, 1, c.UnknownVersion)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: "newer"})
		c = claim(t, db, opts).Claimed[0]
		require.False(t, c.Suspect)
		require.Zero(t, c.UnknownVersion)
	})

	t.Run("repeated_counts_newer_content_anew", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 1)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = 2")
		opts := outbox.ClaimOptions{Token: outbox.NewToken(), MaxAttempts: 3}
		require.Equal(t, 3, claim(t, db, opts).Claimed[0].Notification.Attempts) // the answer is lost
		require.True(t, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)}).InFlight)
		opts.Repeated = true
		for range 2 {
			require.Equal(t, 1, claim(t, db, opts).Claimed[0].Notification.Attempts)
		}
	})

	t.Run("repeated_leaves_what_its_caller_holds", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 1) // without a lease, as after a failover that lost it
		opts := outbox.ClaimOptions{Token: outbox.NewToken(), Except: []int64{1}, Repeated: true}
		require.Empty(t, claim(t, db, opts).Claimed)
		opts.Repeated = false
		require.Len(t, claim(t, db, opts).Claimed, 1)
	})

	t.Run("repeated_takes_what_was_settled_as_unknown_for_no_suspect", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 1)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = 2, "+leaseEnded)
		opts := outbox.ClaimOptions{Token: outbox.NewToken(), MaxAttempts: 3}
		first := claim(t, db, opts).Claimed[0]
		require.True(t, first.Suspect)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, settle(t, db, outbox.Settlement{Lease: first.Lease, Verdict: outbox.HandedBack, Unknown: true}))
		opts.Repeated = true
		again := claim(t, db, opts).Claimed[0]
		require.False(t, again.Suspect)
		require.EqualValues(t, 1, again.UnknownVersion)
	})

	t.Run("tells_suspects_from_others", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 6)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = 2, "+leaseEnded)
		for id, set := range map[int]string{
			1: "attempts = 1",                           // two are left
			2: "attempts = 3",                           // none is left: failed by the claim of others
			3: "lease_until = NULL",                     // settled with its outcome unknown
			4: "lease_until = NULL, lease_token = NULL", // settled
		} {
			db.MustExec(t, "UPDATE outbox_notifications SET "+set+" WHERE booking_id = $1", id)
		}
		opts := outbox.ClaimOptions{MaxAttempts: 3, Suspects: outbox.OneSuspect, Token: outbox.NewToken()}
		for range 2 { // the second repeats the first
			res := claim(t, db, opts)
			require.Equal(t, []int64{1, 3, 4, 5}, bookings(res))
			for _, c := range res.Claimed {
				require.Equal(t, c.Notification.BookingID == 5, c.Suspect)
				require.EqualValues(t, map[int64]int64{1: 1, 3: 1, 4: 0, 5: 1}[c.Notification.BookingID], c.UnknownVersion)
			}
			opts.Suspects = outbox.LeaveSuspects
		}
		require.Equal(t, outbox.StatusFailed, db.Get(t, booking(2)).Status)
		require.Empty(t, claim(t, db, outbox.ClaimOptions{MaxAttempts: 3, Suspects: outbox.LeaveSuspects}).Claimed)
		require.Equal(t, []int64{6}, bookings(claim(t, db, outbox.ClaimOptions{MaxAttempts: 3})))
	})

	t.Run("repeated_does_not_take_what_has_been_settled_meanwhile_for_its_own", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 1)
		opts := outbox.ClaimOptions{Token: outbox.NewToken()}
		c := claim(t, db, opts).Claimed[0]
		settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Retry, Error: "timeout", Unknown: true})
		again := claim(t, db, opts).Claimed[0]
		require.Equal(t, 2, again.Notification.Attempts)
		require.EqualValues(t, 1, again.UnknownVersion)
	})

	t.Run("gives_a_row_to_one_of_many", func(t *testing.T) {
		t.Parallel()
		for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
			db := pgtest.NewDB(t)
			addRows(t, db, 1000)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = isolation
			})
			store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
			require.NoError(t, err)
			var mu sync.Mutex
			seen := make(map[int64]int)
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					for empty := 0; empty < 3; {
						res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 13, Lease: time.Hour})
						if outbox.IsRetryable(err) {
							continue // rivals won ten times in a row
						}
						if err != nil {
							t.Error(err)
							return
						}
						if len(res.Claimed) == 0 {
							empty++
						}
						mu.Lock()
						for _, c := range res.Claimed {
							seen[c.ID]++
						}
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			require.Len(t, seen, 1000, isolation)
			require.Equal(t, 1000, pgtest.One[int](t, db, "SELECT sum(attempts) FROM outbox_notifications"), isolation)
		}
	})

	for name, c := range map[string]struct {
		set     string
		opts    outbox.ClaimOptions
		failed  string // the error of the row that the claim failed; "" where it claims it
		unknown int64
		expired bool
		anew    bool // the attempts before the claim do not count
	}{
		"a_row_that_has_expired":                  {set: "not_after = now()", failed: "expired: not delivered before"},
		"a_row_before_its_end":                    {set: "not_after = now() + interval '1 hour'"},
		"a_row_out_of_attempts":                   {set: "attempts = 3, last_error = 'busy'", opts: outbox.ClaimOptions{MaxAttempts: 3}, failed: "out of attempts; before that: busy"},
		"a_row_out_of_attempts_that_kills":        {set: "attempts = 3, " + leaseEnded, opts: outbox.ClaimOptions{MaxAttempts: 3}, failed: "out of attempts: the last delivery left no result"},
		"a_row_with_an_attempt_left":              {set: "attempts = 2", opts: outbox.ClaimOptions{MaxAttempts: 3}},
		"a_row_where_attempts_are_unlimited":      {set: "attempts = 1000000"},
		"a_lease_that_ran_out":                    {set: leaseEnded, unknown: 1},
		"at_most_once_a_lease_that_ran_out":       {set: leaseEnded, opts: outbox.ClaimOptions{AtMostOnce: true}, failed: "outcome unknown"},
		"at_most_once_a_lease_without_a_version":  {set: leaseEnded[:strings.LastIndex(leaseEnded, ",")], opts: outbox.ClaimOptions{AtMostOnce: true}, failed: "outcome unknown"},
		"at_most_once_a_newer_version":            {set: leaseEnded + ", version = 2", opts: outbox.ClaimOptions{AtMostOnce: true}, anew: true},
		"a_newer_version_out_of_attempts":         {set: leaseEnded + ", attempts = 3, version = 2", opts: outbox.ClaimOptions{MaxAttempts: 3}, anew: true},
		"at_most_once_it_out_of_attempts":         {set: leaseEnded + ", attempts = 3, version = 2", opts: outbox.ClaimOptions{MaxAttempts: 3, AtMostOnce: true}, anew: true},
		"a_newer_version_with_one_attempt_left":   {set: leaseEnded + ", attempts = 2, version = 2", opts: outbox.ClaimOptions{MaxAttempts: 3, Suspects: outbox.LeaveSuspects}, anew: true},
		"to_reconcile_an_older_version_no_more":   {set: leaseEnded + ", attempts = 4, version = 2", opts: outbox.ClaimOptions{MaxAttempts: 3, Reconcile: true}, anew: true},
		"to_reconcile_an_older_version_once_more": {set: leaseEnded + ", attempts = 3, version = 2", opts: outbox.ClaimOptions{MaxAttempts: 3, Reconcile: true}, unknown: 1},
		"at_most_once_a_row_without_a_lease":      {set: "attempts = 1", opts: outbox.ClaimOptions{AtMostOnce: true}},
		"to_reconcile_a_lease_that_ran_out":       {set: leaseEnded, opts: outbox.ClaimOptions{AtMostOnce: true, Reconcile: true}, unknown: 1},
		"to_reconcile_an_older_version":           {set: leaseEnded + ", version = 2", opts: outbox.ClaimOptions{Reconcile: true}, unknown: 1},
		"to_reconcile_an_expired_row":             {set: leaseEnded + ", not_after = now()", opts: outbox.ClaimOptions{Reconcile: true}, unknown: 1, expired: true},
		"to_reconcile_an_expired_row_of_no_lease": {set: "not_after = now()", opts: outbox.ClaimOptions{Reconcile: true}, failed: "expired"},
		"to_reconcile_a_row_out_of_attempts":      {set: leaseEnded + ", attempts = 3", opts: outbox.ClaimOptions{MaxAttempts: 3, Reconcile: true}, unknown: 1},
		"to_reconcile_a_row_out_of_attempts_once": {set: leaseEnded + ", attempts = 4", opts: outbox.ClaimOptions{MaxAttempts: 3, Reconcile: true}, failed: "out of attempts"},
		"to_reconcile_at_most_once_no_more_often": {set: leaseEnded + ", attempts = 4", opts: outbox.ClaimOptions{MaxAttempts: 3, Reconcile: true, AtMostOnce: true}, failed: "outcome unknown"},
		"nothing_unknown_of_an_older_version":     {set: leaseEnded + ", version = 2", anew: true},
	} {
		t.Run("decides_on/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addRows(t, db, 1)
			db.MustExec(t, "UPDATE outbox_notifications SET "+c.set)
			before := db.Get(t, booking(1))
			res := claim(t, db, c.opts)
			after := db.Get(t, booking(1))
			if c.failed == "" {
				require.Len(t, res.Claimed, 1)
				require.Empty(t, res.Failed)
				require.Equal(t, c.unknown, res.Claimed[0].UnknownVersion)
				require.Equal(t, c.expired, res.Claimed[0].Expired)
				if c.anew {
					before.Attempts = 0
				}
				require.Equal(t, before.Attempts+1, after.Attempts)
				return
			}
			require.Empty(t, res.Claimed)
			require.Equal(t, []outbox.Notification{after}, res.Failed)
			require.Equal(t, outbox.StatusFailed, after.Status)
			require.Contains(t, after.LastError, c.failed)
			require.Equal(t, before.Attempts, after.Attempts)
			require.Zero(t, after.LockedAt)
			require.Empty(t, leaseOf(t, db, after.ID))
		})
	}

	for name, c := range map[string]struct {
		opts  outbox.ClaimOptions
		field string
	}{
		"no_limit":              {outbox.ClaimOptions{Lease: time.Second}, "Limit"},
		"no_lease":              {outbox.ClaimOptions{Limit: 1}, "Lease"},
		"a_repeat_of_nothing":   {outbox.ClaimOptions{Limit: 1, Lease: time.Second, Repeated: true}, "Repeated"},
		"negative_max_attempts": {outbox.ClaimOptions{Limit: 1, Lease: time.Second, MaxAttempts: -1}, "MaxAttempts"},
		"too_many_attempts":     {outbox.ClaimOptions{Limit: 1, Lease: time.Second, MaxAttempts: 1 << 40}, "MaxAttempts"},
		"no_such_suspects":      {outbox.ClaimOptions{Limit: 1, Lease: time.Second, Suspects: 3}, "Suspects"},
		"no_types":              {outbox.ClaimOptions{Limit: 1, Lease: time.Second, Types: []string{}}, "Types"},
		"a_NUL_type":            {outbox.ClaimOptions{Limit: 1, Lease: time.Second, Types: []string{"\x00"}}, "Types"},
	} {
		t.Run("refuses/"+name, func(t *testing.T) {
			t.Parallel()
			_, err := neverUsed(t).Claim(t.Context(), c.opts)
			requireInvalid(t, err, c.field, -1, name)
		})
	}

	t.Run("says_that_the_table_is_missing", func(t *testing.T) {
		t.Parallel()
		_, err := pgtest.NewEmptyDB(t).Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Second})
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "run Migrate first")
	})
}

const leaseEnded = "lease_token = gen_random_uuid(), lease_until = now() - interval '1 second', lease_version = 1"

// neverUsed is a store whose pool cannot connect to anything.
func neverUsed(t *testing.T) *outbox.PGStore {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/none")
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
	require.NoError(t, err)
	return store
}

// TestSettle has a case for each cell of the table of verdicts, and for each way to
// refresh a row while it is being delivered.
func TestSettle(t *testing.T) {
	t.Parallel()

	// What happened between the claim and the settle.
	refresh := func(n outbox.NewNotification) func(*testing.T, *pgtest.DB) {
		return func(t *testing.T, db *pgtest.DB) {
			n := n // subtests share it
			n.Type, n.BookingID = "reject", 1
			res := db.Add(t, n)
			require.True(t, res.InFlight)
			require.Equal(t, outbox.OutcomeRefreshed, res.Outcome)
		}
	}
	tomorrow := time.Now().Add(24 * time.Hour).UTC().Truncate(time.Microsecond)
	meanwhile := map[string]func(*testing.T, *pgtest.DB){
		"nothing":          func(*testing.T, *pgtest.DB) {},
		"identical":        refresh(outbox.NewNotification{Payload: json.RawMessage(`{"v": 1}`)}),
		"put_off":          refresh(outbox.NewNotification{NotBefore: tomorrow}),
		"changed":          refresh(outbox.NewNotification{Payload: json.RawMessage(`{"v":2}`)}),
		"changed_for_then": refresh(outbox.NewNotification{Payload: json.RawMessage(`{"v":2}`), NotBefore: tomorrow}),
		"lease_ended":      endLeasesOf,
		"ended_and_identical": func(t *testing.T, db *pgtest.DB) {
			endLeases(t, db)
			require.False(t, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":1}`)}).InFlight)
		},
		"ended_and_changed": func(t *testing.T, db *pgtest.DB) {
			endLeases(t, db)
			require.False(t, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)}).InFlight)
		},
		"claimed_by_another": func(t *testing.T, db *pgtest.DB) {
			endLeases(t, db)
			require.Len(t, claim(t, db, outbox.ClaimOptions{}).Claimed, 1)
		},
		"settled_by_another": func(t *testing.T, db *pgtest.DB) {
			endLeases(t, db)
			other := claim(t, db, outbox.ClaimOptions{}).Claimed[0]
			settle(t, db, outbox.Settlement{Lease: other.Lease, Verdict: outbox.Failed, Error: "other"})
		},
		"settled_by_hand": func(t *testing.T, db *pgtest.DB) {
			db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		},
	}
	verdicts := map[string]outbox.Settlement{
		"ok":        {Verdict: outbox.Delivered, Receipt: "message 7"},
		"error":     {Verdict: outbox.Retry, Error: "busy", RetryIn: time.Hour},
		"unknown":   {Verdict: outbox.Retry, Error: "timeout", RetryIn: time.Hour, Unknown: true},
		"asked":     {Verdict: outbox.Retry, Error: "no answer", RetryIn: time.Hour, Unknown: true, Asked: true},
		"permanent": {Verdict: outbox.Failed, Error: "blocked"},
		"handback":  {Verdict: outbox.HandedBack},
	}
	type want struct {
		result   outbox.LeaseResult
		status   outbox.Status
		attempts int
		due      string // now, hour, tomorrow
		sent     int64
		receipt  string
		err      string
	}
	const done, superseded, stale = outbox.LeaseDone, outbox.LeaseSuperseded, outbox.LeaseStale
	const pending, sent, failed = outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed
	for name, w := range map[string]want{
		"ok/nothing":             {done, sent, 1, "now", 1, "message 7", ""},
		"ok/identical":           {done, sent, 1, "now", 1, "message 7", ""},
		"ok/put_off":             {done, sent, 1, "now", 1, "message 7", ""},
		"ok/changed":             {superseded, pending, 0, "now", 1, "message 7", ""},
		"ok/changed_for_then":    {superseded, pending, 0, "tomorrow", 1, "message 7", ""},
		"ok/lease_ended":         {done, sent, 1, "now", 1, "message 7", ""},
		"ok/ended_and_identical": {done, sent, 1, "now", 1, "message 7", ""},
		"ok/ended_and_changed":   {superseded, pending, 0, "now", 1, "message 7", ""},
		"ok/claimed_by_another":  {result: stale},
		"ok/settled_by_another":  {result: stale},
		"ok/settled_by_hand":     {result: stale},
		"error/nothing":          {done, pending, 1, "hour", 0, "", "busy"},
		"error/identical":        {done, pending, 1, "hour", 0, "", "busy"},
		"error/put_off":          {done, pending, 1, "tomorrow", 0, "", "busy"},
		"error/changed":          {superseded, pending, 0, "now", 0, "", "busy"},
		"error/changed_for_then": {superseded, pending, 0, "tomorrow", 0, "", "busy"},
		"error/lease_ended":      {done, pending, 1, "hour", 0, "", "busy"},
		// the refresh after the end of the lease began to count anew
		"error/ended_and_identical":    {done, pending, 1, "hour", 0, "", "busy"},
		"error/ended_and_changed":      {superseded, pending, 0, "now", 0, "", "busy"},
		"error/claimed_by_another":     {result: stale},
		"error/settled_by_another":     {result: stale},
		"error/settled_by_hand":        {result: stale},
		"unknown/nothing":              {done, pending, 1, "hour", 0, "", "timeout"},
		"unknown/changed":              {superseded, pending, 0, "now", 0, "", "timeout"},
		"unknown/claimed_by_another":   {result: stale},
		"asked/nothing":                {done, pending, 1, "hour", 0, "", "no answer"},
		"asked/changed":                {done, pending, 1, "hour", 0, "", "no answer"},
		"asked/changed_for_then":       {done, pending, 1, "tomorrow", 0, "", "no answer"},
		"asked/claimed_by_another":     {result: stale},
		"permanent/nothing":            {done, failed, 1, "now", 0, "", "blocked"},
		"permanent/identical":          {done, failed, 1, "now", 0, "", "blocked"},
		"permanent/put_off":            {done, failed, 1, "now", 0, "", "blocked"},
		"permanent/changed":            {superseded, pending, 0, "now", 0, "", "blocked"},
		"permanent/changed_for_then":   {superseded, pending, 0, "tomorrow", 0, "", "blocked"},
		"permanent/lease_ended":        {done, failed, 1, "now", 0, "", "blocked"},
		"permanent/ended_and_changed":  {superseded, pending, 0, "now", 0, "", "blocked"},
		"permanent/claimed_by_another": {result: stale},
		"permanent/settled_by_another": {result: stale},
		"permanent/settled_by_hand":    {result: stale},
		"handback/nothing":             {done, pending, 0, "now", 0, "", ""},
		"handback/identical":           {done, pending, 0, "now", 0, "", ""},
		"handback/put_off":             {done, pending, 0, "tomorrow", 0, "", ""},
		"handback/changed":             {done, pending, 0, "now", 0, "", ""},
		"handback/claimed_by_another":  {result: stale},
		"handback/settled_by_another":  {result: stale},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			c := claimOne(t, db)
			verdict, event, _ := strings.Cut(name, "/")
			meanwhile[event](t, db)
			st := verdicts[verdict]
			st.Lease = c.Lease
			before := whole(t, db, booking(1))
			require.Equal(t, []outbox.LeaseResult{w.result}, settle(t, db, st))
			if w.result == stale {
				require.Equal(t, before, whole(t, db, booking(1)), "a stale token changes nothing")
				return
			}
			n := db.Get(t, booking(1))
			require.Equal(t, w.status, n.Status)
			require.Equal(t, w.attempts, n.Attempts)
			require.Equal(t, w.sent, n.SentVersion)
			require.Equal(t, w.receipt, n.Receipt)
			require.Equal(t, w.err, n.LastError)
			require.Equal(t, w.status == sent, !n.SentAt.IsZero())
			require.Zero(t, n.LockedAt)
			switch w.due {
			case "now":
				require.Zero(t, n.NextRetryAt)
			case "hour":
				in := pgtest.One[float64](t, db, "SELECT extract(epoch FROM next_retry_at - clock_timestamp())::float8 FROM outbox_notifications")
				require.InDelta(t, 3600, in, 60)
			case "tomorrow":
				require.Equal(t, tomorrow, n.NextRetryAt)
			}
			if st.Unknown {
				require.Equal(t, 1, pgtest.One[int](t, db, "SELECT num_nonnulls(lease_token, lease_until) FROM outbox_notifications"), "a token stays, the lease does not")
				db.MustExec(t, "UPDATE outbox_notifications SET next_retry_at = NULL")
				require.EqualValues(t, 1, claim(t, db, outbox.ClaimOptions{Reconcile: true}).Claimed[0].UnknownVersion)
			} else {
				require.Zero(t, pgtest.One[int](t, db, "SELECT num_nonnulls(lease_token, lease_until, lease_version) FROM outbox_notifications"))
			}
			// Settling once more has no effect: the answer to the first may have been lost.
			before = whole(t, db, booking(1))
			require.Equal(t, []outbox.LeaseResult{stale}, settle(t, db, st))
			extended, err := db.Store.Extend(t.Context(), []outbox.Lease{st.Lease}, time.Hour)
			require.NoError(t, err)
			require.Equal(t, []outbox.LeaseResult{stale}, extended, "a lease that has ended is not extended")
			require.Equal(t, before, whole(t, db, booking(1)))
		})
	}

	t.Run("settles_many_each_by_its_verdict_and_reports_in_the_order_given", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 5)
		cs := claim(t, db, outbox.ClaimOptions{}).Claimed
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 3, Payload: json.RawMessage(`{"v":2}`)})
		tx := db.MustBegin(t)
		_, err := db.Store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "reject", BookingID: 5})
		require.NoError(t, err)
		sts := []outbox.Settlement{
			{Lease: cs[4].Lease, Verdict: outbox.Delivered, Receipt: "m5"},
			{Lease: outbox.Lease{ID: 1 << 60, Token: cs[0].Token}, Verdict: outbox.Delivered},
			{Lease: cs[2].Lease, Verdict: outbox.Delivered, Receipt: "m3"},
			{Lease: cs[1].Lease, Verdict: outbox.Failed, Error: "blocked"},
			{Lease: cs[0].Lease, Verdict: outbox.Delivered, Receipt: "m1"},
			{Lease: cs[3].Lease, Verdict: outbox.Retry, Error: "busy", RetryIn: time.Minute},
		}
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseHeld, outbox.LeaseStale, outbox.LeaseSuperseded, done, done, done}, settle(t, db, sts...))
		require.NoError(t, tx.Commit(t.Context()))
		require.Equal(t, []outbox.LeaseResult{done}, settle(t, db, sts[0]))
		for id, want := range map[int64]outbox.Status{1: sent, 2: failed, 3: pending, 4: pending, 5: sent} {
			require.Equal(t, want, db.Get(t, booking(id)).Status)
		}
		require.Equal(t, "m1", db.Get(t, booking(1)).Receipt)
		require.Equal(t, "m5", db.Get(t, booking(5)).Receipt)
	})

	t.Run("a_lease_given_twice_is_settled_once", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		c := claimOne(t, db)
		st := outbox.Settlement{Lease: c.Lease, Verdict: outbox.Retry, RetryIn: time.Hour}
		results := settle(t, db, st, st)
		require.Contains(t, results, done)
		require.Equal(t, 1, db.Get(t, booking(1)).Attempts)
	})

	t.Run("waits_for_nobody_also_where_the_pools_default_is_stricter", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = "serializable"
		})
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		addRows(t, db, 500)
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				for {
					res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 10, Lease: time.Hour})
					if outbox.IsRetryable(err) {
						continue // rivals won ten times in a row
					}
					if err != nil {
						t.Error(err)
						return
					}
					if len(res.Claimed) == 0 {
						return
					}
					var sts []outbox.Settlement
					for _, c := range res.Claimed {
						sts = append(sts, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered})
					}
					for {
						// Held: a claim that began before these were claimed locks them for a moment.
						var done []outbox.LeaseResult
						done, err = store.Settle(t.Context(), sts)
						if !outbox.IsRetryable(err) && !slices.Contains(done, outbox.LeaseHeld) {
							break
						}
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		require.Equal(t, 500, pgtest.One[int](t, db, "SELECT count(*) FROM outbox_notifications WHERE status = 'sent' AND attempts = 1"))
	})

	t.Run("tells_two_leases_of_a_row_apart", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		stale := claimOne(t, db)
		endLeases(t, db)
		current := claim(t, db, outbox.ClaimOptions{}).Claimed[0]
		extended, err := db.Store.Extend(t.Context(), []outbox.Lease{stale.Lease, current.Lease}, time.Hour)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale, outbox.LeaseDone}, extended)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale, outbox.LeaseDone}, settle(t, db,
			outbox.Settlement{Lease: stale.Lease, Verdict: outbox.Failed, Error: "stale"},
			outbox.Settlement{Lease: current.Lease, Verdict: outbox.Delivered, Receipt: "current"}))
		n := db.Get(t, booking(1))
		require.Equal(t, outbox.StatusSent, n.Status)
		require.Equal(t, "current", n.Receipt)
		require.Empty(t, n.LastError)
	})

	t.Run("puts_a_retry_without_a_pause_behind_the_others", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 2)
		first := claim(t, db, outbox.ClaimOptions{Limit: 1}).Claimed[0]
		settle(t, db, outbox.Settlement{Lease: first.Lease, Verdict: outbox.Retry})
		require.Equal(t, []int64{2, 1}, bookings(claim(t, db, outbox.ClaimOptions{})))
	})

	t.Run("of_nothing_runs_nothing", func(t *testing.T) {
		t.Parallel()
		res, err := neverUsed(t).Settle(t.Context(), nil)
		require.NoError(t, err)
		require.Empty(t, res)
	})

	for name, c := range map[string]struct {
		st    outbox.Settlement
		field string
	}{
		"no_verdict":               {outbox.Settlement{}, "Verdict"},
		"an_unknown_verdict":       {outbox.Settlement{Verdict: "sent"}, "Verdict"},
		"a_negative_pause":         {outbox.Settlement{Verdict: outbox.Retry, RetryIn: -1}, "RetryIn"},
		"a_receipt_with_a_NUL":     {outbox.Settlement{Verdict: outbox.Delivered, Receipt: "\x00"}, "Receipt"},
		"an_error_that_is_no_UTF8": {outbox.Settlement{Verdict: outbox.Failed, Error: "\xff"}, "Error"},
		"delivered_but_unknown":    {outbox.Settlement{Verdict: outbox.Delivered, Unknown: true}, "Unknown"},
		"asked_and_handed_back":    {outbox.Settlement{Verdict: outbox.HandedBack, Unknown: true, Asked: true}, "Asked"},
		"asked_and_known":          {outbox.Settlement{Verdict: outbox.Retry, Asked: true}, "Asked"},
	} {
		t.Run("refuses/"+name, func(t *testing.T) {
			t.Parallel()
			_, err := neverUsed(t).Settle(t.Context(), []outbox.Settlement{{Verdict: outbox.Delivered}, c.st})
			requireInvalid(t, err, c.field, 1, name)
		})
	}
}

func endLeasesOf(t *testing.T, db *pgtest.DB) { endLeases(t, db) }

// TestUnknownOutcome: what became of a version is known as unknown until somebody
// finds out or claims it anew, whatever is added meanwhile.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	t.Run("at_most_once_an_identical_add_does_not_have_it_sent_again", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		res := db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":1}`)})
		require.False(t, res.InFlight)
		got := claim(t, db, outbox.ClaimOptions{AtMostOnce: true})
		require.Empty(t, got.Claimed)
		require.Len(t, got.Failed, 1)
		require.Contains(t, got.Failed[0].LastError, "outcome unknown")
	})
	t.Run("at_most_once_newer_content_is_sent", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)})
		require.Len(t, claim(t, db, outbox.ClaimOptions{AtMostOnce: true}).Claimed, 1)
		endLeases(t, db)
		require.Len(t, claim(t, db, outbox.ClaimOptions{AtMostOnce: true}).Failed, 1, "once")
	})
	t.Run("asked_about_in_vain_it_is_put_off_and_counts_until_newer_content_goes_out", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)})
		opts := outbox.ClaimOptions{Reconcile: true, MaxAttempts: 2}
		for attempt := 1; attempt <= 3; attempt++ {
			c := claim(t, db, opts).Claimed[0]
			require.EqualValues(t, 1, c.UnknownVersion)
			require.Equal(t, attempt, c.Notification.Attempts)
			require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone},
				settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Retry, RetryIn: time.Hour, Unknown: true, Asked: true}))
			require.Empty(t, claim(t, db, opts).Claimed, "put off")
			db.MustExec(t, "UPDATE outbox_notifications SET next_retry_at = NULL")
		}
		c := claim(t, db, opts).Claimed[0]
		require.Zero(t, c.UnknownVersion)
		require.EqualValues(t, 2, c.Notification.Version)
		require.Equal(t, 1, c.Notification.Attempts)
	})
	t.Run("handed_back_as_unknown_it_stays_so", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		for range 3 {
			c := claim(t, db, outbox.ClaimOptions{Reconcile: true}).Claimed[0]
			require.EqualValues(t, 1, c.UnknownVersion)
			require.Equal(t, 2, c.Notification.Attempts)
			settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.HandedBack, Unknown: true})
		}
		require.Len(t, claim(t, db, outbox.ClaimOptions{AtMostOnce: true}).Failed, 1)
	})
	t.Run("handed_back_twice_it_gives_back_one_attempt", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		c := claimOne(t, db)
		db.MustExec(t, "UPDATE outbox_notifications SET attempts = 5")
		st := outbox.Settlement{Lease: c.Lease, Verdict: outbox.HandedBack, Unknown: true}
		for _, result := range []outbox.LeaseResult{outbox.LeaseDone, outbox.LeaseStale} { // the answer to the first is lost
			require.Equal(t, []outbox.LeaseResult{result}, settle(t, db, st))
			require.Equal(t, 4, db.Get(t, booking(1)).Attempts)
		}
	})
	t.Run("delivered_after_all_counts_for_the_version_asked_about", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		claimOne(t, db)
		endLeases(t, db)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, Payload: json.RawMessage(`{"v":2}`)})
		c := claim(t, db, outbox.ClaimOptions{Reconcile: true}).Claimed[0]
		require.EqualValues(t, 1, c.UnknownVersion)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseSuperseded},
			settle(t, db, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered, Receipt: "found"}))
		c = claim(t, db, outbox.ClaimOptions{Reconcile: true}).Claimed[0]
		require.Zero(t, c.UnknownVersion)
		require.EqualValues(t, 1, c.Notification.SentVersion)
		require.Equal(t, "found", c.Notification.Receipt)
	})
}

func TestExtend(t *testing.T) {
	t.Parallel()
	t.Run("gives_leases_a_new_end_by_the_databases_clock", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		addRows(t, db, 4)
		cs := claim(t, db, outbox.ClaimOptions{Lease: time.Minute}).Claimed
		db.MustExec(t, "UPDATE outbox_notifications SET lease_token = gen_random_uuid() WHERE booking_id = 2")
		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "SELECT FROM outbox_notifications WHERE booking_id = 3 FOR UPDATE")
		require.NoError(t, err)
		leases := []outbox.Lease{cs[3].Lease, cs[2].Lease, cs[1].Lease, cs[0].Lease}
		res, err := db.Store.Extend(t.Context(), leases, time.Hour)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone, outbox.LeaseHeld, outbox.LeaseStale, outbox.LeaseDone}, res)
		require.NoError(t, tx.Rollback(t.Context()))
		require.Equal(t, []string{"1", "4"}, strings.Split(pgtest.One[string](t, db, `SELECT string_agg(booking_id::text, ',' ORDER BY id)
			FROM outbox_notifications WHERE lease_until > clock_timestamp() + interval '50 minutes'`), ","))
	})
	t.Run("takes_up_a_lease_that_ended_and_that_nobody_has_taken", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		c := claimOne(t, db)
		endLeases(t, db)
		db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1}) // clears what is left of the lease
		res, err := db.Store.Extend(t.Context(), []outbox.Lease{c.Lease}, time.Hour)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, res)
		require.Empty(t, claim(t, db, outbox.ClaimOptions{}).Claimed)
		require.NotZero(t, db.Get(t, booking(1)).LockedAt)
		require.True(t, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1}).InFlight)
	})
	t.Run("refuses_no_time", func(t *testing.T) {
		t.Parallel()
		_, err := neverUsed(t).Extend(t.Context(), []outbox.Lease{{}}, 0)
		requireInvalid(t, err, "d", -1, "")
	})
}

// TestDeliveryTakesNoTimes: the database's clock decides, so durations are all that
// it is told.
func TestDeliveryTakesNoTimes(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	addRows(t, db, 1)
	var seen argTypes
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &seen })
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
	require.NoError(t, err)
	res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute, InTurn: true, Since: time.Unix(0, 0)})
	require.NoError(t, err)
	_, err = store.Extend(t.Context(), []outbox.Lease{res.Claimed[0].Lease}, time.Minute)
	require.NoError(t, err)
	_, err = store.Settle(t.Context(), []outbox.Settlement{{Lease: res.Claimed[0].Lease, Verdict: outbox.Retry, RetryIn: time.Minute}})
	require.NoError(t, err)
	require.NotEmpty(t, seen.types)
	for _, typ := range seen.types {
		require.NotContains(t, strings.ToLower(typ), "time")
		require.NotContains(t, strings.ToLower(typ), "date")
	}
}

// argTypes is a tracer that keeps the types of all arguments.
type argTypes struct{ types []string }

func (a *argTypes) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	for _, arg := range data.Args {
		a.types = append(a.types, fmt.Sprintf("%T", arg))
	}
	return ctx
}

func (a *argTypes) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (a *argTypes) TraceBatchStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	for _, q := range data.Batch.QueuedQueries {
		a.TraceQueryStart(ctx, nil, pgx.TraceQueryStartData{SQL: q.SQL, Args: q.Arguments})
	}
	return ctx
}

func (a *argTypes) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (a *argTypes) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

// TestClaimPlan shows that what a claim reads does not grow with the rows that were
// sent nor with those that are due later, a million of each, in plans for given
// values and in the generic plan; nor do extending and settling.
func TestClaimPlan(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	db.Fill(t, `INSERT INTO outbox_notifications (type, booking_id, status, next_retry_at, created_at)
		SELECT 'reject', i, CASE WHEN i <= 1000000 THEN 'sent' ELSE 'pending' END,
			CASE WHEN i > 1000000 AND i <= 2000000 THEN now() + interval '1 day' END, now() - interval '1 hour'
		FROM generate_series(1, 2000300) i`)

	type node struct {
		planNode
		Hits int `json:"Shared Hit Blocks"`
		Read int `json:"Shared Read Blocks"`
	}
	explain := func(t *testing.T, tx pgx.Tx, sql string) node {
		var doc []struct{ Plan node }
		require.NoError(t, json.Unmarshal(pgtest.One[json.RawMessage](t, tx, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+sql), &doc))
		return doc[0].Plan
	}
	for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
		for _, types := range []string{"NULL", "ARRAY['reject']"} {
			t.Run(mode+"/"+types, func(t *testing.T) {
				tx := db.MustBegin(t)
				_, err := tx.Exec(t.Context(), "SET LOCAL plan_cache_mode = "+mode)
				require.NoError(t, err)
				for name, sql := range map[string]string{"claim": db.Store.ClaimSQL(), "extend": db.Store.ExtendSQL(), "settle": db.Store.SettleSQL()} {
					_, err := tx.Exec(t.Context(), "PREPARE "+name+" AS "+sql)
					require.NoError(t, err)
				}
				const token = "'00000000-0000-0000-0000-000000000002', '00000000-0000-0000-0000-000000000003'"
				plan := explain(t, tx, "EXECUTE claim (100, "+token+", 1000000000, "+types+", 10, false, false, NULL, 2, '00000000-0000-0000-0000-000000000005', true, 'a', (extract(epoch FROM now()) * 1000000)::bigint - 7200000000, false)")
				scans := plan.scans()
				require.Len(t, scans, 2, "%+v", scans)
				for _, s := range scans {
					switch s.Type {
					case "Index Scan":
						require.Equal(t, "outbox_notifications_due", s.Index)
						require.Contains(t, s.IndexCond, "<= now()")
						require.Contains(t, s.IndexCond, ">= ")
					default:
						require.Equal(t, "Tid Scan", s.Type)
					}
				}
				require.Less(t, plan.Hits+plan.Read, 6_000, "pages read for 100 rows of 2,000,300")
				require.Equal(t, 100, pgtest.One[int](t, tx, "SELECT count(*) FROM outbox_notifications WHERE lease_token IS NOT NULL AND status = 'pending'"))

				var ids string
				require.NoError(t, tx.QueryRow(t.Context(), "SELECT array_agg(id)::text FROM outbox_notifications WHERE status = 'pending' AND lease_token IS NOT NULL").Scan(&ids))
				given := "'" + ids + "', array_fill('00000000-0000-0000-0000-000000000002'::uuid, ARRAY[100])"
				for _, sql := range []string{
					"EXECUTE extend (" + given + ", 1000000)",
					"EXECUTE settle (" + given + `, array_fill('delivered'::text, ARRAY[100]), array_fill('m'::text, ARRAY[100]),
						array_fill(NULL::text, ARRAY[100]), array_fill(0::bigint, ARRAY[100]), array_fill(false, ARRAY[100]), array_fill(false, ARRAY[100]))`,
				} {
					plan := explain(t, tx, sql)
					for _, s := range plan.scans() {
						require.True(t, s.Type == "Tid Scan" || strings.HasPrefix(s.Type, "Index") && s.Index == "outbox_notifications_pkey" ||
							strings.Contains(s.Type, "Bitmap"), "%+v", s)
					}
					require.Less(t, plan.Hits+plan.Read, 6_000, "pages read for 100 rows of 2,000,300")
				}
				require.Equal(t, 100, pgtest.One[int](t, tx, "SELECT count(*) FROM outbox_notifications WHERE receipt = 'm'"))
				_, err = tx.Exec(t.Context(), "DEALLOCATE claim; DEALLOCATE extend; DEALLOCATE settle")
				require.NoError(t, err)
				require.NoError(t, tx.Rollback(t.Context()))
			})
		}
	}
}

// TestSettlePlan shows that the rows to settle and to extend are found by their id, also
// with statistics from when nothing was pending, as is usual: by those the index of the
// pending rows is empty, and the cheapest to be looked through for each id.
func TestSettlePlan(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	db.MustExec(t, "INSERT INTO outbox_notifications (type, booking_id, status) SELECT 'reject', i, 'sent' FROM generate_series(1, 20000) i")
	db.MustExec(t, "VACUUM ANALYZE outbox_notifications")
	for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
		t.Run(mode, func(t *testing.T) {
			tx := db.MustBegin(t)
			for _, sql := range []string{"SET LOCAL plan_cache_mode = " + mode, "PREPARE extend AS " + db.Store.ExtendSQL(), "PREPARE settle AS " + db.Store.SettleSQL()} {
				_, err := tx.Exec(t.Context(), sql)
				require.NoError(t, err)
			}
			const given = "array_fill(1::bigint, ARRAY[1000]), array_fill('00000000-0000-0000-0000-000000000002'::uuid, ARRAY[1000])"
			for _, sql := range []string{"EXECUTE extend (" + given + ", 1000000)",
				"EXECUTE settle (" + given + ", array_fill('delivered'::text, ARRAY[1000]), NULL, NULL, NULL, NULL, NULL)"} {
				var doc []struct{ Plan planNode }
				require.NoError(t, json.Unmarshal(pgtest.One[json.RawMessage](t, tx, "EXPLAIN (FORMAT JSON) "+sql), &doc))
				scans := doc[0].Plan.scans()
				require.NotEmpty(t, scans)
				for _, s := range scans {
					require.NotEqual(t, "outbox_notifications_due", s.Index)
				}
			}
			_, err := tx.Exec(t.Context(), "DEALLOCATE extend; DEALLOCATE settle")
			require.NoError(t, err)
			require.NoError(t, tx.Rollback(t.Context()))
		})
	}
}

// TestPlansOfDeliveryLast shows that statements prepared while the table is nearly empty
// go on to use its indexes, also before the next ANALYZE.
//
// Mutations: no enable_seqscan, no force_generic_plan in byIndexSQL.
func TestPlansOfDeliveryLast(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	db.MustExec(t, "ALTER TABLE outbox_notifications SET (autovacuum_enabled = off)")
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.MaxConns = 1 })
	store, err := outbox.NewPGStore(pool, outbox.Config{})
	require.NoError(t, err)
	deliver := func(want int) {
		res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 10, Lease: time.Minute})
		require.NoError(t, err)
		require.Len(t, res.Claimed, want)
		var leases []outbox.Lease
		var settlements []outbox.Settlement
		for _, c := range res.Claimed {
			leases, settlements = append(leases, c.Lease), append(settlements, outbox.Settlement{Lease: c.Lease, Verdict: outbox.Delivered})
		}
		_, err = store.Extend(t.Context(), leases, time.Minute)
		require.NoError(t, err)
		_, err = store.Settle(t.Context(), settlements)
		require.NoError(t, err)
	}
	// scanned is how often the whole table was read.
	scanned := func() int64 {
		pgtest.One[string](t, pool, "SELECT pg_stat_force_next_flush()::text")
		return pgtest.One[int64](t, pool, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'outbox_notifications'")
	}
	for i := range 10 {
		db.Add(t, outbox.NewNotification{Type: "a", BookingID: int64(i + 1)})
		deliver(1)
	}
	db.MustExec(t, "INSERT INTO outbox_notifications (type, booking_id) SELECT 'b', i FROM generate_series(1, 50000) i")
	before := scanned()
	for range 5 {
		deliver(10)
	}
	require.Equal(t, before, scanned())
	require.Zero(t, pgtest.One[int64](t, pool, "SELECT coalesce(sum(custom_plans), 0)::bigint FROM pg_prepared_statements WHERE statement LIKE '%MATERIALIZED%'"))
}

// TestDeliveryLeavesNoTrace shows that the settings and the lock of a claim and a settle
// end with their transaction, also if that fails.
func TestDeliveryLeavesNoTrace(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe,
		pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.DefaultQueryExecMode, cfg.MaxConns = mode, 1
			})
			store, err := outbox.NewPGStore(pool, outbox.Config{})
			require.NoError(t, err)
			state := func(q interface {
				QueryRow(context.Context, string, ...any) pgx.Row
			}) string {
				return pgtest.One[string](t, q, `SELECT concat_ws(' ', current_setting('plan_cache_mode'), current_setting('enable_seqscan'),
					current_setting('enable_bitmapscan'), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()))`)
			}
			before := state(pool)
			db.Add(t, outbox.NewNotification{Type: "a"})
			db.MustExec(t, `CREATE TABLE seen (state text);
				CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
					INSERT INTO seen VALUES (concat_ws(' ', current_setting('plan_cache_mode'), current_setting('enable_seqscan'))); RETURN NEW; END $$;
				CREATE TRIGGER see BEFORE UPDATE ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION see()`)
			res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute, InTurn: true})
			require.NoError(t, err)
			require.Len(t, res.Claimed, 1)
			require.Equal(t, before, state(pool))
			_, err = store.Settle(t.Context(), []outbox.Settlement{{Lease: res.Claimed[0].Lease, Verdict: outbox.Delivered}})
			require.NoError(t, err)
			require.Equal(t, before, state(pool))
			require.Equal(t, "force_generic_plan off|force_generic_plan off", pgtest.One[string](t, db, "SELECT string_agg(state, '|') FROM seen"))

			db.MustExec(t, "ALTER TABLE outbox_notifications RENAME receipt TO gone")
			_, err = store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute, InTurn: true})
			require.Error(t, err)
			require.Equal(t, before, state(pool))
		})
	}
}
