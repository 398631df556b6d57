package ledger

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// History is all that is known of a run.
type History struct {
	Delivery   relay.Delivery // of all relays
	Reconciled bool           // the sender is a [relay.Reconciler]
	Lease      time.Duration  // of the relays; a caller that held a row for half of it is a fault

	MaxAttempts int // of the relays, where negative is none; 0: not known

	// Permanent are the errors by which the sender refuses for good. Any other fails a row
	// on its last attempt only. nil: they are not known.
	Permanent []string

	Records []Record              // of all journals, in any order
	Rows    []outbox.Notification // the table, at the end

	// Booked are the adds that callers wrote down in the same transactions, and so
	// decides what is unknown: Request, Key, ID, Version, Outcome and Content. nil: they
	// wrote nothing down, and what is unknown may have been committed or not.
	Booked []Commit

	Changes []Change // what was done to each row; nil: it was not recorded

	// Watched says that each [Trouble] is recorded, and each fault that kills or halts a
	// worker says so. With Changes it is then known whether a worker was kept from settling.
	Watched bool

	// Set by Survived.
	failedOver *Failover
	unsettled  map[int64][]string // tokens by row: their settlements were acknowledged, and lost

	Drained bool // the relays went on until nothing was left to deliver
}

// Kind is what a [Violation] violates.
type Kind string

const (
	Lost           Kind = "lost"                   // a committed add is neither delivered, superseded, failed with a reason, nor due
	Duplicate      Kind = "duplicate not allowed"  // one version accepted twice, and no fault explains it
	RolledBackSent Kind = "rolled-back add sent"   // accepted, and never committed
	TwoRows        Kind = "two rows of a key"      //
	OlderContent   Kind = "older content sent"     // newer content was committed before the claim began
	StalePassed    Kind = "stale settle passed"    // acknowledged, though another had claimed the row
	LeaseBroken    Kind = "lease not respected"    // by a claim or a refresh
	BrokenAdd      Kind = "add broke transaction"  // with 23505 or 25P02
	Impossible     Kind = "what nothing can cause" // all else that does not fit together
)

// Violation is one broken promise.
type Violation struct {
	Kind Kind
	Key  outbox.Key
	ID   int64
	Text string
}

func (v Violation) String() string {
	return fmt.Sprintf("%s: key %s, id %d: %s", v.Kind, v.Key, v.ID, v.Text)
}

// Verdict is what [Check] found.
type Verdict struct {
	Adds     int // committed
	Accepted int // messages, repeated ones too
	Sent     int // rows
	Failed   int // rows, with a reason
	Pending  int // rows, due at a known time

	DuplicatesAllowed   int // AtLeastOnce, with a fault between the sends
	DuplicatesStalled   int // of these, where that was not injected
	DuplicatesOnPurpose int // requeued or purged in between

	StaleRefused int

	// RequeuesAnswered are rows that were requeued and not sent again: the process
	// died, and the Reconciler, which is asked by version, knew the delivery before.
	RequeuesAnswered int

	Violations []Violation
}

// Count returns how many violations are of one kind.
func (v Verdict) Count(k Kind) int {
	n := 0
	for _, violation := range v.Violations {
		if violation.Kind == k {
			n++
		}
	}
	return n
}

// Of returns all records about a key, in order, for humans.
func (h History) Of(key outbox.Key, id int64) []string {
	type line struct {
		at   time.Time
		text string
	}
	var lines []line
	add := func(at time.Time, format string, args ...any) {
		lines = append(lines, line{at, at.Format("15:04:05.000000 ") + fmt.Sprintf(format, args...)})
	}
	span := func(from, to time.Time) string {
		if to.IsZero() {
			return "end not known"
		}
		return to.Sub(from).String()
	}
	workers := make(map[string]bool)
	var troubles []Trouble
	var first, last time.Time
	seen := func(at time.Time) {
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	ids := map[int64]bool{id: true}
	for _, r := range h.Records {
		if r.Commit != nil && r.Commit.Key == key && r.Commit.ID != 0 {
			ids[r.Commit.ID] = true
		}
	}
	for _, r := range h.Records {
		switch {
		case r.Accept != nil && r.Accept.Key == key:
			a := r.Accept
			workers[a.Worker] = true
			seen(a.Begun)
			seen(a.At)
			add(a.At, "accept of version %d as %q from %s, attempt %d, claimed %s, begun %s: %s", a.Version, a.Receipt, a.Worker, a.Attempts,
				a.Claimed.Format("05.000000"), a.Begun.Format("05.000000"), a.Content)
		case r.Commit != nil && r.Commit.Key == key:
			c := r.Commit
			seen(c.From)
			add(c.From, "%s by %s, request %s, took %s: %s version %d of id %d %s: %s", c.Result, c.Caller, c.Request, span(c.From, c.To),
				c.Outcome, c.Version, c.ID, c.Code, c.Content)
		case r.Claimed != nil && ids[r.Claimed.ID]:
			c := r.Claimed
			workers[c.Worker] = true
			add(c.From, "claim of version %d by %s, token %s, took %s", c.Version, c.Worker, c.Token, span(c.From, c.To))
		case r.Settled != nil && ids[r.Settled.ID]:
			s := r.Settled
			workers[s.Worker] = true
			seen(s.To)
			add(s.From, "settle of version %d by %s, token %s, took %s: %s %q: %s", s.Version, s.Worker, s.Token, span(s.From, s.To), s.Verdict, s.Receipt, s.Result)
		case r.Trouble != nil:
			troubles = append(troubles, *r.Trouble)
		case r.Requeue != nil && r.Requeue.Key == key:
			add(r.Requeue.From, "requeue, done %v, took %s", r.Requeue.Done, span(r.Requeue.From, r.Requeue.To))
		case r.Purge != nil && (r.Purge.Key == key || r.Purge.Key == outbox.Key{}):
			add(r.Purge.From, "purge, delete %v, took %s", r.Purge.Delete, span(r.Purge.From, r.Purge.To))
		}
	}
	for _, t := range troubles {
		if t.To.IsZero() && t.hasEnded(troubles) {
			continue
		}
		if workers[t.Worker] && !t.From.After(last) && (t.To.IsZero() || !t.To.Before(first)) {
			add(t.From, "trouble of %s to %s, took %s: %s", t.Worker, t.Call, span(t.From, t.To), t.Text)
		}
	}
	for _, f := range h.faults() {
		if f.concerns(key) && (f.Worker == "" || workers[f.Worker] || f.Key == key) && f.overlaps(first, last) {
			add(f.From, "fault %s of %q for %s", f.Kind, f.Worker, span(f.From, f.To))
		}
	}
	for _, c := range h.Changes {
		if ids[c.ID] {
			add(c.At, "row %s", c)
		}
	}
	for _, n := range h.Rows {
		if n.Key() == key {
			add(time.Now(), "at the end: id %d %s, version %d, sent version %d as %q, attempts %d, error %q, payload %s",
				n.ID, n.Status, n.Version, n.SentVersion, n.Receipt, n.Attempts, n.LastError, n.Payload)
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int { return a.at.Compare(b.at) })
	text := make([]string, len(lines))
	for i, l := range lines {
		text[i] = l.text
	}
	return text
}

func (f Fault) end() time.Time {
	if f.To.IsZero() {
		return f.From
	}
	return f.To
}

func (f Fault) concerns(key outbox.Key) bool { return f.Key == outbox.Key{} || f.Key == key }

// overlaps reports whether part of f was between from and to, both included.
func (f Fault) overlaps(from, to time.Time) bool { return !f.From.After(to) && !f.end().Before(from) }

// forever is when what had no end ends.
var forever = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

// attempt identifies one run of one add.
type attempt struct {
	add
	caller string
	from   int64
}

func attemptOf(c *Commit) attempt {
	return attempt{add{c.Request, c.Key}, c.Caller, c.From.UnixNano()}
}

// faults are those recorded, and the callers that held a row for long.
func (h History) faults() []Fault {
	var faults []Fault
	ended := make(map[attempt]bool)
	for _, r := range h.Records {
		if r.Fault != nil {
			faults = append(faults, *r.Fault)
		}
		if r.Commit != nil && !r.Commit.To.IsZero() {
			ended[attemptOf(r.Commit)] = true
		}
	}
	recorded := len(faults)
	for _, r := range h.Records {
		c := r.Commit
		switch {
		case c == nil:
		case !c.To.IsZero():
			if c.To.Sub(c.From) >= h.Lease/2 {
				faults = append(faults, Fault{Kind: "row held by a caller", Key: c.Key, From: c.From, To: c.To})
			}
		case !ended[attemptOf(c)]:
			// It died. What it had locked is free when the server has noticed.
			to := forever
			for _, f := range faults[:recorded] {
				if f.Worker == c.Caller && !f.end().Before(c.From) && (to.Equal(forever) || f.end().Add(h.Lease).After(to)) {
					to = f.end().Add(h.Lease)
				}
			}
			faults = append(faults, Fault{Kind: "row held by a caller that died", Key: c.Key, From: c.From, To: to})
		}
	}
	return faults
}

// add identifies one add of one transaction, however often that is run.
type add struct {
	request string
	key     outbox.Key
}

// version identifies content: the version of a row, not of a key, of which a purge may
// have deleted an earlier row.
type version struct{ id, version int64 }

// checker is one call of Check.
type checker struct {
	History
	verdict Verdict

	faults   map[string][]Fault     // of all keys, by worker
	onKey    map[outbox.Key][]Fault // of one key
	attempts map[add][]Commit
	accepts  map[version][]Accept
	claims   map[int64][]Claimed
	settled  map[int64][]Settled
	requeues map[outbox.Key][]Requeue
	purges   []Purge
	troubles map[string][]Trouble // by worker
	changed  map[int64][]Change   // by id, in order

	committed map[version]string    // content
	acked     map[version]time.Time // when it was known to be committed at the latest
	newest    map[int64]int64       // version, by id
	keys      map[int64]outbox.Key
	maybe     map[outbox.Key]map[string]bool // content of which it is not known
	undone    map[outbox.Key]map[string]bool // content of adds that were rolled back
}

// Check compares a history with what the outbox promises.
func Check(h History) Verdict {
	c := &checker{
		History: h,
		faults:  make(map[string][]Fault), onKey: make(map[outbox.Key][]Fault),
		attempts: make(map[add][]Commit), accepts: make(map[version][]Accept), claims: make(map[int64][]Claimed), settled: make(map[int64][]Settled),
		requeues: make(map[outbox.Key][]Requeue), troubles: make(map[string][]Trouble), changed: make(map[int64][]Change),
		committed: make(map[version]string), acked: make(map[version]time.Time),
		newest: make(map[int64]int64), keys: make(map[int64]outbox.Key),
		maybe: make(map[outbox.Key]map[string]bool), undone: make(map[outbox.Key]map[string]bool),
	}
	c.index()
	c.commits()
	c.sends()
	c.duplicates()
	c.settles()
	c.table()
	c.changes()
	return c.verdict
}

func (c *checker) violation(kind Kind, key outbox.Key, id int64, format string, args ...any) {
	c.verdict.Violations = append(c.verdict.Violations, Violation{kind, key, id, fmt.Sprintf(format, args...)})
}

func (c *checker) index() {
	for _, f := range c.History.faults() {
		if f.Harmless {
			continue
		}
		if f.Key != (outbox.Key{}) {
			c.onKey[f.Key] = append(c.onKey[f.Key], f)
		} else {
			c.faults[f.Worker] = append(c.faults[f.Worker], f)
		}
	}
	for _, ch := range c.Changes {
		c.changed[ch.ID] = append(c.changed[ch.ID], ch)
	}
	for _, changes := range c.changed {
		slices.SortFunc(changes, func(a, b Change) int { return cmp.Compare(a.Seq, b.Seq) })
	}
	for _, r := range c.Records {
		switch {
		case r.Accept != nil:
			v := version{r.Accept.ID, r.Accept.Version}
			c.accepts[v] = append(c.accepts[v], *r.Accept)
			c.verdict.Accepted++
		case r.Claimed != nil:
			c.claims[r.Claimed.ID] = append(c.claims[r.Claimed.ID], *r.Claimed)
		case r.Settled != nil:
			c.settled[r.Settled.ID] = append(c.settled[r.Settled.ID], *r.Settled)
		case r.Requeue != nil:
			c.requeues[r.Requeue.Key] = append(c.requeues[r.Requeue.Key], *r.Requeue)
		case r.Purge != nil:
			c.purges = append(c.purges, *r.Purge)
		case r.Trouble != nil:
			c.troubles[r.Trouble.Worker] = append(c.troubles[r.Trouble.Worker], *r.Trouble)
		}
	}
}

// commits finds out which adds were committed.
func (c *checker) commits() {
	booked := make(map[add]Commit)
	for _, b := range c.Booked {
		booked[add{b.Request, b.Key}] = b
	}
	acked := make(map[add]time.Time)
	for _, r := range c.Records {
		if r.Commit == nil {
			continue
		}
		a := add{r.Commit.Request, r.Commit.Key}
		c.attempts[a] = append(c.attempts[a], *r.Commit)
		if code := r.Commit.Code; code == "23505" || code == "25P02" {
			c.violation(BrokenAdd, r.Commit.Key, r.Commit.ID, "request %s of %s ended with %s", r.Commit.Request, r.Commit.Caller, code)
		}
		if r.Commit.Result != Committed {
			continue
		}
		if at, ok := acked[a]; !ok || r.Commit.To.Before(at) {
			acked[a] = r.Commit.To
		}
		if c.Booked == nil {
			booked[a] = *r.Commit
		} else if _, ok := booked[a]; !ok {
			c.violation(Lost, r.Commit.Key, r.Commit.ID, "request %s of %s was committed, and its booking is not there", r.Commit.Request, r.Commit.Caller)
		}
	}
	for a, tries := range c.attempts {
		if _, ok := booked[a]; ok {
			rolledBack := !slices.ContainsFunc(tries, func(t Commit) bool { return t.Result != RolledBack && !c.ended(t, tries) })
			if rolledBack {
				c.violation(Impossible, a.key, 0, "request %s was rolled back, and its booking is there", a.request)
			}
			continue
		}
		unknown := slices.ContainsFunc(tries, func(t Commit) bool { return t.Result == Unknown && !c.ended(t, tries) })
		into := c.undone
		if unknown && c.Booked == nil {
			into = c.maybe
		}
		if into[a.key] == nil {
			into[a.key] = make(map[string]bool)
		}
		into[a.key][tries[0].Content] = true
	}
	for a, b := range booked {
		c.verdict.Adds++
		if b.ID == 0 {
			c.violation(Impossible, b.Key, 0, "request %s was committed, and no row is known of it", b.Request)
			continue
		}
		if key, ok := c.keys[b.ID]; ok && key != b.Key {
			c.violation(Impossible, b.Key, b.ID, "the row is also of key %s", key)
		}
		c.keys[b.ID] = b.Key
		if b.Outcome == outbox.OutcomeExisting {
			c.newest[b.ID] = max(c.newest[b.ID], b.Version)
			continue
		}
		v := version{b.ID, b.Version}
		if content, ok := c.committed[v]; ok && content != b.Content {
			c.violation(Impossible, b.Key, b.ID, "version %d has two contents, %s and %s", b.Version, content, b.Content)
		}
		c.committed[v] = b.Content
		c.newest[b.ID] = max(c.newest[b.ID], b.Version)
		if at, ok := acked[a]; ok {
			if before, ok := c.acked[v]; !ok || at.Before(before) {
				c.acked[v] = at
			}
		}
	}
}

// ended reports whether t says that a transaction began, and another of tries how it ended.
func (*checker) ended(t Commit, tries []Commit) bool {
	return t.To.IsZero() && slices.ContainsFunc(tries, func(o Commit) bool {
		return !o.To.IsZero() && o.Caller == t.Caller && o.From.Equal(t.From)
	})
}

// sends compares what was accepted with what was committed.
func (c *checker) sends() {
	for v, accepts := range c.accepts {
		for _, a := range accepts {
			content, ok := c.committed[v]
			switch {
			case ok && content == a.Content, c.maybe[a.Key][a.Content]:
			case ok:
				c.violation(Impossible, a.Key, a.ID, "version %d was accepted as %s, and committed as %s", a.Version, a.Content, content)
			case c.undone[a.Key][a.Content]:
				c.violation(RolledBackSent, a.Key, a.ID, "version %d: %s", a.Version, a.Content)
			default:
				c.violation(Impossible, a.Key, a.ID, "version %d was accepted, and nobody committed it: %s", a.Version, a.Content)
			}
			if key, ok := c.keys[a.ID]; ok && key != a.Key {
				c.violation(Impossible, a.Key, a.ID, "accepted under this key, and committed under %s", key)
			}
			if a.Claimed.IsZero() {
				continue
			}
			for newer := a.Version + 1; newer <= c.newest[a.ID]; newer++ {
				if at, ok := c.acked[version{a.ID, newer}]; ok && at.Before(a.Claimed) {
					c.violation(OlderContent, a.Key, a.ID, "version %d was claimed after %s, version %d was committed at %s",
						a.Version, clock(a.Claimed), newer, clock(at))
					break
				}
			}
		}
	}
}

func clock(t time.Time) string { return t.Format("15:04:05.000000") }

// purged reports whether a purge of key may have taken place between from and to.
func (c *checker) purged(key outbox.Key, deleted bool, from, to time.Time) bool {
	return slices.ContainsFunc(c.purges, func(p Purge) bool {
		return (p.Key == key || p.Key == outbox.Key{}) && p.Delete == deleted && !p.From.After(to) && (p.To.IsZero() || !p.To.Before(from))
	})
}

// start is when the delivery of a began: its lease is not older.
func (a Accept) start() time.Time {
	if a.Claimed.IsZero() {
		return a.Begun
	}
	return a.Claimed
}

// duplicates judges each pair of sends of one version, one after the other.
func (c *checker) duplicates() {
	type content struct {
		key     outbox.Key
		version int64
	}
	same := make(map[content][]Accept)
	for _, accepts := range c.accepts {
		for _, a := range accepts {
			same[content{a.Key, a.Version}] = append(same[content{a.Key, a.Version}], a)
		}
	}
	for _, accepts := range same {
		slices.SortFunc(accepts, func(a, b Accept) int { return cmp.Or(a.start().Compare(b.start()), a.Begun.Compare(b.Begun)) })
		for i := range len(accepts) - 1 {
			c.duplicate(accepts[i], accepts[i+1])
		}
	}
}

// ruling is what is said of two sends of one version.
type ruling struct {
	onPurpose, allowed, stalled bool
	violation                   string
}

// duplicate judges a and b. Claims that overlapped may have taken place in either order.
func (c *checker) duplicate(a, b Accept) {
	ruling := c.rule(a, b)
	if ruling.violation != "" && c.overlap(a, b) {
		if swapped := c.rule(b, a); swapped.violation == "" {
			ruling = swapped
		}
	}
	switch {
	case ruling.violation != "":
		c.violation(Duplicate, a.Key, b.ID, "version %d was accepted as %q and as %q%s", a.Version, a.Receipt, b.Receipt, ruling.violation)
	case ruling.onPurpose:
		c.verdict.DuplicatesOnPurpose++
	default:
		c.verdict.DuplicatesAllowed++
		if ruling.stalled {
			c.verdict.DuplicatesStalled++
		}
	}
}

// overlap reports whether the claim of b, the later one, began before that of a had an answer.
func (c *checker) overlap(a, b Accept) bool {
	return slices.ContainsFunc(c.claims[a.ID], func(cl Claimed) bool {
		return cl.Worker == a.Worker && cl.From.Equal(a.Claimed) && b.ID == a.ID && b.Claimed.Before(cl.To)
	})
}

// rule judges b as the repetition of a.
func (c *checker) rule(a, b Accept) ruling {
	if a.ID != b.ID {
		if c.deleted(a, b) {
			return ruling{onPurpose: true}
		}
		return ruling{violation: fmt.Sprintf(", of rows %d and %d, and none was purged", a.ID, b.ID)}
	}
	if c.requeued(a, b) {
		return ruling{onPurpose: true}
	}
	if c.Delivery == relay.AtMostOnce {
		return ruling{violation: ", at most once"}
	}
	if a.Worker == b.Worker && a.Claimed.Equal(b.Claimed) && !a.Claimed.IsZero() {
		return ruling{violation: fmt.Sprintf(", by one claim of %s", a.Worker)}
	}
	for _, s := range c.settled[a.ID] {
		if s.Worker == a.Worker && s.Version == a.Version && s.Verdict == outbox.Delivered && s.Result != outbox.LeaseStale &&
			s.Receipt == a.Receipt && !s.From.Before(a.Begun) && s.To.Before(b.Begun) {
			return ruling{violation: fmt.Sprintf(", and the first was settled at %s, before the second began", clock(s.To))}
		}
	}
	if neglected := c.neglected(a); neglected != "" {
		return ruling{violation: neglected}
	}
	explained, injected := false, false
	until := c.claimedBy(b)
	for _, f := range slices.Concat(c.faults[a.Worker], c.faults[""], c.onKey[a.Key]) {
		// Who is killed may go on for a moment after the kill was noted.
		kill := f.Kills && f.Worker == a.Worker && !f.From.After(until)
		// A fault of one message hits who sends it; a row that is locked hits everybody.
		if (kill || f.overlaps(a.start(), until)) && (f.Worker == "" || f.Worker == a.Worker || !f.Message) {
			explained, injected = true, injected || !f.Observed
		}
	}
	if explained {
		return ruling{allowed: true, stalled: !injected}
	}
	return ruling{violation: fmt.Sprintf(", and nothing happened to %s between %s and %s", a.Worker, clock(a.start()), clock(until))}
}

// claimedBy is by when the claim of a delivery had taken place.
func (c *checker) claimedBy(a Accept) time.Time {
	if cl, ok := c.claimOf(a); ok {
		return cl.To
	}
	return a.Begun
}

// claimOf is the claim by which a was sent, if that was noted.
func (c *checker) claimOf(a Accept) (Claimed, bool) {
	i := slices.IndexFunc(c.claims[a.ID], func(cl Claimed) bool { return cl.Worker == a.Worker && cl.From.Equal(a.Claimed) })
	if i < 0 {
		return Claimed{}, false
	}
	return c.claims[a.ID][i], true
}

// requeued reports whether an operator had the row sent again between two sends.
func (c *checker) requeued(a, b Accept) bool {
	if c.Changes != nil {
		return slices.ContainsFunc(c.changed[a.ID], func(ch Change) bool {
			return ch.requeues() && ch.At.After(a.start()) && ch.At.Before(b.Begun)
		})
	}
	return slices.ContainsFunc(c.requeues[a.Key], func(r Requeue) bool {
		return r.From.Before(b.Begun) && (r.To.IsZero() || r.To.After(a.start()))
	})
}

// deleted reports whether the row of a was purged before b, of another, was sent.
func (c *checker) deleted(a, b Accept) bool {
	if c.Changes != nil {
		return slices.ContainsFunc(c.changed[a.ID], func(ch Change) bool { return ch.After == nil && ch.At.Before(b.Begun) })
	}
	return c.purged(a.Key, true, a.start(), b.Begun)
}

// sameClaim compares tokens. One claim has several, which differ in the last digit.
func sameClaim(a, b string) bool {
	return len(a) == len(b) && len(a) > 0 && a[:len(a)-1] == b[:len(b)-1]
}

// settles looks for stale tokens that had an effect.
func (c *checker) settles() {
	for id, settled := range c.settled {
		for _, s := range settled {
			if s.Result == outbox.LeaseStale {
				c.verdict.StaleRefused++
				continue
			}
			own := time.Time{} // when the last claim with this token ended
			for _, cl := range c.claims[id] {
				if sameClaim(cl.Token, s.Token) && cl.To.After(own) {
					own = cl.To
				}
			}
			for _, cl := range c.claims[id] {
				if !sameClaim(cl.Token, s.Token) && !own.IsZero() && cl.From.After(own) && cl.To.Before(s.From) {
					c.violation(StalePassed, c.keys[id], id, "%s settled version %d as %s at %s, with token %s; %s had claimed the row at %s, with token %s",
						s.Worker, s.Version, s.Result, clock(s.From), s.Token, cl.Worker, clock(cl.To), cl.Token)
					break
				}
			}
		}
	}
}

// table compares the rows with what was committed and accepted.
func (c *checker) table() {
	rows := make(map[int64]outbox.Notification)
	byKey := make(map[outbox.Key]int64)
	for _, n := range c.Rows {
		if other, ok := byKey[n.Key()]; ok {
			c.violation(TwoRows, n.Key(), n.ID, "and id %d", other)
		}
		byKey[n.Key()] = n.ID
		rows[n.ID] = n
		if _, ok := c.keys[n.ID]; !ok && len(c.maybe[n.Key()]) == 0 {
			c.violation(Impossible, n.Key(), n.ID, "a row that nobody committed")
		}
		c.row(n)
	}
	for id, newest := range c.newest {
		key := c.keys[id]
		n, ok := rows[id]
		if ok {
			if n.Version < newest {
				c.violation(Lost, key, id, "version %d was committed, and the row has version %d", newest, n.Version)
			}
			continue
		}
		switch {
		case !c.purged(key, true, time.Time{}, forever):
			c.violation(Lost, key, id, "the row is not there, and none was purged")
		case len(c.accepts[version{id, newest}]) == 0 && !c.failed(id, newest):
			c.violation(Lost, key, id, "the row was purged, and version %d was neither accepted nor failed", newest)
		}
	}
}

// row checks what a row says by itself.
func (c *checker) row(n outbox.Notification) {
	key := n.Key()
	content, known := c.committed[version{n.ID, n.Version}]
	switch {
	case n.Payload == nil && n.Status == outbox.StatusSent && c.purged(key, false, time.Time{}, forever), c.maybe[key][string(n.Payload)]:
	case !known && c.keys[n.ID] == key:
		c.violation(Impossible, key, n.ID, "nobody committed version %d", n.Version)
	case known && content != string(n.Payload):
		c.violation(Lost, key, n.ID, "version %d was committed as %s, and the row has %s", n.Version, content, n.Payload)
	}
	var sent *Accept
	if n.SentVersion > 0 {
		for _, a := range c.accepts[version{n.ID, n.SentVersion}] {
			if (a.Receipt == n.Receipt || n.Receipt == "" && c.purged(key, false, a.At, forever)) && (sent == nil || a.At.After(sent.At)) {
				sent = &a
			}
		}
		if sent == nil {
			c.violation(Lost, key, n.ID, "version %d counts as sent, receipt %q, and the provider accepted no such thing", n.SentVersion, n.Receipt)
		}
	}
	switch n.Status {
	case outbox.StatusSent:
		c.verdict.Sent++
		if n.SentVersion != n.Version {
			c.violation(Lost, key, n.ID, "version %d was sent, and version %d counts as sent with it", n.SentVersion, n.Version)
		}
		for _, r := range c.requeues[key] {
			if r.Done && sent != nil && r.From.After(sent.At) && c.Reconciled {
				c.verdict.RequeuesAnswered++
				break
			}
			if r.Done && sent != nil && r.From.After(sent.At) {
				c.violation(Lost, key, n.ID, "requeued at %s, and not sent since", clock(r.From))
				break
			}
		}
	case outbox.StatusFailed:
		c.verdict.Failed++
		switch {
		case n.LastError == "":
			c.violation(Lost, key, n.ID, "failed, and no reason is given")
		case outOfAttempts(n.LastError) && (c.MaxAttempts < 0 || n.Attempts < c.MaxAttempts):
			c.violation(Lost, key, n.ID, "failed after %d attempts, of %d: %s", n.Attempts, c.MaxAttempts, n.LastError)
		case strings.HasPrefix(n.LastError, expired) && n.NotAfter.IsZero():
			c.violation(Lost, key, n.ID, "failed, though it does not expire: %s", n.LastError)
		case strings.HasPrefix(n.LastError, outcomeUnknown) && c.Delivery == relay.AtLeastOnce && !c.Reconciled:
			c.violation(Lost, key, n.ID, "failed, though it should be sent at least once: %s", n.LastError)
		}
	case outbox.StatusPending:
		c.verdict.Pending++
		if n.NextRetryAt.IsZero() && n.CreatedAt.IsZero() {
			c.violation(Lost, key, n.ID, "pending, and never due")
		}
		if c.Drained {
			c.violation(Lost, key, n.ID, "still pending at the end, due at %s, leased at %s", n.NextRetryAt, n.LockedAt)
		}
	default:
		c.violation(Impossible, key, n.ID, "it has status %q", n.Status)
	}
}

// How the reasons begin that the outbox gives by itself.
const (
	expired        = "expired: not delivered before "
	outcomeUnknown = "outcome unknown"
)

// outOfAttempts reports whether the outbox gave that reason, and not a sender that words its
// own alike.
func outOfAttempts(reason string) bool {
	rest, ok := strings.CutPrefix(reason, "out of attempts")
	return ok && (rest == "" || strings.HasPrefix(rest, ": the last delivery left no result") || strings.HasPrefix(rest, "; before that: "))
}
