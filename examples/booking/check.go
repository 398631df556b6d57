package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

// state is what a line of the day says of a notification.
type state struct {
	what     string // the outcome of an add; "now": the relay has had the row since
	version  int64
	status   outbox.Status
	when     string // it will be sent: one of those below; "": not at all
	attempts int
	rows     int // of the whole outbox
}

const (
	dueNow   = "due now"
	toRetry  = "to retry"
	inFlight = "in flight"
)

func (s state) String() string {
	return fmt.Sprintf("%-9s  version %d  %-7s  %-9s  attempts %d  rows %d",
		s.what, s.version, s.status, s.when, s.attempts, s.rows)
}

// look reads the row of key, from the pool or in a transaction.
func (d *day) look(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, key outbox.Key) (state, error) {
	s := state{what: "now"}
	err := db.QueryRow(ctx, `SELECT version, status, attempts, CASE
			WHEN status <> 'pending' THEN ''
			WHEN locked_at IS NOT NULL THEN '`+inFlight+`'
			WHEN next_retry_at IS NOT NULL THEN '`+toRetry+`'
			ELSE '`+dueNow+`' END, (SELECT count(*) FROM `+d.table+`)
		FROM `+d.table+` WHERE type = $1 AND booking_id = $2 AND candidate_tg_id = $3`,
		key.Type, key.BookingID, key.CandidateTgID).Scan(&s.version, &s.status, &s.attempts, &s.when, &s.rows)
	return s, err
}

// lookAfter is look for the row that an add has returned, which has to be the same.
func (d *day) lookAfter(ctx context.Context, tx pgx.Tx, res outbox.AddResult) (state, error) {
	n := res.Notification
	s, err := d.look(ctx, tx, n.Key())
	if err != nil {
		return s, err
	}
	if s.version != n.Version || s.status != n.Status || s.attempts != n.Attempts || (s.when == inFlight) != res.InFlight {
		return s, fmt.Errorf("expected the row as the add returned it, %+v, got: %s", res, s)
	}
	s.what = string(res.Outcome)
	return s, nil
}

// expect compares a state with what it should be, and prints it.
func (d *day) expect(got, want state) error {
	if got != want {
		return fmt.Errorf("expected: %s, got: %s", want, got)
	}
	d.detail("%s", got)
	return nil
}

// patience bounds the wait for the relay, which takes milliseconds.
const patience = 30 * time.Second

// expectNow waits until the row of key is settled, unless it is to be pending: the
// relay may be at it in the background. Then it prints what has happened in the chats,
// and the row.
func (d *day) expectNow(ctx context.Context, key outbox.Key, want state) error {
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	n, err := d.store.Get(ctx, key)
	for err == nil && n.Status == outbox.StatusPending && want.status != outbox.StatusPending {
		select {
		case <-tick.C:
			n, err = d.store.Get(ctx, key)
		case <-waiting.Done():
			err = fmt.Errorf("expected %s to become %s, got %s: %w", key, want.status, n.Status, waiting.Err())
		}
	}
	if err != nil {
		return err
	}
	for _, what := range d.inbox.takeNews() {
		d.detail("%s", what)
	}
	got, err := d.look(ctx, d.pool, key)
	if err != nil {
		return err
	}
	want.what = "now"
	if err := d.expect(got, want); err != nil {
		return err
	}
	if n.Status != outbox.StatusSent {
		d.detail("last error: %s", n.LastError)
	}
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

// expectDelivered checks that all is sent: to each candidate one message about each
// row, which shows what the row says now, and no version of it twice.
func expectDelivered(rows []outbox.Notification, messages []message) error {
	if len(rows) != len(messages) {
		return fmt.Errorf("expected as many messages as rows, got %d and %d", len(messages), len(rows))
	}
	for _, n := range rows {
		i := slices.IndexFunc(messages, func(m message) bool { return m.about == n.Key() })
		if i < 0 {
			return fmt.Errorf("expected a message about %s, got none", n.Key())
		}
		m := messages[i]
		text, err := textOf(n)
		if err != nil {
			return err
		}
		if n.Status != outbox.StatusSent || n.SentVersion != n.Version || n.Receipt != m.id {
			return fmt.Errorf("expected %s to be sent as it is, in %s, got %+v", n.Key(), m.id, n)
		}
		if m.chat != n.CandidateTgID || m.text != text || m.versions[len(m.versions)-1] != n.Version {
			return fmt.Errorf("expected %s to say %q, got %+v", m.id, text, m)
		}
		for i, v := range m.versions[1:] {
			if v <= m.versions[i] {
				return fmt.Errorf("expected each version of %s once and in order, got %d", m.id, m.versions)
			}
		}
	}
	return nil
}
