package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"testing"
)

// goCase is an add beside the statement that it is compared with.
type goCase struct {
	name, status string
	pick         func(*bench) pick
	adders       []adder
}

var goCases = []goCase{
	{"new key", "sent", func(b *bench) pick { return b.newKey }, []adder{bareInsert, ours, riverUnique}},
	{"repeat of a pending key", "pending", func(b *bench) pick { return b.changedKey }, []adder{bareUpdate, ours, riverUnique}},
	{"repeat of a settled key", "sent", func(b *bench) pick { return b.changedKey }, []adder{bareSelect, ours, riverUnique}},
}

// goSide reports what one add allocates, the driver's share included: what the bare
// statement allocates is the driver's and the payload's.
func goSide(ctx context.Context, b *bench) error {
	testing.Init() // outside of a test, the flag is not there yet
	if err := flag.Set("test.benchtime", "500x"); err != nil {
		return err
	}
	few := *b
	few.preload = min(b.preload, 1000) // the rows do not matter, and are made anew each time
	rows := [][]string{{"work", "", "allocations", "bytes"}}
	for _, c := range goCases {
		for _, a := range c.adders {
			add, stop, err := few.addInTx(ctx, c, a)
			var failed error
			res := testing.BenchmarkResult{}
			if err == nil {
				res = testing.Benchmark(func(tb *testing.B) { failed = benchmark(tb, add) })
			}
			if err := errors.Join(err, failed, stop()); err != nil {
				return fmt.Errorf("%s: %s: %w", c.name, a.name, err)
			}
			b.rep.value(c.name, a.name, 0, map[string]float64{"allocs": float64(res.AllocsPerOp()), "bytes": float64(res.AllocedBytesPerOp())})
			rows = append(rows, []string{c.name, a.name, fmt.Sprint(res.AllocsPerOp()), fmt.Sprint(res.AllocedBytesPerOp())})
		}
	}
	b.rep.table(rows)
	return nil
}

// addInTx returns an add within one transaction, which stop rolls back.
func (b *bench) addInTx(ctx context.Context, c goCase, a adder) (add, stop func() error, err error) {
	p, do, err := a.make(ctx, b, "goside", c.status, 2)
	drop := func() error { return b.drop(context.WithoutCancel(ctx), p) }
	if err != nil {
		return nil, drop, err
	}
	tx, err := p.pool.Begin(ctx)
	if err != nil {
		return nil, drop, err
	}
	one := do(c.pick(b))
	add = func() error { return one(ctx, tx, p.next.Add(1)) }
	stop = func() error { return errors.Join(tx.Rollback(context.WithoutCancel(ctx)), drop()) }
	for range prewarms {
		if err := add(); err != nil {
			return nil, stop, err
		}
	}
	return add, stop, nil
}

func benchmark(tb *testing.B, add func() error) error {
	tb.ReportAllocs()
	for tb.Loop() {
		if err := add(); err != nil {
			return err
		}
	}
	return nil
}
