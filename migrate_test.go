package outbox_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
	"github.com/seed3357934d/outbox/migrations"
)

// pythonTable is the table that a SQLAlchemy service makes, with integer ids.
const pythonTable = `
CREATE TABLE bookings (id serial PRIMARY KEY, status varchar(20));
INSERT INTO bookings SELECT FROM generate_series(1, 100);
CREATE TABLE outbox_notifications (
	id serial NOT NULL,
	booking_id integer,
	type varchar(50) NOT NULL,
	payload_json json NOT NULL,
	candidate_tg_id bigint,
	recruiter_tg_id bigint NOT NULL,
	status varchar(20) DEFAULT 'pending' NOT NULL,
	attempts integer DEFAULT 0 NOT NULL,
	created_at timestamp with time zone NOT NULL,
	locked_at timestamp with time zone,
	next_retry_at timestamp with time zone,
	last_error text,
	correlation_id varchar(64),
	PRIMARY KEY (id),
	CONSTRAINT uq_outbox_type_booking_candidate UNIQUE (type, booking_id, candidate_tg_id),
	FOREIGN KEY(booking_id) REFERENCES bookings (id) ON DELETE CASCADE
);
CREATE INDEX ix_outbox_notifications_status ON outbox_notifications (status)`

const pythonInsert = `INSERT INTO outbox_notifications (booking_id, type, payload_json, candidate_tg_id, recruiter_tg_id,
	status, attempts, created_at, locked_at, next_retry_at, last_error, correlation_id)
	VALUES ($1, $2, '{"slot": "10:00"}', $3, 99, 'pending', 0, now(), NULL, NULL, NULL, 'py') RETURNING id`

// prebuiltIndex is the README's advice for large tables.
const prebuiltIndex = `CREATE UNIQUE INDEX CONCURRENTLY outbox_notifications_key
	ON outbox_notifications (type, booking_id, candidate_tg_id) NULLS NOT DISTINCT`

const pythonSelect = `SELECT id, booking_id, type, payload_json, candidate_tg_id, recruiter_tg_id, status, attempts, created_at,
	locked_at, next_retry_at, last_error, correlation_id FROM outbox_notifications WHERE status = 'pending'`

// describe returns all that the catalog says of the table, to be compared.
func describe(t testing.TB, db *pgtest.DB) string {
	t.Helper()
	return pgtest.One[string](t, db, `SELECT concat_ws(E'\n',
		(SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull, atthasdef), E'\n' ORDER BY attnum)
			FROM pg_attribute WHERE attrelid = to_regclass('outbox_notifications') AND attnum > 0),
		(SELECT string_agg(conname || ' ' || pg_get_constraintdef(oid), E'\n' ORDER BY conname) FROM pg_constraint WHERE conrelid = to_regclass('outbox_notifications')),
		(SELECT string_agg(pg_get_indexdef(indexrelid), E'\n' ORDER BY indexrelid) FROM pg_index WHERE indrelid = to_regclass('outbox_notifications')),
		(SELECT string_agg(nspname, ' ' ORDER BY nspname) FROM pg_namespace),
		(SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'public'::regnamespace))`)
}

func TestMigrate(t *testing.T) {
	t.Parallel()

	t.Run("creates_the_table", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, outbox.OutcomeCreated, db.Add(t, rejected).Outcome)
		for _, values := range []string{"('reject', 7, 42)", "('x', NULL, 42), ('x', NULL, 42)", "('x', 7, NULL), ('x', 7, NULL)", "('x', NULL, NULL), ('x', NULL, NULL)"} {
			_, err := db.Exec(t.Context(), "INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id) VALUES "+values)
			require.Equal(t, "23505", sqlState(t, err), values)
		}
	})

	t.Run("does_nothing_the_second_time", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		before := describe(t, db)
		// not even a lock that readers and writers hold is in its way
		tx := db.MustBegin(t)
		_, err := tx.Exec(t.Context(), "LOCK TABLE outbox_notifications IN ACCESS EXCLUSIVE MODE")
		require.NoError(t, err)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.NoError(t, tx.Rollback(t.Context()))
		require.Equal(t, before, describe(t, db))
	})

	t.Run("needs_no_rights_once_the_schema_is_current", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		role := pgtest.Name("adder")
		db.MustExec(t, "CREATE ROLE "+role+"; GRANT SELECT ON outbox_migrations TO "+role)
		t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP ROLE "+role)) })
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["role"] = role })
		require.NoError(t, outbox.Migrate(t.Context(), pool))
		pool.Close()
		db.MustExec(t, "DROP OWNED BY "+role)
	})

	for _, defaults := range []string{"read committed", "repeatable read", "serializable"} {
		t.Run("is_safe_from_many_processes_at_once_under_"+strings.ReplaceAll(defaults, " ", "_"), func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, pythonTable)
			pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
				cfg.ConnConfig.RuntimeParams["default_transaction_isolation"] = defaults
				cfg.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
			})
			for _, schema := range []string{"public", "a", "b", "c"} { // a table to take over, and schemas to create
				store, err := outbox.NewPGStore(pool, outbox.Config{Schema: schema, Logger: discard})
				require.NoError(t, err)
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						if err := store.Migrate(t.Context()); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				require.Equal(t, 3, pgtest.One[int](t, db, "SELECT count(*) FROM "+schema+".outbox_migrations"))
			}
		})
	}

	t.Run("lets_one_process_at_a_time_wait_for_the_tables_lock", func(t *testing.T) {
		// Each one that waits holds up all who come to the table after it.
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		reader := db.MustBegin(t)
		pgtest.One[int](t, reader, "SELECT count(*) FROM outbox_notifications")
		ctx := t.Context()
		var waits []<-chan pgtest.Result[any]
		for range 8 {
			waits = append(waits, pgtest.Later(func() (any, error) { return nil, db.Store.Migrate(ctx) }))
		}
		db.WaitBlocked(t, 1)
		for range 300 {
			require.LessOrEqual(t, pgtest.One[int](t, db, `SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'
				AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`), 1)
		}
		require.NoError(t, reader.Rollback(t.Context()))
		for _, c := range waits {
			_, err := pgtest.Await(t, c)
			require.NoError(t, err)
		}
	})

	t.Run("uses_the_schema_of_the_callers_choice", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		for _, schema := range []string{"bookings", `it's "odd".name`, strings.Repeat("ю", 31), "select"} {
			store, err := outbox.NewPGStore(db.Pool, outbox.Config{Schema: schema, Logger: discard})
			require.NoError(t, err)
			require.NoError(t, store.Migrate(t.Context()))
			require.NoError(t, store.Migrate(t.Context()))
			require.True(t, pgtest.One[bool](t, db, "SELECT to_regclass($1) IS NOT NULL", pgx.Identifier{schema, "outbox_notifications"}.Sanitize()))
			tx := db.MustBegin(t)
			res, err := store.AddNotification(t.Context(), tx, rejected)
			require.NoError(t, err)
			require.Equal(t, outbox.OutcomeCreated, res.Outcome)
			_, err = store.AddNotifications(t.Context(), tx, []outbox.NewNotification{rejected})
			require.NoError(t, err)
			require.NoError(t, tx.Commit(t.Context()))
		}
		require.False(t, pgtest.One[bool](t, db, "SELECT to_regclass('public.outbox_notifications') IS NOT NULL"))
	})

	t.Run("is_not_misled_by_the_search_path_or_a_temporary_table", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, `CREATE SCHEMA shadow; CREATE TABLE shadow.outbox_notifications (id int)`)
		pool := pgtest.NewPool(t, db.URL, func(cfg *pgxpool.Config) {
			cfg.ConnConfig.RuntimeParams["search_path"] = "shadow"
			cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				_, err := conn.Exec(ctx, "CREATE TEMPORARY TABLE outbox_notifications (id int)")
				return err
			}
		})
		require.NoError(t, outbox.Migrate(t.Context(), pool))
		store, err := outbox.NewPGStore(pool, outbox.Config{})
		require.NoError(t, err)
		require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			_, err := store.AddNotification(t.Context(), tx, rejected)
			return err
		}))
		require.Equal(t, 1, pgtest.One[int](t, db, "SELECT count(*) FROM public.outbox_notifications"))
	})

	t.Run("never_downgrades", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewDB(t)
		db.MustExec(t, "INSERT INTO outbox_migrations VALUES (9999)")
		before := describe(t, db)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, before, describe(t, db))
		require.Equal(t, 9999, pgtest.One[int](t, db, "SELECT max(version) FROM outbox_migrations"))
	})

	t.Run("waits_for_locks_without_holding_others_up", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		reader := db.MustBegin(t)
		pgtest.One[int](t, reader, "SELECT count(*) FROM outbox_notifications")
		ctx, cancel := context.WithCancel(t.Context())
		c := pgtest.Later(func() (any, error) { return nil, db.Store.Migrate(ctx) })
		db.WaitBlocked(t, 1)
		// queued up behind the migration, and let through by its lock_timeout
		insertCtx, done := context.WithTimeout(ctx, 30*time.Second)
		defer done()
		_, err := db.Exec(insertCtx, pythonInsert, 1, "reject", 42)
		require.NoError(t, err)
		cancel()
		_, err = pgtest.Await(t, c)
		require.ErrorIs(t, err, context.Canceled)
		require.NoError(t, reader.Rollback(t.Context()))
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, 1, db.Count(t))
	})

	t.Run("refuses_a_database_that_is_not_UTF8", func(t *testing.T) {
		t.Parallel()
		name := pgtest.Name("outbox_latin1")
		require.NoError(t, pgtest.OnServer("CREATE DATABASE "+name+" TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"))
		t.Cleanup(func() { require.NoError(t, pgtest.OnServer("DROP DATABASE "+name+" WITH (FORCE)")) })
		require.ErrorContains(t, outbox.Migrate(t.Context(), pgtest.NewPool(t, pgtest.DatabaseURL(name), nil)), "encoding LATIN1")
	})

	t.Run("refuses_a_table_in_a_later_schema_of_the_search_path", func(t *testing.T) {
		// Only a tool can meet that. It would create a second outbox, empty.
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable+"; CREATE SCHEMA app")
		sql, err := migrations.FS.ReadFile("0001_outbox_notifications.up.sql")
		require.NoError(t, err)
		_, err = db.Exec(t.Context(), "SET search_path = app, public;"+string(sql), pgx.QueryExecModeSimpleProtocol)
		require.ErrorContains(t, err, "finds outbox_notifications in another")
	})

	t.Run("is_what_the_files_do", func(t *testing.T) {
		// As a migration tool runs them, each in a transaction on the search_path.
		t.Parallel()
		db, tool := pgtest.NewDB(t), pgtest.NewEmptyDB(t)
		entries, err := migrations.FS.ReadDir(".")
		require.NoError(t, err)
		for range 2 {
			for _, e := range entries {
				sql, err := migrations.FS.ReadFile(e.Name())
				require.NoError(t, err)
				require.NoError(t, pgx.BeginFunc(t.Context(), tool.Pool, func(tx pgx.Tx) error {
					_, err := tx.Exec(t.Context(), string(sql), pgx.QueryExecModeSimpleProtocol)
					return err
				}))
			}
		}
		require.Equal(t, describe(t, db), describe(t, tool))
		require.NoError(t, outbox.Migrate(t.Context(), tool.Pool))
		require.Equal(t, describe(t, db), describe(t, tool))
	})
}

func TestAdoption(t *testing.T) {
	t.Parallel()

	t.Run("keeps_rows_constraint_and_foreign_key", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		db.MustExec(t, pythonInsert, 1, "reject", 42)
		db.MustExec(t, pythonInsert, 1, "reject", nil)
		db.MustExec(t, pythonInsert, nil, "digest", nil)
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'sent', attempts = 1 WHERE type = 'digest'")
		rows := "SELECT json_agg(r ORDER BY id)::text FROM (" + strings.Replace(pythonSelect, "WHERE status = 'pending'", "", 1) + ") r"
		before := pgtest.One[string](t, db, rows)
		filenode := pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'outbox_notifications'")

		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, before, pgtest.One[string](t, db, rows))
		require.Equal(t, filenode, pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'outbox_notifications'"), "the table was rewritten")
		got := describe(t, db)
		require.Contains(t, got, "uq_outbox_type_booking_candidate UNIQUE NULLS NOT DISTINCT (type, booking_id, candidate_tg_id)")
		require.Contains(t, got, "FOREIGN KEY (booking_id) REFERENCES bookings(id) ON DELETE CASCADE")
		require.Equal(t, 1, strings.Count(got, "CREATE UNIQUE INDEX uq_"))
		require.NotContains(t, got, "outbox_notifications_key")

		for key, want := range map[outbox.Key]outbox.Outcome{
			{Type: "reject", BookingID: 1, CandidateTgID: 42}: outbox.OutcomeRefreshed,
			{Type: "reject", BookingID: 1}:                    outbox.OutcomeRefreshed,
			{Type: "digest"}:                                  outbox.OutcomeExisting,
			{Type: "digest", BookingID: 2}:                    outbox.OutcomeCreated,
			{Type: "digest", CandidateTgID: -100}:             outbox.OutcomeCreated,
		} {
			n := outbox.NewNotification{Type: key.Type, BookingID: key.BookingID, CandidateTgID: key.CandidateTgID}
			require.Equal(t, want, db.Add(t, n).Outcome, key)
		}
		// the payload that Python spelled with a blank is the same content
		n := rejected
		n.BookingID = 1
		require.EqualValues(t, 1, db.Add(t, n).Notification.Version)

		// the Python service goes on
		db.MustExec(t, pythonInsert, 3, "reject", 43)
		db.MustExec(t, "INSERT INTO outbox_notifications (type, payload_json, recruiter_tg_id, created_at, booking_id, candidate_tg_id) "+
			"VALUES ('reject', '{}', 1, now(), 3, 43) ON CONFLICT ON CONSTRAINT uq_outbox_type_booking_candidate DO NOTHING")
		require.Equal(t, outbox.OutcomeRefreshed, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 3, CandidateTgID: 43}).Outcome)
	})

	t.Run("goes_on_beside_a_service_that_inserts_and_reads", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		inserted := make(chan int, 1)
		var waits []<-chan pgtest.Result[int]
		for worker := range 4 {
			waits = append(waits, pgtest.Later(func() (int, error) {
				for i := 1; ; i++ {
					if worker%2 == 0 {
						if _, err := db.Exec(t.Context(), pythonInsert, 1+i%100, fmt.Sprintf("t%d.%d", worker, i), i); err != nil {
							return i, err
						}
					} else if _, err := db.Exec(t.Context(), pythonSelect); err != nil {
						return i, err
					}
					select {
					case inserted <- i:
					default:
					}
					if ctx.Err() != nil {
						return i, nil
					}
				}
			}))
		}
		<-inserted
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		<-inserted
		<-inserted
		stop()
		total := 0
		for worker, c := range waits {
			n, err := pgtest.Await(t, c)
			require.NoError(t, err)
			if worker%2 == 0 {
				total += n
			}
		}
		require.Equal(t, total, db.Count(t))
	})

	t.Run("refuses_shared_keys_and_changes_nothing", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		for range 2 {
			db.MustExec(t, pythonInsert, 1, "reject", nil)
			db.MustExec(t, pythonInsert, nil, "di'gest", nil)
			db.MustExec(t, pythonInsert, nil, "reject", 42)
		}
		db.MustExec(t, pythonInsert, 2, "reject", 42)
		before := describe(t, db)
		err := outbox.Migrate(t.Context(), db.Pool)
		require.ErrorContains(t, err, "rows share a key (3 keys)")
		require.ErrorContains(t, err, "type 'reject', booking_id 1, candidate_tg_id NULL: 2 rows, id 1, 4")
		require.ErrorContains(t, err, "type 'di''gest', booking_id NULL, candidate_tg_id NULL: 2 rows, id 2, 5")
		require.ErrorContains(t, err, "type 'reject', booking_id NULL, candidate_tg_id 42: 2 rows, id 3, 6")
		require.NotContains(t, err.Error(), "booking_id 2")
		require.ErrorContains(t, err, "Keep one row of each key")
		require.Equal(t, before, describe(t, db))
		require.Equal(t, 7, db.Count(t))

		db.MustExec(t, "DELETE FROM outbox_notifications WHERE id > 3")
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
	})

	t.Run("lists_at_most_a_hundred_shared_keys", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		db.MustExec(t, `INSERT INTO outbox_notifications (type, payload_json, recruiter_tg_id, created_at)
			SELECT 't' || i % 150, '{}', 1, now() FROM generate_series(0, 4499) i`)
		err := outbox.Migrate(t.Context(), db.Pool)
		require.ErrorContains(t, err, "(150 keys)")
		require.ErrorContains(t, err, "30 rows, id 1, 151, ")
		require.ErrorContains(t, err, "and 50 more keys")
		require.Equal(t, 100, strings.Count(err.Error(), "30 rows, id"))
	})

	t.Run("lists_columns_that_cannot_serve", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, `CREATE TABLE outbox_notifications (id uuid PRIMARY KEY, booking_id text, type varchar(20), payload_json jsonb,
			candidate_tg_id integer, recruiter_tg_id bigint, status varchar(20), attempts integer, created_at timestamp,
			locked_at timestamptz, next_retry_at timestamptz, correlation_id varchar(64), receipt integer, tenant_id integer NOT NULL)`)
		before := describe(t, db)
		err := outbox.Migrate(t.Context(), db.Pool)
		for _, complaint := range []string{
			"column booking_id is text, not int4 or int8", "column candidate_tg_id is integer, not int8",
			"column created_at is timestamp without time zone, not timestamptz", "column id is uuid, not int4 or int8",
			"column last_error is missing", "column payload_json is jsonb, not json", "column receipt is integer, not text",
			"column tenant_id is NOT NULL without a default", "column type is character varying(20), too short for 50 characters",
		} {
			require.ErrorContains(t, err, complaint)
		}
		require.Equal(t, before, describe(t, db))

		db.MustExec(t, "DROP TABLE outbox_notifications; CREATE VIEW outbox_notifications AS SELECT 1 AS id")
		require.ErrorContains(t, outbox.Migrate(t.Context(), db.Pool), "not an ordinary table")
	})

	t.Run("refuses_rows_without_a_type_or_a_status", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable+`; ALTER TABLE outbox_notifications ALTER status DROP NOT NULL`)
		db.MustExec(t, pythonInsert, 1, "reject", nil)
		db.MustExec(t, "UPDATE outbox_notifications SET status = NULL")
		require.ErrorContains(t, outbox.Migrate(t.Context(), db.Pool), "1 rows have no type or no status")
		db.MustExec(t, prebuiltIndex)
		require.ErrorContains(t, outbox.Migrate(t.Context(), db.Pool), "1 rows have no type or no status")
	})

	// ON CONFLICT minds the unique indexes on just the columns of the key and no
	// others, so beside one of these a rival would surface as a unique violation.
	for name, c := range map[string]struct{ sql, complaint string }{
		"an_index_on_expressions": {"CREATE UNIQUE INDEX odd ON outbox_notifications (type, coalesce(booking_id, 0), coalesce(candidate_tg_id, 0))", "index odd"},
		"a_partial_index":         {"CREATE UNIQUE INDEX odd ON outbox_notifications (type, booking_id, candidate_tg_id) WHERE status = 'pending'", "index odd"},
		"fewer_columns":           {"CREATE UNIQUE INDEX odd ON outbox_notifications (type, booking_id)", "index odd"},
		"more_columns":            {"ALTER TABLE outbox_notifications ADD CONSTRAINT odd UNIQUE (type, booking_id, candidate_tg_id, recruiter_tg_id)", "index odd"},
		"an_exclusion":            {"ALTER TABLE outbox_notifications ADD CONSTRAINT odd EXCLUDE (correlation_id WITH =)", "index odd"},
		"another_primary_key": {"ALTER TABLE outbox_notifications DROP CONSTRAINT outbox_notifications_pkey, ADD COLUMN uid uuid PRIMARY KEY DEFAULT gen_random_uuid()",
			"column id has no unique index of its own"},
		"the_key_as_primary_key": {"ALTER TABLE outbox_notifications DROP CONSTRAINT outbox_notifications_pkey, ADD UNIQUE (id), ADD CONSTRAINT odd PRIMARY KEY (type, booking_id, candidate_tg_id)", "index odd"},
		"a_collation_that_folds": {"CREATE COLLATION folds (provider = icu, locale = 'und-u-ks-level2', deterministic = false); ALTER TABLE outbox_notifications ALTER type TYPE varchar(50) COLLATE folds",
			"column type has a nondeterministic collation"},
		"a_version_that_may_be_NULL": {"ALTER TABLE outbox_notifications ADD version bigint", "column version must be NOT NULL and have a default"},
	} {
		t.Run("refuses_"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, pythonTable)
			db.MustExec(t, c.sql)
			before := describe(t, db)
			require.ErrorContains(t, outbox.Migrate(t.Context(), db.Pool), c.complaint)
			require.Equal(t, before, describe(t, db))
		})
	}

	// Whatever the old constraint is like, adds work afterwards and one index is left.
	const dropOld = "ALTER TABLE outbox_notifications DROP CONSTRAINT uq_outbox_type_booking_candidate"
	for name, sql := range map[string]string{
		"none":                          dropOld,
		"deferrable":                    dropOld + ", ADD CONSTRAINT old UNIQUE (type, booking_id, candidate_tg_id) DEFERRABLE INITIALLY DEFERRED",
		"in_another_order":              dropOld + ", ADD CONSTRAINT old UNIQUE (candidate_tg_id, booking_id, type)",
		"named_as_ours":                 dropOld + ", ADD CONSTRAINT outbox_notifications_key UNIQUE (type, booking_id, candidate_tg_id)",
		"complete_already":              dropOld + ", ADD CONSTRAINT old UNIQUE NULLS NOT DISTINCT (type, booking_id, candidate_tg_id)",
		"complete_but_deferrable":       dropOld + ", ADD CONSTRAINT old UNIQUE NULLS NOT DISTINCT (type, booking_id, candidate_tg_id) DEFERRABLE",
		"twice_and_once_deferrable":     "ALTER TABLE outbox_notifications ADD CONSTRAINT again UNIQUE (type, booking_id, candidate_tg_id) DEFERRABLE",
		"deferrable_beside_a_new_index": dropOld + ", ADD CONSTRAINT old UNIQUE (type, booking_id, candidate_tg_id) DEFERRABLE; CREATE UNIQUE INDEX mine ON outbox_notifications (type, booking_id, candidate_tg_id) NULLS NOT DISTINCT",
		"beside_an_index_built_wrong":   "CREATE UNIQUE INDEX outbox_notifications_key ON outbox_notifications (type, booking_id, candidate_tg_id)",
	} {
		t.Run("replaces_a_constraint_"+name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, pythonTable)
			db.MustExec(t, sql)
			require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
			require.Equal(t, 1, pgtest.One[int](t, db, `SELECT count(*) FROM pg_index WHERE indrelid = 'outbox_notifications'::regclass
				AND indisunique AND NOT indisprimary AND indnullsnotdistinct AND indimmediate AND indisvalid`), describe(t, db))
			require.Equal(t, 2, pgtest.One[int](t, db, `SELECT count(*) FROM pg_index WHERE indrelid = 'outbox_notifications'::regclass AND indisunique`), describe(t, db))
			for _, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
				require.Equal(t, want, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1}).Outcome)
				require.Equal(t, want, db.AddMany(t, outbox.NewNotification{Type: "batch", BookingID: 1})[0].Outcome)
			}
		})
	}

	t.Run("uses_an_index_built_beforehand", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		db.MustExec(t, prebuiltIndex)
		filenode := pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'outbox_notifications_key'")
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, filenode, pgtest.One[uint32](t, db, "SELECT relfilenode FROM pg_class WHERE relname = 'uq_outbox_type_booking_candidate'"))
	})

	t.Run("replaces_an_index_that_failed_to_build", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		db.MustExec(t, pythonInsert, 1, "reject", nil)
		db.MustExec(t, pythonInsert, 1, "reject", nil)
		_, err := db.Exec(t.Context(), prebuiltIndex)
		require.Equal(t, "23505", sqlState(t, err))
		db.MustExec(t, "DELETE FROM outbox_notifications WHERE id = 2")
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, outbox.OutcomeRefreshed, db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1}).Outcome)
	})

	t.Run("leaves_a_constraint_that_a_foreign_key_needs", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		db.MustExec(t, `CREATE TABLE receipts (type varchar(50), booking_id integer, candidate_tg_id bigint,
			FOREIGN KEY (type, booking_id, candidate_tg_id) REFERENCES outbox_notifications (type, booking_id, candidate_tg_id))`)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Contains(t, describe(t, db), "uq_outbox_type_booking_candidate UNIQUE (type, booking_id, candidate_tg_id)")
		for range 3 {
			db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1})
			db.Add(t, outbox.NewNotification{Type: "reject", BookingID: 1, CandidateTgID: 2})
		}
		require.Equal(t, 2, db.Count(t))
	})

	t.Run("refuses_a_booking_id_that_an_integer_column_cannot_hold", func(t *testing.T) {
		t.Parallel()
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		tx := db.MustBegin(t)
		for _, id := range []int64{1 << 31, -1<<31 - 1} {
			_, err := db.Store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "a", BookingID: id})
			requireInvalid(t, err, "BookingID", -1, "wide id")
			_, err = db.Store.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "a"}, {Type: "a", BookingID: id}})
			requireInvalid(t, err, "BookingID", 1, "wide id")
			_, err = db.Store.Get(t.Context(), outbox.Key{Type: "a", BookingID: id})
			require.ErrorIs(t, err, outbox.ErrNotFound)
		}
		_, err := db.Store.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "a"})
		require.NoError(t, err)
		require.NoError(t, tx.Commit(t.Context()))
	})
}

// TestUpgrade is about a table that an earlier version of the library has made.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	firstVersion := func(t *testing.T) *pgtest.DB {
		db := pgtest.NewEmptyDB(t)
		sql, err := migrations.FS.ReadFile("0001_outbox_notifications.up.sql")
		require.NoError(t, err)
		db.MustExec(t, string(sql))
		db.MustExec(t, "INSERT INTO outbox_notifications (type, booking_id) SELECT 'reject', i FROM generate_series(1, 10) i")
		return db
	}
	const (
		due    = `CREATE INDEX CONCURRENTLY outbox_notifications_due ON outbox_notifications ((coalesce(next_retry_at, created_at, '-infinity'::timestamptz)), id) WHERE status = 'pending'`
		failed = `CREATE INDEX CONCURRENTLY outbox_notifications_failed ON outbox_notifications (id) WHERE status = 'failed'`
		nodes  = "SELECT string_agg(relname || ' ' || relfilenode, ',' ORDER BY relname) FROM pg_class WHERE relname IN ('outbox_notifications_due', 'outbox_notifications_failed')"
	)
	t.Run("keeps_the_rows_and_delivers_them", func(t *testing.T) {
		t.Parallel()
		db := firstVersion(t)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Len(t, claim(t, db, outbox.ClaimOptions{}).Claimed, 10)
	})
	t.Run("refuses_a_purged_at_that_is_no_time", func(t *testing.T) {
		t.Parallel()
		db := firstVersion(t)
		db.MustExec(t, "ALTER TABLE outbox_notifications ADD purged_at boolean")
		before := describe(t, db)
		require.ErrorContains(t, outbox.Migrate(t.Context(), db.Pool), "column purged_at of outbox_notifications is boolean, not timestamptz")
		require.Equal(t, before, describe(t, db))
		db.MustExec(t, "ALTER TABLE outbox_notifications DROP purged_at")
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
	})
	t.Run("uses_indexes_built_beforehand", func(t *testing.T) {
		t.Parallel()
		db := firstVersion(t)
		db.MustExec(t, due)
		db.MustExec(t, failed)
		before := pgtest.One[string](t, db, nodes)
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.Equal(t, before, pgtest.One[string](t, db, nodes))
	})
	t.Run("replaces_an_index_that_failed_to_build", func(t *testing.T) {
		t.Parallel()
		db := firstVersion(t)
		db.MustExec(t, due)
		db.MustExec(t, failed)
		before := pgtest.One[string](t, db, nodes)
		db.MustExec(t, "UPDATE pg_index SET indisvalid = false WHERE indexrelid IN ('outbox_notifications_due'::regclass, 'outbox_notifications_failed'::regclass)")
		require.NoError(t, outbox.Migrate(t.Context(), db.Pool))
		require.NotEqual(t, before, pgtest.One[string](t, db, nodes))
		require.Equal(t, 2, pgtest.One[int](t, db, "SELECT count(*) FROM pg_index WHERE indisvalid AND indexrelid IN ('outbox_notifications_due'::regclass, 'outbox_notifications_failed'::regclass)"))
	})
}
