package outbox

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Store is what a booking service calls inside its own transaction. [PGStore]
// implements it; services declare their dependency as a Store so that their
// own tests can replace it.
//
// Both methods run on tx alone: they never commit, never open a connection
// and never start a savepoint. What they did is undone when tx rolls back.
// They may be called from many goroutines, each with a transaction of its own.
//
// Errors, for both methods:
//
//   - bad input: errors.Is [ErrInvalid], found before any SQL; tx goes on as if
//     the call had not been made.
//   - any other error is a reason to roll tx back. An error of PostgreSQL's, found
//     by errors.As as a [github.com/jackc/pgx/v5/pgconn.PgError], leaves tx aborted,
//     and when the connection breaks tx is gone. When [IsRetryable], run the
//     whole transaction again ([RunInTx] does). Two leave tx usable: a row that could
//     neither be found nor made in several tries, as a policy or a trigger on the table
//     suppresses it (a batch may have added others by then), and what pgx refuses to
//     send, in its simple protocol mode with standard_conforming_strings off or an
//     encoding of the client that is not UTF8.
//   - a duplicate is not an error: no call returns a unique violation of the
//     key (23505), however many rivals add the same key at once. (PostgreSQL does
//     not hold to that while an index of the table is built CONCURRENTLY.)
//
// The row of the key stays locked until tx ends. A rival that adds the same key
// waits for that, bounded by its ctx and by PostgreSQL's lock_timeout.
type Store interface {
	// AddNotification makes the outbox hold n under its key: a new row where
	// there was none, a refreshed one while it is pending, and otherwise the
	// row as it is. It takes one round trip, or two when a rival created the
	// row in the same moment. It takes two as well where the store has guessed wrong:
	// after sixteen adds in a row that found the same (no row, a pending, a settled
	// one) it begins with a statement for just that. Of adds one after the other at most
	// one in seventeen does.
	// (A booking id beyond an integer costs one more round trip until
	// the store has seen that the column is a bigint.)
	AddNotification(ctx context.Context, tx pgx.Tx, n NewNotification) (AddResult, error)

	// AddNotifications does the same for many, in a number of statements that
	// does not grow with len(ns) (one for each of up to four shapes of key, with and
	// without booking and candidate, and one more where rivals or a wrong guess
	// leave something to do), all or nothing: one bad element refuses all of
	// them with its index in the error. The results are in the order of ns.
	//
	// A key given twice is folded as two calls would fold it: the first creates,
	// the second refreshes. Both results then hold the row as it stands after
	// the whole call. Keys are locked in one order whatever the order of ns, so
	// two batches never deadlock each other. Single adds of several keys in one
	// transaction lock in the order called; use one batch, or [RunInTx].
	AddNotifications(ctx context.Context, tx pgx.Tx, ns []NewNotification) ([]AddResult, error)
}
