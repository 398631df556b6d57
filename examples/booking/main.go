// Command booking acts out a day at a booking service whose notifications go
// through the outbox, on a real PostgreSQL, and checks what it prints.
//
//	go run ./examples/booking
//
// starts a throwaway server: in Docker, else from the PostgreSQL that is
// installed. With DATABASE_URL it uses that database, in a schema of its own that
// it drops at the end. It exits 1 if anything is not as it should be.
//
// booking.go is what a service would copy, inbox.go what it would write for its
// provider. day.go puts them and the relay together, scenes.go is the day, and
// check.go compares it with the data.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

func main() {
	// Else a reader that goes away, as in "| head", would end us before the cleanup.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Getenv("DATABASE_URL"), os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code. It cleans up also when ctx ends.
func run(ctx context.Context, databaseURL string, stdout, stderr io.Writer) (code int) {
	report := func(err error) {
		if err != nil {
			code = 1
			fmt.Fprintln(stderr, "booking:", strings.Join(strings.Fields(err.Error()), " "))
		}
	}
	if databaseURL != "" {
		report(onDatabase(ctx, databaseURL, stdout, report))
		return code
	}
	fmt.Fprintln(stderr, "starting a throwaway PostgreSQL")
	server, err := pgserver.Start(ctx, pgserver.Options{
		Logf: func(format string, args ...any) { fmt.Fprintf(stderr, format+"\n", args...) },
	})
	if err != nil {
		report(orCause(ctx, err))
		return code
	}
	defer func() { report(server.Stop()) }()
	fmt.Fprintf(stderr, "on %s\n\n", server.Kind)
	report(onServer(ctx, server.URL, stdout))
	return code
}

// onServer plays the day on a server that is ours, so it cleans nothing up.
func onServer(ctx context.Context, url string, stdout io.Writer) error {
	pool, err := connect(ctx, url)
	if err != nil {
		return orCause(ctx, err)
	}
	defer pool.Close()
	return orCause(ctx, playDay(ctx, pool, "booking", stdout))
}

// onDatabase plays the day in a schema that it creates and drops.
func onDatabase(ctx context.Context, url string, stdout io.Writer, report func(error)) error {
	pool, err := connect(ctx, url)
	if err != nil {
		return orCause(ctx, fmt.Errorf("DATABASE_URL: %w", err))
	}
	defer pool.Close()
	name := fmt.Sprintf("outbox_example_%06x", rand.N(1<<24))
	schema := pgx.Identifier{name}.Sanitize()
	// Neither statement may be cut off by ctx: it would be unknown what is there.
	exec := func(sql string) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		_, err := pool.Exec(ctx, sql)
		return err
	}
	if err := exec("CREATE SCHEMA " + schema); err != nil {
		return fmt.Errorf("DATABASE_URL: creating a schema: %w", err)
	}
	defer func() {
		if err := exec("DROP SCHEMA " + schema + " CASCADE"); err != nil {
			report(fmt.Errorf("the schema %s is left behind: %w", name, err))
		}
	}()
	return orCause(ctx, playDay(ctx, pool, name, stdout))
}

// orCause returns why ctx ended, if it did, instead of the error that followed.
func orCause(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// connect returns a pool that has reached the server. Its errors are of one line
// and never hold the password, which those of the parser may, in parts.
func connect(ctx context.Context, url string) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("not of the form postgres://user:password@host:5432/database, with special characters percent-encoded")
	}
	if !strings.Contains(url, "pool_max_conns") {
		cfg.MaxConns = rushRequests + 3 // the relay claims, settles and renews leases beside them
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("cannot connect to %s as %s: %w", cfg.ConnConfig.Host, cfg.ConnConfig.User, reason(err))
	}
	return pool, nil
}

// reason is the essence of an error of connecting, which otherwise lists what was
// tried at each address, with and without TLS.
func reason(err error) error {
	var refused *pgconn.PgError
	var network net.Error
	switch {
	case errors.As(err, &refused):
		return refused
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("no answer in 10 seconds")
	case errors.As(err, &network):
		return network
	}
	return err
}
