package main

import (
	"sync"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
)

const (
	beat = 50 * time.Millisecond
	// awake is how long a process may take, after a stall of the machine, to note it.
	awake = 6 * beat
)

// pulse tells a process when it has stood still, which nobody injected.
type pulse struct {
	mu       sync.Mutex
	last     time.Time // beat; zero: none yet
	from, to time.Time // of the last stall
}

// beat calls stalled if the process stood still until now. No other beat returns before
// that has.
func (p *pulse) beat(stalled func(from time.Time)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !p.last.IsZero() && ledger.Between(p.last, now) > 3*beat {
		p.from, p.to = p.last, now
		stalled(p.last)
	}
	p.last = now
}

// stalled is when a stall began of which a process that is hit now may not have come to tell;
// zero: there was none.
func (p *pulse) stalled() time.Time {
	p.beat(func(time.Time) {})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last.Sub(p.to) >= awake {
		return time.Time{}
	}
	return p.from
}
