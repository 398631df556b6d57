package outbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// notifyEvery is how often a store sends a NOTIFY at most. A transaction with one
// takes a lock at its commit that all such transactions of the server share.
const notifyEvery = 250 * time.Millisecond

// notifySQL wakes relays when its transaction commits. The payload tells the outboxes
// of one database apart. $1 channel, $2 schema.
const notifySQL = `SELECT pg_catalog.pg_notify($1::pg_catalog.text, $2::pg_catalog.text)`

// notify sends a NOTIFY if none has been sent for a while, and the store is
// configured to. Of the adds in between, and of those whose NOTIFY a rollback takes
// back, relays learn by polling.
func (s *PGStore) notify(ctx context.Context, db queryRower) error {
	if !s.notifies {
		return nil
	}
	now := int64(time.Since(s.born))
	last := s.notified.Load()
	if last != 0 && now-last < int64(notifyEvery) || !s.notified.CompareAndSwap(last, now) {
		return nil
	}
	return db.QueryRow(ctx, notifySQL, tableName, s.schema).Scan(nil)
}

const listenCheck = 30 * time.Second // between two signs of life

var probeTime = 5 * time.Second // for a NOTIFY of our own to arrive; the tests of this package have more

// Listen calls wake whenever a store with [Config].Notify on the same schema has added
// something, and once when it has begun to listen, as it does not know what was added
// before. It blocks until ctx ends or its connection breaks, and is then to be called
// again; adds that were made meanwhile are known by polling only.
//
// It takes a connection of its own beside the pool, with the pool's configuration,
// BeforeConnect included but not AfterConnect. Where a pooler keeps notifications from
// arriving, which it finds out by sending one through the pool, the error is
// [ErrNoNotifications].
func (s *PGStore) Listen(ctx context.Context, wake func()) error {
	if wake == nil {
		return invalid("wake", "nil")
	}
	err := s.listen(ctx, wake)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, ErrNoNotifications):
		return err
	}
	return s.explain("listen", err)
}

func (s *PGStore) listen(ctx context.Context, wake func()) error {
	cfg := s.pool.Config()
	if cfg.BeforeConnect != nil { // which may fetch the password
		if err := cfg.BeforeConnect(ctx, cfg.ConnConfig); err != nil {
			return err
		}
	}
	cfg.ConnConfig.OnNotification = nil // it would take what we wait for
	conn, err := pgx.ConnectConfig(ctx, cfg.ConnConfig)
	if err != nil {
		return err
	}
	defer func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		conn.Close(bounded)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+tableName, pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	if err := s.probe(ctx, conn); err != nil {
		return err
	}
	wake()
	for {
		bounded, cancel := context.WithTimeout(ctx, listenCheck)
		n, err := conn.WaitForNotification(bounded)
		cancel()
		switch {
		case err == nil && n.Payload == s.schema:
			wake()
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			bounded, cancel := context.WithTimeout(ctx, listenCheck)
			err := conn.Ping(bounded)
			cancel()
			if err != nil {
				return fmt.Errorf("no sign of life: %w", err)
			}
		default:
			return err
		}
	}
}

// probe sends a NOTIFY through the pool and waits for it on conn. Sent on conn it
// would arrive behind a pooler too, which is likely to use the same server connection for both.
func (s *PGStore) probe(ctx context.Context, conn *pgx.Conn) error {
	mark := NewToken().String()
	sending, cancel := context.WithTimeout(ctx, listenCheck)
	defer cancel()
	err := s.onConn(sending, func(conn *pgxpool.Conn) error {
		return conn.QueryRow(sending, notifySQL, tableName, mark).Scan(nil)
	})
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	for {
		n, err := conn.WaitForNotification(bounded)
		switch {
		case err == nil && n.Payload == mark:
			return nil
		case err == nil:
		case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
			return ErrNoNotifications
		default:
			return err
		}
	}
}
