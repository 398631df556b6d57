package outboxtest

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
)

// Mutations tried, and what each turns red:
//
//	no lifeline                               TestServer_ends_with_its_process
//	databases of killed processes stay        TestDatabaseURL
//	databases of all processes dropped        TestDatabaseURL
//	a pool is closed without a time limit     TestNewPool/a_connection_..., hangs
//	a slow close counts as a leak             TestNewPool/does_not_blame_...
//	every row counts as written               TestRequireAdded_is_about_this_transaction
//	one outbox of several is looked into      TestRequireAdded_looks_into_every_schema
//	what the role may not read is looked into TestRequireAdded_looks_into_every_schema
//	a wrapped transaction counts as none      TestRequireAdded_is_about_this_transaction
//	savepoints are not looked through         TestRequireAdded_is_about_this_transaction/created_in_a_savepoint
//	numbers compared by their spelling        TestRequireAdded_compares
//	retries settled at once                   TestDeliver
//	the first of several matches counts       TestSender/answers_...
//	Torture does not record its faults        TestTorture_passes_a_good_sender/AtLeastOnce
//	Torture does not ask Accepted             TestTorture_finds/messages_swallowed, and others
//	counts below 0 are taken                  TestTorture_refuses_counts_that_are_none
//	Torture injects no deaths                 TestTorture_passes_a_good_sender
//	the store settles without the token       TestTorture_passes_a_good_sender

// childVariable has the test binary be a user's: it takes a pool, says on which server it
// is, and ends as the value says.
const childVariable = "OUTBOXTEST_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv("OUTBOX_PG_BINARIES") == "" { // of what is installed there is no choice
		options.Version = os.Getenv("OUTBOX_TEST_POSTGRES")
	}
	if end := os.Getenv(childVariable); end != "" {
		beUser(end)
	}
	// The tests of this package share a server with those of the others where there is one.
	if dsn := os.Getenv("OUTBOX_TEST_DATABASE_URL"); dsn != "" && os.Getenv(urlVariable) == "" {
		os.Setenv(urlVariable, dsn)
	}
	goleak.VerifyTestMain(M{m})
}

// fakeTB records what a test is told. Fatalf ends its goroutine, as the real one does.
type fakeTB struct {
	testing.TB
	ctx      context.Context
	log      strings.Builder
	failed   bool
	cleanups []func()
}

func (f *fakeTB) Helper()                  {}
func (f *fakeTB) Context() context.Context { return f.ctx }
func (f *fakeTB) Cleanup(fn func())        { f.cleanups = append(f.cleanups, fn) }
func (f *fakeTB) Failed() bool             { return f.failed }

func (f *fakeTB) Logf(format string, args ...any) { fmt.Fprintf(&f.log, format+"\n", args...) }
func (f *fakeTB) Errorf(format string, args ...any) {
	f.failed = true
	f.Logf(format, args...)
}

func (f *fakeTB) Fatalf(format string, args ...any) {
	f.Errorf(format, args...)
	panic(errFatal)
}

// errFatal is what Fatalf panics with.
var errFatal = any("Fatalf was called")

// told runs fn with a fake TB, and its cleanups, and returns what the test was told; ""
// if it did not fail.
func told(t testing.TB, fn func(t testing.TB)) string {
	t.Helper()
	f := &fakeTB{TB: t, ctx: context.WithoutCancel(t.Context())}
	guarded := func(fn func()) {
		defer func() {
			if p := recover(); p != nil && p != errFatal {
				panic(p)
			}
		}()
		fn()
	}
	guarded(func() { fn(f) })
	for i := range f.cleanups {
		guarded(f.cleanups[len(f.cleanups)-1-i])
	}
	if !f.failed {
		return ""
	}
	return f.log.String()
}

// until waits for what should happen at once.
func until(t testing.TB, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); {
		require.True(t, time.Now().Before(deadline), "it did not happen")
		<-time.After(20 * time.Millisecond)
	}
}

func TestNewPool(t *testing.T) {
	t.Parallel()
	exists := func(name string) (found bool) {
		s, err := shared()
		require.NoError(t, err)
		conn, err := pgx.Connect(t.Context(), s.url)
		require.NoError(t, err)
		defer conn.Close(t.Context())
		require.NoError(t, conn.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&found))
		return found
	}

	t.Run("is_migrated_and_empty_and_each_test's_own", func(t *testing.T) {
		t.Parallel()
		for range 3 {
			pool := NewPool(t)
			res := add(t, pool, outbox.NewNotification{Type: "reject"})
			require.Equal(t, outbox.OutcomeCreated, res.Outcome)
		}
	})

	t.Run("goes_when_the_test_ends", func(t *testing.T) {
		t.Parallel()
		var name string
		require.Empty(t, told(t, func(f testing.TB) {
			name = NewPool(f).Config().ConnConfig.Database
			require.True(t, exists(name))
		}))
		require.False(t, exists(name))
	})

	t.Run("a_connection_that_is_not_released_fails_the_test_and_does_not_hang_it", func(t *testing.T) {
		t.Parallel()
		var name string
		var tx pgx.Tx
		var rows pgx.Rows
		text := told(t, func(f testing.TB) {
			pool := NewPool(f)
			name = pool.Config().ConnConfig.Database
			var err error
			tx, err = pool.Begin(t.Context())
			require.NoError(t, err)
			rows, err = pool.Query(t.Context(), "SELECT generate_series(1, 10)") //nolint:sqlclosecheck // that is the case
			require.NoError(t, err)
			require.NoError(t, pool.Ping(t.Context())) // this one comes back
		})
		require.Contains(t, text, "has not released")
		require.Equal(t, 2, strings.Count(text, "acquired at "), text)
		require.Regexp(t, `pool_test\.go:\d+.*\(in a transaction\)`, text)
		require.Regexp(t, `pool_test\.go:\d+.*\(rows not read to their end or closed\)`, text)
		require.False(t, exists(name), "it is dropped all the same")
		_ = tx.Rollback(t.Context())
		rows.Close()
	})

	t.Run("does_not_blame_the_test_for_a_slow_close", func(t *testing.T) {
		t.Parallel()
		cfg := NewPool(t).Config()
		u := watchUsers(cfg)
		released := cfg.BeforeClose
		cfg.BeforeClose = func(conn *pgx.Conn) {
			released(conn)
			<-time.After(closePatience + time.Second)
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
		require.NoError(t, err)
		require.NoError(t, pool.Ping(t.Context()))
		require.Empty(t, told(t, func(f testing.TB) { u.close(f, pool) }))
	})

	t.Run("says_that_it_was_DATABASE_URL", func(t *testing.T) {
		t.Parallel()
		out, err := user(t, "exit", "DATABASE_URL=postgres://nobody@127.0.0.1:1/none?connect_timeout=5").Output()
		require.Error(t, err)
		require.Contains(t, string(out), "outboxtest: no database: the server of DATABASE_URL: ")
	})

	t.Run("says_that_DATABASE_URL_is_of_another_kind", func(t *testing.T) {
		t.Parallel()
		out, err := user(t, "exit", "DATABASE_URL=mysql://root:secret@127.0.0.1/x").Output()
		require.Error(t, err)
		require.Contains(t, string(out), `DATABASE_URL is a URL of "mysql" and not of PostgreSQL: unset it`)
		require.NotContains(t, string(out), "secret")
	})

	t.Run("says_that_the_role_may_not_create_databases", func(t *testing.T) {
		t.Parallel()
		s, err := shared()
		require.NoError(t, err)
		conn, err := pgx.Connect(t.Context(), s.url)
		require.NoError(t, err)
		defer conn.Close(context.Background())
		role := fmt.Sprintf("outboxtest_role_%d", time.Now().UnixNano())
		_, err = conn.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN")
		require.NoError(t, err)
		defer func() {
			_, err := conn.Exec(context.Background(), "DROP ROLE "+role)
			require.NoError(t, err)
		}()
		u, err := url.Parse(s.url)
		require.NoError(t, err)
		u.User = url.User(role)
		out, err := user(t, "exit", urlVariable+"="+u.String()).Output()
		require.Error(t, err)
		require.Contains(t, string(out), fmt.Sprintf(`the server of DATABASE_URL: the role %[1]q may not create databases: run ALTER ROLE "%[1]s" CREATEDB`, role))
	})
}

func TestNewPool_says_what_helps_where_there_is_no_server(t *testing.T) {
	t.Setenv("OUTBOX_PG_BINARIES", "1")
	_, err := start(t.Context(), "", pgserver.Options{Version: "9"})
	require.ErrorIs(t, err, pgserver.ErrUnavailable)
	require.ErrorContains(t, err, "; run: ")
}

// add adds n in a transaction of its own.
func add(t testing.TB, pool *pgxpool.Pool, n outbox.NewNotification) (res outbox.AddResult) {
	t.Helper()
	store := NewStore(t, pool)
	require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) (err error) {
		res, err = store.AddNotification(t.Context(), tx, n)
		return err
	}))
	return res
}

// user is a process that takes a pool and ends in that way.
func user(t testing.TB, end string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(append(os.Environ(), childVariable+"="+end), env...)
	return cmd
}

func beUser(end string) {
	f := &fakeTB{ctx: context.Background()}
	var pool *pgxpool.Pool
	func() {
		defer func() {
			if recover() != nil {
				fmt.Println(f.log.String())
				os.Exit(1)
			}
		}()
		pool = NewPool(f)
	}()
	s, _ := shared()
	container, data := "-", "-"
	if s.own != nil {
		container = cmp.Or(s.own.Container, "-")
		if err := pool.QueryRow(f.ctx, "SHOW data_directory").Scan(&data); err != nil {
			panic(err)
		}
	}
	fmt.Println(pool.Config().ConnConfig.Database, s.url, container, data)
	switch end {
	case "exit":
		os.Exit(0)
	case "panic":
		panic("of the user's test")
	case "busy": // the server has a query to run for an hour
		_, err := pool.Exec(f.ctx, "SELECT pg_sleep(3600)")
		panic(err)
	}
	select {} // to be killed
}

// startUser starts one and returns what it says of its server.
func startUser(t testing.TB, cmd *exec.Cmd) (database, dsn, container, data string) {
	t.Helper()
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, line)
	_, err = fmt.Sscan(line, &database, &dsn, &container, &data)
	require.NoError(t, err, line)
	return database, dsn, container, data
}

// Of what is found: a container, or what is installed with OUTBOX_PG_BINARIES=1. "make
// test" runs it both ways where it can.
func TestServer_ends_with_its_process(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"exit", "panic", "kill", "busy"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			cmd := user(t, end, "DATABASE_URL=")
			_, dsn, container, data := startUser(t, cmd)
			if end == "kill" || end == "busy" {
				require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
			}
			_ = cmd.Wait()
			until(t, func() bool { return gone(t, dsn, container, data) })
		})
	}
}

// gone reports whether nothing of a server is left.
func gone(t testing.TB, dsn, container, data string) bool {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // an address that is gone may not answer at all
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err == nil {
		conn.Close(ctx)
		return false
	}
	if container == "-" {
		_, err = os.Stat(filepath.Dir(data))
		return os.IsNotExist(err)
	}
	cli, err := pgserver.DockerClient()
	require.NoError(t, err)
	defer cli.Close()
	_, err = cli.ContainerInspect(t.Context(), container, client.ContainerInspectOptions{})
	return errdefs.IsNotFound(err)
}

func TestDatabaseURL(t *testing.T) {
	t.Parallel()
	s, err := shared()
	require.NoError(t, err)
	conn, err := pgx.Connect(t.Context(), s.url)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	// A role and a database of this test's own: other processes' leavings are not ours to count.
	role := fmt.Sprintf("outboxtest_role_%d", time.Now().UnixNano())
	for _, sql := range []string{"CREATE ROLE " + role + " LOGIN CREATEDB", "CREATE DATABASE " + role + " OWNER " + role} {
		_, err = conn.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	owned := func() (names []string) {
		rows, err := conn.Query(context.WithoutCancel(t.Context()), "SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = $1 ORDER BY 1", role)
		require.NoError(t, err)
		names, err = pgx.CollectRows(rows, pgx.RowTo[string])
		require.NoError(t, err)
		return names
	}
	t.Cleanup(func() {
		for _, name := range append(owned(), "") {
			sql := "DROP DATABASE IF EXISTS " + name
			if name == "" {
				sql = "DROP ROLE " + role
			}
			require.NoError(t, pgserver.Exec(context.Background(), conn, sql))
		}
	})
	u, err := url.Parse(s.url)
	require.NoError(t, err)
	u.User, u.Path = url.User(role), "/"+role
	env := urlVariable + "=" + u.String()

	killed := user(t, "kill", env)
	database, dsn, container, _ := startUser(t, killed)
	require.Equal(t, u.String(), dsn)
	require.Equal(t, "-", container, "nothing was started")
	other := user(t, "kill", env) // while the first one lives
	second, _, _, _ := startUser(t, other)
	require.Subset(t, owned(), []string{database, second})
	require.Len(t, owned(), 4, "one template for both")

	require.NoError(t, killed.Process.Kill())
	_ = killed.Wait()
	until(t, func() bool { // as soon as the server has noticed
		return user(t, "exit", env).Run() == nil && !slices.Contains(owned(), database)
	})
	require.Contains(t, owned(), second, "of a process that lives")
	var tables int
	u.User = url.User("postgres")
	target, err := pgx.Connect(t.Context(), u.String())
	require.NoError(t, err)
	defer target.Close(t.Context())
	require.NoError(t, target.QueryRow(t.Context(), "SELECT count(*) FROM pg_class WHERE relname LIKE 'outbox%'").Scan(&tables))
	require.Zero(t, tables, "the database of the URL is not written to")
	require.NoError(t, other.Process.Kill())
	_ = other.Wait()
}
