package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
)

// telegram stands for the provider. It remembers what it accepted.
type telegram struct {
	down     bool
	messages []outbox.Key
}

// Send delivers n and returns the id of the message.
func (t *telegram) Send(_ context.Context, n outbox.Notification) (receipt string, err error) {
	if t.down {
		return "", errors.New("telegram: 502 Bad Gateway")
	}
	t.messages = append(t.messages, n.Key())
	return fmt.Sprintf("message %d", len(t.messages)), nil
}

// sentTwice returns the first key that has more than one message, if any.
func (t *telegram) sentTwice() (key outbox.Key, twice bool) {
	seen := make(map[outbox.Key]bool)
	for _, key := range t.messages {
		if seen[key] {
			return key, true
		}
		seen[key] = true
	}
	return outbox.Key{}, false
}

// deliver sends what is due and records how it went. Package relay will do this:
// it claims rows under a lease, so that many may run, and settles only what it
// still holds.
func deliver(ctx context.Context, pool *pgxpool.Pool, store *outbox.PGStore, table string, to *telegram) error {
	rows, err := pool.Query(ctx, `SELECT type, booking_id, candidate_tg_id FROM `+table+`
		WHERE status = 'pending' AND (next_retry_at IS NULL OR next_retry_at <= now())
		ORDER BY created_at, id`)
	if err != nil {
		return err
	}
	due, err := pgx.CollectRows(rows, pgx.RowToStructByPos[outbox.Key])
	if err != nil {
		return err
	}
	for _, key := range due {
		n, err := store.Get(ctx, key)
		if err != nil {
			return err
		}
		receipt, sendErr := to.Send(ctx, n)
		if sendErr != nil {
			_, err = pool.Exec(ctx, `UPDATE `+table+` SET attempts = attempts + 1, last_error = $2,
				next_retry_at = now() + interval '10 minutes' WHERE id = $1`, n.ID, sendErr.Error())
		} else {
			_, err = pool.Exec(ctx, `UPDATE `+table+` SET attempts = attempts + 1, status = 'sent',
				sent_at = now(), sent_version = version, receipt = $2 WHERE id = $1`, n.ID, receipt)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
