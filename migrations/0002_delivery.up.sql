-- +goose Up
-- What delivering needs: an index of the pending rows by when they are due, one of
-- the failed rows, and the version that a lease is for.
--
-- Runs as it is under goose, tern and golang-migrate, in the first schema of the
-- search_path, and under outbox.Migrate. Running it again changes nothing.
--
-- Locks: ACCESS EXCLUSIVE on outbox_notifications until the end of the
-- transaction, which lasts as long as it takes to read the table twice. On a large
-- table build the two indexes beforehand, with the statements below and
-- CONCURRENTLY; the lock is then held for milliseconds. No row is rewritten.

ALTER TABLE outbox_notifications ADD COLUMN IF NOT EXISTS lease_version bigint;

-- +goose StatementBegin
DO $broken$
DECLARE
	broken regclass;
BEGIN
	-- What an invalid index of ours is: a CREATE INDEX CONCURRENTLY that failed.
	FOR broken IN
		SELECT c.oid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
		WHERE i.indrelid = 'outbox_notifications'::regclass::oid AND NOT i.indisvalid
			AND c.relname IN ('outbox_notifications_due', 'outbox_notifications_failed')
	LOOP
		EXECUTE pg_catalog.format('DROP INDEX %s', broken);
	END LOOP;
END
$broken$;
-- +goose StatementEnd

-- The order of delivery. Neither sent rows nor rows that are due later cost a claim
-- anything, and as it has none of the lease's columns, a claim writes no index.
CREATE INDEX IF NOT EXISTS outbox_notifications_due
	ON outbox_notifications ((coalesce(next_retry_at, created_at, '-infinity'::timestamptz)), id) WHERE status::text = 'pending';

-- For operators: few rows, among many that were sent.
CREATE INDEX IF NOT EXISTS outbox_notifications_failed
	ON outbox_notifications (id) WHERE status::text = 'failed';

INSERT INTO outbox_migrations (version) VALUES (2) ON CONFLICT DO NOTHING;
