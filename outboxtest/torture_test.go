package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// provider is what a sender's messages go to.
type provider struct {
	mu       sync.Mutex
	accepted map[string]int // by id and version
}

func (p *provider) accept(n outbox.Notification) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.accepted == nil {
		p.accepted = make(map[string]int)
	}
	id := fmt.Sprintf("%d/%d", n.ID, n.Version)
	p.accepted[id]++
	return fmt.Sprintf("%s #%d", id, p.accepted[id])
}

func (p *provider) count(n outbox.Notification) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted[fmt.Sprintf("%d/%d", n.ID, n.Version)]
}

func (p *provider) Send(ctx context.Context, n outbox.Notification) (string, error) {
	if err := pause(ctx, time.Millisecond); err != nil {
		return "", err
	}
	return p.accept(n), nil
}

func TestTorture_passes_a_good_sender(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]relay.Delivery{"AtLeastOnce": relay.AtLeastOnce, "AtMostOnce": relay.AtMostOnce} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p provider
			f := &fakeTB{TB: t, ctx: t.Context()}
			Torture(f, &p, TortureConfig{Delivery: d, Accepted: p.count, Seed: 1})
			for _, fn := range slices.Backward(f.cleanups) {
				fn()
			}
			t.Log(f.log.String())
			require.False(t, f.failed)
			for _, what := range []string{" died ", " froze ", "connections cut", "nothing lost. "} {
				require.Contains(t, f.log.String(), what)
			}
			require.NotContains(t, f.log.String(), "was not checked")
		})
	}
}

func TestTorture_says_what_it_has_not_checked(t *testing.T) {
	t.Parallel()
	var p provider
	f := &fakeTB{TB: t, ctx: t.Context()}
	Torture(f, &p, TortureConfig{Seed: 9, Duration: time.Second})
	for _, fn := range slices.Backward(f.cleanups) {
		fn()
	}
	require.False(t, f.failed, f.log.String())
	require.Contains(t, f.log.String(), "whether the provider has it was not checked, as TortureConfig.Accepted was not given")
}

func TestTorture_refuses_counts_that_are_none(t *testing.T) {
	t.Parallel()
	var p provider
	text := told(t, func(f testing.TB) {
		Torture(f, &p, TortureConfig{Seed: 10, Duration: time.Second, Accepted: func(outbox.Notification) int { return -1 }})
	})
	require.Contains(t, text, `bad Accepted: it has returned -1 for "torture" booking `)
}

// asked is a provider that can be asked.
type asked struct{ *provider }

func (a asked) Reconcile(_ context.Context, n outbox.Notification, version int64) (string, bool, error) {
	n.Version = version
	if times := a.count(n); times > 0 {
		return fmt.Sprintf("%d/%d #%d", n.ID, version, times), true, nil
	}
	return "", false, nil
}

func TestTorture_passes_a_good_sender_that_reconciles(t *testing.T) {
	t.Parallel()
	p := asked{new(provider)}
	Torture(t, p, TortureConfig{Seed: 2, Accepted: p.count, Duration: 2 * time.Second})
}

// A sender may fail as it likes as long as it says so.
func TestTorture_passes_a_sender_that_fails_honestly(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]relay.Delivery{"AtLeastOnce": relay.AtLeastOnce, "AtMostOnce": relay.AtMostOnce} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p provider
			send := func(ctx context.Context, n outbox.Notification) (string, error) {
				switch rand.IntN(10) {
				case 0:
					return "", errors.New("busy")
				case 1:
					return "", relay.RetryAfter(errors.New("slow down"), 100*time.Millisecond)
				case 2:
					p.accept(n)
					return "", relay.Unknown(errors.New("connection reset"))
				case 3:
					return "", relay.Permanent(errors.New("blocked"))
				}
				return p.Send(ctx, n)
			}
			Torture(t, relay.SenderFunc(send), TortureConfig{Seed: 3, Delivery: d, Accepted: p.count, Duration: 2 * time.Second})
		})
	}
}

func TestTorture_takes_notifications_of_its_user(t *testing.T) {
	t.Parallel()
	var p provider
	send := func(ctx context.Context, n outbox.Notification) (string, error) {
		if n.Type != "mine" || n.CandidateTgID == 0 {
			return "", relay.Permanent(errors.New("not mine"))
		}
		return p.Send(ctx, n)
	}
	mine := func(i int, r *rand.Rand) outbox.NewNotification {
		return outbox.NewNotification{Type: "mine", CandidateTgID: int64(-1 - i), RecruiterTgID: int64(1 + r.IntN(3)), Payload: r.IntN(5)}
	}
	Torture(t, relay.SenderFunc(send), TortureConfig{Seed: 4, Notification: mine, Accepted: p.count, Duration: 2 * time.Second})
}

// every reports whether it is the n-th call, the 2n-th and so on.
func every(n int64) func() bool {
	var calls atomic.Int64
	return func() bool { return calls.Add(1)%n == 0 }
}

// refusesAccepted returns an error for some of what was accepted.
func refusesAccepted(p *provider) relay.SenderFunc {
	bad := every(4)
	return func(_ context.Context, n outbox.Notification) (string, error) {
		receipt := p.accept(n)
		if bad() {
			return "", errors.New("bad gateway")
		}
		return receipt, nil
	}
}

// Each bad sender is told with what it did, and with a seed.
func TestTorture_finds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		cfg   TortureConfig
		send  func(p *provider) relay.SenderFunc
		wrong []string
	}{
		"an_error_after_the_accept_AtMostOnce": {TortureConfig{Delivery: relay.AtMostOnce}, refusesAccepted, []string{"accepted and refused: ", "says it was not accepted (relay.Unknown would leave it open): bad gateway"}},
		"an_error_after_the_accept":            {TortureConfig{}, refusesAccepted, []string{"accepted and refused: ", "says it was not accepted (relay.Unknown would leave it open): bad gateway"}},
		"messages_swallowed": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			bad := every(4)
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				if bad() {
					return "", nil
				}
				return p.Send(ctx, n)
			}
		}, []string{"lost: Send has returned nil"}},
		"a_message_sent_twice": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			bad := every(4)
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				if bad() {
					p.accept(n)
				}
				return p.Send(ctx, n)
			}
		}, []string{"accepted too often: "}},
		"a_ctx_not_heeded": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			release := make(chan struct{})
			t.Cleanup(func() { close(release) })
			var calls atomic.Int64
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				if calls.Add(1) == 1 {
					<-release
				}
				return p.Send(ctx, n)
			}
		}, []string{"ctx not heeded: ", "has not returned 2s after its ctx had ended"}},
		"a_panic": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			bad := every(4)
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				if bad() {
					panic("nil map")
				}
				return p.Send(ctx, n)
			}
		}, []string{"Send panicked", "nil map"}},
		"the_end_of_a_goroutine": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			bad := every(4)
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				if bad() {
					runtime.Goexit()
				}
				return p.Send(ctx, n)
			}
		}, []string{"Send has ended its goroutine"}},
		"a_receipt_that_is_no_text": {TortureConfig{}, func(p *provider) relay.SenderFunc {
			return func(ctx context.Context, n outbox.Notification) (string, error) {
				_, err := p.Send(ctx, n)
				return "\xff\x00", err
			}
		}, []string{"which PostgreSQL cannot keep"}},
		"two_keys_for_one_number": {TortureConfig{Notification: func(_ int, r *rand.Rand) outbox.NewNotification {
			return outbox.NewNotification{Type: "x", BookingID: 1 + r.Int64N(1e9)}
		}}, func(p *provider) relay.SenderFunc { return p.Send }, []string{"has returned two keys"}},
		"one_key_for_all_numbers": {TortureConfig{Notification: func(int, *rand.Rand) outbox.NewNotification {
			return outbox.NewNotification{Type: "x", BookingID: 1}
		}}, func(p *provider) relay.SenderFunc { return p.Send }, []string{`bad Notification: 0 and 1 have the same key "x" booking 1`}},
		"that_nothing_is_accepted": {TortureConfig{}, func(*provider) relay.SenderFunc {
			return func(context.Context, outbox.Notification) (string, error) {
				return "", relay.Permanent(errors.New("never"))
			}
		}, []string{"nothing was proved: the sender has accepted nothing"}},
		"bad_notifications": {TortureConfig{Notification: func(int, *rand.Rand) outbox.NewNotification {
			return outbox.NewNotification{}
		}}, func(p *provider) relay.SenderFunc { return p.Send }, []string{"is refused: outbox: invalid Type"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p provider
			c.cfg.Accepted, c.cfg.Duration, c.cfg.Seed = p.count, 2*time.Second, 7
			send := c.send(&p)
			text := told(t, func(f testing.TB) { Torture(f, send, c.cfg) })
			for _, w := range c.wrong {
				require.Contains(t, text, w)
			}
			require.Contains(t, text, "Torture with seed 7:")
			if strings.Contains(text, "accepted and refused: ") {
				require.NotContains(t, text, "duplicate not allowed: ", "it is the sender's doing")
			}
		})
	}
}

// A requeue that the ledger does not know of stands for a store that forgets what was sent.
func TestTorture_finds_what_is_sent_again(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]relay.Delivery{"AtLeastOnce": relay.AtLeastOnce, "AtMostOnce": relay.AtMostOnce} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p provider
			var tt *torture
			var mu sync.Mutex
			var given []outbox.Key
			requeued := 0
			send := func(ctx context.Context, n outbox.Notification) (string, error) {
				mu.Lock()
				defer mu.Unlock()
				given = append(given, n.Key())
				for i := len(given) - 2; i >= 0 && requeued < 10; i-- { // what was sent, of these
					if found, err := tt.store.Requeue(ctx, given[i]); err == nil && found > 0 {
						requeued++
						break
					}
				}
				return p.Send(ctx, n)
			}
			text := told(t, func(f testing.TB) {
				tt = newTorture(f, relay.SenderFunc(send), TortureConfig{Seed: 5, Delivery: d, Accepted: p.count, Duration: 2 * time.Second, SendTimeout: 3 * time.Second})
				tt.run(f)
				tt.report(f)
			})
			require.Contains(t, text, `duplicate not allowed: key "torture" booking `)
			require.Contains(t, text, "was accepted as ")
		})
	}
}

// A trigger stands for a store whose adds fail.
func TestTorture_finds_adds_that_fail(t *testing.T) {
	t.Parallel()
	for code, wrong := range map[string][]string{
		"P0001": {"add failed: ", "no room (SQLSTATE P0001)"},
		"23505": {"add failed: ", "no room (SQLSTATE 23505)", "add broke transaction: "},
		"57014": nil,
		"53400": nil,
		"40001": nil,
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			var p provider
			text := told(t, func(f testing.TB) {
				tt := newTorture(f, &p, TortureConfig{Seed: 8, Duration: time.Second, Accepted: p.count})
				_, err := tt.pool.Exec(t.Context(), `CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS
					$$ BEGIN RAISE 'no room' USING ERRCODE = '`+code+`'; END $$;
					CREATE TRIGGER no_room BEFORE INSERT ON outbox_notifications FOR EACH ROW WHEN (NEW.booking_id % 7 = 0) EXECUTE FUNCTION no_room()`)
				require.NoError(t, err)
				tt.run(f)
				tt.report(f)
			})
			if wrong == nil {
				require.Empty(t, text)
			}
			for _, w := range wrong {
				require.Contains(t, text, w)
			}
		})
	}
}

func TestTorture_fails_without_faults(t *testing.T) {
	t.Parallel()
	var p provider
	text := told(t, func(f testing.TB) {
		tt := newTorture(f, &p, TortureConfig{Duration: time.Millisecond, Accepted: p.count})
		tt.grace = 0
		tt.run(f)
		tt.report(f)
	})
	require.Contains(t, text, "give it a longer Duration")
}

func TestTorture_shows_the_history_around_a_violation(t *testing.T) {
	t.Parallel()
	history := make([]string, 1000)
	for i := range history {
		history[i] = fmt.Sprintf("line %d %s", i, strings.Repeat("x", 10_000))
	}
	history[500] = `accept of version 2 as "" from relay 1`
	history[900] = `accept of version 3 as "b" from relay 1`
	lines := around(`version 2 was accepted as "" and as "a"`, history)
	require.Len(t, lines, maxHistory+2)
	require.Equal(t, "… 480 lines left out", lines[0])
	require.Contains(t, lines, "accept of version 2 with no receipt from relay 1")
	require.NotContains(t, lines, history[900])
	require.Less(t, len(strings.Join(lines, "")), 2*maxHistory*maxLine)
	require.Equal(t, "… 960 lines left out", around("no version", history)[0], "the end")
	require.Empty(t, around("x", nil))
	require.Equal(t, "was accepted with no receipt and with no receipt", noReceipts.Replace(`was accepted as "" and as ""`))
}

func TestTorture_says_what_is_never_delivered(t *testing.T) {
	t.Parallel()
	var p provider
	var stuck atomic.Int64 // the first booking that there is something to send of
	send := func(ctx context.Context, n outbox.Notification) (string, error) {
		if stuck.CompareAndSwap(0, n.BookingID) || stuck.Load() == n.BookingID {
			return "", errors.New("always")
		}
		return p.Send(ctx, n)
	}
	text := told(t, func(f testing.TB) {
		tt := newTorture(f, relay.SenderFunc(send), TortureConfig{Seed: 6, Duration: time.Second})
		tt.patience = 5 * time.Second
		tt.run(f)
		tt.report(f)
	})
	require.Regexp(t, fmt.Sprintf(`still not delivered: "torture" booking %d, \d+s after the last fault`, stuck.Load()), text)
	require.Contains(t, text, `the last error is "always"`)
}
