package outbox

import (
	"strings"
	"sync/atomic"
)

// Adds come in runs: a business makes bookings, and nearly every key is new; a job
// is replayed, and every key is there. addSQL is right for each of them in one round
// trip, but must be prepared for all, which is a fifth of what a plain INSERT costs
// the server. So after a run of adds that ended alike the store guesses that the next
// one will, too, and runs a statement that can do nothing else. That one returns a row
// only if it has done all of what addSQL would have done; where it returns none,
// addSQL follows. A wrong guess ends the run, so of adds one after the other at most one
// in guessAfter + 1 costs a second round trip. A batch counts for as many adds as it has.
//
// The statements have the parameters of addSQL, and return the same columns.

// guessAfter is the length of a run that is worth a guess: a wrong one costs more than
// a right one saves, and this bounds the cost of the wrong ones to a small part of that
// of all (the benchmark add/wrong).
const guessAfter = 16

// insertSQL adds a new key, and does nothing where a row is there: an INSERT that ends
// in a conflict would have fired triggers, held the new row against constraints that the
// one that is there need not mind, and drawn an id. Where a rival inserts the key at the
// same time it waits, like addSQL.
const insertSQL = `
INSERT INTO {table} (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id,
	status, attempts, created_at, next_retry_at, not_after)
SELECT $1::text, $2::bigint, $3::bigint, $4::bigint, $5::text::json, $6::text,
	'pending', 0, pg_catalog.now(), $7::timestamptz, $8::timestamptz
WHERE (SELECT true FROM {table} WHERE {key} ORDER BY type, booking_id, candidate_tg_id LIMIT 1) IS NULL
ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING
RETURNING 'created', false, ` + rowColumns

// updateSQL refreshes a pending row that is not being delivered, and whose payload
// changes. Under READ COMMITTED the UPDATE waits for a rival and looks again at what the
// rival left, with all of its expressions; but it does so only for a row that it would
// have changed as it stood when it began. That is why "no row" means nothing here,
// and addSQL decides. CASE hides the status from the planner, which might prefer an
// index of the pending rows to that of the key.
var updateSQL = `
UPDATE {table} SET
	recruiter_tg_id = coalesce($4::bigint, recruiter_tg_id),
	payload_json    = $5::text::json,
	correlation_id  = coalesce($6::text, correlation_id),
	next_retry_at   = $7::timestamptz,
	not_after       = coalesce($8::timestamptz, not_after),
	version         = version + 1,
	attempts        = 0,
	locked_at       = NULL,
	lease_until     = NULL
WHERE {key} AND CASE WHEN status::text = 'pending' AND lease_token IS NULL
	THEN ` + strings.ReplaceAll(payloadChangedSQL, "first_payload", "$5::text") + ` END
RETURNING 'refreshed', false, ` + rowColumns

// lookupSQL locks and returns a settled row. The parameters it does not need are named
// all the same, to have their types.
const lookupSQL = `
SELECT 'existing', false, ` + rowColumns + `
FROM {table}
WHERE {key} AND status::text <> 'pending'
	AND pg_catalog.num_nulls($4::bigint, $5::text, $6::text, $7::timestamptz, $8::timestamptz) IS NOT NULL
ORDER BY type, booking_id, candidate_tg_id LIMIT 1
FOR UPDATE`

// found is how an add ended, as far as it is worth a guess.
type found uint32

const (
	foundOther   found = iota // a pending row that was as it should be
	foundNone                 // created
	foundPending              // refreshed
	foundSettled              // existing

	founds = 4
)

// outcomeUnchanged is addSQL's word for a refresh that wrote nothing.
const outcomeUnchanged Outcome = "unchanged"

func (o Outcome) found() found {
	switch o {
	case OutcomeCreated:
		return foundNone
	case OutcomeRefreshed:
		return foundPending
	case OutcomeExisting:
		return foundSettled
	default:
		return foundOther
	}
}

// recently is the run that the last adds of a store make. It counts by the way: of
// several adds at a time some may be overlooked.
type recently struct {
	run atomic.Uint32 // a found, and founds times the length of its run
}

// guess returns what the last guessAfter adds have found, if all found the same.
func (r *recently) guess() found {
	if run := r.run.Load(); run/founds >= guessAfter {
		return found(run % founds)
	}
	return foundOther
}

// sawMany counts a batch.
func (r *recently) sawMany(results []AddResult) {
	if len(results) == 0 {
		return
	}
	for _, res := range results {
		if res.Outcome != OutcomeCreated {
			r.saw(foundOther, 1)
			return
		}
	}
	r.saw(foundNone, uint32(min(len(results), guessAfter)))
}

// saw counts n adds that found f.
func (r *recently) saw(f found, n uint32) {
	switch run := r.run.Load(); {
	case found(run%founds) != f:
		r.run.Store(uint32(f) + founds*n)
	case run/founds < guessAfter:
		r.run.Store(run + founds*n)
	}
}
