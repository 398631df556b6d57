package main

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPulse_tells_a_stall_from_what_came_before_and_after(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var p pulse
		var stalls []time.Time
		beats := func(n int, every time.Duration) {
			for range n {
				<-time.After(every)
				p.beat(func(from time.Time) { stalls = append(stalls, from) })
			}
		}
		require.Equal(t, time.Now(), p.since(), "before the first beat")
		beats(10, beat)
		require.Empty(t, stalls)
		require.Equal(t, time.Now(), p.since())

		from := time.Now()
		<-time.After(2 * time.Second)
		require.Equal(t, from, p.since(), "the first to notice")
		require.Empty(t, stalls)
		beats(10, beat)
		require.Equal(t, from, p.since(), "others may not have noted it")
		beats(int(awake/beat), beat)
		require.Equal(t, time.Now(), p.since())

		from = time.Now()
		beats(1, time.Second)
		require.Equal(t, []time.Time{from}, stalls)
		require.Equal(t, from, p.since())
	})
}
