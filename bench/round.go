package main

import (
	"context"
	"math"
	"slices"
	"time"
)

// contender is one way of doing a piece of work.
type contender struct {
	name string

	// work does it for about d, or once where it cannot be divided, and returns how
	// many operations it did in how long.
	work func(ctx context.Context, d time.Duration) (ops int, took time.Duration, err error)

	before func(ctx context.Context) error // what is not measured, before each round; optional
}

// sample is what a contender did in a round.
type sample struct {
	Ops  int           `json:"ops"`
	Took time.Duration `json:"ns"`

	// CPU time of the server and of this process; the server's is 0 if not known.
	Server time.Duration `json:"server_cpu_ns,omitempty"`
	Client time.Duration `json:"client_cpu_ns,omitempty"`
}

func (s sample) speed() float64    { return float64(s.Ops) / s.Took.Seconds() }
func (s sample) serverUS() float64 { return float64(s.Server.Nanoseconds()) / 1000 / float64(s.Ops) }
func (s sample) clientUS() float64 { return float64(s.Client.Nanoseconds()) / 1000 / float64(s.Ops) }

// interleave has all contenders work in each round, another one first each time, and
// returns the samples of each, by round.
func interleave(ctx context.Context, m meter, cs []contender, rounds int, d time.Duration) ([][]sample, error) {
	samples := make([][]sample, len(cs))
	for r := range rounds {
		for k := range cs {
			i := (r + k) % len(cs)
			if cs[i].before != nil {
				if err := cs[i].before(ctx); err != nil {
					return nil, err
				}
			}
			server, client := m.server(), m.client()
			ops, took, err := cs[i].work(ctx, d)
			if err != nil {
				return nil, err
			}
			samples[i] = append(samples[i], sample{ops, took, m.server() - server, m.client() - client})
		}
	}
	return samples, nil
}

// spread is the middle of some values, and how far they lie apart.
type spread struct{ q1, median, q3 float64 }

func spreadOf(values []float64) spread {
	return spread{quantile(values, 0.25), quantile(values, 0.5), quantile(values, 0.75)}
}

// quantile interpolates between the two values next to it. It is NaN for no values.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	at := q * float64(len(v)-1)
	i := int(at)
	if i+1 == len(v) {
		return v[i]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}

func median(values []float64) float64 { return quantile(values, 0.5) }

func each[T any](from []T, f func(T) float64) []float64 {
	values := make([]float64, len(from))
	for i, v := range from {
		values[i] = f(v)
	}
	return values
}

// ratios are of each round's values, a over b.
func ratios(a, b []sample, f func(sample) float64) []float64 {
	values := make([]float64, len(a))
	for i := range a {
		values[i] = f(a[i]) / f(b[i])
	}
	return values
}
