package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
)

// slot is a place for one process at a time. A process that dies is followed by another, at once.
type slot struct {
	r     *round
	role  string
	index int
	proxy *proxy
	rng   *rand.Rand // of the plans

	mu    sync.Mutex
	lives int
	life  *life // nil: none
	stop  bool  // no more
	calm  bool
	over  chan struct{} // closed when the last one has ended
}

// life is one process.
type life struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stderr bytes.Buffer
}

func (r *round) newSlot(role string, index int, rng *rand.Rand) (*slot, error) {
	px, err := r.proxies.open(fmt.Sprintf("%s%d", role, index), r.url)
	if err != nil {
		return nil, err
	}
	return &slot{r: r, role: role, index: index, proxy: px, rng: rng}, nil
}

// through returns the proxy of the process that lives now, or of the next.
func (s *slot) through() *proxy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proxy
}

// reroute leaves a proxy behind that is stuck, with the process that depends on it: the
// next one has another.
func (s *slot) reroute(stuck *proxy) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proxy != stuck {
		return nil
	}
	px, err := s.r.proxies.open(fmt.Sprintf("%s%d", s.role, s.index), s.r.url)
	if err != nil {
		return err
	}
	s.proxy = px
	if l := s.life; l != nil {
		s.kill(l, ledger.Fault{Kind: "kill -9 of a " + s.role + " with a stuck proxy", Observed: true})
	}
	return nil
}

// hangUp closes the slot's proxy, unless that is stuck: then it goes with the program.
func (s *slot) hangUp() { _ = s.through().close() }

// keep has processes follow each other until end is called.
func (s *slot) keep(calm bool) {
	s.mu.Lock()
	s.stop, s.calm, s.over = false, calm, make(chan struct{})
	s.mu.Unlock()
	go func() {
		defer close(s.over)
		for {
			l, err := s.start()
			if err != nil {
				s.r.fail(err)
				return
			}
			if l == nil {
				return
			}
			s.wait(l)
		}
	}()
}

// start starts the next process, or returns nil if there is to be none.
func (s *slot) start() (*life, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stop {
		return nil, nil
	}
	s.lives++
	name := fmt.Sprintf("r%d-%s%d.%d", s.r.number, s.role, s.index, s.lives)
	sp := s.r.spec
	sp.Role, sp.Name, sp.URL = s.role, name, s.proxy.url
	sp.Journal = filepath.Join(s.r.dir, name+".jsonl")
	sp.Seed = s.rng.Uint64()
	sp.Calm = s.calm
	sp.Broken = s.r.opts.broken
	sp.Serializable = s.r.serializable[s.index%len(s.r.serializable)]
	if p := drawPlan(s.role, s.r.spec.Lease, s.rng); !s.calm {
		sp.Plan = p
	}
	text, err := json.Marshal(sp)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l := &life{name: name, cmd: exec.Command(program)}
	l.cmd.Env = append(os.Environ(), roleVariable+"="+string(text))
	l.cmd.Stderr = &l.stderr
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt from the terminal is for us
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if l.stdin, err = l.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := l.cmd.Start(); err != nil {
		return nil, err
	}
	s.life = l
	s.r.begun(s, name)
	s.r.background.Go(func() { s.listen(l, stdout) })
	return l, nil
}

// drawPlan draws what is to become of a process. It draws as often whatever comes out.
func drawPlan(role string, lease time.Duration, rng *rand.Rand) plan {
	moments := []string{"in a transaction", "before COMMIT", "with COMMIT half written", "with COMMIT written", "with COMMIT answered"}
	times := 30
	if role == "worker" {
		moments = nil
		for _, m := range ledger.Moments {
			if m != ledger.MidSettle && m != ledger.MidRenew {
				moments = append(moments, string(m))
			}
		}
		for _, what := range []string{"claim", "settle", "renewal"} {
			for _, m := range wireModes {
				moments = append(moments, "with a "+what+" "+string(m))
			}
		}
		times = 12
	}
	p := plan{At: moments[rng.IntN(len(moments))], N: 1 + rng.IntN(times)}
	if strings.Contains(p.At, "renew") {
		p.N = 1 + p.N/4 // renewals are rare
	}
	freeze, kind := lease+time.Duration(rng.Int64N(int64(lease))), rng.IntN(8)
	switch {
	case kind == 0:
		return plan{} // it lives
	case kind == 1, kind == 2 && role == "worker": // a frozen booker may keep all others waiting
		p.Freeze = freeze
	}
	return p
}

func (s *slot) wait(l *life) {
	err := l.cmd.Wait()
	s.mu.Lock()
	s.life = nil
	stopping := s.stop
	s.mu.Unlock()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status, ok := exit.Sys().(syscall.WaitStatus)
		// The end may have been asked for before the process was ready to heed it.
		if ok && status.Signaled() && (status.Signal() == syscall.SIGKILL || stopping && status.Signal() == syscall.SIGTERM) {
			err = nil
		}
	}
	if err != nil {
		s.r.fail(fmt.Errorf("%s: %w: %s", l.name, err, tail(l.stderr.String())))
	} else if l.stderr.Len() > 0 && os.Getenv("OUTBOX_CHAOS_LOG") != "" {
		fmt.Fprint(os.Stderr, l.stderr.String())
	}
}

func tail(s string) string {
	if len(s) > 4000 {
		s = "... " + s[len(s)-4000:]
	}
	return strings.TrimSpace(s)
}

// listen wakes a process that has frozen itself, when its time is over.
func (s *slot) listen(l *life, stdout io.Reader) {
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		var ms int
		var role, rest string
		if _, err := fmt.Sscanf(lines.Text(), "freeze %d %s", &ms, &role); err != nil {
			continue
		}
		if i := strings.Index(lines.Text(), role); i >= 0 {
			rest = lines.Text()[i:]
		}
		from := time.Now()
		s.r.sleep(time.Duration(ms) * time.Millisecond)
		s.r.note(ledger.Fault{Kind: "SIGSTOP of a " + rest, Worker: l.name, From: from, Halts: true})
		for range 10 { // it may not have stopped yet
			s.signal(l, syscall.SIGCONT)
			<-time.After(10 * time.Millisecond)
		}
	}
}

func (s *slot) signal(l *life, sig syscall.Signal) bool {
	return l.cmd.Process.Signal(sig) == nil
}

// kill kills a process that lives, and notes it.
func (s *slot) kill(l *life, f ledger.Fault) {
	stalled := s.r.pulse.stalled()
	f.Worker, f.From, f.Kills = l.name, time.Now(), true
	if !s.signal(l, syscall.SIGKILL) {
		return
	}
	f.To = time.Now()
	records := []ledger.Record{{Fault: &f}}
	if !stalled.IsZero() {
		records = append(records, ledger.Record{Fault: &ledger.Fault{
			Kind: "stall of a process", Worker: l.name, From: stalled, To: f.To, Observed: true, Halts: true}})
	}
	s.r.write(records...)
}

// current is the process that lives now, if any.
func (s *slot) current() *life {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.life
}

// end asks the process to end in order, kills it if it does not, and returns when none is left.
func (s *slot) end(patience time.Duration) {
	s.mu.Lock()
	s.stop = true
	l, over, calm := s.life, s.over, s.calm
	s.mu.Unlock()
	if over == nil {
		return
	}
	timeout := time.After(patience)
	for {
		if l != nil {
			s.signal(l, syscall.SIGCONT)
			s.signal(l, syscall.SIGTERM)
		}
		select {
		case <-over:
			return
		case <-timeout:
			if l != nil {
				if calm { // nothing happens to it that could keep it
					s.r.fail(fmt.Errorf("%s did not end within %v of SIGTERM", l.name, patience))
				}
				s.kill(l, ledger.Fault{Kind: "kill -9 of a " + s.role + " that did not end", Observed: true})
			}
			<-over
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
}
