package main

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
)

// wireMode is how far a message and its answer get before something happens.
type wireMode string

const (
	halfWritten wireMode = "half written"
	written     wireMode = "written"
	answered    wireMode = "answered" // by the server, and the answer is not read
)

var wireModes = []wireMode{halfWritten, written, answered}

// wire is a connection to the server on which something can happen in the middle of a
// statement.
type wire struct {
	net.Conn

	mu     sync.Mutex
	armed  *trap
	answer func(*wire) // to be called when something has been read
}

type trap struct {
	in   func(write []byte) bool
	mode wireMode
	do   func(*wire)
}

// arm has do called once, in the middle of the next write of which in is true.
func (w *wire) arm(in func(write []byte) bool, mode wireMode, do func(*wire)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = &trap{in, mode, do}
}

// hasCommit reports whether a write has a COMMIT.
func hasCommit(b []byte) bool { return bytes.Contains(b, []byte("commit\x00")) }

// executes reports whether a write has a Bind, and does more than prepare a statement.
// A write begins with a message.
func executes(b []byte) bool {
	for len(b) >= 5 {
		if b[0] == 'B' {
			return true
		}
		n := 1 + int(binary.BigEndian.Uint32(b[1:]))
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return false
}

func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	t := w.armed
	if t == nil || !t.in(b) {
		w.mu.Unlock()
		return w.Conn.Write(b)
	}
	w.armed = nil
	if t.mode == answered {
		w.answer = t.do
	}
	w.mu.Unlock()
	switch t.mode {
	case halfWritten:
		n, err := w.Conn.Write(b[:len(b)/2])
		if err != nil {
			return n, err
		}
		t.do(w)
		rest, err := w.Conn.Write(b[len(b)/2:])
		return n + rest, err
	case written:
		n, err := w.Conn.Write(b)
		t.do(w)
		return n, err
	}
	return w.Conn.Write(b)
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	w.mu.Lock()
	do := w.answer
	if n > 0 {
		w.answer = nil
	}
	w.mu.Unlock()
	if n > 0 && do != nil {
		do(w)
		if _, err := w.Conn.Read(nil); err != nil {
			return 0, err // it was cut: what came does not count
		}
	}
	return n, err
}
