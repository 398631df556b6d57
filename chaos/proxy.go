package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// toxic is what toxiproxy calls a way to spoil a connection.
type toxic struct {
	Name       string         `json:"name"`
	Type       string         `json:"type"`
	Stream     string         `json:"stream"` // upstream or downstream
	Toxicity   float32        `json:"toxicity"`
	Attributes map[string]int `json:"attributes"`
}

// proxy stands between one process and all hosts of its URL.
type proxy struct {
	url     string // through the proxy
	hosts   []*toxiproxy.Proxy
	mu      sync.Mutex
	count   int
	refuses bool
}

// proxies are served by one toxiproxy of this process.
type proxies struct{ server *toxiproxy.ApiServer }

func newProxies() proxies {
	zerolog.SetGlobalLevel(zerolog.Disabled) // some toxics have a logger of their own
	return proxies{toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())}
}

// open starts a proxy for a URL, which may have several hosts.
func (p proxies) open(name, dsn string) (*proxy, error) {
	u, err := url.Parse(dsn)
	if err != nil {
		return nil, err
	}
	px := &proxy{}
	var listen []string
	for i, host := range strings.Split(u.Host, ",") {
		t := toxiproxy.NewProxy(p.server, fmt.Sprintf("%s-%d", name, i), "127.0.0.1:0", host)
		if err := t.Start(); err != nil {
			return nil, err
		}
		px.hosts = append(px.hosts, t)
		listen = append(listen, t.Listen)
	}
	u.Host = strings.Join(listen, ",")
	px.url = u.String()
	return px, nil
}

// spoil adds a toxic for d.
func (p *proxy) spoil(t toxic, d time.Duration) error {
	p.mu.Lock()
	p.count++
	t.Name, t.Toxicity = fmt.Sprintf("%s-%d", t.Type, p.count), 1
	p.mu.Unlock()
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	if err := p.do("adding a toxic", func(host *toxiproxy.Proxy) error {
		_, err := host.Toxics.AddToxicJson(bytes.NewReader(text))
		return err
	}); err != nil {
		return err
	}
	<-time.After(d)
	return p.do("removing a toxic", func(host *toxiproxy.Proxy) error {
		return host.Toxics.RemoveToxic(context.Background(), t.Name)
	})
}

var errStuck = errors.New("toxiproxy has not returned")

// proxyPatience is for what toxiproxy does at once, unless it is stuck.
const proxyPatience = 10 * time.Second

// do calls f for each host, and leaves it behind where it does not return: toxiproxy
// waits for the goroutines of connections, with a lock held and whatever the ctx.
func (p *proxy) do(what string, f func(*toxiproxy.Proxy) error) error {
	return limited(what, func() error {
		for _, host := range p.hosts {
			if err := f(host); err != nil {
				return err
			}
		}
		return nil
	})
}

func limited(what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(proxyPatience)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("%s: %w within %v", what, errStuck, proxyPatience)
	}
}

// refuse closes all connections and takes none for d. It does nothing, and says so,
// while it refuses already.
func (p *proxy) refuse(d time.Duration) (done bool, err error) {
	p.mu.Lock()
	done, p.refuses = !p.refuses, true
	p.mu.Unlock()
	if !done {
		return false, nil
	}
	defer func() {
		p.mu.Lock()
		p.refuses = false
		p.mu.Unlock()
	}()
	if err := p.close(); err != nil {
		return true, err
	}
	<-time.After(d)
	return true, p.do("starting a proxy", (*toxiproxy.Proxy).Start)
}

func (p *proxy) close() error {
	return p.do("stopping a proxy", func(host *toxiproxy.Proxy) error {
		host.Stop()
		return nil
	})
}
