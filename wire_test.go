package outbox_test

import (
	"context"
	"encoding/json"
	"math"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// statementLog is a tracer that keeps the statements sent.
type statementLog struct {
	mu   sync.Mutex
	sent []string
}

func (l *statementLog) TraceQueryStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = append(l.sent, d.SQL)
	return ctx
}

func (l *statementLog) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (l *statementLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = nil
}

func (l *statementLog) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

// gatedDB is a pool on which a function runs before the nth statement that is
// sent in a transaction after BEGIN.
type gatedDB struct {
	pool *pgxpool.Pool
	mu   sync.Mutex
	n    int
	at   int
	fn   func()
}

func newGatedDB(t testing.TB, db *pgtest.DB) *gatedDB {
	g := &gatedDB{}
	g.pool = pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = g })
	return g
}

func (g *gatedDB) before(n int, fn func()) { g.n, g.at, g.fn = 0, n, fn }

func (g *gatedDB) TraceQueryStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fn != nil && d.SQL != "begin" {
		if g.n++; g.n == g.at {
			g.fn()
		}
	}
	return ctx
}

func (g *gatedDB) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// turns counts how often a connection turned from writing to reading: its
// network round trips.
type turns struct {
	net.Conn
	count   *atomic.Int64
	writing atomic.Bool
}

func (c *turns) Write(b []byte) (int, error) {
	c.writing.Store(true)
	return c.Conn.Write(b)
}

func (c *turns) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && c.writing.Swap(false) {
		c.count.Add(1)
	}
	return n, err
}

// TestRoundTrips shows that an add of a new, a pending and a settled key is one
// round trip once its statement is prepared, and a batch one or two.
func TestRoundTrips(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	var trips atomic.Int64
	var log statementLog
	pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
		dial := cfg.ConnConfig.DialFunc
		cfg.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &turns{Conn: conn, count: &trips}, nil
		}
		cfg.ConnConfig.Tracer = &log
		cfg.MaxConns = 1
	})
	measure := func(fn func(tx pgx.Tx)) (roundTrips int64, statements int) {
		tx := pgtest.Begin(t, pool, pgx.TxOptions{})
		trips.Store(0)
		log.reset()
		fn(tx)
		roundTrips, statements = trips.Load(), len(log.all())
		require.NoError(t, tx.Commit(t.Context()))
		return roundTrips, statements
	}
	for _, n := range []outbox.NewNotification{{Type: "warm"}, {Type: "warm", BookingID: 1}, {Type: "warm", CandidateTgID: 1}, {Type: "warm", BookingID: 1, CandidateTgID: 1}} {
		add := func(want outbox.Outcome) func(pgx.Tx) {
			return func(tx pgx.Tx) {
				res, err := db.Store.AddNotification(t.Context(), tx, n)
				require.NoError(t, err)
				require.Equal(t, want, res.Outcome)
			}
		}
		measure(add(outbox.OutcomeCreated)) // prepares the statement
		n.Type = "new"
		for _, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
			roundTrips, statements := measure(add(want))
			require.EqualValues(t, 1, roundTrips, want)
			require.Equal(t, 1, statements, want)
		}
		n.Payload = "changed"
		roundTrips, _ := measure(add(outbox.OutcomeRefreshed))
		require.EqualValues(t, 1, roundTrips, "changed")
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent'")
		roundTrips, _ = measure(add(outbox.OutcomeExisting))
		require.EqualValues(t, 1, roundTrips, "settled")
	}

	batch := func(first, n int) func(pgx.Tx) {
		return func(tx pgx.Tx) {
			ns := make([]outbox.NewNotification, n)
			for i := range ns {
				ns[i] = outbox.NewNotification{Type: "batch", BookingID: int64(first + i), Payload: i}
			}
			_, err := db.Store.AddNotifications(t.Context(), tx, ns)
			require.NoError(t, err)
		}
	}
	measure(batch(1, 1))
	measure(batch(1, 1))
	for _, size := range []int{1, 10, 3000} {
		roundTrips, statements := measure(batch(10_000, size))
		require.Equal(t, 1, statements, "%d new", size)
		if size < 100 { // the answer to a large one is read in several turns
			require.EqualValues(t, 1, roundTrips)
		}
		_, statements = measure(batch(10_000, size))
		want := 1
		if size > 16 { // the guess was that they are new, like the last ones
			want = 2
		}
		require.Equal(t, want, statements, "%d repeated", size)
		_, statements = measure(batch(10_000, size))
		require.Equal(t, 1, statements, "%d repeated again", size)
		db.MustExec(t, "DELETE FROM outbox_notifications")
	}
	_, statements := measure(func(tx pgx.Tx) {
		res, err := db.Store.AddNotifications(t.Context(), tx, nil)
		require.NoError(t, err)
		require.Empty(t, res)
	})
	require.Zero(t, statements)
}

// TestExecModes runs the same life of a key in each of pgx's ways to send a
// statement, straight and through PgBouncer.
func TestExecModes(t *testing.T) {
	t.Parallel()
	modes := []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe,
		pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol}
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewDB(t)
			liveInMode(t, db, db.URL, mode)
		})
	}
	t.Run("PgBouncer", func(t *testing.T) {
		t.Parallel()
		if pgtest.Server() == nil {
			t.Log("left out: no PgBouncer can be put before the server of OUTBOX_TEST_DATABASE_URL")
			return
		}
		bouncer, old := startPgBouncer(t)
		for _, mode := range modes {
			if old && (mode == pgx.QueryExecModeCacheStatement || mode == pgx.QueryExecModeDescribeExec) {
				t.Logf("PgBouncer before 1.21 knows no prepared statements: left out %s", mode)
				continue
			}
			t.Run(mode.String(), func(t *testing.T) {
				db := pgtest.NewDB(t)
				liveInMode(t, db, bouncer(db.URL), mode)
			})
		}
	})
}

// liveInMode migrates, adds, delivers and operates through url in one mode of pgx.
func liveInMode(t *testing.T, db *pgtest.DB, url string, mode pgx.QueryExecMode) {
	pool := pgtest.NewPool(t, url, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.DefaultQueryExecMode = mode
		cfg.MaxConns = 3
	})
	store, err := outbox.NewPGStore(pool, outbox.Config{Schema: `other "schema".x`, Logger: discard})
	require.NoError(t, err)
	for range 2 {
		require.NoError(t, store.Migrate(t.Context()))
	}
	// the store's schema is not on the search_path
	require.Zero(t, db.Count(t))

	notBefore := time.Date(2031, 5, 6, 7, 8, 9, 123456789, time.FixedZone("", 3600))
	full := outbox.NewNotification{
		Type: `it's "quoted" \ю $1`, BookingID: math.MaxInt64, CandidateTgID: math.MinInt64, RecruiterTgID: -5,
		Payload: json.RawMessage(`{"text":"it's \\ \"ю\" $1 ` + "\U0001F600" + `"}`), CorrelationID: `c'\"`,
		NotBefore: notBefore, NotAfter: notBefore.Add(time.Hour),
	}
	inTx := func(fn func(tx pgx.Tx)) {
		require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { fn(tx); return nil }))
	}
	for i, n := range []outbox.NewNotification{full, {Type: "bare"}, {Type: "booking", BookingID: 1}, {Type: "candidate", CandidateTgID: 1}} {
		many := n
		many.Type += " many"
		for pass, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed, outbox.OutcomeRefreshed} {
			if pass == 2 {
				n.Payload, many.Payload = "changed", "changed"
			}
			inTx(func(tx pgx.Tx) {
				one, err := store.AddNotification(t.Context(), tx, n)
				require.NoError(t, err)
				require.Equal(t, want, one.Outcome)
				batch, err := store.AddNotifications(t.Context(), tx, []outbox.NewNotification{many, n, many})
				require.NoError(t, err)
				require.Equal(t, want, batch[0].Outcome)
				require.Equal(t, outbox.AddResult{Notification: one.Notification, Outcome: outbox.OutcomeRefreshed}, batch[1])
				require.Equal(t, outbox.OutcomeRefreshed, batch[2].Outcome)
				require.Equal(t, batch[0].Notification, batch[2].Notification)
				got := one.Notification
				require.Equal(t, n.Key(), got.Key())
				require.EqualValues(t, 1+pass/2, got.Version)
				if i == 0 && pass < 2 {
					require.Equal(t, full.Payload, got.Payload)
					require.Equal(t, full.CorrelationID, got.CorrelationID)
					require.True(t, notBefore.Truncate(time.Microsecond).Equal(got.NextRetryAt))
					require.True(t, full.NotAfter.Truncate(time.Microsecond).Equal(got.NotAfter))
				}
			})
			got, err := store.Get(t.Context(), n.Key())
			require.NoError(t, err)
			require.Equal(t, n.Key(), got.Key())
		}
		_, err := pool.Exec(t.Context(), `UPDATE "other ""schema"".x".outbox_notifications SET status = 'sent'`)
		require.NoError(t, err)
		inTx(func(tx pgx.Tx) {
			res, err := store.AddNotification(t.Context(), tx, n)
			require.NoError(t, err)
			require.Equal(t, outbox.OutcomeExisting, res.Outcome)
			_, err = store.AddNotification(t.Context(), tx, outbox.NewNotification{})
			require.ErrorIs(t, err, outbox.ErrInvalid)
			// the two payloads of one key are compared by PostgreSQL
			batch, err := store.AddNotifications(t.Context(), tx, []outbox.NewNotification{
				{Type: "twice", BookingID: int64(i + 1), Payload: json.RawMessage(`{"a":1.0}`)},
				{Type: "twice", BookingID: int64(i + 1), Payload: json.RawMessage(`{"a": 1}`)},
			})
			require.NoError(t, err)
			require.EqualValues(t, 1, batch[1].Notification.Version)
		})
	}
	deliverInMode(t, store)
}

// deliverInMode delivers the four rows of type twice that are there, and operates on
// them.
func deliverInMode(t *testing.T, store *outbox.PGStore) {
	ctx := t.Context()
	requeued, err := store.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusSent, Types: []string{"it's", "twice"}})
	require.NoError(t, err)
	require.Len(t, requeued, 3)
	first, err := store.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour, Types: []string{"it's", "twice"}, MaxAttempts: 3})
	require.NoError(t, err)
	require.Len(t, first.Claimed, 1)
	rest, err := store.Claim(ctx, outbox.ClaimOptions{Limit: 100, Lease: time.Hour, Except: []int64{first.Claimed[0].ID}, AtMostOnce: true, Reconcile: true})
	require.NoError(t, err)
	require.Len(t, rest.Claimed, 3)
	cs := append(first.Claimed, rest.Claimed...)
	done := outbox.LeaseDone
	extended, err := store.Extend(ctx, []outbox.Lease{cs[0].Lease, cs[1].Lease, {ID: cs[2].ID}}, time.Hour)
	require.NoError(t, err)
	require.Equal(t, []outbox.LeaseResult{done, done, outbox.LeaseStale}, extended)
	settled, err := store.Settle(ctx, []outbox.Settlement{
		{Lease: cs[0].Lease, Verdict: outbox.Delivered, Receipt: `it's "{1,2}" \ю`},
		{Lease: cs[1].Lease, Verdict: outbox.Retry, Error: `it's "{1,2}" \ю`, RetryIn: time.Hour, Unknown: true},
		{Lease: cs[2].Lease, Verdict: outbox.Failed, Error: "NULL"},
		{Lease: cs[3].Lease, Verdict: outbox.HandedBack},
	})
	require.NoError(t, err)
	require.Equal(t, []outbox.LeaseResult{done, done, done, done}, settled)

	list, err := store.List(ctx, outbox.Filter{Types: []string{"it's", "twice"}, NewerThan: time.Hour})
	require.NoError(t, err)
	require.Len(t, list, 4)
	slices.SortFunc(list, func(a, b outbox.Notification) int {
		at := func(n outbox.Notification) int {
			return slices.IndexFunc(cs, func(c outbox.Claimed) bool { return c.ID == n.ID })
		}
		return at(a) - at(b)
	})
	require.Equal(t, `it's "{1,2}" \ю`, list[0].Receipt)
	require.Equal(t, `it's "{1,2}" \ю`, list[1].LastError)
	require.Equal(t, "NULL", list[2].LastError)
	require.Zero(t, list[3].Attempts)
	list, err = store.List(ctx, outbox.Filter{BookingID: cs[2].Notification.BookingID, Status: outbox.StatusFailed})
	require.NoError(t, err)
	require.Len(t, list, 1)
	n, err := store.Requeue(ctx, list[0].Key(), outbox.Key{Type: "it's"})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	requeued, err = store.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusSent, BookingID: list[0].BookingID, Types: []string{"twice"}})
	require.NoError(t, err)
	require.Empty(t, requeued)
	stats, err := store.Stats(ctx)
	require.NoError(t, err)
	require.Equal(t, outbox.TypeStats{Pending: 3, Due: 2, OldestDue: stats.Types["twice"].OldestDue, NextDue: stats.Types["twice"].NextDue}, stats.Types["twice"])
}

// startPgBouncer starts a PgBouncer in transaction mode before the server and
// returns what turns a URL of the server into one through it, and whether it is
// too old for prepared statements, as an installed one may be.
func startPgBouncer(t *testing.T) (through func(direct string) string, old bool) {
	t.Helper()
	at, stop, err := pgtest.Server().StartPgBouncer(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, stop()) })
	bouncer, err := url.Parse(at)
	require.NoError(t, err)
	through = func(direct string) string {
		u, err := url.Parse(direct)
		require.NoError(t, err)
		u.Host = bouncer.Host
		return u.String()
	}
	return through, bouncer.Query().Has("default_query_exec_mode")
}
