package ledger

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// Moment is a point in a delivery at which a worker may die or freeze.
type Moment string

const (
	AfterClaim   Moment = "after claim"   // leased, and nothing is known of it outside the database
	BeforeSend   Moment = "before send"   // and not accepted
	AfterAccept  Moment = "after accept"  // and the relay does not know
	BeforeSettle Moment = "before settle" // the relay knows, and the database does not
	MidSettle    Moment = "mid settle"    // part of a batch is settled; see [Worker.Split]
	AfterSettle  Moment = "after settle"  // and the relay does not know
	MidRenew     Moment = "mid renew"     // part of the leases is renewed; see [Worker.Split]
	AfterRenew   Moment = "after renew"   // and the relay does not know
)

// Moments are all of them.
var Moments = []Moment{AfterClaim, BeforeSend, AfterAccept, BeforeSettle, MidSettle, AfterSettle, MidRenew, AfterRenew}

// ErrDead is what a worker's calls return after [Worker.Die].
var ErrDead = errors.New("ledger: the worker is dead")

// Worker is one life of a relay, watched. Its queue and its sender call Hook at each
// [Moment], and note in the journal what was claimed and what became of it. The
// fields are not changed once either is in use.
type Worker struct {
	Name    string // of this life, as in [Fault]; required
	Journal *Journal

	// Hook may end the process, or wait. An error ends the call that it is in: what
	// comes after the moment does not take place. It is called from many goroutines. nil:
	// nothing is done.
	Hook func(ctx context.Context, m Moment) error

	// Split has settling and renewing done in two halves where there is more than one
	// row, with the moments MidSettle and MidRenew between. A real process does without,
	// and dies at the wire.
	Split bool

	// Accepts has each Send that succeeds noted as an [Accept], at its end. It is for
	// senders whose provider keeps no ledger.
	Accepts bool

	dead   atomic.Bool
	mu     sync.Mutex
	leases map[outbox.Lease]int64 // the version claimed
	claims map[int64]time.Time    // when the last claim of a row began, by its id
}

// Die has all calls of the worker fail from now on, as those of a dead process would
// not take place. What a Send under way does is not undone, and nobody hears of it.
func (w *Worker) Die() { w.dead.Store(true) }

func (w *Worker) at(ctx context.Context, m Moment) error {
	if w.dead.Load() {
		return ErrDead
	}
	if w.Hook != nil {
		if err := w.Hook(ctx, m); err != nil {
			return err
		}
	}
	if w.dead.Load() {
		return ErrDead
	}
	return nil
}

// Queue returns q, watched. It can listen if q can.
func (w *Worker) Queue(q relay.Queue) relay.Queue {
	w.leases, w.claims = make(map[outbox.Lease]int64), make(map[int64]time.Time)
	if l, ok := q.(relay.Listener); ok {
		return &listeningQueue{queue{w, q}, l}
	}
	return &queue{w, q}
}

type listeningQueue struct {
	queue
	relay.Listener
}

type queue struct {
	w *Worker
	q relay.Queue
}

func (q *queue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	if q.w.dead.Load() {
		return outbox.ClaimResult{}, ErrDead
	}
	from := time.Now()
	res, err := q.q.Claim(ctx, opts)
	to := time.Now()
	if err != nil || len(res.Claimed) == 0 {
		return res, err
	}
	if err := q.w.at(ctx, AfterClaim); err != nil {
		return outbox.ClaimResult{}, err
	}
	records := make([]Record, len(res.Claimed))
	q.w.mu.Lock()
	for i, c := range res.Claimed {
		q.w.claims[c.ID] = from
		q.w.leases[c.Lease] = c.Notification.Version
		records[i].Claimed = &Claimed{Worker: q.w.Name, ID: c.ID, Version: c.Notification.Version, Token: c.Token.String(), From: from, To: to}
	}
	q.w.mu.Unlock()
	return res, q.w.Journal.Note(records...)
}

func (q *queue) Extend(ctx context.Context, leases []outbox.Lease, d time.Duration) ([]outbox.LeaseResult, error) {
	if q.w.dead.Load() {
		return nil, ErrDead
	}
	half := 0
	if q.w.Split {
		half = len(leases) / 2
	}
	var results []outbox.LeaseResult
	if half > 0 {
		var err error
		if results, err = q.extend(ctx, leases[:half], d); err != nil {
			return nil, err
		}
		if err := q.w.at(ctx, MidRenew); err != nil {
			return nil, err
		}
	}
	rest, err := q.extend(ctx, leases[half:], d)
	if err != nil {
		return nil, err
	}
	if len(leases) > 0 && leases[0] != (outbox.Lease{}) { // else it only asks whether the database answers
		if err := q.w.at(ctx, AfterRenew); err != nil {
			return nil, err
		}
	}
	return append(results, rest...), nil
}

func (q *queue) extend(ctx context.Context, leases []outbox.Lease, d time.Duration) ([]outbox.LeaseResult, error) {
	begun := q.w.begin("renew")
	results, err := q.q.Extend(ctx, leases, d)
	return results, errors.Join(err, begun.ended(results, err))
}

func (q *queue) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	if err := q.w.at(ctx, BeforeSettle); err != nil {
		return nil, err
	}
	half := 0
	if q.w.Split {
		half = len(settlements) / 2
	}
	var results []outbox.LeaseResult
	if half > 0 {
		var err error
		if results, err = q.settle(ctx, settlements[:half]); err != nil {
			return nil, err
		}
		if err := q.w.at(ctx, MidSettle); err != nil {
			return nil, err
		}
	}
	rest, err := q.settle(ctx, settlements[half:])
	if err != nil {
		return nil, err
	}
	if err := q.w.at(ctx, AfterSettle); err != nil {
		return nil, err
	}
	return append(results, rest...), nil
}

// settle settles and notes what was acknowledged.
func (q *queue) settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	begun := q.w.begin("settle")
	results, err := q.q.Settle(ctx, settlements)
	if err := errors.Join(err, begun.ended(results, err)); err != nil {
		return nil, err
	}
	to := time.Now()
	records := make([]Record, 0, len(results))
	q.w.mu.Lock()
	for i, st := range settlements {
		if results[i] == outbox.LeaseHeld {
			continue // it is tried again
		}
		version := q.w.leases[st.Lease]
		delete(q.w.leases, st.Lease)
		records = append(records, Record{Settled: &Settled{
			Worker: q.w.Name, ID: st.ID, Version: version, Token: st.Token.String(), Verdict: st.Verdict,
			Receipt: st.Receipt, Result: results[i], From: begun.From, To: to,
		}})
	}
	q.w.mu.Unlock()
	return results, q.w.Journal.Note(records...)
}

// call is one that is under way. When it takes long that is noted at once, as the worker may
// be killed in it.
type call struct {
	Trouble
	w     *Worker
	noted *time.Timer
}

func (w *Worker) begin(name string) *call {
	c := &call{Trouble: Trouble{Worker: w.Name, Call: name, From: time.Now()}, w: w}
	begun := c.Trouble
	c.noted = time.AfterFunc(slow, func() { _ = w.Journal.Note(Record{Trouble: &begun}) }) // ended meets the same error
	return c
}

// ended notes a call that failed, found rows locked, or took long. The error is the journal's.
func (c *call) ended(results []outbox.LeaseResult, err error) error {
	short := c.noted.Stop()
	end := c.Trouble
	end.To = time.Now()
	switch {
	case err != nil:
		end.Text = err.Error()
	case slices.Contains(results, outbox.LeaseHeld):
		end.Text = "a row was locked"
	case short && end.To.Sub(end.From) < slow:
		return nil
	}
	return c.w.Journal.Note(Record{Trouble: &end})
}

// Sender returns s, watched. It is a [relay.Reconciler] if s is one.
func (w *Worker) Sender(s relay.Sender) relay.Sender {
	if r, ok := s.(relay.Reconciler); ok {
		return &reconcilingSender{sender{w, s}, r}
	}
	return &sender{w, s}
}

type reconcilingSender struct {
	sender
	relay.Reconciler
}

type sender struct {
	w *Worker
	s relay.Sender
}

func (s *sender) Send(ctx context.Context, n outbox.Notification) (string, error) {
	if err := s.w.at(ctx, BeforeSend); err != nil {
		return "", err
	}
	s.w.mu.Lock()
	claimed := s.w.claims[n.ID]
	s.w.mu.Unlock()
	a := Accept{
		Key: n.Key(), ID: n.ID, Version: n.Version, Attempts: n.Attempts, Content: string(n.Payload),
		Worker: s.w.Name, Claimed: claimed, Begun: time.Now(),
	}
	receipt, err := s.s.Send(context.WithValue(ctx, sending{}, a), n)
	if err != nil {
		return receipt, err
	}
	if s.w.Accepts {
		a.Receipt, a.At = receipt, time.Now()
		if err := s.w.Journal.Append(Record{Accept: &a}); err != nil {
			return "", relay.Unknown(err)
		}
	}
	if err := s.w.at(ctx, AfterAccept); err != nil {
		return "", relay.Unknown(err)
	}
	return receipt, nil
}

type sending struct{}

// Sending returns, from the ctx of a Send, what the provider needs for its own record
// of it: all but At and Receipt.
func Sending(ctx context.Context) Accept {
	a, _ := ctx.Value(sending{}).(Accept)
	return a
}
