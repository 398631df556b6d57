package relay

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/seed3357934d/outbox"
)

// Sender gives messages to a provider.
type Sender interface {
	// Send delivers n and returns the provider's id of the message, which is kept
	// on the row as its Receipt, in place of any before; "" is fine.
	//
	// n is the row as it was when the relay claimed it. With 0 < n.SentVersion <
	// n.Version an earlier version has been delivered, as n.Receipt: the sender may
	// edit that message in place of sending another.
	//
	// Any error is a failed attempt, to be repeated by [Config].Backoff, unless it
	// holds one made by [Permanent], [RetryAfter] or [Unknown], however wrapped or
	// joined. Its text is kept in the row and logged: an error of net/http holds the URL,
	// and with it the token of a provider that has one there. A panic and runtime.Goexit fail the attempt too, and only this one. What
	// was cut off by the end of the relay is no failed attempt: another relay tries it.
	//
	// ctx ends after [Config].SendTimeout, and when a relay that shuts down can wait
	// no longer. A Send that does not heed it keeps its place among the concurrent
	// ones, and its row leased, until it returns. Send is called from many goroutines, but
	// for one key from one at a time, as long as leases hold. It may use the
	// database, through the same pool too.
	Send(ctx context.Context, n outbox.Notification) (receipt string, err error)
}

// SenderFunc is a function as a [Sender].
type SenderFunc func(ctx context.Context, n outbox.Notification) (string, error)

// Send calls f.
func (f SenderFunc) Send(ctx context.Context, n outbox.Notification) (string, error) {
	return f(ctx, n)
}

// Reconciler may be implemented by a [Sender] whose provider can be asked what it
// has accepted. A relay asks before it sends a version again whose outcome is unknown:
// its process died between Send and the note of the result, or Send returned an
// error that says so (see [Unknown]).
type Reconciler interface {
	// Reconcile reports whether the given version of n has been delivered, and the
	// receipt that Send would have returned. Where n.Version is above version, n was
	// changed since, and n.Payload is the newer content.
	//
	// Of a row that was requeued after it was sent, a provider that is asked by row and
	// version knows the delivery before. If the process that was to repeat it dies, that
	// one counts, and the repeat does not go out: requeue once more.
	//
	// Any error leaves the outcome unknown, also a Permanent one: the row is asked about
	// again as if a delivery had failed, not before RetryAfter, until it is out of
	// attempts. ctx is as in Send.
	Reconcile(ctx context.Context, n outbox.Notification, version int64) (receipt string, delivered bool, err error)
}

// Permanent marks err as final: the row becomes failed and is not tried again,
// unless it was refreshed meanwhile. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// RetryAfter says that the provider asked to wait at least d: the row is due
// again after d, or after its backoff if that is longer. As the provider answered,
// the message counts as not delivered. It does not slow the other rows, for which see
// [Config].Limiter, nor does it put off newer content that the row was given meanwhile
// or is given before d has passed. RetryAfter(nil, d) is nil.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &retryAfterError{err, d}
}

type retryAfterError struct {
	err   error
	after time.Duration
}

func (e *retryAfterError) Error() string { return e.err.Error() }
func (e *retryAfterError) Unwrap() error { return e.err }

// Unknown says that err leaves open whether the provider has accepted the message, as
// when the connection broke after the request was written. A timeout and a panic
// count as such without it; any other error says that the message was not delivered,
// ECONNRESET, EPIPE, io.EOF and io.ErrUnexpectedEOF among them: wrap these.
// AtLeastOnce tries again, and a [Reconciler] is asked first; AtMostOnce without one
// fails the row. Unknown(nil) is nil.
func Unknown(err error) error {
	if err == nil {
		return nil
	}
	return &unknownError{err}
}

type unknownError struct{ err error }

func (e *unknownError) Error() string { return e.err.Error() }
func (e *unknownError) Unwrap() error { return e.err }

// OutcomeUnknown tells such an error from others, in package outboxtest.
func (e *unknownError) OutcomeUnknown() bool { return true }

// outcomeUnknown reports whether err leaves open what the provider did.
func outcomeUnknown(err error) bool {
	var unknown *unknownError
	var timeout net.Error // context.DeadlineExceeded is one
	return errors.As(err, &unknown) || errors.Is(err, context.Canceled) || errors.As(err, &timeout) && timeout.Timeout()
}
