package relay_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/relay"
)

func ExampleRelay_RunOnce() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	quiet := slog.New(slog.DiscardHandler)
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: quiet})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Migrate(ctx); err != nil {
		log.Fatal(err)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		_, err := store.AddNotifications(ctx, tx, []outbox.NewNotification{
			{Type: "reject", BookingID: 7, CandidateTgID: 42, Payload: map[string]string{"slot": "10:00"}},
			{Type: "reject", BookingID: 8, CandidateTgID: 43, Payload: map[string]string{"slot": "11:00"}},
		})
		return err
	})
	if err != nil {
		log.Fatal(err)
	}

	send := func(ctx context.Context, n outbox.Notification) (string, error) {
		if n.CandidateTgID == 43 {
			return "", relay.Permanent(errors.New("the bot was blocked"))
		}
		fmt.Printf("to %d: %s %s\n", n.CandidateTgID, n.Type, n.Payload)
		return "message 1", nil
	}
	r, err := relay.New(store, relay.SenderFunc(send), relay.Config{Logger: quiet})
	if err != nil {
		log.Fatal(err)
	}
	settled, err := r.RunOnce(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("settled", settled)
	for _, key := range []outbox.Key{{Type: "reject", BookingID: 7, CandidateTgID: 42}, {Type: "reject", BookingID: 8, CandidateTgID: 43}} {
		n, err := store.Get(ctx, key)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(n.BookingID, n.Status, cmp.Or(n.Receipt, n.LastError))
	}
	// Output:
	// to 42: reject {"slot":"10:00"}
	// settled 2
	// 7 sent message 1
	// 8 failed the bot was blocked
}
