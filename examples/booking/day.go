package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// rushRequests is how many requests for one slot come at once, each on a
// connection of its own unless the pool has fewer.
const rushRequests = 20

// The people of the day, by their Telegram ids.
const (
	recruiter         = 7001
	candidate         = 5001 // has booking 101
	luckyCandidate    = 5002 // gets booking 102
	lateCandidate     = 5003 // would have liked it
	absentCandidate   = 5004 // has booking 103
	blockingCandidate = 5005 // has booking 104
)

// What they are told, or not.
var (
	rejection101    = outbox.Key{Type: typeRejected, BookingID: 101, CandidateTgID: candidate}
	confirmation102 = outbox.Key{Type: typeConfirmed, BookingID: 102, CandidateTgID: luckyCandidate}
	lateRequest102  = outbox.Key{Type: typeConfirmed, BookingID: 102, CandidateTgID: lateCandidate}
	rejection102    = outbox.Key{Type: typeRejected, BookingID: 102, CandidateTgID: luckyCandidate}
	rejection103    = outbox.Key{Type: typeRejected, BookingID: 103, CandidateTgID: absentCandidate}
	rejection104    = outbox.Key{Type: typeRejected, BookingID: 104, CandidateTgID: blockingCandidate}
)

// day is the service, what it runs on, and what has happened so far.
type day struct {
	out       io.Writer
	pool      *pgxpool.Pool
	store     *outbox.PGStore
	table     string // the outbox, quoted and qualified
	service   *service
	inbox     *inbox
	relay     *relay.Relay
	stopRelay func() error
	log       bytes.Buffer // what the store logged
	requests  atomic.Int64
}

// playDay acts out the day in schema and writes it to out. What is not as it
// should be is an error that says what was expected.
func playDay(ctx context.Context, pool *pgxpool.Pool, schema string, out io.Writer) (err error) {
	d := &day{
		out:       out,
		pool:      pool,
		table:     pgx.Identifier{schema, "outbox_notifications"}.Sanitize(),
		inbox:     &inbox{},
		stopRelay: func() error { return nil },
	}
	d.store, err = outbox.NewPGStore(pool, outbox.Config{Schema: schema, Logger: newLogger(&d.log)})
	if err != nil {
		return err
	}
	d.service = &service{outbox: d.store, bookings: pgx.Identifier{schema, "bookings"}.Sanitize()}
	d.relay, err = relay.New(d.store, d.inbox, relay.Config{
		// The day is over in a second; the default begins with ten.
		Backoff: func(int) time.Duration { return 20 * time.Millisecond },
		// What fails is part of the day. A service would have it logged.
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	// Nothing is at work any more when the schema is dropped.
	defer func() { err = errors.Join(err, d.stopRelay()) }()
	for _, scene := range []func(context.Context) error{
		d.open,
		d.rejects,
		d.rejectsAgain,
		d.sendsDuringOutage,
		d.sendsAfterOutage,
		d.leavesSentAlone,
		d.bookingRush,
		d.rollsBack,
		d.refusesBadInput,
		d.changesWhileSending,
		d.givesUp,
		d.requeues,
		d.close,
	} {
		if err := scene(ctx); err != nil {
			return err
		}
	}
	return nil
}

// newLogger keeps of each record what fits a line.
func newLogger(w io.Writer) *slog.Logger {
	shown := []string{slog.LevelKey, slog.MessageKey, "booking_id", "status"}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if !slices.Contains(shown, a.Key) {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// request runs fn as a request to the service would be: in a transaction, with the
// relay woken after the commit. It returns what was added, as found in the
// transaction: once that has ended the relay may have the row.
func (d *day) request(ctx context.Context, fn func(pgx.Tx) (outbox.AddResult, error)) (got state, err error) {
	d.requests.Add(1)
	err = outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
		res, err := fn(tx)
		if err == nil {
			got, err = d.lookAfter(ctx, tx, res)
		}
		return err
	})
	if err == nil {
		d.relay.Wake()
	}
	return got, err
}

func (d *day) reject(ctx context.Context, bookingID int64, reason string) (state, error) {
	return d.request(ctx, func(tx pgx.Tx) (outbox.AddResult, error) {
		return d.service.reject(ctx, tx, bookingID, reason)
	})
}

// runOnce has the relay deliver what is due, and returns when that is settled.
func (d *day) runOnce(ctx context.Context, want int) error {
	n, err := d.relay.RunOnce(ctx)
	if err == nil && n != want {
		err = fmt.Errorf("expected the relay to settle %d, got %d", want, n)
	}
	return err
}

// startRelay has the relay run in the background, as it does beside a service, until
// ctx ends or stopRelay is called, which waits for what is being sent.
func (d *day) startRelay(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- d.relay.Run(ctx) }()
	d.stopRelay = sync.OnceValue(func() error {
		stop()
		return <-ended
	})
}

const indent = "       "

func (d *day) say(clock, what string) {
	if d.requests.Load() > 0 {
		fmt.Fprintln(d.out)
	}
	fmt.Fprintf(d.out, "%s  %s\n", clock, what)
}

func (d *day) detail(format string, args ...any) {
	fmt.Fprintf(d.out, indent+format+"\n", args...)
}
