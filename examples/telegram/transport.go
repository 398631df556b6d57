package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync/atomic"
	"time"
)

// maxAnswer bounds what is read of an answer; one to a message has some 20 KB.
const maxAnswer = 1 << 20

// transport makes the requests of the client. It knows what the client cannot tell
// us: whether a request that failed may have reached Telegram.
type transport struct{ client http.Client }

// errNoAnswer is in the errors of requests that may have been carried out.
var errNoAnswer = errors.New("no answer, it may have been accepted")

func newTransport(client *http.Client) *transport {
	t := &transport{client: *cmp.Or(client, defaultClient)}
	// A redirect would tell its target the URL, and so the token, as the referrer.
	t.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return t
}

// defaultClient gives up connecting long before the relay gives up sending: then
// it would not be known whether the message went out.
var defaultClient = func() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 5 * time.Second}).DialContext
	t.TLSHandshakeTimeout = 5 * time.Second
	t.MaxIdleConnsPerHost = 100 // there is one host
	return &http.Client{Transport: t}
}()

// Do returns answers of the Bot API only, be they good or bad.
func (t *transport) Do(orig *http.Request) (*http.Response, error) {
	// The client streams its form, which net/http could not send again where it
	// finds out, before it has written anything, that the server closed an idle connection.
	form, err := io.ReadAll(orig.Body)
	if err != nil {
		return nil, fmt.Errorf("form: %w", err)
	}
	// While a connection is sought, nothing has been written. That may be so again, for a
	// request of which nothing was written to the first connection. A RoundTripper that does not
	// tell leaves it open.
	var seeking atomic.Bool
	ctx := httptrace.WithClientTrace(orig.Context(), &httptrace.ClientTrace{
		GetConn: func(string) { seeking.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { seeking.Store(false) },
	})
	req, err := http.NewRequestWithContext(ctx, orig.Method, orig.URL.String(), bytes.NewReader(form))
	if err != nil {
		return nil, withoutURL(err)
	}
	req.Header = orig.Header

	resp, err := t.client.Do(req)
	if err != nil {
		err = withoutURL(err)
		if seeking.Load() {
			// Only the text: to the relay, a timeout means that the outcome is unknown.
			return nil, errors.New("not sent: " + err.Error())
		}
		return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("%w: HTTP %s: %w", errNoAnswer, resp.Status, err)
	}
	var answer struct {
		OK *bool `json:"ok"`
	}
	fromAPI := json.Unmarshal(body, &answer) == nil && answer.OK != nil
	switch {
	case resp.StatusCode == http.StatusGatewayTimeout, // somebody has it, and may go on with it
		!fromAPI && resp.StatusCode < 300,
		!fromAPI && resp.StatusCode >= 500:
		return nil, fmt.Errorf("%w: HTTP %s", errNoAnswer, resp.Status)
	case !fromAPI: // a proxy, or a redirect, that let nothing through
		return nil, fmt.Errorf("HTTP %s, not from the Bot API", resp.Status)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// withoutURL returns what is in a *url.Error, whose own text has the URL, and so the token.
func withoutURL(err error) error {
	if withURL := (*url.Error)(nil); errors.As(err, &withURL) {
		return withURL.Err
	}
	return err
}
