package outboxtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/seed3357934d/outbox"
)

// Querier is what the assertions look through: a [pgx.Tx], which sees what it has
// added itself, or a pool or connection, which sees what is committed. It may be wrapped,
// as for tracing: whether it is in a transaction the server is asked.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// InSchema is q for the assertions to look into the outbox of one schema, [outbox.Config].Schema,
// where there are several.
func InSchema(schema string, q Querier) Querier { return inSchema{q, schema} }

type inSchema struct {
	Querier
	schema string
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
// It looks into the outbox of every schema of the database that is migrated and that the
// role of q may read, whatever the search_path is: what [outbox.Config].Schema says is found. A key
// that is in several of them ends the test, unless one is named by [InSchema].
func RequireAdded(t testing.TB, q Querier, key outbox.Key, want ...Want) outbox.Notification {
	needT(t)
	t.Helper()
	for _, w := range want {
		if w.Version < 0 {
			t.Fatalf("outboxtest: Want.Version: no notification ever has %d", w.Version)
		}
		switch w.Status {
		case "", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed:
		default:
			t.Fatalf("outboxtest: Want.Status: no notification is ever %q", string(w.Status))
		}
	}
	v := look(t, q, key)
	there := v.find(t, key)
	added := v.added(there)
	switch len(added) {
	case 0:
		t.Fatalf("outboxtest: no notification %v was added%s\n%s", key, v.here(), v.instead(t, key, there))
	case 1:
	default:
		t.Fatalf("outboxtest: %d notifications %v were added%s Say which is meant by InSchema:\n%s", len(added), key, v.here(), v.lines(added))
	}
	r := added[0]
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
// asserts that there is no row of that key: in no schema, unless one is named by [InSchema].
func RequireNotAdded(t testing.TB, q Querier, key outbox.Key) {
	needT(t)
	t.Helper()
	v := look(t, q, key)
	if added := v.added(v.find(t, key)); len(added) > 0 {
		t.Fatalf("outboxtest: a notification %v was added%s\n%s", key, v.here(), v.lines(added))
	}
}

// needT has a nil t named: its methods would say nothing of who was given it.
func needT(t testing.TB) {
	if isNil(t) {
		panic("outboxtest: t, the test, is nil")
	}
}

// view is the outbox as a transaction, or nobody in particular, sees it.
type view struct {
	q      Querier
	tables []string // one, but where several schemas have an outbox
	inTx   bool
}

// tablesSQL finds the tables that may be the outbox's, and whether they can be read without an
// error, which would abort the caller's transaction. $1 is a schema, or "" for all.
const tablesSQL = `
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname),
	pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT'),
	EXISTS (SELECT FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'sent_version' AND NOT a.attisdropped)
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = 'outbox_notifications' AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
	AND ($1::pg_catalog.text = '' OR n.nspname::pg_catalog.text = $1::pg_catalog.text)
ORDER BY 1`

// momentSQL is the same for two statements of one transaction, and for no others.
const momentSQL = `SELECT pg_catalog.pg_backend_pid(), pg_catalog.now()`

type moment struct {
	Backend int32
	Begun   time.Time
}

func look(t testing.TB, q Querier, key outbox.Key) *view {
	t.Helper()
	schema := ""
	if in, ok := q.(inSchema); ok {
		if schema = in.schema; schema == "" {
			t.Fatalf("outboxtest: InSchema: no schema is named")
		}
		q = in.Querier
	}
	if isNil(q) {
		t.Fatalf("outboxtest: q, the transaction or pool to look through, is nil (%T)", q)
	}
	// A key that cannot be added would never be found, whatever the code under test does.
	// What PostgreSQL's text cannot hold would abort the transaction besides.
	for name, s := range map[string]string{"key.Type": key.Type, "InSchema: the schema": schema} {
		switch {
		case !utf8.ValidString(s):
			t.Fatalf("outboxtest: %s %q is not valid UTF-8", name, short(s))
		case strings.ContainsRune(s, 0):
			t.Fatalf("outboxtest: %s %q has a NUL byte", name, short(s))
		}
	}
	if n := utf8.RuneCountInString(key.Type); n < 1 || n > 50 {
		t.Fatalf("outboxtest: key.Type has %d characters; a notification's has 1 to 50", n)
	}

	v := &view{q: q}
	type table struct {
		Name             string
		Readable, Usable bool
	}
	tables, err := query(t, v, pgx.RowToStructByPos[table], tablesSQL, schema)
	var moments [2][]moment
	for i := range moments {
		if err == nil {
			moments[i], err = query(t, v, pgx.RowToStructByPos[moment], momentSQL)
		}
	}
	var pg *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrTxClosed):
		t.Fatalf("outboxtest: the transaction has ended: give the pool, to see what it has committed")
	case errors.As(err, &pg) && pg.Code == "25P02":
		t.Fatalf("outboxtest: an earlier error has aborted the transaction: nothing can be read in it, and nothing of it will stay")
	case err != nil:
		t.Fatalf("outboxtest: %v", err)
	}
	v.inTx = slices.Equal(moments[0], moments[1])
	var not []string // what cannot be looked into
	for _, found := range tables {
		switch {
		case !found.Readable:
			not = append(not, found.Name+", which the role may not read")
		case !found.Usable:
			not = append(not, found.Name+", which is not migrated")
		default:
			v.tables = append(v.tables, found.Name)
		}
	}
	where := ""
	if schema != "" {
		where = fmt.Sprintf(" in schema %q", schema)
	}
	switch {
	case len(v.tables) > 0:
	case len(not) > 0:
		t.Fatalf("outboxtest: there is only %s", strings.Join(not, ", and "))
	default:
		t.Fatalf("outboxtest: there is no table outbox_notifications%s", where)
	}
	return v
}

// query queries q, which may panic, as connections and transactions of pgxpool do that are
// released or were never made.
func query[T any](t testing.TB, v *view, to pgx.RowToFunc[T], sql string, args ...any) (all []T, err error) {
	ctx, cancel := within(t)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("Query of q, a %T, panicked: was it released, or never made? %v", v.q, p)
		}
	}()
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
	table   string
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
	var all []*row
	for _, table := range v.tables {
		all = append(all, v.rowsOf(t, table, condition, args...)...)
	}
	return all
}

func (v *view) rowsOf(t testing.TB, table, condition string, args ...any) []*row {
	t.Helper()
	sql := strings.NewReplacer("{table}", table, "{condition}", condition).Replace(rowsSQL)
	found, err := query(t, v, func(rows pgx.CollectableRow) (*row, error) {
		r := &row{table: table}
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

// find returns the row of the key, in each table that has one.
func (v *view) find(t testing.TB, key outbox.Key) []*row {
	t.Helper()
	return v.rows(t, `o.type = $1::text AND o.booking_id IS NOT DISTINCT FROM nullif($2::bigint, 0)
		AND o.candidate_tg_id IS NOT DISTINCT FROM nullif($3::bigint, 0)`, key.Type, key.BookingID, key.CandidateTgID)
}

// added are those of rows that count as added.
func (v *view) added(rows []*row) (added []*row) {
	for _, r := range rows {
		if r.written || !v.inTx {
			added = append(added, r)
		}
	}
	return added
}

// lines are rows, one a line.
func (v *view) lines(rows []*row) string {
	var lines []string
	for _, r := range rows {
		lines = append(lines, "  "+v.line(r))
	}
	return strings.Join(lines, "\n")
}

func (v *view) line(r *row) string {
	s := fmt.Sprintf("%v: %s, version %d", r.Key(), r.Status, r.Version)
	if len(r.Payload) > 0 {
		s += ", payload " + short(string(r.Payload))
	}
	if len(v.tables) > 1 {
		s += ", in " + r.table
	}
	return s
}

// shown is how many rows a message lists.
const shown = 10

// instead says what is there, and of the key.
func (v *view) instead(t testing.TB, key outbox.Key, ofKey []*row) string {
	t.Helper()
	var b strings.Builder
	if len(v.tables) > 1 {
		fmt.Fprintf(&b, "Looked into %s.\n", strings.Join(v.tables, ", "))
	}
	for _, r := range ofKey {
		switch {
		case !r.locked:
			fmt.Fprintf(&b, "It was there before, and is untouched:\n")
		case r.Status == outbox.StatusPending:
			fmt.Fprintf(&b, "It was there before; if it was added again, that changed nothing:\n")
		default:
			fmt.Fprintf(&b, "It was there before, and an add leaves it alone, being %s:\n", r.Status)
		}
		fmt.Fprintf(&b, "  %s\n", v.line(r))
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
			fmt.Fprintf(&b, "  %s%s\n", v.line(r), own)
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
		!list("There are, of other keys, the newest first:", other, key.Type, key.BookingID, key.CandidateTgID) && len(ofKey) == 0 {
		b.WriteString("The outbox is empty.\n")
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func short(s string) string { return cut(s, 200) }

func cut(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}
