package outbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Token is the fencing token of a lease: whoever settles a row must show the one
// that its claim wrote. One that no longer matches changes nothing.
type Token [16]byte

// NewToken returns a random token.
func NewToken() Token {
	var t Token
	_, _ = rand.Read(t[:]) // never fails, see crypto/rand
	t[len(t)-1] &^= resumedBit | suspectBit
	return t
}

// String is the token as the column lease_token has it, but for the hyphens.
func (t Token) String() string { return hex.EncodeToString(t[:]) }

// The bits of a token's last byte that tell the three tokens of one claim apart, as
// RETURNING alone could not: rows on which another lease left no result have the
// first, and suspects among them both.
const (
	resumedBit = 1
	suspectBit = 2
)

func (t Token) with(bits byte) Token {
	t[len(t)-1] |= bits
	return t
}

func (t Token) has(bit byte) bool { return t[len(t)-1]&bit != 0 }

// Lease is the right to deliver one row until the database's clock passes its end.
type Lease struct {
	ID    int64
	Token Token
}

// ClaimOptions says what [PGStore.Claim] claims.
type ClaimOptions struct {
	Limit int           // rows at most; required
	Lease time.Duration // required; by the database's clock, in microseconds

	// Token is written to the rows claimed. The zero token is a random one. To
	// repeat a claim that failed, and whose outcome is unknown therefore, give the
	// same token again, until less than Limit is found, with Repeated, and with what was
	// returned by then in Except: rows that the first one claimed after all are returned
	// without being counted as another attempt. They have no precedence over others. In
	// place of OneSuspect repeat with LeaveSuspects: Limit counts the suspects that it leaves.
	Token Token

	// Repeated says that Token was given before. No row in Except is claimed then, also none
	// without a lease: a failover may have lost the lease that the caller holds, and by the
	// same token the caller could not tell it from a new one.
	Repeated bool

	// InTurn claims nothing while another claim is under way, by this process or another,
	// and says so by [ClaimResult].Busy. In a backlog claims side by side get in each
	// other's way: they lock rows that another has claimed a moment ago. Whoever is
	// claiming may be stuck: after some tries claim out of turn.
	InTurn bool

	// Since leaves rows that fell due before it, by the database's clock; zero: none. It is
	// for when a transaction is held open somewhere in the cluster: the entries of
	// delivered rows then stay in the index, and a claim walks through all of them from Since
	// on. Rows may fall due in the past, so claim without it now and then.
	Since time.Time

	Types       []string // nil: all; others are read past, so a backlog of them slows the claim
	Except      []int64  // ids of rows leased before and not to be claimed again, as the caller may yet settle them
	MaxAttempts int      // rows with so many attempts are failed; 0: unlimited

	// AtMostOnce fails a row whose lease ran out without a result, with "outcome
	// unknown", in place of claiming it again, if it is for the version that was leased.
	AtMostOnce bool

	// Suspects says what to do about rows that may kill their process on their last
	// attempt. See [Suspects]. The zero value makes no difference between rows.
	Suspects Suspects

	// Reconcile claims rows whose lease ran out without a result also where they
	// would be failed otherwise, at most once beyond MaxAttempts, for the caller
	// to ask the provider about [Claimed.UnknownVersion]. Content that is newer than that
	// is claimed after it, whatever became of the asking.
	Reconcile bool
}

// Suspects says whether a claim takes suspects: rows whose last lease ran out, as
// their process died or was frozen, and that have one attempt left. A message may
// have killed its process; or it only waited in the same batch as one that did, which
// cost it attempts all the same. Sent one at a time, suspects do not fail each other.
type Suspects int

const (
	TakeSuspects  Suspects = iota // like all other rows
	LeaveSuspects                 // none
	OneSuspect                    // one at most, beside other rows
)

// ClaimResult is what a claim did. What has Limit rows in all may have left more.
type ClaimResult struct {
	Claimed []Claimed      // oldest due first
	Failed  []Notification // given up on by the claim: expired, out of attempts, outcome unknown
	Last    time.Time      // when the last of all these fell due, by the database's clock; zero: always
	Busy    bool           // nothing was claimed, as it was another's turn; see [ClaimOptions].InTurn
}

// Claimed is a row leased to the caller of [PGStore.Claim].
type Claimed struct {
	Lease
	Notification Notification // Attempts counts this delivery; LockedAt is when the lease began

	// UnknownVersion is the version that a former lease was for, when that ran out
	// or was settled without its outcome being known. 0: nothing is unknown.
	UnknownVersion int64

	Expired bool // past NotAfter, and claimed on account of Reconcile only
	Suspect bool // see [Suspects]
}

// claimSQL leases due rows, oldest first.
//
// $1 limit, $2 token, $3 token of rows on which another lease ran out, $4 lease in
// microseconds, $5 types or NULL, $6 max attempts or 0, $7 at most once, $8 reconcile,
// $9 ids not to claim or NULL; looked through only for rows that bear a token, and in a
// repeated claim. $10 suspects, $11 token of suspects, $12 in turn, $13 what the advisory
// lock is for, $14 microseconds since 1970 or NULL: due since, $15 repeated.
//
// Every claim holds the advisory lock of turnSQL if it is free, until it ends; only one
// that is to take turns goes without rows if it is not. (With OR in place of CASE the
// planner would leave out the attempt.)
//
// SKIP LOCKED passes over rows that a caller holds in an open add, and rows that
// another relay is claiming: nobody waits here. now() is the start of the transaction,
// which is this statement and turnSQL: a lease counted from there ends rather too early
// than too late for whoever holds it, and unlike clock_timestamp() it can be
// compared through the index. The rows are then found by ctid, which their locks
// keep in place; with an array there is only one plan for that (TestClaimPlan).
//
// Rows that bear one of our tokens were claimed by the same call before, whose
// answer was lost: they get a longer lease, and it is for their content of now, as
// nothing has been sent. attempts rises here and not when the row is settled, so that a
// message that kills its process is counted. The attempts of content that was replaced
// meanwhile do not count (countsAnewSQL).
const claimSQL = `
WITH turn AS MATERIALIZED (
	SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($13::text, 0)) THEN true ELSE NOT $12::boolean END AS mine
), due AS MATERIALIZED (
	SELECT ctid AS tid, ` + suspectSQL + ` AS suspect
	FROM {table}
	WHERE (SELECT mine FROM turn)
		AND status::text = 'pending'
		AND ` + dueSQL + ` <= pg_catalog.now()
		AND ` + dueSQL + ` >= coalesce('epoch'::timestamptz + $14::bigint::double precision * interval '1 microsecond', '-infinity')
		AND (lease_token IS NULL OR lease_until IS NULL OR lease_until <= pg_catalog.now() OR ` + oursSQL + `)
		AND ($5::text[] IS NULL OR type::text = ANY ($5::text[]))
		AND (lease_token IS NULL AND NOT $15::boolean OR $9::bigint[] IS NULL OR id <> ALL ($9::bigint[]))
		AND ($10::int <> 1 OR NOT ` + suspectSQL + `)
	ORDER BY ` + dueSQL + `, id
	LIMIT $1::bigint
	FOR UPDATE SKIP LOCKED
)
UPDATE {table} SET
	status        = CASE WHEN ` + givenUpSQL + ` IS NULL THEN status ELSE 'failed' END,
	last_error    = coalesce(` + givenUpSQL + `, last_error),
	attempts      = CASE WHEN ` + givenUpSQL + ` IS NOT NULL THEN coalesce(attempts, 0)
		WHEN ` + countsAnewSQL + ` THEN 1
		WHEN coalesce(` + oursSQL + `, false) THEN coalesce(attempts, 0)
		ELSE coalesce(attempts, 0) + 1 END,
	locked_at     = CASE WHEN ` + givenUpSQL + ` IS NULL THEN pg_catalog.now() END,
	lease_until   = CASE WHEN ` + givenUpSQL + ` IS NULL THEN pg_catalog.now() + $4::bigint::double precision * interval '1 microsecond' END,
	lease_token   = CASE WHEN ` + givenUpSQL + ` IS NOT NULL THEN NULL
		WHEN ` + resumedSQL + ` AND (` + asksSQL + ` OR coalesce(lease_version, version) = version)
			THEN CASE WHEN lease_token = $11::uuid AND lease_until IS NOT NULL OR ` + suspectSQL + ` THEN $11::uuid ELSE $3::uuid END
		ELSE $2::uuid END,
	lease_version = CASE WHEN ` + givenUpSQL + ` IS NOT NULL THEN NULL
		WHEN ` + resumedSQL + ` AND ` + asksSQL + ` THEN coalesce(lease_version, version)
		ELSE version END
WHERE ctid = ANY (
	pg_catalog.array_cat(ARRAY(SELECT tid FROM due WHERE NOT suspect), ARRAY(SELECT tid FROM due WHERE suspect LIMIT CASE WHEN $10::int = 2 THEN 1 END)))
RETURNING lease_token, coalesce(lease_version, 0), coalesce(not_after <= pg_catalog.now(), false), ` + rowColumns

const (
	// dueSQL is the expression of the index outbox_notifications_due.
	dueSQL = `coalesce(next_retry_at, created_at, '-infinity'::timestamptz)`

	// oursSQL: claimed by an earlier run of this claim, and not settled since.
	oursSQL = `(lease_token IN ($2::uuid, $3::uuid, $11::uuid) AND lease_until IS NOT NULL)`

	// resumedSQL: another lease on the row left no result.
	resumedSQL = `(lease_token IN ($3::uuid, $11::uuid) OR lease_token IS NOT NULL AND NOT ` + oursSQL + `)`

	// suspectSQL: see Suspects. What would be failed is none.
	suspectSQL = `coalesce(lease_token NOT IN ($2::uuid, $3::uuid, $11::uuid) AND lease_until IS NOT NULL
		AND coalesce(attempts, 0) = $6::int - 1 AND NOT ` + countsAnewSQL + ` AND ` + givenUpSQL + ` IS NULL, false)`

	// countsAnewSQL: the row was refreshed while a delivery was under way that left no
	// result. Had it left one, all attempts would be before the newer content.
	countsAnewSQL = `(lease_token IS NOT NULL AND NOT ` + asksSQL + ` AND coalesce(lease_version, version) <> version)`

	// asksSQL: the claim is to reconcile, and asks about what is unknown of the row, which
	// it does once more than there are attempts at most. Asked in vain, content that is
	// newer counts anew.
	asksSQL = `($8::boolean AND ($6::int = 0 OR coalesce(attempts, 0) <= $6::int
		OR coalesce(lease_token IN ($3::uuid, $11::uuid) AND lease_until IS NOT NULL, false)))`

	// givenUpSQL says why a row is failed and not claimed; NULL if it is claimed.
	givenUpSQL = `CASE
		WHEN ` + oursSQL + ` THEN NULL
		WHEN lease_token IS NOT NULL AND ` + asksSQL + ` THEN NULL
		WHEN $7::boolean AND lease_token IS NOT NULL AND coalesce(lease_version, version) = version
			THEN 'outcome unknown: a delivery was begun and left no result, it may have reached the provider'
		WHEN not_after <= pg_catalog.now() THEN 'expired: not delivered before ' || not_after::text
		WHEN $6::int > 0 AND attempts >= $6::int AND NOT ` + countsAnewSQL + `
			THEN 'out of attempts' || CASE WHEN lease_token IS NULL THEN '' ELSE ': the last delivery left no result' END
				|| coalesce('; before that: ' || last_error, '')
		END`
)

// byIndexSQL is for the rest of its transaction, of which each statement of delivery is the
// other part. Their plans are always the same: by the indexes, whatever the table is
// like. But a plan that PostgreSQL has made and kept while the table was nearly empty would
// read all of it until the next ANALYZE, in a backlog for each claim; and where it thinks
// that a plan for the values at hand is better, it makes one each time, which takes
// longer than a small claim. Triggers on the table run under these settings.
const byIndexSQL = `pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', true),
	pg_catalog.set_config('enable_seqscan', 'off', true), pg_catalog.set_config('enable_bitmapscan', 'off', true)`

// turnSQL reports whether it is this claim's turn. $1 what the lock is for, $2 whether
// it takes turns.
const turnSQL = `SELECT coalesce(CASE WHEN $2::boolean THEN pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($1::pg_catalog.text, 0)) END, false), ` + byIndexSQL

// Claim leases due pending rows to the caller, oldest first, for opts.Lease by the
// database's clock, and counts an attempt of each. Rows past their NotAfter and
// rows out of attempts are failed instead.
//
// It takes the rows that are free: it waits neither for callers that hold a row in
// an open transaction nor for other relays, and no row is leased to two at once. It
// runs on the store's pool, as two statements sent together. Bad options are an [InvalidError].
func (s *PGStore) Claim(ctx context.Context, opts ClaimOptions) (ClaimResult, error) {
	switch {
	case opts.Limit < 1:
		return ClaimResult{}, invalid("Limit", "%d is not positive", opts.Limit)
	case opts.Lease < time.Microsecond:
		return ClaimResult{}, invalid("Lease", "%v is not positive", opts.Lease)
	case opts.MaxAttempts < 0 || opts.MaxAttempts > math.MaxInt32:
		return ClaimResult{}, invalid("MaxAttempts", "%d is not between 0 and %d", opts.MaxAttempts, math.MaxInt32)
	case !opts.Since.IsZero() && badTime(opts.Since):
		return ClaimResult{}, invalid("Since", "the year %d is not between 1 and 9999", opts.Since.UTC().Year())
	}
	if opts.Repeated && opts.Token == (Token{}) {
		return ClaimResult{}, invalid("Repeated", "without the Token that is repeated")
	}
	if opts.Suspects < TakeSuspects || opts.Suspects > OneSuspect {
		return ClaimResult{}, invalid("Suspects", "%d is none", opts.Suspects)
	}
	if opts.Types != nil && len(opts.Types) == 0 {
		return ClaimResult{}, invalid("Types", "empty but not nil: nothing could be claimed")
	}
	for _, t := range opts.Types {
		if reason := badText(t); reason != "" {
			return ClaimResult{}, invalid("Types", "%q: %s", t, reason)
		}
	}
	if opts.Token == (Token{}) {
		opts.Token = NewToken()
	}
	var res ClaimResult
	lock := s.claimLock(opts.Types)
	since := pgtype.Int8{Int64: opts.Since.UnixMicro(), Valid: !opts.Since.IsZero()}
	args := []any{opts.Limit, uuid(opts.Token), uuid(opts.Token.with(resumedBit)), opts.Lease.Microseconds(), opts.Types,
		opts.MaxAttempts, opts.AtMostOnce, opts.Reconcile, opts.Except, int(opts.Suspects), uuid(opts.Token.with(resumedBit | suspectBit)),
		opts.InTurn, lock, since, opts.Repeated}
	read := func(rows pgx.Rows) error { return res.read(rows, opts.Limit) }
	// A statement that waits for nobody is not retryable under READ COMMITTED, but the pool's
	// default may be stricter.
	err := retry(ctx, func() error {
		res = ClaimResult{}
		// One transaction. The snapshot of the claim is not older than its turn.
		var batch pgx.Batch
		mine := false
		batch.Queue(turnSQL, lock, opts.InTurn).QueryRow(func(row pgx.Row) error { return row.Scan(&mine, nil, nil, nil) })
		batch.Queue(s.sql.claim, args...).Query(read)
		err := s.send(ctx, &batch)
		res.Busy = opts.InTurn && !mine && len(res.Claimed)+len(res.Failed) == 0
		return err
	})
	if err != nil {
		return ClaimResult{}, s.explain("claim", err)
	}
	slices.SortFunc(res.Claimed, func(a, b Claimed) int {
		return cmp.Or(a.Notification.due().Compare(b.Notification.due()), cmp.Compare(a.ID, b.ID))
	})
	return res, nil
}

// claimLock names what the advisory lock of turnSQL is for. Claims of other types are
// not in the way.
func (s *PGStore) claimLock(types []string) string {
	return fmt.Sprintf("outbox claim %s %q", s.table, slices.Sorted(slices.Values(types)))
}

// read reads what claimSQL returns of limit rows at most.
func (res *ClaimResult) read(rows pgx.Rows, limit int) error {
	defer rows.Close()
	var scan rowScanner
	for rows.Next() {
		var c Claimed
		var token pgtype.UUID
		if err := scan.scan(rows, &c.Notification, &token, &c.UnknownVersion, &c.Expired); err != nil {
			return err
		}
		if due := c.Notification.due(); due.After(res.Last) {
			res.Last = due
		}
		if c.Notification.Status != StatusPending {
			res.Failed = append(res.Failed, c.Notification)
			continue
		}
		c.Lease = Lease{c.Notification.ID, Token(token.Bytes)}
		c.Suspect = c.Token.has(suspectBit)
		if !c.Token.has(resumedBit) {
			c.UnknownVersion = 0 // lease_version is that of this lease
		}
		if res.Claimed == nil {
			res.Claimed = make([]Claimed, 0, min(limit, 1000)) // most claims find nothing, or much
		}
		res.Claimed = append(res.Claimed, c)
	}
	return rows.Err()
}

// due is when n falls due, as dueSQL has it.
func (n *Notification) due() time.Time {
	if n.NextRetryAt.IsZero() {
		return n.CreatedAt
	}
	return n.NextRetryAt
}

func uuid(t Token) pgtype.UUID { return pgtype.UUID{Bytes: t, Valid: true} }

// LeaseResult is what [PGStore.Extend] and [PGStore.Settle] did about one lease.
type LeaseResult string

const (
	LeaseDone LeaseResult = "done" // extended, or settled

	// LeaseSuperseded: settled, and the row had been refreshed since it was
	// claimed. It stays pending, due as the refresh said: its newer content has yet to be
	// delivered.
	LeaseSuperseded LeaseResult = "superseded"

	// LeaseHeld: nothing was done, as somebody else holds the row locked, most
	// likely a caller in an open transaction. Try again.
	LeaseHeld LeaseResult = "held"

	// LeaseStale: nothing was done and never will be. The lease ran out and another claim
	// took the row, or it was settled, requeued or deleted meanwhile.
	LeaseStale LeaseResult = "stale"
)

// leasedSQL is where the rows of the leases in given are, as far as they are free, and
// locks them. The subquery with a limit, and the array, leave the planner one way:
// row for row by the id's index, then by ctid, which the locks keep in place.
const leasedSQL = `ARRAY(
		SELECT o.ctid FROM given AS g CROSS JOIN LATERAL (
			SELECT ctid FROM {table}
			WHERE id = g.id AND lease_token = g.token AND ` + stillPendingSQL + `
			LIMIT 1
			FOR UPDATE SKIP LOCKED
		) AS o)`

// stillPendingSQL is status = 'pending' in words that the planner does not find in the
// predicate of outbox_notifications_due. Where the statistics were taken when nothing was
// pending it would take that index for empty, and look through all of it for each id.
const stillPendingSQL = `coalesce(status::text = 'pending', false)`

// exceptionsSQL tells, of the leases in given that are not in done, whether their
// rows were locked by others or are no longer theirs.
const exceptionsSQL = `SELECT g.n, CASE WHEN EXISTS (
		SELECT FROM {table} AS t WHERE t.id = g.id AND t.lease_token = g.token AND ` + stillPendingSQL + `
	) THEN 'held' ELSE 'stale' END
	FROM given AS g WHERE g.n NOT IN (SELECT n FROM done)`

// extendSQL gives leases a new end. $1 ids, $2 tokens, $3 microseconds from now.
const extendSQL = `
WITH given AS MATERIALIZED (
	SELECT * FROM ROWS FROM (pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::uuid[])) WITH ORDINALITY AS g (id, token, n)
), done AS (
	UPDATE {table} AS t SET
		lease_until = pg_catalog.clock_timestamp() + $3::bigint::double precision * interval '1 microsecond',
		locked_at   = coalesce(t.locked_at, pg_catalog.now())
	FROM given AS g
	WHERE t.id = g.id AND t.lease_token = g.token AND t.ctid = ANY (` + leasedSQL + `)
	RETURNING g.n
)
` + exceptionsSQL

// Extend gives each lease a new end, d from now by the database's clock, and
// returns what became of each, in the order given: done, held or stale. A lease
// that has ended may be extended as long as nobody else has claimed the row. It runs
// on the store's pool, as two statements sent together, and waits for nobody.
func (s *PGStore) Extend(ctx context.Context, leases []Lease, d time.Duration) ([]LeaseResult, error) {
	if d < time.Microsecond {
		return nil, invalid("d", "%v is not positive", d)
	}
	if len(leases) == 0 {
		return nil, nil
	}
	ids, tokens := make([]int64, len(leases)), make([]pgtype.UUID, len(leases))
	for i, l := range leases {
		ids[i], tokens[i] = l.ID, uuid(l.Token)
	}
	res, err := s.onLeases(ctx, len(leases), s.sql.extend, ids, tokens, d.Microseconds())
	if err != nil {
		return nil, s.explain("extend leases", err)
	}
	return res, nil
}

// Verdict is what the holder of a lease says of the delivery.
type Verdict string

const (
	Delivered  Verdict = "delivered" // the provider accepted it
	Retry      Verdict = "retry"     // it failed, and is due again after RetryIn
	Failed     Verdict = "failed"    // it failed for good
	HandedBack Verdict = "handback"  // not tried: due as before, and the attempt does not count
)

// Settlement ends a lease.
type Settlement struct {
	Lease
	Verdict Verdict
	Receipt string        // of Delivered: the provider's id of the message
	Error   string        // of Retry and Failed
	RetryIn time.Duration // of Retry: from now by the database's clock

	// Unknown says, with Retry and HandedBack, that whether the leased version has
	// reached the provider is not known, so that the next claim is told; see
	// [Claimed.UnknownVersion].
	Unknown bool

	// Asked says, with Retry and Unknown, that the attempt was to ask about
	// [Claimed.UnknownVersion], in vain. It counts, and RetryIn holds, also where the row has
	// newer content, which waits for the answer or for the end of the attempts.
	Asked bool
}

// settleSQL ends leases.
//
// $1 ids, $2 tokens, $3 verdicts, $4 receipts, $5 errors, $6 retry in microseconds,
// $7 unknown, $8 asked; the last five may be NULL, which stands for as many NULLs.
//
// A row that was refreshed while it was leased has a version above the leased one;
// then, whatever the verdict, it stays pending, with all its attempts before it and
// due as the refresh said, unless the attempt was to ask. A refresh that changed no content may have put off the
// row: a retry is due no sooner. A delivery that ended is an attempt, also if an add
// has begun to count anew, so a row that is pending with none was superseded. An
// attempt is given back once: settling clears locked_at. Where the outcome is unknown a
// token stays to say so. It is nobody's: that of the lease, which has ended, is stale.
const settleSQL = `
WITH given AS MATERIALIZED (
	SELECT * FROM ROWS FROM (pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::uuid[]), pg_catalog.unnest($3::text[]),
		pg_catalog.unnest($4::text[]), pg_catalog.unnest($5::text[]), pg_catalog.unnest($6::bigint[]), pg_catalog.unnest($7::boolean[]),
		pg_catalog.unnest($8::boolean[])) WITH ORDINALITY AS g (id, token, verdict, receipt, error, retry_in, unknown, asked, n)
), done AS (
	UPDATE {table} AS t SET
		status        = CASE WHEN ` + supersededSQL + ` THEN 'pending' WHEN verdict = 'delivered' THEN 'sent' WHEN verdict = 'failed' THEN 'failed' ELSE 'pending' END,
		attempts      = CASE WHEN ` + supersededSQL + ` THEN 0 WHEN verdict = 'handback' AND locked_at IS NOT NULL THEN greatest(attempts - 1, 0)
			WHEN verdict = 'handback' THEN attempts ELSE greatest(attempts, 1) END,
		next_retry_at = CASE WHEN ` + supersededSQL + ` OR verdict = 'handback' THEN next_retry_at
			WHEN verdict = 'retry' THEN greatest(next_retry_at, pg_catalog.clock_timestamp() + coalesce(retry_in, 0)::double precision * interval '1 microsecond') END,
		last_error    = CASE WHEN verdict IN ('retry', 'failed') THEN g.error ELSE last_error END,
		sent_version  = CASE WHEN verdict = 'delivered' THEN coalesce(lease_version, version) ELSE sent_version END,
		receipt       = CASE WHEN verdict = 'delivered' THEN g.receipt ELSE t.receipt END,
		sent_at       = CASE WHEN verdict = 'delivered' AND NOT ` + supersededSQL + ` THEN pg_catalog.clock_timestamp() ELSE sent_at END,
		locked_at     = NULL,
		lease_until   = NULL,
		lease_token   = CASE WHEN unknown THEN pg_catalog.gen_random_uuid() END,
		lease_version = CASE WHEN unknown THEN lease_version END
	FROM given AS g
	WHERE t.id = g.id AND t.lease_token = g.token AND t.ctid = ANY (` + leasedSQL + `)
	RETURNING g.n, g.verdict <> 'handback' AND t.status::text = 'pending' AND t.attempts = 0 AS superseded
)
SELECT n, 'superseded' FROM done WHERE superseded
UNION ALL
` + exceptionsSQL

// supersededSQL: the row was refreshed since it was claimed, or since what was asked about.
const supersededSQL = `(version <> coalesce(lease_version, version) AND asked IS NOT TRUE)`

// Settle ends leases, each as its verdict says if its token still matches, and
// returns what became of each, in the order given. It runs on the store's pool, as
// two statements sent together, and waits for nobody: what another transaction holds is reported as
// held and should be tried again. Bad input is an [InvalidError] about the
// element's index; then none is settled.
func (s *PGStore) Settle(ctx context.Context, settlements []Settlement) ([]LeaseResult, error) {
	n := len(settlements)
	if n == 0 {
		return nil, nil
	}
	var (
		ids      = make([]int64, n)
		tokens   = make([]pgtype.UUID, n)
		verdicts = make([]string, n)

		// NULL, which is shorter than n of them, until one has a value.
		receipts, errors []pgtype.Text
		retryIn          []int64
		unknown, asked   []bool
	)
	for i, st := range settlements {
		if bad := st.check(); bad != nil {
			return nil, bad.at(i)
		}
		ids[i], tokens[i], verdicts[i] = st.ID, uuid(st.Token), string(st.Verdict)
		set(&receipts, n, i, textOrNull(st.Receipt))
		set(&errors, n, i, textOrNull(st.Error))
		set(&retryIn, n, i, st.RetryIn.Microseconds())
		set(&unknown, n, i, st.Unknown)
		set(&asked, n, i, st.Asked)
	}
	res, err := s.onLeases(ctx, n, s.sql.settle, ids, tokens, verdicts, receipts, errors, retryIn, unknown, asked)
	if err != nil {
		return nil, s.explain("settle", err)
	}
	return res, nil
}

// set sets element i of a column of n that is nil as long as all are zero.
func set[T comparable](column *[]T, n, i int, v T) {
	var zero T
	if v == zero {
		return
	}
	if *column == nil {
		*column = make([]T, n)
	}
	(*column)[i] = v
}

func (st Settlement) check() *InvalidError {
	switch st.Verdict {
	case Delivered, Retry, Failed, HandedBack:
	default:
		return invalid("Verdict", "%q is none", st.Verdict)
	}
	if st.RetryIn < 0 {
		return invalid("RetryIn", "%v is negative", st.RetryIn)
	}
	if reason := badText(st.Receipt); reason != "" {
		return invalid("Receipt", "%s", reason)
	}
	if reason := badText(st.Error); reason != "" {
		return invalid("Error", "%s", reason)
	}
	if st.Unknown && (st.Verdict == Delivered || st.Verdict == Failed) {
		return invalid("Unknown", "set with the verdict %q", st.Verdict)
	}
	if st.Asked && (st.Verdict != Retry || !st.Unknown) {
		return invalid("Asked", "set without Retry and Unknown")
	}
	return nil
}

// onLeases runs a statement about n leases, which returns those that were not simply
// done, by their number from 1.
func (s *PGStore) onLeases(ctx context.Context, n int, sql string, args ...any) ([]LeaseResult, error) {
	results := make([]LeaseResult, n)
	err := retry(ctx, func() error {
		for i := range results {
			results[i] = LeaseDone
		}
		var batch pgx.Batch
		batch.Queue("SELECT " + byIndexSQL)
		batch.Queue(sql, args...).Query(func(rows pgx.Rows) error {
			var at int64
			var res string
			_, err := pgx.ForEachRow(rows, []any{&at, &res}, func() error {
				results[at-1] = LeaseResult(res)
				return nil
			})
			return err
		})
		return s.send(ctx, &batch)
	})
	return results, err
}

// send runs a batch on a connection of the pool.
func (s *PGStore) send(ctx context.Context, batch *pgx.Batch) error {
	return s.onConn(ctx, func(conn *pgxpool.Conn) error { return conn.SendBatch(ctx, batch).Close() })
}

// onConn runs fn with a connection of the pool. One that only reads is closed: its server
// has become a standby, or it came to one, and the next connection may find the
// primary (with target_session_attrs in the URL, or behind a name that moves). Kept in the
// pool, it would answer the same for ever.
func (s *PGStore) onConn(ctx context.Context, fn func(*pgxpool.Conn) error) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	err = fn(conn)
	if sqlState(err) == codeReadOnly {
		_ = conn.Conn().Close(ctx) // the error that counts is err
	}
	return err
}
