package relay_test

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/seed3357934d/outbox"
)

// fakeQueue is a queue in memory, with a clock of its own, that keeps the rules of
// PGStore. Tests of the relay's timing run on it under testing/synctest.
type fakeQueue struct {
	ahead time.Duration // of its clock before the process's

	mu      sync.Mutex
	rows    map[int64]*fakeRow
	claims  []outbox.ClaimOptions // those that were answered
	claimed []time.Time
	settles [][]outbox.Settlement
	extends int

	// claimErr and so on, where not nil, say how a call fails.
	claimErr, settleErr, extendErr func() error
	settleBad                      func(outbox.Settlement) error

	busy  bool                                    // another relay is claiming, for ever
	takes func(outbox.ClaimOptions) time.Duration // how long a claim takes; nil: no time
}

type fakeRow struct {
	outbox.Notification
	token     outbox.Token
	until     time.Time
	leased    int64
	held      bool // by a caller's transaction
	suspect   bool
	handbacks int
}

func (row *fakeRow) due() time.Time {
	if row.NextRetryAt.IsZero() {
		return row.CreatedAt
	}
	return row.NextRetryAt
}

func newFakeQueue(n int) *fakeQueue {
	q := &fakeQueue{rows: make(map[int64]*fakeRow)}
	for i := range n {
		q.add(int64(i + 1))
	}
	return q
}

func (q *fakeQueue) now() time.Time { return time.Now().Add(q.ahead).Round(0) }

func (q *fakeQueue) add(id int64) *fakeRow { return q.addAt(id, q.now()) }

func (q *fakeQueue) addAt(id int64, at time.Time) *fakeRow {
	q.mu.Lock()
	defer q.mu.Unlock()
	row := &fakeRow{Notification: outbox.Notification{ID: id, Type: "reject", BookingID: id, Status: outbox.StatusPending,
		Version: 1, CreatedAt: at}}
	q.rows[id] = row
	return row
}

// change does something to a row under the lock.
func (q *fakeQueue) change(id int64, fn func(*fakeRow)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	fn(q.rows[id])
}

func (q *fakeQueue) row(id int64) fakeRow {
	q.mu.Lock()
	defer q.mu.Unlock()
	return *q.rows[id]
}

func (q *fakeQueue) count(status outbox.Status) (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, row := range q.rows {
		if row.Status == status {
			n++
		}
	}
	return n
}

func (q *fakeQueue) leases() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, row := range q.rows {
		if row.token != (outbox.Token{}) && row.until.After(q.now()) {
			n++
		}
	}
	return n
}

func (q *fakeQueue) fail(which *func() error, fn func() error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	*which = fn
}

func failing() error { return fmt.Errorf("connection refused") }

// claimsMade returns the options of the claims so far.
func (q *fakeQueue) claimsMade() []outbox.ClaimOptions {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.claims)
}

func (q *fakeQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (res outbox.ClaimResult, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.claimErr != nil {
		if err := q.claimErr(); err != nil {
			return res, err
		}
	}
	q.claims = append(q.claims, opts)
	q.claimed = append(q.claimed, time.Now())
	if q.busy && opts.InTurn {
		return outbox.ClaimResult{Busy: true}, nil
	}
	if q.takes != nil {
		q.mu.Unlock()
		take(q.takes(opts))
		q.mu.Lock()
	}
	now := q.now()
	var due []*fakeRow
	for _, row := range q.rows {
		mine := row.token == opts.Token && opts.Token != outbox.Token{}
		row.suspect = !mine && row.token != outbox.Token{} && !row.until.IsZero() && row.Attempts == opts.MaxAttempts-1
		if row.suspect && opts.Suspects == outbox.LeaveSuspects {
			continue
		}
		if row.Status == outbox.StatusPending && !row.held && !row.due().Before(opts.Since) && !slices.Contains(opts.Except, row.ID) && !row.NextRetryAt.After(now) &&
			(row.token == outbox.Token{} || !row.until.After(now) || mine) {
			due = append(due, row)
		}
	}
	slices.SortFunc(due, func(a, b *fakeRow) int {
		return cmp.Or(a.due().Compare(b.due()), cmp.Compare(a.ID, b.ID))
	})
	if n := min(len(due), opts.Limit); n > 0 {
		res.Last = due[n-1].due()
	}
	suspects := 0
	for _, row := range due[:min(len(due), opts.Limit)] {
		if row.suspect {
			if suspects++; suspects > 1 && opts.Suspects == outbox.OneSuspect {
				continue
			}
		}
		unknown := row.token != outbox.Token{} && row.token != opts.Token
		ask := opts.Reconcile && unknown
		if !ask && !row.NotAfter.IsZero() && !row.NotAfter.After(now) {
			row.Status, row.LastError = outbox.StatusFailed, "expired"
			res.Failed = append(res.Failed, row.Notification)
			continue
		}
		if opts.MaxAttempts > 0 && row.Attempts >= opts.MaxAttempts && (!ask || row.Attempts > opts.MaxAttempts) {
			row.Status, row.LastError = outbox.StatusFailed, "out of attempts"
			res.Failed = append(res.Failed, row.Notification)
			continue
		}
		c := outbox.Claimed{Suspect: row.suspect}
		if row.token != (outbox.Token{}) && (opts.Reconcile || row.leased == row.Version) {
			c.UnknownVersion = row.leased
			c.Expired = !row.NotAfter.IsZero() && !row.NotAfter.After(now)
		} else {
			row.leased = row.Version
		}
		row.Attempts++
		row.token, row.until, row.LockedAt = opts.Token, now.Add(opts.Lease), now
		c.Lease, c.Notification = outbox.Lease{ID: row.ID, Token: row.token}, row.Notification
		res.Claimed = append(res.Claimed, c)
	}
	return res, nil
}

func (q *fakeQueue) Extend(ctx context.Context, leases []outbox.Lease, d time.Duration) ([]outbox.LeaseResult, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.extendErr != nil {
		if err := q.extendErr(); err != nil {
			return nil, err
		}
	}
	q.extends++
	results := make([]outbox.LeaseResult, len(leases))
	for i, l := range leases {
		row := q.rows[l.ID]
		switch {
		case row == nil || row.token != l.Token || row.Status != outbox.StatusPending:
			results[i] = outbox.LeaseStale
		case row.held:
			results[i] = outbox.LeaseHeld
		default:
			row.until = q.now().Add(d)
			results[i] = outbox.LeaseDone
		}
	}
	return results, nil
}

func (q *fakeQueue) Settle(ctx context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.settleErr != nil {
		if err := q.settleErr(); err != nil {
			return nil, err
		}
	}
	for _, st := range settlements {
		if q.settleBad != nil {
			if err := q.settleBad(st); err != nil {
				return nil, err
			}
		}
	}
	q.settles = append(q.settles, settlements)
	results := make([]outbox.LeaseResult, len(settlements))
	for i, st := range settlements {
		results[i] = q.settle(st)
	}
	return results, nil
}

func (q *fakeQueue) settle(st outbox.Settlement) outbox.LeaseResult {
	row := q.rows[st.ID]
	if row.token != st.Token || row.Status != outbox.StatusPending {
		return outbox.LeaseStale
	}
	if row.held {
		return outbox.LeaseHeld
	}
	row.token = outbox.Token{}
	if st.Unknown {
		row.token = outbox.NewToken()
	}
	row.until, row.LockedAt = time.Time{}, time.Time{}
	current := row.leased == row.Version || st.Asked
	switch st.Verdict {
	case outbox.Delivered:
		row.SentVersion, row.Receipt = row.leased, st.Receipt
		if current {
			row.Status = outbox.StatusSent
		}
	case outbox.Retry:
		row.LastError = st.Error
		if current {
			row.NextRetryAt = q.now().Add(st.RetryIn)
		}
	case outbox.Failed:
		row.LastError = st.Error
		if current {
			row.Status = outbox.StatusFailed
		}
	case outbox.HandedBack:
		row.Attempts--
		row.handbacks++
	}
	if !current {
		row.Attempts = 0
		return outbox.LeaseSuperseded
	}
	return outbox.LeaseDone
}

// logBook keeps what was logged.
type logBook struct {
	mu    sync.Mutex
	lines []string
}

func (b *logBook) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, string(p))
	return len(p), nil
}

// count is how many lines hold text.
func (b *logBook) count(text string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}
