package outboxtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/seed3357934d/outbox"
)

// differences says what of n is not as wanted, "" if all is.
func (w Want) differences(t testing.TB, n outbox.Notification) string {
	t.Helper()
	var b strings.Builder
	differ := func(field string, want, got any) {
		fmt.Fprintf(&b, "  %s is %v, not %v\n", field, got, want)
	}
	at := func(field string, want, got time.Time) {
		switch {
		case want.IsZero() || got.Equal(want.Truncate(time.Microsecond)):
		case got.IsZero():
			differ(field, want.UTC(), "not set")
		default:
			differ(field, want.UTC(), got)
		}
	}
	if w.Payload != nil {
		want, err := json.Marshal(w.Payload)
		if err != nil {
			t.Fatalf("outboxtest: Want.Payload: %v", err)
		}
		wantLines, gotLines := payloadLines(want), payloadLines(n.Payload)
		if !slices.Equal(wantLines, gotLines) {
			fmt.Fprintf(&b, "  Payload (- expected, + there):\n%s", diff(wantLines, gotLines))
		}
	}
	if w.RecruiterTgID != 0 && n.RecruiterTgID != w.RecruiterTgID {
		differ("RecruiterTgID", w.RecruiterTgID, n.RecruiterTgID)
	}
	if w.CorrelationID != "" && n.CorrelationID != w.CorrelationID {
		differ("CorrelationID", strconv.Quote(w.CorrelationID), strconv.Quote(n.CorrelationID))
	}
	at("NotBefore", w.NotBefore, n.NextRetryAt)
	at("NotAfter", w.NotAfter, n.NotAfter)
	if w.Version != 0 && n.Version != w.Version {
		differ("Version", w.Version, n.Version)
	}
	if w.Status != "" && n.Status != w.Status {
		differ("Status", w.Status, n.Status)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// payloadLines is a payload as indented text that is the same for equal ones. What an
// add takes for none has no lines.
func payloadLines(payload []byte) []string {
	switch s := string(bytes.TrimSpace(payload)); s {
	case "", "null", "{}":
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return strings.Split(string(payload), "\n")
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b) // sorts keys
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(sameNumbers(v)); err != nil {
		return strings.Split(string(payload), "\n")
	}
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// sameNumbers gives equal numbers in v one spelling: 1, 1.0 and 1e0.
func sameNumbers(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = sameNumbers(e)
		}
	case []any:
		for i, e := range v {
			v[i] = sameNumbers(e)
		}
	case json.Number:
		s := string(v)
		_, exp, _ := strings.Cut(strings.ToLower(s), "e")
		if n, err := strconv.Atoi(exp); len(s) > 1000 || exp != "" && (err != nil || max(n, -n) > 1000) {
			return v
		}
		if r, ok := new(big.Rat).SetString(s); ok {
			if places, exact := r.FloatPrec(); exact {
				return json.Number(r.FloatString(places))
			}
		}
	}
	return v
}

// What a diff shows at most, and compares line by line.
const (
	diffContext  = 3 // equal lines beside others
	diffLines    = 100
	diffCompared = 1000 * 1000 // lines of one times lines of the other
)

// diff returns a with the lines that b lacks marked by - and those it has in addition by +,
// and the lines beside these.
func diff(a, b []string) string {
	before := 0
	for before < min(len(a), len(b)) && a[before] == b[before] {
		before++
	}
	after := 0
	for after < min(len(a), len(b))-before && a[len(a)-1-after] == b[len(b)-1-after] {
		after++
	}
	x, y := a[before:len(a)-after], b[before:len(b)-after]
	var lines []string // marked
	add := func(mark string, texts ...string) {
		for _, text := range texts {
			lines = append(lines, mark+" "+text)
		}
	}
	add(" ", a[:before]...)
	if len(x)*len(y) > diffCompared {
		add("-", x[0])
		add("+", y[0])
		return shorten(lines) + fmt.Sprintf("    … %d lines expected and %d there are not compared\n", len(x)-1+after, len(y)-1+after)
	}

	// common[i][j] is how many lines x[i:] and y[j:] have in common, in order.
	common := make([][]int, len(x)+1)
	for i := range common {
		common[i] = make([]int, len(y)+1)
	}
	for i := len(x) - 1; i >= 0; i-- {
		for j := len(y) - 1; j >= 0; j-- {
			if x[i] == y[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(x) || j < len(y) {
		switch {
		case i < len(x) && j < len(y) && x[i] == y[j]:
			add(" ", x[i])
			i, j = i+1, j+1
		case j == len(y) || i < len(x) && common[i+1][j] >= common[i][j+1]:
			add("-", x[i])
			i++
		default:
			add("+", y[j])
			j++
		}
	}
	add(" ", a[len(a)-after:]...)
	return shorten(lines)
}

// shorten leaves out marked lines that are far from a difference, and what is too much.
func shorten(lines []string) string {
	near := make([]bool, len(lines))
	for i, line := range lines {
		if line[0] != ' ' {
			for k := max(0, i-diffContext); k <= min(len(lines)-1, i+diffContext); k++ {
				near[k] = true
			}
		}
	}
	var out strings.Builder
	for i, n := 0, 0; i < len(lines); i++ {
		from := i
		for i < len(lines) && !near[i] {
			i++
		}
		if i > from {
			fmt.Fprintf(&out, "    … %d equal lines\n", i-from)
		}
		if i == len(lines) {
			break
		}
		if n++; n > diffLines {
			fmt.Fprintf(&out, "    … %d more lines\n", len(lines)-i)
			break
		}
		fmt.Fprintf(&out, "    %s\n", lines[i])
	}
	return out.String()
}
