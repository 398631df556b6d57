package outbox_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// How relays are woken is tested in package relay.
func TestListen(t *testing.T) {
	t.Parallel()
	t.Run("wakes_when_it_listens_and_for_each_add_and_ends_with_its_ctx", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			// A pool's handler takes notifications from those who wait for them.
			cfg.ConnConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) {}
		})
		store, err := outbox.NewPGStore(pool, outbox.Config{Notify: true, Logger: discard})
		require.NoError(t, err)
		woken := make(chan struct{}, 10)
		ctx, cancel := context.WithCancel(t.Context())
		ended := pgtest.Later(func() (struct{}, error) {
			return struct{}{}, store.Listen(ctx, func() { woken <- struct{}{} })
		})
		awake := func() {
			t.Helper()
			select {
			case <-woken:
			case r := <-ended:
				require.FailNow(t, "Listen has ended", "%v", r.Err)
			}
		}
		awake()
		tx := pgtest.Begin(t, pool, pgx.TxOptions{})
		_, err = store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "reject"})
		require.NoError(t, err)
		require.Empty(t, woken, "not yet committed")
		require.NoError(t, tx.Commit(t.Context()))
		awake()
		cancel()
		_, err = pgtest.Await(t, ended)
		require.Equal(t, context.Canceled, err)
	})
	t.Run("refuses_a_nil_wake", func(t *testing.T) {
		t.Parallel()
		requireInvalid(t, neverUsed(t).Listen(t.Context(), nil), "wake", -1, "")
	})
}
