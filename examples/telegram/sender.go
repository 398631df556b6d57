package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"text/template"
	"time"
	"unicode/utf16"

	// Maintained, no dependencies, errors with retry_after and migrate_to_chat_id, any HTTP client.
	"github.com/go-telegram/bot"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// maxText is Telegram's limit of a message's text, in UTF-16 code units.
// https://core.telegram.org/bots/api#sendmessage
const maxText = 4096

// SenderConfig configures a [Sender].
type SenderConfig struct {
	Token string // required: what @BotFather gave

	// Templates has one template for each notification type, named TYPE.tmpl; required.
	// Its dot is the payload. A field that is missing or null is an error; where
	// it is optional, write {{with index . "field"}}. Numbers are [json.Number]s, which print
	// as they are in the payload.
	Templates *template.Template

	BaseURL string       // of the Bot API; "" is Telegram's
	Client  *http.Client // nil is one that gives up connecting after 5 s
	Logger  *slog.Logger // hears of chats that moved (Warn); nil is slog.Default()
}

// Sender delivers notifications through the Telegram Bot API: to the candidate, or
// to the recruiter where there is no candidate. It is safe for concurrent use.
//
// Text is sent without a parse mode, so nothing in a payload needs escaping or can
// be mistaken for markup.
//
// A notification whose earlier version was sent is not sent anew: the message is edited,
// silently, as Telegram does not announce edits. Where it is gone, or went to another
// chat, a new one is sent.
//
// What an error means for the row:
//
//   - no chat, no template, a template that fails, a text too long or empty, 400 (chat not found,
//     ...) and 403 (the bot was blocked, ...): [relay.Permanent];
//   - 429: [relay.RetryAfter] what Telegram asks for;
//   - 401 and 404, a wrong or revoked token, which is not the message's fault: retried, so that
//     the right token delivers what has queued up, up to an hour later by the default backoff.
//     What is out of attempts by then, which by default takes longer than an hour, has failed
//     and can be requeued. [Sender.Check] finds a wrong token at start;
//   - any other answer of the Bot API, such as 500 or 502, and an error before a connection
//     was there: retried;
//   - an error after that, 504, and an answer that is not the Bot API's: [relay.Unknown].
//     An edit is retried then, as editing twice does no harm.
//
// No error holds the token.
type Sender struct {
	bot       *bot.Bot
	templates *template.Template
	scrub     *strings.Replacer
	log       *slog.Logger
}

// What surrounds a secret in a file or variable, such as a line's end, would end up in URLs.
var validToken = regexp.MustCompile(`\A[0-9]+:[A-Za-z0-9_-]+\z`)

// NewSender returns a sender. It calls nobody; see [Sender.Check].
func NewSender(cfg SenderConfig) (*Sender, error) {
	if !validToken.MatchString(cfg.Token) {
		return nil, errors.New("telegram: the token is not of the form 123456:ABC-DEF")
	}
	if cfg.Templates == nil {
		return nil, errors.New("telegram: no templates")
	}
	templates, err := cfg.Templates.Clone()
	if err != nil {
		return nil, fmt.Errorf("telegram: templates: %w", err)
	}
	options := []bot.Option{
		bot.WithSkipGetMe(),
		bot.WithHTTPClient(0, newTransport(cfg.Client)),
		bot.WithErrorsHandler(func(error) {}), // of Close, whose errors have no consequence here; the default prints
	}
	if cfg.BaseURL != "" {
		u, err := url.Parse(cfg.BaseURL)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("telegram: the base URL %q is not of the form https://host", cfg.BaseURL)
		}
		options = append(options, bot.WithServerURL(strings.TrimRight(cfg.BaseURL, "/")))
	}
	b, err := bot.New(cfg.Token, options...)
	if err != nil {
		return nil, fmt.Errorf("telegram: %w", err)
	}
	// The secret is what follows the bot's id, in letters that no encoding changes.
	_, secret, _ := strings.Cut(cfg.Token, ":")
	return &Sender{
		bot:       b,
		templates: templates.Option("missingkey=error"),
		scrub:     strings.NewReplacer(secret, "***"),
		log:       cmp.Or(cfg.Logger, slog.Default()),
	}, nil
}

// Check asks Telegram whose token this is and returns the bot's username. Call it
// at start: with a wrong token every message would fail.
func (s *Sender) Check(ctx context.Context) (username string, err error) {
	me, err := s.bot.GetMe(ctx)
	if err != nil {
		return "", s.report(err)
	}
	return me.Username, nil
}

// Send sends n, or edits the message that an earlier version of n became.
// It implements [relay.Sender]; the receipt says where the message is.
func (s *Sender) Send(ctx context.Context, n outbox.Notification) (string, error) {
	to := cmp.Or(n.CandidateTgID, n.RecruiterTgID)
	if to == 0 {
		return "", relay.Permanent(errors.New("telegram: neither a candidate nor a recruiter to send to"))
	}
	text, err := s.render(n)
	if err != nil {
		return "", relay.Permanent(fmt.Errorf("telegram: %w", err))
	}
	// Where SentVersion is the current version, somebody requeued the row to have it sent again.
	if n.SentVersion > 0 && n.SentVersion < n.Version {
		if r, ok := parseReceipt(n.Receipt); ok && r.isOf(to) {
			gone, err := s.edit(ctx, r, text)
			if err != nil {
				return "", s.report(err)
			}
			if !gone {
				return n.Receipt, nil
			}
		}
	}
	r, err := s.send(ctx, to, text)
	if err != nil {
		return "", s.report(err)
	}
	return r.String(), nil
}

func (s *Sender) send(ctx context.Context, to int64, text string) (receipt, error) {
	r := receipt{ChatID: to}
	msg, err := s.bot.SendMessage(ctx, &bot.SendMessageParams{ChatID: to, Text: text})
	if moved := (*bot.MigrateError)(nil); errors.As(err, &moved) {
		// Each message to the old id costs a request more, until whoever stores it knows.
		s.log.WarnContext(ctx, "telegram: a group became a supergroup, its chat has a new id", "from", to, "to", moved.MigrateToChatID)
		r = receipt{ChatID: int64(moved.MigrateToChatID), MigratedFrom: to}
		msg, err = s.bot.SendMessage(ctx, &bot.SendMessageParams{ChatID: r.ChatID, Text: text})
	}
	if err != nil {
		return receipt{}, verdict(err)
	}
	r.MessageID = msg.ID
	return r, nil
}

// edit gives the message r a new text. gone: there is nothing to edit any more.
func (s *Sender) edit(ctx context.Context, r receipt, text string) (gone bool, err error) {
	_, err = s.bot.EditMessageText(ctx, &bot.EditMessageTextParams{ChatID: r.ChatID, MessageID: r.MessageID, Text: text})
	var moved *bot.MigrateError
	switch {
	case err == nil, refusedAs(err, "message is not modified"):
		return false, nil
	case errors.As(err, &moved), // a supergroup has none of the group's message ids
		refusedAs(err, "message to edit not found"),
		refusedAs(err, "message can't be edited"),
		refusedAs(err, "message_id_invalid"):
		return true, nil
	}
	if outcomeUnknown(err) {
		return false, errors.New(err.Error()) // not relay.Unknown: the same edit may be tried again
	}
	return false, verdict(err)
}

// refusedAs reports whether err is a 400 with this description. The Bot API has no
// codes for its reasons.
func refusedAs(err error, description string) bool {
	return errors.Is(err, bot.ErrorBadRequest) && strings.Contains(strings.ToLower(err.Error()), description)
}

// verdict tells the relay what an error of the client means for the message.
func verdict(err error) error {
	var wait *bot.TooManyRequestsError
	var moved *bot.MigrateError
	switch {
	case errors.As(err, &wait):
		return relay.RetryAfter(err, time.Duration(wait.RetryAfter)*time.Second)
	case errors.Is(err, bot.ErrorBadRequest), errors.Is(err, bot.ErrorForbidden), errors.As(err, &moved):
		return relay.Permanent(err)
	case outcomeUnknown(err):
		return relay.Unknown(err)
	}
	return err
}

// outcomeUnknown reports whether the message may have been accepted in spite of err:
// there was no answer, or one that the client could not read.
func outcomeUnknown(err error) bool {
	var noJSON *json.SyntaxError
	var otherJSON *json.UnmarshalTypeError
	return errors.Is(err, errNoAnswer) || errors.As(err, &noJSON) || errors.As(err, &otherJSON)
}

// render executes the template of n's type.
func (s *Sender) render(n outbox.Notification) (string, error) {
	tmpl := s.templates.Lookup(n.Type + ".tmpl")
	if tmpl == nil {
		return "", fmt.Errorf("no template for the type %q", n.Type)
	}
	data, err := templateData(n.Payload)
	if err != nil {
		return "", fmt.Errorf("payload: %w", err)
	}
	var out strings.Builder
	if err := tmpl.Execute(&out, data); err != nil {
		return "", err
	}
	text := strings.TrimSpace(out.String()) // as Telegram does
	if text == "" {
		return "", fmt.Errorf("the text of a %q is empty", n.Type)
	}
	var units int
	for _, r := range text {
		units += utf16.RuneLen(r)
	}
	if units > maxText {
		return "", fmt.Errorf("the text of a %q is too long: %d UTF-16 code units, Telegram takes %d", n.Type, units, maxText)
	}
	return text, nil
}

func templateData(payload json.RawMessage) (any, error) {
	if payload == nil {
		return map[string]any{}, nil
	}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.UseNumber() // a float64 prints 1000000 as 1e+06
	var data any
	if err := d.Decode(&data); err != nil {
		return nil, err
	}
	return withoutNulls(data), nil
}

// withoutNulls removes the null fields of objects: a template would print
// "<no value>" for one that is there, while one that is not is an error.
func withoutNulls(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, field := range v {
			if field == nil {
				delete(v, key)
			} else {
				withoutNulls(field)
			}
		}
	case []any:
		for _, element := range v {
			withoutNulls(element)
		}
	}
	return v
}

// receipt is where a message is: all that editing it takes.
type receipt struct {
	ChatID    int64 `json:"chat_id"`
	MessageID int   `json:"message_id"`

	// MigratedFrom is the chat that the message was meant for, where that became ChatID.
	MigratedFrom int64 `json:"migrated_from,omitempty"`
}

func (r receipt) String() string {
	text, _ := json.Marshal(r) // cannot fail: numbers
	return string(text)
}

// parseReceipt returns false for what is no receipt of ours, such as "" after a purge.
func parseReceipt(text string) (r receipt, ok bool) {
	err := json.Unmarshal([]byte(text), &r)
	return r, err == nil && r.ChatID != 0 && r.MessageID > 0
}

// isOf reports whether the message was meant for this chat: a row without a candidate
// may have got another recruiter since.
func (r receipt) isOf(chat int64) bool { return chat == r.ChatID || chat == r.MigratedFrom }

// report returns err for the relay, which logs it and keeps it on the row: without
// the token. The transport removes that from the errors of net/http; this is for
// whatever else may quote a URL, a RoundTripper for one.
func (s *Sender) report(err error) error {
	return &redactedError{"telegram: " + s.scrub.Replace(err.Error()), err}
}

// redactedError keeps the verdict in err reachable.
type redactedError struct {
	text string
	err  error
}

func (e *redactedError) Error() string { return e.text }
func (e *redactedError) Unwrap() error { return e.err }
