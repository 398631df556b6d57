package outboxtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/migrations"
)

const urlVariable = "DATABASE_URL"

// patience bounds the wait for what should happen at once.
const patience = 30 * time.Second

// server is where the databases of this process are.
type server struct {
	url      string
	template string // the migrated database that others are copies of
	prefix   string // of the names of this process's databases
	made     atomic.Int64

	// What ends with the process: the connection whose lock says that the databases with
	// the prefix are in use, and a server of our own.
	claim *pgx.Conn
	own   *pgserver.Server // nil with DATABASE_URL
}

// shared starts the server, or connects to it, once. A failure is every test's.
var shared = sync.OnceValues(func() (*server, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	s, err := start(ctx, os.Getenv(urlVariable), options)
	running.Store(s)
	return s, err
})

// options are of the server to start. The tests of this package ask for a version.
var options pgserver.Options

// running is what shared returned; nil if it was not asked.
var running atomic.Pointer[server]

func start(ctx context.Context, dsn string, opts pgserver.Options) (_ *server, err error) {
	s := &server{url: dsn}
	if scheme, _, ok := strings.Cut(dsn, "://"); ok && !strings.ContainsAny(scheme, "= ") && scheme != "postgres" && scheme != "postgresql" {
		return nil, fmt.Errorf("%s is a URL of %q and not of PostgreSQL: unset it to have a server started, or have it begin with postgres://", urlVariable, scheme)
	}
	if dsn == "" {
		opts.Lifeline, opts.Direct, opts.Settings = true, true, map[string]string{"max_connections": "500"}
		opts.Logf = func(format string, args ...any) { fmt.Fprintf(os.Stderr, "outboxtest: "+format+"\n", args...) }
		s.own, err = pgserver.Start(ctx, opts)
		if err != nil {
			return nil, err
		}
		s.url = s.own.URL
	}
	if err = s.setUp(ctx); err == nil {
		return s, nil
	}
	if s.own != nil {
		_ = s.own.Stop() // the first error says more
	}
	if dsn != "" {
		err = fmt.Errorf("the server of %s: %w", urlVariable, err)
	}
	return nil, err
}

// M runs the tests of a package and then ends the server at once, rather than with the
// process. It is for those who look for leaked goroutines, as a server without Docker
// has some, and the client of Docker may:
//
//	func TestMain(m *testing.M) { goleak.VerifyTestMain(outboxtest.M{M: m}) }
//
// Nobody else needs a TestMain.
type M struct{ *testing.M }

// Run runs the tests and returns their exit code, or 1 if the server could not be ended.
func (m M) Run() int {
	code := m.M.Run()
	if err := running.Load().stop(); err != nil {
		fmt.Fprintln(os.Stderr, "outboxtest:", err)
		code = max(code, 1)
	}
	return code
}

func (s *server) stop() error {
	if s == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.claim.Close(ctx)
	if s.own == nil {
		return nil
	}
	return s.own.Stop()
}

// Databases are named by the process that makes them, whose session holds an advisory
// lock while it lives. Who gets the lock of another may drop what that has left behind.
const (
	namePrefix  = "outboxtest_"
	lockClass   = 0x0b07e57
	lockMineSQL = `SELECT pid, pg_advisory_lock($1, pid) FROM pg_backend_pid() AS pid`

	// abandonedSQL: the database that takes the place of a process's number in the name is of
	// one that holds no such lock. $1 the class of the locks.
	abandonedSQL = `SELECT datname FROM pg_database
		WHERE datname ~ '^outboxtest_[0-9]+_[0-9a-f]+_[0-9a-z]+$' AND NOT EXISTS (
			SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid::text = split_part(datname, '_', 2) AND granted)`
)

// setUp claims names for this process, drops what killed ones have left, and makes the
// template.
func (s *server) setUp(ctx context.Context) (err error) {
	s.claim, err = pgx.Connect(ctx, s.url)
	if err != nil {
		return err
	}
	var pid int64
	if err = s.claim.QueryRow(ctx, lockMineSQL, lockClass).Scan(&pid, nil); err == nil {
		s.prefix = fmt.Sprintf("%s%d_%x_", namePrefix, pid, time.Now().UnixNano())
		err = s.reap(ctx)
	}
	if err == nil {
		err = s.makeTemplate(ctx)
	}
	if err != nil {
		s.claim.Close(ctx)
	}
	return err
}

// reap drops databases whose process is gone. Somebody may look at one with psql: it
// stays until the next time.
func (s *server) reap(ctx context.Context) error {
	rows, err := s.claim.Query(ctx, abandonedSQL, lockClass)
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, name := range names {
		_, _ = s.claim.Exec(ctx, "DROP DATABASE IF EXISTS "+name) // another process may be doing the same
	}
	return err
}

// makeTemplate makes the migrated database, unless there is one of the same migrations and
// the same owner: it stays on the server, for all processes to come.
func (s *server) makeTemplate(ctx context.Context) error {
	h := sha256.New()
	fmt.Fprintln(h, s.claim.Config().User)
	files, err := fs.Glob(migrations.FS, "*.sql")
	if err != nil {
		return err
	}
	for _, f := range files {
		text, err := fs.ReadFile(migrations.FS, f)
		if err != nil {
			return err
		}
		h.Write(text)
	}
	s.template = namePrefix + "template_" + hex.EncodeToString(h.Sum(nil))[:16]

	if _, err := s.claim.Exec(ctx, "SELECT pg_advisory_lock($1, 0)", lockClass); err != nil {
		return err
	}
	defer s.claim.Exec(ctx, "SELECT pg_advisory_unlock($1, 0)", lockClass) //nolint:errcheck // it ends with the connection, too
	var there bool
	if err := s.claim.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", s.template).Scan(&there); err != nil || there {
		return err
	}
	name := s.prefix + "template"
	if _, err := s.claim.Exec(ctx, "CREATE DATABASE "+name); err != nil {
		return s.refused(err)
	}
	if err := migrate(ctx, s.urlOf(name)); err != nil {
		return err
	}
	err = pgserver.Exec(ctx, s.claim, "ALTER DATABASE "+name+" RENAME TO "+s.template)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42P04" { // by a process whose URL names another database, where locks are others
		err = pgserver.Exec(ctx, s.claim, "DROP DATABASE "+name)
	}
	return err
}

func migrate(ctx context.Context, dsn string) error {
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return err
	}
	defer pool.Close()
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return store.Migrate(ctx)
}

// create makes a database, and drop drops it, whoever is connected to it.
func (s *server) create(ctx context.Context) (name string, err error) {
	name = fmt.Sprintf("%s%d", s.prefix, s.made.Add(1))
	return name, s.refused(s.exec(ctx, "CREATE DATABASE "+name+" TEMPLATE "+s.template))
}

// refused says what helps where a database may not be created.
func (s *server) refused(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42501" {
		role := s.claim.Config().User
		return fmt.Errorf("the role %q may not create databases: run ALTER ROLE %s CREATEDB, or unset %s to have a server started: %w",
			role, pgx.Identifier{role}.Sanitize(), urlVariable, err)
	}
	return err
}

func (s *server) drop(ctx context.Context, name string) error {
	return s.exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

func (s *server) exec(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return pgserver.Exec(ctx, conn, sql)
}

// urlOf returns the URL of another database, or the same in the keyword=value form.
func (s *server) urlOf(name string) string {
	u, err := url.Parse(s.url)
	if err != nil || !strings.HasPrefix(u.Scheme, "postgres") {
		return s.url + " dbname=" + name // the last one counts
	}
	u.Path = "/" + name
	q := u.Query()
	q.Del("dbname")
	u.RawQuery = q.Encode()
	return u.String()
}

// NewPool returns a pool on a migrated database of the test's own, which is dropped when
// the test ends. It takes some tens of milliseconds; the first call of a process also
// finds the server that all its tests share:
//
//   - that of the environment variable DATABASE_URL, if it is set: the URL of any of its
//     databases, directly and not through a pooler, with a role that may create databases.
//     The database of the URL itself is not written to. One small database,
//     outboxtest_template_..., stays there, and saves later runs the migration;
//   - else one that it starts in a container, where Docker answers,
//   - else one of the PostgreSQL that is installed here.
//
// A server that was started ends by itself with the process, however that ends, and its
// data with it; there is nothing to call in TestMain. (Of an installed one a /bin/sh sees to
// it, without which none is started. Where that is killed too, as by a kill -9 of the
// whole process group elsewhere than on Linux, its data stays.) Databases that a killed
// process has left on the server of DATABASE_URL are dropped by the next one.
//
// The outbox is in the schema public. A service that is configured with an
// [outbox.Config].Schema has a store of its own migrate that one in the test:
//
//	pool := outboxtest.NewPool(t)
//	store, err := outbox.NewPGStore(pool, outbox.Config{Schema: "booking"})
//	...
//	err = store.Migrate(t.Context())
//
// and gives that store to [Deliver], in place of one of [NewStore]. The assertions look into both.
//
// Migrations of your own run on the pool like on any other. The test fails, it is not
// skipped, if there is no server. Connections that are still in use at the test's end,
// of a transaction that was not ended or rows that were not closed, fail it too, with the
// place where they were acquired.
func NewPool(t testing.TB) *pgxpool.Pool {
	needT(t)
	t.Helper()
	s, err := shared()
	if err != nil {
		t.Fatalf("outboxtest: no database: %v", err)
	}
	return s.newPool(t)
}

func (s *server) newPool(t testing.TB) *pgxpool.Pool {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	name, err := s.create(ctx)
	if err != nil {
		t.Fatalf("outboxtest: create a database: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := within(t)
		defer cancel()
		if err := s.drop(ctx, name); err != nil {
			t.Errorf("outboxtest: drop the database of the test: %v", err)
		}
	})
	cfg, err := pgxpool.ParseConfig(s.urlOf(name))
	if err != nil {
		t.Fatalf("outboxtest: %s: %v", urlVariable, err)
	}
	if !strings.Contains(s.url, "pool_max_conns") {
		cfg.MaxConns = 20
	}
	users := watchUsers(cfg)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		t.Fatalf("outboxtest: %v", err)
	}
	t.Cleanup(func() { users.close(t, pool) })
	return pool
}

// within bounds what is done for a test, also in its cleanup, when its own ctx has ended.
func within(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(t.Context()), patience)
}
