package outbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

const (
	defaultMaxPayloadBytes = 1 << 20

	// maxMaxPayloadBytes is as far as Config.MaxPayloadBytes goes. jsonb holds
	// at most 268,435,455 bytes and takes up to six bytes for one of JSON text
	// ("1,"), while its parser's array of elements doubles in memory up to 1 GiB;
	// any document of 16 MiB fits both, not every one of 32 MiB does.
	maxMaxPayloadBytes = 16 << 20

	// maxJSONDepth is what PostgreSQL's parser takes with a wide margin at its
	// default max_stack_depth of 2 MB (some 6,000 levels).
	maxJSONDepth = 1000

	// A jsonb number is a numeric: at most 131,072 digits before the decimal
	// point and 16,383 after it (PostgreSQL manual, "Numeric Types").
	maxJSONIntegerDigits  = 131072
	maxJSONFractionDigits = 16383
)

// encodePayload returns the JSON to be stored for p, nil if it is not given.
func encodePayload(p any, maxBytes int) ([]byte, *InvalidError) {
	var b []byte
	raw := true
	switch v := p.(type) {
	case nil:
		return nil, nil
	case json.RawMessage:
		b = bytes.Clone(v) // it is given back as the result of a batch
	case *json.RawMessage:
		if v == nil {
			return nil, nil
		}
		b = bytes.Clone(*v)
	default:
		raw = false
		var err error
		if b, err = json.Marshal(p); err != nil {
			e := invalid("Payload", "%v", err)
			e.cause = err
			return nil, e
		}
	}
	if b == nil {
		return nil, nil
	}
	if len(b) > maxBytes {
		return nil, invalid("Payload", "%d bytes of JSON, over the limit of %d", len(b), maxBytes)
	}
	s := jsonScanner{b: b, refuseReplacement: !raw}
	if err := s.document(); err != nil {
		return nil, invalid("Payload", "%v (at byte %d of the JSON)", err, s.i)
	}
	if isEmptyJSON(b) {
		return nil, nil
	}
	return b, nil
}

// isEmptyJSON reports whether the valid JSON document b is null or {}.
func isEmptyJSON(b []byte) bool {
	b = bytes.TrimSpace(b)
	if string(b) == "null" {
		return true
	}
	return b[0] == '{' && b[len(b)-1] == '}' && len(bytes.TrimSpace(b[1:len(b)-1])) == 0
}

// jsonScanner checks in one pass that jsonb accepts a document: the grammar of
// RFC 8259 and the further limits of PostgreSQL's jsonb. What it accepts jsonb
// accepts; it refuses a little more, namely numbers whose exponent alone is out
// of range (0e999999) and documents nested deeper than maxJSONDepth.
type jsonScanner struct {
	b     []byte
	i     int // the byte being looked at
	depth int

	// refuseReplacement refuses the escape \ufffd, which is what encoding/json
	// silently makes of a Go string that is not valid UTF-8. (A raw message inside a
	// value may have that escape itself; passed as the payload it is let through.)
	refuseReplacement bool
}

var errJSONEnd = errors.New("unexpected end of JSON")

func (s *jsonScanner) document() error {
	if err := s.value(); err != nil {
		return err
	}
	if s.space(); s.i < len(s.b) {
		return s.unexpected("after the JSON value")
	}
	return nil
}

func (s *jsonScanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\n', '\r':
			s.i++
		default:
			return
		}
	}
}

func (s *jsonScanner) unexpected(where string) error {
	if s.i >= len(s.b) {
		return errJSONEnd
	}
	return fmt.Errorf("unexpected %q %s", s.b[s.i], where)
}

func (s *jsonScanner) value() error {
	s.space()
	if s.i >= len(s.b) {
		return errJSONEnd
	}
	switch c := s.b[s.i]; {
	case c == '{':
		return s.object()
	case c == '[':
		return s.array()
	case c == '"':
		return s.str()
	case c == '-' || '0' <= c && c <= '9':
		return s.number()
	case c == 't':
		return s.literal("true")
	case c == 'f':
		return s.literal("false")
	case c == 'n':
		return s.literal("null")
	}
	return s.unexpected("where a JSON value should begin")
}

func (s *jsonScanner) literal(word string) error {
	if len(s.b)-s.i < len(word) || string(s.b[s.i:s.i+len(word)]) != word {
		return s.unexpected("where a JSON value should begin")
	}
	s.i += len(word)
	return nil
}

func (s *jsonScanner) enter() error {
	if s.depth++; s.depth > maxJSONDepth {
		return fmt.Errorf("nested deeper than %d levels", maxJSONDepth)
	}
	s.i++
	s.space()
	return nil
}

// next steps over a comma and reports true, or over the closing bracket and
// reports false.
func (s *jsonScanner) next(closing byte) (bool, error) {
	s.space()
	if s.i < len(s.b) && s.b[s.i] == ',' {
		s.i++
		return true, nil
	}
	if s.i < len(s.b) && s.b[s.i] == closing {
		s.i++
		s.depth--
		return false, nil
	}
	return false, s.unexpected(fmt.Sprintf("where ',' or %q should be", closing))
}

func (s *jsonScanner) array() error {
	if err := s.enter(); err != nil {
		return err
	}
	if s.i < len(s.b) && s.b[s.i] == ']' {
		s.i++
		s.depth--
		return nil
	}
	for {
		if err := s.value(); err != nil {
			return err
		}
		if more, err := s.next(']'); err != nil || !more {
			return err
		}
	}
}

func (s *jsonScanner) object() error {
	if err := s.enter(); err != nil {
		return err
	}
	if s.i < len(s.b) && s.b[s.i] == '}' {
		s.i++
		s.depth--
		return nil
	}
	for {
		if s.space(); s.i >= len(s.b) || s.b[s.i] != '"' {
			return s.unexpected("where an object key should begin")
		}
		if err := s.str(); err != nil {
			return err
		}
		if s.space(); s.i >= len(s.b) || s.b[s.i] != ':' {
			return s.unexpected("where ':' should be")
		}
		s.i++
		if err := s.value(); err != nil {
			return err
		}
		if more, err := s.next('}'); err != nil || !more {
			return err
		}
	}
}

func (s *jsonScanner) str() error {
	s.i++
	for s.i < len(s.b) {
		switch c := s.b[s.i]; {
		case c == '"':
			s.i++
			return nil
		case c == '\\':
			if err := s.escape(); err != nil {
				return err
			}
		case c < ' ':
			return fmt.Errorf("unescaped control character %q in a string", c)
		case c < utf8.RuneSelf:
			s.i++
		default:
			r, size := utf8.DecodeRune(s.b[s.i:])
			if r == utf8.RuneError && size == 1 {
				return errors.New("invalid UTF-8")
			}
			s.i += size
		}
	}
	return errJSONEnd
}

// escape steps over one escape, or over the two of a surrogate pair.
func (s *jsonScanner) escape() error {
	if s.i+1 >= len(s.b) {
		return errJSONEnd
	}
	switch c := s.b[s.i+1]; c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.i += 2
		return nil
	case 'u':
	default:
		return fmt.Errorf("invalid escape \\%c in a string", c)
	}
	r, err := s.hex4()
	if err != nil {
		return err
	}
	switch {
	case r == 0:
		return errors.New(`jsonb has no \u0000`)
	case r == utf8.RuneError && s.refuseReplacement:
		return errors.New("a string that is not valid UTF-8")
	case 0xDC00 <= r && r <= 0xDFFF:
		return fmt.Errorf(`lone low surrogate \u%04x`, r)
	case 0xD800 <= r && r <= 0xDBFF:
		high := r
		s.i += 6
		if len(s.b)-s.i < 2 || s.b[s.i] != '\\' || s.b[s.i+1] != 'u' {
			return fmt.Errorf(`lone high surrogate \u%04x`, high)
		}
		if r, err = s.hex4(); err != nil {
			return err
		}
		if r < 0xDC00 || r > 0xDFFF {
			return fmt.Errorf(`lone high surrogate \u%04x`, high)
		}
	}
	s.i += 6
	return nil
}

// hex4 reads the escape \uXXXX at s.i without stepping over it.
func (s *jsonScanner) hex4() (rune, error) {
	if len(s.b)-s.i < 6 {
		return 0, errJSONEnd
	}
	var r rune
	for _, c := range s.b[s.i+2 : s.i+6] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, fmt.Errorf(`%q in a \u escape`, c)
		}
		r = r<<4 | rune(c)
	}
	return r, nil
}

func (s *jsonScanner) number() error {
	if s.b[s.i] == '-' {
		s.i++
	}
	start := s.i
	integer := s.digits()
	if integer == 0 {
		return s.unexpected("in a number")
	}
	if integer > 1 && s.b[start] == '0' {
		return errors.New("a number with a leading zero")
	}
	fraction := 0
	if s.i < len(s.b) && s.b[s.i] == '.' {
		s.i++
		if fraction = s.digits(); fraction == 0 {
			return s.unexpected("in a number")
		}
	}
	exponent := 0
	if s.i < len(s.b) && (s.b[s.i] == 'e' || s.b[s.i] == 'E') {
		var err error
		if exponent, err = s.exponent(); err != nil {
			return err
		}
	}
	if integer+exponent > maxJSONIntegerDigits || fraction-exponent > maxJSONFractionDigits {
		return errors.New("a number out of jsonb's range")
	}
	return nil
}

func (s *jsonScanner) digits() int {
	start := s.i
	for s.i < len(s.b) && '0' <= s.b[s.i] && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i - start
}

func (s *jsonScanner) exponent() (int, error) {
	s.i++
	negative := false
	if s.i < len(s.b) && (s.b[s.i] == '+' || s.b[s.i] == '-') {
		negative = s.b[s.i] == '-'
		s.i++
	}
	start := s.i
	if s.digits() == 0 {
		return 0, s.unexpected("in a number")
	}
	e := 0
	for _, c := range s.b[start:s.i] {
		// saturated far beyond either limit and far below overflow
		e = min(e*10+int(c-'0'), 1<<28)
	}
	if negative {
		return -e, nil
	}
	return e, nil
}
