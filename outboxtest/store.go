package outboxtest

import (
	"log/slog"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
)

// NewStore returns a store on the pool, in the schema public, whose log goes to the test's.
func NewStore(t testing.TB, pool *pgxpool.Pool) *outbox.PGStore {
	needT(t)
	t.Helper()
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: logger(t)})
	if err != nil {
		t.Fatalf("outboxtest: %v", err)
	}
	return store
}

// logger returns one that writes to the test's log, until the test ends.
func logger(t testing.TB) *slog.Logger {
	w := &testLog{t: t}
	t.Cleanup(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.t = nil
	})
	return slog.New(slog.NewTextHandler(w, nil))
}

type testLog struct {
	mu sync.Mutex
	t  testing.TB
}

func (w *testLog) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t == nil {
		return len(p), nil // a goroutine that outlives its test: its log would be a panic
	}
	return w.t.Output().Write(p)
}
