// Package outbox is an idempotent transactional outbox for PostgreSQL.
//
// A service changes something and must tell somebody about it. It writes the
// notification in the same transaction as the change, with
// [PGStore.AddNotification]; a relay delivers it later. Both are committed or
// neither is.
//
// # Identity
//
// A notification is identified by its [Key]: type, booking and candidate. Status
// is a stage of its life and not part of its identity. An add finds the row of
// the key whatever its status, under SELECT ... FOR UPDATE, and then
//
//   - creates it, if there is none,
//   - refreshes it, if it is pending: newer content replaces older,
//   - returns it unchanged, if it was sent or has failed.
//
// So an add may be repeated at will: by a user who presses a button twice, by an
// HTTP retry, by a job that is replayed.
//
// # Guarantees
//
//   - No unique violation breaks the caller's transaction, however many rivals
//     add the same key at once. Nor does bad input: it is refused with
//     [ErrInvalid] before any SQL is run.
//   - No message goes out twice because somebody called twice.
//   - No accepted change is lost, not even one that arrives while the message is
//     being sent: the lease of that delivery stays, the version rises, and the
//     newer content goes out after it.
//   - What is rolled back was never there.
//
// Under READ COMMITTED an add waits for a rival and goes on. Under REPEATABLE
// READ and SERIALIZABLE PostgreSQL may answer 40001, with which nothing can be
// done inside the transaction: [IsRetryable] says so and [RunInTx] runs it again.
//
// What no outbox can remove is a crash between a provider's accept and the note of
// it in the database: then a message goes out a second time, or is given up on, as
// the relay is configured.
//
// # Two sides
//
// Booking services hold a [Store] and call it in their own transactions. The rest
// of [PGStore] runs on the store's own pool and is for relays and operators. Package
// relay delivers.
// [Migrate] makes the table, or takes over one that an older service has made.
//
// # Not goals
//
// A general job queue, workflows, an ORM, another database engine, a broker, an
// order across keys, and exactly-once delivery over a network that cannot give it.
package outbox
