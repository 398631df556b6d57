package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/pgtest"
)

//go:embed testdata/run.txt
var badDay string

func TestMain(m *testing.M) { pgtest.Main(m) }

// schemas lists what schemas are in a database.
func schemas(t *testing.T, db *pgtest.DB) []string {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\_%' ORDER BY 1`)
	require.NoError(t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return names
}

func TestRun(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	before := schemas(t, db)
	var stdout, stderr bytes.Buffer
	require.Zero(t, run(t.Context(), options{databaseURL: db.URL}, &stdout, &stderr), "%s", &stderr)
	require.Equal(t, badDay, stdout.String())
	require.Regexp(t, `\A[^\n]*a group became a supergroup, its chat has a new id" from=-600 to=-1000000000600\n\z`, stderr.String())
	require.Equal(t, before, schemas(t, db))
}

func TestRun_sends_in_earnest_with_a_token(t *testing.T) {
	t.Parallel()
	api := newBotAPI(testToken)
	api.change(testChat, func(*chat) {})
	server := httptest.NewServer(api)
	defer server.Close()
	var stdout, stderr bytes.Buffer
	opts := options{databaseURL: pgtest.NewEmptyDB(t).URL, token: testToken, chatID: "42", apiURL: server.URL}
	require.Zero(t, run(t.Context(), opts, &stdout, &stderr), "%s", &stderr)
	require.Empty(t, stderr.String())
	require.Contains(t, stdout.String(), "2 notifications are in the outbox, for @bookings_bot to deliver.")
	require.NotContains(t, stdout.String(), testSecret)
	// In either order: a relay sends them at the same time.
	require.ElementsMatch(t, []string{
		"Your interview is confirmed: Mon 10:00.",
		"Your interview on Mon 11:00 is cancelled. Reason: position filled. (edited)",
	}, api.texts(testChat))
}

func TestRun_fails_where_Telegram_refuses(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(newBotAPI(testToken)) // without a chat
	defer server.Close()
	var stdout, stderr bytes.Buffer
	opts := options{databaseURL: pgtest.NewEmptyDB(t).URL, token: testToken, chatID: "42", apiURL: server.URL}
	require.Equal(t, 1, run(t.Context(), opts, &stdout, &stderr))
	require.Contains(t, stdout.String(), "Bad Request: chat not found")
	require.Contains(t, stderr.String(), "but it was not accepted")
}

func TestRun_reports_in_one_line_what_is_wrong_with_the_environment(t *testing.T) {
	t.Parallel()
	api := httptest.NewServer(newBotAPI(testToken))
	defer api.Close()
	tests := []struct {
		name string
		opts options
		want string
	}{
		{"no chat", options{token: testToken}, "TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID: only one of them is set"},
		{"no token", options{chatID: "42"}, "TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID: only one of them is set"},
		{"bad chat", options{token: testToken, chatID: "@channel"}, `TELEGRAM_CHAT_ID: "@channel" is no chat id`},
		{"bad token", options{token: testSecret, chatID: "42"}, "telegram: the token is not of the form 123456:ABC-DEF"},
		{"wrong token", options{token: testToken + "x", chatID: "42", apiURL: api.URL}, "telegram: unauthorized, Unauthorized"},
		{"bad database", options{databaseURL: "postgres://user:secret@127.0.0.1:port/db"}, "DATABASE_URL: not of the form"},
		{"no database", options{databaseURL: "postgres://user:secret@127.0.0.1:1/db"}, "connection refused"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stderr bytes.Buffer
			require.Equal(t, 1, run(t.Context(), tt.opts, io.Discard, &stderr))
			require.Regexp(t, `\Atelegram: [^\n]+\n\z`, stderr.String())
			require.Contains(t, stderr.String(), tt.want)
			require.NotContains(t, strings.ToLower(stderr.String()), "secret")
		})
	}
}

// writerFunc is called before each write.
type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestRun_leaves_nothing_behind_wherever_it_is_cancelled(t *testing.T) {
	t.Parallel()
	db := pgtest.NewEmptyDB(t)
	before := schemas(t, db)
	for _, at := range []string{"", "6 notifications", "The first round", "The relay runs", "The chats"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		cut := errors.New("cut off")
		if at == "" {
			cancel(cut)
		}
		var stderr bytes.Buffer
		code := run(ctx, options{databaseURL: db.URL}, writerFunc(func(p []byte) {
			if at != "" && bytes.Contains(p, []byte(at)) {
				cancel(cut)
			}
		}), &stderr)
		cancel(nil)
		require.Equal(t, 1, code, at)
		require.Contains(t, stderr.String(), "telegram: cut off\n", at)
		require.Equal(t, before, schemas(t, db), at)
	}
}
