package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// roleVariable has this program be a worker or a booker. Its value is a spec.
const roleVariable = "OUTBOX_CHAOS_ROLE"

// spec is what the driver tells a process that it starts.
type spec struct {
	Role     string // "worker" or "booker"
	Name     string // of this life: no other has it
	URL      string
	Journal  string
	Provider string // host:port
	Seed     uint64 // of this life
	Sends    uint64 // the seed by which senders and the provider misbehave
	Epoch    time.Time
	Plan     plan
	Calm     bool   // no misbehaving
	Broken   string // one of breaks; "" is none

	Delivery    relay.Delivery
	Reconcile   bool
	Lease       time.Duration
	Concurrency int
	BatchSize   int
	MaxAttempts int

	Serializable bool
}

// plan is what is to become of a process: at the Nth time of a moment it is killed, or
// frozen for Freeze.
type plan struct {
	At     string
	N      int
	Freeze time.Duration
}

// child is such a process.
type child struct {
	spec
	journal *ledger.Journal
	pool    *pgxpool.Pool
	count   atomic.Int64 // of the moment of the plan

	pulse pulse
}

// runChild is all that such a process does. It ends with its standard input, that is with the driver.
func runChild(text string) int {
	var c child
	if err := c.run(text); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
		return 1
	}
	return 0
}

func (c *child) run(text string) (err error) {
	if err := json.Unmarshal([]byte(text), &c.spec); err != nil {
		return err
	}
	if c.journal, err = ledger.Create(c.Journal); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cfg, err := pgxpool.ParseConfig(c.URL)
	if err != nil {
		return err
	}
	cfg.MaxConns = 4
	cfg.ConnConfig.ConnectTimeout = 2 * time.Second
	cfg.ConnConfig.RuntimeParams["application_name"] = c.Name
	cfg.ConnConfig.Tracer = tracer{c}
	dial := cfg.ConnConfig.DialFunc
	cfg.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &wire{Conn: conn}, nil
	}
	if c.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return err
	}
	go c.listen()
	go c.heartbeat()
	if c.Role == "worker" {
		return c.deliver(ctx)
	}
	return c.book(ctx)
}

func (c *child) store() (*outbox.PGStore, error) {
	return outbox.NewPGStore(c.pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
}

// listen obeys the driver: "hold 500" takes all connections of the pool for so many
// milliseconds.
func (c *child) listen() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		word, number, _ := strings.Cut(lines.Text(), " ")
		ms, err := strconv.Atoi(number)
		if word == "hold" && err == nil {
			go c.hold(time.Duration(ms) * time.Millisecond)
		}
	}
	os.Exit(3)
}

func (c *child) hold(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	from := time.Now()
	for range c.pool.Config().MaxConns {
		conn, err := c.pool.Acquire(ctx)
		if err != nil {
			return // some were in use all the time: it was not exhausted by us
		}
		defer conn.Release()
	}
	<-ctx.Done()
	c.fault(ledger.Fault{Kind: "pool exhausted", From: from})
}

// heartbeat notes when the machine let the process stand still, which nobody injected.
func (c *child) heartbeat() {
	for ; ; <-time.After(beat) {
		c.beat()
	}
}

// beat notes a stall that is just over.
func (c *child) beat() {
	c.pulse.beat(func(from time.Time) {
		c.fault(ledger.Fault{Kind: "stall of a process", From: from, Observed: true, Halts: true})
	})
}

// fault notes a fault of this process that is just over.
func (c *child) fault(f ledger.Fault) {
	f.To = time.Now()
	if f.From.IsZero() {
		f.From = f.To
	}
	if f.Worker == "" {
		f.Worker = c.Name
	}
	if err := c.journal.Note(ledger.Record{Fault: &f}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// moment is called at each moment that a plan may be for.
func (c *child) moment(name string) {
	if c.due(name) {
		c.strike(name)
	}
}

// due reports whether this is the moment of the plan.
func (c *child) due(name string) bool {
	return c.Plan.At == name && int(c.count.Add(1)) == c.Plan.N
}

// strike carries out the plan.
func (c *child) strike(name string) {
	self := os.Getpid()
	c.beat() // the heartbeat may not get to it, if this is the first to wake from a stall
	if c.Plan.Freeze > 0 {
		// The driver notes it: it knows when it is over.
		fmt.Printf("freeze %d %s %s\n", c.Plan.Freeze.Milliseconds(), c.Role, name)
		if err := syscall.Kill(self, syscall.SIGSTOP); err != nil {
			panic(err)
		}
		return
	}
	c.fault(ledger.Fault{Kind: "kill -9 of a " + c.Role + " " + name, Kills: true})
	if err := syscall.Kill(self, syscall.SIGKILL); err != nil {
		panic(err)
	}
	select {}
}

// tracer tells the wire what is about to be written.
type tracer struct{ c *child }

func (tracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (tracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (tracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {
}
func (tracer) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// TraceBatchStart arms the connection if the plan is for the statement that begins.
func (t tracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	what := statementOf(data.Batch)
	for _, m := range wireModes {
		name := "with a " + what + " " + string(m)
		if t.c.due(name) {
			conn.PgConn().Conn().(*wire).arm(executes, m, func(*wire) { t.c.strike(name) })
		}
	}
	return ctx
}

// statementOf tells statements of the library apart, by what one of them alone has; "" is any other.
func statementOf(batch *pgx.Batch) string {
	sql := batch.QueuedQueries[len(batch.QueuedQueries)-1].SQL
	switch {
	case strings.Contains(sql, "retry_in"):
		return "settle"
	case strings.Contains(sql, "due AS MATERIALIZED"):
		return "claim"
	case strings.Contains(sql, "lease_until = pg_catalog.clock_timestamp()"):
		return "renewal"
	}
	return ""
}

// sqlState is the SQLSTATE of an error, "" if it has none.
func sqlState(err error) string {
	var pg interface{ SQLState() string }
	if errors.As(err, &pg) {
		return pg.SQLState()
	}
	return ""
}
