package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
)

// notify compares adds with NOTIFY to such without, and to such with one in every
// transaction. Each is listened to.
func notify(ctx context.Context, b *bench) (err error) {
	const off, on, always = "Notify: false", "Notify: true", "pg_notify in every transaction"
	var places []*place
	ctx, cancel := context.WithCancel(ctx)
	var listening sync.WaitGroup
	defer func() {
		cancel()
		listening.Wait()
		err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...))
	}()
	conns := slices.DeleteFunc(slices.Clone(b.conns), func(n int) bool { return n == 1 })
	var runs []func(context.Context, beginner) error
	names := []string{off, on, always}
	for i, name := range names {
		p, do, err := makeOurs(ctx, b, fmt.Sprintf("notify_%d", i), "sent", slices.Max(conns), name == on)
		places = append(places, p)
		if err != nil {
			return err
		}
		add := do(b.newKey)
		if name == always {
			add = func(ctx context.Context, tx pgx.Tx, i int64) error {
				if err := do(b.newKey)(ctx, tx, i); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, "SELECT pg_notify('bench', 'added')")
				return err
			}
		}
		runs = append(runs, p.business(add))
	}

	store, err := places[1].store(true)
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, b.url)
	if err != nil {
		return err
	}
	// Both end when ctx does, with an error that says so.
	listening.Go(func() { _ = store.Listen(ctx, func() {}) })
	listening.Go(func() {
		defer conn.Close(context.WithoutCancel(ctx))
		_, err := conn.Exec(ctx, "LISTEN bench")
		for err == nil {
			_, err = conn.WaitForNotification(ctx)
		}
	})

	for _, n := range conns {
		var cs []contender
		for i, name := range names {
			work, err := places[i].workers(ctx, n, 1, runs[i])
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			cs = append(cs, contender{name: name, work: work})
		}
		b.rep.printf("%s:\n\n", count(n, "connection"))
		ratio, err := b.compare(ctx, fmt.Sprintf("connections=%d", n), "tx", off, cs, b.rounds)
		if err != nil {
			return err
		}
		if n == slices.Max(conns) {
			b.rep.atLeast("NOTIFY on over NOTIFY off, "+count(n, "connection"), ratio[on], 0.95)
		}
	}
	return nil
}
