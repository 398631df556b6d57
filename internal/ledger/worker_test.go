package ledger_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// memory is a queue that has the same two rows for every claim, and does what it is asked.
type memory struct {
	claims  int
	settled []outbox.Settlement
	renewed []outbox.Lease
}

func (q *memory) Claim(_ context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	q.claims++
	var res outbox.ClaimResult
	for id := range int64(2) {
		n := outbox.Notification{ID: id + 1, Type: key.Type, BookingID: key.BookingID, CandidateTgID: key.CandidateTgID, Version: 3, Payload: []byte(`"one"`)}
		res.Claimed = append(res.Claimed, outbox.Claimed{Lease: outbox.Lease{ID: n.ID, Token: opts.Token}, Notification: n})
	}
	return res, nil
}

func (q *memory) Extend(_ context.Context, leases []outbox.Lease, _ time.Duration) ([]outbox.LeaseResult, error) {
	q.renewed = append(q.renewed, leases...)
	return slices.Repeat([]outbox.LeaseResult{outbox.LeaseDone}, len(leases)), nil
}

func (q *memory) Settle(_ context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	q.settled = append(q.settled, settlements...)
	return slices.Repeat([]outbox.LeaseResult{outbox.LeaseDone}, len(settlements)), nil
}

// hanging is a queue whose calls last until they are let go.
type hanging struct {
	memory
	begun, let chan struct{}
}

func (q *hanging) hang() ([]outbox.LeaseResult, error) {
	q.begun <- struct{}{}
	<-q.let
	return []outbox.LeaseResult{outbox.LeaseDone}, nil
}

func (q *hanging) Extend(context.Context, []outbox.Lease, time.Duration) ([]outbox.LeaseResult, error) {
	return q.hang()
}

func (q *hanging) Settle(context.Context, []outbox.Settlement) ([]outbox.LeaseResult, error) {
	return q.hang()
}

// life plays the life of a worker until a call fails: a claim, a send, a renewal, a settle.
func life(t *testing.T, w *ledger.Worker, q *memory) (claimed []outbox.Claimed, err error) {
	t.Helper()
	watched := w.Queue(q)
	sender := w.Sender(relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) { return "r1", nil }))
	res, err := watched.Claim(t.Context(), outbox.ClaimOptions{Token: outbox.NewToken()})
	if err != nil {
		return nil, err
	}
	receipt, err := sender.Send(t.Context(), res.Claimed[0].Notification)
	if err != nil {
		return res.Claimed, err
	}
	leases := []outbox.Lease{res.Claimed[0].Lease, res.Claimed[1].Lease}
	if _, err := watched.Extend(t.Context(), leases, lease); err != nil {
		return res.Claimed, err
	}
	_, err = watched.Settle(t.Context(), []outbox.Settlement{
		{Lease: leases[0], Verdict: outbox.Delivered, Receipt: receipt}, {Lease: leases[1], Verdict: outbox.HandedBack},
	})
	return res.Claimed, err
}

func TestWorker_calls_its_hook_at_each_moment_in_turn_and_notes_what_was_done(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "journal")
	j, err := ledger.Create(path)
	require.NoError(t, err)
	var moments []ledger.Moment
	w := &ledger.Worker{Name: "w1", Journal: j, Split: true, Accepts: true, Hook: func(_ context.Context, m ledger.Moment) error {
		moments = append(moments, m)
		return nil
	}}
	claimed, err := life(t, w, &memory{})
	require.NoError(t, err)
	require.Equal(t, []ledger.Moment{
		ledger.AfterClaim, ledger.BeforeSend, ledger.AfterAccept, ledger.MidRenew, ledger.AfterRenew,
		ledger.BeforeSettle, ledger.MidSettle, ledger.AfterSettle,
	}, moments)
	require.ElementsMatch(t, ledger.Moments, moments)

	require.NoError(t, j.Close())
	records, err := ledger.Read(path)
	require.NoError(t, err)
	records = slices.DeleteFunc(records, func(r ledger.Record) bool { return r.Trouble != nil }) // of a busy machine
	require.Len(t, records, 5)
	for i := range 2 {
		require.Equal(t, int64(i+1), records[i].Claimed.ID)
		require.Equal(t, int64(3), records[i].Claimed.Version)
		require.Equal(t, claimed[i].Token.String(), records[i].Claimed.Token)
	}
	a := records[2].Accept
	require.Equal(t, key, a.Key)
	require.Equal(t, int64(3), a.Version)
	require.Equal(t, `"one"`, a.Content)
	require.Equal(t, "r1", a.Receipt)
	require.Equal(t, records[0].Claimed.From, a.Claimed)
	require.False(t, a.At.Before(a.Begun))
	for i, verdict := range []outbox.Verdict{outbox.Delivered, outbox.HandedBack} {
		s := records[3+i].Settled
		require.Equal(t, "w1", s.Worker)
		require.Equal(t, int64(3), s.Version)
		require.Equal(t, verdict, s.Verdict)
		require.Equal(t, outbox.LeaseDone, s.Result)
	}
}

// What has been done in the database when a worker dies, by the moment.
func TestWorker_does_nothing_any_more_once_it_is_dead(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		moment                   ledger.Moment
		claims, renewed, settled int
	}{
		{ledger.AfterClaim, 1, 0, 0},
		{ledger.BeforeSend, 1, 0, 0},
		{ledger.AfterAccept, 1, 0, 0},
		{ledger.MidRenew, 1, 1, 0},
		{ledger.AfterRenew, 1, 2, 0},
		{ledger.BeforeSettle, 1, 2, 0},
		{ledger.MidSettle, 1, 2, 1},
		{ledger.AfterSettle, 1, 2, 2},
	} {
		t.Run(string(tc.moment), func(t *testing.T) {
			t.Parallel()
			j, err := ledger.Create(filepath.Join(t.TempDir(), "journal"))
			require.NoError(t, err)
			w := &ledger.Worker{Name: "w1", Journal: j, Split: true}
			w.Hook = func(_ context.Context, m ledger.Moment) error {
				if m == tc.moment {
					w.Die()
				}
				return nil
			}
			q := &memory{}
			_, err = life(t, w, q)
			require.ErrorIs(t, err, ledger.ErrDead)
			require.Equal(t, tc.claims, q.claims)
			require.Len(t, q.renewed, tc.renewed)
			require.Len(t, q.settled, tc.settled)
			queue := w.Queue(q)
			_, err = queue.Claim(t.Context(), outbox.ClaimOptions{})
			require.ErrorIs(t, err, ledger.ErrDead)
			_, err = queue.Extend(t.Context(), nil, lease)
			require.ErrorIs(t, err, ledger.ErrDead)
			_, err = queue.Settle(t.Context(), nil)
			require.ErrorIs(t, err, ledger.ErrDead)
			require.NoError(t, j.Close())
		})
	}
}

func TestWorker_ends_a_call_with_the_error_of_its_hook(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, m := range ledger.Moments {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			j, err := ledger.Create(filepath.Join(t.TempDir(), "journal"))
			require.NoError(t, err)
			w := &ledger.Worker{Name: "w1", Journal: j, Split: true, Hook: func(_ context.Context, at ledger.Moment) error {
				if at == m {
					return broken
				}
				return nil
			}}
			_, err = life(t, w, &memory{})
			require.ErrorIs(t, err, broken)
			require.NoError(t, j.Close())
		})
	}
}

// A worker that is killed in a call can say nothing afterwards.
func TestWorker_notes_a_call_that_takes_long_before_it_ends(t *testing.T) {
	t.Parallel()
	q := &hanging{begun: make(chan struct{}), let: make(chan struct{})}
	for name, call := range map[string]func(relay.Queue) error{
		"renew": func(queue relay.Queue) error {
			_, err := queue.Extend(t.Context(), []outbox.Lease{{}}, lease)
			return err
		},
		"settle": func(queue relay.Queue) error {
			_, err := queue.Settle(t.Context(), []outbox.Settlement{{}})
			return err
		},
	} {
		path := filepath.Join(t.TempDir(), "journal")
		j, err := ledger.Create(path)
		require.NoError(t, err)
		w := &ledger.Worker{Name: "w1", Journal: j}
		ended := make(chan error, 1)
		go func() { ended <- call(w.Queue(q)) }()
		<-q.begun
		troubles := func() (found []ledger.Trouble) {
			records, err := ledger.Read(path)
			require.NoError(t, err)
			for _, r := range records {
				if r.Trouble != nil {
					found = append(found, *r.Trouble)
				}
			}
			return found
		}
		require.Eventually(t, func() bool { return len(troubles()) == 1 }, 30*time.Second, 10*time.Millisecond)
		q.let <- struct{}{}
		require.NoError(t, <-ended)
		got := troubles()
		require.Len(t, got, 2)
		require.Equal(t, name, got[0].Call)
		require.Equal(t, "w1", got[0].Worker)
		require.Zero(t, got[0].To)
		require.True(t, got[0].From.Equal(got[1].From), "it is the same call")
		require.True(t, got[1].To.After(got[1].From))
		require.NoError(t, j.Close())
	}
}

type asked struct{ relay.SenderFunc }

func (asked) Reconcile(context.Context, outbox.Notification, int64) (string, bool, error) {
	return "r1", true, nil
}

func TestWorker_keeps_what_its_queue_and_sender_can(t *testing.T) {
	t.Parallel()
	w := &ledger.Worker{}
	_, ok := w.Sender(asked{}).(relay.Reconciler)
	require.True(t, ok)
	_, ok = w.Sender(relay.SenderFunc(nil)).(relay.Reconciler)
	require.False(t, ok)
	_, ok = w.Queue(&outbox.PGStore{}).(relay.Listener)
	require.True(t, ok)
	_, ok = w.Queue(&memory{}).(relay.Listener)
	require.False(t, ok)
}
