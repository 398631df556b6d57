package outboxtest_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/outboxtest"
	"github.com/seed3357934d/outbox/relay"
)

// bookings is a service as a user has it.
type bookings struct{ store outbox.Store }

func (b bookings) reject(ctx context.Context, tx pgx.Tx, booking, candidate int64, slot string) error {
	// UPDATE bookings SET status = 'rejected' ... in the same tx, then:
	_, err := b.store.AddNotification(ctx, tx, outbox.NewNotification{
		Type: "reject", BookingID: booking, CandidateTgID: candidate, Payload: map[string]string{"slot": slot},
	})
	return err
}

// A test of a service, as its users write it.
func TestBookings(t *testing.T) {
	t.Parallel()
	pool := outboxtest.NewPool(t)
	store := outboxtest.NewStore(t, pool)
	service := bookings{store}
	key := outbox.Key{Type: "reject", BookingID: 7, CandidateTgID: 42}
	reject := func(check func(pgx.Tx)) {
		err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			defer check(tx)
			return service.reject(t.Context(), tx, 7, 42, "10:00")
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	reject(func(tx pgx.Tx) {
		outboxtest.RequireAdded(t, tx, key, outboxtest.Want{Payload: map[string]string{"slot": "10:00"}})
	})
	var sender outboxtest.Sender
	sender.On(key, outboxtest.Error(errors.New("bad gateway")), outboxtest.OK("message 1"))
	if did := outboxtest.Deliver(t, store, &sender); len(did.Retried) != 1 {
		t.Errorf("not retried: %+v", did)
	}
	outboxtest.Deliver(t, store, &sender)
	if n := outboxtest.RequireAdded(t, pool, key, outboxtest.Want{Status: outbox.StatusSent}); n.Receipt != "message 1" {
		t.Errorf("receipt %q", n.Receipt)
	}

	reject(func(tx pgx.Tx) { outboxtest.RequireNotAdded(t, tx, key) }) // pressed twice
	outboxtest.Deliver(t, store, &sender)
	if sent := sender.SentTo(key); len(sent) != 1 {
		t.Errorf("sent %d times", len(sent))
	}
}

// chat is a provider's stand-in, which knows what it has accepted.
type chat struct {
	mu       sync.Mutex
	accepted map[string]int
}

func (c *chat) post(text string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.accepted[text]++
	return len(c.accepted)
}

// chatSender is a user's sender. The text names the notification and its version, so that the
// provider's side can be compared.
type chatSender struct{ *chat }

func text(n outbox.Notification) string {
	return fmt.Sprintf("%v, version %d: %s", n.Key(), n.Version, n.Payload)
}

func (s chatSender) Send(ctx context.Context, n outbox.Notification) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return fmt.Sprint(s.post(text(n))), nil
}

// A test of a sender, as its users write it.
func TestChatSender(t *testing.T) {
	t.Parallel()
	c := &chat{accepted: make(map[string]int)}
	outboxtest.Torture(t, chatSender{c}, outboxtest.TortureConfig{
		Duration: time.Second,
		Accepted: func(n outbox.Notification) int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.accepted[text(n)]
		},
	})
}

func ExampleSender() {
	var sender outboxtest.Sender
	sender.On(outbox.Key{Type: "reject"}, outboxtest.Error(relay.Permanent(errors.New("the bot was blocked"))))
	sender.On(outbox.Key{Type: "reject", BookingID: 7}, outboxtest.Error(errors.New("bad gateway")), outboxtest.OK("message 5"))

	ctx := context.Background()
	for _, n := range []outbox.Notification{
		{Type: "invite"}, {Type: "reject", BookingID: 8}, {Type: "reject", BookingID: 7}, {Type: "reject", BookingID: 7},
	} {
		fmt.Println(sender.Send(ctx, n))
	}
	fmt.Println("accepted:", len(sender.Sent()))
	// Output:
	// receipt 1 <nil>
	//  the bot was blocked
	//  bad gateway
	// message 5 <nil>
	// accepted: 2
}
