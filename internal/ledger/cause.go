package ledger

import (
	"fmt"
	"slices"
	"time"
)

// Trouble is a call by which a worker was to renew or settle leases, and which failed, found
// a row that was locked, or took long.
type Trouble struct {
	Worker string    `json:"worker"`
	Call   string    `json:"call"` // "renew" or "settle"
	Text   string    `json:"text"`
	From   time.Time `json:"from"`
	To     time.Time `json:"to"`
}

// slow is from when on a call is noted; [Check] ignores what is short beside the lease.
const slow = 100 * time.Millisecond

// neglected says what the worker of a left undone, where its own notes and the record of
// changes show that nothing kept it from settling, whatever happened elsewhere at the time.
// "" where something did, or too little is known.
func (c *checker) neglected(a Accept) string {
	if c.Changes == nil || !c.Watched {
		return ""
	}
	end, expired, known := c.leaseEnd(a)
	if !known {
		return ""
	}
	kept := c.hindrances(a)
	if !expired {
		if slices.ContainsFunc(kept, func(s span) bool { return !s.from.After(end) && !s.to.Before(a.Begun) }) {
			return ""
		}
		return fmt.Sprintf(", and %s settled the first as not delivered, though nothing happened to it", a.Worker)
	}
	slices.SortFunc(kept, func(a, b span) int { return a.from.Compare(b.from) })
	free := a.At // nothing kept the worker since
	for _, s := range append(kept, span{end, end}) {
		if s.from.After(end) {
			s.from = end
		}
		if s.from.Sub(free) > c.Lease/2 {
			return fmt.Sprintf(", and %s let the lease of the first end at %s, though nothing kept it from settling between %s and %s",
				a.Worker, clock(end), clock(free), clock(s.from))
		}
		if s.to.After(free) {
			free = s.to
		}
	}
	return ""
}

type span struct{ from, to time.Time }

// hindrances are when the worker of a was dead or stood still, when a call to settle or to
// renew failed it, and when a fault hit the message itself.
func (c *checker) hindrances(a Accept) []span {
	var spans []span
	for _, f := range c.faults[a.Worker] {
		switch {
		case f.Kills:
			spans = append(spans, span{f.From, forever})
		case f.Halts:
			spans = append(spans, span{f.From, f.end()})
		}
	}
	for _, f := range c.onKey[a.Key] {
		if f.Message && f.Worker == a.Worker { // the sender may wait for an answer yet
			spans = append(spans, span{f.From, f.end().Add(c.Lease / 2)})
		}
	}
	for _, t := range c.troubles[a.Worker] {
		if t.Text != "" || t.To.Sub(t.From) >= c.Lease/8 {
			spans = append(spans, span{t.From, t.To})
		}
	}
	return spans
}

// leaseEnd is when the lease by which a was sent ended, and whether its time had passed: if
// not, it was settled.
func (c *checker) leaseEnd(a Accept) (end time.Time, expired, known bool) {
	var token string
	for _, cl := range c.claims[a.ID] {
		if cl.Worker == a.Worker && cl.From.Equal(a.Claimed) {
			token = cl.Token
		}
	}
	for _, ch := range c.changed[a.ID] {
		switch {
		case ch.Before == nil, ch.Before.LeaseUntil == nil, ch.At.Before(a.Claimed), !sameClaim(ch.Before.token(), token):
		case ch.After == nil, ch.After.LeaseUntil == nil:
			return ch.At, false, true
		case !sameClaim(ch.After.token(), token):
			return *ch.Before.LeaseUntil, true, true
		}
	}
	return time.Time{}, false, false
}
