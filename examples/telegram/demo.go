package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// What the service notifies people of. Each has a file in templates.
const (
	typeConfirmed = "booking_confirmed"
	typeRejected  = "booking_rejected"
	typeReminder  = "interview_reminder"
	typeDigest    = "daily_digest"
)

// The chats of the stand-in.
const (
	anna      = 5001
	boris     = 5002 // has blocked the bot
	clara     = 5003
	dan       = 5004
	group     = -600
	newGroup  = -1000000000600 // what group has become
	recruiter = 7001
)

type payload map[string]any

type demo struct {
	out    io.Writer
	log    *slog.Logger
	pool   *pgxpool.Pool
	schema string
	store  *outbox.PGStore
	sender *Sender
	bot    string  // the bot's username
	api    *botAPI // nil: the messages go to Telegram
	chatID int64   // where they go there

	change    outbox.NewNotification // to be added while its message is being sent
	changed   outbox.AddResult
	changeErr error
}

// play writes to the outbox, delivers, and shows what became of it.
func (d *demo) play(ctx context.Context) error {
	var err error
	d.store, err = outbox.NewPGStore(d.pool, outbox.Config{Schema: d.schema, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	if err := d.store.Migrate(ctx); err != nil {
		return err
	}
	due := d.forOneChat()
	if d.api != nil {
		due = d.onABadDay()
	}
	err = outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, err := d.store.AddNotifications(ctx, tx, due)
		return err
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "%d notifications are in the outbox, for @%s to deliver.\n\n", len(due), d.bot)

	cfg := relay.Config{
		// Telegram lets a bot send about 30 messages a second, to whomever:
		// https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this
		// Relays of one bot in several processes have to share that out.
		Limiter: rate.NewLimiter(30, 1),
		Logger:  slog.New(slog.DiscardHandler), // a service would hear of what failed; here the table shows it
	}
	if d.api != nil {
		cfg.Backoff = func(int) time.Duration { return 100 * time.Millisecond } // nobody wants to watch the default of 10 s
	}
	r, err := relay.New(d.store, relay.SenderFunc(d.send), cfg)
	if err != nil {
		return err
	}
	settled, err := r.RunOnce(ctx)
	if err := errors.Join(err, d.changeErr); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "The first round settles %d:\n\n", settled)
	if err := d.showRows(ctx); err != nil {
		return err
	}
	if !d.changed.InFlight {
		return fmt.Errorf("the %s was to be changed while it was being sent, but it was not accepted", typeRejected)
	}
	fmt.Fprintf(d.out, "\nThe %s was given a reason while it was being sent: %s, version %d.\n"+
		"The relay runs until nothing is pending:\n\n", typeRejected, d.changed.Outcome, d.changed.Notification.Version)
	if err := d.deliverAll(ctx, r); err != nil {
		return err
	}
	if err := d.showRows(ctx); err != nil {
		return err
	}
	if d.api != nil {
		fmt.Fprint(d.out, "\nThe chats:\n\n")
		d.api.show(d.out)
	}

	// The same once more: somebody pressed the button again.
	var again outbox.AddResult
	err = outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, func(tx pgx.Tx) (err error) {
		again, err = d.store.AddNotification(ctx, tx, d.change)
		return err
	})
	if err != nil {
		return err
	}
	settled, err = r.RunOnce(ctx)
	fmt.Fprintf(d.out, "\nAdded again after it was sent: %s, and %d to deliver.\n", again.Outcome, settled)
	return err
}

// forOneChat is what goes to a chat of Telegram's.
func (d *demo) forOneChat() []outbox.NewNotification {
	d.change = outbox.NewNotification{Type: typeRejected, BookingID: 2, CandidateTgID: d.chatID, Payload: payload{"slot": "Mon 11:00", "reason": "position filled"}}
	return []outbox.NewNotification{
		{Type: typeConfirmed, BookingID: 1, CandidateTgID: d.chatID, Payload: payload{"slot": "Mon 10:00"}},
		{Type: typeRejected, BookingID: 2, CandidateTgID: d.chatID, Payload: payload{"slot": "Mon 11:00"}},
	}
}

// onABadDay has the stand-in give all sorts of trouble to what it returns.
func (d *demo) onABadDay() []outbox.NewNotification {
	for id, title := range map[int64]string{anna: "Anna", boris: "Boris, who has blocked the bot", clara: "Clara", dan: "Dan",
		newGroup: "Trial day, a supergroup now", recruiter: "Recruiter"} {
		d.api.change(id, func(c *chat) { c.title = title })
	}
	d.api.change(boris, func(c *chat) { c.blocked = true })
	d.api.change(group, func(c *chat) { c.title, c.movedTo = "Trial day", newGroup })
	d.api.change(clara, func(c *chat) { c.next = []apiError{tooManyRequests(1)} })
	d.api.change(recruiter, func(c *chat) { c.next = []apiError{{Code: http.StatusBadGateway, Description: "Bad Gateway"}} })

	d.change = outbox.NewNotification{Type: typeRejected, BookingID: 4, CandidateTgID: dan, RecruiterTgID: recruiter,
		Payload: payload{"slot": "Mon 13:00", "reason": "position filled"}}
	return []outbox.NewNotification{
		{Type: typeConfirmed, BookingID: 1, CandidateTgID: anna, RecruiterTgID: recruiter, Payload: payload{"slot": "Mon 10:00"}},
		{Type: typeConfirmed, BookingID: 2, CandidateTgID: boris, RecruiterTgID: recruiter, Payload: payload{"slot": "Mon 11:00"}},
		{Type: typeReminder, BookingID: 3, CandidateTgID: clara, RecruiterTgID: recruiter, Payload: payload{"slot": "Mon 12:00"}},
		{Type: typeRejected, BookingID: 4, CandidateTgID: dan, RecruiterTgID: recruiter, Payload: payload{"slot": "Mon 13:00"}},
		{Type: typeReminder, BookingID: 5, CandidateTgID: group, RecruiterTgID: recruiter, Payload: payload{"slot": "Mon 14:00"}},
		{Type: typeDigest, RecruiterTgID: recruiter, Payload: payload{"interviews": 5}},
	}
}

// send is the sender, during one of whose deliveries the notification is changed:
// Telegram has accepted it, and the relay does not know yet. A row that is sent is final.
func (d *demo) send(ctx context.Context, n outbox.Notification) (string, error) {
	receipt, err := d.sender.Send(ctx, n)
	if err == nil && n.Version == 1 && n.Key() == d.change.Key() {
		d.changeErr = outbox.RunInTx(ctx, d.pool, pgx.TxOptions{}, func(tx pgx.Tx) (err error) {
			d.changed, err = d.store.AddNotification(ctx, tx, d.change)
			return err
		})
	}
	return receipt, err
}

// deliverAll runs the relay until nothing is pending.
func (d *demo) deliverAll(ctx context.Context, r *relay.Relay) error {
	running, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- r.Run(running) }()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		select {
		case err := <-ended:
			return errors.Join(err, ctx.Err())
		case <-look.C:
		}
		var pending int
		err := d.pool.QueryRow(ctx, `SELECT count(*) FROM `+d.table()+` WHERE status = 'pending'`).Scan(&pending)
		if err != nil || pending == 0 {
			stop()
			return errors.Join(err, <-ended)
		}
	}
}

func (d *demo) showRows(ctx context.Context) error {
	rows, err := d.pool.Query(ctx, `SELECT type, coalesce(candidate_tg_id, recruiter_tg_id), status, attempts, version,
		coalesce(sent_version, 0), coalesce(receipt, ''), coalesce(last_error, '') FROM `+d.table()+` ORDER BY id`)
	if err != nil {
		return err
	}
	var buf strings.Builder
	tw := tabwriter.NewWriter(&buf, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  TYPE\tCHAT\tSTATUS\tATTEMPTS\tVERSION\tSENT\tRECEIPT, LAST ERROR")
	var n outbox.Notification
	_, err = pgx.ForEachRow(rows, []any{&n.Type, &n.CandidateTgID, &n.Status, &n.Attempts, &n.Version, &n.SentVersion, &n.Receipt, &n.LastError}, func() error {
		_, err := fmt.Fprintf(tw, "  %s\t%d\t%s\t%d\t%d\t%d\t%s\n", n.Type, n.CandidateTgID, n.Status, n.Attempts, n.Version, n.SentVersion, n.Receipt)
		if err == nil && n.LastError != "" {
			_, err = fmt.Fprintf(tw, "  \t\t\t\t\t\t%s\n", n.LastError)
		}
		return err
	})
	if err := errors.Join(err, tw.Flush()); err != nil {
		return err
	}
	for line := range strings.Lines(buf.String()) {
		fmt.Fprintln(d.out, strings.TrimRight(line, " \n"))
	}
	return nil
}
