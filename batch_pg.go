package outbox

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

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

// insertManySQL inserts the keys that are not there and locks those that are,
// one key after the other in the order of the arrays: unnest gives them in that
// order, and neither the subquery, which FOR UPDATE keeps from becoming a join,
// nor the insert changes it.
//
// $1 types, $2 booking_ids, $3 candidate_tg_ids, $4 recruiter_tg_ids, $5 payloads
// as text, $6 correlation_ids, $7 not before, $8 not after, $9 versions.
//
// unnest of several arrays is syntax and always pg_catalog's.
//
// Where a rival inserted a key after our snapshot, DO UPDATE ... WHERE false
// waits for the rival and locks its row, still in order, without writing it. DO
// NOTHING would leave it unlocked, to be locked later and out of order. Keys
// that the subquery found draw no id from the sequence.
const insertManySQL = `
INSERT INTO {table} (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id,
	status, attempts, created_at, next_retry_at, not_after, version)
SELECT i.type, i.booking_id, i.candidate_tg_id, i.recruiter_tg_id, i.payload::json, i.correlation_id,
	'pending', 0, pg_catalog.now(), i.not_before, i.not_after, i.version
FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
	$7::timestamptz[], $8::timestamptz[], $9::bigint[])
	AS i (type, booking_id, candidate_tg_id, recruiter_tg_id, payload, correlation_id, not_before, not_after, version)
WHERE NOT EXISTS (
	SELECT FROM {table} AS o WHERE {keys} ORDER BY type, booking_id, candidate_tg_id LIMIT 1 FOR UPDATE
)
ON CONFLICT (type, booking_id, candidate_tg_id) DO UPDATE SET type = EXCLUDED.type WHERE false
RETURNING 'created', false, ` + rowColumns

// refreshManySQL does to rows that insertManySQL has locked what addSQL does to
// one, and returns all of them. Its snapshot is taken after the locks, so it
// sees what every rival left.
//
// $1 to $8 as for insertManySQL, $9 first recruiter_tg_ids, $10 first payloads,
// $11 together, $12 changes: see folded.
const refreshManySQL = `
WITH refresh AS MATERIALIZED (
	SELECT *, pending AND (bump > 0 OR ` + otherwiseDirtySQL + `) AS dirty
	FROM (
		SELECT *, payload_changed OR changes > 0 AS payload_written,
			changes + CASE WHEN together THEN (recruiter_changed OR payload_changed)::int
				ELSE recruiter_changed::int + payload_changed::int END AS bump
		FROM (
			SELECT o.id AS found_id, ` + refreshInputSQL + `,
				given_recruiter, given_payload, given_correlation, given_not_before, given_not_after, together, changes,
				o.status = 'pending' AS pending, o.status = 'pending' AND ` + inFlightSQL + ` AS in_flight,
				recruiter_tg_id IS DISTINCT FROM coalesce(first_recruiter, recruiter_tg_id) AS recruiter_changed,
				o.status = 'pending' AND ` + payloadChangedSQL + ` AS payload_changed
			FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
				$7::timestamptz[], $8::timestamptz[], $9::bigint[], $10::text[], $11::boolean[], $12::bigint[])
				AS i (type, booking_id, candidate_tg_id, given_recruiter, given_payload, given_correlation, given_not_before, given_not_after,
					first_recruiter, first_payload, together, changes)
			CROSS JOIN LATERAL (
				SELECT * FROM {table} AS o WHERE {keys} ORDER BY type, booking_id, candidate_tg_id LIMIT 1
			) AS o
		) AS compared
	) AS counted
), refreshed AS (
	` + refreshSQL + `
)
SELECT 'refreshed', in_flight, ` + rowColumns + ` FROM refreshed
UNION ALL
SELECT CASE WHEN pending THEN 'refreshed' ELSE 'existing' END, in_flight, ` + rowColumns + `
FROM (SELECT found_id, pending, in_flight FROM refresh WHERE NOT dirty) AS unchanged JOIN {table} ON id = found_id`

// addMany runs at most one statement to compare the payloads of a key given
// twice, then for each shape of key one that inserts or locks, then for each
// shape one that refreshes what was there.
//
// The order in which keys are locked is that of folded.compare. All keys are
// inserted or locked in that one pass, before any is refreshed: with locking and
// inserting in two passes, a batch in its second pass could wait for a row that
// another batch holds from its first.
func (s *PGStore) addMany(ctx context.Context, tx pgx.Tx, ins []input, results []AddResult) error {
	same, err := samePayloads(ctx, tx, ins)
	if err != nil {
		return err
	}
	keys := fold(ins, same)
	slices.SortFunc(keys, (*folded).compare)
	byKey := make(map[Key]*folded, len(keys))
	for _, f := range keys {
		byKey[f.key] = f
	}

	// collect reads rows into the results of their keys.
	collect := func(rows pgx.Rows, err error) error {
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			res, err := scanAdd(rows)
			if err != nil {
				return err
			}
			f := byKey[res.Notification.Key()]
			if f == nil {
				return fmt.Errorf("PostgreSQL gave a row of a key that was not asked for, %s: a trigger may have changed it", res.Notification.Key())
			}
			f.done = true
			for i, at := range f.at {
				results[at] = res
				if i > 0 && res.Outcome == OutcomeCreated {
					results[at].Outcome = OutcomeRefreshed
				}
			}
		}
		return rows.Err()
	}
	for shape, group := range byShape(keys) {
		if len(group) > 0 {
			c := newColumns(group)
			if err := collect(tx.Query(ctx, s.sql.insert[shape], c.types, c.bookings, c.candidates, c.recruiters,
				c.payloads, c.correlations, c.notBefores, c.notAfters, c.versions)); err != nil {
				return err
			}
		}
	}
	keys = slices.DeleteFunc(keys, func(f *folded) bool { return f.done })
	for shape, group := range byShape(keys) {
		if len(group) > 0 {
			c := newColumns(group)
			if err := collect(tx.Query(ctx, s.sql.refresh[shape], c.types, c.bookings, c.candidates, c.recruiters,
				c.payloads, c.correlations, c.notBefores, c.notAfters,
				c.firstRecruiters, c.firstPayloads, c.together, c.changes)); err != nil {
				return err
			}
		}
	}
	for _, f := range keys {
		if !f.done {
			return fmt.Errorf("%s: %w", f.key, errNoRow)
		}
	}
	return nil
}

// byShape cuts keys, sorted, into its runs of one shape.
func byShape(keys []*folded) (groups [keyShapes][]*folded) {
	for _, f := range keys {
		groups[f.key.shape()] = append(groups[f.key.shape()], f)
	}
	return groups
}

// samePayloadsSQL tells which pairs of payloads are equal as jsonb, by the
// numbers of the pairs from 1. $1 and $2 are the two sides.
const samePayloadsSQL = `SELECT n FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[]))
WITH ORDINALITY AS pair (a, b, n) WHERE a::jsonb = b::jsonb`

// samePayloads tells of each input whether its payload is, as jsonb, the one
// last given for its key. It asks PostgreSQL only about those that are not equal
// to the byte, so for most batches it runs nothing.
func samePayloads(ctx context.Context, tx pgx.Tx, ins []input) ([]bool, error) {
	same := make([]bool, len(ins))
	last := make(map[Key]int, len(ins))
	var as, bs []string
	var at []int
	for i, in := range ins {
		if in.payload == nil {
			continue
		}
		if before, ok := last[in.key]; ok {
			if bytes.Equal(ins[before].payload, in.payload) {
				same[i] = true
			} else {
				as, bs, at = append(as, string(ins[before].payload)), append(bs, string(in.payload)), append(at, i)
			}
		}
		last[in.key] = i
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
	input       // what the last to give it gave; NotBefore is the last call's
	at    []int // the indexes in the batch
	done  bool

	// version is that of a new row: 1, and 1 more for each later call that
	// changes the content.
	version int64

	// What those calls add to the version of a row that is there depends on its
	// content. changes counts the calls that change content given earlier in the
	// batch, and so change it whatever is stored. firstRecruiter and
	// firstPayload are the first given, to be compared with what is stored; zero
	// where that call counts already. together: one call gave both, and counts
	// once if either differs.
	changes        int64
	firstRecruiter int64
	firstPayload   []byte
	together       bool
}

// compare is the order in which every batch locks its keys.
func (f *folded) compare(g *folded) int {
	return cmp.Or(
		cmp.Compare(f.key.shape(), g.key.shape()),
		strings.Compare(f.key.Type, g.key.Type),
		cmp.Compare(f.key.BookingID, g.key.BookingID),
		cmp.Compare(f.key.CandidateTgID, g.key.CandidateTgID),
	)
}

func fold(ins []input, same []bool) []*folded {
	keys := make([]*folded, 0, len(ins))
	byKey := make(map[Key]*folded, len(ins))
	for i, in := range ins {
		f := byKey[in.key]
		if f == nil {
			f = &folded{input: input{key: in.key}}
			byKey[in.key] = f
			keys = append(keys, f)
		}
		f.add(i, in, same[i])
	}
	return keys
}

func (f *folded) add(at int, in input, samePayload bool) {
	firstRecruiter := in.recruiter != 0 && f.recruiter == 0
	firstPayload := in.payload != nil && f.payload == nil
	changes := in.recruiter != 0 && !firstRecruiter && in.recruiter != f.recruiter ||
		in.payload != nil && !firstPayload && !samePayload

	if len(f.at) == 0 {
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

	f.at = append(f.at, at)
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

// columns are folded notifications turned into one array a column, for unnest.
type columns struct {
	types                            []string
	bookings, candidates, recruiters []pgtype.Int8
	payloads, correlations           []pgtype.Text
	notBefores, notAfters            []pgtype.Timestamptz
	versions, changes                []int64
	firstRecruiters                  []pgtype.Int8
	firstPayloads                    []pgtype.Text
	together                         []bool
}

func newColumns(keys []*folded) *columns {
	n := len(keys)
	c := &columns{
		types:    make([]string, n),
		bookings: make([]pgtype.Int8, n), candidates: make([]pgtype.Int8, n), recruiters: make([]pgtype.Int8, n),
		payloads: make([]pgtype.Text, n), correlations: make([]pgtype.Text, n),
		notBefores: make([]pgtype.Timestamptz, n), notAfters: make([]pgtype.Timestamptz, n),
		versions: make([]int64, n), changes: make([]int64, n),
		firstRecruiters: make([]pgtype.Int8, n), firstPayloads: make([]pgtype.Text, n), together: make([]bool, n),
	}
	for i, f := range keys {
		c.types[i] = f.key.Type
		c.bookings[i], c.candidates[i] = int8OrNull(f.key.BookingID), int8OrNull(f.key.CandidateTgID)
		c.recruiters[i], c.firstRecruiters[i] = int8OrNull(f.recruiter), int8OrNull(f.firstRecruiter)
		c.payloads[i], c.firstPayloads[i] = textOrNull(string(f.payload)), textOrNull(string(f.firstPayload))
		c.correlations[i] = textOrNull(f.correlation)
		c.notBefores[i], c.notAfters[i] = timeOrNull(f.notBefore), timeOrNull(f.notAfter)
		c.versions[i], c.changes[i], c.together[i] = f.version, f.changes, f.together
	}
	return c
}
