package pgserver

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// refusing is a database that refuses a statement with these codes, one after the other.
type refusing []string

func (r *refusing) Exec(context.Context, string, ...any) (tag pgconn.CommandTag, err error) {
	if len(*r) > 0 {
		err = &pgconn.PgError{Code: (*r)[0]}
		*r = (*r)[1:]
	}
	return tag, err
}

func TestExec_tries_again_while_the_database_is_in_use(t *testing.T) {
	t.Parallel()
	require.NoError(t, Exec(t.Context(), &refusing{"55006", "55006"}, "DROP DATABASE a"))
	require.ErrorContains(t, Exec(t.Context(), &refusing{"55006", "55006", "55006"}, "DROP DATABASE a"), "55006")
	db := &refusing{"42501", "42501"}
	require.ErrorContains(t, Exec(t.Context(), db, "DROP DATABASE a"), "42501")
	require.Len(t, *db, 1, "others are for good")
}
