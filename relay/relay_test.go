package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

var discard = slog.New(slog.NewTextHandler(io.Discard, nil))

// Mutations of the relay that were tried, and what turns red. The names are those of
// subtests of TestRun where no other is given.
//
//	no renewal                                 renews_the_leases_...
//	no look at the lease before a send         sends_nothing_on_a_lease_..., sends_others_while_...
//	a lost row sent, or its Send not ended     does_not_send_what_another_has_..., ends_the_ctx_...
//	results dropped when a settle fails        keeps_results_..., settles_all_but_...
//	no halving of a batch that fails           settles_all_but_...
//	results without bound in an outage         keeps_results_...
//	a held row dropped, or waited for          waits_for_a_row_..., sends_others_while_...
//	own rows claimed again (Except)            sends_nothing_on_a_lease_...
//	a new token after a failed claim, or the   repeats_a_claim_...; TestShutdown
//	same for ever
//	Repeated never or always said              repeats_a_claim_until_...
//	a row claimed again by a repeated token,   gives_no_row_..., repeats_a_claim_ten_...
//	a token repeated without end; suspects in
//	repeats                                    and repeats_a_claim_until_...
//	claims repeated without an answer          does_not_pile_up_claims_...
//	suspects sent like others                  sends_one_at_a_time_...
//	no pause while idle, or none of 4 ms       backs_off_...
//	a pause after a full batch                 goes_straight_on_...
//	Busy taken for nothing found; waiting for  claims_out_of_turn_...
//	a turn without end; repeats in turn
//	the default batch fixed, without bound,    claims_more_at_a_time_..., claims_few_at_a_time_...
//	or large for slow senders; a configured
//	one that grows
//	no horizon, none after a slow claim, no    begins_where_it_was_..., claims_from_the_beginning_...
//	whole claim ever again, no overlap
//	no waking, or not when superseded          looks_at_once_..., delivers_newer_content_...
//	more rows waiting than BatchSize           claims_the_next_batch_...
//	more sent at once than Concurrency         sends_as_many_at_once_...
//	no limiter                                 keeps_to_the_limiter_...
//	expired by the process's clock, or not     fails_what_expires_...
//	ErrSetup never fatal, or always            ends_with_an_error_...
//	Goexit ends the worker, or is not settled  goes_on_with_the_others_...; TestSender
//	a panic not recovered                      TestSender
//	the rest not handed back                   TestShutdown, TestRunOnce
//	a claim cut off by ctx                     TestShutdown/hears_the_answer_...
//	sends cut off at once, or waited for       TestShutdown
//	without end
//	a send cut off costs its attempt           TestShutdown/cuts_off_...
//	stale counted as settled                   TestRunOnce/does_not_count_...
//	Permanent, RetryAfter, Unknown, timeouts,  TestSender
//	AtMostOnce or MaxAttempts ignored
//	errors and receipts not cleaned or cut     TestSender
//	Reconciler not asked, asked always, or its TestReconciler
//	answer ignored
//	backoff without cap or jitter; one that    TestBackoff
//	panics or is negative
//	listening not taken up again, or without   TestListen
//	end behind a pooler

var accept = relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) { return "", nil })

func fails(err error) relay.SenderFunc {
	return func(context.Context, outbox.Notification) (string, error) { return "", err }
}

func newRelay(t testing.TB, q relay.Queue, s relay.Sender, cfg relay.Config) *relay.Relay {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = discard
	}
	r, err := relay.New(q, s, cfg)
	require.NoError(t, err)
	return r
}

// advance lets time pass in the bubble of a test, until all that it set off has been
// done.
func advance(d time.Duration) {
	take(d)
	synctest.Wait()
}

// take is how a sender takes its time.
func take(d time.Duration) { <-time.After(d) }

// start runs r and returns a function that ends it and returns what Run did.
func start(t testing.TB, r *relay.Relay) (stop func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() }) // a bubble must not be left with goroutines in it
	return stop
}

func TestNew(t *testing.T) {
	t.Parallel()
	t.Run("the_zero_config_is_ready_for_use", func(t *testing.T) {
		_, err := relay.New(newFakeQueue(0), accept, relay.Config{})
		require.NoError(t, err)
	})
	var noStore *outbox.PGStore
	var noFunc relay.SenderFunc
	for name, c := range map[string]struct {
		store relay.Queue
		send  relay.Sender
		cfg   relay.Config
		field string
	}{
		"no_store":                           {send: accept, field: "store"},
		"a_nil_store":                        {store: noStore, send: accept, field: "store"},
		"no_sender":                          {store: newFakeQueue(0), field: "sender"},
		"a_nil_sender_func":                  {store: newFakeQueue(0), send: noFunc, field: "sender"},
		"negative_concurrency":               {cfg: relay.Config{Concurrency: -1}, field: "Concurrency"},
		"concurrency_beyond_reason":          {cfg: relay.Config{Concurrency: 1 << 40}, field: "Concurrency"},
		"a_batch_beyond_reason":              {cfg: relay.Config{BatchSize: 1<<63 - 1}, field: "BatchSize"},
		"a_type_too_long":                    {cfg: relay.Config{Types: []string{strings.Repeat("a", 51)}}, field: "Types"},
		"a_lease_for_ever":                   {cfg: relay.Config{Lease: 1<<63 - 1}, field: "Lease"},
		"negative_batch":                     {cfg: relay.Config{BatchSize: -1}, field: "BatchSize"},
		"negative_poll_interval":             {cfg: relay.Config{PollInterval: -1}, field: "PollInterval"},
		"negative_lease":                     {cfg: relay.Config{Lease: -time.Second}, field: "Lease"},
		"a_lease_too_short_to_renew":         {cfg: relay.Config{Lease: time.Millisecond}, field: "Lease"},
		"negative_send_timeout":              {cfg: relay.Config{SendTimeout: -1}, field: "SendTimeout"},
		"a_send_timeout_as_long_as_a_lease":  {cfg: relay.Config{SendTimeout: time.Second, Lease: time.Second}, field: "SendTimeout"},
		"a_send_timeout_over_the_default":    {cfg: relay.Config{SendTimeout: time.Hour}, field: "SendTimeout"},
		"negative_shutdown_timeout":          {cfg: relay.Config{ShutdownTimeout: -1}, field: "ShutdownTimeout"},
		"more_attempts_than_can_be_counted":  {cfg: relay.Config{MaxAttempts: 1 << 40}, field: "MaxAttempts"},
		"a_limiter_that_lets_nothing_pass":   {cfg: relay.Config{Limiter: rate.NewLimiter(1, 0)}, field: "Limiter"},
		"no_types_at_all":                    {cfg: relay.Config{Types: []string{}}, field: "Types"},
		"an_empty_type":                      {cfg: relay.Config{Types: []string{"a", ""}}, field: "Types"},
		"a_type_that_PostgreSQL_cannot_hold": {cfg: relay.Config{Types: []string{"a\x00"}}, field: "Types"},
		"an_unknown_delivery":                {cfg: relay.Config{Delivery: 7}, field: "Delivery"},
		"listening_to_what_cannot_notify":    {cfg: relay.Config{Listen: true}, field: "Listen"},
	} {
		t.Run("refuses_"+name, func(t *testing.T) {
			if c.store == nil && c.field != "store" {
				c.store = newFakeQueue(0)
			}
			if c.send == nil && c.field != "sender" {
				c.send = accept
			}
			_, err := relay.New(c.store, c.send, c.cfg)
			var invalid *outbox.InvalidError
			require.ErrorAs(t, err, &invalid)
			require.Equal(t, c.field, invalid.Field)
			require.ErrorIs(t, err, outbox.ErrInvalid)
		})
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	bubble := func(name string, test func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, test)
		})
	}

	bubble("sends_as_many_at_once_as_configured_and_no_more", func(t *testing.T) {
		q := newFakeQueue(20)
		var now, most atomic.Int64
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, _ outbox.Notification) (string, error) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			take(time.Second)
			return "", nil
		}), relay.Config{Concurrency: 3, BatchSize: 7}))
		advance(10 * time.Second)
		require.NoError(t, stop())
		require.EqualValues(t, 3, most.Load())
		require.Equal(t, 20, q.count(outbox.StatusSent))
	})

	bubble("claims_the_next_batch_while_the_last_is_being_sent", func(t *testing.T) {
		q := newFakeQueue(9)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, _ outbox.Notification) (string, error) {
			take(time.Second)
			return "", nil
		}), relay.Config{Concurrency: 3, BatchSize: 3}))
		advance(500 * time.Millisecond)
		require.GreaterOrEqual(t, q.leases(), 5, "three being sent, the others waiting")
		require.LessOrEqual(t, q.leases(), 6)
		require.Equal(t, 0, q.count(outbox.StatusSent))
		require.NoError(t, stop())
	})

	bubble("settles_what_is_sent_while_others_are_being_sent", func(t *testing.T) {
		q := newFakeQueue(4)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			take(time.Duration(n.ID) * time.Second)
			return fmt.Sprint("message ", n.ID), nil
		}), relay.Config{}))
		advance(2500 * time.Millisecond)
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.Equal(t, "message 2", q.row(2).Receipt)
		require.NoError(t, stop())
	})

	bubble("settles_together_what_comes_together", func(t *testing.T) {
		q := newFakeQueue(100)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			take(time.Second)
			return "", nil
		}), relay.Config{Concurrency: 100}))
		advance(2 * time.Second)
		require.Equal(t, 100, q.count(outbox.StatusSent))
		require.Less(t, len(q.settles), 50)
		require.NoError(t, stop())
	})

	bubble("backs_off_to_the_poll_interval_while_idle", func(t *testing.T) {
		q := newFakeQueue(0)
		stop := start(t, newRelay(t, q, accept, relay.Config{PollInterval: 2 * time.Second}))
		advance(time.Minute)
		require.InDelta(t, 30+20, len(q.claimsMade()), 15, "2 s apart but for the first few")
		q.mu.Lock()
		claimed := slices.Clone(q.claimed)
		q.mu.Unlock()
		for i := len(claimed) - 10; i < len(claimed); i++ {
			gap := claimed[i].Sub(claimed[i-1])
			require.LessOrEqual(t, gap, 2*time.Second)
			require.GreaterOrEqual(t, gap, 1600*time.Millisecond)
		}
		before := len(q.claimsMade())
		q.add(1)
		advance(2 * time.Second)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		advance(100 * time.Millisecond) // the find may have been at the very end
		require.Greater(t, len(q.claimsMade()), before+3, "quick again after a find")
		require.NoError(t, stop())
	})

	bubble("goes_straight_on_after_a_full_batch", func(t *testing.T) {
		q := newFakeQueue(1000)
		stop := start(t, newRelay(t, q, accept, relay.Config{BatchSize: 1, PollInterval: time.Hour}))
		advance(time.Second)
		require.Equal(t, 1000, q.count(outbox.StatusSent))
		require.NoError(t, stop())
	})

	bubble("claims_out_of_turn_when_another_claims_for_a_second", func(t *testing.T) {
		q := newFakeQueue(1)
		q.busy = true
		stop := start(t, newRelay(t, q, accept, relay.Config{PollInterval: time.Hour, BatchSize: 1}))
		advance(900 * time.Millisecond)
		require.Equal(t, outbox.StatusPending, q.row(1).Status)
		require.Greater(t, len(q.claimsMade()), 9)
		advance(300 * time.Millisecond)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		for i := range 10 { // one that is stuck does not cost a second each time
			q.add(int64(i + 2))
		}
		advance(2 * time.Second)
		require.NoError(t, stop())
		require.Equal(t, 11, q.count(outbox.StatusSent))

		q.mu.Lock()
		q.claims, q.busy = nil, false
		q.mu.Unlock()
		q.add(100)
		var tokens []outbox.Token
		stop = start(t, newRelay(t, &losingQueue{fakeQueue: q, tokens: &tokens, lose: 1}, accept, relay.Config{}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, outbox.StatusSent, q.row(100).Status)
		for _, c := range q.claimsMade() {
			if c.Token == tokens[0] {
				require.Zero(t, c.Since)
			}
		}
		require.True(t, q.claimsMade()[0].InTurn)
		require.False(t, q.claimsMade()[1].InTurn, "the repeat is to find all of its token")
	})

	bubble("claims_more_at_a_time_while_batches_are_sent_quickly", func(t *testing.T) {
		for cfg, most := range map[*relay.Config]int{
			{}: 1000, {BatchSize: 100}: 100,
			{Delivery: relay.AtMostOnce}: 100, // a crash fails what is claimed
		} {
			q := newFakeQueue(10_000)
			stop := start(t, newRelay(t, q, accept, *cfg))
			advance(10 * time.Second)
			require.Equal(t, 10_000, q.count(outbox.StatusSent))
			largest := 0
			for _, c := range q.claimsMade() {
				largest = max(largest, c.Limit)
			}
			require.Equal(t, 100, q.claimsMade()[0].Limit)
			require.GreaterOrEqual(t, largest, most/2)
			require.LessOrEqual(t, largest, most)
			require.Equal(t, 100, q.claimsMade()[len(q.claimsMade())-1].Limit, "small again when the backlog has ended")
			require.NoError(t, stop())
		}
	})

	bubble("claims_few_at_a_time_for_a_slow_sender", func(t *testing.T) {
		q := newFakeQueue(5_000)
		q.takes = func(outbox.ClaimOptions) time.Duration { return 50 * time.Millisecond }
		var slow atomic.Bool
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			if slow.Load() {
				take(time.Second / 3)
			}
			return "", nil
		}), relay.Config{}))
		advance(200 * time.Millisecond)
		require.Greater(t, q.claimsMade()[len(q.claimsMade())-1].Limit, 200)
		slow.Store(true) // 30 a second
		advance(90 * time.Second)
		require.LessOrEqual(t, q.leases(), 120)
		require.Positive(t, q.count(outbox.StatusPending))
		require.NoError(t, stop())
	})

	// An answer that does not come in time is not waited for again and again.
	bubble("goes_on_where_it_was_when_whole_claims_have_no_answer_in_time", func(t *testing.T) {
		q := &slowWhole{fakeQueue: newFakeQueue(1)}
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(10 * time.Second)
		q.takes.Store(int64(25 * time.Second))
		for i := range int64(600) {
			q.add(i + 10)
			advance(time.Second)
		}
		require.Greater(t, q.count(outbox.StatusSent), 500)
		q.takes.Store(0)
		advance(2 * time.Minute)
		require.Equal(t, 601, q.count(outbox.StatusSent))
		require.NoError(t, stop())
	})

	bubble("takes_one_without_an_answer_among_slow_ones_for_an_accident", func(t *testing.T) {
		q := &slowWhole{fakeQueue: newFakeQueue(1)}
		q.takes.Store(int64(30 * time.Millisecond)) // a busy machine
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(10 * time.Second)
		q.takes.Store(int64(25 * time.Second)) // and frozen
		advance(15 * time.Second)
		q.takes.Store(int64(30 * time.Millisecond))
		advance(10 * time.Second)
		q.addAt(500, q.now().Add(-time.Hour)) // as one whose lease was lost is
		advance(2 * time.Second)
		require.Equal(t, outbox.StatusSent, q.row(500).Status)
		require.True(t, slices.ContainsFunc(q.claimsMade(), func(c outbox.ClaimOptions) bool {
			return c.Repeated && c.Token == q.lost.Load()
		}), "what it leased after all would cost an attempt")
		require.NoError(t, stop())
	})

	bubble("takes_one_slow_claim_for_an_accident", func(t *testing.T) {
		q := newFakeQueue(1)
		claims := 0
		q.takes = func(outbox.ClaimOptions) time.Duration {
			if claims++; claims == 3 {
				return 4 * time.Second
			}
			return time.Millisecond
		}
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(10 * time.Second)
		q.addAt(500, q.now().Add(-time.Hour)) // as a requeued row is
		advance(2 * time.Second)
		require.Equal(t, outbox.StatusSent, q.row(500).Status)
		require.NoError(t, stop())
	})

	bubble("begins_where_it_was_while_whole_claims_take_long", func(t *testing.T) {
		q := newFakeQueue(0)
		q.takes = func(opts outbox.ClaimOptions) time.Duration {
			if opts.Since.IsZero() {
				return 500 * time.Millisecond
			}
			return time.Millisecond
		}
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		var id int64
		for range 600 {
			id++
			q.add(id)
			advance(100 * time.Millisecond)
		}
		whole, since := 0, time.Time{}
		for _, c := range q.claimsMade() {
			if c.Since.IsZero() {
				whole++
				continue
			}
			require.False(t, c.Since.Before(since))
			since = c.Since
		}
		require.InDelta(t, 60/10.5, whole, 2.5, "a twentieth of the time")
		require.InDelta(t, 2, q.now().Sub(since).Seconds(), 1, "for rows whose transaction took a while")
		require.GreaterOrEqual(t, q.count(outbox.StatusSent), 595)

		q.change(600, func(*fakeRow) {
			q.takes = func(outbox.ClaimOptions) time.Duration { return time.Millisecond }
		})
		advance(15 * time.Second)
		q.change(600, func(*fakeRow) { q.claims = nil })
		q.add(id + 1)
		advance(5 * time.Second)
		require.NotEmpty(t, q.claimsMade())
		for _, c := range q.claimsMade() {
			require.Zero(t, c.Since)
		}
		require.NoError(t, stop())
	})

	bubble("claims_from_the_beginning_before_long_however_long_that_takes", func(t *testing.T) {
		q := newFakeQueue(1)
		q.takes = func(opts outbox.ClaimOptions) time.Duration {
			if opts.Since.IsZero() {
				return 10 * time.Second
			}
			return time.Millisecond
		}
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(22 * time.Second) // two slow ones: the first may have been an accident
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		for i := range 500 { // fallen due in the past
			q.addAt(int64(i+2), q.now().Add(-time.Hour))
		}
		advance(30 * time.Second)
		require.Equal(t, 1, q.count(outbox.StatusSent))
		advance(45 * time.Second)
		require.Equal(t, 501, q.count(outbox.StatusSent), "and goes on from there, at once")
		require.NoError(t, stop())
	})

	bubble("looks_at_once_when_woken", func(t *testing.T) {
		q := newFakeQueue(0)
		r := newRelay(t, q, accept, relay.Config{PollInterval: time.Hour})
		stop := start(t, r)
		advance(10 * time.Hour)
		q.add(1)
		r.Wake()
		synctest.Wait()
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		require.NoError(t, stop())
	})

	bubble("delivers_newer_content_at_once_after_the_older", func(t *testing.T) {
		q := newFakeQueue(1)
		var seen []outbox.Notification
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			if seen = append(seen, n); len(seen) == 1 {
				q.change(1, func(row *fakeRow) { row.Version = 2 })
			}
			return fmt.Sprint("message ", len(seen)), nil
		}), relay.Config{PollInterval: time.Hour}))
		synctest.Wait()
		require.NoError(t, stop())
		require.Len(t, seen, 2)
		require.EqualValues(t, 2, seen[1].Version)
		require.EqualValues(t, 1, seen[1].SentVersion)
		require.Equal(t, "message 1", seen[1].Receipt)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
	})

	bubble("goes_on_with_the_others_when_a_sender_panics_or_ends_its_goroutine", func(t *testing.T) {
		q := newFakeQueue(4)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			switch n.ID {
			case 1:
				runtime.Goexit()
			case 2:
				panic("oh no")
			}
			return "", nil
		}), relay.Config{Concurrency: 1}))
		advance(time.Second)
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.NoError(t, stop())
	})

	bubble("renews_the_leases_of_what_waits_and_of_what_is_being_sent", func(t *testing.T) {
		q := newFakeQueue(3)
		var order []int64
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			order = append(order, n.ID)
			take(100 * time.Second) // whatever its ctx says
			return "", nil
		}), relay.Config{Concurrency: 1, BatchSize: 4, Lease: 10 * time.Second}))
		for range 2990 {
			advance(100 * time.Millisecond)
			synctest.Wait()
			require.Equal(t, 3-q.count(outbox.StatusSent), q.leases(), "a lease ended")
		}
		advance(2 * time.Second)
		require.Equal(t, []int64{1, 2, 3}, order)
		require.Equal(t, 3, q.count(outbox.StatusSent))
		require.Equal(t, 1, q.row(3).Attempts)
		require.NoError(t, stop())
	})

	bubble("does_not_send_what_another_has_taken_meanwhile", func(t *testing.T) {
		q := newFakeQueue(2)
		var log logBook
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			require.EqualValues(t, 1, n.ID)
			q.change(2, func(row *fakeRow) { row.token = outbox.NewToken(); row.until = q.now().Add(time.Hour) })
			take(30 * time.Second)
			return "", nil
		}), relay.Config{Concurrency: 1, Lease: 10 * time.Second, Logger: log.logger()}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 1, log.count("a lease was lost before its message was sent"))
	})

	bubble("ends_the_ctx_of_a_Send_whose_row_another_has_and_leaves_that_one_alone", func(t *testing.T) {
		q := newFakeQueue(1)
		var log logBook
		var ended atomic.Bool
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			q.change(1, func(row *fakeRow) { row.token = outbox.NewToken(); row.until = q.now().Add(time.Hour) })
			<-ctx.Done()
			ended.Store(true)
			return "", ctx.Err()
		}), relay.Config{Lease: 100 * time.Second, SendTimeout: 90 * time.Second, Logger: log.logger()}))
		advance(80 * time.Second)
		require.True(t, ended.Load())
		require.NoError(t, stop())
		require.Equal(t, 1, log.count("stale settle"))
		require.Equal(t, 1, log.count("level=WARN"))
		require.Equal(t, outbox.StatusPending, q.row(1).Status)
		require.Empty(t, q.row(1).LastError)
	})

	bubble("sends_nothing_on_a_lease_that_may_have_ended_in_an_outage", func(t *testing.T) {
		q := newFakeQueue(2)
		sent := 0
		var log logBook
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			if sent++; sent == 1 {
				for _, call := range []*func() error{&q.claimErr, &q.extendErr, &q.settleErr} {
					q.fail(call, failing)
				}
				take(15 * time.Second)
			}
			return "", nil
		}), relay.Config{Concurrency: 1, Lease: 10 * time.Second, SendTimeout: 9 * time.Second, Logger: log.logger()}))
		advance(time.Minute)
		require.Equal(t, 1, sent)
		for _, call := range []*func() error{&q.claimErr, &q.extendErr, &q.settleErr} {
			q.fail(call, nil)
		}
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.Equal(t, 2, sent, "each once, although the database was away for longer than a lease")
		require.Equal(t, 1, q.row(1).Attempts)
		require.Equal(t, 1, q.row(2).Attempts)
		for _, what := range []string{"claim", "settle"} {
			require.Equal(t, 1, log.count("cannot "+what+" and tries again"))
			require.Equal(t, 1, log.count("can "+what+" again"))
		}
	})

	bubble("repeats_a_claim_without_an_answer_by_the_same_token", func(t *testing.T) {
		q := newFakeQueue(1)
		var log logBook
		var tokens []outbox.Token
		lost := &losingQueue{fakeQueue: q, tokens: &tokens, lose: 5}
		stop := start(t, newRelay(t, lost, accept, relay.Config{Logger: log.logger()}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		for i := range 6 {
			require.Equal(t, tokens[0], tokens[i])
		}
		require.NotEqual(t, tokens[5], tokens[6])
		require.Equal(t, 1, log.count("cannot claim and tries again"))
		require.Equal(t, 1, log.count("can claim again"))
	})

	bubble("repeats_a_claim_until_nothing_of_it_can_be_left", func(t *testing.T) {
		q := newFakeQueue(25)
		var tokens []outbox.Token
		stop := start(t, newRelay(t, &losingQueue{fakeQueue: q, tokens: &tokens, lose: 1}, accept, relay.Config{BatchSize: 10}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 25, q.count(outbox.StatusSent))
		require.Equal(t, tokens[0], tokens[1], "repeated, and full")
		require.Equal(t, tokens[0], tokens[2])
		require.NotEqual(t, tokens[0], tokens[len(tokens)-1])
		for i, c := range q.claimsMade() {
			require.Equal(t, i > 0 && c.Token == tokens[0], c.Repeated, "claim %d", i)
			require.Equal(t, c.Repeated, c.Suspects == outbox.LeaveSuspects, "claim %d: suspects that are left count", i)
		}
	})

	// A settle that a frozen server carries out later would pass for that of the second lease.
	bubble("gives_no_row_the_same_token_twice", func(t *testing.T) {
		q := newFakeQueue(100)
		var tokens []outbox.Token
		given := make(map[outbox.Lease]bool)
		tried := make(map[int64]bool)
		sender := relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			if !tried[n.ID] {
				tried[n.ID] = true
				return "", errors.New("not now")
			}
			return "", nil
		})
		lost := &losingQueue{fakeQueue: q, tokens: &tokens, lose: 1, given: func(l outbox.Lease) {
			require.False(t, given[l], "row %d had token %v before", l.ID, l.Token)
			given[l] = true
		}}
		stop := start(t, newRelay(t, lost, sender, relay.Config{BatchSize: 4, Concurrency: 1, Backoff: func(int) time.Duration { return 0 }}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 100, q.count(outbox.StatusSent))
		require.Equal(t, tokens[0], tokens[2], "repeated, and full")
	})

	// In a backlog every claim is full.
	bubble("repeats_a_claim_ten_times_at_most", func(t *testing.T) {
		q := newFakeQueue(500)
		var tokens []outbox.Token
		stop := start(t, newRelay(t, &losingQueue{fakeQueue: q, tokens: &tokens, lose: 1}, accept, relay.Config{BatchSize: 4, Concurrency: 1}))
		advance(time.Minute)
		require.NoError(t, stop())
		repeats := 0
		for _, c := range q.claimsMade() {
			if c.Repeated {
				repeats++
			}
		}
		require.Greater(t, repeats, 2)
		require.Less(t, repeats, 30) // by how many rows each asks for, which depends on what has been sent; without end 125
	})

	bubble("keeps_results_through_an_outage_and_claims_no_more_until_they_are_settled", func(t *testing.T) {
		q := newFakeQueue(500)
		sent := 0
		q.settleErr = failing
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			sent++
			take(100 * time.Millisecond)
			return "", nil
		}), relay.Config{Concurrency: 1, BatchSize: 10}))
		advance(time.Hour)
		require.LessOrEqual(t, sent, 40)
		require.Zero(t, q.count(outbox.StatusSent))
		q.fail(&q.settleErr, nil)
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 500, sent)
		require.Equal(t, 500, q.count(outbox.StatusSent))
	})

	bubble("settles_all_but_the_one_that_cannot_be_settled", func(t *testing.T) {
		q := newFakeQueue(100)
		q.settleBad = func(st outbox.Settlement) error {
			if st.ID == 42 {
				return errors.New("a trigger minds")
			}
			return nil
		}
		stop := start(t, newRelay(t, q, accept, relay.Config{Concurrency: 100}))
		advance(time.Minute)
		require.Equal(t, 99, q.count(outbox.StatusSent))
		require.ErrorContains(t, stop(), "the results of 1 deliveries could not be noted")
	})

	bubble("goes_on_beside_one_that_can_never_be_settled_and_says_which_it_is", func(t *testing.T) {
		var log logBook
		q := newFakeQueue(1)
		q.settleBad = func(st outbox.Settlement) error {
			if st.ID == 1 {
				return errors.New("a trigger minds")
			}
			return nil
		}
		stop := start(t, newRelay(t, q, accept, relay.Config{BatchSize: 10, Logger: log.logger()}))
		advance(time.Minute)
		for id := range int64(1000) {
			q.add(id + 2)
		}
		advance(time.Minute)
		require.Equal(t, 1000, q.count(outbox.StatusSent))
		require.Equal(t, 1, log.count("the result of a delivery cannot be noted"))
		require.ErrorContains(t, stop(), "the results of 1 deliveries could not be noted")
	})

	bubble("goes_on_in_small_batches_beside_rows_that_callers_hold", func(t *testing.T) {
		q := newFakeQueue(10)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			q.change(n.ID, func(row *fakeRow) { row.held = n.ID <= 5 })
			return "", nil
		}), relay.Config{BatchSize: 1, Concurrency: 1}))
		advance(10 * time.Minute)
		require.Equal(t, 5, q.count(outbox.StatusSent))
		for id := range int64(5) {
			q.change(id+1, func(row *fakeRow) { row.held = false })
		}
		advance(time.Second)
		require.Equal(t, 10, q.count(outbox.StatusSent))
		require.NoError(t, stop())
	})

	bubble("sends_the_next_suspect_while_a_caller_holds_the_last", func(t *testing.T) {
		q := newFakeQueue(5)
		for id := range int64(5) {
			q.change(id+1, func(row *fakeRow) {
				row.token, row.leased, row.Attempts, row.until = outbox.NewToken(), 1, 2, q.now()
			})
		}
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			q.change(n.ID, func(row *fakeRow) { row.held = n.ID == 1 })
			return "", nil
		}), relay.Config{MaxAttempts: 3}))
		advance(time.Minute)
		require.Equal(t, 4, q.count(outbox.StatusSent))
		q.change(1, func(row *fakeRow) { row.held = false })
		advance(time.Second)
		require.NoError(t, stop())
		require.Equal(t, 5, q.count(outbox.StatusSent))
	})

	bubble("claims_again_after_it_has_lost_all_it_had", func(t *testing.T) {
		q := newFakeQueue(30)
		steal := func() {
			for id := range int64(30) {
				q.change(id+1, func(row *fakeRow) { row.token, row.until = outbox.NewToken(), q.now().Add(time.Hour) })
			}
		}
		sent := 0
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			if sent++; sent == 1 {
				steal() // a frozen process wakes up, and others have its rows
			}
			return "", nil
		}), relay.Config{BatchSize: 10, Lease: 10 * time.Second, Limiter: rate.NewLimiter(rate.Every(30*time.Second), 1)}))
		advance(3 * time.Hour)
		require.NoError(t, stop())
		require.Equal(t, 30, q.count(outbox.StatusSent))
	})

	bubble("lets_the_next_claim_judge_what_expired_as_it_may_have_been_given_more_time", func(t *testing.T) {
		q := newFakeQueue(0)
		for id := range int64(2) {
			q.add(id + 1).NotAfter = q.now().Add(10 * time.Second)
		}
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			q.change(2, func(row *fakeRow) { row.NotAfter = q.now().Add(time.Hour) })
			take(11 * time.Second)
			return "", nil
		}), relay.Config{Concurrency: 1}))
		advance(time.Minute)
		require.NoError(t, stop())
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.Equal(t, 1, q.row(2).Attempts)
	})

	bubble("waits_for_a_row_that_a_caller_holds_without_keeping_others_waiting", func(t *testing.T) {
		q := newFakeQueue(100)
		sent := 0
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			sent++
			if n.ID == 1 {
				q.change(1, func(row *fakeRow) { row.held = true })
			}
			return "", nil
		}), relay.Config{Concurrency: 1, BatchSize: 2}))
		advance(time.Second)
		require.Equal(t, 99, q.count(outbox.StatusSent))
		advance(10 * time.Minute)
		require.Equal(t, outbox.StatusPending, q.row(1).Status)
		q.change(1, func(row *fakeRow) { row.held = false })
		advance(250 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		require.Equal(t, 100, sent, "the held one once")
		require.NoError(t, stop())
	})

	bubble("sends_others_while_a_caller_holds_a_row_whose_lease_must_be_renewed", func(t *testing.T) {
		q := newFakeQueue(3)
		var order []int64
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			if order = append(order, n.ID); n.ID == 1 {
				q.change(2, func(row *fakeRow) { row.held = true })
				take(15 * time.Second)
			}
			return "", nil
		}), relay.Config{Concurrency: 1, BatchSize: 4, Lease: 10 * time.Second}))
		advance(16 * time.Second)
		require.Equal(t, []int64{1, 3}, order)
		q.change(2, func(row *fakeRow) { row.held = false })
		advance(time.Second)
		require.Equal(t, []int64{1, 3, 2}, order)
		require.NoError(t, stop())
	})

	bubble("keeps_to_the_limiter_without_losing_leases", func(t *testing.T) {
		q := newFakeQueue(30)
		var at []time.Duration
		began := time.Now()
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			at = append(at, time.Since(began))
			deadline, _ := ctx.Deadline()
			require.Equal(t, 4*time.Second, time.Until(deadline), "the timeout begins with the send")
			return "", nil
		}), relay.Config{Lease: 10 * time.Second, SendTimeout: 4 * time.Second, Limiter: rate.NewLimiter(0.5, 1)}))
		advance(2 * time.Minute)
		require.NoError(t, stop())
		require.Len(t, at, 30)
		require.Equal(t, 58*time.Second, at[29])
		for id := range q.rows {
			require.Equal(t, 1, q.row(id).Attempts)
		}
	})

	bubble("survives_a_limiter_that_lets_nothing_pass_any_more", func(t *testing.T) {
		q := newFakeQueue(1)
		var log logBook
		limiter := rate.NewLimiter(1, 1)
		limiter.SetBurst(1)
		r := newRelay(t, q, accept, relay.Config{Limiter: limiter, Logger: log.logger()})
		limiter.SetBurst(0)
		stop := start(t, r)
		advance(10 * time.Second)
		require.Equal(t, outbox.StatusPending, q.row(1).Status)
		require.NotZero(t, log.count("the limiter lets nothing pass"))
		limiter.SetBurst(1)
		advance(10 * time.Second)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		require.NoError(t, stop())
	})

	bubble("fails_what_expires_while_it_waits_and_goes_by_no_clock_of_its_own", func(t *testing.T) {
		for _, ahead := range []time.Duration{0, time.Hour, -time.Hour, 26 * 365 * 24 * time.Hour} {
			q := newFakeQueue(0)
			q.ahead = ahead
			for id := range int64(3) {
				q.add(id + 1).NotAfter = q.now().Add(time.Duration(id+1) * 10 * time.Second)
			}
			var sent []int64
			stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
				sent = append(sent, n.ID)
				take(25 * time.Second)
				return "", nil
			}), relay.Config{Concurrency: 1}))
			advance(time.Minute)
			require.NoError(t, stop())
			require.Equal(t, []int64{1, 3}, sent)
			require.Equal(t, outbox.StatusFailed, q.row(2).Status)
		}
	})

	bubble("sends_one_at_a_time_what_may_kill_its_process_on_its_last_attempt", func(t *testing.T) {
		// Of six rows that a dead process had, five are on their last attempt, and one of
		// them may have killed it. Four more timed out, which is not suspect.
		q := newFakeQueue(12)
		for id := range int64(10) {
			q.change(id+1, func(row *fakeRow) {
				row.token, row.leased, row.Attempts = outbox.NewToken(), 1, 2
				if id < 6 {
					row.until = q.now()
				}
			})
		}
		q.change(6, func(row *fakeRow) { row.Attempts = 1 })
		var suspects, most, others atomic.Int64
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			now := &others
			if n.ID <= 5 {
				now = &suspects
				most.Store(max(most.Load(), suspects.Load()+1))
			}
			now.Add(1)
			take(time.Second)
			now.Add(-1)
			return "", nil
		}), relay.Config{MaxAttempts: 3}))
		advance(100 * time.Millisecond)
		require.EqualValues(t, 1, suspects.Load())
		require.EqualValues(t, 7, others.Load(), "do not wait for it")
		advance(3 * time.Second)
		require.Equal(t, 10, q.count(outbox.StatusSent), "a second each, without a pause")
		advance(time.Minute)
		require.NoError(t, stop())
		require.EqualValues(t, 1, most.Load())
		require.Equal(t, 12, q.count(outbox.StatusSent))
		require.Equal(t, 3, q.row(5).Attempts)
	})

	bubble("does_not_pile_up_claims_in_a_server_that_does_not_answer", func(t *testing.T) {
		q := newFakeQueue(1)
		var claims atomic.Int64
		q.claimErr = func() error {
			claims.Add(1)
			return fmt.Errorf("claim: %w", context.DeadlineExceeded)
		}
		q.extendErr = func() error { return context.DeadlineExceeded }
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(time.Hour)
		require.EqualValues(t, 1, claims.Load())
		q.fail(&q.claimErr, nil)
		q.fail(&q.extendErr, nil)
		advance(time.Minute)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		require.NoError(t, stop())
	})

	bubble("passes_its_configuration_to_the_claim", func(t *testing.T) {
		q := newFakeQueue(0)
		_, err := newRelay(t, q, accept, relay.Config{BatchSize: 7, Lease: time.Minute, Types: []string{"a"}, MaxAttempts: 3,
			Delivery: relay.AtMostOnce}).RunOnce(t.Context())
		require.NoError(t, err)
		opts := q.claimsMade()[0]
		require.NotZero(t, opts.Token)
		opts.Token = outbox.Token{}
		require.Empty(t, opts.Except)
		opts.Except = nil
		require.Equal(t, outbox.ClaimOptions{Limit: 7, Lease: time.Minute, Types: []string{"a"}, MaxAttempts: 3, AtMostOnce: true,
			Suspects: outbox.OneSuspect}, opts)

		_, err = newRelay(t, q, &reconciler{}, relay.Config{MaxAttempts: -1}).RunOnce(t.Context())
		require.NoError(t, err)
		require.True(t, q.claimsMade()[1].Reconcile)
		require.Zero(t, q.claimsMade()[1].MaxAttempts, "unlimited")
	})

	bubble("ends_with_an_error_where_it_can_never_work", func(t *testing.T) {
		q := newFakeQueue(0)
		q.claimErr = func() error { return fmt.Errorf("claim: %w", outbox.ErrSetup) }
		require.ErrorIs(t, newRelay(t, q, accept, relay.Config{}).Run(t.Context()), outbox.ErrSetup)

		q = newFakeQueue(0)
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(time.Minute)
		q.fail(&q.claimErr, func() error { return fmt.Errorf("claim: %w", outbox.ErrSetup) }) // it has worked, and may again
		advance(time.Minute)
		q.fail(&q.claimErr, nil)
		q.add(1)
		advance(time.Minute)
		require.Equal(t, outbox.StatusSent, q.row(1).Status)
		require.NoError(t, stop())
	})
}

// losingQueue loses the answers of its first claims.
type losingQueue struct {
	*fakeQueue
	tokens *[]outbox.Token
	lose   int
	given  func(outbox.Lease) // told of each that is not lost; may be nil
}

func (q *losingQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	*q.tokens = append(*q.tokens, opts.Token)
	res, err := q.fakeQueue.Claim(ctx, opts)
	if len(*q.tokens) <= q.lose {
		return outbox.ClaimResult{}, errors.New("connection reset by peer")
	}
	if q.given != nil {
		for _, c := range res.Claimed {
			q.given(c.Lease)
		}
	}
	return res, err
}

// slowWhole has claims from the beginning take long, and end with their ctx.
type slowWhole struct {
	*fakeQueue
	takes atomic.Int64
	lost  atomic.Value // the token of the last claim that had no answer
}

func (q *slowWhole) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	if took := time.Duration(q.takes.Load()); took > 0 && opts.Since.IsZero() {
		select {
		case <-ctx.Done():
			q.lost.Store(opts.Token)
			return outbox.ClaimResult{}, ctx.Err()
		case <-time.After(took):
		}
	}
	return q.fakeQueue.Claim(ctx, opts)
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	bubble := func(name string, test func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, test)
		})
	}

	bubble("lets_what_is_being_sent_finish_and_hands_the_rest_back", func(t *testing.T) {
		q := newFakeQueue(10)
		began := time.Now()
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			take(10 * time.Second)
			return "", ctx.Err()
		}), relay.Config{Concurrency: 2}))
		advance(time.Second)
		q.add(11)
		require.NoError(t, stop())
		require.InDelta(t, 10*time.Second, time.Since(began), float64(10*time.Millisecond))
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.Zero(t, q.leases())
		for id := range int64(11) {
			if row := q.row(id + 1); row.Status == outbox.StatusPending {
				require.Zero(t, row.Attempts)
			}
		}
		require.NotEmpty(t, q.claimsMade())
		require.Zero(t, q.row(11).handbacks, "claimed after the end")
	})

	bubble("cuts_off_what_takes_too_long_and_hands_it_back_as_unknown", func(t *testing.T) {
		q := newFakeQueue(1)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			<-ctx.Done()
			return "", ctx.Err()
		}), relay.Config{ShutdownTimeout: 3 * time.Second, Lease: time.Hour, SendTimeout: 50 * time.Minute}))
		advance(time.Second)
		began := time.Now()
		require.NoError(t, stop())
		require.Equal(t, 3*time.Second, time.Since(began))
		st := q.settles[0][0]
		require.Equal(t, outbox.HandedBack, st.Verdict)
		require.True(t, st.Unknown)
	})

	bubble("keeps_the_providers_word_of_what_is_cut_off", func(t *testing.T) {
		q := newFakeQueue(1)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			<-ctx.Done()
			return "", relay.RetryAfter(errors.New("busy"), time.Hour)
		}), relay.Config{ShutdownTimeout: time.Second}))
		advance(time.Second)
		require.NoError(t, stop())
		st := q.settles[0][0]
		require.Equal(t, outbox.Retry, st.Verdict)
		require.Equal(t, time.Hour, st.RetryIn)
		require.False(t, st.Unknown)
	})

	bubble("hands_back_as_unknown_what_it_was_asking_about", func(t *testing.T) {
		q := newFakeQueue(1)
		q.change(1, func(row *fakeRow) { row.token, row.leased = outbox.NewToken(), 1 })
		s := &slowReconciler{}
		stop := start(t, newRelay(t, q, s, relay.Config{ShutdownTimeout: time.Second, Delivery: relay.AtMostOnce}))
		advance(time.Second)
		require.NoError(t, stop())
		st := q.settles[0][0]
		require.Equal(t, outbox.HandedBack, st.Verdict)
		require.True(t, st.Unknown)
	})

	bubble("waits_for_as_long_as_it_is_told", func(t *testing.T) {
		q := newFakeQueue(1)
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			take(15 * time.Second)
			return "", nil
		}), relay.Config{ShutdownTimeout: 1<<63 - 1}))
		advance(time.Second)
		require.NoError(t, stop())
		require.Equal(t, 1, q.count(outbox.StatusSent))
	})

	bubble("leaves_behind_what_heeds_nothing_and_says_so", func(t *testing.T) {
		q := newFakeQueue(2)
		forever := make(chan struct{})
		stop := start(t, newRelay(t, q, relay.SenderFunc(func(ctx context.Context, n outbox.Notification) (string, error) {
			if n.ID == 1 {
				<-forever
			}
			return "", nil
		}), relay.Config{ShutdownTimeout: 3 * time.Second, Lease: time.Minute}))
		advance(time.Second)
		began := time.Now()
		require.ErrorContains(t, stop(), "1 deliveries did not end")
		require.Equal(t, 4*time.Second, time.Since(began))
		require.Equal(t, outbox.StatusSent, q.row(2).Status)
		require.Equal(t, 1, q.leases(), "until its end nobody else sends it")
		close(forever)
		synctest.Wait()
	})

	bubble("gives_up_noting_results_after_a_while", func(t *testing.T) {
		q := newFakeQueue(3)
		q.settleErr = failing
		stop := start(t, newRelay(t, q, accept, relay.Config{}))
		advance(time.Second)
		began := time.Now()
		require.ErrorContains(t, stop(), "the results of 3 deliveries could not be noted")
		require.Equal(t, 5*time.Second, time.Since(began))
	})

	bubble("hears_the_answer_of_a_claim_under_way_and_hands_its_rows_back", func(t *testing.T) {
		q := newFakeQueue(3)
		slow := &slowQueue{q, 500 * time.Millisecond}
		stop := start(t, newRelay(t, slow, accept, relay.Config{}))
		advance(100 * time.Millisecond)
		require.NoError(t, stop())
		require.Zero(t, q.leases())
		require.Equal(t, 1, q.row(1).handbacks)
	})
}

// slowReconciler has no answer as long as it may look for one.
type slowReconciler struct{ reconciler }

func (s *slowReconciler) Reconcile(ctx context.Context, _ outbox.Notification, _ int64) (string, bool, error) {
	<-ctx.Done()
	return "", false, ctx.Err()
}

// slowQueue takes its time to claim.
type slowQueue struct {
	*fakeQueue
	pause time.Duration
}

func (q *slowQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	select {
	case <-ctx.Done():
		return outbox.ClaimResult{}, ctx.Err()
	case <-time.After(q.pause):
		return q.fakeQueue.Claim(ctx, opts)
	}
}

func TestRunOnce(t *testing.T) {
	t.Parallel()
	bubble := func(name string, test func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, test)
		})
	}

	bubble("delivers_one_batch_and_counts_what_it_settled", func(t *testing.T) {
		q := newFakeQueue(12)
		q.change(1, func(row *fakeRow) { row.Attempts = 10 }) // fails at the claim
		r := newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			if n.ID == 2 {
				return "", errors.New("busy")
			}
			return "", nil
		}), relay.Config{BatchSize: 5})
		for _, want := range []int{5, 5, 2, 0} {
			n, err := r.RunOnce(t.Context())
			require.NoError(t, err)
			require.Equal(t, want, n)
		}
		require.Equal(t, 10, q.count(outbox.StatusSent))
		require.Equal(t, 1, q.count(outbox.StatusFailed))
	})

	bubble("counts_what_is_due_again_at_once", func(t *testing.T) {
		q := newFakeQueue(1)
		q.change(1, func(row *fakeRow) { row.token, row.leased, row.Version = outbox.NewToken(), 1, 2 })
		s := &reconciler{answer: func() (string, bool, error) { return "", false, nil }}
		r := newRelay(t, q, s, relay.Config{})
		for _, want := range []int{1, 1, 0} {
			n, err := r.RunOnce(t.Context())
			require.NoError(t, err)
			require.Equal(t, want, n)
		}
		require.Equal(t, []int64{2}, s.sent)
	})

	bubble("is_quiet_when_its_time_is_shorter_than_the_limiter_takes", func(t *testing.T) {
		q := newFakeQueue(30)
		var log logBook
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		n, err := newRelay(t, q, accept, relay.Config{Limiter: rate.NewLimiter(0.5, 1), Logger: log.logger()}).RunOnce(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.InDelta(t, 10, n, 1)
		require.Zero(t, log.count("level=ERROR"))
		require.Zero(t, q.leases())
	})

	bubble("does_not_count_what_another_has_taken", func(t *testing.T) {
		q := newFakeQueue(2)
		n, err := newRelay(t, q, relay.SenderFunc(func(_ context.Context, n outbox.Notification) (string, error) {
			if n.ID == 1 {
				q.change(1, func(row *fakeRow) { row.token = outbox.NewToken() })
			}
			return "", nil
		}), relay.Config{}).RunOnce(t.Context())
		require.NoError(t, err)
		require.Equal(t, 1, n)
	})

	bubble("returns_the_error_of_its_claim", func(t *testing.T) {
		q := newFakeQueue(1)
		q.claimErr = failing
		n, err := newRelay(t, q, accept, relay.Config{}).RunOnce(t.Context())
		require.ErrorContains(t, err, "connection refused")
		require.Zero(t, n)
	})

	bubble("claims_nothing_when_ctx_has_ended", func(t *testing.T) {
		q := newFakeQueue(1)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		n, err := newRelay(t, q, accept, relay.Config{}).RunOnce(ctx)
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, n)
		require.Empty(t, q.claimsMade())
	})

	bubble("hands_back_what_it_has_not_begun_when_ctx_ends", func(t *testing.T) {
		q := newFakeQueue(10)
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		n, err := newRelay(t, q, relay.SenderFunc(func(context.Context, outbox.Notification) (string, error) {
			take(time.Second)
			return "", nil
		}), relay.Config{Concurrency: 1}).RunOnce(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 2, n)
		require.Equal(t, 2, q.count(outbox.StatusSent))
		require.Zero(t, q.leases())
	})
}

func TestSender(t *testing.T) {
	t.Parallel()
	busy := errors.New("busy")
	long := strings.Repeat("ä", 3000)
	hour := func(int) time.Duration { return time.Hour }
	for name, c := range map[string]struct {
		send relay.SenderFunc
		cfg  relay.Config
		want outbox.Settlement // but for the lease
	}{
		"an_error_is_tried_again_after_the_backoff": {send: fails(busy), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "busy", RetryIn: time.Hour}},
		"a_permanent_error_is_not": {send: fails(relay.Permanent(busy)),
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "busy"}},
		"also_wrapped": {send: fails(fmt.Errorf("telegram: %w", relay.Permanent(busy))),
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "telegram: busy"}},
		"also_joined": {send: fails(errors.Join(io.EOF, relay.Permanent(busy))),
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "EOF\nbusy"}},
		"permanent_wins_over_retry_after": {send: fails(relay.RetryAfter(relay.Permanent(busy), time.Hour)),
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "busy"}},
		"retry_after_is_a_floor": {send: fails(fmt.Errorf("telegram: %w", relay.RetryAfter(busy, 2*time.Hour))), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "telegram: busy", RetryIn: 2 * time.Hour}},
		"and_not_a_ceiling": {send: fails(errors.Join(busy, relay.RetryAfter(busy, time.Minute))), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "busy\nbusy", RetryIn: time.Hour}},
		"retry_after_says_that_the_outcome_is_known": {send: fails(relay.Unknown(relay.RetryAfter(busy, time.Minute))), cfg: relay.Config{Backoff: hour, Delivery: relay.AtMostOnce},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "busy", RetryIn: time.Hour}},
		"the_last_attempt_fails_for_good": {send: fails(busy), cfg: relay.Config{MaxAttempts: 1},
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "busy"}},
		"no_attempt_is_the_last_where_they_are_unlimited": {send: fails(busy), cfg: relay.Config{MaxAttempts: -1, Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "busy", RetryIn: time.Hour}},
		"a_timeout_leaves_the_outcome_unknown": {send: func(ctx context.Context, _ outbox.Notification) (string, error) {
			<-ctx.Done()
			return "", ctx.Err()
		}, cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "cut off, SendTimeout is 20s: context deadline exceeded", RetryIn: time.Hour, Unknown: true}},
		"also_one_of_the_senders_own": {send: fails(fmt.Errorf("telegram: %w", context.DeadlineExceeded)), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "telegram: context deadline exceeded", RetryIn: time.Hour, Unknown: true}},
		"also_one_of_the_network": {send: fails(&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "read: i/o timeout", RetryIn: time.Hour, Unknown: true}},
		"an_error_of_unknown_outcome": {send: fails(fmt.Errorf("telegram: %w", relay.Unknown(io.ErrUnexpectedEOF))), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "telegram: unexpected EOF", RetryIn: time.Hour, Unknown: true}},
		"at_most_once_an_unknown_outcome_fails": {send: fails(relay.Unknown(io.ErrUnexpectedEOF)), cfg: relay.Config{Delivery: relay.AtMostOnce},
			want: outbox.Settlement{Verdict: outbox.Failed, Error: "outcome unknown: unexpected EOF"}},
		"at_most_once_a_known_error_is_tried_again": {send: fails(busy), cfg: relay.Config{Backoff: hour, Delivery: relay.AtMostOnce},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "busy", RetryIn: time.Hour}},
		"a_panic_is_that_messages_failure": {send: func(context.Context, outbox.Notification) (string, error) { panic("oh no") }, cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "panic: oh no", RetryIn: time.Hour, Unknown: true}},
		"a_goexit_too": {send: func(context.Context, outbox.Notification) (string, error) { runtime.Goexit(); return "", nil }, cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "the sender ended its goroutine", RetryIn: time.Hour, Unknown: true}},
		"an_error_whose_text_panics": {send: fails(panickingError{}), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "an error of type relay_test.panickingError whose methods panic", RetryIn: time.Hour, Unknown: true}},
		"an_error_that_is_nil_inside": {send: fails((*wrappingError)(nil)), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "an error of type *relay_test.wrappingError whose methods panic", RetryIn: time.Hour, Unknown: true}},
		"what_PostgreSQL_cannot_keep_is_replaced_in_an_error": {send: fails(errors.New("a\x00b\xffc")), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "a\uFFFDb\uFFFDc", RetryIn: time.Hour}},
		"a_long_error_is_cut_between_characters": {send: fails(errors.New("x" + long)), cfg: relay.Config{Backoff: hour},
			want: outbox.Settlement{Verdict: outbox.Retry, Error: "x" + long[:4094] + "... (6001 bytes)", RetryIn: time.Hour}},
		"what_PostgreSQL_cannot_keep_is_replaced_in_a_receipt": {send: func(context.Context, outbox.Notification) (string, error) { return "a\x00b\xff", nil },
			want: outbox.Settlement{Verdict: outbox.Delivered, Receipt: "a\uFFFDb\uFFFD"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				q := newFakeQueue(1)
				n, err := newRelay(t, q, c.send, c.cfg).RunOnce(t.Context())
				require.NoError(t, err)
				require.Equal(t, 1, n)
				got := q.settles[0][0]
				got.Lease = outbox.Lease{}
				require.Equal(t, c.want, got)
			})
		})
	}

	t.Run("no_error_is_no_error", func(t *testing.T) {
		require.NoError(t, relay.Permanent(nil))
		require.NoError(t, relay.RetryAfter(nil, time.Hour))
		require.NoError(t, relay.Unknown(nil))
	})
}

type panickingError struct{}

func (panickingError) Error() string { panic("oh no") }

type wrappingError struct{ err error }

func (e *wrappingError) Error() string { return e.err.Error() }
func (e *wrappingError) Unwrap() error { return e.err }

func TestBackoff(t *testing.T) {
	t.Parallel()
	// retryIn runs a failing delivery as its attempt-th.
	retryIn := func(t *testing.T, attempt int, cfg relay.Config) time.Duration {
		q := newFakeQueue(1)
		q.change(1, func(row *fakeRow) { row.Attempts = attempt - 1 })
		cfg.MaxAttempts = -1
		_, err := newRelay(t, q, fails(io.EOF), cfg).RunOnce(t.Context())
		require.NoError(t, err)
		return q.settles[0][0].RetryIn
	}
	t.Run("is_10_seconds_doubled_up_to_an_hour_each_20_percent_up_or_down", func(t *testing.T) {
		t.Parallel()
		for attempt, base := range map[int]time.Duration{1: 10 * time.Second, 2: 20 * time.Second, 3: 40 * time.Second, 9: 2560 * time.Second,
			10: time.Hour, 11: time.Hour, 1000: time.Hour, 1 << 30: time.Hour} {
			least, most := time.Duration(1<<62), time.Duration(0)
			for range 300 {
				d := retryIn(t, attempt, relay.Config{})
				least, most = min(least, d), max(most, d)
			}
			require.GreaterOrEqual(t, least, base*8/10)
			require.LessOrEqual(t, most, base*12/10)
			require.Less(t, least, base*9/10)
			require.Greater(t, most, base*11/10)
		}
	})
	t.Run("is_told_the_number_of_the_attempt", func(t *testing.T) {
		t.Parallel()
		require.Equal(t, 7*time.Second, retryIn(t, 7, relay.Config{Backoff: func(n int) time.Duration { return time.Duration(n) * time.Second }}))
	})
	for name, fn := range map[string]func(int) time.Duration{
		"panics":      func(int) time.Duration { panic("oh no") },
		"is_negative": func(int) time.Duration { return -1 },
	} {
		t.Run("is_the_default_where_the_configured_one_"+name, func(t *testing.T) {
			t.Parallel()
			var log logBook
			d := retryIn(t, 1, relay.Config{Backoff: fn, Logger: log.logger()})
			require.InDelta(t, 10*time.Second, d, float64(2*time.Second))
			require.Equal(t, 1, log.count("Backoff failed"))
		})
	}
}

// reconciler is a sender that can be asked.
type reconciler struct {
	mu       sync.Mutex
	asked    []int64 // versions
	sent     []int64 // versions
	answer   func() (string, bool, error)
	delivery error
}

func (r *reconciler) Send(_ context.Context, n outbox.Notification) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, n.Version)
	return "sent", r.delivery
}

func (r *reconciler) Reconcile(_ context.Context, _ outbox.Notification, version int64) (string, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, version)
	return r.answer()
}

func TestReconciler(t *testing.T) {
	t.Parallel()
	const (
		yes = "yes"
		no  = "no"
		err = "error"
	)
	for name, c := range map[string]struct {
		answer   string
		attempts int // before
		version  int64
		expired  bool
		sent     []int64
		verdict  outbox.Verdict
		text     string
	}{
		"what_was_delivered_is_not_sent_again":     {answer: yes, attempts: 1, version: 1, verdict: outbox.Delivered},
		"what_was_not_is_sent":                     {answer: no, attempts: 1, version: 1, verdict: outbox.Delivered, sent: []int64{1}},
		"without_an_answer_it_is_asked_again":      {answer: err, attempts: 1, version: 1, verdict: outbox.Retry, text: "reconcile: no answer"},
		"without_an_answer_in_the_end_it_fails":    {answer: err, attempts: 10, version: 1, verdict: outbox.Failed, text: "outcome unknown: reconcile: no answer"},
		"out_of_attempts_and_delivered":            {answer: yes, attempts: 10, version: 1, verdict: outbox.Delivered},
		"out_of_attempts_and_not_delivered":        {answer: no, attempts: 10, version: 1, verdict: outbox.Failed, text: "out of attempts: the last delivery left no result"},
		"expired_and_delivered":                    {answer: yes, attempts: 1, version: 1, expired: true, verdict: outbox.Delivered},
		"expired_and_not_delivered":                {answer: no, attempts: 1, version: 1, expired: true, verdict: outbox.HandedBack},
		"an_older_version_that_was_delivered":      {answer: yes, attempts: 1, version: 2, verdict: outbox.Delivered},
		"an_older_version_that_was_not_is_dropped": {answer: no, attempts: 1, version: 2, verdict: outbox.HandedBack},
		"an_older_version_without_an_answer":       {answer: err, attempts: 1, version: 2, verdict: outbox.Retry, text: "reconcile: no answer"},
		"an_older_version_without_one_in_the_end":  {answer: err, attempts: 10, version: 2, verdict: outbox.Failed, text: "outcome unknown: reconcile: no answer"},
	} {
		for _, delivery := range []relay.Delivery{relay.AtLeastOnce, relay.AtMostOnce} {
			t.Run(fmt.Sprintf("%s/delivery_%d", name, delivery), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					q := newFakeQueue(1)
					q.change(1, func(row *fakeRow) {
						row.token, row.leased, row.Version, row.Attempts = outbox.NewToken(), 1, c.version, c.attempts
						if c.expired {
							row.NotAfter = q.now().Add(-time.Second)
						}
					})
					s := &reconciler{answer: func() (string, bool, error) {
						if c.answer == err {
							return "", false, errors.New("no answer")
						}
						return "found", c.answer == yes, nil
					}}
					// The fake fails a row out of attempts at the claim, so it is given one more, as PGStore does.
					cfg := relay.Config{Delivery: delivery, Logger: discard}
					_, runErr := newRelay(t, &generousQueue{q}, s, cfg).RunOnce(t.Context())
					require.NoError(t, runErr)
					require.Equal(t, []int64{1}, s.asked)
					require.Equal(t, c.sent, s.sent)
					st := q.settles[0][0]
					require.Equal(t, c.verdict, st.Verdict)
					require.Contains(t, st.Error, c.text)
					require.Equal(t, c.verdict == outbox.Retry, st.Unknown)
					require.Equal(t, c.verdict == outbox.Retry, st.Asked)
					if c.answer == yes {
						require.Equal(t, "found", st.Receipt)
					}
				})
			})
		}
	}

	t.Run("a_version_whose_outcome_is_known_is_not_asked_about", func(t *testing.T) {
		t.Parallel()
		q := newFakeQueue(1)
		s := &reconciler{}
		_, err := newRelay(t, q, s, relay.Config{}).RunOnce(t.Context())
		require.NoError(t, err)
		require.Empty(t, s.asked)
		require.Equal(t, []int64{1}, s.sent)
	})

	t.Run("the_last_attempt_of_unknown_outcome_is_asked_about_before_it_fails", func(t *testing.T) {
		t.Parallel()
		for _, delivery := range []relay.Delivery{relay.AtLeastOnce, relay.AtMostOnce} {
			q := newFakeQueue(1)
			s := &reconciler{delivery: relay.Unknown(io.EOF)}
			_, err := newRelay(t, q, s, relay.Config{Delivery: delivery, MaxAttempts: 1}).RunOnce(t.Context())
			require.NoError(t, err)
			require.Equal(t, outbox.Retry, q.settles[0][0].Verdict)
			require.True(t, q.settles[0][0].Unknown)
		}
	})

	for name, wrap := range map[string]func(error) error{
		"RetryAfter": func(err error) error { return relay.RetryAfter(err, time.Hour) },
		"Permanent":  relay.Permanent,
	} {
		t.Run("an_error_of_it_leaves_the_outcome_unknown_also_with_"+name, func(t *testing.T) {
			t.Parallel()
			for _, delivery := range []relay.Delivery{relay.AtLeastOnce, relay.AtMostOnce} {
				q := newFakeQueue(1)
				q.change(1, func(row *fakeRow) { row.token, row.leased = outbox.NewToken(), 1 })
				s := &reconciler{answer: func() (string, bool, error) { return "", false, wrap(io.EOF) }}
				_, err := newRelay(t, q, s, relay.Config{Delivery: delivery}).RunOnce(t.Context())
				require.NoError(t, err)
				st := q.settles[0][0]
				require.Equal(t, outbox.Retry, st.Verdict)
				require.True(t, st.Unknown)
				require.Equal(t, name == "RetryAfter", st.RetryIn >= time.Hour)
			}
		})
	}

	t.Run("a_panic_of_it_is_no_answer", func(t *testing.T) {
		t.Parallel()
		q := newFakeQueue(1)
		q.change(1, func(row *fakeRow) { row.token, row.leased = outbox.NewToken(), 1 })
		_, err := newRelay(t, q, &reconciler{answer: func() (string, bool, error) { panic("oh no") }}, relay.Config{}).RunOnce(t.Context())
		require.NoError(t, err)
		require.Equal(t, "reconcile: panic: oh no", q.settles[0][0].Error)
		require.True(t, q.settles[0][0].Unknown)
	})
}

// generousQueue claims rows out of attempts, too.
type generousQueue struct{ *fakeQueue }

func (q *generousQueue) Claim(ctx context.Context, opts outbox.ClaimOptions) (outbox.ClaimResult, error) {
	opts.MaxAttempts++
	return q.fakeQueue.Claim(ctx, opts)
}

// listeningQueue is a queue with a Listener.
type listeningQueue struct {
	*fakeQueue
	calls  atomic.Int64
	listen func(ctx context.Context, wake func()) error
}

func (q *listeningQueue) Listen(ctx context.Context, wake func()) error {
	q.calls.Add(1)
	return q.listen(ctx, wake)
}

func TestListen(t *testing.T) {
	t.Parallel()
	t.Run("wakes_the_relay_and_listens_again_when_the_connection_breaks", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			var log logBook
			notify := make(chan struct{})
			q := &listeningQueue{fakeQueue: newFakeQueue(0)}
			q.listen = func(ctx context.Context, wake func()) error {
				if q.calls.Load() < 4 {
					return errors.New("connection refused")
				}
				wake()
				for {
					select {
					case <-notify:
						wake()
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			}
			stop := start(t, newRelay(t, q, accept, relay.Config{Listen: true, PollInterval: time.Hour, Logger: log.logger()}))
			advance(5 * time.Hour)
			q.add(1)
			notify <- struct{}{}
			synctest.Wait()
			require.Equal(t, outbox.StatusSent, q.row(1).Status)
			require.NoError(t, stop())
			require.EqualValues(t, 4, q.calls.Load())
			require.Equal(t, 1, log.count("cannot listen for NOTIFY"))
			require.Equal(t, 1, log.count("can listen for NOTIFY again"))
		})
	})
	t.Run("goes_on_by_polling_behind_a_pooler_and_says_so_once", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			var log logBook
			q := &listeningQueue{fakeQueue: newFakeQueue(1)}
			q.listen = func(context.Context, func()) error { return outbox.ErrNoNotifications }
			stop := start(t, newRelay(t, q, accept, relay.Config{Listen: true, Logger: log.logger()}))
			advance(time.Hour)
			require.NoError(t, stop())
			require.Equal(t, outbox.StatusSent, q.row(1).Status)
			require.InDelta(t, 7, q.calls.Load(), 1, "now and then")
			require.Equal(t, 1, log.count("by polling alone"))
		})
	})
}
