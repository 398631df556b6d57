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
	To     time.Time `json:"to"` // zero: it took long and was still under way
}

// hasEnded says whether t, which was under way, is among all once more with its end.
func (t Trouble) hasEnded(all []Trouble) bool {
	return slices.ContainsFunc(all, func(end Trouble) bool {
		return end.Worker == t.Worker && end.Call == t.Call && end.From.Equal(t.From) && !end.To.IsZero()
	})
}

// slow is from when on a call is noted; [Check] ignores what is short beside the lease.
const slow = 100 * time.Millisecond

// Between is how long it is from one time to another by the clock that says more: the
// monotonic one stands still while a machine is suspended, and leases end by the other.
func Between(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}

// neglected says what the worker of a left undone, where its own notes and the record of
// changes show that nothing kept it from settling, whatever happened elsewhere at the time.
// "" where something did, or too little is known.
func (c *checker) neglected(a Accept) string {
	l := c.leaseOf(a)
	if !c.Watched || l.to.IsZero() || slices.Contains(c.unsettled[a.ID], l.token) {
		return ""
	}
	kept := c.hindrances(a)
	if !l.expired {
		if slices.ContainsFunc(kept, func(s span) bool { return !s.from.After(l.to) && !s.to.Before(a.Begun) }) {
			return ""
		}
		return fmt.Sprintf(", and %s settled the first as not delivered, though nothing happened to it", a.Worker)
	}
	from, most, what := a.At, c.Lease/2, "settling"
	if a.At.After(l.to) { // it had ended before: nobody renewed it
		from, most, what = l.written, c.Lease*3/4, "renewing it"
		if f := c.failedOver; f != nil { // it may have been renewed, and that be lost
			kept = append(kept, span{f.CaughtUp, f.Promoted})
		}
	}
	for _, free := range gaps(from, l.to, kept) {
		if free.to.Sub(free.from) > most {
			return fmt.Sprintf(", and %s let the lease of the first end at %s, though nothing kept it from %s between %s and %s",
				a.Worker, clock(l.to), what, clock(free.from), clock(free.to))
		}
	}
	return ""
}

// gaps are what is left between from and to without taken.
func gaps(from, to time.Time, taken []span) (left []span) {
	slices.SortFunc(taken, func(a, b span) int { return a.from.Compare(b.from) })
	for _, s := range append(taken, span{to, to}) {
		if s.from.After(to) {
			s.from = to
		}
		if s.from.After(from) {
			left = append(left, span{from, s.from})
		}
		if s.to.After(from) {
			from = s.to
		}
	}
	return left
}

type span struct{ from, to time.Time }

// hindrances are when the worker of a was dead or stood still, when a call to settle or to
// renew failed it, and when a fault hit the message itself.
func (c *checker) hindrances(a Accept) []span {
	var spans []span
	killed := false
	for _, f := range c.faults[a.Worker] {
		switch {
		case f.Kills:
			killed = true
			spans = append(spans, span{f.From, forever})
		case f.Halts:
			spans = append(spans, span{f.From, f.end()})
		}
	}
	for _, f := range c.onKey[a.Key] {
		if f.Worker == a.Worker { // the sender may wait for an answer yet
			spans = append(spans, span{f.From, f.end().Add(c.Lease / 2)})
		}
	}
	troubles := slices.Clone(c.troubles[a.Worker])
	slices.SortFunc(troubles, func(a, b Trouble) int { return a.From.Compare(b.From) })
	type outage struct {
		failures int
		next     time.Time // the call, at the latest
	}
	outages := make(map[string]outage)
	for _, t := range troubles {
		if t.To.IsZero() {
			if killed && !t.hasEnded(troubles) {
				spans = append(spans, span{t.From, forever}) // in it
			}
			continue
		}
		if t.Text == "" && t.To.Sub(t.From) < c.Lease/8 {
			continue
		}
		o := outages[t.Call]
		if t.From.After(o.next.Add(slow)) {
			o.failures = 0
		}
		o.next = t.To.Add(min(50*time.Millisecond<<min(o.failures, 10), 5*time.Second)) // the relay's pause
		o.failures++
		outages[t.Call] = o
		spans = append(spans, span{t.From, o.next})
	}
	return spans
}

// lease is the last of a delivery.
type lease struct {
	token   string
	written time.Time // by the claim, or when it was renewed last
	to      time.Time // it ended, or was settled; zero: not known
	expired bool      // it was not settled
}

// leaseOf is the lease by which a was sent.
func (c *checker) leaseOf(a Accept) (l lease) {
	claim, _ := c.claimOf(a)
	for _, ch := range c.changed[a.ID] {
		before, after := ch.Before.leaseBy(claim.Token), ch.After.leaseBy(claim.Token)
		switch {
		case after != nil:
			if before == nil || !after.Equal(*before) {
				l = lease{token: ch.After.token(), written: ch.At}
			}
		case before == nil:
		case ch.After != nil && (ch.After.LeaseUntil != nil || sameClaim(ch.After.token(), claim.Token)):
			// Another has it now, or an add has seen that it ended: it may be renewed after that.
			l.to, l.expired = *before, true
		default:
			l.to, l.expired = ch.At, false
		}
	}
	return l
}

// leaseBy is until when a lease by a claim with that token was written; nil if it was not.
func (s *State) leaseBy(token string) *time.Time {
	if s == nil || !sameClaim(s.token(), token) {
		return nil
	}
	return s.LeaseUntil
}
