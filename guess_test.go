package outbox_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// guessing has the stores of the databases that newDB makes always guess the same, 0 being
// no guess.
func guessing(newDB func(testing.TB) *pgtest.DB, guess int) func(testing.TB) *pgtest.DB {
	return func(t testing.TB) *pgtest.DB {
		db := newDB(t)
		if guess > 0 {
			db.Store.AlwaysGuess(guess)
		}
		return db
	}
}

var guesses = []string{"none", "created", "refreshed", "existing"}

// TestGuess: an add that begins with a guess does what one without does.
//
// Mutations that turn it red:
//
//	no status = 'pending' in updateSQL          makes_no_difference/refreshed, rivals/refreshed
//	no status <> 'pending' in lookupSQL         makes_no_difference/existing, isolation/existing
//	true for payload changed in updateSQL       makes_no_difference/refreshed
//	no lease_token IS NULL in updateSQL         makes_no_difference/refreshed, add/refreshed
//	version in updateSQL                        makes_no_difference/refreshed, rivals/refreshed
//	no FOR UPDATE in lookupSQL                  rivals/existing
//	no look in insertSQL, newManySQL            of_a_new_key_minds_neither_triggers_nor_constraints...
//	no ON CONFLICT in insertSQL                 rivals/created
//	a run not ended by a wrong guess            costs_a_second_round_trip_in_seventeen_at_most
//	'refreshed' for 'unchanged' in addSQL       costs_a_second_round_trip_in_seventeen_at_most
//	guessAfter 3, or never a guess              costs_a_second_round_trip_in_seventeen_at_most
func TestGuess(t *testing.T) {
	t.Parallel()
	require.Len(t, guesses, outbox.Guesses)
	for guess := 1; guess < outbox.Guesses; guess++ {
		t.Run("add/"+guesses[guess], func(t *testing.T) {
			t.Parallel()
			testAddNotification(t, guess)
		})
		t.Run("rivals/"+guesses[guess], func(t *testing.T) {
			t.Parallel()
			testRivals(t, guess)
		})
		t.Run("isolation/"+guesses[guess], func(t *testing.T) {
			t.Parallel()
			testIsolation(t, guess)
		})
		t.Run("makes_no_difference/"+guesses[guess], func(t *testing.T) {
			t.Parallel()
			testGuessMakesNoDifference(t, guess)
		})
	}

	// An INSERT that ends in a conflict would mind both.
	t.Run("of_a_new_key_minds_neither_triggers_nor_constraints_when_wrong", func(t *testing.T) {
		t.Parallel()
		db := guessing(pgtest.NewDB, 1)(t)
		n := outbox.NewNotification{Type: "a", BookingID: 1, Payload: 1}
		db.Add(t, n)
		db.MustExec(t, `ALTER TABLE outbox_notifications ADD CHECK (payload_json IS NOT NULL);
			CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'closed'; END $$;
			CREATE TRIGGER refuse BEFORE INSERT ON outbox_notifications FOR EACH ROW EXECUTE FUNCTION refuse()`)
		n.Payload, n.RecruiterTgID = nil, 5
		require.EqualValues(t, 2, db.Add(t, n).Notification.Version)
		n.RecruiterTgID = 6
		require.EqualValues(t, 3, db.AddMany(t, n)[0].Notification.Version)
	})

	t.Run("add many/created", func(t *testing.T) {
		t.Parallel()
		testAddNotifications(t, 1)
	})

	t.Run("costs_a_second_round_trip_in_seventeen_at_most", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		var log statementLog
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = &log })
		booking := int64(0)
		// add returns how many statements it took to end with want.
		add := func(want outbox.Outcome, n outbox.NewNotification) int {
			n.Type, n.BookingID, n.CandidateTgID = "a", booking, 1
			tx := pgtest.Begin(t, pool, pgx.TxOptions{})
			log.reset()
			res, err := db.Store.AddNotification(t.Context(), tx, n)
			took := len(log.all())
			require.NoError(t, err)
			require.Equal(t, want, res.Outcome)
			require.NoError(t, tx.Commit(t.Context()))
			return took
		}
		created := func() int { booking++; return add(outbox.OutcomeCreated, outbox.NewNotification{}) }
		changes := 0
		changed := func() int { changes++; return add(outbox.OutcomeRefreshed, outbox.NewNotification{Payload: changes}) }
		recruited := func() int {
			changes++
			return add(outbox.OutcomeRefreshed, outbox.NewNotification{RecruiterTgID: int64(changes)})
		}
		unchanged := func() int { return add(outbox.OutcomeRefreshed, outbox.NewNotification{}) }
		existing := func() int { return add(outbox.OutcomeExisting, outbox.NewNotification{}) }
		run := func(n int, fn func() int) (statements int) {
			for range n {
				statements += fn()
			}
			return statements
		}

		require.Equal(t, 100, run(100, created))
		require.Equal(t, 2, changed()) // the guess was that it is new
		require.Equal(t, 100, run(100, changed))
		require.Equal(t, 2, unchanged()) // nothing to write
		require.Equal(t, 100, run(100, unchanged))
		require.Equal(t, 100, run(100, changed))
		require.Equal(t, 2, recruited()) // not the payload
		require.Equal(t, 15, run(15, recruited))
		require.Equal(t, 2, recruited())
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		require.Equal(t, 100, run(100, existing))
		require.Equal(t, 2, created())
		require.Equal(t, 1, changed())
		for range 10 { // no run, no guess
			require.Equal(t, 15, run(15, created))
			require.Equal(t, 1, changed())
		}
		for range 10 { // the worst
			require.Equal(t, 16, run(16, created))
			require.Equal(t, 2, changed())
		}
	})
}

// testGuessMakesNoDifference adds to two rows in the same state, to the one with the
// guess and to the other without, and compares the results and the rows.
func testGuessMakesNoDifference(t *testing.T, guess int) {
	db, pinned := pgtest.NewDB(t), guessing(pgtest.NewDB, guess)(t)
	pinned.Pool = db.Pool
	const given = `recruiter_tg_id = 5, payload_json = '{"a": 1}', correlation_id = 'c', `
	states := map[string]string{
		"absent":             "",
		"pending":            given + "attempts = 0",
		"bare":               "attempts = 0",
		"attempted":          given + "attempts = 3, last_error = 'e', next_retry_at = '2100-01-01'",
		"locked without":     given + "locked_at = now()",
		"leased":             given + "attempts = 1, locked_at = '2026-01-01', lease_until = '2100-01-01', lease_token = gen_random_uuid(), lease_version = 1",
		"lease ended":        given + "attempts = 1, locked_at = '2026-01-01', lease_until = '2026-01-02', lease_token = gen_random_uuid(), lease_version = 1",
		"unknown":            given + "attempts = 1, lease_token = gen_random_uuid(), lease_version = 1",
		"expires":            given + "not_after = '2100-01-01'",
		"sent before":        given + "version = 2, sent_version = 1, receipt = 'r'",
		"jsonb refuses it":   `payload_json = '"\u0000"'`,
		"sent":               given + "status = 'sent', sent_at = now()",
		"failed":             given + "status = 'failed', last_error = 'e'",
		"somebody's status":  given + "status = 'SENT'",
		"spelled otherwise":  `payload_json = '{ "a" : 1.0 }'`,
		"of another version": given + "version = 9",
	}
	adds := map[string]outbox.NewNotification{
		"bare":        {},
		"same":        {RecruiterTgID: 5, Payload: json.RawMessage(`{"a": 1}`), CorrelationID: "c"},
		"payload":     {Payload: json.RawMessage(`{"a":2}`)},
		"all":         {RecruiterTgID: 6, Payload: json.RawMessage(`{"a":2}`), CorrelationID: "d", NotBefore: time.Date(2101, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2102, 1, 1, 0, 0, 0, 0, time.UTC)},
		"recruiter":   {RecruiterTgID: 6},
		"correlation": {CorrelationID: "d"},
		"not before":  {NotBefore: time.Date(2101, 1, 1, 0, 0, 0, 0, time.UTC)},
		"not after":   {NotAfter: time.Date(2101, 1, 1, 0, 0, 0, 0, time.UTC)},
	}
	for shape, key := range []outbox.Key{{BookingID: 1, CandidateTgID: 2}, {BookingID: 1}, {CandidateTgID: 2}, {}} {
		for state, set := range states {
			for kind, n := range adds {
				name := fmt.Sprintf("%s, %s, shape %d", state, kind, shape)
				n.BookingID, n.CandidateTgID = key.BookingID, key.CandidateTgID
				add := func(db *pgtest.DB, typ string) (outbox.AddResult, string) {
					n.Type = typ + fmt.Sprint(shape) + strings.ReplaceAll(state+kind, " ", "")
					if set != "" {
						db.MustExec(t, "INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id) VALUES ($1, nullif($2::bigint, 0), nullif($3::bigint, 0))",
							n.Type, n.BookingID, n.CandidateTgID)
						db.MustExec(t, "UPDATE outbox_notifications SET "+set+" WHERE type = $1", n.Type)
					}
					res, err := db.TryAdd(t.Context(), n)
					require.NoError(t, err, name)
					row := pgtest.One[string](t, db, `SELECT to_jsonb(r) FROM (SELECT booking_id, candidate_tg_id, recruiter_tg_id,
						payload_json::text, correlation_id, status, attempts, version, sent_version, receipt, last_error, next_retry_at,
						not_after, lease_until, lease_version, lease_token IS NULL AS token, locked_at IS NULL AS locked
						FROM outbox_notifications WHERE type = $1) AS r`, n.Type)
					res.Notification.ID, res.Notification.Type, res.Notification.CreatedAt, res.Notification.SentAt = 0, "", time.Time{}, time.Time{}
					if !res.Notification.LockedAt.IsZero() {
						res.Notification.LockedAt = time.Unix(0, 0)
					}
					return res, row
				}
				want, wantRow := add(db, "w")
				got, gotRow := add(pinned, "g")
				require.Equal(t, want, got, name)
				require.JSONEq(t, wantRow, gotRow, name)
			}
		}
	}
}
