package pgserver

import (
	"context"
	"errors"
	"fmt"
)

// ErrPaused is returned, wrapped, for what a paused server cannot do.
var ErrPaused = errors.New("the server is paused")

// Crash kills the server with SIGKILL, every process of it, and starts it again with
// the same data on the same URL. It returns when recovery has ended and connections
// are accepted.
//
// With fsync off nothing is lost by that: what a server has written is in the hands
// of the operating system, which goes on. Synchronous_commit is another matter: while
// it is off, as by default here, the commits of the last half second may be unwritten.
// Set it to on where they have to survive.
func (s *Server) Crash(ctx context.Context) error {
	return s.fault("crash", func() error {
		if s.paused {
			return ErrPaused
		}
		return s.runs.crash(ctx)
	})
}

// Restart shuts the server down, without waiting for clients to leave, and starts it
// again with the same data on the same URL. It returns when connections are accepted.
func (s *Server) Restart(ctx context.Context) error {
	return s.fault("restart", func() error {
		if s.paused {
			return ErrPaused
		}
		return s.runs.restart(ctx)
	})
}

// Pause freezes the server, every process of it: connections stay open, new ones are
// taken, and nothing is answered, as with a pulled cable. A second call does nothing.
//
// A container stays frozen if this process is killed, and then does not end by itself.
func (s *Server) Pause(ctx context.Context) error {
	return s.fault("pause", func() error {
		if s.paused {
			return nil
		}
		err := s.runs.pause(ctx)
		s.paused = err == nil
		return err
	})
}

// Resume has a paused server go on where it was. One that is not paused is left alone.
func (s *Server) Resume(ctx context.Context) error {
	return s.fault("resume", func() error {
		if !s.paused {
			return nil
		}
		err := s.runs.resume(ctx)
		s.paused = err != nil
		return err
	})
}

// Shell runs a command where the server runs, as its user, with PGDATA set.
func (s *Server) Shell(ctx context.Context, command string) error {
	return s.fault("shell", func() error {
		if s.paused {
			return ErrPaused
		}
		return s.runs.shell(ctx, command)
	})
}

func (s *Server) fault(name string, do func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	switch {
	case s.stopped:
		err = errors.New("the server was stopped")
	case s.killed:
		err = errors.New("the server was killed")
	default:
		err = do()
	}
	if err != nil {
		return fmt.Errorf("pgserver: %s: %w", name, err)
	}
	return nil
}
