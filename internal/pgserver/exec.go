package pgserver

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// Exec runs a statement that PostgreSQL refuses while its database is in use, such as DROP
// DATABASE WITH (FORCE). Connections that are closing have 5 s to be gone, which is too
// short on a busy machine, and then it fails with 55006: it is tried three times.
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
