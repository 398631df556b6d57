package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

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
			(103, 'Mon 12:00', $1, $3, 'booked'),
			(104, 'Mon 13:00', $1, $4, 'booked')`, recruiter, candidate, absentCandidate, blockingCandidate)
		return err
	})
}

func (d *day) rejects(ctx context.Context) error {
	d.say("09:00", "A recruiter rejects booking 101.")
	got, err := d.reject(ctx, 101, "")
	if err != nil {
		return err
	}
	if err := d.expectBooking(ctx, 101, "rejected"); err != nil {
		return err
	}
	return d.expect(got, state{what: "created", version: 1, status: "pending", when: dueNow, rows: 1})
}

func (d *day) rejectsAgain(ctx context.Context) error {
	d.say("09:01", `The recruiter presses "reject" again.`)
	got, err := d.reject(ctx, 101, "")
	if err != nil {
		return err
	}
	if err := d.expect(got, state{what: "refreshed", version: 1, status: "pending", when: dueNow, rows: 1}); err != nil {
		return err
	}

	d.say("09:02", "And once more, now with a reason.")
	if got, err = d.reject(ctx, 101, "position filled"); err != nil {
		return err
	}
	return d.expect(got, state{what: "refreshed", version: 2, status: "pending", when: dueNow, rows: 1})
}

func (d *day) sendsDuringOutage(ctx context.Context) error {
	d.say("09:03", "The relay takes what is due, but Telegram is down.")
	d.inbox.setDown(true)
	if err := d.runOnce(ctx, 1); err != nil {
		return err
	}
	return d.expectNow(ctx, rejection101, state{version: 2, status: "pending", when: toRetry, attempts: 1, rows: 1})
}

func (d *day) sendsAfterOutage(ctx context.Context) error {
	d.say("09:10", "Telegram is back. From here on the relay runs in the background.")
	d.inbox.setDown(false)
	d.startRelay(ctx)
	return d.expectNow(ctx, rejection101, state{version: 2, status: "sent", attempts: 2, rows: 1})
}

func (d *day) leavesSentAlone(ctx context.Context) error {
	d.say("09:11", "The recruiter's app repeats the request. Nothing goes out.")
	d.log.Reset()
	got, err := d.reject(ctx, 101, "position filled")
	if err != nil {
		return err
	}
	if err := d.expect(got, state{what: "existing", version: 2, status: "sent", attempts: 2, rows: 1}); err != nil {
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
	results, errs := make([]state, rushRequests), make([]error, rushRequests)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range rushRequests {
		wg.Go(func() {
			<-start
			results[i], errs[i] = d.request(ctx, func(tx pgx.Tx) (outbox.AddResult, error) {
				return d.service.book(ctx, tx, 102, luckyCandidate)
			})
		})
	}
	close(start)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := d.expectBooking(ctx, 102, "booked"); err != nil {
		return err
	}

	first := slices.IndexFunc(results, func(s state) bool { return s.what == "created" })
	if first < 0 {
		return fmt.Errorf("expected 1 created, got %v", results)
	}
	if err := d.expect(results[first], state{what: "created", version: 1, status: "pending", when: dueNow, rows: 2}); err != nil {
		return err
	}
	// The relay is at work meanwhile: some of these found the row pending, others in flight or sent.
	others := slices.Delete(results, first, first+1)
	for _, s := range others {
		if s.what == "created" || s.version != 1 {
			return fmt.Errorf("expected %d that change nothing, got %v", len(others), others)
		}
	}
	d.detail("the other %d: nothing to change", len(others))
	return d.expectNow(ctx, confirmation102, state{version: 1, status: "sent", attempts: 1, rows: 2})
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
	_, err := d.request(ctx, func(tx pgx.Tx) (outbox.AddResult, error) {
		res, bookErr := d.service.book(ctx, tx, 102, lateCandidate)
		if err := expectError(bookErr, errTaken); err != nil {
			return res, err
		}
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM `+d.table).Scan(&inside); err != nil {
			return res, err
		}
		return res, bookErr
	})
	if err := expectError(err, errTaken); err != nil {
		return err
	}
	_, err = d.store.Get(ctx, lateRequest102)
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
	d.say("13:00", "A recruiter rejects booking 103 and pastes a NUL byte into the reason.")
	var refusal error
	got, err := d.request(ctx, func(tx pgx.Tx) (res outbox.AddResult, err error) {
		_, refusal = d.service.reject(ctx, tx, 103, "no-show\x00")
		if err := expectError(refusal, outbox.ErrInvalid); err != nil {
			return res, err
		}
		// The same transaction, which PostgreSQL would have aborted.
		return d.service.reject(ctx, tx, 103, "no-show")
	})
	if err != nil {
		return err
	}
	d.detail("error: %s", refusal)
	d.detail("the same transaction goes on, without the byte:")
	if err := d.expectBooking(ctx, 103, "rejected"); err != nil {
		return err
	}
	if err := d.expect(got, state{what: "created", version: 1, status: "pending", when: dueNow, rows: 3}); err != nil {
		return err
	}
	return d.expectNow(ctx, rejection103, state{version: 1, status: "sent", attempts: 1, rows: 3})
}

func (d *day) changesWhileSending(ctx context.Context) error {
	d.say("15:00", "A recruiter rejects booking 102.")
	sending, release := d.inbox.holdNext(ctx)
	defer release()
	got, err := d.reject(ctx, 102, "")
	if err != nil {
		return err
	}
	if err := d.expect(got, state{what: "created", version: 1, status: "pending", when: dueNow, rows: 4}); err != nil {
		return err
	}
	select {
	case <-sending:
	case <-ctx.Done():
		return ctx.Err()
	}

	d.say("15:01", "While the message is being sent, the recruiter adds a reason.")
	if got, err = d.reject(ctx, 102, "interviewer ill"); err != nil {
		return err
	}
	if err := d.expect(got, state{what: "refreshed", version: 2, status: "pending", when: inFlight, attempts: 1, rows: 4}); err != nil {
		return err
	}
	release()
	return d.expectNow(ctx, rejection102, state{version: 2, status: "sent", attempts: 1, rows: 4})
}

func (d *day) givesUp(ctx context.Context) error {
	d.say("16:00", "A recruiter rejects booking 104, whose candidate has blocked the bot.")
	d.inbox.setBlocked(blockingCandidate)
	got, err := d.reject(ctx, 104, "")
	if err != nil {
		return err
	}
	if err := d.expect(got, state{what: "created", version: 1, status: "pending", when: dueNow, rows: 5}); err != nil {
		return err
	}
	if err := d.expectNow(ctx, rejection104, state{version: 1, status: "failed", attempts: 1, rows: 5}); err != nil {
		return err
	}

	d.say("16:01", "A repeat is no reason to try again.")
	if got, err = d.reject(ctx, 104, ""); err != nil {
		return err
	}
	return d.expect(got, state{what: "existing", version: 1, status: "failed", attempts: 1, rows: 5})
}

func (d *day) requeues(ctx context.Context) error {
	d.say("17:00", "The candidate has unblocked the bot. An operator requeues the message.")
	d.inbox.setBlocked(0)
	n, err := d.store.Requeue(ctx, rejection104)
	if err == nil && n != 1 {
		err = fmt.Errorf("expected 1 row requeued, got %d", n)
	}
	if err != nil {
		return err
	}
	d.relay.Wake()
	return d.expectNow(ctx, rejection104, state{version: 1, status: "sent", attempts: 1, rows: 5})
}

// close stops the relay and shows what the day has left.
func (d *day) close(ctx context.Context) error {
	d.say("18:00", "The relay stops, with nothing left to send. The chats at the end of the day:")
	if err := d.stopRelay(); err != nil {
		return err
	}
	if err := d.runOnce(ctx, 0); err != nil {
		return err
	}
	rows, err := d.store.List(ctx, outbox.Filter{})
	if err != nil {
		return err
	}
	messages := d.inbox.all()
	if err := expectDelivered(rows, messages); err != nil {
		return err
	}

	edits := 0
	slices.SortStableFunc(messages, func(a, b message) int { return cmp.Compare(a.chat, b.chat) })
	for _, m := range messages {
		d.detail("candidate %d  %s: %s", m.chat, m.id, m.text)
		edits += len(m.versions) - 1
	}

	fmt.Fprintln(d.out)
	d.detail("The outbox:")
	tw := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, indent+"TYPE\tBOOKING\tCANDIDATE\tVERSION\tSTATUS\tATTEMPTS\tRECEIPT")
	for _, n := range rows {
		fmt.Fprintf(tw, indent+"%s\t%d\t%d\t%d\t%s\t%d\t%s\n",
			n.Type, n.BookingID, n.CandidateTgID, n.Version, n.Status, n.Attempts, n.Receipt)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n%d requests, %d rows, %d messages, %d edit, nothing sent twice.\n",
		d.requests.Load(), len(rows), len(messages), edits)
	return nil
}
