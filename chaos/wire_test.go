package main

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
)

func TestExecutes_tells_a_statement_from_its_preparation(t *testing.T) {
	t.Parallel()
	parse, err := (&pgproto3.Parse{Name: "B", Query: "SELECT 'B'"}).Encode(nil)
	require.NoError(t, err)
	require.False(t, executes(parse))
	both, err := (&pgproto3.Bind{PreparedStatement: "B"}).Encode(parse)
	require.NoError(t, err)
	require.True(t, executes(both))
}

// names collects what statements are taken for.
type names struct {
	tracer
	got []string
}

func (ns *names) TraceBatchStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	ns.got = append(ns.got, statementOf(data.Batch))
	return ctx
}

// Strikes in the middle of a statement find it by its text, which the library may change.
func TestStatementOf_knows_the_statements_of_a_delivery(t *testing.T) {
	server, err := pgserver.Start(t.Context(), pgserver.Options{Logf: t.Logf})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop()) })
	cfg, err := pgxpool.ParseConfig(server.URL)
	require.NoError(t, err)
	var ns names
	cfg.ConnConfig.Tracer = &ns
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	store, err := outbox.NewPGStore(pool, outbox.Config{Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	require.NoError(t, store.Migrate(t.Context()))
	require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		_, err := store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "reject"})
		return err
	}))

	ns.got = nil
	res, err := store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Minute})
	require.NoError(t, err)
	require.Len(t, res.Claimed, 1)
	l := res.Claimed[0].Lease
	_, err = store.Extend(t.Context(), []outbox.Lease{l}, time.Minute)
	require.NoError(t, err)
	_, err = store.Settle(t.Context(), []outbox.Settlement{{Lease: l, Verdict: outbox.Delivered}})
	require.NoError(t, err)
	require.Equal(t, []string{"claim", "renewal", "settle"}, ns.got)
}

func TestReroute_has_the_next_process_go_another_way(t *testing.T) {
	t.Parallel()
	r := &round{proxies: newProxies(), url: "postgres://127.0.0.1:1/none"}
	s, err := r.newSlot("worker", 0, nil)
	require.NoError(t, err)
	stuck := s.through()
	t.Cleanup(func() { require.NoError(t, stuck.close()) })
	require.NoError(t, s.reroute(stuck))
	fresh := s.through()
	t.Cleanup(s.hangUp)
	require.NotEqual(t, stuck.url, fresh.url)
	require.NoError(t, s.reroute(stuck), "it was left behind already")
	require.Same(t, fresh, s.through())
}
