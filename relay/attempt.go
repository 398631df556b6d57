package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/seed3357934d/outbox"
)

var errGoexit = Unknown(errors.New("the sender ended its goroutine"))

// attempt delivers it, after asking about an unknown outcome where it can, and says
// how to settle it.
func (r *run) attempt(ctx context.Context, it *item) outbox.Settlement {
	n := it.Notification
	if it.UnknownVersion > 0 && r.reconcile != nil {
		receipt, delivered, err := r.askReconciler(ctx, n, it.UnknownVersion)
		switch {
		case err != nil:
			f := inspect(fmt.Errorf("reconcile: %w", err))
			f.permanent, f.unknown = false, true // nothing was found out
			st := r.judge(ctx, it, f)
			st.Asked = st.Verdict == outbox.Retry
			return st
		case delivered:
			return outbox.Settlement{Verdict: outbox.Delivered, Receipt: r.receipt(n, receipt)}
		case it.UnknownVersion < n.Version, it.Expired:
			// The lease is for the version asked about, or was for asking alone: another
			// claim decides, of which nothing is unknown.
			return outbox.Settlement{Verdict: outbox.HandedBack}
		case r.cfg.MaxAttempts > 0 && n.Attempts > r.cfg.MaxAttempts: // see judge
			return outbox.Settlement{Verdict: outbox.Failed, Error: "out of attempts: the last delivery left no result"}
		}
	}
	receipt, err := r.send(ctx, n)
	if err != nil {
		return r.judge(ctx, it, inspect(err))
	}
	return outbox.Settlement{Verdict: outbox.Delivered, Receipt: r.receipt(n, receipt)}
}

// send calls the sender.
func (r *run) send(ctx context.Context, n outbox.Notification) (receipt string, err error) {
	defer r.recovered(n, &err)
	receipt, err = r.sender.Send(ctx, n)
	if err != nil && ctx.Err() != nil {
		err = Unknown(fmt.Errorf("cut off, SendTimeout is %v: %w", r.cfg.SendTimeout, err))
	}
	return receipt, err
}

func (r *run) askReconciler(ctx context.Context, n outbox.Notification, version int64) (receipt string, delivered bool, err error) {
	defer r.recovered(n, &err)
	return r.reconcile.Reconcile(ctx, n, version)
}

// recovered turns a panic into an error of unknown outcome.
func (r *run) recovered(n outbox.Notification, err *error) {
	p := recover()
	if p == nil {
		return
	}
	*err = Unknown(fmt.Errorf("panic: %v", p)) // fmt survives a panic of p's own methods
	r.log.LogAttrs(context.Background(), slog.LevelError, "outbox: the sender panicked",
		append(attrs(n), slog.String("panic", errorText(*err)), slog.String("stack", string(debug.Stack())))...)
}

// failure is what an error says.
type failure struct {
	text      string
	permanent bool
	unknown   bool          // it leaves open what the provider did
	answered  bool          // the provider asked to wait
	after     time.Duration // for so long
}

// inspect reads err, whose methods are the sender's and may panic.
func inspect(err error) (f failure) {
	defer func() {
		if p := recover(); p != nil {
			f = failure{text: fmt.Sprintf("an error of type %T whose methods panic", err), unknown: true}
		}
	}()
	var permanent *permanentError
	var after *retryAfterError
	f.permanent = errors.As(err, &permanent)
	if errors.As(err, &after) {
		f.answered, f.after = true, after.after
	}
	f.unknown = !f.answered && outcomeUnknown(err)
	f.text = errorText(err)
	return f
}

// judge says how to settle a delivery that failed. ctx is the one that it had.
func (r *run) judge(ctx context.Context, it *item, f failure) outbox.Settlement {
	if f.permanent {
		return outbox.Settlement{Verdict: outbox.Failed, Error: f.text}
	}
	attempt, limit := it.Notification.Attempts, r.cfg.MaxAttempts
	switch {
	case errors.Is(ctx.Err(), context.Canceled) && !f.answered && (r.reconcile != nil || r.cfg.Delivery == AtLeastOnce):
		// Cut off as the relay ends or the lease is lost, which is not the message's fault.
		return outbox.Settlement{Verdict: outbox.HandedBack, Unknown: true}
	case f.unknown && r.reconcile != nil && (limit < 0 || attempt <= limit):
		// The claim after the last attempt is for asking.
	case f.unknown && (r.reconcile != nil || r.cfg.Delivery == AtMostOnce):
		return outbox.Settlement{Verdict: outbox.Failed, Error: "outcome unknown: " + f.text}
	case limit > 0 && attempt >= limit:
		return outbox.Settlement{Verdict: outbox.Failed, Error: f.text}
	}
	wait := max(r.backoff(max(attempt, 1)), f.after)
	return outbox.Settlement{Verdict: outbox.Retry, Error: f.text, RetryIn: wait, Unknown: f.unknown}
}

// backoff calls the configured backoff, and the default one where that panics or is
// negative.
func (r *run) backoff(attempt int) (d time.Duration) {
	defer func() {
		if p := recover(); p != nil || d < 0 {
			r.log.LogAttrs(context.Background(), slog.LevelError, "outbox: Backoff failed, the default is used",
				slog.Int("attempt", attempt), slog.Duration("returned", d), slog.Any("panic", p))
			d = defaultBackoff(attempt)
		}
	}()
	return r.cfg.Backoff(attempt)
}

// receipt is what PostgreSQL can keep of a receipt.
func (r *run) receipt(n outbox.Notification, receipt string) string {
	clean := storable(receipt)
	if clean != receipt {
		r.log.LogAttrs(context.Background(), slog.LevelWarn, "outbox: the receipt holds NUL or invalid UTF-8, which is replaced", attrs(n)...)
	}
	return clean
}

// storable replaces what PostgreSQL's text cannot hold.
func storable(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

const maxErrorBytes = 4096

// errorText is what is kept of an error: all of it up to 4 KiB, then its beginning.
func errorText(err error) string {
	text := storable(err.Error())
	if len(text) <= maxErrorBytes {
		return text
	}
	cut := maxErrorBytes
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return fmt.Sprintf("%s... (%d bytes)", text[:cut], len(text))
}

// logSettled tells the operator what became of a delivery.
func (r *run) logSettled(it *item, res outbox.LeaseResult) {
	ctx, n, st := context.Background(), it.Notification, it.settlement
	switch {
	case res == outbox.LeaseStale && it.maybeDone:
		r.log.LogAttrs(ctx, slog.LevelInfo, "outbox: settled before the connection broke, or stale", attrs(n)...)
	case res == outbox.LeaseStale:
		r.log.LogAttrs(ctx, slog.LevelWarn, "outbox: stale settle, another has the row", append(attrs(n), slog.String("verdict", string(st.Verdict)))...)
	case res == outbox.LeaseSuperseded && st.Verdict != outbox.Delivered && st.Verdict != outbox.HandedBack:
		r.log.LogAttrs(ctx, slog.LevelWarn, "outbox: delivery failed, newer content is to be delivered",
			append(attrs(n), slog.String("error", st.Error))...)
	case st.Verdict == outbox.Failed:
		r.logFailed(n, st.Error)
	case st.Verdict == outbox.Retry:
		r.log.LogAttrs(ctx, slog.LevelWarn, "outbox: delivery failed, to be tried again",
			append(attrs(n), slog.String("error", st.Error), slog.Duration("retry_in", st.RetryIn))...)
	case st.Verdict == outbox.Delivered && r.log.Enabled(ctx, slog.LevelDebug): // attrs cost something
		r.log.LogAttrs(ctx, slog.LevelDebug, "outbox: delivered", attrs(n)...)
	}
}

func (r *run) logFailed(n outbox.Notification, why string) {
	r.log.LogAttrs(context.Background(), slog.LevelError, "outbox: notification failed", append(attrs(n), slog.String("error", why))...)
}

func attrs(n outbox.Notification) []slog.Attr {
	return []slog.Attr{slog.Int64("id", n.ID), slog.String("type", n.Type), slog.Int64("booking_id", n.BookingID),
		slog.Int64("candidate_tg_id", n.CandidateTgID), slog.Int64("version", n.Version), slog.Int("attempts", n.Attempts),
		slog.String("correlation_id", n.CorrelationID)}
}
