package outbox

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// maxBatchBytes bounds the payloads of one batch: PostgreSQL takes messages of less
// than 1 GiB, a refresh may send a payload twice, and an array or a literal doubles
// each quote and backslash, the simple protocol both.
const maxBatchBytes = 64 << 20

// AddNotifications implements [Store], which has the details.
func (s *PGStore) AddNotifications(ctx context.Context, tx pgx.Tx, ns []NewNotification) ([]AddResult, error) {
	if isNil(tx) {
		return nil, invalid("tx", "nil")
	}
	ins := make([]input, len(ns))
	total := 0
	for i, n := range ns {
		in, bad := s.check(n)
		if bad == nil {
			if total += len(in.payload); total > maxBatchBytes {
				bad = invalid("Payload", "with it the batch has more than %d bytes of payload", maxBatchBytes)
			}
		}
		if bad != nil {
			return nil, bad.at(i)
		}
		ins[i] = in
	}
	if i := slices.IndexFunc(ins, func(in input) bool { return beyondInteger(in.key.BookingID) }); i >= 0 {
		if bad, err := s.fits(ctx, tx, ins[i].key); err != nil {
			return nil, s.explain("add notifications", err)
		} else if bad != nil {
			return nil, bad.at(i)
		}
	}
	results := make([]AddResult, len(ns))
	if err := s.addMany(ctx, tx, ins, results); err != nil {
		return nil, s.explain("add notifications", err)
	}
	s.logExistingMany(ctx, results)
	for i, res := range results {
		if res.Outcome != OutcomeExisting && ins[i].notBefore.IsZero() {
			if err := s.notify(ctx, tx); err != nil {
				return nil, s.explain("notify of notifications", err)
			}
			break
		}
	}
	return results, nil
}

// logExistingMany is logExisting for a batch, in one line.
func (s *PGStore) logExistingMany(ctx context.Context, results []AddResult) {
	existing, first := 0, Notification{}
	for _, res := range results {
		if res.Outcome == OutcomeExisting {
			if existing++; existing == 1 {
				first = res.Notification
			}
		}
	}
	if existing > 0 {
		s.logger.LogAttrs(ctx, slog.LevelInfo, "outbox: notifications exist, left as they are",
			slog.Int("existing", existing), slog.Int("of", len(results)), slog.String("first", first.Key().String()))
	}
}

// addManySQL does to many keys of one shape what addSQL does to one, one key after
// the other in the order of the arrays.
//
// $1 types, $2 booking_ids, $3 candidate_tg_ids, $4 recruiter_tg_ids, $5 payloads,
// $6 correlation_ids, $7 not before, $8 not after. For keys given more than once, see
// folded: $9 versions of a new row (NULL: given once, and the rest means nothing), $10
// first recruiter_tg_ids, $11 first payloads, $12 together, $13 changes. An array of
// nothing but NULLs may be NULL itself, but for $1.
//
// refresh locks the rows that are there, whatever their status, and says what a
// refresh of them means, as in addSQL. The rest created inserts. It reads
// refresh row by row, and runs before all else that does, as it is the first of them in
// the UNION ALL: so a row is locked, or inserted, before the next one is looked up,
// and all keys are locked in one order whether they are there or not. With locking and
// inserting in two passes, a batch in its second pass could wait for a row that
// another batch holds from its first. Keys that were found draw no id from the sequence.
//
// Where a rival inserted a key after our snapshot, DO UPDATE ... WHERE false
// waits for the rival and locks its row, still in order, without writing it. DO
// NOTHING would leave it unlocked, to be locked later and out of order. Such a row is
// not returned; a new statement sees it.
const addManySQL = `
WITH refresh AS MATERIALIZED (
	SELECT *, pending AND (bump > 0 OR ` + otherwiseDirtySQL + `) AS dirty
	FROM (
		SELECT *, payload_changed OR changes > 0 AS payload_written,
			changes + CASE WHEN together THEN (recruiter_changed OR payload_changed)::int
				ELSE recruiter_changed::int + payload_changed::int END AS bump
		FROM (
			SELECT given_type, given_booking, given_candidate, given_recruiter, given_payload, given_correlation,
				given_not_before, given_not_after, new_version, coalesce(changes, 0) AS changes, coalesce(together, true) AS together,
				found.*, id AS found_id, pending AND ` + inFlightSQL + ` AS in_flight,
				recruiter_tg_id IS DISTINCT FROM coalesce(first_recruiter, recruiter_tg_id) AS recruiter_changed,
				pending AND ` + payloadChangedSQL + ` AS payload_changed
			FROM (
				SELECT *, type AS given_type, booking_id AS given_booking, candidate_tg_id AS given_candidate,
					CASE WHEN new_version IS NULL THEN given_recruiter ELSE again_recruiter END AS first_recruiter,
					(CASE WHEN new_version IS NULL THEN given_payload ELSE again_payload END)::text AS first_payload
				FROM (
					SELECT ` + givenSQL + `,
						pg_catalog.unnest((SELECT $10::bigint[])) AS again_recruiter, pg_catalog.unnest((SELECT $11::json[])) AS again_payload,
						pg_catalog.unnest((SELECT $12::boolean[])) AS together, pg_catalog.unnest((SELECT $13::bigint[])) AS changes
				) AS given
			) AS i
			LEFT JOIN LATERAL (
				SELECT ` + rowColumns + `, lease_token, lease_until, status::text = 'pending' AS pending
				FROM {table} AS o WHERE {keys} ORDER BY type, booking_id, candidate_tg_id LIMIT 1 FOR UPDATE
			) AS found ON true
		) AS compared
	) AS counted
), created AS (
	` + insertManySQL + ` SELECT given_type, given_booking, given_candidate, given_recruiter, given_payload, given_correlation,
		'pending', 0, pg_catalog.now(), given_not_before, given_not_after, coalesce(new_version, 1)
	FROM refresh WHERE found_id IS NULL
	` + onConflictManySQL + ` RETURNING ` + rowColumns + `
), refreshed AS (
	` + refreshSQL + `
)
SELECT 'created', false, ` + rowColumns + ` FROM created
UNION ALL
SELECT 'refreshed', in_flight, ` + rowColumns + ` FROM refreshed
UNION ALL
SELECT CASE WHEN pending THEN 'refreshed' ELSE 'existing' END, in_flight, ` + rowColumns + `
FROM refresh WHERE NOT dirty`

// newManySQL is what addManySQL does where no key is there; see guess_pg.go. Where
// one is, it does nothing at all. $1 to $9 as for addManySQL, $10 the table, NULL for all
// columns to come back: what nothing can have changed since it was given does not, from a
// large batch.
//
// The subquery in look has the planner one way, as in addSQL.
var newManySQL = `
WITH look AS MATERIALIZED (
	SELECT pg_catalog.bool_or((SELECT true FROM {table} AS o WHERE {keys} ORDER BY type, booking_id, candidate_tg_id LIMIT 1)) AS there,
		` + asGivenSQL + ` AS as_given
	FROM (
		SELECT pg_catalog.unnest((SELECT $1::text[])) AS type, pg_catalog.unnest((SELECT $2::bigint[])) AS booking_id,
			pg_catalog.unnest((SELECT $3::bigint[])) AS candidate_tg_id
	) AS i
)
` + insertManySQL + ` SELECT type, booking_id, candidate_tg_id, given_recruiter, given_payload, given_correlation,
	'pending', 0, pg_catalog.now(), given_not_before, given_not_after, coalesce(new_version, 1)
FROM (SELECT ` + givenSQL + `) AS given
WHERE (SELECT there FROM look) IS NULL
` + onConflictManySQL + ` RETURNING 'created', false, ` + freshColumns()

// What addManySQL and newManySQL have in common. given unnests in the select list, which
// takes half the time of FROM: there each array's elements go through a store of their
// own. The arrays come out of subqueries, so that the planner does not count their
// elements: for many rows it may plan to read the whole table, and keep that plan.
const (
	givenSQL = `pg_catalog.unnest((SELECT $1::text[])) AS type, pg_catalog.unnest((SELECT $2::bigint[])) AS booking_id,
						pg_catalog.unnest((SELECT $3::bigint[])) AS candidate_tg_id, pg_catalog.unnest((SELECT $4::bigint[])) AS given_recruiter,
						pg_catalog.unnest((SELECT $5::json[])) AS given_payload, pg_catalog.unnest((SELECT $6::text[])) AS given_correlation,
						pg_catalog.unnest((SELECT $7::timestamptz[])) AS given_not_before, pg_catalog.unnest((SELECT $8::timestamptz[])) AS given_not_after,
						pg_catalog.unnest((SELECT $9::bigint[])) AS new_version`

	insertManySQL = `INSERT INTO {table} (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id,
		status, attempts, created_at, next_retry_at, not_after, version)`

	onConflictManySQL = `ON CONFLICT (type, booking_id, candidate_tg_id) DO UPDATE SET type = EXCLUDED.type WHERE false`
)

// asGivenSQL tells whether a new row of the table is sure to hold what is inserted. It
// is if nothing can change that: no trigger, no time of less precision, no default for
// what is not given. A transaction with an older snapshot may not see a trigger that is
// there.
const asGivenSQL = `CASE WHEN $10::text IS NULL OR pg_catalog.current_setting('transaction_isolation') <> 'read committed' THEN false
		ELSE EXISTS (
			SELECT FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass($10::text)::pg_catalog.oid AND relkind = 'r' AND NOT relhastriggers
		) AND NOT EXISTS (
			SELECT FROM pg_catalog.pg_attribute
			WHERE attrelid = pg_catalog.to_regclass($10::text)::pg_catalog.oid AND (attname IN ('next_retry_at', 'not_after') AND atttypmod >= 0
				OR attname IN ('receipt', 'last_error', 'locked_at', 'sent_at') AND atthasdef)
		) END`

// minAsGiven is for how many keys it is worth to ask what asGivenSQL asks.
const minAsGiven = 50

// freshColumns is rowColumns with NULL for those that are as given. The key, but for the
// type, says which row it is; the others were not given.
func freshColumns() string {
	columns := strings.Split(rowColumns, ",")
	for i, c := range columns {
		switch c = strings.TrimSpace(c); c {
		case "id", "booking_id", "candidate_tg_id", "sent_version", "created_at":
		default:
			columns[i] = " CASE WHEN NOT (SELECT as_given FROM look) THEN " + c + " END"
		}
	}
	return strings.Join(columns, ",")
}

// addMany runs at most one statement to compare the payloads of a key given
// twice, then for each shape of key one that adds. Keys that it did not return need
// one more: the guess that all are new was wrong, or rivals added them meanwhile.
//
// The order in which keys are locked is that of compareKeys. A wrong guess has locked
// nothing, and otherwise the first statement locks all keys of its shape; so a shape is
// done with before the next one begins.
func (s *PGStore) addMany(ctx context.Context, tx pgx.Tx, ins []input, results []AddResult) error {
	order := keyOrder(ins)
	same, err := samePayloads(ctx, tx, ins, order)
	if err != nil {
		return err
	}
	guess := s.sql.guessMany[s.recently.guess()]
	for shape, keys := range byShape(fold(ins, order, same)) {
		add := s.sql.addMany[shape]
		for tries, sql := 0, guess[shape]; len(keys) > 0; tries, sql = tries+1, add {
			if tries == 3 {
				return fmt.Errorf("%s: %w", keys[0].key, errNoRow)
			}
			if err := s.addGroup(ctx, tx, sql, sql != add, keys, results); err != nil {
				return err
			}
			keys = slices.DeleteFunc(keys, func(f folded) bool { return f.done })
		}
	}
	s.recently.sawMany(results)
	return nil
}

// addGroup runs addManySQL or, with allNew, newManySQL for keys of one shape.
func (s *PGStore) addGroup(ctx context.Context, tx pgx.Tx, sql string, allNew bool, keys []folded, results []AddResult) error {
	args := []any{
		types(keys), bookings(keys), candidates(keys),
		newColumn(keys, func(f *folded) any { return int8OrNil(f.recruiter) }),
		newColumn(keys, func(f *folded) any { return bytesOrNil(f.payload) }),
		newColumn(keys, func(f *folded) any { return textOrNil(f.correlation) }),
		newColumn(keys, func(f *folded) any { return timeOrNil(f.notBefore) }),
		newColumn(keys, func(f *folded) any { return timeOrNil(f.notAfter) }),
		newColumn(keys, func(f *folded) any { return f.ifAgain(f.version) }),
	}
	var table pgtype.Text // NULL: all columns come back
	if allNew {
		if len(keys) >= minAsGiven && keys[0].key.Type == keys[len(keys)-1].key.Type { // the type is among what does not
			table = textOrNull(s.table)
		}
		args = append(args, table)
	} else {
		args = append(args,
			newColumn(keys, func(f *folded) any { return int8OrNil(f.firstRecruiter) }),
			newColumn(keys, func(f *folded) any { return bytesOrNil(f.firstPayload) }),
			newColumn(keys, func(f *folded) any { return f.ifAgain(f.together) }),
			newColumn(keys, func(f *folded) any { return f.ifAgain(f.changes) }))
	}
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	var scanner rowScanner
	var outcome reusedText
	var res AddResult
	n := &res.Notification
	next := 0 // rows of one outcome come in the order of the keys
	for rows.Next() {
		n.Payload = nil
		asGiven := table.Valid && rows.RawValues()[typeColumn] == nil
		if asGiven {
			err = scanner.scanFresh(rows, n)
			n.Type, outcome = keys[0].key.Type, reusedText(OutcomeCreated)
		} else {
			err = scanner.scan(rows, n, &outcome, &res.InFlight)
		}
		if err != nil {
			return err
		}
		res.Outcome = Outcome(outcome)
		key := n.Key()
		if next >= len(keys) || keys[next].key != key {
			var found bool
			if next, found = slices.BinarySearchFunc(keys, key, func(f folded, k Key) int { return compareKeys(f.key, k) }); !found {
				return fmt.Errorf("PostgreSQL gave a row of a key that was not asked for, %s: a trigger may have changed it", key)
			}
		}
		f := &keys[next]
		f.done = true
		next++
		if asGiven {
			f.complete(n)
		}
		for i, at := range f.at {
			results[at] = res
			if i > 0 && res.Outcome == OutcomeCreated {
				results[at].Outcome = OutcomeRefreshed
			}
		}
	}
	return rows.Err()
}

// typeColumn is the place of the type among the columns of newManySQL.
const typeColumn = 3

// scanFresh reads what freshColumns leaves. Fresh rows are the only ones of their
// statement.
func (s *rowScanner) scanFresh(rows pgx.Rows, n *Notification) error {
	if s.into == nil {
		s.into = make([]any, 2) // outcome, in_flight
		for _, c := range strings.Split(rowColumns, ",") {
			var dst any // nil: left out
			switch strings.TrimSpace(c) {
			case "id":
				dst = &n.ID
			case "booking_id":
				dst = &s.booking
			case "candidate_tg_id":
				dst = &s.candidate
			case "sent_version":
				dst = &n.SentVersion
			case "created_at":
				dst = &s.created
			}
			s.into = append(s.into, dst)
		}
	}
	if err := scanRow(rows, s.into); err != nil {
		return err
	}
	n.BookingID, n.CandidateTgID, n.CreatedAt = s.booking.Int64, s.candidate.Int64, utc(s.created)
	return nil
}

// complete puts what was given for a new row, and was left out of it, into n.
func (f *folded) complete(n *Notification) {
	n.RecruiterTgID, n.Payload, n.CorrelationID = f.recruiter, f.payload, f.correlation
	n.Status, n.Attempts, n.Version = StatusPending, 0, max(f.version, 1)
	n.NextRetryAt, n.NotAfter = f.notBefore.UTC(), f.notAfter.UTC()
}

// byShape cuts keys, sorted, into its runs of one shape.
func byShape(keys []folded) (groups [keyShapes][]folded) {
	for len(keys) > 0 {
		shape := keys[0].key.shape()
		end := slices.IndexFunc(keys, func(f folded) bool { return f.key.shape() != shape })
		if end < 0 {
			end = len(keys)
		}
		groups[shape], keys = keys[:end], keys[end:]
	}
	return groups
}

// compareKeys is the order in which every batch locks its keys.
func compareKeys(k, l Key) int {
	return cmp.Or(
		cmp.Compare(k.shape(), l.shape()),
		strings.Compare(k.Type, l.Type),
		cmp.Compare(k.BookingID, l.BookingID),
		cmp.Compare(k.CandidateTgID, l.CandidateTgID),
	)
}

// keyOrder returns the indexes of ins in the order of their keys, those of one key as
// they were given.
func keyOrder(ins []input) []int {
	order := make([]int, len(ins))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int { return compareKeys(ins[i].key, ins[j].key) })
	return order
}

// samePayloadsSQL tells which pairs of payloads are equal as jsonb, by the
// numbers of the pairs from 1. $1 and $2 are the two sides.
const samePayloadsSQL = `SELECT n FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[]))
WITH ORDINALITY AS pair (a, b, n) WHERE a::pg_catalog.jsonb = b::pg_catalog.jsonb`

// samePayloads tells of each input whether its payload is, as jsonb, the one
// last given for its key. It asks PostgreSQL only about those that are not equal
// to the byte, so for most batches it runs nothing. order is ins sorted by key.
func samePayloads(ctx context.Context, tx pgx.Tx, ins []input, order []int) ([]bool, error) {
	same := make([]bool, len(ins))
	var as, bs []string
	var at []int
	last := -1 // the index of the key's last payload
	for n, i := range order {
		if n > 0 && ins[order[n-1]].key != ins[i].key {
			last = -1
		}
		if ins[i].payload == nil {
			continue
		}
		if last >= 0 {
			if bytes.Equal(ins[last].payload, ins[i].payload) {
				same[i] = true
			} else {
				as, bs, at = append(as, string(ins[last].payload)), append(bs, string(ins[i].payload)), append(at, i)
			}
		}
		last = i
	}
	if len(at) == 0 {
		return same, nil
	}
	rows, err := tx.Query(ctx, samePayloadsSQL, as, bs)
	if err != nil {
		return nil, err
	}
	equal, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	for _, n := range equal {
		same[at[n-1]] = true
	}
	return same, err
}

// folded is all that a batch says of one key, as if said in one call after the
// other.
type folded struct {
	*input       // what the last to give it gave; NotBefore is the last call's
	at     []int // the indexes in the batch
	done   bool

	// version is that of a new row: 1, and 1 more for each later call that
	// changes the content.
	version int64

	// What those calls add to the version of a row that is there depends on its
	// content. changes counts the calls that change content given earlier in the
	// batch, and so change it whatever is stored. firstRecruiter and
	// firstPayload are the first given, to be compared with what is stored; zero
	// where that call counts already. together: one call gave both, and counts
	// once if either differs. All are zero for a key given once.
	changes        int64
	firstRecruiter int64
	firstPayload   []byte
	together       bool
}

// fold takes the calls for each key together. order is ins sorted by key.
func fold(ins []input, order []int, same []bool) []folded {
	keys := make([]folded, 0, len(ins))
	for len(order) > 0 {
		n := 1
		for n < len(order) && ins[order[n]].key == ins[order[0]].key {
			n++
		}
		f := folded{input: &ins[order[0]], at: order[:n]}
		if n > 1 {
			f.input = &input{key: ins[order[0]].key}
			for i, at := range f.at {
				f.add(i, ins[at], same[at])
			}
		}
		keys, order = append(keys, f), order[n:]
	}
	return keys
}

// add folds the nth call of those for a key, counted from 0.
func (f *folded) add(n int, in input, samePayload bool) {
	firstRecruiter := in.recruiter != 0 && f.recruiter == 0
	firstPayload := in.payload != nil && f.payload == nil
	changes := in.recruiter != 0 && !firstRecruiter && in.recruiter != f.recruiter ||
		in.payload != nil && !firstPayload && !samePayload

	if n == 0 {
		f.version = 1
	} else if changes || firstRecruiter || firstPayload {
		f.version++
	}
	if changes {
		f.changes++
	} else {
		if firstRecruiter {
			f.firstRecruiter = in.recruiter
		}
		if firstPayload {
			f.firstPayload = in.payload
		}
		f.together = f.together || firstRecruiter && firstPayload
	}

	if in.recruiter != 0 {
		f.recruiter = in.recruiter
	}
	if in.payload != nil && !samePayload {
		f.payload = in.payload
	}
	if in.correlation != "" {
		f.correlation = in.correlation
	}
	f.notBefore = in.notBefore
	if !in.notAfter.IsZero() {
		f.notAfter = in.notAfter
	}
}

// ifAgain returns v for a key given more than once, else NULL.
func (f *folded) ifAgain(v any) any {
	if len(f.at) == 1 {
		return nil
	}
	return v
}

// column is one value of each key as an array. pgx encodes it where it knows that
// the parameter is one, without a copy of it as a slice. In the modes that do not ask
// PostgreSQL for the types it is sent as an array literal.
type column struct {
	keys []folded
	of   func(*folded) any // nil: NULL
	elem any               // one that is not NULL
}

var (
	_ pgtype.ArrayGetter = column{}
	_ pgtype.TextValuer  = column{}
)

// newColumn returns nil where no key has a value.
func newColumn(keys []folded, of func(*folded) any) any {
	for i := range keys {
		if elem := of(&keys[i]); elem != nil {
			return column{keys, of, elem}
		}
	}
	return nil
}

func types(keys []folded) any {
	return newColumn(keys, func(f *folded) any { return f.key.Type })
}

func bookings(keys []folded) any {
	return newColumn(keys, func(f *folded) any { return int8OrNil(f.key.BookingID) })
}

func candidates(keys []folded) any {
	return newColumn(keys, func(f *folded) any { return int8OrNil(f.key.CandidateTgID) })
}

func (c column) Dimensions() []pgtype.ArrayDimension {
	return []pgtype.ArrayDimension{{Length: int32(len(c.keys)), LowerBound: 1}}
}

func (c column) Index(i int) any { return c.of(&c.keys[i]) }
func (c column) IndexType() any  { return c.elem }

var quoteElement = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

func (c column) TextValue() (pgtype.Text, error) {
	b := []byte{'{'}
	for i := range c.keys {
		if i > 0 {
			b = append(b, ',')
		}
		switch v := c.of(&c.keys[i]).(type) {
		case nil:
			b = append(b, "NULL"...)
		case time.Time:
			b = v.UTC().AppendFormat(b, `"2006-01-02 15:04:05.999999Z07:00"`)
		case []byte:
			b = append(append(append(b, '"'), quoteElement.Replace(string(v))...), '"')
		case string:
			b = append(append(append(b, '"'), quoteElement.Replace(v)...), '"')
		default:
			b = fmt.Append(b, v)
		}
	}
	return pgtype.Text{String: string(append(b, '}')), Valid: true}, nil
}

func int8OrNil(v int64) any {
	if v == 0 {
		return nil
	}
	return v
}

func textOrNil(v string) any {
	if v == "" {
		return nil
	}
	return v
}

func bytesOrNil(v []byte) any {
	if v == nil {
		return nil
	}
	return v
}

func timeOrNil(v time.Time) any {
	if v.IsZero() {
		return nil
	}
	return v
}
