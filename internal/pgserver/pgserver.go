// Package pgserver starts throwaway PostgreSQL servers for tests and examples:
// in a container where Docker answers, else from the PostgreSQL that is installed
// on the machine. It keeps nothing: a server's data is in memory where possible,
// unless asked otherwise, and gone after [Server.Stop].
//
// The container's image is the official one where it is present or can be pulled.
// Where no registry can be reached it is built, once, from Debian's packages.
//
// Environment:
//
//	OUTBOX_PG_BINARIES=1   do not use Docker, even where it answers
//	OUTBOX_TEST_RUN=VALUE  label every container outbox.run=VALUE
//
// Every container is labelled outbox.test=1 as well, and ends by itself after
// four hours if the process that started it was killed, unless it is paused.
package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// defaultVersion is what runs in Docker when no version is asked for.
const defaultVersion = "17"

// startTimeout bounds the wait for a server that was started to accept connections.
const startTimeout = 3 * time.Minute

// ErrUnavailable is returned, wrapped, by [Start] where neither Docker nor an
// installed PostgreSQL can be used. The error names the command that helps.
var ErrUnavailable = errors.New("no PostgreSQL to run")

// Options says which server [Start] starts. The zero value is ready for use.
type Options struct {
	// Version is the major version: "15", "17" or "18", or whatever else an
	// official image exists for. Default: 17 in Docker, the newest installed
	// one without it.
	Version string

	// Settings are server settings by name. They are added to defaults that
	// suit tests and win over them: fsync, synchronous_commit and
	// full_page_writes are off (see [Server.Crash] for what that loses),
	// max_connections is 300.
	Settings map[string]string

	// OnDisk has the data on a disk in place of in memory, for measurements: in a
	// volume of the container, or in /var/tmp. It changes no setting.
	OnDisk bool

	// SmallDisk adds a file system of so many bytes at /small, in memory, which can be
	// filled without harm to anybody else. Only in a container: elsewhere Start
	// returns [ErrUnavailable]. 0: none.
	SmallDisk int64

	// Lifeline has the server end, and its data and container go, as soon as this process
	// has ended, however it ends: nobody has to call [Server.Stop]. It is not for
	// servers to inject faults into. Without Docker it needs /bin/sh.
	Lifeline bool

	// Direct has the URL name the container's own address, where that can be reached. The
	// proxy of a published port takes a tenth of what the tests compute. It is not for
	// servers to inject faults into: nobody refuses a connection at an address that is gone.
	Direct bool

	// Logf receives what a human who waits would want to know, such as that an
	// image is being built. Default: nothing is said.
	Logf func(format string, args ...any)
}

// Server is a running server. Its methods may be called concurrently.
type Server struct {
	// URL connects as the superuser to database postgres. No password is needed.
	URL string

	// Kind says in one line, for humans, what is running and from where.
	Kind string

	// Container is the id of the container that the server runs in. "" without Docker.
	Container string

	mu      sync.Mutex // one fault at a time, and Stop after it
	runs    runner
	paused  bool
	killed  bool
	stopped bool
	stopErr error

	standbys int     // how many were started
	primary  *Server // of a standby
	name     string  // of a standby, at its primary
}

// runner is what a server runs in: a container, or a process of this machine. Its
// methods are called one at a time, startPgBouncer excepted.
type runner interface {
	startPgBouncer(ctx context.Context) (url string, stop func() error, err error)
	startStandby(ctx context.Context, name string) (*Server, error)
	stop() error                    // a paused or killed server too
	kill(ctx context.Context) error // a paused server too
	crash(ctx context.Context) error
	restart(ctx context.Context) error
	pause(ctx context.Context) error
	resume(ctx context.Context) error
	shell(ctx context.Context, command string) error
}

// Start starts a server and waits until it accepts connections. Ctx bounds the
// start only; the server runs until [Server.Stop].
//
// With Docker there but failing, Start falls back to an installed PostgreSQL of
// the version asked for, and says so through Logf. If that fails too, the error
// has both reasons.
func Start(ctx context.Context, opts Options) (*Server, error) {
	if opts.Logf == nil {
		opts.Logf = func(string, ...any) {}
	}
	settings := map[string]string{
		"fsync":              "off",
		"synchronous_commit": "off",
		"full_page_writes":   "off",
		"max_connections":    "300",
	}
	for name, value := range opts.Settings {
		settings[name] = value
	}
	opts.Settings = settings

	s, dockerErr := startInDocker(ctx, opts)
	if dockerErr == nil {
		return s, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("pgserver: %w: docker: %w", err, dockerErr)
	}
	if !errors.Is(dockerErr, errNoDocker) {
		opts.Logf("no PostgreSQL in a container, trying installed binaries: %v", dockerErr)
	}

	if opts.SmallDisk != 0 {
		return nil, fmt.Errorf("pgserver: %w with a small disk but in a container; the tag installed leaves out the tests that need one (docker: %w)", ErrUnavailable, dockerErr)
	}
	s, err := startInstalled(ctx, opts)
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, errNoBinaries):
		return nil, fmt.Errorf("pgserver: %w; run: %s (docker: %w; installed: %w)",
			ErrUnavailable, installCommand(false), dockerErr, err)
	default:
		return nil, fmt.Errorf("pgserver: docker: %w; installed: %w", dockerErr, err)
	}
}

// Stop ends the server at once, open connections with it, and removes its data. It
// works on a paused server as well. Further calls return what the first one did.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.stopped = true
		if err := s.runs.stop(); err != nil {
			s.stopErr = fmt.Errorf("pgserver: stop: %w", err)
		}
	}
	return s.stopErr
}

// StartPgBouncer starts a PgBouncer in transaction mode in front of the server.
// It lets every database name and every user of the server through, without a
// password, and tracks up to 200 prepared statements. It runs in a container
// where the server does, else from the installed pgbouncer, until stop is called;
// stop it before the server.
//
// An installed PgBouncer older than 1.21 cannot track prepared statements. The url
// then tells pgx to use none (default_query_exec_mode=cache_describe).
func (s *Server) StartPgBouncer(ctx context.Context) (url string, stop func() error, err error) {
	url, stop, err = s.runs.startPgBouncer(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("pgserver: pgbouncer: %w", err)
	}
	return url, stop, nil
}

// installCommand is the one command that makes Start work on this machine, and
// StartPgBouncer too if asked.
func installCommand(bouncer bool) string {
	for _, c := range []struct{ tool, command string }{
		{"apt-get", "apt-get install -y postgresql"},
		{"dnf", "dnf install -y postgresql-server"},
		{"apk", "apk add postgresql"},
		{"brew", "brew install postgresql@17"},
	} {
		if _, err := exec.LookPath(c.tool); err == nil {
			if bouncer {
				c.command += " pgbouncer"
			}
			if runtime.GOOS == "linux" && os.Geteuid() != 0 {
				c.command = "sudo " + c.command
			}
			return c.command
		}
	}
	return "docker version, and start Docker until it succeeds"
}

// waitReady connects to url until that succeeds and returns the server's version.
// It gives up when exited is closed, when ctx ends and after startTimeout.
func waitReady(ctx context.Context, url string, exited <-chan struct{}) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		if version, err = serverVersion(ctx, url); err == nil {
			return version, nil
		}
		select {
		case <-exited:
			return "", errors.New("the process exited")
		case <-ctx.Done():
			return "", fmt.Errorf("not ready: %w", err)
		case <-time.After(pause):
		}
	}
}

// serverVersion asks the server behind url for its version, such as "17.5". The
// simple protocol goes through any PgBouncer.
func serverVersion(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	version, err := ask[string](ctx, url, "SHOW server_version", pgx.QueryExecModeSimpleProtocol)
	version, _, _ = strings.Cut(version, " ")
	return version, err
}

// tail is the end of a log, for error messages.
func tail(log []byte) string {
	const limit = 2000
	if len(log) > limit {
		log = log[len(log)-limit:]
	}
	return strings.TrimSpace(string(log))
}
