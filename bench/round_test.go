package main

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestQuantile(t *testing.T) {
	t.Parallel()
	require.True(t, quantile(nil, 0.5) != quantile(nil, 0.5), "NaN")
	require.Equal(t, 3.0, quantile([]float64{3}, 0.99))
	require.Equal(t, 2.0, quantile([]float64{3, 1, 2}, 0.5))
	require.Equal(t, 2.5, quantile([]float64{4, 3, 2, 1}, 0.5))
	require.Equal(t, spread{2, 3, 4}, spreadOf([]float64{5, 4, 3, 2, 1}))
}

func TestInterleave_begins_each_round_with_another_contender(t *testing.T) {
	t.Parallel()
	var order string
	cs := make([]contender, 3)
	for i := range cs {
		name := string(rune('A' + i))
		cs[i] = contender{
			name:   name,
			before: func(context.Context) error { order += "-"; return nil },
			work: func(_ context.Context, d time.Duration) (int, time.Duration, error) {
				order += name
				return 10 * (i + 1), d, nil
			},
		}
	}
	samples, err := interleave(t.Context(), meter{server: zero, client: zero}, cs, 4, time.Second)
	require.NoError(t, err)
	require.Equal(t, "-A-B-C-B-C-A-C-A-B-A-B-C", order)
	require.Len(t, samples, 3)
	require.Equal(t, []float64{3, 3, 3, 3}, ratios(samples[2], samples[0], sample.speed))
}
