package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	defaultSchema = "public"
	tableName     = "outbox_notifications"

	maxIdentifierBytes = 63 // PostgreSQL cuts longer names off: NAMEDATALEN - 1
)

// Config configures a [PGStore]. The zero value is ready for use.
type Config struct {
	// Schema holds the table. "" is public. It need not be on the search_path.
	Schema string

	// Logger receives what an operator may want to know, such as a repeat that
	// found its notification sent already (Info). nil is slog.Default().
	Logger *slog.Logger

	// MaxPayloadBytes is the longest payload accepted, as JSON text. 0 is
	// 1 MiB; at most 16 MiB, so that jsonb can take any document of that size.
	MaxPayloadBytes int

	// Notify has adds send a NOTIFY, for relays that listen. A transaction with a
	// NOTIFY takes a lock at commit that all such transactions share, so at most four
	// transactions a second of the store send one; it costs each of those a round trip
	// more. Relays learn of the others by polling, which is at its quickest after a
	// find. A transaction that sends one cannot be prepared for two-phase commit, and
	// its commit fails in the rare case that the server's queue of notifications is full,
	// as somebody has listened without reading for very long.
	Notify bool
}

// PGStore is the outbox in PostgreSQL. It implements [Store] on the caller's
// transactions; its other methods run on its own pool. It is safe for
// concurrent use, starts no goroutine and needs no closing.
type PGStore struct {
	pool            *pgxpool.Pool
	logger          *slog.Logger
	schema          string
	table           string // quoted and qualified
	maxPayloadBytes int
	sql             statements

	// wideBookingID is set once booking_id is known to be a bigint. See fits.
	wideBookingID atomic.Bool

	recently recently

	notifies bool
	born     time.Time
	notified atomic.Int64 // nanoseconds after born; 0: never
}

var _ Store = (*PGStore)(nil)

// NewPGStore returns a store on the table outbox_notifications in cfg.Schema.
// It runs no SQL: a table that is missing shows at the first call, see
// [Migrate]. The pool stays the caller's to close. A bad argument is an
// [InvalidError].
func NewPGStore(pool *pgxpool.Pool, cfg Config) (*PGStore, error) {
	if pool == nil {
		return nil, invalid("pool", "nil")
	}
	schema := cfg.Schema
	if schema == "" {
		schema = defaultSchema
	}
	if reason := badText(schema); reason != "" {
		return nil, invalid("Schema", "%s", reason)
	}
	if schema == "$user" || schema == "information_schema" || strings.HasPrefix(schema, "pg_") {
		return nil, invalid("Schema", "%q means something else to PostgreSQL", schema)
	}
	if len(schema) > maxIdentifierBytes {
		return nil, invalid("Schema", "%d bytes, over PostgreSQL's limit of %d", len(schema), maxIdentifierBytes)
	}
	maxPayload := cfg.MaxPayloadBytes
	if maxPayload == 0 {
		maxPayload = defaultMaxPayloadBytes
	}
	if maxPayload < 0 || maxPayload > maxMaxPayloadBytes {
		return nil, invalid("MaxPayloadBytes", "%d is not between 1 and %d", maxPayload, maxMaxPayloadBytes)
	}
	logger := cfg.Logger
	if logger == nil {
		logger = slog.Default()
	}
	table := pgx.Identifier{schema, tableName}.Sanitize()
	return &PGStore{
		pool:            pool,
		logger:          logger,
		schema:          schema,
		table:           table,
		maxPayloadBytes: maxPayload,
		sql:             prepare(table),
		notifies:        cfg.Notify,
		born:            time.Now(),
	}, nil
}

// statements are the texts of all statements with the table's name put in.
// Those that look a key up come once for each shape of a key.
type statements struct {
	add       [keyShapes]string
	guess     [founds][keyShapes]string // see guess_pg.go
	addMany   [keyShapes]string
	guessMany [founds][keyShapes]string
	get       [keyShapes]string
	requeue   [keyShapes]string

	claim, extend, settle string
}

// A key's shape is which of its parts are absent. PostgreSQL's planner uses an
// index for "= $2" and for "IS NULL", but not for "IS NOT DISTINCT FROM $2", so
// each shape has its own text.
const (
	noBooking   = 1
	noCandidate = 2
	keyShapes   = 4
)

func (k Key) shape() int {
	shape := 0
	if k.BookingID == 0 {
		shape |= noBooking
	}
	if k.CandidateTgID == 0 {
		shape |= noCandidate
	}
	return shape
}

func prepare(table string) statements {
	fill := func(sql string) string { return fillIn(sql, "{table}", table) }
	st := statements{claim: fill(claimSQL), extend: fill(extendSQL), settle: fill(settleSQL)}
	for shape := range keyShapes {
		one := "type::text = $1::text AND booking_id = $2::bigint AND candidate_tg_id = $3::bigint"
		many := "o.type::text = i.type AND o.booking_id = i.booking_id AND o.candidate_tg_id = i.candidate_tg_id"
		if shape&noBooking != 0 {
			one = strings.Replace(one, "booking_id = $2::bigint", "booking_id IS NULL AND $2::bigint IS NULL", 1)
			many = strings.Replace(many, "o.booking_id = i.booking_id", "o.booking_id IS NULL", 1)
		}
		if shape&noCandidate != 0 {
			one = strings.Replace(one, "candidate_tg_id = $3::bigint", "candidate_tg_id IS NULL AND $3::bigint IS NULL", 1)
			many = strings.Replace(many, "o.candidate_tg_id = i.candidate_tg_id", "o.candidate_tg_id IS NULL", 1)
		}
		fill := func(sql string) string {
			return fillIn(sql, "{table}", table, "{key}", qualify(one), "{keys}", qualify(many))
		}
		st.add[shape] = fill(addSQL)
		st.guess[foundOther][shape] = st.add[shape]
		st.guess[foundNone][shape] = fill(insertSQL)
		st.guess[foundPending][shape] = st.add[shape]
		st.guess[foundSettled][shape] = fill(lookupSQL)
		if shape == 0 { // of keys with absent parts the planner expects many rows
			st.guess[foundPending][shape] = fill(updateSQL)
		}
		st.addMany[shape] = fill(addManySQL)
		for f := range st.guessMany {
			st.guessMany[f][shape] = st.addMany[shape]
		}
		st.guessMany[foundNone][shape] = fill(newManySQL)
		st.get[shape] = fill(getSQL)
		st.requeue[shape] = fill(requeueSQL)
	}
	return st
}

// fillIn puts the table's name and more into a statement whose types are qualified, in
// one pass, as a name may hold anything.
func fillIn(sql string, oldnew ...string) string {
	return strings.NewReplacer(oldnew...).Replace(qualify(sql))
}

// qualify names the schema of the types that a statement casts to, which it is easier
// to read without. Nothing of the search_path is called or cast to, which is the
// caller's, and where others may be able to create things:
//
//   - functions are qualified, and so are types that are no keywords of SQL: a
//     temporary table named text is a type that stands before PostgreSQL's own;
//   - operators are not, but their operands are of the very types that an operator of
//     PostgreSQL takes. Hence the casts of varchar columns: varchar = text is text =
//     text by conversion, and an operator of anybody's for just those two would win.
//
// What that leaves is a search_path that names pg_catalog behind a schema in which
// others may create: then theirs is the first (TestHostileSearchPath).
var qualify = strings.NewReplacer("::text", "::pg_catalog.text", "::jsonb", "::pg_catalog.jsonb", "::json", "::pg_catalog.json",
	"::timestamptz", "::pg_catalog.timestamptz", "::uuid", "::pg_catalog.uuid").Replace

// rowColumns is what rowScanner reads.
const rowColumns = `id, type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id,
	status, attempts, version, sent_version, receipt, last_error,
	created_at, locked_at, next_retry_at, not_after, sent_at`

// addSQL adds one notification in one statement.
//
// $1 type, $2 booking_id, $3 candidate_tg_id (NULL where the key has none),
// $4 recruiter_tg_id, $5 payload as text, $6 correlation_id, $7 not before,
// $8 not after (NULL: not given).
//
// found locks the row of the key whatever its status, so that neither another
// add nor a settle changes it between here and the caller's commit. Under READ
// COMMITTED it waits for a rival and then sees what the rival left. The planner
// does not know that there is one row with both parts NULL; the order of the
// index and the limit keep it from scanning the table for the many it expects
// (TestPlan).
//
// refreshed writes what a refresh changes, and nothing if it changes nothing or the row
// is not pending. in_flight is worked out after the lock is held, by the clock and not
// by the transaction's start, which may be long ago. OFFSET 0 has it, and the comparison
// of the payloads, worked out once. A lease that has expired, and a lock without a token,
// is cleared, but the token stays: it says that the outcome of a delivery is unknown,
// and until the row is claimed anew it lets that delivery report after all.
//
// created inserts if nothing was found. FOR UPDATE cannot lock a row that does
// not exist, so a rival may have inserted it meanwhile: ON CONFLICT waits for
// that rival, then does nothing, and the statement returns no row at all. The
// snapshot is too old to see the rival's row; a new statement sees it. The
// conflict target is named so that no other unique violation is swallowed.
// Where a row was found no id is drawn from the sequence, which may be that of an
// integer column.
//
// See qualify for what the search_path, the caller's, is asked for.
var addSQL = `
WITH found AS MATERIALIZED (
	SELECT ` + rowColumns + `, lease_token, lease_until
	FROM {table}
	WHERE {key}
	ORDER BY type, booking_id, candidate_tg_id LIMIT 1
	FOR UPDATE
), created AS (
	INSERT INTO {table} (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id,
		status, attempts, created_at, next_retry_at, not_after)
	SELECT $1::text, $2::bigint, $3::bigint, $4::bigint, $5::text::json, $6::text,
		'pending', 0, pg_catalog.now(), $7::timestamptz, $8::timestamptz
	WHERE NOT EXISTS (SELECT FROM found)
	ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING
	RETURNING ` + rowColumns + `
), refreshed AS (
	` + strings.Replace(refreshSQL, "FROM refresh WHERE", `FROM (
		SELECT *, bump > 0 OR `+otherwiseDirtySQL+` AS dirty
		FROM (
			SELECT *, (payload_written OR recruiter_tg_id IS DISTINCT FROM coalesce(given_recruiter, recruiter_tg_id))::int AS bump
			FROM (
				SELECT id AS found_id, recruiter_tg_id, `+refreshInputSQL+`,
					$4::bigint AS given_recruiter, $5::text AS given_payload, $6::text AS given_correlation,
					$7::timestamptz AS given_not_before, $8::timestamptz AS given_not_after, `+inFlightSQL+` AS in_flight,
					`+strings.ReplaceAll(payloadChangedSQL, "first_payload", "$5::text")+` AS payload_written
				FROM found
				WHERE status::text = 'pending'
				OFFSET 0
			) AS compared
		) AS counted
	) AS refresh WHERE`, 1) + `
)
SELECT 'created', false, ` + rowColumns + ` FROM created
UNION ALL
SELECT 'refreshed', in_flight, ` + rowColumns + ` FROM refreshed
UNION ALL
SELECT CASE WHEN status::text = 'pending' THEN 'unchanged' ELSE 'existing' END, status::text = 'pending' AND ` + inFlightSQL + `, ` + rowColumns + `
FROM found
WHERE NOT EXISTS (SELECT FROM refreshed)`

// refreshSQL writes what refresh, in addSQL and in addManySQL, has worked out.
const refreshSQL = `UPDATE {table} SET
		recruiter_tg_id = coalesce(given_recruiter, recruiter_tg_id),
		payload_json    = CASE WHEN payload_written THEN coalesce(given_payload::json, payload_json) ELSE payload_json END,
		correlation_id  = coalesce(given_correlation, correlation_id),
		next_retry_at   = given_not_before,
		not_after       = coalesce(given_not_after, not_after),
		version         = version + bump,
		attempts        = CASE WHEN in_flight THEN attempts ELSE 0 END,
		locked_at       = CASE WHEN in_flight THEN locked_at END,
		lease_until     = CASE WHEN in_flight THEN lease_until END
	FROM (SELECT found_id, given_recruiter, given_payload, given_correlation, given_not_before, given_not_after,
		payload_written, bump, in_flight FROM refresh WHERE dirty) AS refresh
	WHERE id = found_id
	RETURNING ` + rowColumns + `, in_flight`

// The parts that both statements compare alike. A delivery is under way while a
// lease with a token has not ended.
const (
	refreshInputSQL = `correlation_id, not_after, next_retry_at, attempts, locked_at, lease_token, lease_until`

	inFlightSQL = `(lease_token IS NOT NULL AND coalesce(lease_until > pg_catalog.clock_timestamp(), false))`

	otherwiseDirtySQL = `correlation_id::text IS DISTINCT FROM coalesce(given_correlation, correlation_id)
		OR not_after IS DISTINCT FROM coalesce(given_not_after, not_after)
		OR next_retry_at IS DISTINCT FROM given_not_before
		OR NOT in_flight AND (attempts IS DISTINCT FROM 0 OR pg_catalog.num_nonnulls(locked_at, lease_until) > 0)`
)

// payloadChangedSQL compares the stored payload_json with first_payload, text or
// NULL for not given, as jsonb. The column is json, and another service may have
// stored what jsonb refuses (\u0000, lone surrogates, numbers out of range, sheer
// size): casting that would abort the caller's transaction. So a stored payload
// that may hold such a thing counts as changed when its text differs.
const payloadChangedSQL = `CASE
				WHEN first_payload IS NULL OR payload_json::text = first_payload THEN false
				WHEN payload_json IS NULL OR pg_catalog.octet_length(payload_json::text) > 32 * 1024 * 1024 THEN true
				WHEN ` + maybeNotJSONBSQL + ` THEN true
				ELSE payload_json::jsonb <> first_payload::jsonb
				END`

// maybeNotJSONBSQL is true of every json that jsonb refuses, and of little else
// (FuzzPayload). Both types refuse the same depths. The first expression of each part
// is cheap and lets nearly every payload through; of the others one costs some 2 ms a
// KiB. Escape strings do not mind standard_conforming_strings.
//
// The first part is of escapes and of exponents of four digits or more: NUL; a
// backslash before what looks like a surrogate; a high one without a low one; a low
// one without a high one. The second is of long numbers.
const maybeNotJSONBSQL = `(
				payload_json::text ~ E'\\\\u(0000|[dD][89a-fA-F])|[0-9][eE][+-]?[0-9]{4}' AND (
					payload_json::text ~ E'\\\\u0000|(^|[\\s:,[])-?[0-9]+(\\.[0-9]+)?[eE][+-]?[0-9]{4}'
					OR payload_json::text ~ E'\\\\u[dD][89a-fA-F]'
					AND payload_json::text ~ E'\\\\\\\\u[dD]|\\\\u[dD][89abAB]..(?!\\\\u[dD][c-fC-F])|(?<!\\\\u[dD][89abAB]..)\\\\u[dD][c-fC-F]')
				OR pg_catalog.octet_length(payload_json::text) >= 15000 AND payload_json::text ~ '[0-9]{20}' AND payload_json::text ~ '[0-9]{250}')`

// maxLookups bounds how often an add looks again. Each further look takes a
// rival that created the row and another that deleted it, both within one
// statement of ours.
const maxLookups = 10

// errNoRow: the statement neither found the key's row nor could insert it.
var errNoRow = errors.New("PostgreSQL gave no row: a trigger or a policy on the table suppressed it, or others kept creating and deleting it")

// AddNotification implements [Store], which has the details.
func (s *PGStore) AddNotification(ctx context.Context, tx pgx.Tx, n NewNotification) (AddResult, error) {
	if isNil(tx) {
		return AddResult{}, invalid("tx", "nil")
	}
	in, bad := s.check(n)
	if bad != nil {
		return AddResult{}, bad
	}
	if bad, err := s.fits(ctx, tx, in.key); err != nil {
		return AddResult{}, s.explain("add notification "+in.key.String(), err)
	} else if bad != nil {
		return AddResult{}, bad
	}
	add := s.sql.add[in.key.shape()]
	sql := s.sql.guess[s.recently.guess()][in.key.shape()]
	for range maxLookups {
		res, err := queryAdd(ctx, tx, sql,
			in.key.Type, int8OrNil(in.key.BookingID), int8OrNil(in.key.CandidateTgID),
			int8OrNil(in.recruiter), textOrNil(string(in.payload)), textOrNil(in.correlation),
			timeOrNil(in.notBefore), timeOrNil(in.notAfter))
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			if sql != add { // the guess was wrong
				sql = add
				s.recently.saw(foundOther, 1)
			}
			continue // else a rival created the row after our snapshot was taken
		case err != nil:
			return AddResult{}, s.explain("add notification "+in.key.String(), err)
		}
		s.recently.saw(res.Outcome.found(), 1)
		if res.Outcome == outcomeUnchanged {
			res.Outcome = OutcomeRefreshed
		}
		s.logExisting(ctx, res)
		if res.Outcome != OutcomeExisting && in.notBefore.IsZero() {
			if err := s.notify(ctx, tx); err != nil {
				return AddResult{}, s.explain("notify of "+in.key.String(), err)
			}
		}
		return res, nil
	}
	return AddResult{}, fmt.Errorf("outbox: add notification %s: %w", in.key, errNoRow)
}

// isNil reports whether tx is no transaction at all.
func isNil(tx pgx.Tx) bool {
	if p, ok := tx.(*pgxpool.Tx); ok {
		return p == nil
	}
	return tx == nil
}

// logExisting tells the operator that a repeat found its notification settled.
func (s *PGStore) logExisting(ctx context.Context, res AddResult) {
	if res.Outcome != OutcomeExisting {
		return
	}
	n := res.Notification
	s.logger.LogAttrs(ctx, slog.LevelInfo, "outbox: notification exists, left as it is",
		slog.Int64("id", n.ID), slog.String("type", n.Type), slog.Int64("booking_id", n.BookingID),
		slog.Int64("candidate_tg_id", n.CandidateTgID), slog.String("status", string(n.Status)),
		slog.String("correlation_id", n.CorrelationID))
}

// fitsSQL tells whether booking_id is a bigint; no row if there is no table.
const fitsSQL = `SELECT atttypid = 'pg_catalog.int8'::pg_catalog.regtype::pg_catalog.oid FROM pg_catalog.pg_attribute
WHERE attrelid = pg_catalog.to_regclass($1::pg_catalog.text)::pg_catalog.oid AND attname = 'booking_id'`

// fits refuses a booking id that the column cannot hold. A table that was taken
// over may have an integer column, where such an id would be an error in SQL and
// abort the transaction. Only ids beyond an integer cost a look at the catalog,
// and once the column is known to be wide, none does.
func (s *PGStore) fits(ctx context.Context, tx pgx.Tx, k Key) (*InvalidError, error) {
	if !beyondInteger(k.BookingID) || s.wideBookingID.Load() {
		return nil, nil
	}
	var wide bool
	err := tx.QueryRow(ctx, fitsSQL, s.table).Scan(&wide)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, nil // no table: the statement to come says so
	case err != nil:
		return nil, err
	case !wide:
		return invalid("BookingID", "%d does not fit the column booking_id of %s, which is an integer", k.BookingID, s.table), nil
	}
	s.wideBookingID.Store(true)
	return nil, nil
}

func beyondInteger(id int64) bool { return id < math.MinInt32 || id > math.MaxInt32 }

func textOrNull(v string) pgtype.Text { return pgtype.Text{String: v, Valid: v != ""} }
