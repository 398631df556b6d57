package outbox_test

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/bits"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// row is a row of the table as a model has it.
type row struct {
	outbox.Notification
	token        outbox.Token // zero: none
	leaseUntil   time.Time    // zero: NULL
	leaseVersion int64        // 0: NULL
	purged       time.Time    // zero: NULL

	// spent is the token that the last settlement of an unknown outcome ended, in place of
	// which the row has one of the database's making.
	spent outbox.Token

	// told are those of times that a call since the last look has taken from the
	// database's clock. The model expects what the clock said when it looked last, and takes
	// over what is read if it lies between that and the next look.
	told [7]bool

	// respelled: a batch since the last look gave the key more than once. Of several
	// spellings of the same payload any may be stored.
	respelled bool
}

// model is the table and its rules in memory: sections "AddNotification" and "Delivery"
// of the design, and the comments of the methods, but none of their SQL. The real
// clock does not decide anything in it. All spans are hours, and an hour passes when
// a test says so, by moving the times of all rows. A test has to take less than one.
type model struct {
	now     time.Time // what the database's clock said at the last look
	rows    map[outbox.Key]*row
	reached *tally
}

func newModel(now time.Time) *model { return &model{now: now, rows: map[outbox.Key]*row{}} }

// reach counts that a branch of the rules was taken.
func (m *model) reach(branch string) {
	if m.reached != nil {
		m.reached.add(branch, 1)
	}
}

// tally counts by name.
type tally struct {
	sync.Mutex
	counts map[string]int
}

func newTally() *tally { return &tally{counts: map[string]int{}} }

func (c *tally) add(name string, n int) {
	c.Lock()
	defer c.Unlock()
	c.counts[name] += n
}

// atLeast fails the test if less was counted than floors says, which have a small part of what
// 100 checks come to. Fewer checks are asked for nothing, nor is a given seed, which is to
// repeat what failed.
func (c *tally) atLeast(t *testing.T, floors map[string]int) {
	c.Lock()
	defer c.Unlock()
	for _, name := range slices.Sorted(maps.Keys(c.counts)) {
		t.Logf("%6d %s", c.counts[name], name)
	}
	checks, err := strconv.Atoi(flag.Lookup("rapid.checks").Value.String())
	require.NoError(t, err)
	if checks < 100 || testing.Short() || seedGiven || t.Failed() {
		return
	}
	for name, floor := range floors {
		if c.counts[name] < floor {
			t.Errorf("%q was reached %d times, and should have been %d times at least", name, c.counts[name], floor)
		}
	}
}

// clone returns a copy, to go on from in place of m.
func (m *model) clone() *model {
	c := newModel(m.now)
	c.reached = m.reached
	for key, r := range m.rows {
		copied := *r
		c.rows[key] = &copied
	}
	return c
}

// clock is what times are compared with: those that are about to pass or have just passed
// are hours away from those that are not.
func (m *model) clock() time.Time { return m.now.Add(30 * time.Minute) }

// tell has the database's clock, and d, in a column.
func (m *model) tell(r *row, at *time.Time, d time.Duration) {
	*at = m.now.Add(d)
	r.told[slices.Index(r.times(), at)] = true
}

// pass lets d pass.
func (m *model) pass(d time.Duration) {
	for _, r := range m.rows {
		for _, at := range r.times() {
			if !at.IsZero() {
				*at = at.Add(-d)
			}
		}
	}
}

// inFlight: a lease has not ended.
func (m *model) inFlight(r *row) bool {
	return r.token != outbox.Token{} && r.leaseUntil.After(m.clock())
}

func (r *row) times() []*time.Time {
	return []*time.Time{&r.CreatedAt, &r.LockedAt, &r.NextRetryAt, &r.NotAfter, &r.SentAt, &r.leaseUntil, &r.purged}
}

// byID returns the row of an id, or nil.
func (m *model) byID(id int64) *row {
	for _, r := range m.rows {
		if r.ID == id {
			return r
		}
	}
	return nil
}

// added is what a model expects of an add. Its row may change until the result is compared.
type added struct {
	row      *row
	outcome  outbox.Outcome
	inFlight bool
}

func (a added) result() outbox.AddResult {
	return outbox.AddResult{Notification: a.row.Notification, Outcome: a.outcome, InFlight: a.inFlight}
}

func (m *model) add(n outbox.NewNotification) added {
	r := m.rows[n.Key()]
	payload := givenPayload(n)
	if r == nil {
		r = &row{Notification: outbox.Notification{
			Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID, RecruiterTgID: n.RecruiterTgID,
			Payload: payload, CorrelationID: n.CorrelationID, Status: outbox.StatusPending, Version: 1,
			NextRetryAt: n.NotBefore, NotAfter: n.NotAfter,
		}}
		m.tell(r, &r.CreatedAt, 0)
		m.rows[n.Key()] = r
		m.reach("add: created")
		return added{r, outbox.OutcomeCreated, false}
	}
	if r.Status != outbox.StatusPending {
		m.reach("add: existing")
		if !r.purged.IsZero() {
			m.reach("add: existing, emptied by a purge")
		}
		return added{r, outbox.OutcomeExisting, false}
	}
	changed := false
	if n.RecruiterTgID != 0 && n.RecruiterTgID != r.RecruiterTgID {
		r.RecruiterTgID, changed = n.RecruiterTgID, true
	}
	if payload != nil && !sameJSON(payload, r.Payload) {
		r.Payload, changed = payload, true
	}
	if changed {
		r.Version++
	}
	if n.CorrelationID != "" {
		r.CorrelationID = n.CorrelationID
	}
	if !n.NotAfter.IsZero() {
		r.NotAfter = n.NotAfter
	}
	r.NextRetryAt = n.NotBefore
	inFlight := m.inFlight(r)
	switch {
	case inFlight && changed:
		m.reach("add: in flight, other content")
	case inFlight:
		m.reach("add: in flight, same content")
	case r.token != outbox.Token{}:
		m.reach("add: after an unknown outcome")
	default:
		m.reach("add: refreshed")
	}
	if !inFlight {
		r.Attempts, r.LockedAt, r.leaseUntil = 0, time.Time{}, time.Time{}
	}
	return added{r, outbox.OutcomeRefreshed, inFlight}
}

// addMany is a batch: one call after the other, and all results of a key hold its last row.
func (m *model) addMany(ns []outbox.NewNotification) []added {
	all := make([]added, len(ns))
	for i, n := range ns {
		all[i] = m.add(n)
		for _, earlier := range all[:i] {
			if earlier.row == all[i].row {
				earlier.row.respelled = true
				m.reach("batch: a key again")
			}
		}
	}
	return all
}

// givenPayload is what n gives as a payload, nil for nothing. Here it is always raw.
func givenPayload(n outbox.NewNotification) json.RawMessage {
	raw, _ := n.Payload.(json.RawMessage)
	if s := strings.ReplaceAll(string(raw), " ", ""); s == "null" || s == "{}" {
		return nil
	}
	return raw
}

func sameJSON(a, b json.RawMessage) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

// bits tell the tokens of one claim apart; see the package.
const (
	resumed   = 1
	suspected = 2
)

func marked(t outbox.Token, mark byte) outbox.Token {
	t[len(t)-1] |= mark
	return t
}

// claimed is what a model expects of a row that was claimed.
type claimed struct {
	row              *row
	token            outbox.Token
	unknown          int64
	expired, suspect bool
}

func (c claimed) result() outbox.Claimed {
	return outbox.Claimed{Lease: outbox.Lease{ID: c.row.ID, Token: c.token}, Notification: c.row.Notification,
		UnknownVersion: c.unknown, Expired: c.expired, Suspect: c.suspect}
}

func (r *row) due() time.Time {
	if r.NextRetryAt.IsZero() {
		return r.CreatedAt
	}
	return r.NextRetryAt
}

// leased is the version that the last lease was for.
func (r *row) leased() int64 { return cmp.Or(r.leaseVersion, r.Version) }

// claim returns the rows claimed, oldest due first, and those that it gave up on. Rows
// in held are locked by others.
func (m *model) claim(opts outbox.ClaimOptions, held ...outbox.Key) (took []claimed, failed []*row) {
	var due []*row
	for _, r := range m.rows {
		leased := r.token != outbox.Token{}
		switch {
		case slices.Contains(held, r.Key()):
		case r.Status != outbox.StatusPending || r.due().After(m.clock()) || r.due().Before(opts.Since):
		case leased && r.leaseUntil.After(m.clock()) && !r.claimedBy(opts):
		case opts.Types != nil && !slices.Contains(opts.Types, r.Type):
		case (leased || opts.Repeated) && slices.Contains(opts.Except, r.ID):
			m.reach("claim: excepted")
		case opts.Suspects == outbox.LeaveSuspects && m.suspect(r, opts):
			m.reach("claim: left, a suspect")
		default:
			due = append(due, r)
		}
	}
	slices.SortFunc(due, func(a, b *row) int { return cmp.Or(a.due().Compare(b.due()), cmp.Compare(a.ID, b.ID)) })
	suspects := 0
	for _, r := range due[:min(opts.Limit, len(due))] {
		suspect := m.suspect(r, opts)
		if suspect {
			if suspects++; suspects > 1 && opts.Suspects == outbox.OneSuspect {
				m.reach("claim: left, a second suspect")
				continue
			}
		}
		if why := m.givenUp(r, opts); why != "" {
			r.Status, r.LastError = outbox.StatusFailed, why
			r.LockedAt, r.leaseUntil, r.token, r.leaseVersion = time.Time{}, time.Time{}, outbox.Token{}, 0
			failed = append(failed, r)
			m.reach("claim: " + failedFor.FindString(why))
			continue
		}
		took = append(took, m.take(r, opts, suspect))
	}
	return took, failed
}

// take leases r.
func (m *model) take(r *row, opts outbox.ClaimOptions, suspect bool) claimed {
	repeated, asks := r.claimedBy(opts), m.asks(r, opts)
	// A delivery left no result: it was another claim's, or was already when this claim ran first.
	unknown := r.token != outbox.Token{} && !repeated || r.token[len(r.token)-1]&resumed != 0 && repeated
	switch {
	case m.countsAnew(r, opts):
		m.reach("claim: counts anew")
		r.Attempts = 1
	case repeated:
		m.reach("claim: repeated")
	default:
		m.reach("claim: one more attempt")
		r.Attempts++
	}
	c := claimed{row: r, token: opts.Token, expired: m.late(r)}
	former := r.leased()
	r.leaseVersion = r.Version
	if unknown && (asks || former == r.Version) {
		c.suspect = suspect || repeated && r.token[len(r.token)-1]&suspected != 0
		c.token, c.unknown, r.leaseVersion = marked(c.token, resumed), former, former
		m.reach("claim: told of an unknown outcome")
		if asks {
			m.reach("claim: to ask")
		}
		if c.suspect {
			m.reach("claim: a suspect")
			c.token = marked(c.token, suspected)
		}
	}
	r.token = c.token
	m.tell(r, &r.LockedAt, 0)
	m.tell(r, &r.leaseUntil, opts.Lease)
	return c
}

// claimedBy reports whether r was claimed by a call with the same token, and is still.
func (r *row) claimedBy(opts outbox.ClaimOptions) bool {
	return marked(r.token, resumed|suspected) == marked(opts.Token, resumed|suspected) && !r.leaseUntil.IsZero()
}

func (m *model) late(r *row) bool { return !r.NotAfter.IsZero() && !r.NotAfter.After(m.clock()) }

// failedFor is what a claim fails a row for, without what is different for each.
var failedFor = regexp.MustCompile(`^(expired: not delivered before|outcome unknown|out of attempts(: the last delivery left no result)?)`)

// expiredText has the time behind it.
const expiredText = "expired: not delivered before "

func (m *model) givenUp(r *row, opts outbox.ClaimOptions) string {
	unknown := r.token != outbox.Token{}
	switch {
	case r.claimedBy(opts):
	case unknown && m.asks(r, opts):
	case opts.AtMostOnce && unknown && r.leased() == r.Version:
		return "outcome unknown: a delivery was begun and left no result, it may have reached the provider"
	case m.late(r):
		return expiredText
	case opts.MaxAttempts > 0 && r.Attempts >= opts.MaxAttempts && !m.countsAnew(r, opts):
		why := "out of attempts"
		if unknown {
			why += ": the last delivery left no result"
		}
		if r.LastError != "" {
			why += "; before that: " + r.LastError
		}
		return why
	}
	return ""
}

// suspect: the last lease ran out, and one attempt is left.
func (m *model) suspect(r *row, opts outbox.ClaimOptions) bool {
	return r.token != outbox.Token{} && !r.leaseUntil.IsZero() && !r.claimedBy(opts) &&
		r.Attempts == opts.MaxAttempts-1 && !m.countsAnew(r, opts) && m.givenUp(r, opts) == ""
}

// countsAnew: the delivery that left no result was of older content.
func (m *model) countsAnew(r *row, opts outbox.ClaimOptions) bool {
	return r.token != outbox.Token{} && r.leased() != r.Version && !m.asks(r, opts)
}

// asks: the claim is to ask about what is unknown, and goes on asking.
func (m *model) asks(r *row, opts outbox.ClaimOptions) bool {
	return opts.Reconcile && (opts.MaxAttempts == 0 || r.Attempts <= opts.MaxAttempts ||
		r.claimedBy(opts) && r.token[len(r.token)-1]&resumed != 0)
}

// held returns the row of a lease if its token still matches.
func (m *model) held(l outbox.Lease) *row {
	r := m.byID(l.ID)
	if r == nil || r.Status != outbox.StatusPending || r.token != l.Token || l.Token == (outbox.Token{}) {
		return nil
	}
	return r
}

func (m *model) extend(l outbox.Lease, d time.Duration) outbox.LeaseResult {
	r := m.held(l)
	if r == nil {
		m.reach("extend: stale")
		return outbox.LeaseStale
	}
	if m.inFlight(r) {
		m.reach("extend: in time")
	} else {
		m.reach("extend: after its end")
	}
	m.tell(r, &r.leaseUntil, d)
	if r.LockedAt.IsZero() {
		m.tell(r, &r.LockedAt, 0)
	}
	return outbox.LeaseDone
}

// nobodys stands for a token that only the database knows.
var nobodys = outbox.Token{1}

func (m *model) settle(s outbox.Settlement) outbox.LeaseResult {
	r := m.held(s.Lease)
	if r == nil {
		m.reach("settle: stale")
		return outbox.LeaseStale
	}
	superseded := r.leased() != r.Version && !s.Asked
	version := r.leased()
	branch := "settle: " + string(s.Verdict)
	if superseded {
		branch += ", refreshed in flight"
	}
	m.reach(branch)
	if s.Unknown {
		m.reach("settle: unknown")
	}
	if s.Asked {
		m.reach("settle: asked")
	}
	if s.Verdict == outbox.HandedBack {
		if !r.LockedAt.IsZero() && r.Attempts > 0 {
			r.Attempts--
		}
	} else {
		r.Attempts = max(r.Attempts, 1)
	}
	if superseded {
		r.Attempts = 0
	}
	switch s.Verdict {
	case outbox.Delivered:
		r.SentVersion, r.Receipt = version, s.Receipt
		if !superseded {
			r.Status, r.NextRetryAt = outbox.StatusSent, time.Time{}
			m.tell(r, &r.SentAt, 0)
		}
	case outbox.Failed:
		r.LastError = s.Error
		if !superseded {
			r.Status, r.NextRetryAt = outbox.StatusFailed, time.Time{}
		}
	case outbox.Retry:
		r.LastError = s.Error
		switch {
		case superseded:
		case r.NextRetryAt.After(m.clock().Add(s.RetryIn)):
			m.reach("settle: retry, put off by a refresh")
		default:
			if s.RetryIn == 0 {
				m.reach("settle: retry, at once")
			}
			m.tell(r, &r.NextRetryAt, s.RetryIn)
		}
	}
	r.LockedAt, r.leaseUntil = time.Time{}, time.Time{}
	if s.Unknown {
		r.token, r.spent = nobodys, s.Token
	} else {
		r.token, r.leaseVersion = outbox.Token{}, 0
	}
	if superseded && s.Verdict != outbox.HandedBack {
		return outbox.LeaseSuperseded
	}
	return outbox.LeaseDone
}

func (m *model) requeue(keys []outbox.Key) (n int) {
	for _, key := range keys {
		if r := m.rows[key]; r != nil && m.requeueRow(r) {
			n++
		}
	}
	return n
}

func (m *model) requeueRow(r *row) bool {
	switch {
	case r.Status == outbox.StatusPending:
		m.reach("requeue: pending, left")
		return false
	case !r.purged.IsZero():
		m.reach("requeue: purged, left")
		return false
	}
	m.reach("requeue: " + string(r.Status))
	if r.Status == outbox.StatusSent {
		r.SentVersion, r.Receipt, r.SentAt = 0, "", time.Time{}
	}
	if m.late(r) {
		m.reach("requeue: too late")
		r.NotAfter = time.Time{}
	}
	r.Status, r.Attempts, r.NextRetryAt, r.LockedAt = outbox.StatusPending, 0, time.Time{}, time.Time{}
	r.leaseUntil, r.token, r.leaseVersion = time.Time{}, outbox.Token{}, 0
	return true
}

// matching returns the rows that match f, by rising id, whatever its limit.
func (m *model) matching(f outbox.Filter) (rows []*row) {
	for _, r := range m.rows {
		switch {
		case f.Status != "" && r.Status != f.Status:
		case f.Types != nil && !slices.Contains(f.Types, r.Type):
		case f.BookingID != 0 && r.BookingID != f.BookingID:
		case f.OlderThan != 0 && r.CreatedAt.After(m.clock().Add(-f.OlderThan)):
		case f.NewerThan != 0 && !r.CreatedAt.After(m.clock().Add(-f.NewerThan)):
		case r.ID <= f.After:
		default:
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b *row) int { return cmp.Compare(a.ID, b.ID) })
	return rows
}

func (m *model) list(f outbox.Filter) []*row {
	rows := m.matching(f)
	return rows[:min(len(rows), cmp.Or(f.Limit, len(rows)))]
}

func (m *model) requeueMatching(f outbox.Filter) (requeued []*row) {
	for _, r := range m.matching(f) {
		if (f.Limit == 0 || len(requeued) < f.Limit) && m.requeueRow(r) {
			m.reach("requeue: by a filter")
			requeued = append(requeued, r)
		}
	}
	return requeued
}

func (m *model) stats(at time.Time) outbox.Stats {
	st := outbox.Stats{At: at, Types: map[string]outbox.TypeStats{}}
	for _, r := range m.rows {
		if r.Status == outbox.StatusSent {
			st.Sent++
			continue
		}
		of := st.Types[r.Type]
		for _, c := range []*outbox.TypeStats{&of, &st.TypeStats} {
			switch {
			case r.Status == outbox.StatusFailed:
				c.Failed++
				continue
			case m.inFlight(r):
				m.reach("stats: in flight")
				c.InFlight++
			case !r.due().After(m.clock()):
				m.reach("stats: due")
				c.Due++
				c.OldestDue = max(c.OldestDue, at.Sub(r.due()))
			case c.NextDue.IsZero() || r.due().Before(c.NextDue):
				m.reach("stats: due later")
				c.NextDue = r.due()
			}
			c.Pending++
		}
		st.Types[r.Type] = of
	}
	return st
}

// purge purges what is not locked by others.
func (m *model) purge(opts outbox.PurgeOptions, held ...outbox.Key) (n int) {
	for key, r := range m.rows {
		switch {
		case slices.Contains(held, key) || opts.Types != nil && !slices.Contains(opts.Types, r.Type):
		case r.Status != outbox.StatusSent || r.SentAt.IsZero() || r.SentAt.After(m.clock().Add(-opts.OlderThan)):
		case opts.Delete:
			m.reach("purge: deleted")
			delete(m.rows, key)
			n++
		case r.purged.IsZero():
			m.reach("purge: emptied")
			r.Payload, r.LastError, r.Receipt = nil, "", ""
			m.tell(r, &r.purged, 0)
			n++
		}
	}
	return n
}

// look compares the rows of the table, read at now, with the model, and takes over what only
// the database knows: ids, and what its clock said. It returns what differs, if anything.
func (m *model) look(table map[outbox.Key]*row, now time.Time) string {
	for _, key := range slices.SortedFunc(maps.Keys(m.rows), func(a, b outbox.Key) int { return cmp.Compare(a.String(), b.String()) }) {
		want, got := m.rows[key], table[key]
		if got == nil {
			return fmt.Sprintf("%s is not in the table, should be\n%s", key, m.show(want))
		}
		if differs := m.meet(want, got, now); differs != "" {
			return differs
		}
		want.told, want.respelled = [7]bool{}, false
	}
	for key, got := range table {
		if m.rows[key] == nil {
			return fmt.Sprintf("%s is in the table and should not be:\n%s", key, m.show(got))
		}
	}
	return ""
}

// meet does that for one row.
func (m *model) meet(want, got *row, now time.Time) string {
	if want.ID == 0 && m.byID(got.ID) == nil {
		want.ID = got.ID
	}
	if want.LastError == expiredText && strings.HasPrefix(got.LastError, expiredText) {
		want.LastError = got.LastError
	}
	if want.respelled && sameJSON(want.Payload, got.Payload) {
		want.Payload = got.Payload
	}
	for i, at := range want.times() {
		if read := *got.times()[i]; want.told[i] && !read.Before(*at) && !read.After(at.Add(now.Sub(m.now))) {
			*at = read
		}
	}
	if want.token == nobodys && got.token != (outbox.Token{}) && got.token != want.spent {
		want.token = got.token
	}
	got.told, got.respelled, got.spent = want.told, want.respelled, want.spent
	if !reflect.DeepEqual(want, got) {
		return fmt.Sprintf("%s is\n%s\nand should be\n%s", want.Key(), m.show(got), m.show(want))
	}
	return ""
}

var timestamp = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*`)

// show renders a row in the same words in each run: times are in hours from now.
func (m *model) show(r *row) string {
	at := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return fmt.Sprintf("%+.0fh", t.Sub(m.now).Hours()+0)
	}
	return fmt.Sprintf("\tid %d recruiter %d payload %s correlation %q %s attempts %d version %d sent %d receipt %q error %q\n"+
		"\tcreated %s locked %s due %s not after %s sent %s token %s until %s version %d purged %s",
		r.ID, r.RecruiterTgID, r.Payload, r.CorrelationID, r.Status, r.Attempts, r.Version, r.SentVersion, r.Receipt,
		timestamp.ReplaceAllString(r.LastError, "TIME"), at(r.CreatedAt), at(r.LockedAt), at(r.NextRetryAt), at(r.NotAfter), at(r.SentAt),
		r.token, at(r.leaseUntil), r.leaseVersion, at(r.purged))
}

// tableSQL reads the clock, and all rows; their columns are NULL if there are none.
const tableSQL = `SELECT clock_timestamp(), id, type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json::text, correlation_id,
	status, attempts, version, sent_version, receipt, last_error, lease_token, lease_version,
	created_at, locked_at, next_retry_at, not_after, sent_at, lease_until, purged_at
FROM (SELECT) AS one LEFT JOIN outbox_notifications ON true ORDER BY id`

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// readTable reads all rows, and the time. Two rows of a key are an error.
func readTable(ctx context.Context, q querier) (table map[outbox.Key]*row, now time.Time, err error) {
	table = map[outbox.Key]*row{}
	rows, err := q.Query(ctx, tableSQL)
	if err != nil {
		return nil, now, err
	}
	defer rows.Close()
	for rows.Next() {
		var r row
		var id, booking, candidate, recruiter, attempts, version, sentVersion, leaseVersion *int64
		var typ, payload, correlation, status, receipt, lastError *string
		var token *[16]byte
		times := make([]*time.Time, len(r.times()))
		into := []any{&now, &id, &typ, &booking, &candidate, &recruiter, &payload, &correlation,
			&status, &attempts, &version, &sentVersion, &receipt, &lastError, &token, &leaseVersion}
		for i := range times {
			into = append(into, &times[i])
		}
		if err := rows.Scan(into...); err != nil {
			return nil, now, err
		}
		if id == nil {
			break
		}
		r.Notification = outbox.Notification{ID: *id, Type: *typ, BookingID: zero(booking), CandidateTgID: zero(candidate),
			RecruiterTgID: zero(recruiter), CorrelationID: zero(correlation), Status: outbox.Status(*status), Attempts: int(*attempts),
			Version: *version, SentVersion: *sentVersion, Receipt: zero(receipt), LastError: zero(lastError)}
		if payload != nil {
			r.Payload = json.RawMessage(*payload)
		}
		r.token, r.leaseVersion = zero(token), zero(leaseVersion)
		for i, at := range r.times() {
			if times[i] != nil {
				*at = times[i].UTC()
			}
		}
		if table[r.Key()] != nil {
			return nil, now, fmt.Errorf("two rows of %s", r.Key())
		}
		table[r.Key()] = &r
	}
	return table, now.UTC(), rows.Err()
}

// zero is *v, and the zero value for NULL.
func zero[T any](v *T) (z T) {
	if v != nil {
		z = *v
	}
	return z
}

// machine does the same to a database and to a model.
type machine struct {
	*model
	db     *pgtest.DB
	store  *outbox.PGStore
	keys   *rapid.Generator[outbox.Key]
	leases []outbox.Lease // all that were ever handed out, and are not forgotten
	tokens int            // how many claims had a token of their own
	lost   bool           // the answer to the last claim, which may be repeated
	looked bool           // at the table as the last step left it
}

// Few keys, of all shapes, so that most calls meet a row. The first three are of one shape.
var modelKeys = []outbox.Key{
	{Type: "a", BookingID: 1, CandidateTgID: 2},
	{Type: "a", BookingID: 1, CandidateTgID: 3},
	{Type: "b", BookingID: 1, CandidateTgID: 2},
	{Type: "a", BookingID: 1},
	{Type: "b", CandidateTgID: 2},
	{Type: "b"},
}

// What is drawn. Payloads are two contents, each spelled in two ways, and nothing at all.
var (
	drawPayload = rapid.SampledFrom([]any{nil, json.RawMessage(` {} `), json.RawMessage(`null`),
		json.RawMessage(`{"a":1,"b":[2]}`), json.RawMessage(`{ "b" : [2.0], "a" : 1 }`),
		json.RawMessage(`"x"`), json.RawMessage(`"\u0078"`), json.RawMessage(`[1]`)})
	drawText  = rapid.SampledFrom([]string{"", "", "one", "two"})
	drawTypes = rapid.SampledFrom([][]string{nil, nil, {"a"}, {"b", "c"}})

	drawSuspects = rapid.SampledFrom([]outbox.Suspects{outbox.OneSuspect, outbox.LeaveSuspects, outbox.TakeSuspects})
)

// once is true once in n times.
func once(t *rapid.T, n int, name string) bool { return rapid.IntRange(1, n).Draw(t, name) == n }

func drawHours(t *rapid.T, from, to int, name string) time.Duration {
	return time.Duration(rapid.IntRange(from, to).Draw(t, name)) * time.Hour
}

// drawTime draws a time some hours from now, or none.
func (m *model) drawTime(t *rapid.T, from, to int, name string) time.Time {
	if !once(t, 4, name+" given") {
		return time.Time{}
	}
	return m.now.Add(drawHours(t, from, to, name))
}

func (m *model) drawNew(t *rapid.T, key outbox.Key) outbox.NewNotification {
	n := outbox.NewNotification{Type: key.Type, BookingID: key.BookingID, CandidateTgID: key.CandidateTgID,
		RecruiterTgID: rapid.Int64Range(0, 2).Draw(t, "recruiter"), Payload: drawPayload.Draw(t, "payload"),
		CorrelationID: drawText.Draw(t, "correlation id"), NotBefore: m.drawTime(t, -2, 3, "not before")}
	// Most are in time for long enough to meet another end.
	from, to := 3, 6
	if once(t, 4, "soon too late") {
		from, to = -2, 3
		if !n.NotBefore.IsZero() {
			from = int(n.NotBefore.Sub(m.now) / time.Hour)
		}
	}
	n.NotAfter = m.drawTime(t, from, to, "not after")
	return n
}

// newMachine empties the table.
func newMachine(t *rapid.T, db *pgtest.DB, guess int, keys []outbox.Key) *machine {
	_, err := db.Exec(t.Context(), `WITH gone AS (DELETE FROM outbox_notifications) SELECT setval(pg_get_serial_sequence('outbox_notifications', 'id'), 1, false)`)
	require.NoError(t, err)
	m := &machine{model: newModel(time.Time{}), db: db, keys: rapid.SampledFrom(keys)}
	m.store, err = outbox.NewPGStore(db.Pool, outbox.Config{Logger: discard}) // that has seen nothing yet
	require.NoError(t, err)
	if guess > 0 {
		m.store.AlwaysGuess(guess)
	}
	m.look(t)
	return m
}

// look fails the test where the table is not as the model has it.
func (m *machine) look(t *rapid.T) {
	m.now = m.lookIn(t, m.db)
	m.looked = true
}

// lookIn is look at the table as q sees it, which may be in a transaction that began
// before the last look.
func (m *machine) lookIn(t *rapid.T, q querier) time.Time {
	table, now, err := readTable(t.Context(), q)
	require.NoError(t, err)
	if differs := m.model.look(table, now); differs != "" {
		t.Fatal(differs)
	}
	return now
}

// addIn adds one or a batch in a transaction. After a look, compare compares what came back.
func (m *machine) addIn(t *rapid.T, tx pgx.Tx, batch bool) (compare func()) {
	if !batch {
		return m.addOne(t, tx, m.drawNew(t, m.keys.Draw(t, "key")))
	}
	ns := make([]outbox.NewNotification, rapid.IntRange(1, 5).Draw(t, "batch of"))
	for i := range ns {
		ns[i] = m.drawNew(t, m.keys.Draw(t, "key"))
	}
	got, err := m.store.AddNotifications(t.Context(), tx, ns)
	require.NoError(t, err)
	want := m.addMany(ns)
	return func() {
		require.Len(t, got, len(ns))
		for i, w := range want {
			m.same(t, w.result(), got[i])
		}
	}
}

func (m *machine) addOne(t *rapid.T, tx pgx.Tx, n outbox.NewNotification) (compare func()) {
	got, err := m.store.AddNotification(t.Context(), tx, n)
	require.NoError(t, err)
	want := m.add(n)
	return func() { m.same(t, want.result(), got) }
}

// same fails the test if a call returned something else than it should have.
func (m *machine) same(t *rapid.T, want, got any) {
	if !reflect.DeepEqual(want, got) {
		t.Fatalf("the call returned\n\t%s\nand should have\n\t%s", m.text(got), m.text(want))
	}
}

// text renders v with times in whole hours from now, so that it is the same in each run.
func (m *machine) text(v any) string {
	return timestamp.ReplaceAllStringFunc(fmt.Sprintf("%+v", v), func(s string) string {
		at, err := time.Parse("2006-01-02 15:04:05", s[:19])
		if err != nil || at.Year() == 1 {
			return s
		}
		return fmt.Sprintf("%+.0fh", at.Sub(m.now).Hours())
	})
}

// transaction runs one to three adds and commits, or rolls back.
func (m *machine) transaction(t *rapid.T) {
	before := m.clone()
	tx, err := m.db.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	for range rapid.IntRange(1, 3).Draw(t, "adds") {
		compare := m.addIn(t, tx, rapid.Bool().Draw(t, "batch"))
		m.lookIn(t, tx)
		compare()
	}
	if rapid.Bool().Draw(t, "commit") {
		require.NoError(t, tx.Commit(t.Context()))
	} else {
		require.NoError(t, tx.Rollback(t.Context()))
		m.model = before
	}
}

// committed runs one add in a transaction of its own.
func (m *machine) committed(t *rapid.T, add func(pgx.Tx) (compare func())) {
	tx, err := m.db.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	compare := add(tx)
	require.NoError(t, tx.Commit(t.Context()))
	m.look(t)
	compare()
}

func (m *machine) oneAdd(t *rapid.T) {
	m.committed(t, func(tx pgx.Tx) func() { return m.addIn(t, tx, once(t, 4, "batch")) })
}

// flying are the rows that are being delivered, by rising id.
func (m *machine) flying() []*row {
	return slices.DeleteFunc(m.matching(outbox.Filter{Status: outbox.StatusPending}), func(r *row) bool { return !m.inFlight(r) })
}

// addInFlight adds again what is being delivered, mostly with other content.
func (m *machine) addInFlight(t *rapid.T) {
	r := rapid.SampledFrom(m.flying()).Draw(t, "row")
	n := m.drawNew(t, r.Key())
	if once(t, 2, "same content") {
		n.RecruiterTgID, n.Payload = 0, nil
		if !once(t, 4, "not put off") {
			n.NotBefore, n.NotAfter = m.now.Add(drawHours(t, 2, 5, "for")), time.Time{}
		}
	} else {
		n.RecruiterTgID = r.RecruiterTgID + 1
	}
	m.committed(t, func(tx pgx.Tx) func() { return m.addOne(t, tx, n) })
}

// current are the leases that their rows still bear.
func (m *machine) current() []outbox.Lease {
	return slices.DeleteFunc(slices.Clone(m.leases), func(l outbox.Lease) bool { return m.held(l) == nil })
}

// someLeases draws some leases, most of them such as the row still bears. A stale and a
// current one of the same row may be among them.
func (m *machine) someLeases(t *rapid.T) []outbox.Lease {
	if len(m.leases) == 0 {
		return nil // a call with none
	}
	current := m.current()
	var some []outbox.Lease
	for range rapid.IntRange(1, 3).Draw(t, "leases") {
		from := current
		if len(current) == 0 || once(t, 4, "any lease") {
			from = m.leases
		}
		// The latest are the likeliest to be worth something.
		back := min(rapid.IntRange(0, 5).Draw(t, "back"), len(from)-1)
		if l := from[len(from)-1-back]; !slices.Contains(some, l) {
			some = append(some, l)
		}
	}
	return some
}

// drawClaim draws options, most of them plain: what an option leaves out reaches no
// other rule.
func (m *machine) drawClaim(t *rapid.T) outbox.ClaimOptions {
	opts := outbox.ClaimOptions{
		Limit:       100,
		Lease:       drawHours(t, 1, 3, "lease"),
		MaxAttempts: rapid.SampledFrom([]int{1, 2, 0, 3, 1}).Draw(t, "max attempts"),
		InTurn:      rapid.Bool().Draw(t, "in turn"),
	}
	if once(t, 4, "not plain") {
		opts.Limit = rapid.SampledFrom([]int{1, 2, 3, 100}).Draw(t, "limit")
		opts.Types = drawTypes.Draw(t, "types")
		opts.AtMostOnce = rapid.Bool().Draw(t, "at most once")
		opts.Reconcile = rapid.Bool().Draw(t, "reconcile")
		opts.Suspects = drawSuspects.Draw(t, "suspects")
		opts.Since = m.drawTime(t, -3, 3, "since")
	}
	if once(t, 6, "except") {
		for _, l := range m.someLeases(t) {
			opts.Except = append(opts.Except, l.ID)
		}
	}
	if opts.Repeated = m.lost && !once(t, 4, "another token"); !opts.Repeated {
		m.tokens++
	}
	opts.Token = outbox.Token{byte(m.tokens >> 8), byte(m.tokens)}
	return opts
}

func (m *machine) claim(t *rapid.T) { m.claimWith(t, m.drawClaim(t)) }

// claimTried claims with too few attempts for what was tried.
func (m *machine) claimTried(t *rapid.T) {
	opts := m.drawClaim(t)
	opts.MaxAttempts = 1
	m.claimWith(t, opts)
}

func (m *machine) claimWith(t *rapid.T, opts outbox.ClaimOptions) {
	got, err := m.store.Claim(t.Context(), opts)
	require.NoError(t, err)
	took, gaveUp := m.model.claim(opts)
	m.look(t)
	m.lost = once(t, 4, "lost")

	require.False(t, got.Busy)
	require.Len(t, got.Claimed, len(took), "claimed")
	last := time.Time{}
	for i, c := range took {
		m.same(t, c.result(), got.Claimed[i])
		if !m.lost {
			m.leases = append(m.leases, c.result().Lease)
		}
		last = later(last, c.row.due())
	}
	require.Len(t, got.Failed, len(gaveUp), "failed")
	slices.SortFunc(got.Failed, func(a, b outbox.Notification) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(gaveUp, func(a, b *row) int { return cmp.Compare(a.ID, b.ID) })
	for i, r := range gaveUp {
		m.same(t, r.Notification, got.Failed[i])
		last = later(last, r.due())
	}
	m.same(t, last, got.Last)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// die is what becomes of deliveries whose process dies: nobody settles them, the leases
// end, and another claims, with few attempts.
func (m *machine) die(t *rapid.T) {
	if once(t, 3, "refreshed before") {
		m.addInFlight(t)
	}
	m.leases, m.lost = nil, false
	m.passFor(t, 3*time.Hour) // as long as the longest lease
	opts := m.drawClaim(t)
	opts.MaxAttempts = rapid.IntRange(1, 2).Draw(t, "few attempts")
	opts.AtMostOnce, opts.Reconcile = once(t, 4, "at most once"), once(t, 4, "reconcile")
	opts.Suspects = drawSuspects.Draw(t, "suspects")
	m.claimWith(t, opts)
}

func (m *machine) extend(t *rapid.T) {
	leases, d := m.someLeases(t), drawHours(t, 1, 3, "for")
	got, err := m.store.Extend(t.Context(), leases, d)
	require.NoError(t, err)
	var want []outbox.LeaseResult
	for _, l := range leases {
		want = append(want, m.model.extend(l, d))
	}
	m.same(t, want, got)
}

func (m *machine) drawSettlement(t *rapid.T, l outbox.Lease) outbox.Settlement {
	s := outbox.Settlement{Lease: l,
		Verdict: rapid.SampledFrom([]outbox.Verdict{outbox.Retry, outbox.Delivered, outbox.Failed, outbox.HandedBack, outbox.Retry}).Draw(t, "verdict")}
	switch s.Verdict {
	case outbox.Delivered:
		s.Receipt = drawText.Draw(t, "receipt")
	case outbox.Retry:
		s.RetryIn = drawHours(t, 0, 3, "retry in")
		s.Error = drawText.Draw(t, "error")
		s.Unknown = rapid.Bool().Draw(t, "unknown")
		s.Asked = s.Unknown && rapid.Bool().Draw(t, "asked")
	case outbox.Failed:
		s.Error = drawText.Draw(t, "error")
	case outbox.HandedBack:
		s.Unknown = rapid.Bool().Draw(t, "unknown")
	}
	return s
}

func (m *machine) settle(t *rapid.T) {
	var sts []outbox.Settlement
	for _, l := range m.someLeases(t) {
		sts = append(sts, m.drawSettlement(t, l))
	}
	m.settleAs(t, sts)
}

// refreshed are the current leases of rows that were refreshed in flight.
func (m *machine) refreshed() []outbox.Lease {
	return slices.DeleteFunc(m.current(), func(l outbox.Lease) bool {
		r := m.held(l)
		return r.leased() == r.Version && !r.NextRetryAt.After(m.clock())
	})
}

func (m *machine) settleRefreshed(t *rapid.T) {
	l := rapid.SampledFrom(m.refreshed()).Draw(t, "lease")
	m.settleAs(t, []outbox.Settlement{m.drawSettlement(t, l)})
}

func (m *machine) settleAs(t *rapid.T, sts []outbox.Settlement) {
	got, err := m.store.Settle(t.Context(), sts)
	require.NoError(t, err)
	var want []outbox.LeaseResult
	for _, s := range sts {
		want = append(want, m.model.settle(s))
	}
	m.same(t, want, got)
}

// deliver settles the latest lease as delivered.
func (m *machine) deliver(t *rapid.T) {
	current := m.current()
	if len(current) == 0 {
		return
	}
	m.settleAs(t, []outbox.Settlement{{Lease: current[len(current)-1], Verdict: outbox.Delivered, Receipt: "r"}})
}

func (m *machine) requeue(t *rapid.T) {
	keys := rapid.SliceOfN(m.keys, 1, 3).Draw(t, "keys")
	got, err := m.store.Requeue(t.Context(), keys...)
	require.NoError(t, err)
	m.same(t, m.model.requeue(keys), got)
}

func (m *machine) drawFilter(t *rapid.T, statuses ...outbox.Status) outbox.Filter {
	f := outbox.Filter{Status: rapid.SampledFrom(statuses).Draw(t, "status"), Limit: rapid.IntRange(0, 2).Draw(t, "limit")}
	switch rapid.IntRange(0, 5).Draw(t, "by") {
	case 1:
		f.Types = drawTypes.Draw(t, "types")
	case 2:
		f.BookingID = 1
	case 3:
		f.OlderThan = drawHours(t, 1, 3, "older than")
	case 4:
		f.NewerThan = drawHours(t, 1, 3, "newer than")
	case 5:
		f.After = rapid.Int64Range(1, 4).Draw(t, "after")
	}
	return f
}

func (m *machine) list(t *rapid.T) {
	f := m.drawFilter(t, "", outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed)
	got, err := m.store.List(t.Context(), f)
	require.NoError(t, err)
	m.same(t, notifications(m.model.list(f)), got)
}

func (m *machine) requeueMatching(t *rapid.T) {
	f := m.drawFilter(t, outbox.StatusFailed, outbox.StatusSent)
	got, err := m.store.RequeueMatching(t.Context(), f)
	require.NoError(t, err)
	m.same(t, notifications(m.model.requeueMatching(f)), got)
}

func notifications(rows []*row) (ns []outbox.Notification) {
	for _, r := range rows {
		ns = append(ns, r.Notification)
	}
	return ns
}

func (m *machine) stats(t *rapid.T) {
	before := m.now
	got, err := m.store.Stats(t.Context())
	require.NoError(t, err)
	m.look(t)
	require.False(t, got.At.Before(before) || got.At.After(m.now), "of another time")
	m.same(t, m.model.stats(got.At), got)
}

func drawPurge(t *rapid.T) outbox.PurgeOptions {
	return outbox.PurgeOptions{OlderThan: drawHours(t, 1, 3, "older than"), BatchSize: rapid.IntRange(0, 2).Draw(t, "batch size"),
		Types: drawTypes.Draw(t, "types"), Delete: once(t, 3, "delete")}
}

func (m *machine) purge(t *rapid.T) {
	opts := drawPurge(t)
	got, err := m.store.Purge(t.Context(), opts)
	require.NoError(t, err)
	m.same(t, m.model.purge(opts), got)
}

// lockByHand is what another service does that knows no leases.
func (m *machine) lockByHand(t *rapid.T) {
	r := m.rows[m.keys.Draw(t, "key")]
	if r == nil || r.Status != outbox.StatusPending {
		return
	}
	_, err := m.db.Exec(t.Context(), "UPDATE outbox_notifications SET locked_at = now() WHERE id = $1", r.ID)
	require.NoError(t, err)
	m.tell(r, &r.LockedAt, 0)
}

// settleByHand is what another service does, or an operator.
func (m *machine) settleByHand(t *rapid.T) {
	r := m.rows[m.keys.Draw(t, "key")]
	if r == nil {
		return
	}
	r.Status = rapid.SampledFrom([]outbox.Status{outbox.StatusSent, outbox.StatusFailed}).Draw(t, "status")
	_, err := m.db.Exec(t.Context(), "UPDATE outbox_notifications SET status = $1 WHERE id = $2", r.Status, r.ID)
	require.NoError(t, err)
	m.reach("by hand: settled")
}

// passHours makes leases run out and rows fall due.
func (m *machine) passHours(t *rapid.T) { m.passFor(t, drawHours(t, 1, 3, "hours")) }

func (m *machine) passFor(t *rapid.T, d time.Duration) {
	_, err := m.db.Exec(t.Context(), `UPDATE outbox_notifications SET created_at = created_at - $1::interval, locked_at = locked_at - $1::interval,
		next_retry_at = next_retry_at - $1::interval, not_after = not_after - $1::interval, sent_at = sent_at - $1::interval,
		lease_until = lease_until - $1::interval, purged_at = purged_at - $1::interval`, d)
	require.NoError(t, err)
	m.pass(d)
}

// step does what is drawn, by weight, of what can be done, and seldom what comes to nothing.
// Rapid's own choice of one in many would be the first too often.
func (m *machine) step(t *rapid.T) {
	some := func(of func(*row) bool) bool {
		for _, r := range m.rows {
			if of(r) {
				return true
			}
		}
		return false
	}
	pending := func(r *row) bool { return r.Status == outbox.StatusPending }
	flying, held := len(m.flying()) > 0, len(m.current()) > 0
	settled := some(func(r *row) bool { return !pending(r) })
	isDue := func(r *row) bool { return pending(r) && !m.inFlight(r) && !r.due().After(m.clock()) }
	due, tried := some(isDue), some(func(r *row) bool { return isDue(r) && r.Attempts > 0 })
	ended := slices.ContainsFunc(m.current(), func(l outbox.Lease) bool { return !m.inFlight(m.held(l)) })
	ripe := some(func(r *row) bool { return !r.SentAt.IsZero() && r.SentAt.Before(m.clock().Add(-time.Hour)) })
	steps, byWeight := map[string]func(*rapid.T){}, []string{}
	for _, a := range []struct {
		weight int
		can    bool
		name   string
		do     func(*rapid.T)
	}{
		{4, true, "add", m.oneAdd},
		{8, flying, "add in flight", m.addInFlight},
		{8, due, "claim", m.claim},
		{1, true, "claim, perhaps nothing", m.claim},
		{4, tried, "claim what was tried", m.claimTried},
		{2, held, "deliver", m.deliver},
		{3, flying, "die", m.die},
		{2, held, "extend", m.extend},
		{4, ended, "extend, perhaps what has ended", m.extend},
		{1, true, "list", m.list},
		{1, some(pending), "lock by hand", m.lockByHand},
		{3, true, "pass hours", m.passHours},
		{6, ripe, "purge", m.purge},
		{2, settled, "requeue", m.requeue},
		{2, settled, "requeue matching", m.requeueMatching},
		{8, held, "settle", m.settle},
		{1, true, "settle, perhaps nothing", m.settle},
		{16, len(m.refreshed()) > 0, "settle what was refreshed", m.settleRefreshed},
		{1, once(t, 3, "by hand"), "settle by hand", m.settleByHand},
		{1, true, "stats", m.stats},
		{2, true, "transaction", m.transaction},
	} {
		if steps[a.name] = a.do; a.can {
			byWeight = append(byWeight, slices.Repeat([]string{a.name}, a.weight)...)
		}
	}
	name := rapid.Custom(func(t *rapid.T) string {
		for {
			i := 0
			for range bits.Len(uint(len(byWeight) - 1)) {
				if i *= 2; rapid.Bool().Draw(t, "bit") {
					i++
				}
			}
			if i < len(byWeight) {
				return byWeight[i]
			}
		}
	}).Draw(t, "step")
	m.reach("step: " + name)
	steps[name](t)
}

// branches are what TestModel reaches at least. A branch that is not reached is not tested.
var branches = map[string]int{
	"add: created":                         500,
	"add: refreshed":                       300,
	"add: in flight, same content":         150,
	"add: in flight, other content":        200,
	"add: after an unknown outcome":        60,
	"add: existing":                        300,
	"add: existing, emptied by a purge":    15,
	"batch: a key again":                   200,
	"claim: one more attempt":              600,
	"claim: counts anew":                   60,
	"claim: repeated":                      40,
	"claim: told of an unknown outcome":    100,
	"claim: to ask":                        30,
	"claim: a suspect":                     25,
	"claim: left, a suspect":               10,
	"claim: left, a second suspect":        1,
	"claim: excepted":                      8,
	"claim: expired: not delivered before": 80,
	"claim: outcome unknown":               20,
	"claim: out of attempts":               8,
	"claim: out of attempts: the last delivery left no result": 60,
	"extend: in time":                        40,
	"extend: after its end":                  8,
	"extend: stale":                          8,
	"settle: delivered":                      100,
	"settle: delivered, refreshed in flight": 20,
	"settle: retry":                          100,
	"settle: retry, refreshed in flight":     25,
	"settle: retry, at once":                 20,
	"settle: retry, put off by a refresh":    6,
	"settle: failed":                         40,
	"settle: failed, refreshed in flight":    12,
	"settle: handback":                       40,
	"settle: handback, refreshed in flight":  12,
	"settle: unknown":                        100,
	"settle: asked":                          30,
	"settle: stale":                          80,
	"requeue: sent":                          30,
	"requeue: failed":                        100,
	"requeue: too late":                      50,
	"requeue: pending, left":                 60,
	"requeue: purged, left":                  12,
	"requeue: by a filter":                   70,
	"purge: emptied":                         20,
	"purge: deleted":                         20,
	"stats: due":                             150,
	"stats: due later":                       50,
	"stats: in flight":                       120,
	"step: list":                             60,
	"step: lock by hand":                     60,
	"by hand: settled":                       15,
}

// TestModel does to the database and to a model of it what callers, relays and operators
// may do, in any order, and compares after each step what the call returned and
// all that is in the table. A failure tells the seed; -rapid.checks=N runs it for longer.
//
// Mutations that turn it red, in CI, all guesses where not said otherwise, most within 20
// checks:
//
//	no token in leasedSQL and after it
//	no t.lease_token = g.token
//	no coalesce, or no greatest, for next_retry_at in settleSQL
//	superseded but sent, or failed
//	attempts of what was superseded kept when it is handed back    not none
//	no out of attempts in givenUpSQL
//	countsAnewSQL false
//	a claim counts no attempt, or one again when repeated
//	Except ignored
//	OneSuspect ignored
//	f.version = 2 in fold
//	the lease cleared by a refresh in flight
//	the token of an ended lease cleared by a refresh
//	attempts reset in flight
//	version not bumped by refreshSQL
//	a sent row refreshed                                           not existing, which does not look
//	pending rows requeued, or with a filter those that were purged
//	a NotAfter that has passed kept by a requeue
//	last_error kept by a purge, or what was sent a moment ago purged
//	OlderThan ignored by List
//	what is in flight counted as due by Stats
func TestModel(t *testing.T) {
	t.Parallel()
	reached := newTally()
	t.Cleanup(func() { reached.atLeast(t, branches) })
	for guess, name := range guesses {
		t.Run("guess/"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			check(t, 1_000_000*uint64(guess+1), func(t *rapid.T) {
				m := newMachine(t, db, guess, modelKeys)
				m.reached = reached
				m.committed(t, func(tx pgx.Tx) func() { return m.addIn(t, tx, true) }) // something to begin with
				t.Repeat(map[string]func(*rapid.T){
					"": func(t *rapid.T) {
						if !m.looked {
							m.look(t)
						}
						m.looked = false
					},
					"do": m.step,
				})
			})
		})
	}
}
