package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
)

// bookingsSQL is what a round's database has beside the outbox. A request that is run again
// finds its booking, and what its adds returned, which were committed with it.
const bookingsSQL = `
CREATE TABLE bookings (request text PRIMARY KEY, caller text NOT NULL);
CREATE TABLE booked (
	request text NOT NULL REFERENCES bookings, type text NOT NULL, booking_id bigint NOT NULL, candidate_tg_id bigint NOT NULL,
	id bigint NOT NULL, version bigint NOT NULL, outcome text NOT NULL, content text NOT NULL,
	PRIMARY KEY (request, type, booking_id, candidate_tg_id)
);
CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL);
INSERT INTO counters SELECT i, 0 FROM generate_series(0, 9) AS i`

// What may become of a request on purpose.
type twist string

const (
	straight     twist = ""
	rollsBack    twist = "rolls back"
	holdsRows    twist = "caller holds its rows past the lease"
	idles        twist = "caller idle in its transaction"
	cutHalf      twist = "connection cut in the middle of COMMIT"
	cutWritten   twist = "connection cut after COMMIT was sent"
	cutAnswered  twist = "answer to COMMIT lost"
	dropsInTx    twist = "connection cut in a transaction"
	cancelsInTx  twist = "caller cancels its own transaction"
	inAnyOrder   twist = "keys in no order" // which may deadlock
	readsCounter twist = "serializable reads and writes"
)

// booking is one request: adds that are one transaction.
type booking struct {
	request string
	adds    []outbox.NewNotification
	batch   bool
	twist   twist
}

// booker makes bookings, one after the other.
type booker struct {
	*child
	store  *outbox.PGStore
	number int        // within its process
	rng    *rand.Rand // of the plan
	pauses *rand.Rand // how often it is asked depends on the time
	count  int
	before []outbox.NewNotification // what it has added lately, to be repeated
}

// book makes bookings, several at once, until ctx ends.
func (c *child) book(ctx context.Context) error {
	store, err := c.store()
	if err != nil {
		return err
	}
	var bookers sync.WaitGroup
	failed := make([]error, 3)
	for i := range failed {
		b := &booker{child: c, store: store, number: i, rng: rand.New(rand.NewPCG(c.Seed, uint64(i))), pauses: rand.New(rand.NewPCG(c.Seed, ^uint64(i)))}
		bookers.Go(func() {
			for ctx.Err() == nil && failed[i] == nil {
				failed[i] = b.carryOut(ctx, b.next())
				<-time.After(time.Duration(b.rng.IntN(40)) * time.Millisecond)
			}
		})
	}
	bookers.Wait()
	return errors.Join(failed...)
}

var types = []string{"confirm", "remind", "reject"}

// key is one of those that are of interest now: the bookers share them, and they move on.
func (b *booker) key() outbox.Key {
	n := int64(time.Since(b.Epoch)/(15*time.Millisecond)) - b.rng.Int64N(80)
	n = max(n, 1)
	k := outbox.Key{Type: types[n%3], BookingID: n, CandidateTgID: 1000 + n}
	switch n % 8 {
	case 1:
		k.CandidateTgID = -k.CandidateTgID // a group
	case 2:
		k.CandidateTgID = 0
	case 3:
		k.BookingID = 0
	case 4:
		k = outbox.Key{Type: fmt.Sprint("digest", n)}
	}
	return k
}

func (b *booker) next() booking {
	b.count++
	bk := booking{request: fmt.Sprintf("%s-%d-%d", b.Name, b.number, b.count), batch: b.rng.IntN(3) == 0}
	n := 1
	if b.rng.IntN(3) == 0 {
		n = 2 + b.rng.IntN(4)
	}
	seen := make(map[outbox.Key]bool)
	for i := range n {
		add := outbox.NewNotification{}
		if len(b.before) > 0 && b.rng.IntN(4) == 0 {
			add = b.before[b.rng.IntN(len(b.before))] // the same once more
			add.NotBefore, add.NotAfter = time.Time{}, time.Time{}
		} else {
			k := b.key()
			add.Type, add.BookingID, add.CandidateTgID = k.Type, k.BookingID, k.CandidateTgID
			add.Payload = map[string]string{"content": fmt.Sprintf("%s.%d", bk.request, i)}
		}
		now, limits := time.Now(), b.rng.IntN(12)
		soon, late := time.Duration(b.rng.IntN(600))*time.Millisecond, time.Duration(2000+b.rng.IntN(4000))*time.Millisecond
		if seen[add.Key()] { // which depends on the time; what is drawn does not
			continue
		}
		seen[add.Key()] = true
		switch limits {
		case 0, 1, 2, 3:
			add.NotBefore = now.Add(soon)
		case 4:
			add.NotAfter = now.Add(late)
		}
		bk.adds = append(bk.adds, add)
		if b.before = append(b.before, add); len(b.before) > 20 {
			b.before = b.before[1:]
		}
	}
	switch p := b.rng.IntN(200); {
	case p < 20:
		bk.twist = rollsBack
	case p < 22:
		bk.twist = holdsRows
	case p < 24:
		bk.twist = idles
	case p < 28:
		bk.twist = cutHalf
	case p < 32:
		bk.twist = cutWritten
	case p < 36:
		bk.twist = cutAnswered
	case p < 39:
		bk.twist = dropsInTx
	case p < 42:
		bk.twist = cancelsInTx
	case p < 70:
		bk.twist, bk.batch = inAnyOrder, false
	case p < 110 && b.Serializable:
		bk.twist = readsCounter
	}
	return bk
}

func content(n outbox.NewNotification) string {
	return `{"content":"` + n.Payload.(map[string]string)["content"] + `"}`
}

// carryOut runs a booking until it is known to be committed or was meant to roll back.
// The same request may run many times and takes effect once.
func (b *booker) carryOut(ctx context.Context, bk booking) error {
	patience := time.Now().Add(10 * time.Second)
	for run := 0; ; run++ {
		result, err := b.attempt(ctx, bk)
		if err != nil {
			return err
		}
		if result == ledger.Committed || bk.twist == rollsBack || ended(ctx) || time.Now().After(patience) {
			return nil
		}
		if bk.twist != inAnyOrder && bk.twist != readsCounter {
			bk.twist = straight
		}
		<-time.After(time.Duration(min(run, 10)*10+b.pauses.IntN(20)) * time.Millisecond)
	}
}

// ended reports whether ctx has ended.
func ended(ctx context.Context) bool { return ctx.Err() != nil }

var errRollBack = errors.New("rolled back on purpose")

// attempt runs a booking once. The error is one of the journal.
func (b *booker) attempt(ctx context.Context, bk booking) (ledger.Result, error) {
	from := time.Now()
	commits := make([]ledger.Commit, len(bk.adds))
	note := func() error {
		records := make([]ledger.Record, len(commits))
		for i := range commits {
			c := commits[i]
			records[i].Commit = &c
		}
		return b.journal.Append(records...)
	}
	for i, n := range bk.adds {
		commits[i] = ledger.Commit{Caller: b.Name, Request: bk.request, Key: n.Key(), Content: content(n), Result: ledger.Unknown, From: from}
	}
	if err := note(); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second+2*b.Lease)
	defer cancel()
	committing := false // COMMIT was sent, or is about to be
	opts := pgx.TxOptions{}
	if b.Serializable {
		opts.IsoLevel = pgx.Serializable
	}
	err := outbox.RunInTx(ctx, b.pool, opts, func(tx pgx.Tx) error {
		if committing {
			b.fault(ledger.Fault{Kind: "serialization failure at COMMIT", Observed: true})
		}
		committing = false
		err := b.inTx(ctx, cancel, tx, bk, commits)
		switch sqlState(err) {
		case "40001":
			b.fault(ledger.Fault{Kind: "serialization failure", Observed: true})
		case "40P01":
			b.fault(ledger.Fault{Kind: "deadlock", Observed: true})
		}
		committing = err == nil
		return err
	})
	result := ledger.Committed
	switch code := sqlState(err); {
	case err == nil:
	case !committing, code == "40001", code == "40P01":
		result = ledger.RolledBack
	default:
		result = ledger.Unknown
	}
	for i := range commits {
		c := &commits[i]
		c.Result, c.To, c.Code = result, time.Now(), sqlState(err)
		if result == ledger.RolledBack {
			c.ID, c.Version, c.Outcome = 0, 0, ""
		}
	}
	return result, note()
}

// inTx is the transaction of a booking.
func (b *booker) inTx(ctx context.Context, cancel func(), tx pgx.Tx, bk booking, commits []ledger.Commit) error {
	tag, err := tx.Exec(ctx, "INSERT INTO bookings VALUES ($1, $2) ON CONFLICT DO NOTHING", bk.request, b.Name)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 { // it was committed before
		for i := range commits {
			c := &commits[i]
			if err := tx.QueryRow(ctx, `SELECT id, version, outcome FROM booked
				WHERE request = $1 AND type = $2 AND booking_id = $3 AND candidate_tg_id = $4`,
				bk.request, c.Key.Type, c.Key.BookingID, c.Key.CandidateTgID).Scan(&c.ID, &c.Version, &c.Outcome); err != nil {
				return err
			}
		}
		return nil
	}
	now := time.Now()
	switch bk.twist {
	case readsCounter:
		var sum int
		if err := tx.QueryRow(ctx, "SELECT sum(n) FROM counters WHERE id % 3 = $1", b.pauses.IntN(3)).Scan(&sum); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "UPDATE counters SET n = $1 WHERE id = $2", sum%1000, b.pauses.IntN(10)); err != nil {
			return err
		}
	case idles:
		<-time.After(b.Lease)
		b.fault(ledger.Fault{Kind: string(idles), From: now})
	}
	if err := b.add(ctx, tx, bk, commits); err != nil {
		return err
	}
	b.moment("in a transaction")
	for _, c := range commits {
		if _, err := tx.Exec(ctx, "INSERT INTO booked VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
			bk.request, c.Key.Type, c.Key.BookingID, c.Key.CandidateTgID, c.ID, c.Version, c.Outcome, c.Content); err != nil {
			return err
		}
	}
	conn := tx.Conn().PgConn().Conn().(*wire)
	cut := func(w *wire) {
		_ = w.Close() // it is broken, as it should be
		b.fault(ledger.Fault{Kind: string(bk.twist)})
	}
	switch bk.twist {
	case rollsBack:
		return errRollBack
	case holdsRows:
		now := time.Now()
		<-time.After(b.Lease + b.Lease/4)
		for i, c := range commits {
			// The caller's transaction may hold the rows for longer yet, which Check sees. It counts once.
			b.fault(ledger.Fault{Kind: string(holdsRows), Key: c.Key, From: now, Observed: i > 0})
		}
	case cutHalf:
		conn.arm(hasCommit, halfWritten, cut)
	case cutWritten:
		conn.arm(hasCommit, written, cut)
	case cutAnswered:
		conn.arm(hasCommit, answered, cut)
	case dropsInTx:
		cut(conn)
	case cancelsInTx:
		b.fault(ledger.Fault{Kind: string(cancelsInTx)})
		cancel()
	}
	b.moment("before COMMIT")
	for _, m := range wireModes {
		if name := "with COMMIT " + string(m); b.due(name) {
			conn.arm(hasCommit, m, func(*wire) { b.strike(name) })
		}
	}
	return nil
}

// add adds what bk asks for, and notes what was returned.
func (b *booker) add(ctx context.Context, tx pgx.Tx, bk booking, commits []ledger.Commit) error {
	note := func(i int, res outbox.AddResult) {
		commits[i].ID, commits[i].Version, commits[i].Outcome = res.Notification.ID, res.Notification.Version, res.Outcome
	}
	if bk.batch {
		results, err := b.store.AddNotifications(ctx, tx, bk.adds)
		if err != nil {
			return err
		}
		for i, res := range results {
			note(i, res)
		}
		return nil
	}
	for i, n := range bk.adds {
		res, err := b.store.AddNotification(ctx, tx, n)
		if err != nil {
			return err
		}
		note(i, res)
	}
	return nil
}
