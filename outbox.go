package outbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Status is the stage of life of a notification. It is not part of its
// identity: that is the [Key].
type Status string

// A row that another service has given any other status counts as settled too.
const (
	StatusPending Status = "pending" // to be delivered, or being delivered
	StatusSent    Status = "sent"    // accepted by the provider; final until requeued
	StatusFailed  Status = "failed"  // given up on; final until requeued
)

// Key is the idempotency key of a notification: the outbox holds one row for
// each, forever, whatever that row's status. Absent parts are equal to each
// other, so Key{Type: "digest"} is one key and not many.
type Key struct {
	Type          string
	BookingID     int64 // 0: none, stored as NULL
	CandidateTgID int64 // 0: none, stored as NULL; negative is valid (Telegram groups)
}

// String renders the key for logs and error messages.
func (k Key) String() string {
	s := strconv.Quote(k.Type)
	if k.BookingID != 0 {
		s += " booking " + strconv.FormatInt(k.BookingID, 10)
	}
	if k.CandidateTgID != 0 {
		s += " candidate " + strconv.FormatInt(k.CandidateTgID, 10)
	}
	return s
}

// NewNotification is what a booking service asks to have delivered. Only Type
// is required. A field that is not given leaves the value of an existing
// pending row as it is; NotBefore is the exception, see there.
type NewNotification struct {
	Type          string // 1 to 50 characters
	BookingID     int64  // 0: none
	CandidateTgID int64  // 0: none; negative is valid (Telegram groups)
	RecruiterTgID int64  // 0: not given

	// Payload is marshalled with encoding/json, except that a [json.RawMessage]
	// is stored as it is: for bytes that are JSON already, since encoding/json makes
	// a base64 string of a []byte. nil, and whatever becomes null or {}, is not given.
	// Two payloads are the same content when they are equal as jsonb: white
	// space, the order of keys and the spelling of numbers do not matter.
	Payload any

	CorrelationID string // at most 64 characters; "": not given

	// NotBefore is when the notification falls due. The zero time is now, also
	// on a refresh: a repeat without NotBefore makes a postponed row due.
	// Times are kept in microseconds; what is finer is cut off.
	NotBefore time.Time

	// NotAfter is when the notification is too late to be of use: a row still
	// pending then is failed and not sent. Zero: not given, never too late. One that
	// was given once can be moved but not taken back.
	NotAfter time.Time
}

// Key returns the identity of n.
func (n NewNotification) Key() Key {
	return Key{Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID}
}

// Notification is one row of the outbox. Times are UTC.
type Notification struct {
	ID            int64
	Type          string
	BookingID     int64           // 0: none
	CandidateTgID int64           // 0: none
	RecruiterTgID int64           // 0: none
	Payload       json.RawMessage // nil: none, or purged
	CorrelationID string
	Status        Status
	Attempts      int       // counted when a delivery is claimed
	Version       int64     // 1 on creation, +1 for each change of recruiter or payload
	SentVersion   int64     // the Version last delivered; 0 if none
	Receipt       string    // what the sender returned for SentVersion
	LastError     string    // of the last delivery that failed; a refresh keeps it
	CreatedAt     time.Time // start of the transaction that created the row
	LockedAt      time.Time // zero: not being delivered
	NextRetryAt   time.Time // zero: due now
	NotAfter      time.Time // zero: never too late
	SentAt        time.Time // zero: not sent
}

// Key returns the identity of n.
func (n Notification) Key() Key {
	return Key{Type: n.Type, BookingID: n.BookingID, CandidateTgID: n.CandidateTgID}
}

// Outcome says what an add did.
type Outcome string

const (
	OutcomeCreated   Outcome = "created"   // there was no row of this key
	OutcomeRefreshed Outcome = "refreshed" // the row was pending and now has the content given
	OutcomeExisting  Outcome = "existing"  // the row was sent or failed and is returned unchanged
)

// AddResult is what an add found and left.
type AddResult struct {
	Notification Notification // the row as it stands after the call
	Outcome      Outcome

	// InFlight: refreshed while a delivery of it was under way. If Version rose,
	// the newer content goes out after that delivery; else nothing more does.
	InFlight bool
}

// ErrInvalid is what errors.Is finds in every error about bad input. Such
// errors come before any SQL that could fail, so the caller's transaction is as it was.
// Trying again does not help. [InvalidError] has the details.
var ErrInvalid = errors.New("outbox: invalid input")

// ErrNotFound is returned by [PGStore.Get] when no row has the key.
var ErrNotFound = errors.New("outbox: no such notification")

// ErrSetup is what errors.Is finds in errors of [PGStore]'s methods, those on the
// caller's transaction included, that no retry can help: the table is missing or not
// migrated, or the role has no right to it.
var ErrSetup = errors.New("outbox: the database is not set up")

// ErrNoNotifications is returned by [PGStore.Listen] when NOTIFY does not arrive, as
// behind a pooler that hands a connection to another client after each transaction.
var ErrNoNotifications = errors.New("outbox: LISTEN hears nothing of a NOTIFY, as behind a transaction pooler")

// InvalidError says which input was refused and why. errors.Is finds
// [ErrInvalid] in it.
type InvalidError struct {
	Field  string // the name of the argument or struct field, such as "Payload" or "tx"
	Reason string
	Index  int // the element's index in AddNotifications, Settle and Requeue; -1 elsewhere

	inBatch bool
	cause   error
}

func (e *InvalidError) Error() string {
	if e.inBatch {
		return fmt.Sprintf("outbox: notification %d: invalid %s: %s", e.Index, e.Field, e.Reason)
	}
	return fmt.Sprintf("outbox: invalid %s: %s", e.Field, e.Reason)
}

// Is reports whether target is [ErrInvalid].
func (e *InvalidError) Is(target error) bool { return target == ErrInvalid }

// Unwrap returns the error that encoding/json gave for the payload, if any.
func (e *InvalidError) Unwrap() error { return e.cause }

func invalid(field, format string, args ...any) *InvalidError {
	return &InvalidError{Field: field, Reason: fmt.Sprintf(format, args...), Index: -1}
}

// at makes e an error about the element i of a batch.
func (e *InvalidError) at(i int) *InvalidError {
	e.Index, e.inBatch = i, true
	return e
}
