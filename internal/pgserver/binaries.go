package pgserver

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var errNoBinaries = errors.New("not installed")

// installation is an installed PostgreSQL: its initdb and postgres are in bin.
type installation struct {
	bin   string
	major int
}

// startInstalled runs initdb and then postgres as children of this process.
func startInstalled(ctx context.Context, opts Options) (*Server, error) {
	inst, err := findInstallation(ctx, opts.Version)
	if err != nil {
		return nil, err
	}
	return onFreePort(func() (*Server, error) { return startInstallation(ctx, inst, opts) })
}

// onFreePort starts something that listens, up to three times: a port that was free a
// moment ago may be taken by now.
func onFreePort[T any](start func() (T, error)) (T, error) {
	for attempt := 1; ; attempt++ {
		s, err := start()
		if err == nil || attempt == 3 || !strings.Contains(err.Error(), "Address already in use") {
			return s, err
		}
	}
}

// CheckInstalled returns an error that names the command to run if a PostgreSQL or
// a PgBouncer to run without Docker is not installed.
func CheckInstalled(ctx context.Context) error {
	if _, err := findInstallation(ctx, ""); err != nil {
		return fmt.Errorf("pgserver: %w: %w; run: %s", ErrUnavailable, err, installCommand(true))
	}
	if _, err := findPgBouncer(); err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	return nil
}

func startInstallation(ctx context.Context, inst installation, opts Options) (*Server, error) {
	return startWith(ctx, inst, opts, "initdb", "-U", "postgres",
		"--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
}

// startWith starts a server on the data that a program of the installation makes with
// those arguments, and -D.
func startWith(ctx context.Context, inst installation, opts Options, program string, makeArgs ...string) (_ *Server, err error) {
	parent := memoryDir()
	if opts.OnDisk {
		parent = diskDir()
	}
	dir, err := newWorkDir(parent)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.remove())
		}
	}()
	data := filepath.Join(dir.path, "data")
	if err := dir.run(ctx, filepath.Join(inst.bin, program), append(makeArgs, "-D", data)...); err != nil {
		return nil, err
	}
	port, err := freePort() // as late as can be: somebody else may take it
	if err != nil {
		return nil, err
	}
	args := []string{
		"-D", data, "-p", strconv.Itoa(port),
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=" + dir.path,
	}
	for _, name := range slices.Sorted(maps.Keys(opts.Settings)) {
		args = append(args, "-c", name+"="+opts.Settings[name])
	}
	s := &installedServer{
		dir: dir, inst: inst, opts: opts, args: args, port: port,
		url: fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", port),
	}
	version, err := s.start(ctx)
	if err != nil {
		return nil, err
	}
	if opts.Lifeline {
		if s.watcher, err = watchInstalled(s.p.cmd.Process.Pid, dir.path); err != nil {
			return nil, errors.Join(fmt.Errorf("watch the server: %w", err), s.p.kill())
		}
	}
	return &Server{URL: s.url, Kind: fmt.Sprintf("PostgreSQL %s from %s", version, inst.bin), runs: s}, nil
}

// installedServer is a server that is a child of this process.
type installedServer struct {
	dir     *workDir
	inst    installation
	opts    Options
	args    []string
	port    int
	url     string
	p       *process
	watcher *watcher // nil: none
	frozen  []int    // the processes that pause stopped
	killed  bool
}

// start starts the process and waits until it accepts connections.
func (s *installedServer) start(ctx context.Context) (version string, err error) {
	p, err := startProcess(s.dir.command(filepath.Join(s.inst.bin, "postgres"), s.args...))
	if err != nil {
		return "", fmt.Errorf("postgres: %w", err)
	}
	s.p = p
	if version, err = waitReady(ctx, s.url, p.exited); err != nil {
		err = errors.Join(err, p.kill())
		return "", fmt.Errorf("postgres: %w: %s", err, tail(p.log.Bytes()))
	}
	return version, nil
}

func (s *installedServer) startPgBouncer(ctx context.Context) (string, func() error, error) {
	type bouncer struct {
		url  string
		stop func() error
	}
	b, err := onFreePort(func() (b bouncer, err error) {
		b.url, b.stop, err = startInstalledPgBouncer(ctx, s.port, s.opts.Logf)
		return b, err
	})
	return b.url, b.stop, err
}

func (s *installedServer) startStandby(ctx context.Context, name string) (*Server, error) {
	if s.opts.Lifeline {
		return nil, errLifeline
	}
	if _, err := ask[bool](ctx, s.url, "SELECT true FROM pg_create_physical_replication_slot($1, true)", name); err != nil {
		return nil, err
	}
	standby, err := onFreePort(func() (*Server, error) {
		return startWith(ctx, s.inst, s.opts, "pg_basebackup", "-d", standbyConninfo("127.0.0.1", s.port, name),
			"-R", "-S", name, "-c", "fast", "--no-sync")
	})
	if err != nil { // the slot would keep the log for nobody
		return nil, errors.Join(err, execute(context.WithoutCancel(ctx), s.url, "SELECT pg_drop_replication_slot('"+name+"')"))
	}
	return standby, nil
}

// stop lets a paused server go on: shutting down, it removes its shared memory.
func (s *installedServer) stop() error {
	err := errors.Join(s.resume(context.Background()), s.watcher.dismiss(), s.p.kill())
	if s.killed {
		// A server on the same data removes what the killed one left of that. A standby's
		// refuses to run this way, once it has.
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		_ = s.dir.run(ctx, filepath.Join(s.inst.bin, "postgres"), "--single", "-D", filepath.Join(s.dir.path, "data"), "postgres")
	}
	return errors.Join(err, s.dir.remove())
}

func (s *installedServer) crash(ctx context.Context) error {
	if err := s.killAll(ctx); err != nil {
		return err
	}
	return s.startAgain(ctx)
}

func (s *installedServer) kill(ctx context.Context) error {
	if err := s.killAll(ctx); err != nil {
		return err
	}
	s.killed = true
	select {
	case <-s.p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// killAll kills processes that are stopped, or the server would see that some of its
// children died and act on it.
func (s *installedServer) killAll(ctx context.Context) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	err := s.signalFrozen(syscall.SIGKILL)
	s.frozen = nil
	return err
}

func (s *installedServer) restart(ctx context.Context) error {
	if err := s.p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		return err
	}
	return s.startAgain(ctx)
}

// startAgain starts the server when the old process and its children, which have its
// output open, are gone. A client that keeps trying to connect can be given the very
// port that it connects to, as its own; it does not keep it.
func (s *installedServer) startAgain(ctx context.Context) error {
	select {
	case <-s.p.exited:
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := s.start(ctx)
		if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
	}
}

func (s *installedServer) shell(ctx context.Context, command string) error {
	cmd := s.dir.command("sh", "-c", command)
	cmd.Env = append(cmd.Environ(), "PGDATA="+filepath.Join(s.dir.path, "data"))
	p, err := startProcess(cmd)
	if err != nil {
		return err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return errors.Join(ctx.Err(), p.kill())
	}
	if !cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %v: %s", command, cmd.ProcessState, tail(p.log.Bytes()))
	}
	return nil
}

func (s *installedServer) pause(ctx context.Context) (err error) {
	s.frozen, err = freeze(ctx, s.p.cmd.Process.Pid)
	if err != nil {
		return errors.Join(err, s.resume(ctx))
	}
	return nil
}

func (s *installedServer) resume(context.Context) error {
	err := s.signalFrozen(sigThaw)
	s.frozen = nil
	return err
}

func (s *installedServer) signalFrozen(sig syscall.Signal) error {
	var err error
	for _, pid := range s.frozen {
		err = errors.Join(err, signalTo(pid, sig))
	}
	return err
}

// freeze stops a process and its children, and returns them, also those that it had
// stopped when it failed. It looks twice: a child may come while it looks, until the
// parent, which it can tell by then, is stopped.
func freeze(ctx context.Context, parent int) (family []int, err error) {
	for clean := 0; clean < 2; {
		all, err := processes()
		if err != nil {
			return family, err
		}
		clean++
		family = nil
		for _, p := range all {
			if p.zombie || p.pid != parent && p.parent != parent {
				continue
			}
			family = append(family, p.pid)
			if !p.stopped {
				clean = 0
				if err := signalTo(p.pid, sigFreeze); err != nil {
					return family, err
				}
			}
		}
		if err := ctx.Err(); err != nil {
			return family, err
		}
	}
	return family, nil
}

// processInfo is a line of the system's process table.
type processInfo struct {
	pid, parent     int
	stopped, zombie bool
}

// findInstallation returns the installed PostgreSQL of that major version, or the
// newest one if version is "".
func findInstallation(ctx context.Context, version string) (installation, error) {
	var candidates []string
	if path, err := exec.LookPath("postgres"); err == nil {
		// PATH may have links to the server alone; initdb is beside the real file.
		if real, err := filepath.EvalSymlinks(path); err == nil {
			candidates = append(candidates, real)
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin/postgres",          // Debian and its relatives
		"/usr/pgsql-*/bin/postgres",                   // the project's own RPM packages
		"/usr/libexec/postgresql*/postgres",           // Alpine
		"/usr/local/pgsql/bin/postgres",               // built from source
		"/opt/homebrew/opt/postgresql*/bin/postgres",  // macOS on ARM
		"/usr/local/opt/postgresql*/bin/postgres",     // macOS on Intel
		"/Applications/Postgres.app/*/*/bin/postgres", // Postgres.app
	} {
		found, _ := filepath.Glob(pattern) // fails on a malformed pattern only
		candidates = append(candidates, found...)
	}

	var all []installation
	for _, postgres := range candidates {
		bin := filepath.Dir(postgres)
		if _, err := exec.LookPath(filepath.Join(bin, "initdb")); err != nil {
			continue
		}
		if major := majorVersion(ctx, postgres); major > 0 {
			all = append(all, installation{bin, major})
		}
	}
	slices.SortStableFunc(all, func(a, b installation) int { return cmp.Compare(b.major, a.major) })
	var seen []string
	for _, inst := range all {
		major := strconv.Itoa(inst.major)
		if version == "" || version == major {
			return inst, nil
		}
		seen = append(seen, major)
	}
	if len(seen) > 0 {
		return installation{}, fmt.Errorf("PostgreSQL %s is %w (there is %s)",
			version, errNoBinaries, strings.Join(slices.Compact(seen), ", "))
	}
	return installation{}, fmt.Errorf("PostgreSQL is %w", errNoBinaries)
}

var versionNumber = regexp.MustCompile(`(\d+)(?:\.(\d+))?`)

// majorVersion is what the server binary says it is, or 0 if it does not run.
func majorVersion(ctx context.Context, postgres string) int {
	out, err := exec.CommandContext(ctx, postgres, "--version").Output()
	if err != nil {
		return 0
	}
	major, _ := strconv.Atoi(versionNumber.FindString(strings.SplitN(string(out), ".", 2)[0]))
	return major
}

// account is an operating system user that a server runs as.
type account struct{ uid, gid int }

// unprivileged returns whom to run a server as: nil, for ourselves, unless we are
// root, whom PostgreSQL and PgBouncer refuse.
func unprivileged() (*account, error) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			uid, err := strconv.Atoi(u.Uid)
			if err != nil {
				return nil, err
			}
			gid, err := strconv.Atoi(u.Gid)
			return &account{uid, gid}, err
		}
	}
	return nil, errors.New("neither user postgres nor nobody exists, and a server does not run as root")
}

const workDirPrefix = "outbox-pg-"

// workDir is a fresh directory that belongs to the user whom servers run as.
type workDir struct {
	path string
	as   *account // nil: ourselves
	lock *os.File // nil where locks are not supported
}

// memoryDir is in memory if the system has a place for that.
func memoryDir() string { return dirOrTemp("/dev/shm") }

// diskDir is on a disk also where temporary files are in memory.
func diskDir() string { return dirOrTemp("/var/tmp") }

func dirOrTemp(dir string) string {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return os.TempDir()
	}
	return dir
}

// newWorkDir makes a directory in parent, and removes those there whose process was
// killed before it could.
func newWorkDir(parent string) (_ *workDir, err error) {
	removeAbandoned(parent)

	as, err := unprivileged()
	if err != nil {
		return nil, err
	}
	path, err := os.MkdirTemp(parent, workDirPrefix)
	if err != nil {
		return nil, err
	}
	d := &workDir{path: path, as: as}
	d.lock, _ = lockDir(path) // without the lock, only the clean-up after a kill is lost
	if as != nil {
		if err := os.Chown(path, as.uid, as.gid); err != nil {
			return nil, errors.Join(err, d.remove())
		}
	}
	return d, nil
}

// removeAbandoned removes work directories that nobody holds the lock of. One that
// is younger than a minute may be about to be locked.
func removeAbandoned(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, workDirPrefix+"*"))
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		if lock, err := lockDir(dir); err == nil {
			os.RemoveAll(dir) // what is left is left: it may be another user's
			lock.Close()
		}
	}
}

func (d *workDir) remove() error {
	err := os.RemoveAll(d.path)
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

// command is a program that runs in the directory, as its owner, and whose
// behaviour does not depend on the caller's PG* variables, language and time zone.
func (d *workDir) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = d.path
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PG") }), "LC_ALL=C", "TZ=UTC")
	confine(cmd, d.as)
	return cmd
}

// run runs a program as command does, to its end.
func (d *workDir) run(ctx context.Context, name string, args ...string) error {
	cmd := d.command(name, args...)
	p, err := startProcess(cmd)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return errors.Join(ctx.Err(), p.kill())
	}
	if !cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %v: %s", filepath.Base(name), cmd.ProcessState, tail(p.log.Bytes()))
	}
	return nil
}

// process is a running child.
type process struct {
	cmd    *exec.Cmd
	log    *bytes.Buffer // what it wrote; to be read when exited is closed
	exited chan struct{}
}

// startProcess starts cmd and collects its output. The child dies with the thread
// that forked it (see confine), so that thread is kept, doing nothing but wait.
func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, log: new(bytes.Buffer), exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.log, p.log
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in cmd.ProcessState
		}
	}()
	return p, <-started
}

// kill ends the process without ceremony, its data being worthless, and waits for it.
func (p *process) kill() error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	// An immediate shutdown ends PostgreSQL's children too, which a kill does not.
	if p.cmd.Process.Signal(syscall.SIGQUIT) == nil {
		select {
		case <-p.exited:
			return nil
		case <-time.After(10 * time.Second):
		}
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.exited
	return nil
}

// freePort returns a loopback port that nobody listens on at the moment.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}
