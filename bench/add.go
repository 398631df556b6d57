package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// adder is a contender that adds, by its name. Make prepares its place and returns
// what it does. Pick is which key the i-th operation is about, and with which
// revision of its content.
type adder struct {
	name string
	make func(ctx context.Context, b *bench, schema, status string, conns int) (*place, func(pick pick) op, error)
}

type pick func(i int64) (key, revision int64)

func (b *bench) newKey(i int64) (int64, int64)       { return int64(b.preload) + i, i }
func (b *bench) changedKey(i int64) (int64, int64)   { return 1 + i%int64(b.preload), i }
func (b *bench) unchangedKey(i int64) (int64, int64) { return 1 + i%int64(b.preload), 0 }

// byHand is a contender that runs bare statements on the table of this library.
func byHand(name string, do func(table string) func(ctx context.Context, tx pgx.Tx, key int64, m message) error) adder {
	return adder{name, func(ctx context.Context, b *bench, schema, status string, conns int) (*place, func(pick) op, error) {
		p, err := b.preloaded(ctx, schema, status, conns)
		if err != nil {
			return p, nil, err
		}
		bare := do(p.table())
		return p, func(pick pick) op {
			return func(ctx context.Context, tx pgx.Tx, i int64) error {
				key, revision := pick(i)
				return bare(ctx, tx, key, messageOf(revision))
			}
		}, nil
	}}
}

const keyed = "WHERE type = $1 AND booking_id = $2 AND candidate_tg_id = $3"

var (
	nothing = byHand("business row only", func(string) func(context.Context, pgx.Tx, int64, message) error {
		return func(context.Context, pgx.Tx, int64, message) error { return nil }
	})

	bareInsert = byHand("bare insert", insertByHand)
	bareUpdate = byHand("bare update", updateByHand)

	// bareMixed knows beforehand what it will find.
	bareMixed = byHand("the bare statement for each", func(table string) func(context.Context, pgx.Tx, int64, message) error {
		insert, update, find := insertByHand(table), updateByHand(table), selectByHand("")(table)
		return func(ctx context.Context, tx pgx.Tx, key int64, m message) error {
			switch {
			case m.Revision == 0:
				return insert(ctx, tx, key, m)
			case key%2 == 0:
				return update(ctx, tx, key, m)
			default:
				return find(ctx, tx, key, m)
			}
		}
	})

	bareSelect    = byHand("bare select", selectByHand(""))
	lockingSelect = byHand("select for update", selectByHand(" FOR UPDATE"))

	twoStatements = byHand("two statements", func(table string) func(context.Context, pgx.Tx, int64, message) error {
		find := `SELECT id, status FROM ` + table + ` ` + keyed + ` FOR UPDATE`
		insert := insertSQL(table)
		update := `UPDATE ` + table + ` SET recruiter_tg_id = $2, payload_json = $3, correlation_id = $4, version = version + 1, next_retry_at = NULL, attempts = 0, locked_at = NULL WHERE id = $1`
		return func(ctx context.Context, tx pgx.Tx, key int64, m message) error {
			var id int64
			var status string
			err := tx.QueryRow(ctx, find, kind, booking(key), candidate(key)).Scan(&id, &status)
			switch {
			case errors.Is(err, pgx.ErrNoRows):
				return insertBare(ctx, tx, insert, key, m, &id)
			case err != nil || status != "pending":
				return err
			}
			payload, err := json.Marshal(m)
			if err != nil {
				return err
			}
			_, err = tx.Exec(ctx, update, id, recruiter(key), payload, correlation(key))
			return err
		}
	})

	ours = adder{"outbox", func(ctx context.Context, b *bench, schema, status string, conns int) (*place, func(pick) op, error) {
		return makeOurs(ctx, b, schema, status, conns, false)
	}}
)

func insertByHand(table string) func(context.Context, pgx.Tx, int64, message) error {
	sql := insertSQL(table)
	return func(ctx context.Context, tx pgx.Tx, key int64, m message) error {
		var id int64
		return insertBare(ctx, tx, sql, key, m, &id)
	}
}

func updateByHand(table string) func(context.Context, pgx.Tx, int64, message) error {
	sql := `UPDATE ` + table + ` SET recruiter_tg_id = $4, payload_json = $5, correlation_id = $6, version = version + 1, next_retry_at = NULL ` + keyed
	return func(ctx context.Context, tx pgx.Tx, key int64, m message) error {
		payload, err := json.Marshal(m)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, sql, kind, booking(key), candidate(key), recruiter(key), payload, correlation(key))
		return affected(tag.RowsAffected(), err)
	}
}

func insertSQL(table string) string {
	return `INSERT INTO ` + table + ` (type, booking_id, candidate_tg_id, recruiter_tg_id, payload_json, correlation_id)
		VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (type, booking_id, candidate_tg_id) DO NOTHING RETURNING id`
}

func insertBare(ctx context.Context, tx pgx.Tx, sql string, key int64, m message, id *int64) error {
	payload, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return tx.QueryRow(ctx, sql, kind, booking(key), candidate(key), recruiter(key), payload, correlation(key)).Scan(id)
}

func selectByHand(lock string) func(table string) func(context.Context, pgx.Tx, int64, message) error {
	return func(table string) func(context.Context, pgx.Tx, int64, message) error {
		sql := `SELECT id, status, version, sent_at FROM ` + table + ` ` + keyed + lock
		return func(ctx context.Context, tx pgx.Tx, key int64, m message) error {
			// A caller that wants something sent has marshalled it before it asks.
			if _, err := json.Marshal(m); err != nil {
				return err
			}
			var id, version int64
			var status string
			var sentAt pgtype.Timestamptz
			return tx.QueryRow(ctx, sql, kind, booking(key), candidate(key)).Scan(&id, &status, &version, &sentAt)
		}
	}
}

// affected says that a statement has to have found its row.
func affected(rows int64, err error) error {
	if err == nil && rows != 1 {
		return fmt.Errorf("%d rows affected", rows)
	}
	return err
}

func makeOurs(ctx context.Context, b *bench, schema, status string, conns int, notify bool) (*place, func(pick) op, error) {
	p, err := b.preloaded(ctx, schema, status, conns)
	if err != nil {
		return p, nil, err
	}
	store, err := p.store(notify)
	return p, func(pick pick) op {
		return func(ctx context.Context, tx pgx.Tx, i int64) error {
			_, err := store.AddNotification(ctx, tx, notification(pick(i)))
			return err
		}
	}, err
}

func addNew(ctx context.Context, b *bench) error {
	return b.adds(ctx, "new key", "sent", bareInsert.name, 0.97, b.newKey,
		nothing, bareInsert, twoStatements, ours, riverPlain, riverUnique, watermillPublish)
}

func addPending(ctx context.Context, b *bench) error {
	return b.adds(ctx, "repeat of a pending key", "pending", bareUpdate.name, 0.97, b.changedKey,
		bareUpdate, twoStatements, ours, riverUnique)
}

func addUnchanged(ctx context.Context, b *bench) error {
	few := *b
	few.conns = b.conns[:1]
	return few.adds(ctx, "", "pending", bareUpdate.name, 0, b.unchangedKey, bareUpdate, twoStatements, ours)
}

func addSettled(ctx context.Context, b *bench) error {
	return b.adds(ctx, "repeat of a settled key", "sent", bareSelect.name, 0.97, b.changedKey,
		bareSelect, lockingSelect, ours, riverUnique)
}

// addMixed has no run of adds that find the same: of five, three are new, one is of a
// pending and one of a settled key.
func addMixed(ctx context.Context, b *bench) error {
	return b.mixed(ctx, func(i int64) (key, revision int64) {
		switch i % 5 {
		case 3:
			return 2 + 2*i%int64(b.preload), i // even
		case 4:
			return 1 + 2*i%int64(b.preload), i // odd
		default:
			return int64(b.preload) + i, 0
		}
	})
}

// addWrong has the store guess wrong as often as it can: after sixteen new keys comes a
// pending one.
func addWrong(ctx context.Context, b *bench) error {
	few := *b
	few.conns = b.conns[:1]
	return few.mixed(ctx, func(i int64) (key, revision int64) {
		if i%17 == 16 {
			return 2 + 2*i%int64(b.preload), i
		}
		return int64(b.preload) + i, 0
	})
}

// mixed compares adds of keys of which the even ones are pending, the odd ones are sent,
// and those above the first are new, which have revision 0.
func (b *bench) mixed(ctx context.Context, choose pick) error {
	halfSent := func(a adder) adder {
		return adder{a.name, func(ctx context.Context, b *bench, schema, status string, conns int) (*place, func(pick) op, error) {
			p, do, err := a.make(ctx, b, schema, status, conns)
			if err != nil {
				return p, do, err
			}
			if err := b.exec(ctx, fmt.Sprintf(`UPDATE %s SET status = 'sent', sent_at = now()
				FROM generate_series(1::bigint, %d, 2) AS i WHERE booking_id = i * %d %% %d`, p.table(), b.preload, bookingMul, prime)); err != nil {
				return p, do, err
			}
			return p, do, p.settle(ctx)
		}}
	}
	return b.adds(ctx, "", "pending", bareMixed.name, 0, choose, halfSent(bareMixed), halfSent(twoStatements), halfSent(ours))
}

// adds compares at each number of connections. Work names the target; "": there is none.
func (b *bench) adds(ctx context.Context, work, status, floor string, want float64, pick pick, adders ...adder) (err error) {
	var places []*place
	defer func() { err = errors.Join(err, b.drop(context.WithoutCancel(ctx), places...)) }()
	var runs []func(context.Context, beginner) error
	for i, a := range adders {
		p, do, err := a.make(ctx, b, fmt.Sprintf("adder_%d", i), status, slices.Max(b.conns))
		places = append(places, p)
		if err != nil {
			return fmt.Errorf("%s: %w", a.name, err)
		}
		runs = append(runs, p.business(do(pick)))
	}
	if err := b.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	for n, conns := range b.conns {
		var cs []contender
		for i, a := range adders {
			if n > 0 { // without what the rounds before have left
				if err := places[i].settle(ctx); err != nil {
					return err
				}
			}
			work, err := places[i].workers(ctx, conns, 1, runs[i])
			if err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
			cs = append(cs, contender{name: a.name, work: work})
		}
		b.rep.printf("%s:\n\n", count(conns, "connection"))
		ratio, err := b.compare(ctx, fmt.Sprintf("connections=%d", conns), "tx", floor, cs, b.rounds)
		if err != nil {
			return err
		}
		if work != "" {
			b.rep.atLeast(fmt.Sprintf("add, %s, %s", work, count(conns, "connection")), ratio[ours.name], want)
		}
	}
	return nil
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
