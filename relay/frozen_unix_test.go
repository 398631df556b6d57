//go:build unix

package relay_test

import (
	"context"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

func TestFrozenWorker(t *testing.T) {
	t.Parallel()
	const rows = 3
	// How many it has sent when it wakes up, the one that it is sending included.
	for at, sent := range map[moment]int{claimed: 0, sending: 1, accepted: rows} {
		t.Run("once_"+string(at)+"_changes_nothing_when_it_wakes_up_after_its_lease", func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			addMany(t, db, rows)
			theirs, ours, g := &provider{}, &provider{}, newGate(t)
			ours.before = func(context.Context, outbox.Notification) error { g.pass(); return nil }
			w := startWorker(t, theirs, workerSpec{URL: db.URL, HoldAt: at, Lease: shortLease, BatchSize: rows})
			until(t, "it is there", func() bool {
				return w.said(string(claimed)) == 1 && w.said(string(sending)+" ") == sent && (at != accepted || theirs.total() == sent)
			})
			require.Equal(t, rows, count(t, db, held))
			require.NoError(t, w.Signal(syscall.SIGSTOP))

			// It wakes up while the other is sending them, or later still.
			run(t, newRelay(t, db.Store, ours, relay.Config{}))
			until(t, "the other has them", func() bool { return count(t, db, "attempts = 2") == rows })
			if at == accepted {
				g.Open()
				untilSettled(t, db)
			}
			var before []outbox.Notification
			for i := range rows {
				before = append(before, db.Get(t, message(i+1).Key()))
			}

			require.NoError(t, w.Signal(syscall.SIGCONT))
			w.release(t)
			until(t, "it finds that it is late", func() bool {
				return w.said(`level=WARN msg="outbox: stale settle, another has the row"`) == sent &&
					w.said("a lease was lost before its message was sent") == rows-sent
			})
			w.kill()
			require.Equal(t, sent, w.said(string(sending)+" "), "what had waited was sent")
			for i := range rows {
				require.Equal(t, before[i], db.Get(t, message(i+1).Key()))
			}
			g.Open()
			untilSettled(t, db)
			ours.requireOnce(t, rows)
		})
	}
}
