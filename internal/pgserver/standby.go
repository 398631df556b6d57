package pgserver

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

var errLifeline = errors.New("a server with a Lifeline can have no standby, which would have none")

// StartStandby starts a second server that streams from this one, with its version and
// settings, and waits until it does: a hot standby, which answers queries and refuses
// writes. It is a [Server] of its own, to be stopped like any other, with [Server.Promote],
// [Server.CatchUp] and [Server.Detach] besides. Replication is asynchronous; see
// [Server.Synchronous].
//
// With Docker the two reach each other over the bridge network, on which the server lets
// everybody replicate, without a password.
func (s *Server) StartStandby(ctx context.Context) (standby *Server, err error) {
	err = s.fault("start a standby", func() error {
		if s.paused {
			return ErrPaused
		}
		s.standbys++
		name := fmt.Sprintf("standby%d", s.standbys)
		standby, err = s.runs.startStandby(ctx, name)
		if err != nil {
			return err
		}
		standby.primary, standby.name = s, name
		if err := standby.follow(ctx); err != nil {
			return errors.Join(err, standby.Stop())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return standby, nil
}

// standbyConninfo leads a standby of that name to its primary.
func standbyConninfo(host string, port int, name string) string {
	return fmt.Sprintf("host=%s port=%d user=postgres application_name=%s", host, port, name)
}

// follow waits until a standby that was started streams. What it copied may say that the
// primary waits for standbys. It has none itself, and is to commit once it is promoted.
func (s *Server) follow(ctx context.Context) error {
	if err := execute(ctx, s.URL, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"); err != nil {
		return err
	}
	return waitTrue(ctx, s.primary.URL, "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming')", s.name)
}

// Synchronous has every commit from now on wait until a standby has it on its disk. It
// returns when that is in force. The server needs a standby that streams, and
// synchronous_commit on, which is not its default here. Without a standby commits then
// wait for one.
func (s *Server) Synchronous(ctx context.Context) error {
	return s.fault("synchronous", func() error {
		if s.paused {
			return ErrPaused
		}
		if on, err := ask[string](ctx, s.URL, "SHOW synchronous_commit"); err != nil || on != "on" {
			return errors.Join(err, fmt.Errorf("synchronous_commit is %q, not on", on))
		}
		if err := execute(ctx, s.URL, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"); err != nil {
			return err
		}
		// A connection that was opened after the postmaster had read the setting and
		// signalled the others sees it.
		if err := waitTrue(ctx, s.URL, "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')"); err != nil {
			return err
		}
		// It is the checkpointer that tells backends to wait. The second checkpoint is one
		// that it began after it had looked for signals.
		return execute(ctx, s.URL, "CHECKPOINT", "CHECKPOINT")
	})
}

// CatchUp waits until a standby has replayed what its primary had written when it was
// called.
func (s *Server) CatchUp(ctx context.Context) error {
	return s.standbyFault("catch up", func() error {
		// Synchronous_commit may be off: what is not in the log's file yet is not sent.
		written, err := ask[string](ctx, s.primary.URL, "SELECT pg_current_wal_insert_lsn()::text FROM txid_current()")
		if err != nil {
			return err
		}
		return waitTrue(ctx, s.URL, "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", written)
	})
}

// Detach ends a standby's replication. What its primary commits after Detach has returned
// never reaches it, which makes the loss of an asynchronous failover certain.
func (s *Server) Detach(ctx context.Context) error {
	return s.standbyFault("detach", func() error {
		if err := execute(ctx, s.URL, "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"); err != nil {
			return err
		}
		if err := waitTrue(ctx, s.URL, "SELECT current_setting('primary_conninfo') = '' AND NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"); err != nil {
			return err
		}
		return waitTrue(ctx, s.primary.URL, "SELECT NOT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = $1)", s.name)
	})
}

// Promote has a standby become a primary, and returns when it takes writes. Its old
// primary is left alone; see [Server.Kill].
func (s *Server) Promote(ctx context.Context) error {
	return s.standbyFault("promote", func() error {
		if err := execute(ctx, s.URL, "SELECT pg_promote(wait => false)"); err != nil {
			return err
		}
		return waitTrue(ctx, s.URL, "SELECT NOT pg_is_in_recovery()")
	})
}

func (s *Server) standbyFault(name string, do func() error) error {
	return s.fault(name, func() error {
		switch {
		case s.primary == nil:
			return errors.New("the server was not started as a standby")
		case s.paused:
			return ErrPaused
		}
		return do()
	})
}

// Kill ends the server with SIGKILL, every process of it, for good: its port refuses
// connections, and nothing but [Server.Stop] works afterwards. A paused server can be
// killed. A second call does nothing.
func (s *Server) Kill(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.killed || s.stopped {
		return nil
	}
	if err := s.runs.kill(ctx); err != nil {
		return fmt.Errorf("pgserver: kill: %w", err)
	}
	s.killed, s.paused = true, false
	return nil
}

// WritableURL connects to whichever of the servers takes writes: the primary, and after
// a failover the promoted standby.
func WritableURL(servers ...*Server) string {
	var hosts []string
	for _, s := range servers {
		u, err := url.Parse(s.URL)
		if err != nil {
			panic(err)
		}
		hosts = append(hosts, u.Host)
	}
	return "postgres://postgres@" + strings.Join(hosts, ",") + "/postgres?sslmode=disable&target_session_attrs=read-write"
}

// execute runs statements on a connection of their own, each by itself.
func execute(ctx context.Context, url string, statements ...string) error {
	return connected(ctx, url, func(conn *pgx.Conn) error {
		for _, sql := range statements {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return fmt.Errorf("%s: %w", sql, err)
			}
		}
		return nil
	})
}

// ask returns the single value that a query gives, on a connection of its own.
func ask[T any](ctx context.Context, url, sql string, args ...any) (v T, err error) {
	err = connected(ctx, url, func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, sql, args...).Scan(&v)
	})
	return v, err
}

// waitTrue asks until the answer is true, each time on a new connection. It gives up
// when ctx ends and after startTimeout. A null is no answer.
func waitTrue(ctx context.Context, url, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		is, err := ask[*bool](ctx, url, sql, args...)
		if err != nil {
			return err
		}
		if is != nil && *is {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: not yet true: %s", ctx.Err(), sql)
		case <-time.After(pause):
		}
	}
}

func connected(ctx context.Context, url string, do func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return do(conn)
}
