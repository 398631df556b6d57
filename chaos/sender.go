package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

// manner is how one send goes. Sender and provider work it out alike.
type manner string

const (
	well          manner = ""
	panics        manner = "sender panics"
	panicsAfter   manner = "sender panics after the accept"
	exits         manner = "sender ends its goroutine"
	ignoresCtx    manner = "sender ignores its ctx"
	fails         manner = "provider fails"
	refuses       manner = "provider refuses for good"
	asksToWait    manner = "provider asks to wait"
	hangs         manner = "provider hangs"
	acceptsHangs  manner = "provider accepts and hangs"
	cutsBefore    manner = "connection cut before the accept"
	cutsAfter     manner = "connection cut after the accept"
	cutsMidAnswer manner = "connection cut in the middle of the answer"
	slow          manner = "provider is slow"
)

var manners = []manner{
	panics, panicsAfter, exits, ignoresCtx, fails, fails, refuses, asksToWait, hangs, acceptsHangs,
	cutsBefore, cutsAfter, cutsMidAnswer, slow, slow,
}

// harmless reports whether nothing was accepted, so that a repeat is the first. A slow
// provider may be too slow on a busy machine.
func (m manner) harmless() bool {
	switch m {
	case panics, exits, fails, refuses, asksToWait, cutsBefore:
		return true
	}
	return false
}

// mannerOf is how that send goes. One in four does not go well.
func mannerOf(seed uint64, a ledger.Accept) manner {
	h := fnv.New64a()
	fmt.Fprint(h, seed, a.Key, a.Version, a.Attempts)
	n := h.Sum64() >> 8
	if n%4 != 0 {
		return well
	}
	return manners[n/4%uint64(len(manners))]
}

// refused is the error of a provider that refuses for good.
const refused = "refused"

// request is what a sender posts to the provider.
type request struct {
	Accept ledger.Accept
	Calm   bool
}

// provider is the client of the stand-in provider.
type provider struct {
	c      *child
	client http.Client
}

func newProvider(c *child) *provider {
	return &provider{c: c, client: http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
}

// Send implements [relay.Sender].
func (p *provider) Send(ctx context.Context, n outbox.Notification) (string, error) {
	a := ledger.Sending(ctx)
	m := well
	if !p.c.Calm {
		m = mannerOf(p.c.Sends, a)
	}
	note := func() {
		p.c.fault(ledger.Fault{Kind: string(m), Key: n.Key(), From: a.Begun, Message: true, Harmless: m.harmless()})
	}
	switch m {
	case panics:
		note()
		panic("a fault")
	case exits:
		note()
		runtime.Goexit()
	case ignoresCtx:
		<-ctx.Done()
		<-time.After(time.Duration(a.Version%5) * 100 * time.Millisecond)
		defer note()
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
	}
	receipt, err := p.post(ctx, request{a, p.c.Calm})
	if m == panicsAfter && err == nil {
		note()
		panic("a fault")
	}
	return receipt, err
}

func (p *provider) post(ctx context.Context, r request) (receipt string, err error) {
	body, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.c.Provider+"/send", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return "", relay.Unknown(err) // it may have been written
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", relay.Unknown(err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return string(text), nil
	case http.StatusForbidden:
		return "", relay.Permanent(errors.New(refused))
	case http.StatusTooManyRequests:
		ms, err := strconv.Atoi(string(text))
		if err != nil {
			return "", relay.Unknown(err)
		}
		return "", relay.RetryAfter(errors.New("too many requests"), time.Duration(ms)*time.Millisecond)
	default:
		return "", fmt.Errorf("the provider answered %s", resp.Status)
	}
}

// reconciler is a provider that can be asked.
type reconciler struct{ *provider }

// Reconcile implements [relay.Reconciler].
func (r reconciler) Reconcile(ctx context.Context, n outbox.Notification, version int64) (receipt string, delivered bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/accepted?id=%d&version=%d", r.c.Provider, n.ID, version), nil)
	if err != nil {
		return "", false, err
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return "", false, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", false, err
	}
	return string(text), resp.StatusCode == http.StatusOK, nil
}
