package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
)

// standIn is the provider: what it accepts is on disk, in its own ledger, before it answers.
type standIn struct {
	seed    uint64
	journal *ledger.Journal
	server  *http.Server
	addr    string
	serving sync.WaitGroup
	down    atomic.Bool // it answers nothing but 503

	mu       sync.Mutex
	receipts map[[2]int64]string // by id and version
	count    int
	err      error
}

// serveProvider serves until close is called.
func serveProvider(seed uint64, journal string) (*standIn, error) {
	j, err := ledger.Create(journal)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &standIn{seed: seed, journal: j, addr: l.Addr().String(), receipts: make(map[[2]int64]string)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /send", s.send)
	mux.HandleFunc("GET /accepted", s.accepted)
	s.server = &http.Server{Handler: mux}
	s.serving.Go(func() { _ = s.server.Serve(l) }) // it ends with close
	return s, nil
}

func (s *standIn) close() error {
	err := s.server.Close()
	s.serving.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return err
}

// busy reports whether it has accepted a message.
func (s *standIn) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count > 0
}

func (s *standIn) failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

func (s *standIn) send(w http.ResponseWriter, r *http.Request) {
	var req request
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest) // its sender was killed
		return
	}
	a := req.Accept
	m := well
	if !req.Calm {
		m = mannerOf(s.seed, a)
	}
	if s.down.Load() {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	}
	if m == well {
		// Its sender may have given up on it, though nobody injected anything.
		defer func() {
			if took := time.Since(a.Begun); took > 100*time.Millisecond || r.Context().Err() != nil {
				f := ledger.Fault{Kind: "stall of a send", Worker: a.Worker, Key: a.Key, From: a.Begun, To: time.Now(), Message: true, Observed: true}
				if err := s.journal.Append(ledger.Record{Fault: &f}); err != nil {
					s.failed(err)
				}
			}
		}()
	}
	note := func(accept bool) {
		var records []ledger.Record
		if accept {
			s.mu.Lock()
			s.count++
			a.Receipt, a.At = "r"+strconv.Itoa(s.count), time.Now()
			s.mu.Unlock()
			records = append(records, ledger.Record{Accept: &a})
		}
		switch m {
		case well, panics, panicsAfter, exits, ignoresCtx: // the sender notes it
		default:
			records = append(records, ledger.Record{Fault: &ledger.Fault{Kind: string(m), Worker: a.Worker, Key: a.Key, From: a.Begun, To: time.Now(), Message: true, Harmless: m.harmless()}})
		}
		if err := s.journal.Append(records...); err != nil {
			s.failed(err)
			panic(http.ErrAbortHandler)
		}
		if accept {
			s.mu.Lock()
			s.receipts[[2]int64{a.ID, a.Version}] = a.Receipt
			s.mu.Unlock()
		}
	}
	hang := func() {
		select {
		case <-r.Context().Done():
		case <-time.After(3 * time.Second):
		}
		panic(http.ErrAbortHandler)
	}
	switch m {
	case fails:
		note(false)
		http.Error(w, "failed", http.StatusInternalServerError)
	case refuses:
		note(false)
		w.WriteHeader(http.StatusForbidden)
	case asksToWait:
		note(false)
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, 50+a.ID%200)
	case hangs:
		note(false)
		hang()
	case cutsBefore:
		note(false)
		panic(http.ErrAbortHandler)
	case acceptsHangs:
		note(true)
		hang()
	case cutsAfter:
		note(true)
		panic(http.ErrAbortHandler)
	case cutsMidAnswer:
		note(true)
		w.Header().Set("Content-Length", strconv.Itoa(len(a.Receipt)))
		_, _ = w.Write([]byte(a.Receipt[:1]))
		panic(http.ErrAbortHandler)
	case slow:
		<-time.After(time.Duration(20+a.ID%200) * time.Millisecond)
		note(true)
		fmt.Fprint(w, a.Receipt)
	default:
		note(true)
		fmt.Fprint(w, a.Receipt)
	}
}

// accepted answers what a Reconciler asks.
func (s *standIn) accepted(w http.ResponseWriter, r *http.Request) {
	id, errID := strconv.ParseInt(r.FormValue("id"), 10, 64)
	version, errVersion := strconv.ParseInt(r.FormValue("version"), 10, 64)
	if errID != nil || errVersion != nil {
		http.Error(w, "bad id or version", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	receipt, ok := s.receipts[[2]int64{id, version}]
	s.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	fmt.Fprint(w, receipt)
}
