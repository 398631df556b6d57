package outbox_test

import (
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// TestScan: rows that are decoded here are read as pgx reads them, which it does where
// they come as text.
//
// Mutations: another epoch, another width of an integer, no infinity, a NULL that leaves
// what the row before had.
func TestScan(t *testing.T) {
	t.Parallel()
	for name, alter := range map[string]string{
		"our table": "SELECT",
		"integers":  "ALTER TABLE outbox_notifications ALTER id TYPE integer, ALTER booking_id TYPE integer",
		"text":      "ALTER TABLE outbox_notifications ALTER type TYPE text, ALTER status TYPE text, ALTER correlation_id TYPE text",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			db.MustExec(t, alter)
			db.MustExec(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, recruiter_tg_id, version, sent_version, created_at,
				next_retry_at, not_after, locked_at, sent_at, attempts, status, correlation_id, payload_json, last_error, receipt) VALUES
				('full', 2147483647, -9223372036854775808, 9223372036854775807, 7, 5, '2026-11-23 01:02:03.456789+05', '1969-12-31 23:59:59.999999Z',
					'1999-12-31 23:59:59.999999Z', '2000-01-01Z', '9999-12-31 23:59:59.999999Z', 2147483647, 'sent', 'c', '{"a": [1, "\u00e9"]}', 'e', 'r'),
				('bare', NULL, NULL, NULL, 1, 0, '2000-01-01 00:00:00.000001Z', NULL, NULL, NULL, NULL, 0, 'pending', NULL, NULL, NULL, NULL),
				('ends', -2147483648, 1, NULL, 1, 0, '-infinity', 'infinity', '0001-01-01Z', NULL, NULL, 0, 'pending', '', '""', '', ''),
				('full again', 1, 2, 3, 1, 0, now(), now(), now(), now(), now(), 3, 'failed', 'c', '1', 'e', 'r')`)
			read := func(mode pgx.QueryExecMode) []outbox.Notification {
				pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.DefaultQueryExecMode = mode })
				store, err := outbox.NewPGStore(pool, outbox.Config{})
				require.NoError(t, err)
				list, err := store.List(t.Context(), outbox.Filter{})
				require.NoError(t, err)
				return list
			}
			want := read(pgx.QueryExecModeSimpleProtocol)
			require.Len(t, want, 4)
			require.Equal(t, want, read(pgx.QueryExecModeCacheStatement))
		})
	}
}
