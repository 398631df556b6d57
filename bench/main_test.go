package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// tiny is just enough for everything to run.
func tiny() size {
	return size{
		rounds: 1, round: time.Millisecond, conns: []int{1, 8},
		preload: 200, batch: 20, wire: 20,
		deliver: 200, deliverRounds: 1,
		latency: 100 * time.Millisecond, latencyRounds: 1,
		small: 200, large: 400, later: 200, claimRounds: 1,
		beside: 200 * time.Millisecond, hold: 200 * time.Millisecond,
	}
}

func TestMeasure_runs_every_section(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	rep := newReport(&out)
	require.NoError(t, measure(t.Context(), options{url: pgtest.DatabaseURL("postgres"), run: regexp.MustCompile(""), size: tiny()}, rep))
	for _, s := range sections {
		require.Contains(t, out.String(), "## "+s.title)
	}
	require.Contains(t, out.String(), "## Targets")
	file := filepath.Join(t.TempDir(), "results", "raw.json")
	require.NoError(t, rep.writeRaw(file))
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Contains(t, string(text), `"contender": "River, unique"`)
}

func TestMeasure_starts_a_server_that_waits_for_its_disk(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	rep := newReport(&out)
	require.NoError(t, measure(t.Context(), options{run: regexp.MustCompile("^none$"), size: tiny()}, rep))
	for _, name := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		require.Contains(t, out.String(), name+" = on")
	}
	require.Contains(t, out.String(), "shared_buffers = 1GB")
}

func BenchmarkAdd(b *testing.B) {
	run := &bench{size: quickSize(), rep: newReport(new(bytes.Buffer))}
	stop, err := run.start(b.Context(), pgtest.DatabaseURL("postgres"))
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, stop()) })
	for _, c := range goCases {
		for _, a := range c.adders {
			b.Run(c.name+"/"+a.name, func(b *testing.B) {
				add, stop, err := run.addInTx(b.Context(), c, a)
				b.Cleanup(func() { require.NoError(b, stop()) })
				require.NoError(b, err)
				require.NoError(b, benchmark(b, add))
			})
		}
	}
}
