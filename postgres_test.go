package outbox_test

import (
	"context"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
)

// The server that all tests share, each in a database of its own.
//
// OUTBOX_TEST_POSTGRES is the version to start. With OUTBOX_TEST_DATABASE_URL,
// a superuser's, nothing is started; fuzzing workers get the server that way.
var (
	serverURL string
	server    *pgserver.Server // nil with OUTBOX_TEST_DATABASE_URL
)

const urlVariable = "OUTBOX_TEST_DATABASE_URL"

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	serverURL = os.Getenv(urlVariable)
	if serverURL == "" {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		server, err = pgserver.Start(ctx, pgserver.Options{
			Version:  os.Getenv("OUTBOX_TEST_POSTGRES"),
			Settings: map[string]string{"max_connections": "500"},
			Logf:     func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
		})
		if err != nil {
			return 1, err
		}
		defer func() {
			if stopErr := server.Stop(); err == nil {
				err = stopErr
			}
		}()
		interrupted := make(chan os.Signal, 1)
		signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
		go func() {
			<-interrupted
			_ = server.Stop() // nobody is left to tell
			os.Exit(1)
		}()
		fmt.Println("testing on", server.Kind)
		serverURL = server.URL
		if err := os.Setenv(urlVariable, serverURL); err != nil {
			return 1, err
		}
	}
	before := goleak.IgnoreCurrent()
	code = m.Run()
	if code == 0 {
		err = goleak.Find(before)
	}
	if dropErr := onServer("DROP DATABASE IF EXISTS " + templateName); err == nil {
		err = dropErr
	}
	return code, err
}

// testDB is a migrated database of one test.
type testDB struct {
	*pgxpool.Pool
	store *outbox.PGStore
	url   string
}

var (
	databases    atomic.Int64
	templateName = fmt.Sprintf("outbox_template_%d", os.Getpid())
	template     = sync.OnceValue(func() error {
		if err := onServer("CREATE DATABASE " + templateName); err != nil {
			return err
		}
		pool, err := pgxpool.New(context.Background(), databaseURL(templateName))
		if err != nil {
			return err
		}
		defer pool.Close()
		store, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		if err != nil {
			return err
		}
		return store.Migrate(context.Background())
	})
)

func databaseURL(name string) string {
	u, err := url.Parse(serverURL)
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	return u.String()
}

// onServer runs a statement outside any test's database.
func onServer(sql string) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, serverURL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

// newDB returns a migrated database that goes when the test ends.
func newDB(t testing.TB) *testDB {
	t.Helper()
	require.NoError(t, template())
	return newDBFrom(t, templateName)
}

// newEmptyDB returns a database without the table.
func newEmptyDB(t testing.TB) *testDB {
	t.Helper()
	return newDBFrom(t, "template0")
}

func newDBFrom(t testing.TB, template string) *testDB {
	t.Helper()
	name := fmt.Sprintf("outbox_%d_%d", os.Getpid(), databases.Add(1))
	require.NoError(t, onServer("CREATE DATABASE "+name+" TEMPLATE "+template))
	t.Cleanup(func() {
		require.NoError(t, onServer("DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"))
	})
	db := &testDB{url: databaseURL(name)}
	db.Pool = newPool(t, db.url, nil)
	var err error
	db.store, err = outbox.NewPGStore(db.Pool, outbox.Config{Logger: discard})
	require.NoError(t, err)
	return db
}

// newPool returns a pool that closes when the test ends.
func newPool(t testing.TB, url string, configure func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	cfg.MaxConns = 50
	if configure != nil {
		configure(cfg)
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return pool
}

func (db *testDB) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	_, err := db.Exec(t.Context(), sql, args...)
	require.NoError(t, err)
}

// one returns the single value that a query gives.
func one[T any](t testing.TB, q interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}, sql string, args ...any) T {
	t.Helper()
	var v T
	require.NoError(t, q.QueryRow(t.Context(), sql, args...).Scan(&v))
	return v
}

func (db *testDB) begin(t testing.TB) pgx.Tx { return begin(t, db.Pool, pgx.TxOptions{}) }

// begin begins a transaction that does not outlive the test: pools wait for their
// connections when they close.
func begin(t testing.TB, pool *pgxpool.Pool, opts pgx.TxOptions) pgx.Tx {
	t.Helper()
	tx, err := pool.BeginTx(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

// add adds n in a transaction of its own.
func (db *testDB) add(t testing.TB, n outbox.NewNotification) outbox.AddResult {
	t.Helper()
	res, err := db.tryAdd(t.Context(), n)
	require.NoError(t, err)
	return res
}

func (db *testDB) tryAdd(ctx context.Context, n outbox.NewNotification) (res outbox.AddResult, err error) {
	err = pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
		res, err = db.store.AddNotification(ctx, tx, n)
		return err
	})
	return res, err
}

func (db *testDB) addMany(t testing.TB, ns ...outbox.NewNotification) []outbox.AddResult {
	t.Helper()
	var res []outbox.AddResult
	require.NoError(t, pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) (err error) {
		res, err = db.store.AddNotifications(t.Context(), tx, ns)
		return err
	}))
	return res
}

func (db *testDB) get(t testing.TB, key outbox.Key) outbox.Notification {
	t.Helper()
	n, err := db.store.Get(t.Context(), key)
	require.NoError(t, err)
	return n
}

func (db *testDB) count(t testing.TB) int {
	t.Helper()
	return one[int](t, db, "SELECT count(*) FROM outbox_notifications")
}

// lease does by hand what a claim does to the row: a token, an end, an attempt.
func (db *testDB) lease(t testing.TB, id int64, until string) {
	t.Helper()
	db.exec(t, `UPDATE outbox_notifications SET attempts = attempts + 1, locked_at = now(),
		lease_token = gen_random_uuid(), lease_until = now() + $2::text::interval WHERE id = $1`, id, until)
}

// leaseOf returns the row's token, "" for none, and whether it has an end.
func (db *testDB) leaseOf(t testing.TB, id int64) string {
	t.Helper()
	return one[string](t, db, `SELECT coalesce(lease_token::text || ' until ' || lease_until, '')
		FROM outbox_notifications WHERE id = $1`, id)
}

// waitBlocked waits until n sessions of the database wait for a lock.
func (db *testDB) waitBlocked(t testing.TB, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		return one[int](t, db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) >= n
	}, 30*time.Second, time.Millisecond, "no session came to wait for a lock")
}

// later returns what fn gave, on a channel.
func later[T any](fn func() (T, error)) <-chan result[T] {
	c := make(chan result[T], 1)
	go func() {
		v, err := fn()
		c <- result[T]{v, err}
	}()
	return c
}

type result[T any] struct {
	v   T
	err error
}

// await receives what is to come, in good time.
func await[T any](t testing.TB, c <-chan result[T]) (T, error) {
	t.Helper()
	select {
	case r := <-c:
		return r.v, r.err
	case <-time.After(30 * time.Second):
		require.FailNow(t, "nothing came in 30 seconds")
		panic("unreachable")
	}
}

func itoa(n int) string { return strconv.Itoa(n) }
