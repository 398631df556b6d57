package ledger

import (
	"fmt"
	"slices"
	"time"

	"github.com/seed3357934d/outbox"
)

// Failover is what became of a primary and its asynchronous standby.
type Failover struct {
	CaughtUp time.Time // what was acknowledged before has arrived; zero: not known
	Killed   time.Time // just before the primary was: it may have answered for a moment yet
	Promoted time.Time // the standby takes writes, perhaps for a moment already
}

// Losses is what an asynchronous failover lost, all of it from the last moments of the
// primary.
type Losses struct {
	Adds    int // acknowledged, each with its booking
	Sent    int // messages that the new primary knows nothing of: the add or the claim is lost
	Again   int // of these, content that was accepted once more
	Claims  int
	Settles int // acknowledged
	Refused int // settlements of claims that were lost, refused by the new primary

	Violations []Violation
}

// Survived returns h without what an asynchronous failover may lose, so that [Check] sees
// whether it is all that was lost. Booked and Changes are those of the new primary, and
// decide: both are written in the same transactions as what they are about.
//
// Nothing may be lost that was acknowledged before the standby had caught up for the last time.
// What was lost has to be the end, as a standby has the WAL in order: an add that was begun
// after the acknowledgement of one that is lost is not to be there, and no change at all
// that was begun after that of a claim or a settlement that is lost. And nothing that is
// said of a claim that was lost is to have an effect.
func (h History) Survived(f Failover) (History, Losses) {
	type lease struct {
		id    int64
		token string
	}
	type claim struct {
		worker string
		id     int64
		from   int64
	}
	var l Losses
	booked := make(map[add]bool)
	for _, b := range h.Booked {
		booked[add{b.Request, b.Key}] = true
	}
	claimed, ended := make(map[lease][]time.Time), make(map[lease][]time.Time)
	var last time.Time // when the last began of what is there of the old primary's transactions
	for _, c := range h.Changes {
		if c.Began.Before(f.Killed) && c.Began.After(last) {
			last = c.Began
		}
		if c.After != nil && c.After.Token != "" {
			of := lease{c.ID, c.After.token()}
			claimed[of] = append(claimed[of], c.At)
		}
		if c.Before != nil && c.Before.Token != "" && (c.After == nil || c.After.Token != c.Before.Token || c.After.LeaseUntil == nil) {
			of := lease{c.ID, c.Before.token()}
			ended[of] = append(ended[of], c.At)
		}
	}
	survived := make(map[claim]bool)
	var firstLost time.Time
	for _, r := range h.Records {
		switch c := r.Commit; {
		case r.Claimed != nil:
			survived[claim{r.Claimed.Worker, r.Claimed.ID, r.Claimed.From.UnixNano()}] = claimed[lease{r.Claimed.ID, r.Claimed.Token}] != nil
		case c != nil && c.Result == Committed && c.From.Before(f.Promoted) && !booked[add{c.Request, c.Key}]:
			if firstLost.IsZero() || c.To.Before(firstLost) {
				firstLost = c.To
			}
		}
	}

	type content struct {
		key  outbox.Key
		text string
	}
	vanished := make(map[content]int)
	unsettled := make(map[int64][]string)
	gone := make(map[attempt]bool) // what was begun, and was acknowledged, and is not there
	// arrived notes it if what is lost was acknowledged before the standby had caught up.
	arrived := func(kind Kind, key outbox.Key, id int64, acked time.Time, what string, args ...any) {
		if acked.Before(f.CaughtUp) {
			l.Violations = append(l.Violations, Violation{kind, key, id, fmt.Sprintf(what+" was acknowledged at %s, the standby had all up to %s, and it is not there",
				append(args, clock(acked), clock(f.CaughtUp))...)})
		}
	}
	kept := make([]Record, 0, len(h.Records))
	for _, r := range h.Records {
		drop := false
		switch {
		case r.Commit != nil && r.Commit.Result == Committed && r.Commit.From.Before(f.Promoted):
			c := r.Commit
			drop = !booked[add{c.Request, c.Key}]
			if drop {
				l.Adds++
				gone[attemptOf(c)] = true
				arrived(Lost, c.Key, c.ID, c.To, "request %s of %s", c.Request, c.Caller)
			} else if !firstLost.IsZero() && c.From.After(firstLost) && c.To.Before(f.Killed) {
				l.Violations = append(l.Violations, Violation{Lost, c.Key, c.ID, fmt.Sprintf(
					"request %s, begun at %s, is there, and one that was acknowledged at %s is not", c.Request, clock(c.From), clock(firstLost))})
			}
		case r.Claimed != nil && r.Claimed.From.Before(f.Promoted):
			// A claim that is repeated writes its token again, and the repeat alone may be lost.
			drop = !anyWithin(claimed[lease{r.Claimed.ID, r.Claimed.Token}], r.Claimed.From, r.Claimed.To)
			if drop {
				l.Claims++
				arrived(OlderContent, outbox.Key{}, r.Claimed.ID, r.Claimed.To, "a claim of %s, token %s,", r.Claimed.Worker, r.Claimed.Token)
				if r.Claimed.To.Before(last) {
					l.Violations = append(l.Violations, Violation{OlderContent, outbox.Key{}, r.Claimed.ID, fmt.Sprintf(
						"%s was given version %d with token %s at %s, which is not there, and a change begun at %s is",
						r.Claimed.Worker, r.Claimed.Version, r.Claimed.Token, clock(r.Claimed.To), clock(last))})
				}
			}
		case r.Settled != nil:
			s := r.Settled
			of := lease{s.ID, s.Token}
			stale := s.Result == outbox.LeaseStale
			switch {
			case s.From.Before(f.Promoted) && !stale:
				drop = !anyWithin(ended[of], s.From, s.To)
				if drop {
					l.Settles++
					unsettled[s.ID] = append(unsettled[s.ID], s.Token)
					arrived(StalePassed, outbox.Key{}, s.ID, s.To, "a settlement by %s, token %s,", s.Worker, s.Token)
					if s.To.Before(last) {
						l.Violations = append(l.Violations, Violation{StalePassed, outbox.Key{}, s.ID, fmt.Sprintf(
							"%s was told at %s that version %d is settled (%s, %s), which is not there, and a change begun at %s is",
							s.Worker, clock(s.To), s.Version, s.Verdict, s.Result, clock(last))})
					}
				}
			case claimed[of] == nil:
				drop = true
				l.Refused++
				if !stale {
					l.Violations = append(l.Violations, Violation{StalePassed, outbox.Key{}, s.ID, fmt.Sprintf(
						"%s settled version %d as %s at %s, with token %s, of which the new primary knows nothing", s.Worker, s.Version, s.Result, clock(s.From), s.Token)})
				}
			}
		case r.Accept != nil && r.Accept.Claimed.Before(f.Promoted):
			a := r.Accept
			drop = !survived[claim{a.Worker, a.ID, a.Claimed.UnixNano()}]
			if drop {
				l.Sent++
				vanished[content{a.Key, a.Content}]++
			}
		}
		if !drop {
			kept = append(kept, r)
		}
	}
	// Their begins tell nothing of a caller that died, and held a row.
	kept = slices.DeleteFunc(kept, func(r Record) bool { return r.Commit != nil && r.Commit.To.IsZero() && gone[attemptOf(r.Commit)] })
	h.Records, h.unsettled, h.failedOver = kept, unsettled, &f
	for _, r := range kept {
		if r.Accept == nil {
			continue
		}
		if c := (content{r.Accept.Key, r.Accept.Content}); vanished[c] > 0 {
			l.Again += vanished[c]
			delete(vanished, c)
		}
	}
	return h, l
}

// anyWithin reports whether one of the times is between from and to.
func anyWithin(times []time.Time, from, to time.Time) bool {
	return slices.ContainsFunc(times, func(at time.Time) bool { return within(at, from, to) })
}
