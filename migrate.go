package outbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox/migrations"
)

// minServerVersion is PostgreSQL 15, the first with UNIQUE NULLS NOT DISTINCT.
const minServerVersion = 150000

// Migrate creates the table in the schema public, or brings the one that is
// there up to date. See [PGStore.Migrate].
func Migrate(ctx context.Context, pool *pgxpool.Pool) error {
	s, err := NewPGStore(pool, Config{})
	if err != nil {
		return err
	}
	return s.Migrate(ctx)
}

// Migrate creates the schema and the table of the store where there are none,
// takes over a table of the older kind with its rows, and otherwise applies what
// is missing, all in one transaction: it does everything or nothing.
//
// It may be called by many processes at once, on each start: one migrates, the
// others wait, and once the schema is current a call is two short queries, takes
// no lock that anybody could notice and needs no more than SELECT on
// outbox_migrations. A schema that is newer than this version of the library is
// left alone.
//
// What a migration locks, and for how long, stands at the top of its file in the
// package migrations. Migrate waits for a lock for 200 ms at a time, so that
// readers and writers do not queue up behind it for longer, and tries again every
// second or so until ctx ends. However many processes migrate, one at a time waits.
//
// A table that cannot be taken over, above all because rows share a key, is an
// error that lists the reasons, and is not changed.
func (s *PGStore) Migrate(ctx context.Context) error {
	files, err := migrationFiles()
	if err != nil {
		return fmt.Errorf("outbox: migrate: %w", err)
	}
	for {
		version, err := s.schemaVersion(ctx, s.pool)
		if err != nil {
			return explainMigration(err)
		}
		if version >= files[len(files)-1].version {
			return nil
		}
		// Not the defaults of the connection: a snapshot taken before the lock would hide what
		// another process has just migrated.
		err = pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite},
			func(tx pgx.Tx) error { return s.migrateTx(ctx, tx, files) })
		if err == nil {
			return nil
		}
		if !errors.Is(err, errMigrating) {
			return explainMigration(err)
		}
		if err := sleep(ctx, 100*time.Millisecond+rand.N(200*time.Millisecond)); err != nil {
			return fmt.Errorf("outbox: migrate: %w while another process migrated schema %q", err, s.schema)
		}
	}
}

// errMigrating: another process holds the lock for migrating.
var errMigrating = errors.New("another process is migrating")

type migrationFile struct {
	version int
	sql     string
}

// migrationFiles returns the embedded files in order.
func migrationFiles() ([]migrationFile, error) {
	names, err := fs.Glob(migrations.FS, "*.up.sql") // sorted
	if err != nil {
		return nil, err
	}
	files := make([]migrationFile, len(names))
	for i, name := range names {
		number, _, _ := strings.Cut(name, "_")
		version, err := strconv.Atoi(number)
		if err != nil {
			return nil, err
		}
		sql, err := migrations.FS.ReadFile(name)
		if err != nil {
			return nil, err
		}
		files[i] = migrationFile{version, string(sql)}
	}
	return files, nil
}

type queryRower interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// schemaVersion returns the number of the last migration applied, 0 for none.
func (s *PGStore) schemaVersion(ctx context.Context, db queryRower) (int, error) {
	table := pgx.Identifier{s.schema, "outbox_migrations"}.Sanitize()
	var there bool
	if err := db.QueryRow(ctx, "SELECT pg_catalog.to_regclass($1::pg_catalog.text) IS NOT NULL", table).Scan(&there); err != nil || !there {
		return 0, err
	}
	var version int
	err := db.QueryRow(ctx, "SELECT coalesce(pg_catalog.max(version), 0) FROM "+table).Scan(&version)
	return version, err
}

// migrateTx applies what is missing. The advisory lock is of the transaction, so
// that it also holds behind a pooler; it is for one schema of one database. It is
// kept while the locks on the table are waited for, so that others do not take
// turns in blocking the table's users.
func (s *PGStore) migrateTx(ctx context.Context, tx pgx.Tx, files []migrationFile) error {
	var server int
	if err := tx.QueryRow(ctx, "SELECT pg_catalog.current_setting('server_version_num')::int").Scan(&server); err != nil {
		return err
	}
	if server < minServerVersion {
		return fmt.Errorf("PostgreSQL %d is too old, the outbox needs 15 or newer", server/10000)
	}
	var mine bool
	if err := tx.QueryRow(ctx, "SELECT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($1::pg_catalog.text, 0))",
		"outbox migrate "+s.schema).Scan(&mine); err != nil {
		return err
	}
	if !mine {
		return errMigrating
	}
	schema := pgx.Identifier{s.schema}.Sanitize()
	// pg_temp last: else a temporary table of the name would be taken for the outbox.
	// Timeouts made for a service's queries would never let an index be built.
	if _, err := tx.Exec(ctx, "SET LOCAL lock_timeout = '200ms'; SET LOCAL statement_timeout = 0;"+
		"SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL search_path = "+schema+", pg_temp",
		pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	var there bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1::pg_catalog.text)", s.schema).Scan(&there); err != nil {
		return err
	}
	if !there {
		if _, err := tx.Exec(ctx, "CREATE SCHEMA "+schema); err != nil {
			return err
		}
	}
	version, err := s.schemaVersion(ctx, tx)
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.version <= version {
			continue
		}
		if err := s.applyFile(ctx, tx, f); err != nil {
			return err
		}
		s.logger.LogAttrs(ctx, slog.LevelInfo, "outbox: migrated", slog.String("schema", s.schema), slog.Int("version", f.version))
	}
	return nil
}

// applyFile runs a file in a savepoint, again until it gets its locks.
func (s *PGStore) applyFile(ctx context.Context, tx pgx.Tx, f migrationFile) error {
	for tries := 1; ; tries++ {
		err := pgx.BeginFunc(ctx, tx, func(savepoint pgx.Tx) error {
			_, err := savepoint.Exec(ctx, f.sql, pgx.QueryExecModeSimpleProtocol)
			return err
		})
		if code := sqlState(err); code != codeLockTimeout && code != codeDeadlock {
			return err
		}
		s.logger.LogAttrs(ctx, slog.LevelWarn, "outbox: migration waits for locks that others hold",
			slog.String("schema", s.schema), slog.Int("version", f.version), slog.Int("tries", tries))
		if err := sleep(ctx, time.Second+rand.N(time.Second/2)); err != nil {
			return fmt.Errorf("%w while others held locks on %s", err, s.table)
		}
	}
}

// explainMigration is explain for Migrate. It adds the detail of PostgreSQL's error, where a
// refused takeover lists its reasons.
func explainMigration(err error) error {
	var pg *pgconn.PgError
	errors.As(err, &pg)
	if sqlState(err) == codeNoPrivilege {
		err = setupError{err}
	}
	err = fmt.Errorf("outbox: migrate: %s%w", meaning(sqlState(err)), err)
	if pg != nil {
		for _, more := range []string{pg.Detail, pg.Hint} {
			if more != "" {
				err = fmt.Errorf("%w\n%s", err, more)
			}
		}
	}
	return err
}
