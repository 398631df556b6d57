package ledger

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

// ChangesSQL has the database record each change of outbox_notifications, in the same
// transaction. It costs one insert for each.
const ChangesSQL = `
CREATE TABLE outbox_changes (
	seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	id bigint NOT NULL, at timestamptz NOT NULL, began timestamptz NOT NULL, before jsonb, after jsonb
);
CREATE FUNCTION outbox_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO outbox_changes (id, at, began, before, after)
	VALUES (coalesce(NEW.id, OLD.id), clock_timestamp(), now(), to_jsonb(OLD), to_jsonb(NEW));
	RETURN NULL;
END
$$;
CREATE TRIGGER outbox_changed AFTER INSERT OR UPDATE OR DELETE ON outbox_notifications
	FOR EACH ROW EXECUTE FUNCTION outbox_changed()`

// Change is one change of one row. The changes of a row are in the order of Seq, as
// each held its lock.
type Change struct {
	Seq    int64
	ID     int64
	At     time.Time // the database's clock
	Began  time.Time // the transaction
	Before *State    // nil: it was not there
	After  *State
}

// State is a row as far as deliveries are concerned.
type State struct {
	Status       outbox.Status `json:"status"`
	Version      int64         `json:"version"`
	SentVersion  int64         `json:"sent_version"`
	LeaseVersion *int64        `json:"lease_version"`
	Attempts     int           `json:"attempts"`
	Token        string        `json:"lease_token"`
	LeaseUntil   *time.Time    `json:"lease_until"`
	Receipt      string        `json:"receipt"`
	Error        string        `json:"last_error"`
	Payload      any           `json:"payload_json"`
	Recruiter    any           `json:"recruiter_tg_id"`
	CreatedAt    *time.Time    `json:"created_at"`
	NextRetryAt  *time.Time    `json:"next_retry_at"`
	NotAfter     *time.Time    `json:"not_after"`
}

func (c Change) String() string { return fmt.Sprintf("%v -> %v", c.Before, c.After) }

func (s *State) String() string {
	if s == nil {
		return "none"
	}
	until, leased := "", int64(0)
	if s.LeaseUntil != nil {
		until = clock(*s.LeaseUntil)
	}
	if s.LeaseVersion != nil {
		leased = *s.LeaseVersion
	}
	return fmt.Sprintf("{%s v%d, sent v%d as %q, attempts %d, token %q of v%d until %q, error %q}",
		s.Status, s.Version, s.SentVersion, s.Receipt, s.Attempts, s.token(), leased, until, s.Error)
}

// token is the token as [outbox.Token] prints it.
func (s *State) token() string { return strings.ReplaceAll(s.Token, "-", "") }

// leased reports whether a lease holds at that time.
func (s *State) leased(at time.Time) bool {
	return s.Token != "" && s.LeaseUntil != nil && s.LeaseUntil.After(at)
}

// due reports whether the row was due at that time.
func (s *State) due(at time.Time) bool {
	due := s.NextRetryAt
	if due == nil {
		due = s.CreatedAt
	}
	return due == nil || !due.After(at)
}

// late reports whether it was too late to deliver the row.
func (s *State) late(at time.Time) bool { return s.NotAfter != nil && !s.NotAfter.After(at) }

func (s *State) settled() bool {
	return s.Status == outbox.StatusSent || s.Status == outbox.StatusFailed
}

// requeues reports whether a settled row became pending.
func (c Change) requeues() bool {
	return c.Before != nil && c.After != nil && c.Before.settled() && !c.After.settled()
}

// ReadChanges returns all that was recorded.
func ReadChanges(ctx context.Context, db interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}) ([]Change, error) {
	rows, err := db.Query(ctx, "SELECT seq, id, at, began, before, after FROM outbox_changes ORDER BY seq")
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	changes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Change])
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	return changes, nil
}

// changes checks what was done to each row, by the database's own record.
func (c *checker) changes() {
	if c.Changes == nil {
		return
	}
	for id, changes := range c.changed {
		for _, ch := range changes {
			c.change(c.keys[id], ch)
		}
	}
	for id, claims := range c.claims {
		for _, cl := range claims {
			if !slices.ContainsFunc(c.changed[id], func(ch Change) bool {
				return ch.After != nil && ch.After.token() == cl.Token && ch.After.Version == cl.Version && within(ch.At, cl.From, cl.To)
			}) {
				c.violation(OlderContent, c.keys[id], id, "%s was given version %d with token %s, which no row had between %s and %s",
					cl.Worker, cl.Version, cl.Token, clock(cl.From), clock(cl.To))
			}
		}
	}
	for id, settled := range c.settled {
		for _, s := range settled {
			if s.Result == outbox.LeaseStale {
				continue
			}
			if !slices.ContainsFunc(c.changed[id], func(ch Change) bool { return c.isSettled(ch, s) }) {
				c.violation(StalePassed, c.keys[id], id, "%s was told that version %d is settled (%s, %s), and no change of the row between %s and %s is that, with token %s",
					s.Worker, s.Version, s.Verdict, s.Result, clock(s.From), clock(s.To), s.Token)
			}
		}
	}
	for _, b := range c.Booked {
		if from, to := c.span(b); b.Outcome == outbox.OutcomeExisting && !c.wasSettled(b, from, to) {
			c.violation(Lost, b.Key, b.ID, "request %s found version %d settled, which it was at no time between %s and %s", b.Request, b.Version, clock(from), clock(to))
		}
	}
}

// span is from the first attempt at b to the end of the last: forever where one of them
// never told, all time where nothing was noted.
func (c *checker) span(b Commit) (from, to time.Time) {
	tries := c.attempts[add{b.Request, b.Key}]
	if len(tries) == 0 {
		return time.Time{}, forever
	}
	from = tries[0].From
	for _, t := range tries {
		if t.From.Before(from) {
			from = t.From
		}
		switch {
		case c.ended(t, tries):
		case t.To.IsZero():
			to = forever
		case t.To.After(to):
			to = t.To
		}
	}
	return from, to
}

// wasSettled reports whether the row was settled, with the version of b, at a moment between
// from and to. An add locks the row that it finds: a change that follows is recorded later.
func (c *checker) wasSettled(b Commit, from, to time.Time) bool {
	changes := c.changed[b.ID]
	for i, ch := range changes {
		if ch.After == nil || !ch.After.settled() || ch.After.Version != b.Version || ch.At.After(to) {
			continue
		}
		if i == len(changes)-1 || !changes[i+1].At.Before(from.Truncate(time.Microsecond)) {
			return true
		}
	}
	return false
}

// within includes the microsecond that PostgreSQL cuts off.
func within(at, from, to time.Time) bool {
	return !at.Before(from.Truncate(time.Microsecond)) && !at.After(to)
}

// isSettled reports whether ch is what s says. A Reconciler may have been told of an older version.
func (c *checker) isSettled(ch Change, s Settled) bool {
	if ch.Before == nil || ch.After == nil || ch.Before.token() != s.Token || ch.After.LeaseUntil != nil || !within(ch.At, s.From, s.To) {
		return false
	}
	return s.Verdict != outbox.Delivered ||
		ch.After.Receipt == s.Receipt && (ch.After.SentVersion == s.Version || c.Reconciled && ch.After.SentVersion < s.Version)
}

// change checks one change by itself.
func (c *checker) change(key outbox.Key, ch Change) {
	old, now := ch.Before, ch.After
	if old == nil {
		return
	}
	if now == nil {
		switch {
		case !old.settled():
			c.violation(Lost, key, ch.ID, "the row was deleted at %s, and was not settled", clock(ch.At))
		case !c.purged(key, true, ch.At, ch.At):
			c.violation(Lost, key, ch.ID, "the row was deleted at %s, and none was purged", clock(ch.At))
		}
		return
	}
	what := fmt.Sprintf("at %s, %s", clock(ch.At), ch)
	same := fmt.Sprint(old.Payload) == fmt.Sprint(now.Payload)
	switch {
	case now.Version < old.Version:
		c.violation(Impossible, key, ch.ID, "the version fell %s", what)
	case now.Version == old.Version && !same && (now.Payload != nil || now.Status != outbox.StatusSent || !c.purged(key, false, ch.At, ch.At)):
		c.violation(Impossible, key, ch.ID, "the content changed, and the version did not, %s", what)
	case now.Version > old.Version && same && old.Recruiter == now.Recruiter:
		// Sound as long as nobody adds one key several times in a batch, A, B and A again.
		c.violation(Duplicate, key, ch.ID, "an add that changed nothing made a new version %s", what)
	case now.Version != old.Version && old.settled():
		c.violation(Impossible, key, ch.ID, "an add changed a settled row %s", what)
	}
	if ch.requeues() && !slices.ContainsFunc(c.requeues[key], func(r Requeue) bool {
		return !ch.At.Before(r.From.Truncate(time.Microsecond)) && (r.To.IsZero() || !ch.At.After(r.To))
	}) {
		c.violation(Impossible, key, ch.ID, "a settled row became pending, and nobody requeued it, %s", what)
	}
	if now.Status == outbox.StatusSent && !old.settled() && (old.Token == "" || old.LeaseVersion == nil || *old.LeaseVersion != old.Version || now.SentVersion != old.Version) {
		c.violation(Lost, key, ch.ID, "a row became sent by a delivery of other content %s", what)
	}
	switch {
	case now.LeaseUntil != nil && old.leased(ch.Began) && !sameClaim(now.token(), old.token()):
		c.violation(LeaseBroken, key, ch.ID, "a row was claimed while another held it %s", what)
	case now.Version > old.Version && old.leased(ch.At) && (now.Token != old.Token || now.LeaseUntil == nil || !now.LeaseUntil.Equal(*old.LeaseUntil)),
		// What settles a row leaves it another token, or none.
		old.leased(ch.At) && now.Token == old.Token && now.LeaseUntil == nil:
		c.violation(LeaseBroken, key, ch.ID, "a refresh ended a lease %s", what)
	case old.leased(ch.At) && now.Token == old.Token && old.LeaseUntil.Sub(*now.LeaseUntil) > c.Lease/2: // renewals may overtake each other
		c.violation(LeaseBroken, key, ch.ID, "a lease was made shorter %s", what)
	case old.leased(ch.At) && now.Token == old.Token && now.LeaseUntil.Equal(*old.LeaseUntil) && now.Attempts != old.Attempts:
		c.violation(LeaseBroken, key, ch.ID, "a refresh changed the attempts of a delivery that is under way %s", what)
	}
	if now.LeaseUntil != nil && now.Token != old.Token && slices.ContainsFunc(c.claims[ch.ID], func(cl Claimed) bool {
		return cl.Token == now.token() && cl.To.Before(ch.At) // of a lease that nobody heard of there is nothing to come
	}) && slices.ContainsFunc(c.claims[ch.ID], func(cl Claimed) bool {
		return cl.Token == now.token() && within(ch.At, cl.From, cl.To) // nor has it anything to lose
	}) {
		c.violation(LeaseBroken, key, ch.ID, "a row was leased a second time by one token %s", what)
	}
	claimed := now.LeaseUntil != nil && !sameClaim(now.token(), old.token())
	switch {
	case claimed && !old.due(ch.Began):
		c.violation(Impossible, key, ch.ID, "a row was claimed that was not due %s", what)
	case claimed && !c.Reconciled && old.late(ch.Began):
		c.violation(Impossible, key, ch.ID, "a row was claimed that had expired %s", what)
	case now.Status == outbox.StatusFailed && old.Status == outbox.StatusPending:
		c.reason(key, ch)
	}
	if claimed && !c.Reconciled && (now.LeaseVersion == nil || *now.LeaseVersion != now.Version) {
		c.violation(OlderContent, key, ch.ID, "a row was leased for other content than it has %s", what)
	}
}

// reason checks that a row failed for a reason that holds.
func (c *checker) reason(key outbox.Key, ch Change) {
	text := ch.After.Error
	attempts := ch.Before.Attempts
	for _, other := range c.changed[ch.ID] { // an add may have begun to count anew since the claim
		if other.After != nil && other.After.Token != "" && other.After.Token == ch.Before.Token {
			attempts = max(attempts, other.After.Attempts)
		}
	}
	switch {
	case strings.HasPrefix(text, expired):
		if !ch.Before.late(ch.Began) {
			c.violation(Lost, key, ch.ID, "failed as expired, and was not, at %s, %s", clock(ch.At), ch)
		}
	case outOfAttempts(text), strings.HasPrefix(text, outcomeUnknown): // see row
	case c.Permanent != nil && !slices.Contains(c.Permanent, text) && (c.MaxAttempts < 0 || attempts < c.MaxAttempts):
		c.violation(Lost, key, ch.ID, "failed after %d attempts, of %d, for what was to be tried again, at %s, %s", attempts, c.MaxAttempts, clock(ch.At), ch)
	}
}

// failed reports whether a row had failed with a reason for its newest content.
func (c *checker) failed(id, newest int64) bool {
	return slices.ContainsFunc(c.changed[id], func(ch Change) bool {
		return ch.After != nil && ch.After.Status == outbox.StatusFailed && ch.After.Version == newest && ch.After.Error != ""
	})
}
