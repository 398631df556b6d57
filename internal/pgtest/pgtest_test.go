package pgtest_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func TestNewDB_returns_a_database_of_its_own(t *testing.T) {
	t.Parallel()
	a, b := pgtest.NewDB(t), pgtest.NewDB(t)
	a.Add(t, outbox.NewNotification{Type: "a"})
	require.Equal(t, 1, a.Count(t))
	require.Zero(t, b.Count(t))
	require.False(t, pgtest.One[bool](t, pgtest.NewEmptyDB(t), "SELECT to_regclass('outbox_notifications') IS NOT NULL"))
}

func TestEmptiedDB_has_no_rows_of_the_test_before(t *testing.T) {
	var urls []string
	for range 2 {
		t.Run("", func(t *testing.T) {
			a, b := pgtest.EmptiedDB(t), pgtest.EmptiedDB(t)
			require.NotEqual(t, a.URL, b.URL)
			for _, db := range []*pgtest.DB{a, b} {
				require.Zero(t, db.Count(t))
				require.EqualValues(t, 1, db.Add(t, outbox.NewNotification{Type: "a"}).Notification.ID)
				urls = append(urls, db.URL)
			}
		})
	}
	require.ElementsMatch(t, urls[:2], urls[2:], "the second test has those of the first")
}

func TestStartServer_keeps_what_was_committed_when_it_crashes(t *testing.T) {
	t.Parallel()
	server, db := pgtest.StartServer(t)
	key := db.Add(t, outbox.NewNotification{Type: "a"}).Notification.Key()
	require.NoError(t, server.Crash(t.Context()))
	db.Reset() // its connections are lost
	require.Equal(t, outbox.StatusPending, db.Get(t, key).Status)
}

func TestPause_ends_with_the_test(t *testing.T) {
	t.Parallel()
	server, db := pgtest.StartServer(t)
	t.Run("paused", func(t *testing.T) {
		db.MustBegin(t) // rolled back when the server goes on
		pgtest.Pause(t, server)
	})
	require.Zero(t, db.Count(t))
	resume := pgtest.Pause(t, server)
	resume()
	require.Zero(t, db.Count(t))
}
