package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// One round of either kind.
func TestRun_loses_nothing_by_a_synchronous_failover_and_only_the_end_by_another(t *testing.T) {
	var out bytes.Buffer
	opts := options{seed: 1, dir: t.TempDir(), length: 6 * time.Second, failovers: "both"}
	ok, err := run(t.Context(), opts, limits{first: 1, rounds: 2}, &out)
	t.Log(out.String())
	require.NoError(t, err)
	require.True(t, ok)
	require.Contains(t, out.String(), "round 1, synchronous failover")
	require.Contains(t, out.String(), "round 2, asynchronous failover")
}
