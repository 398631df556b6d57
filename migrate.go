package outbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
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
// others wait, and once the schema is current a call is one query without locks
// that needs no more than SELECT on outbox_migrations. A schema that is newer
// than this version of the library is left alone.
//
// What a migration locks, and for how long, stands at the top of its file in the
// package migrations. Migrate waits for a lock for a second at a time, and then
// lets those through who queue up behind it; it goes on trying until ctx ends.
//
// A table that cannot be taken over, above all because rows share a key, is an
// error that lists the reasons, and is not changed.
func (s *PGStore) Migrate(ctx context.Context) error {
	files, err := migrationFiles()
	if err != nil {
		return fmt.Errorf("outbox: migrate: %w", err)
	}
	latest := files[len(files)-1].version
	version, err := s.schemaVersion(ctx, s.pool)
	if err != nil {
		return s.explain("migrate", err)
	}
	for tries := 1; version < latest; tries++ {
		err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return s.migrateTx(ctx, tx, files) })
		if err == nil {
			return nil
		}
		if sqlState(err) != codeLockTimeout {
			return s.explainMigration(err)
		}
		s.logger.LogAttrs(ctx, slog.LevelWarn, "outbox: migration waits for a lock", slog.String("table", s.table), slog.Int("tries", tries))
		if err := sleep(ctx, time.Second); err != nil {
			return fmt.Errorf("outbox: migrate: %w while others held locks on %s", err, s.table)
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

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
	if err := db.QueryRow(ctx, "SELECT pg_catalog.to_regclass($1::text) IS NOT NULL", table).Scan(&there); err != nil || !there {
		return 0, err
	}
	var version int
	err := db.QueryRow(ctx, "SELECT coalesce(pg_catalog.max(version), 0) FROM "+table).Scan(&version)
	return version, err
}

// migrateTx applies what is missing. The advisory lock is of the transaction, so
// that it also holds behind a pooler; it is for one schema of one database.
func (s *PGStore) migrateTx(ctx context.Context, tx pgx.Tx, files []migrationFile) error {
	var server int
	if err := tx.QueryRow(ctx, "SELECT pg_catalog.current_setting('server_version_num')::int").Scan(&server); err != nil {
		return err
	}
	if server < minServerVersion {
		return fmt.Errorf("PostgreSQL %d is too old, the outbox needs 15 or newer", server/10000)
	}
	schema := pgx.Identifier{s.schema}.Sanitize()
	// pg_temp last: else a temporary table of the name would be taken for the outbox.
	// A statement_timeout made for queries would never let an index be built.
	if _, err := tx.Exec(ctx, "SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = 0; SET LOCAL search_path = "+
		schema+", pg_temp", pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1::text, 0))",
		"outbox migrate "+s.schema); err != nil {
		return err
	}
	var there bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1::text)", s.schema).Scan(&there); err != nil {
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
		if _, err := tx.Exec(ctx, f.sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		s.logger.LogAttrs(ctx, slog.LevelInfo, "outbox: migrated", slog.String("table", s.table), slog.Int("version", f.version))
	}
	return nil
}

// explainMigration shows the detail of PostgreSQL's error, where a refused
// takeover lists its reasons.
func (s *PGStore) explainMigration(err error) error {
	err = s.explain("migrate "+s.table, err)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Detail != "" {
		return fmt.Errorf("%w\n%s\n%s", err, pg.Detail, pg.Hint)
	}
	return err
}
