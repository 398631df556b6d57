// Package protocol is a model of adding and delivering, small enough that every
// interleaving of it can be explored: one key, two callers, two workers, a provider. Its
// test does so, and shows what each rule of the protocol is for by leaving it out.
//
// Asked of it is that nothing committed is lost or sent for other content, that a lease is
// respected while it holds and changes nothing once it is over, that a message is claimed no
// more often than it has attempts, also if it kills each of its workers, that an add meets no
// unique violation, and that without a fault, and at most once also with one, there is no
// duplicate. That there is one row is built in.
//
// # What the model leaves out
//
//   - Other keys: rows meet only in locks. How one statement adds, claims, renews or settles
//     many rows, what relays do to find a row (turns, Since, Types, Except, suspects), and that a
//     row which a caller holds is reported as held: here the step waits.
//   - Isolation levels other than READ COMMITTED, and the statements that guess what an add
//     will find (guess_pg.go), which either do what the general one does or nothing.
//   - When a row is due: it is so at once, and a pause is one more order of steps. Hence also
//     what Settle does to next_retry_at. NotAfter, and what is not tried on account of it.
//   - Purge, a row that is deleted, and rows that another service has locked without a token.
//   - A claim without an answer, which is repeated by its token: its rows are those of a dead
//     worker until their lease ends. A failover that loses what was committed.
//   - Reconcile, and with it Asked and the attempt beyond the last.
//   - locked_at, which Settle asks whether an attempt is still to be given back. It is NULL
//     under a token only where an add has set attempts to 0, so there is none.
//   - That a worker makes sure of its lease before it sends, drops what it finds to be
//     another's, and does not renew what it may have settled. Here it sends, settles and
//     renews at any time, as one may be frozen between the look and the act.
//   - Renewals of a lease that has not ended: they put off its end, and that may come at any
//     moment here.
package protocol

import "fmt"

// Rules are what can be left out of the protocol. The zero value leaves out nothing.
type Rules struct {
	AtMostOnce bool // of the relay's two modes; not a mutation

	NoToken                     bool // a settle finds its row by the id alone
	NoVersion                   bool // a settle does not ask whether the row was refreshed since its claim
	RefreshClearsLease          bool // as did the service's third attempt at an outbox
	RefreshClearsLeaseOfChanged bool // a refresh does so only where it changes the content
	RefreshChangesToken         bool // a refresh leaves the lease as it is, but under a token of nobody's
	AttemptsResetInFlight       bool // a refresh has all attempts begin anew, whatever is under way
	ClaimIgnoresLease           bool
	ClaimLeavesExpired          bool // a claim takes no row that bears a token
	NoForUpdate                 bool // an add reads without locking and writes later
	NoOnConflict                bool // a first add is a plain INSERT
	FindPendingOnly             bool // an add looks for a pending row, else inserts: the second attempt
	ReviveSettled               bool // an add sets any row back to pending: the first attempt
	AttemptsOfOldStay           bool // a row refreshed in flight keeps its attempts when its lease runs out
	CountedAtSettle             bool // an attempt is counted when it has ended
	EndedIsNoAttempt            bool // a settle does not count what an add has begun to count anew
	ExpiredIsRetried            bool // AtMostOnce claims again what left no result
	RequeuePending              bool // an operator's requeue takes rows that are being delivered
	RefreshKeepsVersion         bool // content changes, version does not
	SentVersionOfNow            bool // a delivery counts for the content of the settle, not of the claim
	SupersededForgets           bool // a settle of replaced content writes the whole row back as it was claimed
	RenewByAnyToken             bool // a lease is renewed by the row's id alone
	UnknownKeepsToken           bool // a lease settled without its outcome being known keeps its token
}

const (
	callers     = 2
	workers     = 2
	maxVersion  = 3 // adds that would go beyond are not made
	maxAttempts = 2

	nobodys = 0xff // a token that no worker has
)

type status uint8

const (
	pending status = iota
	sent
	failed
)

// Row is the table's one row.
type row struct {
	exists       bool
	status       status
	content      uint8 // 1 or 2
	version      uint8
	sentVersion  uint8
	attempts     uint8
	token        uint8 // 0: none
	leaseVersion uint8
	live         bool // the lease has not ended

	// No columns.
	tried bool  // the version has been claimed
	tries uint8 // how often, without what was handed back, since something gave it all its attempts
}

type callerPhase uint8

const (
	outside callerPhase = iota // of a transaction
	absent                     // looked, found nothing, is about to insert
	open                       // has added, and not committed
)

type caller struct {
	phase callerPhase
	left  uint8 // adds to be made
	gives uint8 // content
	draft row   // what it has written
}

type workerPhase uint8

const (
	idle workerPhase = iota
	claimed
	sending
	answered
)

type answer uint8

const (
	none answer = iota
	ok
	retry     // not accepted
	permanent // not accepted
	unknown   // accepted, or not
	cutOff    // accepted, or not: the relay ends, or has found its lease lost
)

type worker struct {
	phase   workerPhase
	token   uint8
	version uint8
	content uint8
	last    bool // there was no attempt left after this one when it was claimed
	resumed bool // a former lease for the same version left no result
	answer  answer

	over    bool // its lease has ended for good: it was settled, or the row claimed again; whatever its token
	open    bool // what it sent was accepted, with nothing to excuse another time
	excused bool // it may be accepted beside another
}

// state is all there is. It is comparable: two equal states have the same future.
type state struct {
	row     row
	locked  uint8 // by caller locked-1
	callers [callers]caller
	workers [workers]worker

	committed [maxVersion + 1]uint8 // content by version
	accepted  [maxVersion + 1]bool  // by the provider, since it was requeued last
	open      [maxVersion + 1]bool  // accepted with nothing to excuse another time
	ghosts    [maxVersion + 1]uint8 // requests that nobody waits for, on their way
	excused   [maxVersion + 1]uint8 // those of them that may be accepted beside another

	faults, requeues uint8 // left

	holds bool   // a lease was given, and it was not settled nor has its time passed; whatever the row says
	wrong string // the invariant that the last step broke
}

// step is one transition.
type step struct {
	name string
	to   state
}

// bound is what keeps the number of states finite.
type bound struct {
	addsOfA, addsOfB uint8
	faults           uint8 // crashes, leases that end under a living worker, answers lost or cut off
	requeues         uint8
}

// start is before everything.
func start(b bound) state {
	s := state{faults: b.faults, requeues: b.requeues}
	s.callers[0].left, s.callers[1].left = b.addsOfA, b.addsOfB
	return s
}

// steps returns everything that can happen next.
func (r Rules) steps(s state) []step {
	var next []step
	do := func(name string, change func(*state)) {
		to := s
		change(&to)
		next = append(next, step{name, to})
	}
	for i := range s.callers {
		r.callerSteps(s, i, do)
	}
	for i := range s.workers {
		r.workerSteps(s, i, do)
	}
	r.otherSteps(s, do)
	return next
}

type doer func(name string, change func(*state))

func (r Rules) callerSteps(s state, i int, do doer) {
	c := s.callers[i]
	name := func(format string, args ...any) string {
		return fmt.Sprintf("caller %c: ", 'A'+i) + fmt.Sprintf(format, args...)
	}
	free := s.locked == 0 || r.NoForUpdate
	switch c.phase {
	case outside:
		if c.left == 0 {
			return
		}
		for gives := uint8(1); gives <= 2; gives++ {
			if s.row.exists && (!r.FindPendingOnly || s.row.status == pending) {
				if free && (s.row.content == gives || s.row.version < maxVersion) {
					do(name("add %d finds the row", gives), func(s *state) { r.found(s, i, gives) })
				}
				continue
			}
			// A rival's row that is not committed is not seen.
			do(name("add %d finds no row", gives), func(s *state) { s.callers[i].phase, s.callers[i].gives = absent, gives })
		}
	case absent:
		switch {
		case s.locked != 0: // waits for the rival whose insert is open
		case !s.row.exists:
			do(name("insert %d", c.gives), func(s *state) {
				s.locked = uint8(i) + 1
				s.callers[i].phase = open
				s.callers[i].draft = row{exists: true, content: c.gives, version: 1}
			})
		case r.NoOnConflict || r.FindPendingOnly:
			do(name("insert %d", c.gives), func(s *state) { s.wrong = "7: a unique violation in a booking" })
		case s.row.content == c.gives || s.row.version < maxVersion:
			do(name("insert %d meets a rival's row", c.gives), func(s *state) { r.found(s, i, c.gives) })
		}
	case open:
		do(name("commit"), func(s *state) {
			c := &s.callers[i]
			s.row = c.draft
			if s.row.status == pending {
				s.committed[s.row.version] = s.row.content
			}
			s.end(i)
			c.left--
		})
		do(name("roll back"), func(s *state) {
			s.end(i)
			s.callers[i].left--
		})
	}
}

// end ends the transaction of a caller.
func (s *state) end(i int) {
	c := &s.callers[i]
	c.phase, c.gives, c.draft = outside, 0, row{}
	if s.locked == uint8(i)+1 {
		s.locked = 0
	}
}

// found is an add that has found the row, and locked it.
func (r Rules) found(s *state, i int, gives uint8) {
	n := s.row
	inFlight := n.token != 0 && n.live
	changed := n.content != gives
	if n.status == pending || r.ReviveSettled {
		n.status = pending
		if changed {
			n.content = gives
			n.tried, n.tries = false, 0
			if !r.RefreshKeepsVersion {
				n.version++
			}
		}
		switch {
		case r.RefreshClearsLease, r.RefreshClearsLeaseOfChanged && changed:
			n.attempts, n.token, n.leaseVersion, n.live = 0, 0, 0, false
		case !inFlight, r.AttemptsResetInFlight:
			n.attempts = 0 // an ended lease is remembered by its token
		case r.RefreshChangesToken:
			n.token = nobodys
		}
		if !s.holds {
			n.tries = 0
		}
	}
	c := &s.callers[i]
	c.phase, c.gives, c.draft = open, gives, n
	if !r.NoForUpdate {
		s.locked = uint8(i) + 1
	}
}

func (r Rules) workerSteps(s state, i int, do doer) {
	w := s.workers[i]
	name := func(format string, args ...any) string {
		return fmt.Sprintf("worker %d: ", i+1) + fmt.Sprintf(format, args...)
	}
	free := s.row.exists && s.locked == 0
	switch w.phase {
	case idle:
		due := s.row.token == 0 || !s.row.live && !r.ClaimLeavesExpired || r.ClaimIgnoresLease
		if free && s.row.status == pending && due {
			do(name("claim"), func(s *state) { r.claim(s, i) })
		}
	case claimed:
		do(name("send version %d", w.version), func(s *state) { s.workers[i].phase = sending })
		if free {
			do(name("hand back"), func(s *state) {
				r.settle(s, i)
				s.workers[i] = worker{}
			})
			if s.faults > 0 && !w.over {
				do(name("hand back, and not know it"), func(s *state) {
					s.faults--
					r.settle(s, i)
					s.workers[i].phase = answered
				})
			}
		}
	case sending:
		do(name("accepted"), func(s *state) {
			s.accept(&s.workers[i])
			s.answer(i, ok)
		})
		do(name("refused for now"), func(s *state) { s.answer(i, retry) })
		do(name("refused for good"), func(s *state) { s.answer(i, permanent) })
		noAnswer := func(what string, a answer) {
			do(name("%s", what), func(s *state) {
				s.faults--
				s.excuse(r, i)
				s.astray(i)
				s.answer(i, a)
			})
		}
		if s.faults > 0 {
			noAnswer("has no answer", unknown)
			if !r.AtMostOnce { // there this, too, is to have no answer
				noAnswer("is cut off", cutOff)
			}
		}
	case answered:
		if free { // else it is told that the row is held
			say := w.answer.String()
			if w.over {
				say = "a lease that is over"
			}
			do(name("settle %s", say), func(s *state) {
				r.settle(s, i)
				s.workers[i] = worker{}
			})
			if s.faults > 0 && !w.over {
				do(name("settle %s, and not know it", say), func(s *state) {
					s.faults--
					r.settle(s, i)
				})
			}
		}
	}
	if w.phase != idle && free && s.row.status == pending && (s.row.token == w.token && !s.row.live || r.RenewByAnyToken && w.over) {
		do(name("renew the lease"), func(s *state) {
			s.fenced(i)
			s.row.live, s.holds = true, true
		})
	}
	if w.phase != idle && s.faults > 0 {
		do(name("die"), func(s *state) {
			s.faults--
			s.excuse(r, i)
			if w.phase == sending {
				s.astray(i)
			}
			s.workers[i] = worker{}
		})
	}
}

// astray leaves the request of a worker to the network.
func (s *state) astray(i int) {
	if w := &s.workers[i]; w.excused {
		s.excused[w.version]++
	} else {
		s.ghosts[w.version]++
	}
}

// answer is what a worker knows of what it has sent.
func (s *state) answer(i int, a answer) {
	w := &s.workers[i]
	w.phase = answered
	if !w.over {
		w.answer = a
	}
}

func (a answer) String() string {
	return [...]string{"handed back", "delivered", "retry", "failed", "unknown", "cut off"}[a]
}

// claim leases the row, or gives up on it.
func (r Rules) claim(s *state, i int) {
	n := &s.row
	if s.holds {
		s.wrong = "one delivery at a time: claimed while another's lease holds"
	}
	s.holds = false
	for j := range s.workers {
		s.workers[j].leaseIsOver()
	}
	superseded := n.token != 0 && n.leaseVersion != n.version
	resumed := n.token != 0 && !superseded
	switch {
	case r.AtMostOnce && n.token != 0 && !superseded && !r.ExpiredIsRetried,
		n.attempts >= maxAttempts && (!superseded || r.AttemptsOfOldStay):
		n.status, n.attempts, n.tries, n.token, n.leaseVersion, n.live = failed, 0, 0, 0, 0, false
		return
	}
	if superseded && !r.AttemptsOfOldStay {
		n.attempts = 0
	}
	if !r.CountedAtSettle {
		n.attempts = min(n.attempts+1, maxAttempts+1)
	}
	n.token, n.leaseVersion, n.live, n.tried = s.newToken(), n.version, true, true
	n.tries++
	if n.tries > maxAttempts {
		s.wrong = "attempts: claimed more often than there are"
	}
	s.holds = true
	s.workers[i] = worker{phase: claimed, token: n.token, version: n.version, content: n.content, last: n.attempts >= maxAttempts, resumed: resumed}
}

// newToken returns a token that nobody has. One that was forgotten by all is as good as
// a new one.
func (s *state) newToken() uint8 {
	for t := uint8(1); ; t++ {
		used := s.row.token == t
		for _, w := range s.workers {
			used = used || w.token == t
		}
		for _, c := range s.callers {
			used = used || c.draft.token == t
		}
		if !used {
			return t
		}
	}
}

// leaseIsOver ends the lease of w for good. What its settle would say does not matter any
// more: that it has an effect at all is wrong.
func (w *worker) leaseIsOver() {
	if w.phase != idle {
		w.over, w.last, w.resumed, w.answer = true, false, false, none
	}
}

// fenced notes a change of the row by the lease of a worker.
func (s *state) fenced(i int) {
	if s.workers[i].over {
		s.wrong = "4: a stale token changed the row"
	}
}

type verdict uint8

const (
	handedBack verdict = iota
	delivered
	again
	givenUp
)

// judge is what the relay makes of an answer. That another attempt is left is decided by
// what the claim returned.
func (r Rules) judge(w *worker) (v verdict, outcomeUnknown bool) {
	switch w.answer {
	case none:
		return handedBack, w.resumed
	case cutOff:
		return handedBack, true
	case ok:
		return delivered, false
	case permanent:
		return givenUp, false
	case unknown:
		if r.AtMostOnce {
			return givenUp, false
		}
	}
	if w.last {
		return givenUp, false
	}
	return again, w.answer == unknown
}

// settle ends a lease as the answer says; without an answer the row is handed back.
func (r Rules) settle(s *state, i int) {
	n, w := &s.row, &s.workers[i]
	if n.status != pending || n.token != w.token && !r.NoToken {
		if !w.over && w.answer != none {
			s.wrong = "4: a result is refused, and the row is nobody else's"
		}
		return // stale
	}
	s.fenced(i)
	v, outcomeUnknown := r.judge(w)
	leased := n.leaseVersion
	if leased == 0 {
		leased = n.version
	}
	superseded := n.version != leased && !r.NoVersion
	switch {
	case superseded:
		n.attempts = 0
	case v == handedBack:
		n.attempts, n.tries = max(n.attempts, 1)-1, max(n.tries, 1)-1
	case r.CountedAtSettle:
		n.attempts++
	default: // also where an add has begun to count anew
		n.tries = max(n.tries, 1)
		if !r.EndedIsNoAttempt {
			n.attempts = max(n.attempts, 1)
		}
	}
	switch {
	case superseded && r.SupersededForgets && v == delivered:
		n.status, n.version, n.content = sent, leased, w.content
	case superseded:
	case v == delivered:
		n.status = sent
	case v == givenUp:
		n.status = failed
	}
	if v == delivered {
		n.sentVersion = leased
		if r.SentVersionOfNow {
			n.sentVersion = n.version
		}
	}
	// The statement tells by attempts whether there is newer content.
	if v != handedBack && n.status == pending && (n.attempts == 0) != superseded {
		s.wrong = "a settle is wrong about whether there is newer content"
	}
	n.live, s.holds = false, false
	switch {
	case !outcomeUnknown:
		n.token, n.leaseVersion = 0, 0
	case !r.UnknownKeepsToken:
		n.token = nobodys
	}
	if n.status != pending {
		n.attempts, n.tries = 0, 0 // they do not matter any more
	}
	w.leaseIsOver()
	w.open = false // settled: nothing excuses another time
}

// accept is the provider accepting what w has sent.
func (s *state) accept(w *worker) {
	if s.committed[w.version] != w.content {
		s.wrong = "2, 6: what was sent is not the committed content of its version"
	}
	s.accepted[w.version] = true
	if w.excused {
		return
	}
	if s.open[w.version] {
		s.wrong = "5: accepted twice"
	}
	s.open[w.version], w.open = true, true
}

// excuse notes that a fault befell the delivery of a worker. At most once takes no excuse.
func (s *state) excuse(r Rules, i int) {
	if !r.AtMostOnce {
		s.forgive(i)
	}
}

// forgive has the delivery of a worker be none that another could double.
func (s *state) forgive(i int) {
	w := &s.workers[i]
	if w.phase == idle {
		return
	}
	w.excused = true
	if w.open {
		w.open = false
		s.open[w.version] = false
	}
}

// otherSteps are those of time, of the network and of the operator.
func (r Rules) otherSteps(s state, do doer) {
	if s.row.live {
		holder := -1
		for i, w := range s.workers {
			if w.phase != idle && w.token == s.row.token {
				holder = i
			}
		}
		switch {
		case holder < 0:
			do("the lease of a dead worker ends", func(s *state) { s.leaseEnds() })
		case s.faults > 0:
			do(fmt.Sprintf("worker %d is frozen: its lease ends", holder+1), func(s *state) {
				s.faults--
				s.leaseEnds()
				s.excuse(r, holder)
			})
		}
	}
	for v := range s.ghosts {
		late := func(ghosts func(*state) *uint8, excused bool) {
			if *ghosts(&s) == 0 {
				return
			}
			do(fmt.Sprintf("a request for version %d is accepted late", v), func(s *state) {
				*ghosts(s)--
				s.accept(&worker{version: uint8(v), content: s.committed[v], excused: excused})
			})
			do(fmt.Sprintf("a request for version %d is lost", v), func(s *state) { *ghosts(s)-- })
		}
		late(func(s *state) *uint8 { return &s.ghosts[v] }, false)
		late(func(s *state) *uint8 { return &s.excused[v] }, true)
	}
	if n := s.row; s.requeues > 0 && n.exists && s.locked == 0 && (n.status != pending || r.RequeuePending && n.token != 0) {
		do("requeue", func(s *state) {
			s.requeues--
			n := &s.row
			if n.status == sent {
				n.sentVersion = 0
			}
			settled := n.status != pending
			n.status, n.attempts, n.tries, n.token, n.leaseVersion, n.live = pending, 0, 0, 0, 0, false
			if !settled {
				return // nobody has asked for another delivery of what has its first
			}
			for i := range s.workers {
				s.forgive(i)
			}
			s.accepted[n.version] = false // not by the delivery that was asked for
			for v := range s.open {
				s.open[v] = false
				s.excused[v] += s.ghosts[v]
				s.ghosts[v] = 0
			}
		})
	}
}

// leaseEnds is the clock passing the end that the row, and what callers have made of it,
// bears.
func (s *state) leaseEnds() {
	s.row.live, s.holds = false, false
	for i := range s.callers {
		s.callers[i].draft.live = false
	}
}

// check returns the invariant that s breaks, or "".
func (s *state) check() string {
	n := s.row
	switch {
	case s.wrong != "":
		return s.wrong
	case n.status == sent && (!s.accepted[n.version] || n.sentVersion != n.version):
		return "1: marked sent, and its content never was"
	case n.sentVersion != 0 && !s.accepted[n.sentVersion]:
		return "1: a version counts as sent that never was"
	case n.status == failed && !n.tried:
		return "1: failed, and its content was never tried"
	case n.content != s.committed[n.version]: // no mutation's shortest way: SupersededForgets comes here if it keeps the version
		return "1: a version has other content than was committed"
	case n.version < maxVersion && s.committed[n.version+1] != 0:
		return "1: committed content is lost"
	}
	return ""
}

// done: nothing is left to do.
func (s *state) done() bool {
	for _, c := range s.callers {
		if c.phase != outside || c.left > 0 {
			return false
		}
	}
	for _, w := range s.workers {
		if w.phase != idle {
			return false
		}
	}
	return !s.row.exists || s.row.status != pending
}
