package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/time/rate"

	"github.com/seed3357934d/outbox"
)

// Queue is where a relay gets its work. *[outbox.PGStore] is one.
type Queue interface {
	Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error)
	Extend(ctx context.Context, leases []outbox.Lease, d time.Duration) ([]outbox.LeaseResult, error)
	Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error)
}

// Listener is a [Queue] that can tell when something was added. *[outbox.PGStore] is one.
type Listener interface {
	// Listen calls wake when something may have fallen due, and once when it has begun to
	// listen. It blocks until ctx ends or its connection breaks.
	Listen(ctx context.Context, wake func()) error
}

// Delivery says what happens to a message whose outcome is unknown.
type Delivery int

const (
	// AtLeastOnce sends it again: it may go out twice.
	AtLeastOnce Delivery = iota

	// AtMostOnce fails it with "outcome unknown", for an operator: it may not go
	// out at all.
	//
	// Once at most is the sender's part, too. An error of Send that is no timeout counts
	// as not delivered and is tried again, also a broken connection: ECONNRESET, EPIPE,
	// io.EOF and io.ErrUnexpectedEOF, as net/http returns them. The provider may have
	// accepted the message, and the next attempt is its second copy. A sender must return
	// [Unknown] for every error that has come after it began to write the request.
	AtMostOnce
)

// Config configures a [Relay]. The zero value is ready for use. A value out of
// range is an error of [New] and never changed silently.
type Config struct {
	// Concurrency is how many messages are being sent at once. 0 is 10; at most 10,000.
	Concurrency int

	// BatchSize is how many rows one claim takes at most, and how many wait in the relay,
	// leased, to be sent; at most 10,000. 0 is 100, and in a backlog twice as many each time
	// that half of them were sent within a quarter of a second, up to 1,000: large batches
	// cost the database a quarter less for each row, but of what a slow sender would keep
	// waiting other relays should have their share. RunOnce takes 100 then, and so does
	// AtMostOnce, as a crash fails all that is claimed.
	BatchSize int

	// PollInterval is the longest pause between two claims when nothing is found.
	// 0 is 1 s. After a find the pauses begin at 4 ms and grow to it; after a full batch
	// there is none.
	PollInterval time.Duration

	// Lease is how long a row is another's after its relay has gone. Rows that wait or
	// are being sent are renewed well before. 0 is 1 min.
	Lease time.Duration

	// SendTimeout bounds each Send, by its ctx. It must be shorter than Lease.
	// 0 is 20 s, or half of Lease if that is shorter.
	SendTimeout time.Duration

	// ShutdownTimeout bounds how long Run waits, after its ctx has ended, for what is
	// being sent. Run goes on for up to 6 s more if senders do not heed their ctx or the
	// database does not answer. 0 is 5 s more than SendTimeout.
	ShutdownTimeout time.Duration

	// MaxAttempts is after how many attempts a row is failed. 0 is 10; negative: never. A
	// crash costs an attempt of every row that the process had claimed. So that a message
	// that kills its process does not fail those that are claimed with it each time, rows
	// whose lease ran out are sent one at a time, and first, on their last attempt, if
	// there are at least 2.
	MaxAttempts int

	// Backoff is how long a row waits after its attempt-th failed attempt,
	// counted from 1. It must not be negative. nil is 10 s, doubled with each attempt
	// up to 1 h, each ±20 % at random.
	Backoff func(attempt int) time.Duration

	// Limiter bounds the rate of sending. Rows that wait for it keep their leases. It
	// may be shared by several relays. nil: no limit.
	Limiter *rate.Limiter

	// Types of notifications to deliver. nil: all. All relays of a database share one index,
	// so a large backlog of types that none of them delivers slows each claim.
	Types []string

	Delivery Delivery // AtLeastOnce or AtMostOnce

	// Listen wakes the relay by PostgreSQL's NOTIFY, which the stores that add must
	// be configured to send ([outbox.Config].Notify). It takes a connection of its own.
	// Polling goes on beside it.
	Listen bool

	// Logger receives deliveries that failed for good (Error) or for now (Warn), stale
	// settles (Warn), and the loss and return of the database. Payloads are never
	// logged. nil is slog.Default().
	Logger *slog.Logger
}

// Relay delivers what is in a [Queue]. It is safe for concurrent use; any number
// of relays, in any number of processes, share the work.
type Relay struct {
	queue     Queue
	sender    Sender
	reconcile Reconciler // nil: the sender is none
	listener  Listener   // nil: only polling
	cfg       Config
	adaptive  bool // BatchSize was 0
	log       *slog.Logger
	wake      chan struct{} // holds one wake-up
}

// New returns a relay. It starts nothing and runs no SQL.
func New(store Queue, sender Sender, cfg Config) (*Relay, error) {
	r := &Relay{queue: store, sender: sender, cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1)}
	if isNil(store) {
		return nil, invalid("store", "nil")
	}
	if isNil(sender) {
		return nil, invalid("sender", "nil")
	}
	if r.log == nil {
		r.log = slog.Default()
	}
	c := &r.cfg
	setDefault(&c.Concurrency, 10)
	r.adaptive = c.BatchSize == 0 && c.Delivery == AtLeastOnce
	setDefault(&c.BatchSize, 100)
	setDefault(&c.PollInterval, time.Second)
	setDefault(&c.Lease, time.Minute)
	setDefault(&c.SendTimeout, min(20*time.Second, c.Lease/2))
	setDefault(&c.ShutdownTimeout, c.SendTimeout+5*time.Second)
	setDefault(&c.MaxAttempts, 10)
	switch {
	case c.Concurrency < 0 || c.Concurrency > maxRows:
		return nil, invalid("Concurrency", "%d is not between 1 and %d", c.Concurrency, maxRows)
	case c.BatchSize < 0 || c.BatchSize > maxRows:
		return nil, invalid("BatchSize", "%d is not between 1 and %d", c.BatchSize, maxRows)
	case c.PollInterval < 0:
		return nil, invalid("PollInterval", "%v is negative", c.PollInterval)
	case c.Lease < minLease || c.Lease > maxLease:
		return nil, invalid("Lease", "%v is not between %v and %v", c.Lease, minLease, maxLease)
	case c.SendTimeout < 0:
		return nil, invalid("SendTimeout", "%v is negative", c.SendTimeout)
	case c.SendTimeout >= c.Lease:
		return nil, invalid("SendTimeout", "%v is not shorter than the lease of %v", c.SendTimeout, c.Lease)
	case c.ShutdownTimeout < 0:
		return nil, invalid("ShutdownTimeout", "%v is negative", c.ShutdownTimeout)
	case c.MaxAttempts > math.MaxInt32:
		return nil, invalid("MaxAttempts", "%d is over %d", c.MaxAttempts, math.MaxInt32)
	case c.Limiter != nil && c.Limiter.Burst() < 1 && c.Limiter.Limit() != rate.Inf:
		return nil, invalid("Limiter", "with a burst of %d nothing could ever be sent", c.Limiter.Burst())
	case c.Types != nil && len(c.Types) == 0:
		return nil, invalid("Types", "empty but not nil: nothing would be delivered")
	case c.Delivery != AtLeastOnce && c.Delivery != AtMostOnce:
		return nil, invalid("Delivery", "%d is neither AtLeastOnce nor AtMostOnce", c.Delivery)
	}
	for _, typ := range c.Types {
		if typ == "" || utf8.RuneCountInString(typ) > 50 || !utf8.ValidString(typ) || strings.ContainsRune(typ, 0) {
			return nil, invalid("Types", "no type can be %q", typ)
		}
	}
	if c.Backoff == nil {
		c.Backoff = defaultBackoff
	}
	if c.Listen {
		var ok bool
		if r.listener, ok = store.(Listener); !ok {
			return nil, invalid("Listen", "the store, a %T, cannot listen", store)
		}
	}
	r.reconcile, _ = sender.(Reconciler)
	return r, nil
}

const (
	minLease = 100 * time.Millisecond // leaves room for renewing: a third of it is what a database call may take
	maxLease = 365 * 24 * time.Hour
	maxRows  = 10_000
)

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// defaultBackoff is 10 s, doubled up to 1 h, ±20 %.
func defaultBackoff(attempt int) time.Duration {
	d := time.Hour
	if attempt < 10 { // from the tenth on it would be more
		d = 10 * time.Second << max(attempt-1, 0)
	}
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// Wake has a running relay look for work at once. Call it after the commit of a
// transaction that added something, where the relay runs in the same process. It never
// blocks.
func (r *Relay) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run delivers until ctx ends. Then it claims no more, waits for what is being sent,
// for ShutdownTimeout at most, notes the results, and hands back the rest of what it
// had claimed, so that others deliver it at once.
//
// It goes on through outages of the database, which cost no attempts unless they are
// longer than the lease. Before ctx has
// ended it returns only if the outbox cannot be used from the start: an error with
// [outbox.ErrSetup], as there is no table, it is not migrated, or the role may not
// use it. After ctx has ended it returns nil, or an error that says what it had to
// leave behind: those rows are delivered again when their leases have ended.
func (r *Relay) Run(ctx context.Context) error {
	s := newRun(r)
	return s.do(ctx, func(ctx context.Context) error {
		if r.listener == nil {
			return s.claimOn(ctx)
		}
		listening, stop := context.WithCancel(ctx)
		var listener sync.WaitGroup
		listener.Go(func() { r.listen(listening) })
		defer listener.Wait()
		defer stop()
		return s.claimOn(ctx)
	})
}

// RunOnce claims one batch, delivers it, and returns how many rows it settled: sent,
// failed, or to be tried again. It is for cron jobs, tests and serverless functions;
// repeat it until it returns 0 to deliver all that is due. When ctx ends early it
// does what Run does then, and returns ctx's error. It returns the error of a claim at
// once; results that cannot be noted it tries to note until their leases have ended.
func (r *Relay) RunOnce(ctx context.Context) (int, error) {
	s := newRun(r)
	err := s.do(ctx, func(ctx context.Context) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := s.claim(ctx, outbox.ClaimOptions{Token: outbox.NewToken(), Limit: r.cfg.BatchSize})
		return err
	})
	if err == nil {
		err = ctx.Err()
	}
	return s.settled, err
}

const listenAgain = 10 * time.Minute

// listen has the store wake the relay, until ctx ends.
func (r *Relay) listen(ctx context.Context) {
	var mu sync.Mutex // a Listener may call wake from anywhere
	trouble := outage{log: r.log, doing: "listen for NOTIFY"}
	told := false
	for ctx.Err() == nil {
		err := r.listener.Listen(ctx, func() {
			mu.Lock()
			trouble.ended()
			mu.Unlock()
			r.Wake()
		})
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, outbox.ErrNoNotifications) {
			if !told {
				told = true
				r.log.LogAttrs(ctx, slog.LevelWarn, "outbox: notifications do not arrive, the relay goes by polling alone",
					slog.String("error", err.Error()), slog.Duration("poll_interval", r.cfg.PollInterval))
			}
			_ = sleep(ctx, listenAgain) // it may have been a database that was slow to answer
			continue
		}
		if err == nil {
			err = errors.New("it has ended")
		}
		mu.Lock()
		trouble.began(err)
		pause := trouble.pause()
		mu.Unlock()
		_ = sleep(ctx, pause)
	}
}

func invalid(field, format string, args ...any) error {
	return &outbox.InvalidError{Field: field, Reason: fmt.Sprintf(format, args...), Index: -1}
}

// isNil reports whether v is nil, or a nil pointer or func in an interface.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	rv := reflect.ValueOf(v)
	switch rv.Kind() {
	case reflect.Pointer, reflect.Func, reflect.Map, reflect.Chan, reflect.Interface, reflect.Slice:
		return rv.IsNil()
	}
	return false
}
