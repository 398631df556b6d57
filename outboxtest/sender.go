package outboxtest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// Sender is a [relay.Sender] that accepts everything, records it, and answers as it
// was told to. The zero value is ready for use. It is safe for concurrent use, and not
// to be copied.
type Sender struct {
	mu      sync.Mutex
	scripts []*script
	calls   []*Call
	sent    int
	changed chan struct{} // closed when there is more; nil: nobody waits
}

// Call is one call of Send.
type Call struct {
	Notification outbox.Notification // as it was given
	Receipt      string
	Err          error // also of a panic and of runtime.Goexit
	Ended        bool  // else the call is under way
}

// script is what to answer for keys that match.
type script struct {
	match   outbox.Key
	answers []relay.SenderFunc
}

func (s *script) fits(key outbox.Key) bool {
	m := s.match
	return (m.Type == "" || m.Type == key.Type) && (m.BookingID == 0 || m.BookingID == key.BookingID) &&
		(m.CandidateTgID == 0 || m.CandidateTgID == key.CandidateTgID)
}

// weight is how much of a key the script is about.
func (s *script) weight() (n int) {
	for _, given := range []bool{s.match.Type != "", s.match.BookingID != 0, s.match.CandidateTgID != 0} {
		if given {
			n++
		}
	}
	return n
}

// On says how to answer for the keys that match, one answer for each Send in turn; the last
// one is for all that follow. Parts of match that are absent match anything: the zero Key
// is every key, Key{Type: "reject"} every one of that type. Of several that match, the one
// with more parts counts, then the one that was given last.
//
// Any function can be an answer; see [OK], [Error], [Hang], [Deaf] and [Panic].
func (s *Sender) On(match outbox.Key, answers ...relay.SenderFunc) {
	if s == nil {
		panic("outboxtest: On: the Sender is nil")
	}
	if len(answers) == 0 {
		panic("outboxtest: On: no answers")
	}
	if i := slices.IndexFunc(answers, func(a relay.SenderFunc) bool { return a == nil }); i >= 0 {
		panic(fmt.Sprintf("outboxtest: On: answer %d is nil", i+1))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scripts = append(s.scripts, &script{match, answers})
}

// OK accepts, with that receipt.
func OK(receipt string) relay.SenderFunc {
	return func(context.Context, outbox.Notification) (string, error) { return receipt, nil }
}

// Error refuses: with err as it is, or with one of [relay.Permanent], [relay.RetryAfter]
// and [relay.Unknown].
func Error(err error) relay.SenderFunc {
	return func(context.Context, outbox.Notification) (string, error) { return "", err }
}

// Hang waits until ctx ends, and returns its error, as a client of a provider that does not
// answer does.
func Hang() relay.SenderFunc {
	return func(ctx context.Context, _ outbox.Notification) (string, error) {
		<-ctx.Done()
		return "", ctx.Err()
	}
}

// Deaf does not heed ctx until released is closed, and then answers as then does.
func Deaf(released <-chan struct{}, then relay.SenderFunc) relay.SenderFunc {
	switch {
	case released == nil:
		panic("outboxtest: Deaf: released is nil, which is never closed")
	case then == nil:
		panic("outboxtest: Deaf: then, what it answers when released, is nil")
	}
	return func(ctx context.Context, n outbox.Notification) (string, error) {
		<-released
		return then(ctx, n)
	}
}

// Panic panics with v.
func Panic(v any) relay.SenderFunc {
	return func(context.Context, outbox.Notification) (string, error) { panic(v) }
}

// Send implements [relay.Sender]. Without an answer for the key it accepts, with the
// receipt "receipt 1" and so on.
func (s *Sender) Send(ctx context.Context, n outbox.Notification) (receipt string, err error) {
	s.mu.Lock()
	call := &Call{Notification: n}
	s.calls = append(s.calls, call)
	answer := s.answer(n.Key())
	if answer == nil {
		answer = OK(fmt.Sprintf("receipt %d", len(s.calls)))
	}
	s.tell()
	s.mu.Unlock()

	returned := false
	defer func() {
		var p any
		if !returned {
			if p = recover(); p != nil {
				err = fmt.Errorf("panic: %v", p)
			} else {
				err = fmt.Errorf("the answer ended its goroutine")
			}
		}
		s.mu.Lock()
		call.Receipt, call.Err, call.Ended = receipt, err, true
		if err == nil {
			s.sent++
		}
		s.tell()
		s.mu.Unlock()
		if p != nil {
			panic(p)
		}
	}()
	receipt, err = answer(ctx, n)
	returned = true
	return receipt, err
}

// answer takes the next one for key, under the lock; nil if there is none.
func (s *Sender) answer(key outbox.Key) relay.SenderFunc {
	var best *script
	for _, sc := range s.scripts {
		if sc.fits(key) && (best == nil || sc.weight() >= best.weight()) {
			best = sc
		}
	}
	if best == nil {
		return nil
	}
	next := best.answers[0]
	if len(best.answers) > 1 {
		best.answers = best.answers[1:]
	}
	return next
}

func (s *Sender) tell() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Calls returns all calls of Send so far, in the order in which they began.
func (s *Sender) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.copied()
}

func (s *Sender) copied() []Call {
	calls := make([]Call, len(s.calls))
	for i, c := range s.calls {
		calls[i] = *c
	}
	return calls
}

// Sent returns what was accepted so far, in the order in which the calls began.
func (s *Sender) Sent() []outbox.Notification { return accepted(s.Calls()) }

// SentTo returns what was accepted so far of one key.
func (s *Sender) SentTo(key outbox.Key) []outbox.Notification {
	return slices.DeleteFunc(s.Sent(), func(n outbox.Notification) bool { return n.Key() != key })
}

func accepted(calls []Call) (sent []outbox.Notification) {
	for _, c := range calls {
		if c.Ended && c.Err == nil {
			sent = append(sent, c.Notification)
		}
	}
	return sent
}

// AwaitSent waits until n messages have been accepted since the beginning, and returns
// what [Sender.Sent] does. It ends the test if that takes more than half a minute.
func (s *Sender) AwaitSent(t testing.TB, n int) []outbox.Notification {
	t.Helper()
	return accepted(s.await(t, "messages have been accepted", n, func() int { return s.sent }))
}

// AwaitCalls is the same for calls of Send that have begun, which may be under way.
func (s *Sender) AwaitCalls(t testing.TB, n int) []Call {
	t.Helper()
	return s.await(t, "calls of Send have begun", n, func() int { return len(s.calls) })
}

func (s *Sender) await(t testing.TB, what string, n int, count func() int) []Call {
	t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		s.mu.Lock()
		have := count()
		if have >= n {
			defer s.mu.Unlock()
			return s.copied()
		}
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-timer.C:
			t.Fatalf("outboxtest: after %v %d %s, not %d:\n%s", patience, have, what, n, describe(s.Calls()))
		}
	}
}

func describe(calls []Call) string {
	if len(calls) == 0 {
		return "  Send was not called."
	}
	var lines []string
	for _, c := range calls[:min(len(calls), shown)] {
		result := fmt.Sprintf("accepted, receipt %q", c.Receipt)
		switch {
		case c.Ended && c.Err == nil && c.Receipt == "":
			result = "accepted, no receipt"
		case !c.Ended:
			result = "under way"
		case c.Err != nil:
			result = c.Err.Error()
		}
		lines = append(lines, fmt.Sprintf("  %v, version %d: %s", c.Notification.Key(), c.Notification.Version, result))
	}
	if len(calls) > shown {
		lines = append(lines, fmt.Sprintf("  and %d more", len(calls)-shown))
	}
	return strings.Join(lines, "\n")
}
