// Command telegram delivers notifications through the Telegram Bot API. sender.go and
// transport.go are what a service would copy, with templates of its own; demo.go shows how
// it is run.
//
//	go -C examples/telegram run .
//
// (a module of its own, for the sake of the client library) sends to a local stand-in of the
// Bot API that answers as Telegram does on a bad day, and shows what the outbox holds and
// what people see in their chats.
//
//	TELEGRAM_BOT_TOKEN=123456:ABC-DEF TELEGRAM_CHAT_ID=42 go -C examples/telegram run .
//
// sends two messages in earnest and edits one of them. Whoever is in that chat must
// have written to the bot, or added it, before.
//
// Either way it starts a throwaway PostgreSQL, in Docker or from installed binaries;
// with DATABASE_URL it uses that database, in a schema of its own that it drops at the end.
package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

//go:embed templates
var templateFiles embed.FS

// parseTemplates returns one template for each type of notification.
func parseTemplates() (*template.Template, error) {
	return template.ParseFS(templateFiles, "templates/*.tmpl")
}

// options is what the environment says.
type options struct {
	databaseURL   string // "": a throwaway server
	token, chatID string // both "": the stand-in
	apiURL        string // of the Bot API; "": Telegram's
}

func main() {
	// Else a reader that goes away, as in "| head", would end us before the cleanup.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, options{
		databaseURL: os.Getenv("DATABASE_URL"),
		token:       os.Getenv("TELEGRAM_BOT_TOKEN"),
		chatID:      os.Getenv("TELEGRAM_CHAT_ID"),
	}, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code. It cleans up also when ctx ends.
func run(ctx context.Context, opts options, stdout, stderr io.Writer) (code int) {
	report := func(err error) {
		if err != nil {
			code = 1
			if ctx.Err() != nil {
				err = context.Cause(ctx) // and not what followed from it
			}
			fmt.Fprintln(stderr, "telegram:", strings.Join(strings.Fields(err.Error()), " "))
		}
	}
	d := &demo{out: stdout, schema: "public", log: slog.New(slog.NewTextHandler(stderr, nil))}
	stop, err := d.connect(ctx, opts)
	if err != nil {
		report(err)
		return code
	}
	defer stop()

	url, schema := opts.databaseURL, ""
	if url == "" {
		fmt.Fprintln(stderr, "starting a throwaway PostgreSQL")
		server, err := pgserver.Start(ctx, pgserver.Options{
			Logf: func(format string, args ...any) { fmt.Fprintf(stderr, format+"\n", args...) },
		})
		if err != nil {
			report(err)
			return code
		}
		defer func() { report(server.Stop()) }()
		fmt.Fprintf(stderr, "on %s\n\n", server.Kind)
		url = server.URL
	} else {
		schema = fmt.Sprintf("outbox_example_%06x", rand.N(1<<24))
	}
	d.pool, err = pgxpool.New(ctx, url)
	if err != nil {
		report(errors.New("DATABASE_URL: not of the form postgres://user:password@host:5432/database")) // the error may quote the password
		return code
	}
	defer d.pool.Close()
	if schema != "" {
		if err := d.exec(ctx, "CREATE SCHEMA "+schema); err != nil {
			report(fmt.Errorf("DATABASE_URL: %w", err))
			return code
		}
		defer func() {
			if err := d.exec(ctx, "DROP SCHEMA "+schema+" CASCADE"); err != nil {
				report(fmt.Errorf("the schema %s is left behind: %w", schema, err))
			}
		}()
		d.schema = schema
	}
	report(d.play(ctx))
	return code
}

// connect makes the sender, for Telegram or for the stand-in.
func (d *demo) connect(ctx context.Context, opts options) (stop func(), err error) {
	stop = func() {}
	cfg := SenderConfig{Token: opts.token, BaseURL: opts.apiURL, Logger: d.log}
	if cfg.Templates, err = parseTemplates(); err != nil {
		return nil, err
	}
	switch {
	case opts.token == "" && opts.chatID == "":
		cfg.Token = "123456:not-a-secret"
		d.api = newBotAPI(cfg.Token)
		server := httptest.NewServer(d.api)
		stop = server.Close
		cfg.BaseURL, cfg.Client = server.URL, server.Client()
	case opts.token == "" || opts.chatID == "":
		return nil, errors.New("TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID: only one of them is set")
	default:
		if d.chatID, err = strconv.ParseInt(opts.chatID, 10, 64); err != nil || d.chatID == 0 {
			return nil, fmt.Errorf("TELEGRAM_CHAT_ID: %q is no chat id", opts.chatID)
		}
	}
	if d.sender, err = NewSender(cfg); err == nil {
		d.bot, err = d.sender.Check(ctx)
	}
	if err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// exec runs a statement that ctx does not cut off: it would be unknown what is there.
func (d *demo) exec(ctx context.Context, sql string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	_, err := d.pool.Exec(ctx, sql)
	return err
}

// table is the outbox, quoted and qualified.
func (d *demo) table() string {
	return pgx.Identifier{d.schema, "outbox_notifications"}.Sanitize()
}
