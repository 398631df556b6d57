package pgtest

import (
	"context"
	"net/url"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Trouble is something that PostgreSQL answers with one SQLSTATE for as long as it
// lasts.
type Trouble struct {
	Code string
	Name string
	Says string // what an error of the library says: more than PostgreSQL's, of what it knows

	Connecting bool // met when a connection is made, which those that are open are cut off for
	Setup      bool // is outbox.ErrSetup
	OnlyWrites bool // what only reads goes on

	begin func(t testing.TB, db *DB, role string) (end func())
}

// Victim returns a pool that meets the trouble once begin is called, until end is, or the
// test ends.
func (tr Trouble) Victim(t testing.TB, db *DB) (pool *pgxpool.Pool, begin func() (end func())) {
	t.Helper()
	role := Name("victim")
	require.NoError(t, OnServer("CREATE ROLE "+role+" LOGIN PASSWORD 'victim'"))
	t.Cleanup(func() {
		require.NoError(t, db.late("DROP OWNED BY "+role))
		require.NoError(t, OnServer("DROP ROLE "+role))
	})
	db.MustExec(t, allRights+role, pgx.QueryExecModeSimpleProtocol)
	u, err := url.Parse(db.URL)
	require.NoError(t, err)
	u.User = url.UserPassword(role, "victim")
	pool = NewPool(t, u.String(), func(cfg *pgxpool.Config) {
		cfg.MaxConns = 5
	})
	return pool, func() func() {
		undo := tr.begin(t, db, role)
		var once sync.Once
		end := func() { once.Do(undo) }
		t.Cleanup(end) // before the role and the database are dropped
		return end
	}
}

const allRights = "GRANT ALL ON outbox_notifications, outbox_migrations TO "

// late runs a statement outside of the test's time, which may have ended.
func (db *DB) late(sql string) error {
	_, err := db.Exec(context.Background(), sql, pgx.QueryExecModeSimpleProtocol)
	return err
}

// cutOff ends the connections of a role.
func cutOff(t testing.TB, role string) {
	t.Helper()
	require.NoError(t, OnServer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '"+role+"'"))
}

// altered is a trouble that one statement about the role begins, and another ends.
// Cut: connections keep what they were made with.
func altered(begin, end string, cut bool) func(testing.TB, *DB, string) func() {
	return func(t testing.TB, db *DB, role string) func() {
		db.MustExec(t, begin+role)
		if cut {
			cutOff(t, role)
		}
		return func() { require.NoError(t, db.late(end+role)) }
	}
}

// alteredRole is altered for what follows the role's name.
func alteredRole(begin, end string) func(testing.TB, *DB, string) func() {
	return func(t testing.TB, _ *DB, role string) func() {
		require.NoError(t, OnServer("ALTER ROLE "+role+" "+begin))
		cutOff(t, role)
		return func() { require.NoError(t, OnServer("ALTER ROLE "+role+" "+end)) }
	}
}

// locked has somebody hold the tables.
func locked(t testing.TB, db *DB, _ string) func() {
	tx := db.MustBegin(t)
	_, err := tx.Exec(t.Context(), "LOCK TABLE outbox_notifications, outbox_migrations")
	require.NoError(t, err)
	return func() { require.NoError(t, tx.Rollback(context.Background())) }
}

// lockedFor has the role wait for somebody who holds the tables, for as long as the
// setting allows.
func lockedFor(setting string) func(testing.TB, *DB, string) func() {
	shorten := alteredRole("SET "+setting+" = '200ms'", "RESET "+setting)
	return func(t testing.TB, db *DB, role string) func() {
		unlock := locked(t, db, role)
		lengthen := shorten(t, db, role)
		return func() {
			unlock()
			lengthen()
			cutOff(t, role)
		}
	}
}

// broken has the table call a function that is gone from the catalog.
func broken(t testing.TB, db *DB, _ string) func() {
	for _, sql := range []string{
		"CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
		"CREATE TRIGGER gone BEFORE INSERT OR UPDATE ON outbox_notifications FOR EACH STATEMENT EXECUTE FUNCTION gone()",
		"DELETE FROM pg_proc WHERE proname = 'gone'",
	} {
		db.MustExec(t, sql)
	}
	return func() { require.NoError(t, db.late("DROP TRIGGER gone ON outbox_notifications")) }
}

// renamed has the database go by another name.
func renamed(t testing.TB, db *DB, _ string) func() {
	name := db.Config().ConnConfig.Database
	rename := func(from, to string) {
		t.Helper()
		require.NoError(t, OnServer("ALTER DATABASE "+from+" ALLOW_CONNECTIONS false"))
		renamed := assert.Eventually(t, func() bool {
			return OnServer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '"+from+"'") == nil &&
				OnServer("ALTER DATABASE "+from+" RENAME TO "+to) == nil
		}, patience, patience/1000)
		if !renamed {
			to = from
		}
		require.NoError(t, OnServer("ALTER DATABASE "+to+" ALLOW_CONNECTIONS true"))
		require.True(t, renamed)
		db.Reset()
	}
	rename(name, name+"_away")
	return func() { rename(name+"_away", name) }
}

// Troubles are real ones, each of its own making. What ends with a server's process, or is
// about a disk, is tested elsewhere.
var Troubles = []Trouble{
	{Code: "57014", Name: "statement_timeout", Says: "cancelled by statement_timeout or by request",
		begin: lockedFor("statement_timeout")},
	{Code: "55P03", Name: "lock_timeout", Says: "lock_timeout passed",
		begin: lockedFor("lock_timeout")},
	{Code: "25006", Name: "read_only", Says: "read-only", OnlyWrites: true,
		begin: alteredRole("SET default_transaction_read_only = on", "RESET default_transaction_read_only")},
	{Code: "42501", Name: "no_rights", Says: "the database role may not do this", Setup: true,
		begin: altered("REVOKE ALL ON outbox_notifications, outbox_migrations FROM ", allRights, false)},
	{Code: "42P01", Name: "no_table", Says: "run Migrate first", Setup: true,
		begin: func(t testing.TB, db *DB, _ string) func() {
			db.MustExec(t, "ALTER TABLE outbox_notifications RENAME TO away")
			return func() { require.NoError(t, db.late("ALTER TABLE away RENAME TO outbox_notifications")) }
		}},
	{Code: "XX000", Name: "an_internal_error", Says: "SQLSTATE XX000", OnlyWrites: true, begin: broken},
	{Code: "3D000", Name: "no_database", Says: "lets nobody in", Connecting: true, begin: renamed},
	{Code: "28000", Name: "no_login", Says: "lets nobody in", Connecting: true, begin: alteredRole("NOLOGIN", "LOGIN")},
	{Code: "53300", Name: "too_many_connections", Says: "has no connection left", Connecting: true, begin: alteredRole("CONNECTION LIMIT 0", "CONNECTION LIMIT -1")},
}
