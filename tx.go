package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// SQLSTATE codes that are told apart here.
const (
	codeReadOnly             = "25006"
	codeAborted              = "25P02"
	codeSerializationFailure = "40001"
	codeDeadlock             = "40P01"
	codeNoPrivilege          = "42501"
	codeNoColumn             = "42703"
	codeNoTable              = "42P01"
	codeNoKey                = "42P10"
	codeLockTimeout          = "55P03"
	codeDiskFull             = "53100"
	codeCancelled            = "57014"
	codeNoLogin              = "28000"
	codeWrongPassword        = "28P01"
	codeNoDatabase           = "3D000"
	codeTooManyConnections   = "53300"
	codeTerminated           = "57P01"
	codeStarting             = "57P03"
)

// IsRetryable reports whether err is PostgreSQL's word that the transaction as
// a whole should be run again from its start: a serialization failure (40001)
// or a deadlock (40P01). It is false once err also says that a context ended.
func IsRetryable(err error) bool {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	code := sqlState(err)
	return code == codeSerializationFailure || code == codeDeadlock
}

func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

const (
	maxTxRuns  = 10
	minTxPause = 10 * time.Millisecond
	maxTxPause = time.Second
)

// RunInTx runs fn in a transaction on pool and commits it. When fn or the commit
// fails with an error that [IsRetryable], it rolls back, pauses for a random
// time that grows from up to 10 ms to up to 1 s, and runs fn again in a new
// transaction, ten times in all. fn must therefore be safe to run again: what it does outside the
// transaction it does once for each run.
//
// Any other error of fn is returned as it is after a rollback. A panic in fn
// rolls back and goes on up. fn must neither commit nor roll back. An error of
// the connection is not retried, since whether a commit that it cut off took
// effect is unknown; an idempotent fn may be run again by the caller.
//
// When ctx ends in a pause, the error has both ctx's error and the last one.
func RunInTx(ctx context.Context, pool *pgxpool.Pool, opts pgx.TxOptions, fn func(pgx.Tx) error) error {
	if pool == nil {
		return invalid("pool", "nil")
	}
	if fn == nil {
		return invalid("fn", "nil")
	}
	err := runInTx(ctx, pool, opts, fn)
	var gaveUp *gaveUpError
	if errors.As(err, &gaveUp) {
		return fmt.Errorf("outbox: %w", err)
	}
	return err
}

// runInTx is RunInTx for methods that put the package's name before their errors.
func runInTx(ctx context.Context, pool *pgxpool.Pool, opts pgx.TxOptions, fn func(pgx.Tx) error) error {
	return retry(ctx, func() error { return pgx.BeginTxFunc(ctx, pool, opts, fn) })
}

// gaveUpError is what retry returns in place of a transaction's own error.
type gaveUpError struct{ error }

func (e *gaveUpError) Unwrap() error { return e.error }

// retry runs a transaction, again while its error [IsRetryable].
func retry(ctx context.Context, tx func() error) error {
	pause := minTxPause
	for run := 1; ; run++ {
		err := tx()
		if err == nil || !IsRetryable(err) {
			return err
		}
		if run == maxTxRuns {
			return &gaveUpError{fmt.Errorf("the transaction failed %d times, last: %w", run, err)}
		}
		if ended := sleep(ctx, rand.N(pause)); ended != nil {
			return &gaveUpError{fmt.Errorf("not running the transaction again: %w; it failed with: %w", ended, err)}
		}
		pause = min(2*pause, maxTxPause)
	}
}

// sleep pauses for d, or returns ctx's error if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return ctx.Err()
	}
}

// explain says of an error which operation met it and, where the code of
// PostgreSQL allows, what that means here. The PgError and ctx's errors stay
// reachable.
func (s *PGStore) explain(operation string, err error) error {
	hint := meaning(sqlState(err))
	switch sqlState(err) {
	case codeNoTable:
		hint = "there is no table " + s.table + ", run Migrate first: "
		err = setupError{err}
	case codeNoColumn, codeNoKey:
		hint = "the table " + s.table + " is not migrated, run Migrate first: "
		err = setupError{err}
	case codeNoPrivilege:
		err = setupError{err}
	case codeAborted:
		hint = "an earlier error has aborted the transaction: "
	case codeLockTimeout:
		hint = "lock_timeout passed while another transaction held the row: "
	case codeCancelled:
		hint = "cancelled by statement_timeout or by request, perhaps while another transaction held the row: "
	case codeSerializationFailure, codeDeadlock:
		hint = "run the whole transaction again: "
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		hint = "the context ended before PostgreSQL answered, perhaps while others held a lock: "
	}
	return fmt.Errorf("outbox: %s: %s%w", operation, hint, err)
}

// meaning is what a code of PostgreSQL means to whatever call meets it. "" for others.
func meaning(code string) string {
	switch code {
	case codeNoPrivilege:
		return "the database role may not do this: "
	case codeReadOnly:
		return "the transaction is read-only: "
	case codeDiskFull:
		return "the server's disk is full: "
	case codeNoLogin, codeWrongPassword, codeNoDatabase:
		return "the server lets nobody in by what the pool is configured with: "
	case codeTooManyConnections:
		return "the server, the database or the role has no connection left: "
	case codeTerminated:
		return "an administrator ended the connection: "
	case codeStarting:
		return "the server is starting or shutting down: "
	}
	return ""
}

// setupError is an error in which errors.Is finds [ErrSetup].
type setupError struct{ error }

func (e setupError) Is(target error) bool { return target == ErrSetup }
func (e setupError) Unwrap() error        { return e.error }
