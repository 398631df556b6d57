package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// sends is what the user's sender was given, and what it said.
type sends struct {
	*torture
	mu         sync.Mutex
	all        []*send
	succeeded  int // of these
	complaints complaints

	// contradicted are the keys of what was accepted and refused: that they are accepted
	// once more is the sender's doing.
	contradicted map[outbox.Key]bool
}

// bad reports whether there is something to complain about.
func (ss *sends) bad() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return len(ss.complaints.kinds) > 0
}

// begun is how many there were.
func (ss *sends) begun() int {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return len(ss.all)
}

// send is one call of Send.
type send struct {
	ledger.Accept
	n     outbox.Notification
	state sendState
	text  string // of its error
}

type sendState int

const (
	underWay  sendState = iota
	succeeded           // nil
	refused             // an error that says that the provider has not accepted it
	open                // an error that does not, or no return
)

// of returns s, watched. It can reconcile if s can.
func (ss *sends) of(s relay.Sender) relay.Sender {
	if r, ok := s.(relay.Reconciler); ok {
		return &watchedReconciler{watchedSender{ss, s}, r}
	}
	return &watchedSender{ss, s}
}

type watchedSender struct {
	sends  *sends
	sender relay.Sender
}

type watchedReconciler struct {
	watchedSender
	relay.Reconciler
}

// complaints are what is to be reported, some of each kind.
type complaints struct {
	kinds []string
	of    map[string][]string
	more  map[string]int
}

const maxOfKind = 3

func (c *complaints) add(kind, format string, args ...any) {
	if c.of == nil {
		c.of, c.more = make(map[string][]string), make(map[string]int)
	}
	if c.of[kind] == nil {
		c.kinds = append(c.kinds, kind)
	}
	if len(c.of[kind]) >= maxOfKind {
		c.more[kind]++
		return
	}
	c.of[kind] = append(c.of[kind], fmt.Sprintf(format, args...))
}

func (c *complaints) String() string {
	var b strings.Builder
	for _, kind := range c.kinds {
		for _, text := range c.of[kind] {
			fmt.Fprintf(&b, "\n  %s: %s", kind, text)
		}
		if n := c.more[kind]; n > 0 {
			fmt.Fprintf(&b, "\n  %s: %d more", kind, n)
		}
	}
	return b.String()
}

// Send calls the user's, now and then with a ctx that ends early.
func (w *watchedSender) Send(ctx context.Context, n outbox.Notification) (receipt string, err error) {
	ss := w.sends
	s := &send{Accept: ledger.Sending(ctx), n: n}
	ss.mu.Lock()
	ss.all = append(ss.all, s)
	r := rand.New(rand.NewPCG(ss.Seed, 1<<32+uint64(len(ss.all))))
	ss.mu.Unlock()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !ss.calm.Load() && r.IntN(20) == 0 {
		early := time.AfterFunc(time.Duration(r.IntN(5_000))*time.Microsecond, func() {
			cancel()
			ss.fault(ledger.Fault{Kind: "ctx of a Send ended", Key: n.Key(), From: time.Now()})
		})
		defer early.Stop()
	}
	returned := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { ss.watchHeed(s, returned) })
	defer stop()
	defer close(returned)

	ended := false
	defer func() {
		if !ended {
			p := recover()
			err = relay.Unknown(fmt.Errorf("panic: %v", p))
			ss.mu.Lock()
			if p == nil {
				ss.complaints.add("Send has ended its goroutine", "of %v", n.Key())
			} else {
				ss.complaints.add("Send panicked", "of %v: %v\n%s", n.Key(), p, debug.Stack())
			}
			ss.mu.Unlock()
		}
		receipt = ss.note(ctx, s, receipt, &err)
	}()
	receipt, err = w.sender.Send(ctx, n)
	ended = true
	return receipt, err
}

// watchHeed waits for a Send to return, its ctx having ended. It waits in steps, of which a
// process that stands still loses one: the Send stands still as well.
func (ss *sends) watchHeed(s *send, returned <-chan struct{}) {
	const step = 50 * time.Millisecond
	for range heedPatience / step {
		select {
		case <-returned:
			return
		case <-time.After(step):
		}
	}
	select {
	case <-returned:
	default:
		ss.mu.Lock()
		defer ss.mu.Unlock()
		ss.complaints.add("ctx not heeded", "Send of %v has not returned %v after its ctx had ended", s.n.Key(), heedPatience)
	}
}

// note takes down how a Send has ended. What ended with its ctx is of unknown outcome.
func (ss *sends) note(ctx context.Context, s *send, receipt string, err *error) string {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	s.At = time.Now()
	if *err == nil {
		s.state = succeeded
		ss.succeeded++
		clean := strings.ReplaceAll(strings.ToValidUTF8(receipt, "\uFFFD"), "\x00", "\uFFFD")
		if clean != receipt {
			ss.complaints.add("receipt that is no text", "of %v, NUL or invalid UTF-8, which PostgreSQL cannot keep: %q", s.n.Key(), short(receipt))
		}
		s.Receipt = clean
		return clean
	}
	s.state, s.text = refused, fmt.Sprint(*err) // survives a panic of its methods
	if ctx.Err() != nil {
		*err = relay.Unknown(*err)
	}
	if outcomeUnknown(*err) {
		s.state = open
		ss.fault(ledger.Fault{Kind: "outcome unknown", Key: s.n.Key(), From: s.Begun, To: s.At, Observed: true})
	}
	return receipt
}

// outcomeUnknown reports whether a relay takes err for one that leaves open what the
// provider did.
func outcomeUnknown(err error) (yes bool) {
	defer func() {
		if recover() != nil { // its methods are the sender's
			yes = true
		}
	}()
	var unknown interface{ OutcomeUnknown() bool }
	var timeout net.Error
	return errors.As(err, &unknown) || errors.Is(err, context.Canceled) || errors.As(err, &timeout) && timeout.Timeout()
}

// judge returns what was accepted, and complains of what Send said of it.
func (ss *sends) judge() (records []ledger.Record) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	type version struct{ id, version int64 }
	of := make(map[version][]*send)
	var order []version
	for _, s := range ss.all {
		if s.state == underWay { // for ever, as it seems
			s.state, s.At = open, time.Now()
			records = append(records, ledger.Record{Fault: &ledger.Fault{Kind: "outcome unknown", Key: s.n.Key(), From: s.Begun, To: s.At, Observed: true}})
		}
		v := version{s.n.ID, s.n.Version}
		if of[v] == nil {
			order = append(order, v)
		}
		of[v] = append(of[v], s)
	}
	accept := func(s *send) {
		a := s.Accept // a Send may return yet
		records = append(records, ledger.Record{Accept: &a})
	}
	for _, v := range order {
		said := make(map[sendState]int)
		for _, s := range of[v] {
			said[s.state]++
			if s.state == succeeded {
				accept(s)
			}
		}
		if ss.Accepted == nil {
			continue
		}
		n := of[v][0].n
		times := ss.Accepted(n)
		if times < 0 {
			ss.complaints.add("bad Accepted", "it has returned %d for %v, version %d", times, n.Key(), n.Version)
			continue
		}
		extra := times - said[succeeded]
		switch {
		case times == 0 && said[succeeded] > 0:
			ss.complaints.add("lost", "Send has returned nil for %v, version %d, and the provider has not accepted it", n.Key(), n.Version)
		case extra > said[open]:
			i := slices.IndexFunc(of[v], func(s *send) bool { return s.state == refused })
			if i < 0 {
				ss.complaints.add("accepted too often", "%v, version %d: %d times, by %d calls of Send", n.Key(), n.Version, times, len(of[v]))
				break
			}
			if ss.contradicted == nil {
				ss.contradicted = make(map[outbox.Key]bool)
			}
			ss.contradicted[n.Key()] = true
			ss.complaints.add("accepted and refused", "%v, version %d, and Send has returned an error that says it was not accepted (relay.Unknown would leave it open): %s",
				n.Key(), n.Version, short(of[v][i].text))
		}
		for _, state := range []sendState{open, refused} {
			for _, s := range of[v] {
				if s.state == state && extra > 0 {
					extra--
					accept(s)
				}
			}
		}
	}
	return records
}
