package outbox

import (
	"cmp"
	"context"
	"math"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// PurgeOptions says what [PGStore.Purge] purges.
type PurgeOptions struct {
	// OlderThan is for how long a row has to have been sent at least, by the database's
	// clock, in microseconds. Required.
	OlderThan time.Duration

	Types []string // nil: all; others are read past

	// Delete deletes the rows in place of emptying them, and with them the memory of
	// their keys: the next add of such a key, however late a repeat it is, creates
	// a new row, and the message goes out AGAIN. Nothing can tell that it is a repeat.
	// It is for keys that can never come again.
	Delete bool

	// BatchSize is how many rows a transaction reads, and purges at most. 0: 1,000;
	// at most 10,000. A caller that adds a key whose row is among them waits until that
	// transaction ends.
	BatchSize int
}

const (
	defaultPurgeBatch = 1000
	maxPurgeBatch     = 10_000
)

// check returns o with its defaults.
func (o PurgeOptions) check() (PurgeOptions, *InvalidError) {
	switch {
	case o.OlderThan < time.Microsecond:
		return o, invalid("OlderThan", "%v, it must say for how long rows have been sent: a microsecond or more", o.OlderThan)
	case o.BatchSize < 0 || o.BatchSize > maxPurgeBatch:
		return o, invalid("BatchSize", "%d is not between 1 and %d", o.BatchSize, maxPurgeBatch)
	case o.Types != nil && len(o.Types) == 0:
		return o, invalid("Types", "empty but not nil: nothing could match")
	}
	for _, t := range o.Types {
		if reason := badText(t); reason != "" {
			return o, invalid("Types", "%q: %s", t, reason)
		}
	}
	o.BatchSize = cmp.Or(o.BatchSize, defaultPurgeBatch)
	return o, nil
}

// purgeSQL purges what is ripe among the next rows by id.
//
// $1 id after which to begin, $2 rows to read, $3 types or NULL, $4 older than in
// microseconds.
//
// page is of one length however few of its rows are ripe. The planner has no way to them
// but the primary key: what is ripe is asked in the list of columns, and the type, which
// a row keeps for life, nowhere else. ripe locks them. Rows
// in the order of ids are not in the order of keys in which batches lock theirs, so
// this must not wait: SKIP LOCKED. A row that another transaction has changed since the
// snapshot is asked again once it is locked, and dropped if it is no longer ripe. It is
// then found by id and not by ctid, as what the other left has a new one.
const purgeSQL = `
WITH page AS MATERIALIZED (
	SELECT id, {ripe} AND ($3::text[] IS NULL OR type::text = ANY ($3::text[])) AS ripe
	FROM {table} WHERE id > $1::bigint ORDER BY id LIMIT $2::bigint
), ripe AS MATERIALIZED (
	SELECT id FROM {table}
	WHERE id = ANY (ARRAY(SELECT id FROM page WHERE ripe)) AND {ripe}
	FOR UPDATE SKIP LOCKED
), purged AS (
	{purge}
	WHERE id = ANY (ARRAY(SELECT id FROM ripe))
	RETURNING id
)
SELECT pg_catalog.count(*), coalesce(pg_catalog.max(id), 0), (SELECT pg_catalog.count(*) FROM purged) FROM page`

const (
	ripeSQL = `status::text = 'sent'
	AND sent_at <= pg_catalog.now() - $4::bigint::double precision * interval '1 microsecond'`

	// fullSQL: there is something to strip. A slim row may have been filled again since, by
	// an add after another service has set it back to pending.
	fullSQL = `(purged_at IS NULL OR pg_catalog.num_nonnulls(payload_json, last_error, receipt) > 0)`

	deleteSQL = `DELETE FROM {table}`

	stripSQL = `UPDATE {table} SET
		payload_json = NULL,
		last_error   = NULL,
		receipt      = NULL,
		purged_at    = pg_catalog.now()`
)

// Purge ends the life of what was sent at least opts.OlderThan ago, and returns how many
// rows it did so to. By default it takes payload, LastError and receipt from
// the row and keeps the rest, so that a repeat of the key is still recognised: an add
// returns the slim row as [OutcomeExisting]. Such a row cannot be sent again, as
// there is nothing left to send: [PGStore.Requeue] and [PGStore.RequeueMatching] pass
// over it. That is so of a row that never had a payload, too. It is not purged, nor
// counted, a second time. With opts.Delete it deletes
// the rows, slim ones too, and the keys are forgotten: see [PurgeOptions].
//
// Pending rows, being delivered or not, failed ones and those with a status of another
// service are never touched. Neither are rows without a sent_at, which another
// service has sent: nobody knows when. To have them purged, give them one, for
// example created_at.
//
// It walks through the table by id, on the store's pool, one transaction of one
// statement for each opts.BatchSize rows, those of other kinds included. It waits
// for nobody, so it deadlocks with nobody: a row that another transaction holds at
// that moment, such as that of a caller who has just added it again, is passed over
// and left to the next call. What is committed stays purged when ctx ends or an error
// comes up: then the number of rows known to be purged is returned beside the error.
// Call it again at any time, from many processes at once too. A call reads the whole
// table: some 2 s for 1,000,000 rows of which none is left to be purged. What slim and
// deleted rows took up is for VACUUM to make free.
//
// It needs SELECT and UPDATE on the table; with opts.Delete DELETE as well, and else
// migration 3. Where one of these is missing the error is [ErrSetup]. Bad options are an
// [InvalidError]. Processes of a version without Purge know nothing of the mark on slim
// rows and would requeue them: upgrade them first.
func (s *PGStore) Purge(ctx context.Context, opts PurgeOptions) (int, error) {
	opts, bad := opts.check()
	if bad != nil {
		return 0, bad
	}
	sql := s.purgeSQL(opts)
	purged := 0
	for after := int64(math.MinInt64); ; {
		var size, n int
		var last int64 // not after: a commit may fail when the result has been read
		err := retry(ctx, func() error {
			return s.onConn(ctx, func(conn *pgxpool.Conn) error {
				return conn.QueryRow(ctx, sql, after, opts.BatchSize, opts.Types, opts.OlderThan.Microseconds()).Scan(&size, &last, &n)
			})
		})
		if err != nil {
			return purged, s.explain("purge", err)
		}
		purged += n
		if size < opts.BatchSize {
			return purged, nil
		}
		after = last
	}
}

func (s *PGStore) purgeSQL(opts PurgeOptions) string {
	ripe, purge := ripeSQL+"\n\tAND "+fullSQL, stripSQL
	if opts.Delete {
		ripe, purge = ripeSQL, deleteSQL
	}
	return s.fill(strings.NewReplacer("{ripe}", ripe, "{purge}", purge).Replace(purgeSQL))
}
