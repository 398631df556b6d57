package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/relay"
)

// broken is a relay that is wrong in one way, beside a sound store.
type broken struct {
	relay.Queue
	settle func(outbox.Settlement) (_ outbox.Settlement, forget bool)
	before func(context.Context) error // a claim
}

func (b *broken) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	if b.before != nil {
		if err := b.before(ctx); err != nil {
			return outbox.ClaimResult{}, err
		}
	}
	return b.Queue.Claim(ctx, opts)
}

func (b *broken) Settle(ctx context.Context, all []outbox.Settlement) ([]outbox.LeaseResult, error) {
	if b.settle == nil {
		return b.Queue.Settle(ctx, all)
	}
	results := make([]outbox.LeaseResult, len(all))
	var rest []outbox.Settlement
	var at []int
	for i, st := range all {
		if st, forget := b.settle(st); !forget {
			rest, at = append(rest, st), append(at, i)
		} else {
			results[i] = outbox.LeaseDone
		}
	}
	if len(rest) == 0 {
		return results, nil
	}
	settled, err := b.Queue.Settle(ctx, rest)
	for i, res := range settled {
		results[at[i]] = res
	}
	return results, err
}

// sending is a sender that is a func.
type sending func(context.Context, outbox.Notification) (string, error)

func (s sending) Send(ctx context.Context, n outbox.Notification) (string, error) { return s(ctx, n) }

// settling is a relay that settles otherwise; settle is told the number of the settlement.
func settling(settle func(n int64, st outbox.Settlement) (_ outbox.Settlement, forget bool)) func(*child, relay.Queue, relay.Sender) (relay.Queue, relay.Sender) {
	return func(_ *child, q relay.Queue, s relay.Sender) (relay.Queue, relay.Sender) {
		var n atomic.Int64
		return &broken{Queue: q, settle: func(st outbox.Settlement) (outbox.Settlement, bool) { return settle(n.Add(1), st) }}, s
	}
}

// misSending is a relay that sends otherwise.
func misSending(send func(ctx context.Context, s relay.Sender, n outbox.Notification) (string, error)) func(*child, relay.Queue, relay.Sender) (relay.Queue, relay.Sender) {
	return func(_ *child, q relay.Queue, s relay.Sender) (relay.Queue, relay.Sender) {
		return q, sending(func(ctx context.Context, n outbox.Notification) (string, error) { return send(ctx, s, n) })
	}
}

func init() {
	breaks = map[string]func(*child, relay.Queue, relay.Sender) (relay.Queue, relay.Sender){
		"forgets_a_result": settling(func(n int64, st outbox.Settlement) (outbox.Settlement, bool) {
			return st, st.Verdict == outbox.Delivered && n%5 == 0
		}),
		"takes_a_delivery_for_failed": settling(func(n int64, st outbox.Settlement) (outbox.Settlement, bool) {
			if st.Verdict == outbox.Delivered && n%5 == 0 {
				st.Verdict, st.Receipt, st.Error = outbox.Retry, "", "failed"
			}
			return st, false
		}),
		"takes_a_failure_for_a_delivery": settling(func(_ int64, st outbox.Settlement) (outbox.Settlement, bool) {
			if st.Verdict == outbox.Retry {
				st.Verdict, st.Receipt, st.Error = outbox.Delivered, "r0", ""
			}
			return st, false
		}),
		"gives_up_early": settling(func(_ int64, st outbox.Settlement) (outbox.Settlement, bool) {
			if st.Verdict == outbox.Retry {
				st.Verdict = outbox.Failed
			}
			return st, false
		}),
		"sends_twice": misSending(func(ctx context.Context, s relay.Sender, n outbox.Notification) (string, error) {
			receipt, err := s.Send(ctx, n)
			if err == nil && n.ID%5 == 0 {
				return s.Send(ctx, n)
			}
			return receipt, err
		}),
		"sends_what_it_read_first": misSending(func(ctx context.Context, s relay.Sender, n outbox.Notification) (string, error) {
			if n.ID%5 == 0 {
				n.Payload = json.RawMessage(`{"content":"older"}`)
			}
			return s.Send(ctx, n)
		}),
		"ends_the_leases_of_others": func(c *child, q relay.Queue, s relay.Sender) (relay.Queue, relay.Sender) {
			return &broken{Queue: q, before: func(ctx context.Context) error {
				_, err := c.pool.Exec(ctx, "UPDATE outbox_notifications SET lease_until = now() WHERE lease_until > now()")
				return err
			}}, s
		},
	}
}

// What a relay does wrong is seen among all the faults. A round is short: one in five of
// its messages goes wrong.
func TestRun_finds_a_relay(t *testing.T) {
	server, err := pgserver.Start(t.Context(), pgserver.Options{Version: os.Getenv("OUTBOX_TEST_POSTGRES"), Settings: settings, Logf: t.Logf})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop()) })
	for name, kinds := range map[string][]ledger.Kind{
		"forgets_a_result":               {ledger.Duplicate},
		"sends_twice":                    {ledger.Duplicate},
		"takes_a_delivery_for_failed":    {ledger.Duplicate},
		"takes_a_failure_for_a_delivery": {ledger.Lost},
		"gives_up_early":                 {ledger.Lost},
		"sends_what_it_read_first":       {ledger.Impossible},
		"ends_the_leases_of_others":      {ledger.Duplicate},
	} {
		t.Run("that_"+name, func(t *testing.T) {
			var out bytes.Buffer
			opts := options{seed: 3, server: server, url: server.URL, dir: t.TempDir(), length: 3 * time.Second, broken: name}
			found := make(map[ledger.Kind]int)
			is := func() bool { return slices.ContainsFunc(kinds, func(k ledger.Kind) bool { return found[k] > 0 }) }
			for first := 0; first < 8 && !is(); first++ {
				opts.report = newReport()
				ok, err := run(t.Context(), opts, limits{first: first, rounds: 1}, &out)
				require.NoError(t, err, "%s", &out)
				clean, allowed := true, 0
				for _, s := range opts.report.modes {
					allowed += s.total.DuplicatesAllowed
					for _, v := range s.total.Violations {
						found[v.Kind]++
						clean = false
					}
				}
				require.Equal(t, clean, ok, "%s", &out)
				t.Logf("%v, and %d duplicates allowed", found, allowed)
			}
			require.True(t, is(), "%v: %s", found, &out)
		})
	}
}
