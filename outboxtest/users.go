package outboxtest

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// closePatience is how long connections may take to come back at the end of a test, as
// goroutines that heed its ctx let go of them.
const closePatience = 5 * time.Second

// users knows where each connection of a pool was last acquired.
type users struct {
	mu    sync.Mutex
	calls map[*pgx.Conn][]uintptr
}

func watchUsers(cfg *pgxpool.Config) *users {
	u := &users{calls: make(map[*pgx.Conn][]uintptr)}
	cfg.PrepareConn = func(_ context.Context, conn *pgx.Conn) (bool, error) {
		calls := make([]uintptr, 32)
		calls = calls[:runtime.Callers(2, calls)]
		u.mu.Lock()
		defer u.mu.Unlock()
		u.calls[conn] = calls
		return true, nil
	}
	cfg.BeforeClose = func(conn *pgx.Conn) {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.calls, conn)
	}
	return u
}

// close closes the pool. It reports connections that do not come back, and goes on
// without them: the drop of the database ends them.
func (u *users) close(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		pool.Close()
	}()
	timer := time.NewTimer(closePatience)
	defer timer.Stop()
	select {
	case <-closed:
	case <-timer.C:
		if left := u.report(); left != "" {
			t.Errorf("outboxtest: the test has ended and has not released all connections of its pool:\n%s", left)
			return
		}
		select { // nobody has one: it is still closing them
		case <-closed:
		case <-time.After(patience):
			t.Errorf("outboxtest: the pool has not closed its connections in %v", closePatience+patience)
		}
	}
}

// report says who has the connections that are left, "" if there are none.
func (u *users) report() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var all []string
	for conn, calls := range u.calls {
		state := map[byte]string{'I': "idle", 'T': "in a transaction", 'E': "in an aborted transaction"}[conn.PgConn().TxStatus()]
		if conn.PgConn().IsBusy() {
			state = "rows not read to their end or closed"
		}
		all = append(all, fmt.Sprintf("%s (%s)", callers(calls), cmp.Or(state, "in use")))
	}
	if len(all) == 0 {
		return ""
	}
	slices.Sort(all)
	return "  " + strings.Join(all, "\n  ")
}

// callers are the places outside of pgx, innermost first.
func callers(calls []uintptr) string {
	var places []string
	frames := runtime.CallersFrames(calls)
	for more := true; more && len(places) < 4; {
		var f runtime.Frame
		f, more = frames.Next()
		if f.File == "" || strings.HasPrefix(f.Function, "github.com/jackc/pgx/") ||
			strings.HasPrefix(f.Function, "testing.") || strings.HasPrefix(f.Function, "runtime.") {
			continue
		}
		places = append(places, fmt.Sprintf("%s:%d", f.File, f.Line))
	}
	return "acquired at " + strings.Join(places, ", called from ")
}
