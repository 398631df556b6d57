package outboxtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

// Querier is what the assertions look through: a [pgx.Tx], which sees what it has
// added itself, or a pool or connection, which sees what is committed.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Want is what a notification is expected to be. Fields with the zero value are not
// looked at.
type Want struct {
	// Payload is compared as JSON, marshalled as [outbox.NewNotification].Payload is: white
	// space, the order of keys and the spelling of numbers do not matter.
	// json.RawMessage("null") expects that there is none. A []byte is base64, as encoding/json
	// has it: JSON that is ready made is a json.RawMessage.
	Payload any

	RecruiterTgID int64
	CorrelationID string
	NotBefore     time.Time // when it falls due; in microseconds, as it is kept
	NotAfter      time.Time // the same
	Version       int64     // 1: created; above: its content was changed
	Status        outbox.Status
}

// RequireAdded asserts that q's transaction has added a notification of that key, which
// is as expected, and returns it as it stands. Otherwise it ends the test, and says what
// is there instead.
//
// Inside a transaction it means just that one: a row that it has created, or refreshed
// with a change. What was there before does not count, nor does an add that wrote nothing,
// because the row was sent, or has failed, or held the same already. With a pool, or a
// connection that is in no transaction, it means that there is a row of that key,
// whoever added it.
//
// The table is the one on the search_path, or the only one there is, in any schema.
func RequireAdded(t testing.TB, q Querier, key outbox.Key, want ...Want) outbox.Notification {
	t.Helper()
	for _, w := range want {
		switch w.Status {
		case "", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed:
		default:
			t.Fatalf("outboxtest: Want.Status: no notification is ever %q", string(w.Status))
		}
	}
	v := look(t, q, key)
	r := v.find(t, key)
	if r == nil || v.inTx && !r.written {
		t.Fatalf("outboxtest: no notification %v was added%s\n%s", key, v.here(), v.instead(t, key, r))
	}
	for _, w := range want {
		if wrong := w.differences(t, r.Notification); wrong != "" {
			t.Fatalf("outboxtest: the notification %v is not as expected:\n%s", key, wrong)
		}
	}
	return r.Notification
}

// RequireNotAdded asserts that q's transaction has added no notification of that key, in
// the sense of [RequireAdded]: one that was there before, and was at most added again
// without effect, is none. With a pool, or a connection that is in no transaction, it
// asserts that there is no row of that key.
func RequireNotAdded(t testing.TB, q Querier, key outbox.Key) {
	t.Helper()
	v := look(t, q, key)
	if r := v.find(t, key); r != nil && (r.written || !v.inTx) {
		t.Fatalf("outboxtest: a notification %v was added%s\n  %s", key, v.here(), r.String())
	}
}

// view is a table as a transaction, or nobody in particular, sees it.
type view struct {
	q     Querier
	table string
	inTx  bool
}

func look(t testing.TB, q Querier, key outbox.Key) *view {
	t.Helper()
	if isNil(q) {
		t.Fatalf("outboxtest: q, the transaction or pool to look through, is nil (%T)", q)
	}
	// A key that cannot be added would never be found, whatever the code under test does.
	if n := utf8.RuneCountInString(key.Type); n < 1 || n > 50 {
		t.Fatalf("outboxtest: key.Type has %d characters; a notification's has 1 to 50", n)
	}
	v := &view{q: q}
	var conn *pgx.Conn
	switch q := q.(type) {
	case *pgx.Conn:
		conn = q
	case interface{ Conn() *pgx.Conn }:
		conn = q.Conn()
	}
	if conn != nil && !conn.IsClosed() {
		switch conn.PgConn().TxStatus() {
		case 'T':
			v.inTx = true
		case 'E':
			t.Fatalf("outboxtest: an earlier error has aborted the transaction: nothing can be read in it, and nothing of it will stay")
		}
	}
	tables, err := query(t, v, pgx.RowToStructByPos[struct {
		Table  string
		OnPath bool
	}], `SELECT format('%I.%I', n.nspname, c.relname), pg_catalog.pg_table_is_visible(c.oid)
		FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
		WHERE c.relname = 'outbox_notifications' AND c.relkind IN ('r', 'p') ORDER BY 2 DESC, 1`)
	switch {
	case errors.Is(err, pgx.ErrTxClosed):
		t.Fatalf("outboxtest: the transaction has ended: give the pool, to see what it has committed")
	case err != nil:
		t.Fatalf("outboxtest: %v", err)
	case len(tables) == 0:
		t.Fatalf("outboxtest: there is no table outbox_notifications")
	case len(tables) > 1 && !tables[0].OnPath:
		t.Fatalf("outboxtest: there are %d tables outbox_notifications, none of them on the search_path", len(tables))
	}
	v.table = tables[0].Table
	return v
}

func query[T any](t testing.TB, v *view, to pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	ctx, cancel := within(t)
	defer cancel()
	rows, err := v.q.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, to)
}

// here is where the assertion has looked, for messages.
func (v *view) here() string {
	if v.inTx {
		return " in this transaction."
	}
	return ", as far as is committed."
}

// row is a notification, and whether it is of this transaction's making.
type row struct {
	outbox.Notification
	written bool // created or changed by it
	locked  bool // not written, but locked, as an add does
}

// rowsSQL reads rows by a condition on o.
//
// A version of a row that can be seen although the transaction that wrote it has not
// ended was written by one's own, or by a subtransaction of it. xmin has the lower half of
// that one's number; the other half is today's, or the one before.
const rowsSQL = `
WITH o AS (
	SELECT *, xmin AS written_by, xmax AS locked_by FROM {table}
), next AS (
	SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint AS xid
)
SELECT id, type, coalesce(booking_id, 0)::bigint, coalesce(candidate_tg_id, 0), coalesce(recruiter_tg_id, 0), payload_json::text,
	coalesce(correlation_id, ''), status, coalesce(attempts, 0), version, sent_version, coalesce(receipt, ''), coalesce(last_error, ''),
	created_at, locked_at, next_retry_at, not_after, sent_at,
	coalesce(pg_catalog.pg_xact_status((CASE WHEN full_xid - xid > 2147483648 THEN full_xid - 4294967296 ELSE full_xid END)::text::xid8) = 'in progress', false),
	coalesce(locked_by::text = (pg_catalog.pg_current_xact_id_if_assigned()::text::bigint % 4294967296)::text, false)
FROM (
	SELECT o.*, next.xid, (next.xid / 4294967296) * 4294967296 + o.written_by::text::bigint AS full_xid
	FROM o CROSS JOIN next
	WHERE {condition}
) AS o
`

func (v *view) rows(t testing.TB, condition string, args ...any) []*row {
	t.Helper()
	sql := strings.NewReplacer("{table}", v.table, "{condition}", condition).Replace(rowsSQL)
	found, err := query(t, v, func(rows pgx.CollectableRow) (*row, error) {
		r := new(row)
		n := &r.Notification
		var payload *string
		var created, locked, retry, notAfter, sent *time.Time
		err := rows.Scan(&n.ID, &n.Type, &n.BookingID, &n.CandidateTgID, &n.RecruiterTgID, &payload, &n.CorrelationID, &n.Status, &n.Attempts,
			&n.Version, &n.SentVersion, &n.Receipt, &n.LastError, &created, &locked, &retry, &notAfter, &sent, &r.written, &r.locked)
		if payload != nil {
			n.Payload = json.RawMessage(*payload)
		}
		for into, at := range map[*time.Time]*time.Time{&n.CreatedAt: created, &n.LockedAt: locked, &n.NextRetryAt: retry, &n.NotAfter: notAfter, &n.SentAt: sent} {
			if at != nil {
				*into = at.UTC()
			}
		}
		return r, err
	}, sql, args...)
	if err != nil {
		t.Fatalf("outboxtest: read the outbox: %v", err)
	}
	return found
}

func (v *view) find(t testing.TB, key outbox.Key) *row {
	t.Helper()
	found := v.rows(t, `o.type = $1::text AND o.booking_id IS NOT DISTINCT FROM nullif($2::bigint, 0)
		AND o.candidate_tg_id IS NOT DISTINCT FROM nullif($3::bigint, 0)`, key.Type, key.BookingID, key.CandidateTgID)
	if len(found) == 0 {
		return nil
	}
	return found[0]
}

// shown is how many rows a message lists.
const shown = 10

// instead says what is there, r being the row of the key.
func (v *view) instead(t testing.TB, key outbox.Key, r *row) string {
	t.Helper()
	var b strings.Builder
	if r != nil {
		switch {
		case !r.locked:
			fmt.Fprintf(&b, "It was there before, and is untouched:\n")
		case r.Status == outbox.StatusPending:
			fmt.Fprintf(&b, "It was there before; if it was added again, that changed nothing:\n")
		default:
			fmt.Fprintf(&b, "It was there before, and an add leaves it alone, being %s:\n", r.Status)
		}
		fmt.Fprintf(&b, "  %v\n", r)
	}
	list := func(title, condition string, args ...any) bool {
		rows := v.rows(t, condition+fmt.Sprintf(" ORDER BY o.id DESC LIMIT %d", shown+1), args...)
		if len(rows) == 0 {
			return false
		}
		fmt.Fprintf(&b, "%s\n", title)
		for _, r := range rows[:min(len(rows), shown)] {
			own := ""
			if r.written && v.inTx {
				own = ", added in this transaction"
			}
			fmt.Fprintf(&b, "  %v%s\n", r, own)
		}
		if len(rows) > shown {
			fmt.Fprintf(&b, "  and more\n")
		}
		return true
	}
	const other = `NOT (o.type = $1::text AND o.booking_id IS NOT DISTINCT FROM nullif($2::bigint, 0)
		AND o.candidate_tg_id IS NOT DISTINCT FROM nullif($3::bigint, 0))`
	if !list("There are, of the same type, booking or candidate, the newest first:",
		other+" AND (o.type = $1 OR o.booking_id = nullif($2, 0) OR o.candidate_tg_id = nullif($3, 0))", key.Type, key.BookingID, key.CandidateTgID) &&
		!list("There are, of other keys, the newest first:", other, key.Type, key.BookingID, key.CandidateTgID) && r == nil {
		b.WriteString("The outbox is empty.\n")
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func (r *row) String() string {
	s := fmt.Sprintf("%v: %s, version %d", r.Key(), r.Status, r.Version)
	if len(r.Payload) > 0 {
		s += ", payload " + short(string(r.Payload))
	}
	return s
}

func short(s string) string { return cut(s, 200) }

func cut(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}
