package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

func ExamplePGStore_AddNotification() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Migrate(ctx); err != nil {
		log.Fatal(err)
	}

	reject := func(slot string) {
		var res outbox.AddResult
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) (err error) {
			// UPDATE bookings SET status = 'rejected' ... in the same tx, then:
			res, err = store.AddNotification(ctx, tx, outbox.NewNotification{
				Type: "reject", BookingID: 7, CandidateTgID: 42,
				Payload: map[string]string{"slot": slot},
			})
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(res.Outcome, res.Notification.Status, "version", res.Notification.Version, string(res.Notification.Payload))
	}
	reject("10:00")
	reject("10:00") // pressed twice
	reject("10:30") // changed before it was sent
	if _, err := pool.Exec(ctx, "UPDATE outbox_notifications SET status = 'sent'"); err != nil {
		log.Fatal(err)
	}
	reject("11:00")
	// Output:
	// created pending version 1 {"slot":"10:00"}
	// refreshed pending version 1 {"slot":"10:00"}
	// refreshed pending version 2 {"slot":"10:30"}
	// existing sent version 2 {"slot":"10:30"}
}

func ExamplePGStore_AddNotifications() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	if err := outbox.Migrate(ctx, pool); err != nil {
		log.Fatal(err)
	}
	store, err := outbox.NewPGStore(pool, outbox.Config{})
	if err != nil {
		log.Fatal(err)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		results, err := store.AddNotifications(ctx, tx, []outbox.NewNotification{
			{Type: "reminder", BookingID: 8, CandidateTgID: 43},
			{Type: "reminder", BookingID: 7, CandidateTgID: 42},
			{Type: "reminder", BookingID: 8, CandidateTgID: 43, Payload: "tomorrow"},
		})
		for _, res := range results {
			fmt.Println(res.Notification.Key(), res.Outcome, "version", res.Notification.Version)
		}
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// "reminder" booking 8 candidate 43 created version 2
	// "reminder" booking 7 candidate 42 created version 1
	// "reminder" booking 8 candidate 43 refreshed version 2
}

func ExamplePGStore_RequeueMatching() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Migrate(ctx); err != nil {
		log.Fatal(err)
	}
	// What a provider's outage left behind.
	if _, err := pool.Exec(ctx, `INSERT INTO outbox_notifications (type, booking_id, status, last_error)
		SELECT 'invite', i, 'failed', 'bad gateway' FROM generate_series(1, 5) AS i`); err != nil {
		log.Fatal(err)
	}

	f := outbox.Filter{Status: outbox.StatusFailed, NewerThan: 2 * time.Hour, Limit: 2}
	for {
		requeued, err := store.RequeueMatching(ctx, f)
		if err != nil {
			log.Fatal(err)
		}
		if len(requeued) == 0 {
			break
		}
		for _, n := range requeued {
			fmt.Println(n.Key(), n.Status, n.LastError)
		}
		f.After = requeued[len(requeued)-1].ID
	}
	stats, err := store.Stats(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("due:", stats.Due, "failed:", stats.Failed)
	// Output:
	// "invite" booking 1 pending bad gateway
	// "invite" booking 2 pending bad gateway
	// "invite" booking 3 pending bad gateway
	// "invite" booking 4 pending bad gateway
	// "invite" booking 5 pending bad gateway
	// due: 5 failed: 0
}

// A repeat that comes after its notification was purged is still recognised.
func ExamplePGStore_Purge() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Migrate(ctx); err != nil {
		log.Fatal(err)
	}
	// What was sent a hundred days ago.
	if _, err := pool.Exec(ctx, `INSERT INTO outbox_notifications (type, booking_id, payload_json, status, sent_version, receipt, sent_at)
		VALUES ('reject', 7, '{"name": "Ann"}', 'sent', 1, 'message 1', now() - interval '100 days')`); err != nil {
		log.Fatal(err)
	}

	purged, err := store.Purge(ctx, outbox.PurgeOptions{OlderThan: 90 * 24 * time.Hour})
	fmt.Println("purged:", purged, err)
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		res, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "reject", BookingID: 7, Payload: "a repeat"})
		n := res.Notification
		fmt.Printf("%s: %s, payload %q, receipt %q\n", res.Outcome, n.Status, n.Payload, n.Receipt)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// purged: 1 <nil>
	// existing: sent, payload "", receipt ""
}

func ExampleRunInTx() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	if err := outbox.Migrate(ctx, pool); err != nil {
		log.Fatal(err)
	}
	store, err := outbox.NewPGStore(pool, outbox.Config{})
	if err != nil {
		log.Fatal(err)
	}
	err = outbox.RunInTx(ctx, pool, pgx.TxOptions{IsoLevel: pgx.Serializable}, func(tx pgx.Tx) error {
		res, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "digest", CandidateTgID: -1001234567890})
		fmt.Println(res.Outcome)
		return err
	})
	fmt.Println(err)
	// Output:
	// created
	// <nil>
}

// Bad input is refused before any SQL, so the transaction goes on.
func ExampleInvalidError() {
	ctx := context.Background()
	pool, drop := pgtest.ExamplePool(ctx)
	defer drop()
	store, err := outbox.NewPGStore(pool, outbox.Config{})
	if err != nil {
		log.Fatal(err)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		_, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "reject", Payload: "NUL: \x00"})
		var bad *outbox.InvalidError
		if errors.As(err, &bad) {
			fmt.Println(bad.Field)
		}
		fmt.Println(err)
		_, err = tx.Exec(ctx, "SELECT 1")
		return err
	})
	fmt.Println("committed:", err == nil)
	// Output:
	// Payload
	// outbox: invalid Payload: jsonb has no \u0000 (at byte 6 of the JSON)
	// committed: true
}
