package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf16"
)

// botAPI stands in for the Telegram Bot API: sendMessage, editMessageText and
// getMe, with the answers that Telegram gives.
type botAPI struct {
	token string

	mu    sync.Mutex
	chats map[int64]*chat
}

type chat struct {
	title    string
	blocked  bool
	movedTo  int64      // 0: nowhere
	next     []apiError // what the next requests for this chat are answered, before anything else
	messages []*message // by their ids from 1
}

type message struct {
	text    string
	edited  bool
	deleted bool
	locked  bool // can't be edited
}

// apiError is an answer that is not ok.
type apiError struct {
	Code        int            `json:"error_code"`
	Description string         `json:"description"`
	Parameters  map[string]any `json:"parameters,omitempty"`
}

func badRequest(reason string) *apiError {
	return &apiError{Code: http.StatusBadRequest, Description: "Bad Request: " + reason}
}

func tooManyRequests(seconds int) apiError {
	return apiError{
		Code:        http.StatusTooManyRequests,
		Description: fmt.Sprintf("Too Many Requests: retry after %d", seconds),
		Parameters:  map[string]any{"retry_after": seconds},
	}
}

func newBotAPI(token string) *botAPI {
	return &botAPI{token: token, chats: make(map[int64]*chat)}
}

// change changes a chat, which is there from then on.
func (a *botAPI) change(id int64, f func(*chat)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.chats[id]
	if !ok {
		c = &chat{}
		a.chats[id] = c
	}
	f(c)
}

// ServeHTTP answers /bot<token>/<method>.
func (a *botAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	result, failure := a.answer(r)
	w.Header().Set("Content-Type", "application/json")
	if failure != nil {
		w.WriteHeader(failure.Code)
		_ = json.NewEncoder(w).Encode(struct {
			OK bool `json:"ok"`
			*apiError
		}{false, failure})
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"ok": true, "result": result})
}

func (a *botAPI) answer(r *http.Request) (result any, failure *apiError) {
	token, method, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/bot"), "/")
	if !ok || !validToken.MatchString(token) {
		return nil, &apiError{Code: http.StatusNotFound, Description: "Not Found"}
	}
	if token != a.token {
		return nil, &apiError{Code: http.StatusUnauthorized, Description: "Unauthorized"}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch method {
	case "getMe":
		return map[string]any{"id": 123456, "is_bot": true, "first_name": "Bookings", "username": "bookings_bot"}, nil
	case "sendMessage":
		return a.send(r)
	case "editMessageText":
		return a.edit(r)
	}
	return nil, &apiError{Code: http.StatusNotFound, Description: "Not Found: method not found"}
}

// open returns the chat that a request is about.
func (a *botAPI) open(r *http.Request) (int64, *chat, *apiError) {
	id, _ := strconv.ParseInt(r.FormValue("chat_id"), 10, 64)
	c, ok := a.chats[id]
	switch {
	case id == 0:
		return 0, nil, badRequest("chat_id is empty")
	case !ok:
		return 0, nil, badRequest("chat not found")
	case len(c.next) > 0:
		failure := c.next[0]
		c.next = c.next[1:]
		return 0, nil, &failure
	case c.movedTo != 0:
		failure := badRequest("group chat was upgraded to a supergroup chat")
		failure.Parameters = map[string]any{"migrate_to_chat_id": c.movedTo}
		return 0, nil, failure
	case c.blocked:
		return 0, nil, &apiError{Code: http.StatusForbidden, Description: "Forbidden: bot was blocked by the user"}
	}
	return id, c, nil
}

func (a *botAPI) send(r *http.Request) (any, *apiError) {
	id, c, failure := a.open(r)
	text := strings.TrimSpace(r.FormValue("text"))
	switch {
	case failure != nil:
		return nil, failure
	case text == "":
		return nil, badRequest("message text is empty")
	case len(utf16.Encode([]rune(text))) > maxText:
		return nil, badRequest("message is too long")
	}
	c.messages = append(c.messages, &message{text: text})
	return c.result(id, len(c.messages)), nil
}

func (a *botAPI) edit(r *http.Request) (any, *apiError) {
	id, c, failure := a.open(r)
	if failure != nil {
		return nil, failure
	}
	number, _ := strconv.Atoi(r.FormValue("message_id"))
	text := strings.TrimSpace(r.FormValue("text"))
	if number == 0 {
		return nil, badRequest("message identifier is not specified")
	}
	if number < 1 || number > len(c.messages) || c.messages[number-1].deleted {
		return nil, badRequest("message to edit not found")
	}
	m := c.messages[number-1]
	switch {
	case m.locked:
		return nil, badRequest("message can't be edited")
	case text == "":
		return nil, badRequest("message text is empty")
	case len(utf16.Encode([]rune(text))) > maxText:
		return nil, badRequest("MESSAGE_TOO_LONG")
	case text == m.text:
		return nil, badRequest("message is not modified: specified new message content and reply markup are exactly the same as a current content and reply markup of the message")
	}
	m.text, m.edited = text, true
	return c.result(id, number), nil
}

// result is a message as the Bot API describes it, with the fields that are never missing.
func (c *chat) result(id int64, number int) map[string]any {
	kind := "private"
	switch {
	case id < -1_000_000_000_000:
		kind = "supergroup"
	case id < 0:
		kind = "group"
	}
	return map[string]any{
		"message_id": number,
		"date":       1_790_000_000,
		"chat":       map[string]any{"id": id, "type": kind},
		"text":       c.messages[number-1].text,
	}
}

// show writes what people see in their chats.
func (a *botAPI) show(w io.Writer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range slices.Backward(slices.Sorted(maps.Keys(a.chats))) {
		c := a.chats[id]
		if c.movedTo != 0 {
			continue
		}
		fmt.Fprintf(w, "  %s (%d)\n", c.title, id)
		if len(c.messages) == 0 {
			fmt.Fprintln(w, "    (empty)")
		}
		for i, m := range c.messages {
			note := ""
			if m.edited {
				note = "  (edited)"
			}
			if !m.deleted {
				fmt.Fprintf(w, "    #%d  %s%s\n", i+1, m.text, note)
			}
		}
	}
}
