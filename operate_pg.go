package outbox

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// getSQL reads the row of a key. $1 type, $2 booking_id, $3 candidate_tg_id.
const getSQL = `SELECT ` + rowColumns + ` FROM {table} WHERE {key}
ORDER BY type, booking_id, candidate_tg_id LIMIT 1`

// Get returns the row of key as committed, or [ErrNotFound]. It runs on the
// store's pool, so it does not see what an open transaction has added.
func (s *PGStore) Get(ctx context.Context, key Key) (Notification, error) {
	if _, bad := s.check(NewNotification{Type: key.Type}); bad != nil {
		return Notification{}, bad
	}
	var n Notification
	err := scanRow(s.pool.QueryRow(ctx, s.sql.get[key.shape()],
		key.Type, int8OrNull(key.BookingID), int8OrNull(key.CandidateTgID)), &n)
	if errors.Is(err, pgx.ErrNoRows) {
		return Notification{}, ErrNotFound
	}
	if err != nil {
		return Notification{}, s.explain("get "+key.String(), err)
	}
	return n, nil
}
