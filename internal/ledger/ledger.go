// Package ledger proves what became of notifications under faults. Whoever takes part
// writes what happened into a journal of its own: the provider what it accepted,
// callers what they committed, relays what they claimed and settled, the driver which
// faults it injected. [Check] compares all of it with the table against the invariants
// that the outbox promises.
//
// All times are of clocks that agree: one machine's.
package ledger

import (
	"time"

	"github.com/seed3357934d/outbox"
)

// Record is one thing that happened: exactly one of its fields is set.
type Record struct {
	Accept  *Accept  `json:"accept,omitempty"`
	Commit  *Commit  `json:"commit,omitempty"`
	Claimed *Claimed `json:"claimed,omitempty"`
	Settled *Settled `json:"settled,omitempty"`
	Fault   *Fault   `json:"fault,omitempty"`
	Trouble *Trouble `json:"trouble,omitempty"`
	Requeue *Requeue `json:"requeue,omitempty"`
	Purge   *Purge   `json:"purge,omitempty"`
}

// Accept is a message that the provider has accepted. Whether its answer arrived is
// another matter.
type Accept struct {
	Key      outbox.Key `json:"key"`
	ID       int64      `json:"id"` // of the row
	Version  int64      `json:"version"`
	Attempts int        `json:"attempts"`
	Content  string     `json:"content"` // the payload as it was sent
	Receipt  string     `json:"receipt"`
	Worker   string     `json:"worker"`  // the incarnation that sent it, see [Fault]
	Claimed  time.Time  `json:"claimed"` // just before the claim that returned it; zero: not known
	Begun    time.Time  `json:"begun"`   // Send was called
	At       time.Time  `json:"at"`      // accepted
}

// Result is how a transaction ended, as far as its caller knows.
type Result string

const (
	Committed  Result = "committed"
	RolledBack Result = "rolled back" // by intent or by an error before COMMIT was sent
	Unknown    Result = "unknown"     // COMMIT had no answer, or nothing was written after this
)

// Commit is one add of one transaction of a caller. A caller writes it with Unknown
// before it begins, and again when it knows more. A transaction that is run
// again has the same Request.
type Commit struct {
	Caller  string         `json:"caller"`
	Request string         `json:"request"` // what the caller was asked to do, once
	Key     outbox.Key     `json:"key"`
	Content string         `json:"content"` // the payload as it was given
	Result  Result         `json:"result"`
	ID      int64          `json:"id,omitempty"` // what the add returned
	Version int64          `json:"version,omitempty"`
	Outcome outbox.Outcome `json:"outcome,omitempty"`
	Code    string         `json:"code,omitempty"` // SQLSTATE of the error that ended it
	From    time.Time      `json:"from"`           // before BEGIN
	To      time.Time      `json:"to"`             // after the answer to COMMIT; zero: not known
}

// Claimed is a row that a claim returned to a worker.
type Claimed struct {
	Worker  string    `json:"worker"`
	ID      int64     `json:"id"`
	Version int64     `json:"version"`
	Token   string    `json:"token"`
	From    time.Time `json:"from"` // of the call
	To      time.Time `json:"to"`   // its answer had come
}

// Settled is what a worker was told about one lease that it settled.
type Settled struct {
	Worker  string             `json:"worker"`
	ID      int64              `json:"id"`
	Version int64              `json:"version"` // that was claimed
	Token   string             `json:"token"`
	Verdict outbox.Verdict     `json:"verdict"`
	Receipt string             `json:"receipt,omitempty"`
	Result  outbox.LeaseResult `json:"result"`
	From    time.Time          `json:"from"` // of the call
	To      time.Time          `json:"to"`   // its answer had come
}

// Fault is something that went wrong, deliberately unless Observed.
type Fault struct {
	Kind string `json:"kind"`

	// Worker is whom it hit: a process's life, so that one that was started again is
	// another. "" is everybody, if Key is zero too.
	Worker string     `json:"worker,omitempty"`
	Key    outbox.Key `json:"key,omitzero"` // what it hit, of a fault of one message or row

	From time.Time `json:"from"`
	To   time.Time `json:"to"` // it was over; From of what takes no time

	Harmless bool `json:"harmless,omitempty"` // it cannot cause a duplicate, and excuses none

	Message bool `json:"message,omitempty"` // it hit Worker's sends of Key alone

	Kills bool `json:"kills,omitempty"` // Worker was being ended from From on: it may do something yet
	Halts bool `json:"halts,omitempty"` // Worker stood still, from From to To

	Observed bool `json:"observed,omitempty"` // nobody injected it, such as a stall of the machine
}

// Requeue is a deliberate repeat, by an operator. One that found nothing to do is not recorded.
type Requeue struct {
	Key  outbox.Key `json:"key"`
	Done bool       `json:"done"` // acknowledged; else it may have taken place or not
	From time.Time  `json:"from"`
	To   time.Time  `json:"to"` // zero: not known
}

// Purge ends the memory of keys, or of their payloads.
type Purge struct {
	Key    outbox.Key `json:"key,omitzero"` // zero: any that was settled
	Delete bool       `json:"delete"`       // the rows went; else only payload, error and receipt
	From   time.Time  `json:"from"`
	To     time.Time  `json:"to"` // zero: not known
}
