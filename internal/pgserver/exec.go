package pgserver

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// Exec runs a statement that nobody may use a database for, such as DROP DATABASE WITH
// (FORCE). PostgreSQL gives connections that are closing 5 s to be gone, which is too short
// for a busy machine, and fails with 55006: it is tried three times.
func Exec(ctx context.Context, db interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}, sql string) (err error) {
	for range 3 {
		_, err = db.Exec(ctx, sql)
		var pg *pgconn.PgError
		if inUse := errors.As(err, &pg) && pg.Code == "55006"; !inUse {
			break
		}
	}
	return err
}
