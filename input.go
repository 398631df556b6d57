package outbox

import (
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxTypeChars          = 50 // type is varchar(50)
	maxCorrelationIDChars = 64 // correlation_id is varchar(64)
)

// input is a NewNotification that has passed check, as PostgreSQL will see it.
type input struct {
	key                 Key
	recruiter           int64     // 0: not given
	payload             []byte    // nil: not given
	correlation         string    // "": not given
	notBefore, notAfter time.Time // zero: not given
}

// check finds everything that PostgreSQL would refuse, so that no statement
// fails on account of its input and costs the caller the transaction.
func (s *PGStore) check(n NewNotification) (input, *InvalidError) {
	if n.Type == "" {
		return input{}, invalid("Type", "empty")
	}
	if reason := badText(n.Type); reason != "" {
		return input{}, invalid("Type", "%s", reason)
	}
	if chars := utf8.RuneCountInString(n.Type); chars > maxTypeChars {
		return input{}, invalid("Type", "%d characters, over the limit of %d", chars, maxTypeChars)
	}
	if reason := badText(n.CorrelationID); reason != "" {
		return input{}, invalid("CorrelationID", "%s", reason)
	}
	if chars := utf8.RuneCountInString(n.CorrelationID); chars > maxCorrelationIDChars {
		return input{}, invalid("CorrelationID", "%d characters, over the limit of %d", chars, maxCorrelationIDChars)
	}
	if badTime(n.NotBefore) {
		return input{}, invalid("NotBefore", "the year %d (UTC) is not between 1 and 9999", n.NotBefore.UTC().Year())
	}
	if badTime(n.NotAfter) {
		return input{}, invalid("NotAfter", "the year %d (UTC) is not between 1 and 9999", n.NotAfter.UTC().Year())
	}
	in := input{
		key:         n.Key(),
		recruiter:   n.RecruiterTgID,
		correlation: n.CorrelationID,
		notBefore:   n.NotBefore.Truncate(time.Microsecond),
		notAfter:    n.NotAfter.Truncate(time.Microsecond),
	}
	if !in.notAfter.IsZero() && in.notAfter.Before(in.notBefore) {
		return input{}, invalid("NotAfter", "%s is before NotBefore %s",
			n.NotAfter.Format(time.RFC3339Nano), n.NotBefore.Format(time.RFC3339Nano))
	}
	var err *InvalidError
	if in.payload, err = encodePayload(n.Payload, s.maxPayloadBytes); err != nil {
		return input{}, err
	}
	return in, nil
}

// badText says why PostgreSQL would refuse s as text in UTF-8; "" if it would not.
func badText(s string) string {
	switch {
	case strings.IndexByte(s, 0) >= 0:
		return "a NUL byte, which PostgreSQL's text cannot hold"
	case !utf8.ValidString(s):
		return "not valid UTF-8"
	}
	return ""
}

// badTime reports whether t is outside what timestamptz and every client of the
// table can represent. In UTC, as an offset may carry a time over the edge.
func badTime(t time.Time) bool {
	year := t.UTC().Year()
	return year < 1 || year > 9999
}
