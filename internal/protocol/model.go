// Package protocol is a model of adding and delivering, small enough that every
// interleaving of it can be explored: one key, two callers, two workers, a provider. Its
// test does so, and shows what each rule of the protocol is for by leaving it out.
//
// What the model leaves out: other keys (rows meet only in locks), when a row is due (it
// is due at once; a pause is one more order of steps), NotAfter, Purge, how a claim or a
// settle gets to many rows in one statement, a claim that is repeated by its token, and
// Reconcile and suspects, which choose between the same steps. That there is one row is
// built in. Attempts are counted, but that a message which kills each worker ends failed is
// not among what is asked of each state: TestClaim and TestPoison have that.
package protocol

import "fmt"

// Rules are what can be left out of the protocol. The zero value leaves out nothing.
type Rules struct {
	AtMostOnce bool // of the relay's two modes; not a mutation

	NoToken             bool // a settle finds its row by the id alone
	NoVersion           bool // a settle does not ask whether the row was refreshed since its claim
	RefreshClearsLease  bool // as did the service's third attempt at an outbox
	ClaimIgnoresLease   bool
	NoForUpdate         bool // an add reads without locking and writes later
	NoOnConflict        bool // a first add is a plain INSERT
	FindPendingOnly     bool // an add looks for a pending row, else inserts: the second attempt
	ReviveSettled       bool // an add sets any row back to pending: the first attempt
	AttemptsOfOldStay   bool // a row refreshed in flight keeps its attempts when its lease runs out
	ExpiredIsRetried    bool // AtMostOnce claims again what left no result
	RequeuePending      bool // an operator's requeue takes rows that are being delivered
	RefreshKeepsVersion bool // content changes, version does not
	SentVersionOfNow    bool // a delivery counts for the content of the settle, not of the claim
}

const (
	callers     = 2
	workers     = 2
	maxVersion  = 3 // adds that would go beyond are not made
	maxAttempts = 2
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

	tried bool // no column: the version has been claimed
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
)

type worker struct {
	phase   workerPhase
	token   uint8
	version uint8
	content uint8
	answer  answer

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
	ghosts    [maxVersion + 1]uint8 // requests of dead workers, on their way
	excused   [maxVersion + 1]uint8 // those of them that may be accepted beside another

	faults, requeues uint8 // left

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
	faults           uint8 // crashes, leases that end under a living worker, lost answers
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
	switch {
	case n.status == pending, r.ReviveSettled:
		n.status = pending
		if n.content != gives {
			n.content = gives
			n.tried = false
			if !r.RefreshKeepsVersion {
				n.version++
			}
		}
		switch {
		case r.RefreshClearsLease:
			n.attempts, n.token, n.leaseVersion, n.live = 0, 0, 0, false
		case !inFlight:
			n.attempts = 0 // an ended lease is remembered by its token
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
		if free && s.row.status == pending && (s.row.token == 0 || !s.row.live || r.ClaimIgnoresLease) {
			do(name("claim"), func(s *state) { r.claim(s, i) })
		}
	case claimed:
		do(name("send version %d", w.version), func(s *state) { s.workers[i].phase = sending })
		if free {
			do(name("hand back"), func(s *state) {
				r.settle(s, i)
				s.workers[i] = worker{}
			})
		}
	case sending:
		do(name("accepted"), func(s *state) {
			w := &s.workers[i]
			w.phase, w.answer = answered, ok
			s.accept(w)
		})
		do(name("refused for now"), func(s *state) { s.workers[i].phase, s.workers[i].answer = answered, retry })
		do(name("refused for good"), func(s *state) { s.workers[i].phase, s.workers[i].answer = answered, permanent })
		if s.faults > 0 {
			do(name("accepted, but the answer is lost"), func(s *state) {
				s.faults--
				s.excuse(r, i)
				w := &s.workers[i]
				w.phase, w.answer = answered, unknown
				s.accept(w)
			})
			do(name("not accepted, and the answer is lost"), func(s *state) {
				s.faults--
				s.workers[i].phase, s.workers[i].answer = answered, unknown
			})
		}
	case answered:
		if free { // else it is told that the row is held
			do(name("settle %s", w.answer), func(s *state) {
				r.settle(s, i)
				s.workers[i] = worker{}
			})
			if s.faults > 0 {
				do(name("settle %s, and not know it", w.answer), func(s *state) {
					s.faults--
					r.settle(s, i)
				})
			}
		}
	}
	if w.phase != idle && free && s.row.status == pending && s.row.token == w.token && !s.row.live {
		do(name("renew the lease"), func(s *state) { s.row.live = true })
	}
	if w.phase != idle && s.faults > 0 {
		do(name("die"), func(s *state) {
			s.faults--
			s.excuse(r, i)
			if w := s.workers[i]; w.phase == sending && w.excused {
				s.excused[w.version]++
			} else if w.phase == sending {
				s.ghosts[w.version]++
			}
			s.workers[i] = worker{}
		})
	}
}

func (a answer) String() string {
	return [...]string{"", "delivered", "retry", "failed", "unknown"}[a]
}

// claim leases the row, or gives up on it.
func (r Rules) claim(s *state, i int) {
	n := &s.row
	superseded := n.token != 0 && n.leaseVersion != n.version
	switch {
	case r.AtMostOnce && n.token != 0 && !superseded && !r.ExpiredIsRetried,
		n.attempts >= maxAttempts && (!superseded || r.AttemptsOfOldStay):
		n.status, n.token, n.leaseVersion, n.live = failed, 0, 0, false
		return
	}
	if superseded && !r.AttemptsOfOldStay {
		n.attempts = 0
	}
	n.attempts = min(n.attempts+1, maxAttempts+1)
	n.token, n.leaseVersion, n.live, n.tried = s.newToken(), n.version, true, true
	s.workers[i] = worker{phase: claimed, token: n.token, version: n.version, content: n.content}
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

// settle ends a lease as the answer says; without an answer the row is handed back.
func (r Rules) settle(s *state, i int) {
	n, w := &s.row, &s.workers[i]
	if n.status != pending || n.token != w.token && !r.NoToken {
		return // stale
	}
	leased := n.leaseVersion
	if leased == 0 {
		leased = n.version
	}
	superseded := n.version != leased
	switch {
	case superseded && !r.NoVersion:
		n.attempts = 0
		if w.answer == ok {
			n.sentVersion = leased
			if r.SentVersionOfNow {
				n.sentVersion = n.version
			}
		}
	case w.answer == ok:
		n.status, n.sentVersion = sent, leased
	case w.answer == permanent:
		n.status = failed
	case w.answer == none:
		n.attempts = max(n.attempts, 1) - 1
	}
	if w.answer == retry && n.attempts >= maxAttempts && (!superseded || r.NoVersion) {
		n.status = failed
	}
	n.live = false
	if w.answer != unknown {
		n.token, n.leaseVersion = 0, 0
	}
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
			do(fmt.Sprintf("version %d of a dead worker is accepted", v), func(s *state) {
				*ghosts(s)--
				s.accept(&worker{version: uint8(v), content: s.committed[v], excused: excused})
			})
			do(fmt.Sprintf("version %d of a dead worker is lost", v), func(s *state) { *ghosts(s)-- })
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
			n.status, n.attempts, n.token, n.leaseVersion, n.live = pending, 0, 0, 0, false
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
	s.row.live = false
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
