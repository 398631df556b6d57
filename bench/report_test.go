package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReport_table(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	newReport(&out).table([][]string{{"work", "µs"}, {"add", "1"}, {"≥", "10.5"}})
	require.Equal(t, `| work | µs   |
| ---- | ---- |
| add  | 1    |
| ≥    | 10.5 |

`, out.String())
}

func TestReport_targets_are_not_rounded_in_their_favour(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	r := newReport(&out)
	r.atLeast("a", 0.9699, 0.97)
	r.atLeast("b", 0.97, 0.97)
	r.atMost("c", 1.201, 1.2)
	r.printTargets(false)
	require.Regexp(t, `(?m)^\| a +\| ≥ 0.97 +\| 0.9699 +\| \*\*no\*\* \|$`, out.String())
	require.Regexp(t, `(?m)^\| b +\| ≥ 0.97 +\| 0.97 +\| yes +\|$`, out.String())
	require.Regexp(t, `(?m)^\| c +\| ≤ 1.2 +\| 1.201 +\| \*\*no\*\* \|$`, out.String())
}

func TestNumber(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{0: "0.00", 0.1234: "0.123", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 12345: "12345"} {
		require.Equal(t, want, number(v))
	}
}
