package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/exec"
	"github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/modules/postgres"
	"github.com/testcontainers/testcontainers-go/wait"
)

// containerLife bounds the life of a container whose process was killed, where no
// reaper runs.
const containerLife = "4h"

// startAgainFile has the container live on when its program ends.
const startAgainFile = "/tmp/start-again"

// processOne is process 1 of a container: it runs the program and ends with it, or,
// with startAgainFile, runs it until that succeeds (the shared memory of a server
// that was killed may be in use for a moment). When it ends, everything else does.
const processOne = `trap exit INT TERM QUIT
(sleep ` + containerLife + `; kill -QUIT 1) &
while "$0" "$@" & wait $!; status=$?; [ -e ` + startAgainFile + ` ]; do :; done
exit $status`

var errNoDocker = errors.New("not used")

// connectDocker returns a client of a daemon that answers. The error is errNoDocker
// where there is no sign of one, or it is not wanted.
func connectDocker(ctx context.Context) (*client.Client, error) {
	if os.Getenv("OUTBOX_PG_BINARIES") == "1" {
		return nil, fmt.Errorf("%w: OUTBOX_PG_BINARIES=1", errNoDocker)
	}
	cli, err := DockerClient()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := cli.Ping(ctx, client.PingOptions{}); err != nil {
		cli.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", errNoDocker, err)
		}
		return nil, err
	}
	return cli, nil
}

// DockerClient returns a client of the daemon that servers run in, which may not answer.
func DockerClient() (*client.Client, error) {
	opts := []client.Opt{client.FromEnv}
	if os.Getenv(client.EnvOverrideHost) == "" {
		if host := dockerSocket(); host != "" {
			opts = append(opts, client.WithHost(host))
		}
	}
	return client.New(opts...)
}

// dockerSocket finds the daemon in the places where testcontainers looks for it,
// which are more than the client's default one.
func dockerSocket() string {
	sockets := []string{"/var/run/docker.sock"}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		sockets = append(sockets, filepath.Join(dir, "docker.sock"))
	}
	if home, err := os.UserHomeDir(); err == nil {
		sockets = append(sockets,
			filepath.Join(home, ".docker/run/docker.sock"), filepath.Join(home, ".docker/desktop/docker.sock"))
	}
	for _, s := range sockets {
		if _, err := os.Stat(s); err == nil {
			return "unix://" + s
		}
	}
	return ""
}

func startInDocker(ctx context.Context, opts Options) (*Server, error) {
	cli, err := connectDocker(ctx)
	if err != nil {
		return nil, err
	}
	defer cli.Close()
	version := opts.Version
	if version == "" {
		version = defaultVersion
	}
	image, err := postgresImage(ctx, cli, version, opts.Logf)
	if err != nil {
		return nil, err
	}
	host, err := setUpTestcontainers(ctx, cli, image.official)
	if err != nil {
		return nil, err
	}

	d := &dockerServer{host: host, image: image, opts: opts}
	// The entrypoint starts the server twice, the first time to make the database.
	custom := append(d.options("docker-entrypoint.sh"), waitForLog("database system is ready to accept connections", 2))
	if opts.Lifeline {
		held, lifeline := containerLifeline()
		d.lifeline = lifeline
		custom = append(append(custom, held...), testcontainers.WithEntrypoint("sh", "-c", watchLifeline+processOne, "docker-entrypoint.sh"))
	}
	c, err := postgres.Run(ctx, image.tag, custom...)
	if err != nil {
		d.lifeline.close()
		return nil, failedContainer(ctx, c, err)
	}
	d.c = c
	return d.server(ctx)
}

// dockerServer is a server in a container.
type dockerServer struct {
	c         testcontainers.Container
	host, url string
	image     serverImage
	opts      Options
	lifeline  *heldConn // nil: none
}

// options has a container run the program, an image's entrypoint, with the server's
// command line as its arguments.
func (s *dockerServer) options(program ...string) []testcontainers.ContainerCustomizer {
	cmd := []string{"postgres"}
	for _, name := range slices.Sorted(maps.Keys(s.opts.Settings)) {
		cmd = append(cmd, "-c", name+"="+s.opts.Settings[name])
	}
	// PGDATA is named because official images differ in where it is. The volume has
	// no name and goes with the container.
	data := testcontainers.WithTmpfs(map[string]string{"/pgdata": "rw"})
	if s.opts.OnDisk {
		data = testcontainers.WithMounts(testcontainers.VolumeMount("", "/pgdata"))
	}
	small := map[string]string{}
	if s.opts.SmallDisk != 0 {
		small["/small"] = fmt.Sprintf("rw,size=%d", s.opts.SmallDisk)
	}
	return append(containerOptions(s.host, "5432/tcp", program...),
		testcontainers.WithCmd(cmd...),
		data,
		testcontainers.WithTmpfs(small),
		testcontainers.WithEnv(map[string]string{
			"PGDATA":                    "/pgdata",
			"POSTGRES_HOST_AUTH_METHOD": "trust",
			"TZ":                        "UTC", // or initdb spends 1.5 s on finding the time zone out
		}))
}

// server returns the server when it accepts connections.
func (s *dockerServer) server(ctx context.Context) (*Server, error) {
	dsn, version, err := containerURL(ctx, s.c, "5432/tcp")
	if err != nil {
		s.lifeline.close()
		return nil, failedContainer(ctx, s.c, err)
	}
	if s.opts.Direct && isLoopback(s.host) {
		dsn = directURL(ctx, s.c, dsn)
	}
	s.url = dsn
	return &Server{
		URL:       dsn,
		Kind:      fmt.Sprintf("PostgreSQL %s in a container (%s)", version, s.image.origin),
		Container: s.c.GetContainerID(),
		runs:      s,
	}, nil
}

// cloneServer copies the server that PRIMARY leads to, as a standby of it, and runs the
// image's entrypoint, which takes data that is there as it is.
const cloneServer = `set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  pg_basebackup -d "$PRIMARY" -D "$PGDATA" -R -C -S "$SLOT" -c fast --no-sync
  chown -R postgres: "$PGDATA"
fi
exec docker-entrypoint.sh "$@"`

func (s *dockerServer) startStandby(ctx context.Context, name string) (*Server, error) {
	if s.opts.Lifeline {
		return nil, errLifeline
	}
	// Official images let others in, but not to replicate.
	const allow = `hba="$PGDATA/pg_hba.conf" line="host replication all all trust"
grep -qx "$line" "$hba" || { echo "$line" >>"$hba" && kill -HUP "$(head -n 1 "$PGDATA/postmaster.pid")"; }`
	if err := s.shell(ctx, allow); err != nil {
		return nil, err
	}
	ip, err := s.c.ContainerIP(ctx)
	if err != nil {
		return nil, err
	}
	d := &dockerServer{host: s.host, image: s.image, opts: s.opts}
	c, err := testcontainers.Run(ctx, d.image.tag, append(d.options("sh", "-c", cloneServer, "sh"),
		testcontainers.WithEnv(map[string]string{"PRIMARY": standbyConninfo(ip, 5432, name), "SLOT": name}),
		waitForLog("database system is ready to accept read-only connections", 1))...)
	if err != nil {
		return nil, failedContainer(ctx, c, err)
	}
	d.c = c
	return d.server(ctx)
}

func (s *dockerServer) startPgBouncer(ctx context.Context) (string, func() error, error) {
	return startPgBouncerContainer(ctx, s.c, s.host, s.opts.Logf)
}

// stop needs no resume before: the daemon kills paused containers too.
func (s *dockerServer) stop() error {
	err := terminate(s.c)
	s.lifeline.close()
	return err
}

// crash kills all processes of the user whom the server runs as, but for the one
// that does so. Process 1 belongs to root.
func (s *dockerServer) crash(ctx context.Context) error {
	return s.startAgain(ctx, "kill -KILL -1")
}

// restart waits for the end, or it would take the old server for the new one. The
// process tells: pg_ctl would wait for the pid file to go, and see the next one.
func (s *dockerServer) restart(ctx context.Context) error {
	return s.startAgain(ctx, `read pid <"$PGDATA/postmaster.pid" && kill -INT $pid && while kill -0 $pid 2>&-; do sleep 0.01; done`)
}

// startAgain runs a command that ends the server and waits until process 1 has
// started it again. A container that were stopped for that would lose its data,
// which is in memory, and its port.
func (s *dockerServer) startAgain(ctx context.Context, end string) error {
	if err := s.shell(ctx, ">"+startAgainFile+"; "+end); err != nil {
		return err
	}
	_, err := waitReady(ctx, s.url, nil)
	return err
}

// shell runs a script in the container as the user whom the server runs as.
func (s *dockerServer) shell(ctx context.Context, script string) error {
	status, output, err := s.c.Exec(ctx, []string{"sh", "-c", script}, exec.WithUser("postgres"), exec.Multiplexed())
	if err != nil {
		return err
	}
	if status != 0 {
		text, _ := io.ReadAll(output) // part of it is better than none
		return fmt.Errorf("%s: exit status %d: %s", script, status, tail(text))
	}
	return nil
}

// kill ends process 1 too, and with it all there is. The container is kept, or its
// address and port could be somebody else's.
func (s *dockerServer) kill(ctx context.Context) error {
	cli, err := connectDocker(ctx)
	if err != nil {
		return err
	}
	defer cli.Close()
	if _, err := cli.ContainerKill(ctx, s.c.GetContainerID(), client.ContainerKillOptions{Signal: "KILL"}); err != nil {
		return err
	}
	ended := cli.ContainerWait(ctx, s.c.GetContainerID(), client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	select {
	case <-ended.Result:
		return nil
	case err := <-ended.Error:
		return err
	}
}

func (s *dockerServer) pause(ctx context.Context) error {
	cli, err := connectDocker(ctx)
	if err != nil {
		return err
	}
	defer cli.Close()
	for try := 1; ; try++ {
		_, err = cli.ContainerPause(ctx, s.c.GetContainerID(), client.ContainerPauseOptions{})
		// A kernel that cannot freeze a busy process in time gives up and thaws the others.
		if err == nil || !strings.Contains(err.Error(), "unable to freeze") || try == 20 {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *dockerServer) resume(ctx context.Context) error {
	cli, err := connectDocker(ctx)
	if err != nil {
		return err
	}
	defer cli.Close()
	_, err = cli.ContainerUnpause(ctx, s.c.GetContainerID(), client.ContainerUnpauseOptions{})
	return err
}

var quietTestcontainers = sync.OnceFunc(func() { log.SetDefault(log.NewNoopLogger()) })

// setUpTestcontainers makes testcontainers work where its defaults do not, and
// returns the host where published ports are reached. What the user has set stays.
// It has to come before anything else of testcontainers, which reads the
// environment once. Registry says that one answered.
func setUpTestcontainers(ctx context.Context, cli *client.Client, registry bool) (host string, err error) {
	// The reaper removes containers of killed processes, but is an image to pull.
	if os.Getenv("TESTCONTAINERS_RYUK_DISABLED") == "" {
		reaper := testcontainers.ReaperDefaultImage //nolint:staticcheck // the image has no other exported name
		_, err := cli.ImageInspect(ctx, reaper)
		if err != nil && (!registry || pullImage(ctx, cli, reaper) != nil) {
			os.Setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
		}
	}
	// Inside a container, ports are taken to be published on its gateway. That is
	// wrong where the daemon runs inside too: its bridge is then one of our interfaces.
	if _, err := os.Stat("/.dockerenv"); err == nil && os.Getenv("TESTCONTAINERS_HOST_OVERRIDE") == "" {
		bridge, err := cli.NetworkInspect(ctx, "bridge", client.NetworkInspectOptions{})
		if err == nil {
			name := bridge.Network.Options["com.docker.network.bridge.name"]
			if _, err := net.InterfaceByName(name); err == nil {
				os.Setenv("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
			}
		}
	}
	quietTestcontainers()
	provider, err := testcontainers.NewDockerProvider()
	if err != nil {
		return "", err
	}
	defer provider.Close()
	return provider.DaemonHost(ctx)
}

// containerOptions are what all containers have in common.
func containerOptions(host, port string, program ...string) []testcontainers.ContainerCustomizer {
	labels := map[string]string{"outbox.test": "1"}
	if run := os.Getenv("OUTBOX_TEST_RUN"); run != "" {
		labels["outbox.run"] = run
	}
	return []testcontainers.ContainerCustomizer{
		testcontainers.WithLogger(log.NewNoopLogger()),
		testcontainers.WithLabels(labels),
		testcontainers.WithExposedPorts(port),
		testcontainers.WithEntrypoint(append([]string{"sh", "-c", processOne}, program...)...),
		testcontainers.WithHostConfigModifier(func(h *container.HostConfig) {
			h.ShmSize = 256 << 20 // the default, 64 MB, is little for parallel queries
			if isLoopback(host) {
				// The server asks for no password: keep other machines out.
				loopback := network.PortBinding{HostIP: netip.MustParseAddr("127.0.0.1")}
				h.PortBindings = network.PortMap{network.MustParsePort(port): {loopback}}
			}
		}),
	}
}

// isNear says whether one of this machine's interfaces is in the network of ip.
func isNear(ip string) bool {
	addrs, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && !n.IP.IsLoopback() && n.Contains(net.ParseIP(ip))
	})
}

func isLoopback(host string) bool { return host == "localhost" || host == "127.0.0.1" }

// waitForLog has a container be started when it has logged that line so many times.
// That it listens is for containerURL to find out: asking inside the container, as
// testcontainers does, starts processes there time and again, which costs more than the
// server's own start.
func waitForLog(line string, times int) testcontainers.CustomizeRequestOption {
	return testcontainers.WithWaitStrategyAndDeadline(startTimeout, wait.ForLog(line).WithOccurrence(times).WithStartupTimeout(startTimeout))
}

// containerURL waits until the server that listens on the container's port is
// ready, and returns the URL that reaches it and its version.
func containerURL(ctx context.Context, c testcontainers.Container, port string) (dsn, version string, err error) {
	endpoint, err := c.PortEndpoint(ctx, port, "")
	if err != nil {
		return "", "", err
	}
	dsn = endpointURL(endpoint)
	version, err = waitReady(ctx, dsn, nil)
	return dsn, version, err
}

func endpointURL(endpoint string) string {
	return "postgres://postgres@" + endpoint + "/postgres?sslmode=disable"
}

// directURL returns the URL of the container's own address, or published where its network
// is none of this machine's, as with a virtual machine between, or another of that address.
func directURL(ctx context.Context, c testcontainers.Container, published string) string {
	ip, err := c.ContainerIP(ctx)
	if err != nil || !isNear(ip) {
		return published
	}
	direct := endpointURL(net.JoinHostPort(ip, "5432"))
	const identity = "SELECT system_identifier FROM pg_control_system()"
	want, err := ask[int64](ctx, published, identity)
	if err != nil {
		return published
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // what is sent to another's network may be dropped
	defer cancel()
	if got, err := ask[int64](ctx, direct, identity); err != nil || got != want {
		return published
	}
	return direct
}

// failedContainer adds the end of the container's log to err and removes it.
func failedContainer(ctx context.Context, c testcontainers.Container, err error) error {
	if reflect.ValueOf(c).IsNil() { // it was not even created
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if r, logErr := c.Logs(ctx); logErr == nil {
		output, _ := io.ReadAll(r) // part of a log is better than none
		r.Close()
		err = fmt.Errorf("%w: %s", err, tail(output))
	}
	return errors.Join(err, terminate(c))
}

// terminate kills the container, its data being worthless, and removes it.
func terminate(c testcontainers.Container) error {
	return testcontainers.TerminateContainer(c, testcontainers.StopTimeout(0))
}
