// Package pgtest gives each test a PostgreSQL database of its own, on a server
// that the tests of a package share:
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
// Environment, beside that of package pgserver:
//
//	OUTBOX_TEST_POSTGRES=VERSION     the server to start
//	OUTBOX_TEST_DATABASE_URL=URL     a superuser's; nothing is started
package pgtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
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

const (
	urlVariable     = "OUTBOX_TEST_DATABASE_URL"
	versionVariable = "OUTBOX_TEST_POSTGRES"
)

// patience bounds the wait for what should happen at once.
const patience = 30 * time.Second

// The server that all tests of this process share.
var (
	serverURL string
	server    *pgserver.Server // nil with OUTBOX_TEST_DATABASE_URL
)

// Main starts the shared server, runs the tests, looks for goroutines that they
// left, stops the server and exits.
func Main(m *testing.M) {
	flag.Parse() // a wrong flag is told before anything is started
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	serverURL = os.Getenv(urlVariable)
	if serverURL == "" {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		opts := options(logToStderr)
		opts.Direct = true
		server, err = pgserver.Start(ctx, opts)
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
		// Fuzzing workers are processes of their own, and get the server this way.
		if err := os.Setenv(urlVariable, serverURL); err != nil {
			return 1, err
		}
	}
	before := goleak.IgnoreCurrent()
	code = m.Run()
	err = errors.Join(dropEmptied(), OnServer("DROP DATABASE IF EXISTS "+templateName))
	if pool, _ := admin(); pool != nil {
		pool.Close()
	}
	if code == 0 {
		err = errors.Join(goleak.Find(before), err)
	}
	return code, err
}

func options(logf func(string, ...any)) pgserver.Options {
	return pgserver.Options{
		Version:  os.Getenv(versionVariable),
		Settings: map[string]string{"max_connections": "500", "jit": "off"}, // its compiler costs more than the statements of tests
		Logf:     logf,
	}
}

func logToStderr(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Server returns the shared server, for what can be put beside it. It is nil with
// OUTBOX_TEST_DATABASE_URL. A test that breaks a server starts its own: [StartServer].
func Server() *pgserver.Server { return server }

// DatabaseURL returns the superuser's URL of a database of the shared server.
func DatabaseURL(name string) string {
	u, err := url.Parse(serverURL)
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	return u.String()
}

// admin is connected to no test's database.
var admin = sync.OnceValues(func() (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(serverURL)
	if err != nil {
		return nil, err
	}
	cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol // each statement runs once
	return pgxpool.NewWithConfig(context.Background(), cfg)
})

// OnServer runs a statement on the shared server outside any test's database.
func OnServer(sql string) error {
	pool, err := admin()
	if err != nil {
		return err
	}
	return pgserver.Exec(context.Background(), pool, sql)
}

var names atomic.Int64

// Name returns a name that nobody else uses on the shared server, for what lives
// outside of databases, such as a role.
func Name(prefix string) string {
	return fmt.Sprintf("%s_%d_%d", prefix, os.Getpid(), names.Add(1))
}

// DB is a database of one test.
type DB struct {
	*pgxpool.Pool
	Store *outbox.PGStore // on Pool; its log is discarded
	URL   string
}

var (
	templateName = fmt.Sprintf("outbox_template_%d", os.Getpid())
	template     = sync.OnceValue(func() error {
		if err := OnServer("CREATE DATABASE " + templateName); err != nil {
			return err
		}
		pool, err := pgxpool.New(context.Background(), DatabaseURL(templateName))
		if err != nil {
			return err
		}
		defer pool.Close()
		store, err := newStore(pool)
		if err != nil {
			return err
		}
		return store.Migrate(context.Background())
	})
)

func newStore(pool *pgxpool.Pool) (*outbox.PGStore, error) {
	return outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
}

// NewDB returns a migrated database of the shared server that goes when the test ends.
func NewDB(t testing.TB) *DB {
	t.Helper()
	require.NoError(t, template())
	return newDBFrom(t, templateName)
}

// emptied are databases that nobody uses, without rows.
var emptied struct {
	sync.Mutex
	dbs []*DB
}

// EmptiedDB is NewDB for tests of many cases, which it spares the making of a database and
// of its connections for each: a test has it to itself, another has had it before, and it
// was emptied. So it is for tests that change nothing but rows, and set nothing in a
// session. After a test that failed it is not used again.
func EmptiedDB(t testing.TB) *DB {
	t.Helper()
	require.NoError(t, template())
	emptied.Lock()
	var db *DB
	if n := len(emptied.dbs); n > 0 {
		db, emptied.dbs = emptied.dbs[n-1], emptied.dbs[:n-1]
	}
	emptied.Unlock()
	if db == nil {
		url := DatabaseURL(create(t, templateName))
		cfg := poolConfig(t, url)
		pool, err := pgxpool.NewWithConfig(context.Background(), cfg) // which outlives the test
		require.NoError(t, err)
		db = &DB{Pool: pool, URL: url}
	}
	t.Cleanup(func() {
		if t.Failed() {
			require.NoError(t, db.drop())
			return
		}
		require.Eventually(t, func() bool { return db.Stat().AcquiredConns() == 0 }, patience, time.Millisecond, "connections that the test has not released")
		_, err := db.Exec(context.Background(), "TRUNCATE outbox_notifications RESTART IDENTITY")
		require.NoError(t, err)
		emptied.Lock()
		defer emptied.Unlock()
		emptied.dbs = append(emptied.dbs, db)
	})
	store, err := newStore(db.Pool)
	require.NoError(t, err)
	return &DB{Pool: db.Pool, Store: store, URL: db.URL}
}

// drop drops the database, and ends its sessions first, which a pool waits for.
func (db *DB) drop() error {
	err := OnServer("DROP DATABASE IF EXISTS " + pgx.Identifier{db.Config().ConnConfig.Database}.Sanitize() + " WITH (FORCE)")
	db.Close()
	return err
}

func dropEmptied() (err error) {
	emptied.Lock()
	defer emptied.Unlock()
	for _, db := range emptied.dbs {
		err = errors.Join(err, db.drop())
	}
	emptied.dbs = nil
	return err
}

// NewEmptyDB returns a database without the table.
func NewEmptyDB(t testing.TB) *DB {
	t.Helper()
	return newDBFrom(t, "template0")
}

func newDBFrom(t testing.TB, template string) *DB {
	t.Helper()
	name := create(t, template)
	t.Cleanup(func() {
		require.NoError(t, OnServer("DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"))
	})
	return open(t, DatabaseURL(name))
}

func create(t testing.TB, template string) (name string) {
	t.Helper()
	name = Name("outbox")
	// Twice as fast as through the WAL, with fsync off.
	require.NoError(t, OnServer("CREATE DATABASE "+name+" TEMPLATE "+template+" STRATEGY file_copy"))
	return name
}

func open(t testing.TB, url string) *DB {
	t.Helper()
	db := &DB{Pool: NewPool(t, url, nil), URL: url}
	var err error
	db.Store, err = newStore(db.Pool)
	require.NoError(t, err)
	return db
}

// StartServer starts a server for this test alone, to be broken by it, and returns
// it with a migrated database. What was committed survives [pgserver.Server.Crash].
func StartServer(t testing.TB) (*pgserver.Server, *DB) {
	t.Helper()
	return StartServerWith(t, func(*pgserver.Options) {})
}

// StartServerWith is StartServer with other options.
func StartServerWith(t testing.TB, change func(*pgserver.Options)) (*pgserver.Server, *DB) {
	t.Helper()
	opts := options(t.Logf)
	opts.Settings["synchronous_commit"] = "on"
	change(&opts)
	s, err := pgserver.Start(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Stop()) })
	db := open(t, s.URL)
	require.NoError(t, db.Store.Migrate(t.Context()))
	return s, db
}

// Pause pauses a server until resume is called, or until the test ends: pools and
// transactions that were opened before would wait for it when they are closed.
func Pause(t testing.TB, s *pgserver.Server) (resume func()) {
	t.Helper()
	require.NoError(t, s.Pause(t.Context()))
	resume = func() {
		t.Helper()
		require.NoError(t, s.Resume(context.WithoutCancel(t.Context())))
	}
	t.Cleanup(resume)
	return resume
}

// ExamplePool stands for the pool that a service has, in examples. Its database is
// new and empty, and goes with drop.
func ExamplePool(ctx context.Context) (pool *pgxpool.Pool, drop func()) {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	name := Name("outbox_example")
	must(OnServer("CREATE DATABASE " + name))
	pool, err := pgxpool.New(ctx, DatabaseURL(name))
	must(err)
	return pool, func() {
		pool.Close()
		must(OnServer("DROP DATABASE " + name + " WITH (FORCE)"))
	}
}

// NewPool returns a pool that closes when the test ends. Configure may be nil.
func NewPool(t testing.TB, url string, configure func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	cfg := poolConfig(t, url)
	if configure != nil {
		configure(cfg)
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return pool
}

func poolConfig(t testing.TB, url string) *pgxpool.Config {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	cfg.MaxConns = 50
	return cfg
}

// MustExec runs a statement that has to succeed.
func (db *DB) MustExec(t testing.TB, sql string, args ...any) {
	t.Helper()
	_, err := db.Exec(t.Context(), sql, args...)
	require.NoError(t, err)
}

// Fill runs a statement that fills the outbox, without its indexes but that of the id, which
// are made again afterwards: it takes a fraction of the time. Then it has the table
// vacuumed and analyzed.
func (db *DB) Fill(t testing.TB, sql string, args ...any) {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT
			CASE WHEN conname IS NULL THEN format('DROP INDEX %s', indexrelid::regclass)
				ELSE format('ALTER TABLE outbox_notifications DROP CONSTRAINT %I', conname) END,
			CASE WHEN conname IS NULL THEN pg_get_indexdef(indexrelid)
				ELSE format('ALTER TABLE outbox_notifications ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(c.oid)) END
		FROM pg_index LEFT JOIN pg_constraint c ON conindid = indexrelid AND conrelid = indrelid
		WHERE indrelid = 'outbox_notifications'::regclass AND NOT indisprimary`)
	require.NoError(t, err)
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct{ Drop, Make string }])
	require.NoError(t, err)
	require.NotEmpty(t, indexes)
	for _, index := range indexes {
		db.MustExec(t, index.Drop)
	}
	db.MustExec(t, sql, args...)
	for _, index := range indexes {
		db.MustExec(t, index.Make)
	}
	db.MustExec(t, "VACUUM ANALYZE outbox_notifications")
}

// One returns the single value that a query gives.
func One[T any](t testing.TB, q interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}, sql string, args ...any) T {
	t.Helper()
	var v T
	require.NoError(t, q.QueryRow(t.Context(), sql, args...).Scan(&v))
	return v
}

// MustBegin is [Begin] with the database's pool and default options.
func (db *DB) MustBegin(t testing.TB) pgx.Tx {
	t.Helper()
	return Begin(t, db.Pool, pgx.TxOptions{})
}

// Begin begins a transaction that does not outlive the test: pools wait for their
// connections when they close.
func Begin(t testing.TB, pool *pgxpool.Pool, opts pgx.TxOptions) pgx.Tx {
	t.Helper()
	tx, err := pool.BeginTx(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

// Add adds n in a transaction of its own.
func (db *DB) Add(t testing.TB, n outbox.NewNotification) outbox.AddResult {
	t.Helper()
	res, err := db.TryAdd(t.Context(), n)
	require.NoError(t, err)
	return res
}

// TryAdd is Add for where it may fail, or another goroutine than the test's.
func (db *DB) TryAdd(ctx context.Context, n outbox.NewNotification) (res outbox.AddResult, err error) {
	err = pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
		res, err = db.Store.AddNotification(ctx, tx, n)
		return err
	})
	return res, err
}

// AddMany adds ns in one batch, in a transaction of its own.
func (db *DB) AddMany(t testing.TB, ns ...outbox.NewNotification) []outbox.AddResult {
	t.Helper()
	var res []outbox.AddResult
	require.NoError(t, pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) (err error) {
		res, err = db.Store.AddNotifications(t.Context(), tx, ns)
		return err
	}))
	return res
}

// Get returns the row of that key, which has to exist.
func (db *DB) Get(t testing.TB, key outbox.Key) outbox.Notification {
	t.Helper()
	n, err := db.Store.Get(t.Context(), key)
	require.NoError(t, err)
	return n
}

// Count returns how many rows the table has.
func (db *DB) Count(t testing.TB) int {
	t.Helper()
	return One[int](t, db, "SELECT count(*) FROM outbox_notifications")
}

// WaitBlocked waits until at least n sessions of the database wait for a lock.
func (db *DB) WaitBlocked(t testing.TB, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		return One[int](t, db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) >= n
	}, 4*patience, time.Millisecond, "no session came to wait for a lock") // Migrate gives up its wait by lock_timeout, and pauses
}

// Result is what a call gave.
type Result[T any] struct {
	Value T
	Err   error
}

// Later calls fn in a goroutine and returns what it gave on a channel.
func Later[T any](fn func() (T, error)) <-chan Result[T] {
	c := make(chan Result[T], 1)
	go func() {
		v, err := fn()
		c <- Result[T]{v, err}
	}()
	return c
}

// Await receives what is to come, in good time.
func Await[T any](t testing.TB, c <-chan Result[T]) (T, error) {
	t.Helper()
	select {
	case r := <-c:
		return r.Value, r.Err
	case <-time.After(patience):
		require.FailNow(t, "nothing came in time", "%v", patience)
		panic("unreachable")
	}
}
