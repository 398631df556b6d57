package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/relay"
)

// inbox is the sender to which the relay gives messages. It stands for Telegram:
// it keeps what the chats show, and can be told to refuse or to take its time.
// A sender for the real one is in examples/telegram.
type inbox struct {
	mu       sync.Mutex
	messages []message // in the order in which they appeared
	news     []string  // what happened since takeNews
	down     bool
	blocked  int64 // the candidate who has blocked the bot
	held     *hold // what the next Send has to wait for, if anything
}

// message is one message in the chat with a candidate.
type message struct {
	id       string
	chat     int64
	text     string
	about    outbox.Key
	versions []int64 // those accepted: the first was sent, the others were edits
}

// Send delivers n, as [relay.Sender] has it. The relay tries again after an error,
// unless that is marked as permanent.
func (in *inbox) Send(ctx context.Context, n outbox.Notification) (receipt string, err error) {
	text, err := textOf(n)
	if err != nil {
		return "", relay.Permanent(err) // the next attempt would find the same
	}
	if err := in.wait(ctx); err != nil {
		return "", err
	}

	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.down:
		return "", errors.New("telegram: 502 Bad Gateway")
	case in.blocked == n.CandidateTgID:
		return "", relay.Permanent(errors.New("telegram: 403 Forbidden: bot was blocked by the user"))
	case 0 < n.SentVersion && n.SentVersion < n.Version:
		// An older version is in the chat already: edit that message, send no other.
		return n.Receipt, in.edit(n, text)
	}
	m := message{
		id:       fmt.Sprintf("message %d", len(in.messages)+1),
		chat:     n.CandidateTgID,
		text:     text,
		about:    n.Key(),
		versions: []int64{n.Version},
	}
	in.messages = append(in.messages, m)
	in.news = append(in.news, fmt.Sprintf("candidate %d gets %s: %s", m.chat, m.id, m.text))
	return m.id, nil
}

func (in *inbox) edit(n outbox.Notification, text string) error {
	i := slices.IndexFunc(in.messages, func(m message) bool { return m.id == n.Receipt })
	if i < 0 {
		return relay.Permanent(fmt.Errorf("telegram: 400 Bad Request: no %q to edit", n.Receipt))
	}
	m := &in.messages[i]
	m.text, m.versions = text, append(m.versions, n.Version)
	in.news = append(in.news, fmt.Sprintf("candidate %d sees %s change from version %d to %d: %s",
		m.chat, m.id, n.SentVersion, n.Version, m.text))
	return nil
}

// hold is what a Send waits for in the middle.
type hold struct {
	begun    chan struct{}
	released <-chan struct{}
}

// holdNext makes the next Send wait, from when begun is closed until release is called
// or ctx ends.
func (in *inbox) holdNext(ctx context.Context) (begun <-chan struct{}, release context.CancelFunc) {
	ctx, release = context.WithCancel(ctx)
	h := &hold{begun: make(chan struct{}), released: ctx.Done()}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.held = h
	return h.begun, release
}

func (in *inbox) wait(ctx context.Context) error {
	in.mu.Lock()
	h := in.held
	in.held = nil
	in.mu.Unlock()
	if h == nil {
		return nil
	}
	close(h.begun)
	select {
	case <-h.released:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// setDown says whether Telegram is down.
func (in *inbox) setDown(down bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.down = down
}

// setBlocked says which candidate has blocked the bot; 0: none.
func (in *inbox) setBlocked(candidate int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.blocked = candidate
}

// takeNews returns what happened since it was last called.
func (in *inbox) takeNews() []string {
	in.mu.Lock()
	defer in.mu.Unlock()
	news := in.news
	in.news = nil
	return news
}

// all returns the messages as the chats show them now.
func (in *inbox) all() []message {
	in.mu.Lock()
	defer in.mu.Unlock()
	return slices.Clone(in.messages)
}
