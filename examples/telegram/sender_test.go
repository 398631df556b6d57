package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"text/template"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

const (
	testSecret = "AAF-not_a_Secret0123456789abcdefghij"
	testToken  = "123456:" + testSecret
	testChat   = int64(42)
	backoff    = time.Second
)

// oneRow is a relay's queue of one notification. It takes note of how that is settled.
type oneRow struct {
	mu      sync.Mutex
	n       outbox.Notification
	claimed bool
	settled []outbox.Settlement
}

func (q *oneRow) Claim(context.Context, outbox.ClaimOptions) (res outbox.ClaimResult, _ error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.claimed {
		q.claimed = true
		q.n.Attempts++
		res.Claimed = []outbox.Claimed{{Lease: outbox.Lease{ID: 1, Token: outbox.NewToken()}, Notification: q.n}}
	}
	return res, nil
}

func (q *oneRow) Extend(_ context.Context, leases []outbox.Lease, _ time.Duration) ([]outbox.LeaseResult, error) {
	return allDone(len(leases)), nil
}

func (q *oneRow) Settle(_ context.Context, settlements []outbox.Settlement) ([]outbox.LeaseResult, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.settled = append(q.settled, settlements...)
	return allDone(len(settlements)), nil
}

func allDone(n int) []outbox.LeaseResult {
	results := make([]outbox.LeaseResult, n)
	for i := range results {
		results[i] = outbox.LeaseDone
	}
	return results
}

// deliver has a relay deliver n and returns how it settled the row: the verdict on
// an error is what the relay makes of it. Neither that nor the log may hold the token.
func deliver(t *testing.T, sender relay.Sender, n outbox.Notification) outbox.Settlement {
	t.Helper()
	var log bytes.Buffer
	q := &oneRow{n: n}
	r, err := relay.New(q, sender, relay.Config{
		Backoff: func(int) time.Duration { return backoff },
		Logger:  slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	require.NoError(t, err)
	settled, err := r.RunOnce(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, settled)
	require.Len(t, q.settled, 1)
	st := q.settled[0]
	st.Lease = outbox.Lease{}
	require.NotContains(t, st.Error+st.Receipt+log.String(), testSecret)
	return st
}

// serve starts a server for the length of a test.
func serve(t *testing.T, handler http.Handler) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server
}

func newTestSender(t *testing.T, baseURL string, client *http.Client) *Sender {
	t.Helper()
	templates := template.Must(template.New("greeting.tmpl").Parse("Hello {{.name}}"))
	s, err := NewSender(SenderConfig{Token: testToken, Templates: templates, BaseURL: baseURL, Client: client,
		Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return s
}

// newStandIn returns a stand-in with an open chat and a sender to it.
func newStandIn(t *testing.T) (*botAPI, *Sender) {
	t.Helper()
	api := newBotAPI(testToken)
	api.change(testChat, func(*chat) {})
	server := serve(t, api)
	return api, newTestSender(t, server.URL, server.Client())
}

func greeting(name string) outbox.Notification {
	return outbox.Notification{ID: 1, Type: "greeting", CandidateTgID: testChat, RecruiterTgID: 7,
		Payload: json.RawMessage(fmt.Sprintf(`{"name": %q}`, name)), Status: outbox.StatusPending, Version: 1}
}

// superseded is a greeting whose first version became message 1.
func superseded(name string) outbox.Notification {
	n := greeting(name)
	n.Version, n.SentVersion, n.Receipt = 2, 1, `{"chat_id":42,"message_id":1}`
	return n
}

// texts returns what is in a chat.
func (a *botAPI) texts(id int64) (texts []string) {
	a.change(id, func(c *chat) {
		for _, m := range c.messages {
			switch {
			case m.deleted:
				texts = append(texts, "(deleted)")
			case m.edited:
				texts = append(texts, m.text+" (edited)")
			default:
				texts = append(texts, m.text)
			}
		}
	})
	return texts
}

func TestSender_sends_to_the_candidate_else_to_the_recruiter(t *testing.T) {
	t.Parallel()
	api, sender := newStandIn(t)
	api.change(7, func(*chat) {})

	n := greeting("Anna")
	require.Equal(t, outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":1}`}, deliver(t, sender, n))
	n.CandidateTgID = 0
	require.Equal(t, outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":7,"message_id":1}`}, deliver(t, sender, n))
	n.RecruiterTgID = 0
	require.Equal(t, outbox.Settlement{Verdict: outbox.Failed, Error: "telegram: neither a candidate nor a recruiter to send to"}, deliver(t, sender, n))

	require.Equal(t, []string{"Hello Anna"}, api.texts(testChat))
	require.Equal(t, []string{"Hello Anna"}, api.texts(7))
}

func TestSender_tells_the_relay_what_an_answer_means(t *testing.T) {
	t.Parallel()
	const html = "<html><title>502 Bad Gateway</title></html>"
	tests := []struct {
		name   string
		status int
		body   string
		want   outbox.Settlement
	}{
		{"429", 429, `{"ok":false,"error_code":429,"description":"Too Many Requests: retry after 5","parameters":{"retry_after":5}}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: 5 * time.Second, Error: "retry after 5"}},
		{"429 without parameters", 429, `{"ok":false,"error_code":429,"description":"Too Many Requests"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "Too Many Requests"}},
		{"chat not found", 400, `{"ok":false,"error_code":400,"description":"Bad Request: chat not found"}`,
			outbox.Settlement{Verdict: outbox.Failed, Error: "chat not found"}},
		{"blocked", 403, `{"ok":false,"error_code":403,"description":"Forbidden: bot was blocked by the user"}`,
			outbox.Settlement{Verdict: outbox.Failed, Error: "bot was blocked"}},
		{"wrong token", 401, `{"ok":false,"error_code":401,"description":"Unauthorized"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "Unauthorized"}},
		{"malformed token", 404, `{"ok":false,"error_code":404,"description":"Not Found"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "Not Found"}},
		{"500", 500, `{"ok":false,"error_code":500,"description":"Internal Server Error: restart"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "500 Internal Server Error: restart"}},
		{"502", 502, `{"ok":false,"error_code":502,"description":"Bad Gateway"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "502 Bad Gateway"}},
		{"504", 504, `{"ok":false,"error_code":504,"description":"Gateway Timeout"}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "HTTP 504"}},
		{"502 from a proxy", 502, html,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "HTTP 502"}},
		{"403 from a proxy", 403, html,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "HTTP 403 Forbidden, not from the Bot API"}},
		{"a page of somebody else's", 200, html,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "HTTP 200"}},
		{"JSON of somebody else's", 200, `["hello"]`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "HTTP 200"}},
		{"sent, but not in the form expected", 200, `{"ok":true,"result":{"message_id":"one"}}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "decode response result"}},
		{"sent, without a result", 200, `{"ok":true}`,
			outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true, Error: "decode response result"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				io.WriteString(w, tt.body)
			}))
			got := deliver(t, newTestSender(t, server.URL, server.Client()), greeting("Anna"))
			require.Contains(t, got.Error, tt.want.Error)
			require.NotContains(t, got.Error, "<html>")
			got.Error, tt.want.Error = "", ""
			require.Equal(t, tt.want, got)
		})
	}
}

// hangUp closes the connection of a request without an answer.
func hangUp(t *testing.T, w http.ResponseWriter, reset bool) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	if reset {
		conn.(*net.TCPConn).SetLinger(0)
	}
	conn.Close()
}

func TestSender_says_that_the_outcome_is_unknown_once_the_request_may_be_out(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		fault    func(w http.ResponseWriter, r *http.Request)
		err      string
		patience time.Duration // from when the request is out; 0: endless
	}{
		{"closed", func(w http.ResponseWriter, _ *http.Request) { hangUp(t, w, false) }, "EOF", 0},
		{"reset", func(w http.ResponseWriter, _ *http.Request) { hangUp(t, w, true) }, "connection reset", 0},
		{"no answer in time", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "timeout awaiting response headers", 20 * time.Millisecond},
		{"answer cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, `{"ok":true,`)
		}, "unexpected EOF", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				tt.fault(w, r)
			}))
			server.Client().Transport.(*http.Transport).ResponseHeaderTimeout = tt.patience
			st := deliver(t, newTestSender(t, server.URL, server.Client()), greeting("Anna"))
			require.Contains(t, st.Error, "no answer, it may have been accepted: ")
			require.Contains(t, st.Error, tt.err)
			st.Error = ""
			require.Equal(t, outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Unknown: true}, st)
		})
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestSender_knows_that_nothing_was_sent_without_a_connection(t *testing.T) {
	t.Parallel()
	const nobody = "http://127.0.0.1:1"
	slow := &http.Transport{DialContext: (&net.Dialer{Deadline: time.Unix(1, 0)}).DialContext}

	for name, client := range map[string]*http.Client{"refused": nil, "timeout": {Transport: slow}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st := deliver(t, newTestSender(t, nobody, client), greeting("Anna"))
			require.Contains(t, st.Error, "not sent: dial tcp")
			st.Error = ""
			require.Equal(t, outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff}, st)
		})
	}
}

func TestSender_makes_requests_that_can_be_repeated_on_another_connection(t *testing.T) {
	t.Parallel()
	var req *http.Request
	sender := newTestSender(t, "http://127.0.0.1", &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		req = r
		return nil, io.EOF
	})})
	_, err := sender.Send(t.Context(), greeting("Anna"))
	require.ErrorIs(t, err, io.EOF)
	require.NotNil(t, req.GetBody)
	require.Positive(t, req.ContentLength)
}

func TestSender_edits_what_was_superseded(t *testing.T) {
	t.Parallel()
	const first, moved = "Hello Anna", int64(-1000000000042)
	tests := []struct {
		name    string
		before  func(*chat)                // after the first message
		n       func(*outbox.Notification) // of the second version
		want    outbox.Settlement
		texts   []string // in the chat, at the end
		elseAt  int64    // another chat, and what is in there
		elseAre []string
	}{
		{name: "edited",
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":1}`},
			texts: []string{"Hello Boris (edited)"}},
		{name: "not modified", n: func(n *outbox.Notification) { n.Payload = json.RawMessage(`{"name":"Anna", "age": 30}`) },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":1}`},
			texts: []string{first}},
		{name: "deleted", before: func(c *chat) { c.messages[0].deleted = true },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{"(deleted)", "Hello Boris"}},
		{name: "can't be edited", before: func(c *chat) { c.messages[0].locked = true },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "MESSAGE_ID_INVALID", before: func(c *chat) { c.next = []apiError{*badRequest("MESSAGE_ID_INVALID")} },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "the chat moved since", before: func(c *chat) { c.movedTo = moved },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":-1000000000042,"message_id":1,"migrated_from":42}`},
			texts: []string{first}, elseAt: moved, elseAre: []string{"Hello Boris"}},
		{name: "the chat had moved before", n: func(n *outbox.Notification) {
			n.CandidateTgID, n.Receipt = 41, `{"chat_id":42,"message_id":1,"migrated_from":41}`
		},
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":1,"migrated_from":41}`},
			texts: []string{"Hello Boris (edited)"}},
		{name: "for another recruiter", n: func(n *outbox.Notification) { n.CandidateTgID = 0 },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":7,"message_id":1}`},
			texts: []string{first}, elseAt: 7, elseAre: []string{"Hello Boris"}},
		{name: "requeued to be sent again", n: func(n *outbox.Notification) { n.SentVersion = 2 },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "purged receipt", n: func(n *outbox.Notification) { n.Receipt = "" },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "another's receipt", n: func(n *outbox.Notification) { n.Receipt = "message 1" },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "half a receipt", n: func(n *outbox.Notification) { n.Receipt = `{"chat_id":42}` },
			want:  outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":2}`},
			texts: []string{first, "Hello Boris"}},
		{name: "429", before: func(c *chat) { c.next = []apiError{tooManyRequests(5)} },
			want:  outbox.Settlement{Verdict: outbox.Retry, RetryIn: 5 * time.Second, Error: "telegram: too many requests, Too Many Requests: retry after 5: retry_after 5"},
			texts: []string{first}},
		{name: "blocked", before: func(c *chat) { c.blocked = true },
			want:  outbox.Settlement{Verdict: outbox.Failed, Error: "telegram: forbidden, Forbidden: bot was blocked by the user"},
			texts: []string{first}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			api, sender := newStandIn(t)
			api.change(7, func(*chat) {})
			api.change(moved, func(*chat) {})
			require.Equal(t, outbox.Delivered, deliver(t, sender, greeting("Anna")).Verdict)
			if tt.before != nil {
				api.change(testChat, tt.before)
			}
			n := superseded("Boris")
			if tt.n != nil {
				tt.n(&n)
			}
			require.Equal(t, tt.want, deliver(t, sender, n))
			require.Equal(t, tt.texts, api.texts(testChat))
			if tt.elseAt != 0 {
				require.Equal(t, tt.elseAre, api.texts(tt.elseAt))
			}
		})
	}
}

func TestSender_may_repeat_an_edit_whose_outcome_is_unknown(t *testing.T) {
	t.Parallel()
	api := newBotAPI(testToken)
	api.change(testChat, func(c *chat) { c.messages = []*message{{text: "Hello Anna"}} })
	var requests int
	server := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests++; requests == 1 {
			api.ServeHTTP(httptest.NewRecorder(), r)
			hangUp(t, w, false)
			return
		}
		api.ServeHTTP(w, r)
	}))
	sender := newTestSender(t, server.URL, server.Client())

	st := deliver(t, sender, superseded("Boris"))
	require.Contains(t, st.Error, "it may have been accepted")
	require.Equal(t, outbox.Retry, st.Verdict)
	require.False(t, st.Unknown)
	require.Equal(t, outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":42,"message_id":1}`}, deliver(t, sender, superseded("Boris")))
	require.Equal(t, []string{"Hello Boris (edited)"}, api.texts(testChat))
}

func TestSender_follows_a_group_that_became_a_supergroup(t *testing.T) {
	t.Parallel()
	api, sender := newStandIn(t)
	const moved = int64(-1000000000042)
	api.change(testChat, func(c *chat) { c.movedTo = moved })
	api.change(moved, func(*chat) {})
	require.Equal(t, outbox.Settlement{Verdict: outbox.Delivered, Receipt: `{"chat_id":-1000000000042,"message_id":1,"migrated_from":42}`},
		deliver(t, sender, greeting("all")))

	api.change(moved, func(c *chat) { c.next = []apiError{tooManyRequests(9)} })
	require.Equal(t, 9*time.Second, deliver(t, sender, greeting("all")).RetryIn)

	api.change(moved, func(c *chat) { c.movedTo = testChat }) // in a circle
	require.Equal(t, outbox.Failed, deliver(t, sender, greeting("all")).Verdict)
	require.Equal(t, []string{"Hello all"}, api.texts(moved))
}

func TestSender_renders_the_payload(t *testing.T) {
	t.Parallel()
	api := newBotAPI(testToken)
	api.change(testChat, func(*chat) {})
	server := serve(t, api)
	long := strings.Repeat("я", maxText)
	astral := strings.Repeat("😀", maxText/2) // two code units each

	tests := []struct {
		name, template, payload string
		want, err               string
	}{
		{name: "field", template: "Hello {{.name}}", payload: `{"name":"Anna"}`, want: "Hello Anna"},
		{name: "nothing is escaped", template: "{{.name}}", payload: `{"name":"<b>*Anna*</b> & _co_ \\ 1.5!"}`, want: `<b>*Anna*</b> & _co_ \ 1.5!`},
		{name: "numbers as they are", template: "{{.id}} {{.price}}", payload: `{"id":12345678901234567890,"price":1000000.10}`, want: "12345678901234567890 1000000.10"},
		{name: "optional field", template: `Hi{{with index . "name"}} {{.}}{{end}}`, payload: `{"name":null}`, want: "Hi"},
		{name: "no payload", template: "Hello", want: "Hello"},
		{name: "not an object", template: "{{index . 0}}", payload: `["Anna"]`, want: "Anna"},
		{name: "trimmed", template: "\n  Hello\n", want: "Hello"},
		{name: "longest", template: "{{.name}}", payload: `{"name":"` + long + `"}`, want: long},
		{name: "longest in pairs", template: "{{.name}}", payload: `{"name":"` + astral + `"}`, want: astral},

		{name: "too long", template: "{{.name}}!", payload: `{"name":"` + long + `"}`, err: `the text of a "greeting" is too long: 4097 UTF-16 code units, Telegram takes 4096`},
		{name: "too long in pairs", template: "{{.name}}!", payload: `{"name":"` + astral + `"}`, err: "4097 UTF-16 code units"},
		{name: "missing field", template: "{{.nme}}", payload: `{"name":"Anna"}`, err: `map has no entry for key "nme"`},
		{name: "missing in an object", template: "{{.who.nme}}", payload: `{"who":{"name":"Anna"}}`, err: `map has no entry for key "nme"`},
		{name: "null", template: "{{.name}}", payload: `{"name":null}`, err: `map has no entry for key "name"`},
		{name: "null in a list", template: "{{range .who}}{{.name}}{{end}}", payload: `{"who":[{"name":null}]}`, err: `map has no entry for key "name"`},
		{name: "field without a payload", template: "{{.name}}", err: `map has no entry for key "name"`},
		{name: "field of a string", template: "{{.name}}", payload: `"Anna"`, err: "can't evaluate field name"},
		{name: "empty", template: "{{.name}}", payload: `{"name":" \n"}`, err: `the text of a "greeting" is empty`},
		{name: "payload that is not JSON", template: "Hello", payload: `{`, err: "payload: unexpected EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			api := newBotAPI(testToken)
			api.change(testChat, func(*chat) {})
			server := serve(t, api)
			sender, err := NewSender(SenderConfig{Token: testToken, BaseURL: server.URL, Client: server.Client(),
				Templates: template.Must(template.New("greeting.tmpl").Parse(tt.template))})
			require.NoError(t, err)
			n := greeting("")
			if n.Payload = nil; tt.payload != "" {
				n.Payload = json.RawMessage(tt.payload)
			}
			st := deliver(t, sender, n)
			if tt.err == "" {
				require.Equal(t, outbox.Delivered, st.Verdict, st.Error)
				require.Equal(t, []string{tt.want}, api.texts(testChat))
				return
			}
			require.Equal(t, outbox.Failed, st.Verdict)
			require.Contains(t, st.Error, tt.err)
			require.Empty(t, api.texts(testChat))
		})
	}

	n := greeting("Anna")
	n.Type = "farewell"
	require.Equal(t, outbox.Settlement{Verdict: outbox.Failed, Error: `telegram: no template for the type "farewell"`},
		deliver(t, newTestSender(t, server.URL, server.Client()), n))
}

func TestSender_templates_have_a_field_for_each_type_of_the_example(t *testing.T) {
	t.Parallel()
	templates, err := parseTemplates()
	require.NoError(t, err)
	for _, name := range []string{typeConfirmed, typeRejected, typeReminder, typeDigest} {
		require.NotNil(t, templates.Lookup(name+".tmpl"), name)
	}
}

// everyText returns the text of err and of all that it wraps.
func everyText(err error) string {
	text := fmt.Sprintf("%v %+v %#v\n", err, err, err.Error())
	switch err := any(err).(type) {
	case interface{ Unwrap() error }:
		if inner := err.Unwrap(); inner != nil {
			text += everyText(inner)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range err.Unwrap() {
			text += everyText(inner)
		}
	}
	return text
}

func TestSender_never_tells_the_token(t *testing.T) {
	t.Parallel()
	refused := newTestSender(t, "http://127.0.0.1:1", nil)
	closed := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { hangUp(t, w, false) }))
	for name, sender := range map[string]*Sender{
		"refused": refused,
		"hung up": newTestSender(t, closed.URL, closed.Client()),
		"no TLS":  newTestSender(t, strings.Replace(closed.URL, "http:", "https:", 1), closed.Client()),
	} {
		_, err := sender.Send(t.Context(), greeting("Anna"))
		require.Error(t, err, name)
		require.NotContains(t, everyText(err), testSecret, name)
		_, err = sender.Check(t.Context())
		require.Error(t, err, name)
		require.NotContains(t, everyText(err), testSecret, name)
	}
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", refused, refused, refused), testSecret)

	// What quotes the URL itself is beyond the transport, in whatever way it does.
	quoting := newTestSender(t, "http://127.0.0.1", &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		return nil, fmt.Errorf("via proxy: %s, %s, %q", r.URL, url.QueryEscape(r.URL.String()), r.URL.Path)
	})})
	_, err := quoting.Send(t.Context(), greeting("Anna"))
	require.ErrorContains(t, err, "via proxy: http://127.0.0.1/bot123456:***/sendMessage")
	require.NotContains(t, err.Error(), testSecret)
	require.NotContains(t, deliver(t, quoting, greeting("Anna")).Error, testSecret)
}

func TestSender_follows_no_redirect(t *testing.T) {
	t.Parallel()
	elsewhere := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a request to another host, from %s", r.Referer())
	}))
	server := serve(t, http.RedirectHandler(elsewhere.URL, http.StatusFound))
	st := deliver(t, newTestSender(t, server.URL, server.Client()), greeting("Anna"))
	require.Contains(t, st.Error, "HTTP 302 Found, not from the Bot API")
	require.False(t, st.Unknown)
	require.Equal(t, outbox.Retry, st.Verdict)
}

func TestSender_Check(t *testing.T) {
	t.Parallel()
	api, sender := newStandIn(t)
	name, err := sender.Check(t.Context())
	require.NoError(t, err)
	require.Equal(t, "bookings_bot", name)

	api.token = "123456:another"
	_, err = sender.Check(t.Context())
	require.EqualError(t, err, "telegram: unauthorized, Unauthorized")
	st := deliver(t, sender, greeting("Anna"))
	require.Equal(t, outbox.Settlement{Verdict: outbox.Retry, RetryIn: backoff, Error: "telegram: unauthorized, Unauthorized"}, st)
}

func TestNewSender_refuses(t *testing.T) {
	t.Parallel()
	templates := template.New("")
	for _, token := range []string{"", testSecret, testToken + "\n", " " + testToken, "bot" + testToken, testToken + "/"} {
		_, err := NewSender(SenderConfig{Token: token, Templates: templates})
		require.EqualError(t, err, "telegram: the token is not of the form 123456:ABC-DEF")
	}
	_, err := NewSender(SenderConfig{Token: testToken})
	require.EqualError(t, err, "telegram: no templates")
	for _, base := range []string{"127.0.0.1", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "https:/127.0.0.1"} {
		_, err := NewSender(SenderConfig{Token: testToken, Templates: templates, BaseURL: base})
		require.EqualError(t, err, fmt.Sprintf("telegram: the base URL %q is not of the form https://host", base))
	}
}

func TestSender_ends_with_its_context(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{})
	server := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		close(arrived)
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-arrived
		cancel(errors.New("enough"))
	}()
	_, err := newTestSender(t, server.URL, server.Client()).Send(ctx, greeting("Anna"))
	require.ErrorContains(t, err, "it may have been accepted")
}
