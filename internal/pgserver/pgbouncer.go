package pgserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/testcontainers/testcontainers-go"
)

const preparedStatements = "max_prepared_statements = 200\n"

// pgbouncerConfig is an ini file for the server at that address. Trust asks nobody
// for a password but wants to know every user: it looks them up in the server.
func pgbouncerConfig(serverHost string, serverPort int, listenHost string, listenPort int, extra string) string {
	return fmt.Sprintf(`[databases]
* = host=%s port=%d
[pgbouncer]
listen_addr = %s
listen_port = %d
unix_socket_dir =
pool_mode = transaction
auth_type = trust
auth_user = postgres
auth_query = SELECT usename, passwd FROM pg_catalog.pg_shadow WHERE usename = $1
max_client_conn = 500
default_pool_size = 50
ignore_startup_parameters = extra_float_digits
%s`, serverHost, serverPort, listenHost, listenPort, extra)
}

func startPgBouncerContainer(ctx context.Context, server testcontainers.Container, host string, logf func(string, ...any)) (string, func() error, error) {
	cli, err := connectDocker(ctx)
	if err != nil {
		return "", nil, err
	}
	defer cli.Close()
	if err := pgbouncerImage(ctx, cli, logf); err != nil {
		return "", nil, err
	}
	ip, err := server.ContainerIP(ctx)
	if err != nil {
		return "", nil, err
	}
	c, err := testcontainers.Run(ctx, pgbouncerTag,
		append(containerOptions(host, "6432/tcp", "pgbouncer", "/pgbouncer.ini"),
			waitForLog("process up", 1),
			testcontainers.WithFiles(testcontainers.ContainerFile{
				Reader:            strings.NewReader(pgbouncerConfig(ip, 5432, "*", 6432, preparedStatements)),
				ContainerFilePath: "/pgbouncer.ini",
				FileMode:          0o644,
			}))...)
	if err != nil {
		return "", nil, failedContainer(ctx, c, err)
	}
	dsn, _, err := containerURL(ctx, c, "6432/tcp")
	if err != nil {
		return "", nil, failedContainer(ctx, c, err)
	}
	return dsn, sync.OnceValue(func() error { return terminate(c) }), nil
}

func startInstalledPgBouncer(ctx context.Context, serverPort int, logf func(string, ...any)) (_ string, _ func() error, err error) {
	program, err := findPgBouncer()
	if err != nil {
		return "", nil, err
	}
	extra, query := preparedStatements, ""
	if old, err := lacksPreparedStatements(ctx, program); err != nil {
		return "", nil, err
	} else if old {
		logf("%s is older than 1.21: no prepared statements through it", program)
		extra, query = "", "&default_query_exec_mode=cache_describe"
	}

	dir, err := newWorkDir(memoryDir())
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.remove())
		}
	}()
	port, err := freePort()
	if err != nil {
		return "", nil, err
	}
	ini := filepath.Join(dir.path, "pgbouncer.ini")
	config := pgbouncerConfig("127.0.0.1", serverPort, "127.0.0.1", port, extra)
	if err := os.WriteFile(ini, []byte(config), 0o644); err != nil {
		return "", nil, err
	}
	p, err := startProcess(dir.command(program, ini))
	if err != nil {
		return "", nil, err
	}
	url := "postgres://postgres@" + net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) + "/postgres?sslmode=disable" + query
	if _, err := waitReady(ctx, url, p.exited); err != nil {
		err = errors.Join(err, p.kill())
		return "", nil, fmt.Errorf("%w: %s", err, tail(p.log.Bytes()))
	}
	return url, sync.OnceValue(func() error { return errors.Join(p.kill(), dir.remove()) }), nil
}

// findPgBouncer looks in PATH and where packages put it, which PATH may lack.
func findPgBouncer() (string, error) {
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer", "/opt/homebrew/bin/pgbouncer"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("PgBouncer is %w; run: %s", errNoBinaries, installCommand(true))
}

// lacksPreparedStatements says whether the program predates the setting, and
// would refuse it.
func lacksPreparedStatements(ctx context.Context, program string) (bool, error) {
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return false, fmt.Errorf("%s --version: %w", program, err)
	}
	v := versionNumber.FindStringSubmatch(string(out))
	if v == nil {
		return false, fmt.Errorf("%s --version: no version in %q", program, out)
	}
	major, _ := strconv.Atoi(v[1]) // digits, by the expression
	minor, _ := strconv.Atoi(v[2])
	return major == 1 && minor < 21, nil
}
