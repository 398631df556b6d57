package main

import (
	"context"
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
		require.Zero(t, p.stalled(), "before the first beat")
		beats(10, beat)
		require.Empty(t, stalls)
		require.Zero(t, p.stalled())

		from := time.Now()
		<-time.After(2 * time.Second)
		require.Equal(t, from, p.stalled(), "the first to notice")
		require.Empty(t, stalls)
		beats(3, beat)
		require.Equal(t, from, p.stalled(), "others may not have noted it")
		beats(int(awake/beat), beat)
		require.Zero(t, p.stalled())

		from = time.Now()
		beats(1, time.Second)
		require.Equal(t, []time.Time{from}, stalls)
		require.Equal(t, from, p.stalled())
	})
}

func TestHeartbeat_finds_no_stall_where_there_is_none(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		var r round
		r.pulse.beat(func(time.Time) {})
		beating := make(chan struct{})
		go func() {
			defer close(beating)
			r.heartbeat(ctx)
		}()
		<-time.After(time.Minute + beat/2)
		require.Zero(t, r.pulse.stalled())
		stop()
		<-beating
	})
}
