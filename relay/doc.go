// Package relay delivers what package outbox has stored.
//
//	r, err := relay.New(store, sender, relay.Config{})
//	...
//	err = r.Run(ctx) // until ctx ends
//
// Any number of relays, in any number of processes, share the work: each claims due
// rows under a lease, hands them to its [Sender] and settles the results. A relay
// that dies leaves its rows to the others when their leases have ended.
//
// # What is guaranteed
//
//   - What was added and committed is sent, or ends failed with a reason, or is due
//     at a known time. Nothing is lost.
//   - While leases hold, a key is sent by one relay at a time. A relay that was
//     frozen past its lease can settle nothing that another has claimed since: its
//     fencing token is stale.
//   - A message carries the newest content as of its claim. Content that is newer
//     still goes out after it, and the sender is told what has been delivered.
//   - An attempt is counted when a row is claimed, so that a message that kills its
//     process is failed in the end. An outage of the database costs none unless it is
//     longer than the lease.
//
// # What is not
//
// Between the provider's accept and the note of it in the database a process can
// die, or the database go away for longer than the lease. Then it is not known
// whether the message went out. [AtLeastOnce] sends it again; [AtMostOnce] fails it
// for an operator, and with it whatever else the dead process had claimed (keep
// BatchSize small there). A sender that can ask its provider is a [Reconciler] and
// has neither trouble.
//
// A caller that keeps a row locked, in an open transaction, for longer than the
// lease of its delivery takes the row out of the relay's hands: the relay goes on
// trying to settle it, but once the caller is done another relay may be quicker and
// send it again. Keep booking transactions shorter than the lease.
//
// # How soon
//
// A due row is claimed by the next claim, oldest first, but for one case: a transaction
// that is held open anywhere in the cluster keeps PostgreSQL from removing the index
// entries of delivered rows, and when claims take long on that account (or because the
// database is far away), they begin two seconds before the last row claimed. A row that falls due before that, as it was
// requeued or refreshed, its lease ended or its caller was long about the commit, waits
// for the next claim from the beginning: 20 times as long as the last one took, a minute
// at most.
//
// # Clocks
//
// What is due, expired or leased is decided by the database's clock. That of the
// relay's machine only measures how long to wait.
package relay
