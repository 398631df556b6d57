// Package outboxtest is for the tests of services that use package outbox, on a real
// PostgreSQL.
//
//	func TestReject(t *testing.T) {
//		pool := outboxtest.NewPool(t) // a migrated database of this test's own
//		store := outboxtest.NewStore(t, pool)
//		svc := booking.New(store)
//
//		tx, err := pool.Begin(t.Context())
//		...
//		err = svc.Reject(t.Context(), tx, 7)
//		...
//		key := outbox.Key{Type: "reject", BookingID: 7, CandidateTgID: 42}
//		outboxtest.RequireAdded(t, tx, key, outboxtest.Want{Payload: map[string]string{"slot": "10:00"}})
//		...
//		var sender outboxtest.Sender
//		outboxtest.Deliver(t, store, &sender)
//		if len(sender.SentTo(key)) != 1 {
//			t.Error("not sent")
//		}
//	}
//
// [NewPool] needs no TestMain, no set-up beside Docker or an installed PostgreSQL, and
// leaves nothing behind. [RequireAdded] and [RequireNotAdded] look into a transaction that
// is still open, or at what is committed, in every schema or, with [InSchema], in one.
// [Sender] stands for a provider, and [Deliver] for a relay, one step at a time. [Torture]
// tries your real sender, with a fake provider behind it, under faults.
//
// All of it is safe for parallel tests. What ends a test, such as RequireAdded, has to be
// called by the goroutine that runs it.
package outboxtest
