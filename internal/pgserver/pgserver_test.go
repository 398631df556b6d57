package pgserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/jackc/pgx/v5"
	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// These tests run on what Start finds: Docker, or an installed PostgreSQL where
// there is none or OUTBOX_PG_BINARIES=1 is set. "make test" runs them both ways
// where it can.

// asChild has the test binary start a server, print its data directory and URL,
// and wait to be killed. Its value says whether the server is paused by then.
const (
	asChild = "PGSERVER_TEST_CHILD"
	running = "running"
	paused  = "paused"
)

func TestMain(m *testing.M) {
	if os.Getenv(asChild) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// options asks for the version that this run is about. Of what is installed there
// is no choice.
func options(t *testing.T) Options {
	opts := Options{Logf: t.Logf}
	if os.Getenv("OUTBOX_PG_BINARIES") == "" {
		opts.Version = os.Getenv("OUTBOX_TEST_POSTGRES")
	}
	return opts
}

func start(t *testing.T, opts Options) *Server {
	t.Helper()
	began := time.Now()
	s, err := Start(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Stop()) })
	t.Logf("%s: started in %v", s.Kind, time.Since(began).Round(time.Millisecond))
	return s
}

// connect returns a connection that is closed when the test ends.
func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func queryString(t *testing.T, conn *pgx.Conn, sql string, args ...any) (result string) {
	t.Helper()
	require.NoError(t, conn.QueryRow(t.Context(), sql, args...).Scan(&result))
	return result
}

func TestStart(t *testing.T) {
	t.Parallel()
	opts := options(t)
	opts.Settings = map[string]string{"fsync": "on", "work_mem": "5MB"}
	s := start(t, opts)
	conn := connect(t, s.URL)

	version, _, _ := strings.Cut(queryString(t, conn, "SHOW server_version"), " ")
	require.Contains(t, s.Kind, "PostgreSQL "+version+" ")
	if opts.Version != "" {
		require.True(t, strings.HasPrefix(version, opts.Version+"."), "version %s", version)
	}
	require.Equal(t, "on", queryString(t, conn, "SELECT current_setting('is_superuser')"))
	require.Equal(t, "postgres", queryString(t, conn, "SELECT current_database()"))
	require.Equal(t, "on", queryString(t, conn, "SHOW fsync"), "a default that was overridden")
	require.Equal(t, "5MB", queryString(t, conn, "SHOW work_mem"), "a setting that was added")
	require.Equal(t, "off", queryString(t, conn, "SHOW synchronous_commit"), "a default")

	gone := goneAfterStop(t, s, conn)
	began := time.Now()
	require.NoError(t, s.Stop(), "with a connection open")
	t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
	require.True(t, gone(), "nothing is left")
	require.NoError(t, s.Stop(), "a second call")
}

func TestStart_direct(t *testing.T) {
	t.Parallel()
	opts := options(t)
	opts.Direct = true
	one, other := start(t, opts), start(t, options(t))
	connect(t, one.URL)
	d, ok := one.runs.(*dockerServer)
	if !ok { // it is of this machine anyway
		return
	}
	ip, err := d.c.ContainerIP(t.Context())
	require.NoError(t, err)
	require.Equal(t, isNear(ip), strings.Contains(one.URL, "@"+ip+":5432/"), one.URL)
	// One that is not the server which was published.
	require.Equal(t, other.URL, directURL(t.Context(), d.c, other.URL))
}

func TestIsNear(t *testing.T) {
	t.Parallel()
	require.False(t, isNear(""))
	require.False(t, isNear("127.0.0.1"), "of a container, that is its own")
	require.False(t, isNear("224.0.0.1"), "multicast, which is nobody's own")
}

func TestStart_on_disk(t *testing.T) {
	t.Parallel()
	opts := options(t)
	opts.OnDisk = true
	s := start(t, opts)
	conn := connect(t, s.URL)
	require.Equal(t, strings.Contains(s.Kind, "in a container"), s.Container != "")

	// The mount with the longest path above the data is where it is. Not every system
	// has the file.
	mounts := queryString(t, conn, "SELECT coalesce(pg_read_file('/proc/mounts', 0, 1000000, true), '')")
	data := queryString(t, conn, "SHOW data_directory")
	var dir, kind string
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		if under := strings.TrimSuffix(fields[1], "/") + "/"; strings.HasPrefix(data+"/", under) && len(under) > len(dir) {
			dir, kind = under, fields[2]
		}
	}
	require.NotEqual(t, "tmpfs", kind, "%s is on %s", data, dir)

	gone := goneAfterStop(t, s, conn)
	require.NoError(t, s.Stop())
	require.True(t, gone(), "nothing is left")
}

// goneAfterStop returns a check that the server left nothing behind. The container
// is the one whose host name the server has; without one, its directory is known.
func goneAfterStop(t *testing.T, s *Server, conn *pgx.Conn) func() bool {
	t.Helper()
	if !strings.Contains(s.Kind, "in a container") {
		dir := filepath.Dir(queryString(t, conn, "SHOW data_directory"))
		require.DirExists(t, dir)
		return func() bool {
			_, err := os.Stat(dir)
			return os.IsNotExist(err)
		}
	}
	id := strings.TrimSpace(queryString(t, conn, "SELECT pg_read_file('/etc/hostname')"))
	cli, err := connectDocker(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, cli.Close()) })
	inspect := func() error {
		_, err := cli.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{})
		return err
	}
	require.NoError(t, inspect())
	return func() bool { return errdefs.IsNotFound(inspect()) }
}

func TestStart_reports_why_the_server_did_not_start(t *testing.T) {
	t.Parallel()
	opts := options(t)
	opts.Settings = map[string]string{"no_such_setting": "1"}
	_, err := Start(t.Context(), opts)
	require.ErrorContains(t, err, "no_such_setting")
}

func TestStart_reports_what_to_run_where_nothing_is_installed(t *testing.T) {
	t.Setenv("OUTBOX_PG_BINARIES", "1")
	_, err := Start(t.Context(), Options{Version: "9"})
	require.ErrorIs(t, err, ErrUnavailable)
	require.ErrorContains(t, err, "; run: ")
}

func TestStart_ends_with_its_context(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Start(ctx, options(t))
	require.ErrorIs(t, err, context.Canceled)
}

func TestServer_StartPgBouncer(t *testing.T) {
	t.Parallel()
	s := start(t, options(t))
	direct := connect(t, s.URL)
	_, err := direct.Exec(t.Context(), "CREATE ROLE recruiter LOGIN")
	require.NoError(t, err)
	require.NoError(t, Exec(t.Context(), direct, "CREATE DATABASE booking"))

	began := time.Now()
	url, stop, err := s.StartPgBouncer(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, stop()) })
	t.Logf("PgBouncer started in %v", time.Since(began).Round(time.Millisecond))

	conn := connect(t, url)
	for range 2 { // the second time, pgx uses a prepared statement
		require.Equal(t, "postgres x", queryString(t, conn, "SELECT current_database() || ' ' || $1", "x"))
	}

	url = strings.Replace(url, "postgres@", "recruiter@", 1)
	url = strings.Replace(url, "/postgres?", "/booking?", 1)
	conn = connect(t, url)
	require.Equal(t, "recruiter booking", queryString(t, conn, "SELECT current_user || ' ' || current_database()"))

	// In transaction mode two clients share a server connection between transactions.
	other := connect(t, url)
	pid := queryString(t, conn, "SELECT pg_backend_pid()::text")
	require.Equal(t, pid, queryString(t, other, "SELECT pg_backend_pid()::text"))

	require.NoError(t, stop())
	require.NoError(t, stop(), "a second call")
	_, err = pgx.Connect(t.Context(), url)
	require.Error(t, err)
}

func child() {
	ctx := context.Background()
	s, err := Start(ctx, Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	conn, err := pgx.Connect(ctx, s.URL)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var data string
	if err := conn.QueryRow(ctx, "SHOW data_directory").Scan(&data); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if os.Getenv(asChild) == paused {
		if err := s.Pause(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	fmt.Println(filepath.Dir(data), s.URL)
	select {}
}
