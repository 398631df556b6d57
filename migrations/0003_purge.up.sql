-- +goose Up
-- What purging needs: the mark of a row that has lost its content, so that it is not
-- sent without it.
--
-- Runs as it is under goose, tern and golang-migrate, in the first schema of the
-- search_path, and under outbox.Migrate. Running it again changes nothing.
--
-- Locks: ACCESS EXCLUSIVE on outbox_notifications until the end of the
-- transaction, which is a matter of milliseconds whatever the table's size. No row
-- is read or rewritten.

-- +goose StatementBegin
DO $purge$
DECLARE
	other text;
BEGIN
	SELECT format_type(atttypid, atttypmod) INTO other FROM pg_attribute
	WHERE attrelid = 'outbox_notifications'::regclass::oid AND attname = 'purged_at' AND atttypid <> 'timestamptz'::regtype::oid;
	IF other IS NOT NULL THEN
		RAISE EXCEPTION 'column purged_at of outbox_notifications is %, not timestamptz', other
			USING HINT = 'Nothing has been changed.';
	END IF;
END
$purge$;
-- +goose StatementEnd

ALTER TABLE outbox_notifications ADD COLUMN IF NOT EXISTS purged_at timestamptz;

INSERT INTO outbox_migrations (version) VALUES (3) ON CONFLICT DO NOTHING;
