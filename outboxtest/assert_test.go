package outboxtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

func begin(t testing.TB, pool *pgxpool.Pool) pgx.Tx {
	t.Helper()
	tx, err := pool.Begin(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

func addIn(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx, n outbox.NewNotification) outbox.AddResult {
	t.Helper()
	res, err := NewStore(t, pool).AddNotification(t.Context(), tx, n)
	require.NoError(t, err)
	return res
}

var (
	reject    = outbox.NewNotification{Type: "reject", BookingID: 7, CandidateTgID: 42, RecruiterTgID: 9, Payload: map[string]any{"slot": "10:00", "n": 1}, CorrelationID: "c1"}
	changed   = outbox.NewNotification{Type: "reject", BookingID: 7, CandidateTgID: 42, Payload: map[string]any{"slot": "10:30", "n": 1}}
	rejectKey = reject.Key()
)

// traced is a wrapper that tells nothing of what it wraps.
type traced struct{ q Querier }

func (w traced) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return w.q.Query(ctx, sql, args...)
}

// Each case is about the transaction that do runs in.
func TestRequireAdded_is_about_this_transaction(t *testing.T) {
	t.Parallel()
	nothing := func(testing.TB, *pgxpool.Pool, pgx.Tx) {}
	committed := func(t testing.TB, pool *pgxpool.Pool) { add(t, pool, reject) }
	sent := func(t testing.TB, pool *pgxpool.Pool) {
		add(t, pool, reject)
		require.Len(t, Deliver(t, NewStore(t, pool), new(Sender)).Sent, 1)
	}
	for name, c := range map[string]struct {
		before  func(testing.TB, *pgxpool.Pool)
		do      func(testing.TB, *pgxpool.Pool, pgx.Tx)
		added   bool
		message string
	}{
		"created": {do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) { addIn(t, pool, tx, reject) }, added: true},
		"created_in_a_savepoint": {do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) {
			require.NoError(t, pgx.BeginFunc(t.Context(), tx, func(tx pgx.Tx) error {
				addIn(t, pool, tx, reject)
				return nil
			}))
		}, added: true},
		"created_in_a_savepoint_that_was_rolled_back": {do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) {
			_ = pgx.BeginFunc(t.Context(), tx, func(tx pgx.Tx) error {
				addIn(t, pool, tx, reject)
				return errors.New("no")
			})
		}, message: "The outbox is empty."},
		"refreshed":               {before: committed, do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) { addIn(t, pool, tx, changed) }, added: true},
		"nothing":                 {do: nothing, message: "The outbox is empty."},
		"nothing_and_it_is_there": {before: committed, do: nothing, message: "It was there before, and is untouched:\n  \"reject\" booking 7 candidate 42: pending, version 1, payload {"},
		"something_else": {before: committed, do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) {
			addIn(t, pool, tx, outbox.NewNotification{Type: "x"})
		}, message: "is untouched"},
		"added_again_without_a_change": {before: committed, do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) { addIn(t, pool, tx, reject) }, message: "if it was added again, that changed nothing"},
		"added_again_after_it_was_sent": {before: sent, do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) {
			require.Equal(t, outbox.OutcomeExisting, addIn(t, pool, tx, changed).Outcome)
		}, message: "an add leaves it alone, being sent:\n  \"reject\" booking 7 candidate 42: sent"},
		"added_by_another_meanwhile": {do: func(t testing.TB, pool *pgxpool.Pool, tx pgx.Tx) {
			addIn(t, pool, tx, outbox.NewNotification{Type: "x"})
			add(t, pool, reject)
		}, message: "is untouched"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := NewPool(t)
			if c.before != nil {
				c.before(t, pool)
			}
			tx := begin(t, pool)
			c.do(t, pool, tx)
			added := told(t, func(f testing.TB) { RequireAdded(f, tx, rejectKey) })
			notAdded := told(t, func(f testing.TB) { RequireNotAdded(f, tx, rejectKey) })
			for _, q := range []Querier{tx.Conn(), traced{tx}} {
				require.Equal(t, added, told(t, func(f testing.TB) { RequireAdded(f, q, rejectKey) }), "%T tells that it is in a transaction", q)
				require.Equal(t, notAdded, told(t, func(f testing.TB) { RequireNotAdded(f, q, rejectKey) }), "%T", q)
			}
			if c.added {
				require.Empty(t, added)
				require.Contains(t, notAdded, `a notification "reject" booking 7 candidate 42 was added in this transaction.`)
			} else {
				require.Contains(t, added, `no notification "reject" booking 7 candidate 42 was added in this transaction.`)
				require.Contains(t, added, c.message)
				require.Empty(t, notAdded)
			}

			// To everybody else it is there when it is committed.
			there := c.before != nil || name == "added_by_another_meanwhile"
			require.Equal(t, there, told(t, func(f testing.TB) { RequireAdded(f, pool, rejectKey) }) == "")
			require.Equal(t, !there, told(t, func(f testing.TB) { RequireNotAdded(f, pool, rejectKey) }) == "")
			require.Equal(t, there, told(t, func(f testing.TB) { RequireAdded(f, traced{pool}, rejectKey) }) == "")
			require.NoError(t, tx.Commit(t.Context()))
			there = there || c.added
			require.Equal(t, there, told(t, func(f testing.TB) { RequireAdded(f, pool, rejectKey) }) == "")
			require.Equal(t, !there, told(t, func(f testing.TB) { RequireNotAdded(f, pool, rejectKey) }) == "")
			require.Contains(t, told(t, func(f testing.TB) { RequireAdded(f, tx, rejectKey) }), "give the pool")
		})
	}
}

func TestRequireAdded_compares(t *testing.T) {
	t.Parallel()
	pool := NewPool(t)
	soon := time.Now().Add(time.Hour)
	full := reject
	full.NotBefore, full.NotAfter = soon, soon.Add(time.Hour)
	add(t, pool, full)
	n := RequireAdded(t, pool, rejectKey, Want{
		Payload: json.RawMessage(`{"n": 1.0, "slot":"10:00"}`), RecruiterTgID: 9, CorrelationID: "c1",
		NotBefore: soon, NotAfter: soon.Add(time.Hour), Version: 1, Status: outbox.StatusPending,
	})
	require.Equal(t, rejectKey, n.Key())
	require.EqualValues(t, 9, n.RecruiterTgID)
	want, err := NewStore(t, pool).Get(t.Context(), rejectKey)
	require.NoError(t, err)
	require.Equal(t, want, n, "the same as Get")
	add(t, pool, outbox.NewNotification{Type: "bare"})
	RequireAdded(t, pool, outbox.Key{Type: "bare"}, Want{Payload: json.RawMessage("null")})

	for name, c := range map[string]struct {
		want    Want
		message string
	}{
		"Payload": {Want{Payload: map[string]any{"slot": "10:30", "n": 1, "to": "Ann"}}, `  Payload (- expected, + there):
      {
        "n": 1,
    -   "slot": "10:30",
    -   "to": "Ann"
    +   "slot": "10:00"
      }`},
		"Payload_none":  {Want{Payload: json.RawMessage("{}")}, "    + {"},
		"RecruiterTgID": {Want{RecruiterTgID: 8}, "RecruiterTgID is 9, not 8"},
		"CorrelationID": {Want{CorrelationID: "c2"}, `CorrelationID is "c1", not "c2"`},
		"NotBefore":     {Want{NotBefore: soon.Add(time.Second)}, "NotBefore is " + soon.UTC().Truncate(time.Microsecond).String()},
		"NotAfter":      {Want{NotAfter: soon}, "NotAfter is "},
		"Version":       {Want{Version: 2}, "Version is 1, not 2"},
		"Status":        {Want{Status: outbox.StatusSent}, "Status is pending, not sent"},
	} {
		require.Contains(t, told(t, func(f testing.TB) { RequireAdded(f, pool, rejectKey, c.want) }), c.message, name)
	}
	all := told(t, func(f testing.TB) { RequireAdded(f, pool, rejectKey, Want{Version: 2, RecruiterTgID: 8}) })
	require.Contains(t, all, "RecruiterTgID is 9, not 8\n  Version is 1, not 2")
}

func TestRequireAdded_tells_what_is_there(t *testing.T) {
	t.Parallel()
	pool := NewPool(t)
	add(t, pool, outbox.NewNotification{Type: "far"})
	require.Contains(t, told(t, func(f testing.TB) { RequireAdded(f, pool, rejectKey) }), "of other keys, the newest first:\n  \"far\": pending, version 1")
	tx := begin(t, pool)
	addIn(t, pool, tx, outbox.NewNotification{Type: "confirm", BookingID: 7})
	text := told(t, func(f testing.TB) { RequireAdded(f, tx, rejectKey) })
	require.Contains(t, text, "\"confirm\" booking 7: pending, version 1, added in this transaction")
	require.NotContains(t, text, "far")
	for i := range int64(2 * shown) {
		addIn(t, pool, tx, outbox.NewNotification{Type: "reject", BookingID: 100 + i, Payload: strings.Repeat("long ", 1000)})
	}
	text = told(t, func(f testing.TB) { RequireAdded(f, tx, rejectKey) })
	require.Equal(t, shown, strings.Count(text, ": pending"))
	require.Contains(t, text, "and more")
	require.Less(t, len(text), 5000)

	_, err := tx.Exec(t.Context(), "SELECT 1/0")
	require.Error(t, err)
	require.Contains(t, told(t, func(f testing.TB) { RequireNotAdded(f, tx, rejectKey) }), "aborted the transaction")
}

// The assertions of a service that is configured with a schema of its own, which NewPool
// knows nothing of.
func TestRequireAdded_looks_into_every_schema(t *testing.T) {
	t.Parallel()
	const booking = `a "schema"`
	pool := NewPool(t)
	store, err := outbox.NewPGStore(pool, outbox.Config{Schema: booking, Logger: logger(t)})
	require.NoError(t, err)
	require.NoError(t, store.Migrate(t.Context()))
	exec := func(q interface {
		Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	}, sql string) {
		t.Helper()
		_, err := q.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	required := func(q Querier) string {
		return told(t, func(f testing.TB) { RequireAdded(f, q, rejectKey) })
	}
	refused := func(q Querier) string {
		return told(t, func(f testing.TB) { RequireNotAdded(f, q, rejectKey) })
	}

	tx := begin(t, pool)
	require.Contains(t, required(tx), "Looked into \"a \"\"schema\"\"\".outbox_notifications, public.outbox_notifications.\nThe outbox is empty.")
	_, err = store.AddNotification(t.Context(), tx, reject)
	require.NoError(t, err)
	require.Contains(t, refused(tx), `version 1, payload {"n":1,"slot":"10:00"}, in "a ""schema""".outbox_notifications`)
	for _, path := range []string{"public", "pg_catalog", `"a ""schema"""`} {
		exec(tx, "SET LOCAL search_path = "+path)
		require.Empty(t, required(tx), path)
		require.NotEmpty(t, refused(tx), path)
	}
	require.Empty(t, required(InSchema(booking, tx)))
	require.NotEmpty(t, refused(InSchema(booking, traced{tx})))
	require.Empty(t, refused(InSchema("public", tx)))
	require.Contains(t, required(InSchema("public", tx)), "The outbox is empty.")
	require.Contains(t, required(InSchema("none", tx)), `there is no table outbox_notifications in schema "none"`)
	require.Contains(t, required(InSchema("", tx)), "InSchema: no schema is named")
	require.Contains(t, refused(InSchema("a\x00", tx)), `InSchema: the schema "a\x00" has a NUL byte`)
	require.Contains(t, refused(InSchema("public", nil)), "is nil")

	addIn(t, pool, tx, changed) // to the other one
	text := required(tx)
	require.Contains(t, text, "2 notifications \"reject\" booking 7 candidate 42 were added in this transaction. Say which is meant by InSchema:\n")
	require.Contains(t, text, `"slot":"10:30"}, in public.outbox_notifications`)
	require.Equal(t, 2, strings.Count(refused(tx), ", in "))
	RequireAdded(t, InSchema("public", tx), rejectKey, Want{Payload: changed.Payload})
	RequireAdded(t, InSchema(booking, tx), rejectKey, Want{Payload: reject.Payload})
	require.NoError(t, tx.Commit(t.Context()))

	// What cannot be read is no outbox of this role's, and must not abort its transaction.
	role := fmt.Sprintf("outboxtest_reader_%d", time.Now().UnixNano())
	exec(pool, "CREATE ROLE "+role)
	t.Cleanup(func() {
		_, err := pool.Exec(context.Background(), "DROP OWNED BY "+role+"; DROP ROLE "+role)
		require.NoError(t, err)
	})
	exec(pool, "GRANT SELECT ON public.outbox_notifications TO "+role)
	exec(pool, "CREATE SCHEMA python; CREATE TABLE python.outbox_notifications (id int, type text)")
	tx = begin(t, pool)
	exec(tx, "CREATE TEMPORARY TABLE outbox_notifications (LIKE public.outbox_notifications) ON COMMIT DROP")
	exec(tx, "SET LOCAL ROLE "+role)
	require.Contains(t, required(tx), "is untouched")
	require.Contains(t, required(InSchema(booking, tx)), `there is only "a ""schema""".outbox_notifications, which the role may not read`)
	exec(tx, "RESET ROLE")
	require.Contains(t, required(InSchema("python", tx)), "there is only python.outbox_notifications, which is not migrated")
	exec(tx, `DROP TABLE public.outbox_notifications, "a ""schema""".outbox_notifications, python.outbox_notifications`)
	require.Contains(t, required(tx), "there is no table outbox_notifications")
	exec(tx, "SELECT 1")
}

func TestDiff_is_short(t *testing.T) {
	t.Parallel()
	lines := func(n int, mark string) (lines []string) {
		for i := range n {
			lines = append(lines, fmt.Sprintf("%s%d", mark, i))
		}
		return lines
	}
	a, b := lines(100_000, ""), lines(100_000, "")
	b[50_000] = "other"
	require.Equal(t, `    … 49997 equal lines
      49997
      49998
      49999
    - 50000
    + other
      50001
      50002
      50003
    … 49996 equal lines
`, diff(a, b))
	require.Equal(t, "    - 0\n    + x0\n    … 99999 lines expected and 99999 there are not compared\n", diff(a, lines(100_000, "x")))
	text := diff(lines(900, ""), lines(900, "x"))
	require.Equal(t, diffLines+1, strings.Count(text, "\n"))
	require.Contains(t, text, "… 1700 more lines")
}

func TestArguments_are_named_where_they_are_wrong(t *testing.T) {
	t.Parallel()
	pool := NewPool(t)
	var noPool *pgxpool.Pool
	var noStore *outbox.PGStore
	released, err := pool.Acquire(t.Context())
	require.NoError(t, err)
	released.Release()
	store := NewStore(t, pool)
	for name, c := range map[string]struct {
		call    func(t testing.TB)
		message string
	}{
		"RequireAdded_nil":       {func(t testing.TB) { RequireAdded(t, nil, rejectKey) }, "q, the transaction or pool to look through, is nil"},
		"RequireAdded_nil_pool":  {func(t testing.TB) { RequireAdded(t, noPool, rejectKey) }, "is nil (*pgxpool.Pool)"},
		"RequireNotAdded_nil":    {func(t testing.TB) { RequireNotAdded(t, noPool, rejectKey) }, "is nil (*pgxpool.Pool)"},
		"Deliver_nil_store":      {func(t testing.TB) { Deliver(t, nil, new(Sender)) }, "store is nil"},
		"Deliver_nil_PGStore":    {func(t testing.TB) { Deliver(t, noStore, new(Sender)) }, "store is nil"},
		"Deliver_nil_sender":     {func(t testing.TB) { Deliver(t, store, nil) }, "sender is nil"},
		"Torture_Duration":       {func(t testing.TB) { Torture(t, new(Sender), TortureConfig{Duration: -1}) }, "Torture: Duration -1ns is negative"},
		"Torture_SendTimeout":    {func(t testing.TB) { Torture(t, new(Sender), TortureConfig{SendTimeout: time.Minute}) }, "Torture: SendTimeout 1m0s is not between 0 and 10s"},
		"Torture_SendTimeout_-1": {func(t testing.TB) { Torture(t, new(Sender), TortureConfig{SendTimeout: -1}) }, "Torture: SendTimeout -1ns is not between 0 and 10s"},
		"Torture_Delivery":       {func(t testing.TB) { Torture(t, new(Sender), TortureConfig{Delivery: 7}) }, "Torture: Delivery 7 is neither"},
		"Torture_nil_SenderFunc": {func(t testing.TB) { Torture(t, relay.SenderFunc(nil), TortureConfig{}) }, "sender is nil"},
		"RequireAdded_no_type":   {func(t testing.TB) { RequireAdded(t, pool, outbox.Key{BookingID: 7}) }, "key.Type has 0 characters"},
		"RequireNotAdded_type":   {func(t testing.TB) { RequireNotAdded(t, pool, outbox.Key{Type: strings.Repeat("ж", 51)}) }, "key.Type has 51 characters"},
		"RequireAdded_NUL":       {func(t testing.TB) { RequireAdded(t, pool, outbox.Key{Type: "a\x00"}) }, `key.Type "a\x00" has a NUL byte`},
		"RequireNotAdded_UTF-8":  {func(t testing.TB) { RequireNotAdded(t, pool, outbox.Key{Type: "\xff"}) }, `key.Type "\xff" is not valid UTF-8`},
		"RequireAdded_released":  {func(t testing.TB) { RequireAdded(t, released, rejectKey) }, "Query of q, a *pgxpool.Conn, panicked: was it released, or never made?"},
		"RequireAdded_no_Tx":     {func(t testing.TB) { RequireAdded(t, new(pgxpool.Tx), rejectKey) }, "a *pgxpool.Tx, panicked"},
		"Want_Version":           {func(t testing.TB) { RequireAdded(t, pool, rejectKey, Want{Version: -1}) }, "Want.Version: no notification ever has -1"},
		"Want_Status_of_no_row":  {func(t testing.TB) { RequireAdded(t, pool, rejectKey, Want{Status: "done"}) }, `Want.Status: no notification is ever "done"`},
	} {
		require.Contains(t, told(t, c.call), c.message, name)
	}
	var noSender *Sender
	var noT *testing.T
	for message, call := range map[string]func(){
		"outboxtest: On: answer 2 is nil":                               func() { new(Sender).On(outbox.Key{}, OK(""), nil) },
		"outboxtest: On: the Sender is nil":                             func() { noSender.On(outbox.Key{}, OK("")) },
		"outboxtest: Deaf: released is nil, which is never closed":      func() { Deaf(nil, OK("")) },
		"outboxtest: Deaf: then, what it answers when released, is nil": func() { Deaf(make(chan struct{}), nil) },
		"outboxtest: t, the test, is nil":                               func() { NewPool(noT) },
	} {
		require.PanicsWithValue(t, message, call)
	}
	for _, call := range []func(t testing.TB){
		func(t testing.TB) { NewPool(t) },
		func(t testing.TB) { NewStore(t, pool) },
		func(t testing.TB) { RequireAdded(t, pool, rejectKey) },
		func(t testing.TB) { RequireNotAdded(t, pool, rejectKey) },
		func(t testing.TB) { Deliver(t, store, new(Sender)) },
		func(t testing.TB) { Torture(t, new(Sender), TortureConfig{}) },
	} {
		require.PanicsWithValue(t, "outboxtest: t, the test, is nil", func() { call(nil) })
	}

	// A bad key costs a transaction nothing.
	tx := begin(t, pool)
	for _, typ := range []string{"", "a\x00", "\xff", strings.Repeat("x", 51)} {
		require.NotEmpty(t, told(t, func(f testing.TB) { RequireNotAdded(f, tx, outbox.Key{Type: typ}) }))
	}
	RequireNotAdded(t, tx, rejectKey)
	require.Contains(t, describe([]Call{{Ended: true}}), "accepted, no receipt")
}

func TestSender(t *testing.T) {
	t.Parallel()
	n := func(typ string, booking int64) outbox.Notification {
		return outbox.Notification{Type: typ, BookingID: booking, Version: 1}
	}
	t.Run("accepts_and_records", func(t *testing.T) {
		t.Parallel()
		var s Sender
		for i := range int64(3) {
			receipt, err := s.Send(t.Context(), n("a", i+1))
			require.NoError(t, err)
			require.NotEmpty(t, receipt)
		}
		require.Len(t, s.Sent(), 3)
		require.Equal(t, []outbox.Notification{n("a", 2)}, s.SentTo(outbox.Key{Type: "a", BookingID: 2}))
		require.Empty(t, s.SentTo(outbox.Key{Type: "a"}))
		require.Equal(t, Call{Notification: n("a", 1), Receipt: "receipt 1", Ended: true}, s.Calls()[0])
	})
	t.Run("answers_in_turn_by_the_closest_match", func(t *testing.T) {
		t.Parallel()
		var s Sender
		first, second, other := errors.New("first"), relay.Permanent(errors.New("second")), errors.New("other")
		s.On(outbox.Key{Type: "a", BookingID: 1}, Error(first), Error(second), OK("r"))
		s.On(outbox.Key{Type: "a"}, Error(other))
		s.On(outbox.Key{}, OK("any"))
		for _, want := range []error{first, second, nil, nil} {
			_, err := s.Send(t.Context(), n("a", 1))
			require.Equal(t, want, err)
		}
		_, err := s.Send(t.Context(), n("a", 2))
		require.Equal(t, other, err)
		receipt, err := s.Send(t.Context(), n("b", 1))
		require.NoError(t, err)
		require.Equal(t, "any", receipt)
		s.On(outbox.Key{}, Error(first))
		_, err = s.Send(t.Context(), n("b", 1))
		require.Equal(t, first, err)
		require.Len(t, s.Sent(), 3)
		require.Len(t, s.Calls(), 7)
	})
	t.Run("hangs_is_deaf_and_panics", func(t *testing.T) {
		t.Parallel()
		var s Sender
		release := make(chan struct{})
		s.On(outbox.Key{}, Hang(), Deaf(release, OK("late")), Panic("oh"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		for range 2 {
			go func() {
				_, err := s.Send(ctx, n("a", 1))
				done <- err
			}()
			s.AwaitCalls(t, 1)
		}
		calls := s.AwaitCalls(t, 2)
		require.False(t, calls[0].Ended)
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		close(release)
		require.NoError(t, <-done)
		require.PanicsWithValue(t, "oh", func() { _, _ = s.Send(t.Context(), n("a", 1)) })
		require.ErrorContains(t, s.Calls()[2].Err, "panic: oh")
		require.Len(t, s.AwaitSent(t, 1), 1)
	})
}

func TestDeliver(t *testing.T) {
	t.Parallel()
	pool := NewPool(t)
	store := NewStore(t, pool)
	key := func(typ string) outbox.Key { return outbox.Key{Type: typ} }
	for _, typ := range []string{"ok", "error", "permanent", "wait", "changed", "twice"} {
		add(t, pool, outbox.NewNotification{Type: typ})
	}
	add(t, pool, outbox.NewNotification{Type: "later", NotBefore: time.Now().Add(time.Hour)})
	add(t, pool, outbox.NewNotification{Type: "expired", NotAfter: time.Now().Add(-time.Hour)})
	var s Sender
	s.On(key("error"), Error(errors.New("busy")))
	s.On(key("permanent"), Error(relay.Permanent(errors.New("blocked"))))
	s.On(key("wait"), Error(relay.RetryAfter(errors.New("slow down"), time.Hour)))
	s.On(key("changed"), func(context.Context, outbox.Notification) (string, error) {
		add(t, pool, outbox.NewNotification{Type: "changed", Payload: 1})
		return "", errors.New("busy")
	}, OK("second"))
	s.On(key("twice"), func(context.Context, outbox.Notification) (string, error) {
		add(t, pool, outbox.NewNotification{Type: "twice", Payload: 1})
		return "first", nil
	}, OK("second"))

	did := Deliver(t, store, &s)
	types := func(ns []outbox.Notification) (types []string) {
		for _, n := range ns {
			types = append(types, n.Type)
		}
		return types
	}
	require.Equal(t, []string{"ok", "twice", "twice"}, types(did.Sent), "newer content goes out as well")
	require.ElementsMatch(t, []string{"permanent", "expired"}, types(did.Failed))
	require.Equal(t, []string{"error", "wait", "changed"}, types(did.Retried), "once each, the oldest first")
	require.Equal(t, "receipt 1", did.Sent[0].Receipt)
	require.Equal(t, outbox.StatusPending, did.Sent[1].Status)
	require.Equal(t, outbox.StatusSent, did.Sent[2].Status)
	require.Len(t, s.Calls(), 7)
	require.Equal(t, "busy", did.Retried[0].LastError)

	did = Deliver(t, store, &s)
	require.Equal(t, []string{"error"}, types(did.Retried), "what asked to wait waits, what fails now is due again")
	require.Equal(t, []string{"changed"}, types(did.Sent))
	for attempt := 3; attempt < 10; attempt++ {
		require.Len(t, Deliver(t, store, &s).Retried, 1)
	}
	did = Deliver(t, store, &s)
	require.Equal(t, []string{"error"}, types(did.Failed), "the tenth attempt is the last")
	require.Empty(t, Deliver(t, store, &s))

	for typ, status := range map[string]outbox.Status{"ok": outbox.StatusSent, "changed": outbox.StatusSent, "twice": outbox.StatusSent, "permanent": outbox.StatusFailed,
		"error": outbox.StatusFailed, "wait": outbox.StatusPending, "later": outbox.StatusPending, "expired": outbox.StatusFailed} {
		RequireAdded(t, pool, key(typ), Want{Status: status})
	}
}
