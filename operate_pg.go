package outbox

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// getSQL reads the row of a key. $1 type, $2 booking_id, $3 candidate_tg_id.
const getSQL = `SELECT ` + rowColumns + ` FROM {table} WHERE {key}
ORDER BY type, booking_id, candidate_tg_id LIMIT 1`

// Get returns the row of key as committed, or [ErrNotFound]. It runs on the
// store's pool, so it does not see what an open transaction has added.
func (s *PGStore) Get(ctx context.Context, key Key) (Notification, error) {
	if _, bad := s.check(NewNotification{Type: key.Type}); bad != nil {
		return Notification{}, bad
	}
	found, err := s.collect(ctx, s.sql.get[key.shape()], key.Type, int8OrNil(key.BookingID), int8OrNil(key.CandidateTgID))
	if err != nil {
		return Notification{}, s.explain("get "+key.String(), err)
	}
	if len(found) == 0 {
		return Notification{}, ErrNotFound
	}
	return found[0], nil
}

// Filter says which notifications [PGStore.List] and [PGStore.RequeueMatching] are
// about: those that meet everything given. The zero value is all of them.
//
// A BookingID, or the status failed or pending, leads to the rows through an index.
// Without any of these the rows are read in the order of their ids and those that
// do not match are read past: a page of what is rare costs a read of the table.
type Filter struct {
	Status    Status   // "": any, including those of another service
	Types     []string // nil: all
	BookingID int64    // 0: any

	// OlderThan and NewerThan bound the time since the row was created, by the
	// database's clock, in microseconds: at least OlderThan, less than NewerThan. 0: no
	// bound. A row that another service gave no created_at is older than anything.
	OlderThan time.Duration
	NewerThan time.Duration

	After int64 // only rows with an ID above it: to go on from the last row of a page
	Limit int   // rows at most; 0: 100; at most 1,000
}

const (
	defaultLimit = 100
	maxLimit     = 1000
)

// check returns f with its defaults.
func (f Filter) check() (Filter, *InvalidError) {
	switch f.Status {
	case "", StatusPending, StatusSent, StatusFailed:
	default:
		return f, invalid("Status", "%q is none", f.Status)
	}
	if f.Types != nil && len(f.Types) == 0 {
		return f, invalid("Types", "empty but not nil: nothing could match")
	}
	for _, t := range f.Types {
		if reason := badText(t); reason != "" {
			return f, invalid("Types", "%q: %s", t, reason)
		}
	}
	switch {
	case f.OlderThan != 0 && f.OlderThan < time.Microsecond:
		return f, invalid("OlderThan", "%v is less than a microsecond", f.OlderThan)
	case f.NewerThan != 0 && f.NewerThan < time.Microsecond:
		return f, invalid("NewerThan", "%v is less than a microsecond", f.NewerThan)
	case f.NewerThan > 0 && f.NewerThan <= f.OlderThan:
		return f, invalid("NewerThan", "%v is not above OlderThan, %v: nothing could match", f.NewerThan, f.OlderThan)
	case f.Limit < 0 || f.Limit > maxLimit:
		return f, invalid("Limit", "%d is not between 1 and %d", f.Limit, maxLimit)
	}
	f.Limit = cmp.Or(f.Limit, defaultLimit)
	return f, nil
}

// where is the condition that f stands for. Status and booking decide how the rows are
// found, so they choose the text; with "$n IS NULL OR ..." a plan that is made before the
// values are known would use no index.
//
// $1 after, $2 limit, $3 types or NULL, $4 booking_id or 0, $5 older than and $6 newer
// than in microseconds or 0.
func (f Filter) where() string {
	booking := "$4::bigint = 0"
	switch {
	case f.BookingID != 0 && f.Types == nil:
		booking = strings.Replace(ofBookingSQL, "{types}", allTypesSQL, 1)
	case f.BookingID != 0:
		booking = strings.Replace(ofBookingSQL, "{types}", "$3::text[]", 1)
	case f.Status == StatusPending:
		return pendingSQL
	}
	return "id > $1::bigint AND " + statusSQL[f.Status] + "\n\tAND " + booking + "\n\tAND " + restSQL
}

func (f Filter) args() []any {
	return []any{f.After, f.Limit, f.Types, f.BookingID, f.OlderThan.Microseconds(), f.NewerThan.Microseconds()}
}

// statusSQL has literals, as no partial index is used for a parameter.
var statusSQL = map[Status]string{
	"": "true", StatusPending: "status::text = 'pending'", StatusSent: "status::text = 'sent'", StatusFailed: "status::text = 'failed'",
}

const (
	restSQL = `($3::text[] IS NULL OR type::text = ANY ($3::text[]))
	AND ($5::bigint = 0 OR coalesce(created_at, '-infinity'::timestamptz) <= pg_catalog.now() - $5::bigint::double precision * interval '1 microsecond')
	AND ($6::bigint = 0 OR created_at > pg_catalog.now() - $6::bigint::double precision * interval '1 microsecond')`

	// ofBookingSQL finds a booking's rows by the key, which begins with the type. The
	// subquery keeps the planner from walking the table by id until the limit is
	// reached, which it may take to be near.
	ofBookingSQL = `id = ANY (ARRAY(
		SELECT id FROM {table} WHERE type::text = ANY ({types}) AND booking_id = $4::bigint))`

	// allTypesSQL goes from one type to the next in the key's index, reading one row
	// of each.
	allTypesSQL = `ARRAY(
			WITH RECURSIVE types AS (
				(SELECT type::text FROM {table} ORDER BY type LIMIT 1)
				UNION ALL
				SELECT (SELECT o.type::text FROM {table} AS o WHERE o.type::text > t.type ORDER BY o.type LIMIT 1)
				FROM types AS t WHERE t.type IS NOT NULL
			)
			SELECT type FROM types WHERE type IS NOT NULL)`

	// pendingSQL reads all pending rows, which no index has in the order of ids,
	// through the index of those that are due. OFFSET 0 keeps the planner from walking
	// the table until the limit is reached (the pending rows are at its end), and from
	// reading an index of all rows for the sake of the other conditions.
	pendingSQL = `id = ANY (ARRAY(
	SELECT id FROM (
		SELECT id, type, created_at FROM {table} WHERE id > $1::bigint AND status::text = 'pending' OFFSET 0
	) AS pending
	WHERE $4::bigint = 0
	AND ` + restSQL + `
	ORDER BY id LIMIT $2::bigint))`
)

// listSQL reads a page. See Filter.where for its parameters.
const listSQL = `SELECT ` + rowColumns + ` FROM {table}
WHERE {where}
ORDER BY id LIMIT $2::bigint`

// List returns the notifications that match f as committed, by rising ID, at most
// f.Limit of them. To read on, call it again with After set to the last ID, until it
// returns none:
//
//	for {
//		page, err := store.List(ctx, f)
//		if err != nil || len(page) == 0 {
//			return err
//		}
//		// ...
//		f.After = page[len(page)-1].ID
//	}
//
// A row that is there and matches throughout is returned once, however many are
// inserted or deleted meanwhile. Each page sees what was committed when it was read;
// a row that is committed later may have an ID below After and be missed.
//
// It runs on the store's pool in one statement, waits for nobody and holds nobody
// up. A bad filter is an [InvalidError].
func (s *PGStore) List(ctx context.Context, f Filter) ([]Notification, error) {
	f, bad := f.check()
	if bad != nil {
		return nil, bad
	}
	list, err := s.collect(ctx, s.listSQL(f), f.args()...)
	if err != nil {
		return nil, s.explain("list", err)
	}
	return list, nil
}

func (s *PGStore) listSQL(f Filter) string {
	return s.fill(strings.Replace(listSQL, "{where}", f.where(), 1))
}

// fill puts the table's name in, last, as that may hold anything.
func (s *PGStore) fill(sql string) string { return fillIn(sql, "{table}", s.table) }

// collect runs a statement that returns rowColumns.
func (s *PGStore) collect(ctx context.Context, sql string, args ...any) ([]Notification, error) {
	var list []Notification
	err := retry(ctx, func() error {
		list = nil
		return s.onConn(ctx, func(conn *pgxpool.Conn) error {
			rows, err := conn.Query(ctx, sql, args...)
			if err != nil {
				return err
			}
			defer rows.Close()
			var scan rowScanner
			for rows.Next() {
				var n Notification
				if err := scan.scan(rows, &n); err != nil {
					return err
				}
				list = append(list, n)
			}
			return rows.Err()
		})
	})
	return list, err
}

// requeuedSQL makes a settled row pending. The clock is asked and not the
// transaction, which may have waited for the row.
const requeuedSQL = `
	status        = 'pending',
	attempts      = 0,
	next_retry_at = NULL,
	not_after     = CASE WHEN not_after > pg_catalog.clock_timestamp() THEN not_after END,
	sent_version  = CASE WHEN status::text = 'sent' THEN 0 ELSE sent_version END,
	receipt       = CASE WHEN status::text = 'sent' THEN NULL ELSE receipt END,
	sent_at       = CASE WHEN status::text = 'sent' THEN NULL ELSE sent_at END,
	locked_at     = NULL,
	lease_until   = NULL,
	lease_token   = NULL,
	lease_version = NULL`

// requeueSQL requeues the rows of keys. $1 types, $2 booking_ids, $3 candidate_tg_ids.
//
// The rows are locked one after the other in the order of the arrays, as in
// addManySQL. Under READ COMMITTED a lock that had to wait looks again at what
// the other left, and a row that is no longer settled is dropped. The update finds
// the rows by id and not by ctid, as what the other left has a new one.
const requeueSQL = `
UPDATE {table} SET` + requeuedSQL + `
WHERE id = ANY (ARRAY(
	SELECT o.id
	FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS i (type, booking_id, candidate_tg_id)
	CROSS JOIN LATERAL (
		SELECT o.id FROM {table} AS o
		WHERE {keys} AND o.status::text IN ('sent', 'failed') AND (o.purged_at IS NULL OR o.payload_json IS NOT NULL)
		ORDER BY type, booking_id, candidate_tg_id LIMIT 1
		FOR UPDATE
	) AS o))`

// Requeue makes the sent and failed rows among keys pending again, so that they are
// delivered once more, and returns how many it did so. It is for operators: an
// add never does this.
//
// Such a row is due now, and before those that are younger, with all its attempts
// before it. Content, version, correlation id and LastError stay. A NotAfter
// that has passed is cleared, as the row would expire again; a later one stays. A row
// that was sent is delivered afresh: SentVersion, Receipt and SentAt are cleared.
// One that failed keeps them: if an earlier version was delivered, the sender can
// still edit it.
//
// Pending rows, being delivered or not, those with a status of another service, and
// those that [PGStore.Purge] has been at, also where there was no payload to take, are left
// alone; neither they nor keys without a row count. A key given twice counts once.
//
// It runs on the store's pool in one transaction, all or nothing, with at most four
// statements. It waits for callers that have added one of the keys and not ended their
// transaction yet, bounded by ctx and by lock_timeout, and holds up others that add one
// until it is done. It locks in the order of [PGStore.AddNotifications], so the two
// never deadlock. A bad key is an [InvalidError] with its index; then none is requeued.
//
// It needs migration 3, and SELECT and UPDATE on the table: without, the error is
// [ErrSetup].
func (s *PGStore) Requeue(ctx context.Context, keys ...Key) (int, error) {
	ins := make([]input, len(keys))
	for i, k := range keys {
		in, bad := s.check(NewNotification{Type: k.Type, BookingID: k.BookingID, CandidateTgID: k.CandidateTgID})
		if bad != nil {
			return 0, bad.at(i)
		}
		ins[i] = in
	}
	if len(ins) == 0 {
		return 0, nil
	}
	rows := fold(ins, keyOrder(ins), make([]bool, len(ins)))
	n := 0
	requeue := func(tx pgx.Tx) error {
		n = 0
		for shape, group := range byShape(rows) {
			if len(group) == 0 {
				continue
			}
			tag, err := tx.Exec(ctx, s.sql.requeue[shape], types(group), bookings(group), candidates(group))
			if err != nil {
				return err
			}
			n += int(tag.RowsAffected())
		}
		if n == 0 {
			return nil
		}
		return s.notify(ctx, tx)
	}
	err := retry(ctx, func() error {
		return s.onConn(ctx, func(conn *pgxpool.Conn) error {
			return pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, requeue)
		})
	})
	if err != nil {
		return 0, s.explain("requeue", err)
	}
	return n, nil
}

// requeueMatchingSQL requeues what a filter matches. See Filter.where for its
// parameters.
//
// Rows in the order of ids are not in the order of keys in which batches lock theirs, so
// this must not wait: SKIP LOCKED.
const requeueMatchingSQL = `
UPDATE {table} SET` + requeuedSQL + `
WHERE id = ANY (ARRAY(
	SELECT id FROM {table}
	WHERE {where}
	AND (purged_at IS NULL OR payload_json IS NOT NULL)
	ORDER BY id LIMIT $2::bigint
	FOR UPDATE SKIP LOCKED))
RETURNING ` + rowColumns

// RequeueMatching does to the notifications that match f what [PGStore.Requeue] does,
// and returns them as they are now, by rising ID, at most f.Limit of them.
// f.Status is required and either [StatusSent] or [StatusFailed].
//
// To requeue all there are, call it again with After set to the last ID until it
// returns none, as with [PGStore.List]. Without After that may never end: what fails
// again matches again.
//
// A row that another transaction holds at that moment, such as that of a caller
// who has just added it again, is passed over, so this waits for nobody; so is a
// row that no longer matches, and one that [PGStore.Purge] has been at, also where there
// was no payload to take. Of several callers at once each requeues rows of its own. It
// runs on the store's pool in one statement. A bad filter is an [InvalidError].
//
// It needs migration 3, and SELECT and UPDATE on the table: without, the error is
// [ErrSetup].
func (s *PGStore) RequeueMatching(ctx context.Context, f Filter) ([]Notification, error) {
	f, bad := f.check()
	if bad != nil {
		return nil, bad
	}
	if f.Status != StatusSent && f.Status != StatusFailed {
		return nil, invalid("Status", "%q, it must say which are to be requeued: sent or failed", f.Status)
	}
	list, err := s.collect(ctx, s.requeueMatchingSQL(f), f.args()...)
	if err != nil {
		return nil, s.explain("requeue matching", err)
	}
	slices.SortFunc(list, func(a, b Notification) int { return cmp.Compare(a.ID, b.ID) })
	if len(list) > 0 && s.notifies {
		if err := s.onConn(ctx, func(conn *pgxpool.Conn) error { return s.notify(ctx, conn) }); err != nil {
			// They are requeued; relays learn of it by polling.
			s.logger.LogAttrs(ctx, slog.LevelWarn, "outbox: notify of requeued rows", slog.String("error", err.Error()))
		}
	}
	return list, nil
}

func (s *PGStore) requeueMatchingSQL(f Filter) string {
	return s.fill(strings.Replace(requeueMatchingSQL, "{where}", f.where(), 1))
}

// Stats is how full the outbox is.
type Stats struct {
	At time.Time // as of when, by the database's clock

	TypeStats // of all types together

	// Types has the types that have pending or failed rows. It is never nil.
	Types map[string]TypeStats

	// Sent is exact as long as the table is small, up to 16 MiB without indexes and
	// long values. Beyond, SentEstimated, it is the number of all rows by
	// PostgreSQL's statistics less Pending and Failed: off by a few per cent, by more
	// if the table has grown much since it was last analyzed or vacuumed, and
	// including rows that another service has given a status of its own.
	Sent          int64
	SentEstimated bool
}

// TypeStats counts the notifications of a type. What is pending is due, in flight or
// due later.
type TypeStats struct {
	Pending  int64
	Due      int64 // of Pending: to be claimed now, or given up on
	InFlight int64 // of Pending: being delivered, under a lease that has not ended
	Failed   int64

	// OldestDue is for how long the oldest of Due has been due; 0 if there is none. What
	// was added without NotBefore, refreshed without it or requeued has been due
	// since it was created.
	OldestDue time.Duration

	// NextDue is when the first of those that are due later will be; zero if there is none.
	NextDue time.Time
}

func (t *TypeStats) add(o TypeStats) {
	t.Pending += o.Pending
	t.Due += o.Due
	t.InFlight += o.InFlight
	t.Failed += o.Failed
	t.OldestDue = max(t.OldestDue, o.OldestDue)
	if t.NextDue.IsZero() || !o.NextDue.IsZero() && o.NextDue.Before(t.NextDue) {
		t.NextDue = o.NextDue
	}
}

// sizeSQL reads the clock, the size of the table in bytes and how many rows the
// planner takes it to have: as dense as when it was last looked at. The other
// counter is for a table that was not looked at yet, or was empty then. $1 table.
const sizeSQL = `
SELECT pg_catalog.now(), bytes, CASE WHEN reltuples >= 0::real AND relpages > 0
	THEN reltuples::double precision / relpages::double precision * (bytes / pg_catalog.current_setting('block_size')::bigint)::double precision
	ELSE pg_catalog.pg_stat_get_live_tuples(oid) END::bigint
FROM (SELECT *, pg_catalog.pg_relation_size(oid) AS bytes FROM pg_catalog.pg_class) AS c
WHERE oid = $1::pg_catalog.text::pg_catalog.regclass::pg_catalog.oid`

// depthSQL counts what is pending and what has failed, through the partial indexes of
// the two. Due is what a claim by any relay would take, see claimSQL. Infinity is no
// age, and Go's zero time as a date.
const depthSQL = `
SELECT type, 'pending', pg_catalog.count(*),
	pg_catalog.count(*) FILTER (WHERE NOT in_flight AND due <= pg_catalog.now()),
	pg_catalog.count(*) FILTER (WHERE in_flight),
	pg_catalog.min(due) FILTER (WHERE NOT in_flight AND due <= pg_catalog.now() AND pg_catalog.isfinite(due)),
	pg_catalog.min(due) FILTER (WHERE NOT in_flight AND due > pg_catalog.now())
FROM (
	SELECT type, ` + dueSQL + ` AS due,
		lease_token IS NOT NULL AND coalesce(lease_until > pg_catalog.now(), false) AS in_flight
	FROM {table} WHERE status::text = 'pending'
) AS pending
GROUP BY type
UNION ALL
SELECT type, 'failed', pg_catalog.count(*), 0, 0, NULL, NULL
FROM {table} WHERE status::text = 'failed'
GROUP BY type`

// countSentSQL is run on small tables only. In one statement with depthSQL, even if it
// were not executed there on large ones, its cost would have the planner compile the
// statement first (jit).
const countSentSQL = `SELECT pg_catalog.count(*) FROM {table} WHERE status::text = 'sent'`

const maxExactBytes = 16 << 20

// Stats counts the notifications by status and type, all as of one moment. Rows
// with a status of another service are not counted (but see [Stats.Sent]).
//
// Its cost grows with the rows that are pending or failed, not with those that were
// sent. It runs on the store's pool in one transaction that only reads, waits for
// nobody and holds nobody up.
func (s *PGStore) Stats(ctx context.Context) (Stats, error) {
	var st Stats
	opts := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	err := runInTx(ctx, s.pool, opts, func(tx pgx.Tx) error {
		st = Stats{Types: map[string]TypeStats{}}
		var bytes, estimate int64
		if err := tx.QueryRow(ctx, sizeSQL, s.table).Scan(&st.At, &bytes, &estimate); err != nil {
			return err
		}
		st.At = st.At.UTC()
		if err := s.depth(ctx, tx, &st); err != nil {
			return err
		}
		if bytes <= maxExactBytes {
			return tx.QueryRow(ctx, s.fill(countSentSQL)).Scan(&st.Sent)
		}
		st.Sent, st.SentEstimated = max(0, estimate-st.Pending-st.Failed), true
		return nil
	})
	if err != nil {
		return Stats{}, s.explain("stats", err)
	}
	return st, nil
}

// depth reads depthSQL into st.
func (s *PGStore) depth(ctx context.Context, tx pgx.Tx, st *Stats) error {
	rows, err := tx.Query(ctx, s.fill(depthSQL))
	if err != nil {
		return err
	}
	var typ, status string
	var n, due, inFlight int64
	var oldest, next pgtype.Timestamptz
	_, err = pgx.ForEachRow(rows, []any{&typ, &status, &n, &due, &inFlight, &oldest, &next}, func() error {
		t := st.Types[typ]
		if Status(status) == StatusFailed {
			t.Failed = n
		} else {
			t.Pending, t.Due, t.InFlight, t.NextDue = n, due, inFlight, utc(next)
			if oldest.Valid {
				t.OldestDue = st.At.Sub(oldest.Time)
			}
		}
		st.Types[typ] = t
		return nil
	})
	if err != nil {
		return err
	}
	for _, t := range st.Types {
		st.add(t)
	}
	return nil
}
