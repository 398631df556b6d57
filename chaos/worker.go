package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

var errNone = errors.New("none")

// breaks are ways to break a relay, of which the test fills in those that the rig has to see.
var breaks map[string]func(c *child, q relay.Queue, s relay.Sender) (relay.Queue, relay.Sender)

// deliver runs a relay until ctx ends.
func (c *child) deliver(ctx context.Context) error {
	store, err := c.store()
	if err != nil {
		return err
	}
	watched := &ledger.Worker{
		Name: c.Name, Journal: c.journal,
		Hook: func(_ context.Context, m ledger.Moment) error {
			c.moment(string(m))
			return nil
		},
	}
	var sender relay.Sender = newProvider(c)
	if c.Reconcile {
		sender = reconciler{newProvider(c)}
	}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("OUTBOX_CHAOS_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("worker", c.Name)
	}
	queue, sender := watched.Queue(store), watched.Sender(sender)
	if c.Broken != "" {
		queue, sender = breaks[c.Broken](c, queue, sender)
	}
	r, err := relay.New(queue, sender, relay.Config{
		Concurrency: c.Concurrency, BatchSize: c.BatchSize, PollInterval: 100 * time.Millisecond,
		Lease: c.Lease, SendTimeout: c.Lease / 3, ShutdownTimeout: time.Second, MaxAttempts: c.MaxAttempts,
		Backoff:  func(attempt int) time.Duration { return time.Duration(min(attempt, 5)) * 40 * time.Millisecond },
		Delivery: c.Delivery, Logger: log,
	})
	if err != nil {
		return err
	}
	var asked atomic.Pointer[time.Time]
	context.AfterFunc(ctx, func() {
		now := time.Now()
		asked.Store(&now)
	})
	err = r.Run(ctx)
	if ended(ctx) {
		if at := asked.Load(); err != nil && at != nil { // it says that it had to leave something behind
			c.fault(ledger.Fault{Kind: "orderly end of a worker that left something", From: *at, Observed: true, Kills: true})
		}
		return nil
	}
	return fmt.Errorf("the relay's Run returned by itself, with error %w", cmp.Or(err, errNone))
}
