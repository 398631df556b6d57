package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
)

// rushRequests is how many requests for one slot come at once, each on a
// connection of its own unless the pool has fewer.
const rushRequests = 20

// The people of the day, by their Telegram ids.
const (
	recruiter       = 7001
	candidate       = 5001 // has booking 101
	luckyCandidate  = 5002 // gets booking 102
	lateCandidate   = 5003 // would have liked it
	absentCandidate = 5004 // has booking 103
)

// day is the service, what it runs on, and what has happened so far.
type day struct {
	out      io.Writer
	pool     *pgxpool.Pool
	store    *outbox.PGStore
	table    string // the outbox, quoted and qualified
	service  *service
	telegram *telegram
	log      bytes.Buffer // what the store logged
	requests atomic.Int64
}

// playDay acts out the day in schema and writes it to out. What is not as it
// should be is an error that says what was expected.
func playDay(ctx context.Context, pool *pgxpool.Pool, schema string, out io.Writer) error {
	d := &day{
		out:      out,
		pool:     pool,
		table:    pgx.Identifier{schema, "outbox_notifications"}.Sanitize(),
		telegram: &telegram{},
	}
	var err error
	d.store, err = outbox.NewPGStore(pool, outbox.Config{Schema: schema, Logger: newLogger(&d.log)})
	if err != nil {
		return err
	}
	d.service = &service{outbox: d.store, bookings: pgx.Identifier{schema, "bookings"}.Sanitize()}
	for _, scene := range []func(context.Context) error{
		d.open,
		d.rejects,
		d.rejectsAgain,
		d.retriesAfterOutage,
		d.leavesSentAlone,
		d.bookingRush,
		d.rollsBack,
		d.refusesBadInput,
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

func (d *day) open(ctx context.Context) error {
	if err := d.store.Migrate(ctx); err != nil {
		return err
	}
	return outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
		if err := d.service.createBookings(ctx, tx); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO `+d.service.bookings+` (id, slot, recruiter_tg_id, candidate_tg_id, status) VALUES
			(101, 'Mon 10:00', $1, $2, 'booked'),
			(102, 'Mon 11:00', $1, NULL, 'free'),
			(103, 'Mon 12:00', $1, $3, 'booked')`, recruiter, candidate, absentCandidate)
		return err
	})
}

func (d *day) rejects(ctx context.Context) error {
	d.say("09:00", "A recruiter rejects booking 101.")
	res, err := d.reject(ctx, 101, "")
	if err != nil {
		return err
	}
	if err := d.expectBooking(ctx, 101, "rejected"); err != nil {
		return err
	}
	return d.expect(ctx, res, state{outcome: outbox.OutcomeCreated, version: 1, status: outbox.StatusPending, rows: 1})
}

func (d *day) rejectsAgain(ctx context.Context) error {
	d.say("09:01", `The recruiter presses "reject" again.`)
	res, err := d.reject(ctx, 101, "")
	if err != nil {
		return err
	}
	return d.expect(ctx, res, state{outcome: outbox.OutcomeRefreshed, version: 1, status: outbox.StatusPending, rows: 1})
}

func (d *day) retriesAfterOutage(ctx context.Context) error {
	d.say("09:02", "Telegram is down: the delivery fails, to be tried again later.")
	d.telegram.down = true
	if err := d.deliver(ctx); err != nil {
		return err
	}
	n, err := d.store.Get(ctx, outbox.Key{Type: typeRejected, BookingID: 101, CandidateTgID: candidate})
	if err != nil {
		return err
	}
	err = d.expect(ctx, outbox.AddResult{Notification: n},
		state{version: 1, status: outbox.StatusPending, later: true, attempts: 1, rows: 1})
	if err != nil {
		return err
	}
	d.detail("last error: %s", n.LastError)

	d.say("09:05", "Telegram is back. The recruiter tries again, now with a reason.")
	d.telegram.down = false
	res, err := d.reject(ctx, 101, "position filled")
	if err != nil {
		return err
	}
	return d.expect(ctx, res, state{outcome: outbox.OutcomeRefreshed, version: 2, status: outbox.StatusPending, rows: 1})
}

func (d *day) leavesSentAlone(ctx context.Context) error {
	d.say("09:06", "The message goes out. Then the recruiter's app repeats the request.")
	if err := d.deliver(ctx); err != nil {
		return err
	}
	d.log.Reset()
	res, err := d.reject(ctx, 101, "position filled")
	if err != nil {
		return err
	}
	err = d.expect(ctx, res, state{outcome: outbox.OutcomeExisting, version: 2, status: outbox.StatusSent, attempts: 1, rows: 1})
	if err != nil {
		return err
	}
	if d.log.Len() == 0 {
		return errors.New("expected a log line about the existing row, got none")
	}
	d.detail("log: %s", strings.TrimSpace(d.log.String()))
	return nil
}

func (d *day) bookingRush(ctx context.Context) error {
	d.say("11:00", fmt.Sprintf("A candidate's phone asks for booking 102, %d times at once.", rushRequests))
	if err := d.openConnections(ctx); err != nil {
		return err
	}
	results, errs := make([]outbox.AddResult, rushRequests), make([]error, rushRequests)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range rushRequests {
		wg.Go(func() {
			<-start
			errs[i] = d.request(ctx, func(tx pgx.Tx) (err error) {
				results[i], err = d.service.book(ctx, tx, 102, luckyCandidate)
				return err
			})
		})
	}
	close(start)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}

	outcomes := make(map[outbox.Outcome]int)
	var created outbox.AddResult
	for _, res := range results {
		if outcomes[res.Outcome]++; res.Outcome == outbox.OutcomeCreated {
			created = res
		}
	}
	if outcomes[outbox.OutcomeCreated] != 1 || outcomes[outbox.OutcomeRefreshed] != rushRequests-1 {
		return fmt.Errorf("expected 1 created and %d refreshed, got %v", rushRequests-1, outcomes)
	}
	if err := d.expectBooking(ctx, 102, "booked"); err != nil {
		return err
	}
	if err := d.expect(ctx, created, state{outcome: outbox.OutcomeCreated, version: 1, status: outbox.StatusPending, rows: 2}); err != nil {
		return err
	}
	d.detail("the other %d: refreshed, nothing to change", outcomes[outbox.OutcomeRefreshed])
	return nil
}

// openConnections fills the pool: else the first of many requests would be done
// before the others have a connection.
func (d *day) openConnections(ctx context.Context) error {
	for range min(rushRequests, d.pool.Config().MaxConns) {
		conn, err := d.pool.Acquire(ctx)
		if err != nil {
			return fmt.Errorf("opening connections (pool_max_conns in the URL sets how many): %w", reason(err))
		}
		defer conn.Release()
	}
	return nil
}

func (d *day) rollsBack(ctx context.Context) error {
	d.say("11:01", "Another candidate asks for booking 102, too late: rolled back.")
	var inside int
	err := d.request(ctx, func(tx pgx.Tx) error {
		_, bookErr := d.service.book(ctx, tx, 102, lateCandidate)
		if err := expectError(bookErr, errTaken); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM `+d.table).Scan(&inside); err != nil {
			return err
		}
		return bookErr
	})
	if err := expectError(err, errTaken); err != nil {
		return err
	}
	_, err = d.store.Get(ctx, outbox.Key{Type: typeConfirmed, BookingID: 102, CandidateTgID: lateCandidate})
	if err := expectError(err, outbox.ErrNotFound); err != nil {
		return err
	}
	var after int
	if err := d.pool.QueryRow(ctx, `SELECT count(*) FROM `+d.table).Scan(&after); err != nil {
		return err
	}
	if inside != 3 || after != 2 {
		return fmt.Errorf("expected 3 rows in the transaction and 2 after it, got %d and %d", inside, after)
	}
	d.detail("error: %s", errTaken)
	d.detail("rows %d inside the transaction, rows %d after it", inside, after)
	return nil
}

func (d *day) refusesBadInput(ctx context.Context) error {
	d.say("15:00", "A recruiter rejects booking 103 and pastes a NUL byte into the reason.")
	var refusal error
	var res outbox.AddResult
	err := d.request(ctx, func(tx pgx.Tx) (err error) {
		_, refusal = d.service.reject(ctx, tx, 103, "no-show\x00")
		if err := expectError(refusal, outbox.ErrInvalid); err != nil {
			return err
		}
		// The same transaction, which PostgreSQL would have aborted.
		res, err = d.service.reject(ctx, tx, 103, "no-show")
		return err
	})
	if err != nil {
		return err
	}
	d.detail("error: %s", refusal)
	d.detail("the same transaction goes on, without the byte:")
	if err := d.expectBooking(ctx, 103, "rejected"); err != nil {
		return err
	}
	return d.expect(ctx, res, state{outcome: outbox.OutcomeCreated, version: 1, status: outbox.StatusPending, rows: 3})
}

// close delivers the rest and shows the outbox.
func (d *day) close(ctx context.Context) error {
	d.say("18:00", "The rest goes out. The outbox at the end of the day:")
	if err := d.deliver(ctx); err != nil {
		return err
	}
	rows, err := d.pool.Query(ctx, `SELECT type, booking_id, candidate_tg_id, version, status, attempts, receipt
		FROM `+d.table+` ORDER BY created_at, id`)
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, indent+"TYPE\tBOOKING\tCANDIDATE\tVERSION\tSTATUS\tATTEMPTS\tRECEIPT")
	var n outbox.Notification
	var count int
	_, err = pgx.ForEachRow(rows, []any{&n.Type, &n.BookingID, &n.CandidateTgID, &n.Version, &n.Status, &n.Attempts, &n.Receipt}, func() error {
		count++
		fmt.Fprintf(tw, indent+"%s\t%d\t%d\t%d\t%s\t%d\t%s\n",
			n.Type, n.BookingID, n.CandidateTgID, n.Version, n.Status, n.Attempts, n.Receipt)
		if n.Status != outbox.StatusSent || n.Attempts != 1 {
			return fmt.Errorf("expected %s sent at the first attempt, got %s after %d", n.Key(), n.Status, n.Attempts)
		}
		return nil
	})
	if err := errors.Join(err, tw.Flush()); err != nil {
		return err
	}
	if key, twice := d.telegram.sentTwice(); twice {
		return fmt.Errorf("expected one message for %s, got two", key)
	}
	if count != 3 || len(d.telegram.messages) != 3 {
		return fmt.Errorf("expected 3 rows and 3 messages, got %d and %d", count, len(d.telegram.messages))
	}
	fmt.Fprintf(d.out, "\n%d requests, %d rows, %d messages, nothing sent twice.\n",
		d.requests.Load(), count, len(d.telegram.messages))
	return nil
}

// request runs fn as a request to the service would: in a transaction that is
// committed before the answer.
func (d *day) request(ctx context.Context, fn func(pgx.Tx) error) error {
	d.requests.Add(1)
	return outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, fn)
}

func (d *day) reject(ctx context.Context, bookingID int64, reason string) (res outbox.AddResult, err error) {
	err = d.request(ctx, func(tx pgx.Tx) error {
		res, err = d.service.reject(ctx, tx, bookingID, reason)
		return err
	})
	return res, err
}

func (d *day) deliver(ctx context.Context) error {
	return deliver(ctx, d.pool, d.store, d.table, d.telegram)
}

// state is what a line of the day says of a notification.
type state struct {
	outcome  outbox.Outcome // "": nothing was added
	version  int64
	status   outbox.Status
	later    bool // pending, but not due yet
	attempts int
	rows     int // of the whole outbox
}

func (s state) String() string {
	due := ""
	switch {
	case s.later:
		due = "due later"
	case s.status == outbox.StatusPending:
		due = "due now"
	}
	return fmt.Sprintf("%-9s  version %d  %-7s  %-9s  attempts %d  rows %d",
		s.outcome, s.version, s.status, due, s.attempts, s.rows)
}

// expect reads the row that res is about, compares it with res and with want, and
// prints it.
func (d *day) expect(ctx context.Context, res outbox.AddResult, want state) error {
	n, err := d.store.Get(ctx, res.Notification.Key())
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(n, res.Notification) {
		return fmt.Errorf("expected the row as the call returned it, %+v, got %+v", res.Notification, n)
	}
	got := state{outcome: res.Outcome, version: n.Version, status: n.Status, attempts: n.Attempts}
	err = d.pool.QueryRow(ctx, `SELECT count(*), count(*) FILTER (WHERE id = $1 AND next_retry_at > now()) > 0
		FROM `+d.table, n.ID).Scan(&got.rows, &got.later)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("expected %s: %s, got: %s", n.Key(), want, got)
	}
	d.detail("%s", got)
	return nil
}

func (d *day) expectBooking(ctx context.Context, id int64, want string) error {
	var got string
	err := d.pool.QueryRow(ctx, `SELECT status FROM `+d.service.bookings+` WHERE id = $1`, id).Scan(&got)
	if err == nil && got != want {
		err = fmt.Errorf("expected booking %d to be %s, got %s", id, want, got)
	}
	return err
}

func expectError(got, want error) error {
	switch {
	case got == nil:
		return fmt.Errorf("expected the error %q, got none", want.Error())
	case !errors.Is(got, want):
		return fmt.Errorf("expected the error %q, got: %w", want.Error(), got)
	}
	return nil
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
