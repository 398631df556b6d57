package ledger_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
	"github.com/seed3357934d/outbox/relay"
)

var (
	key   = outbox.Key{Type: "reject", BookingID: 7, CandidateTgID: 42}
	other = outbox.Key{Type: "reject", BookingID: 8, CandidateTgID: 42}
	noon  = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
)

// at is so many milliseconds after noon.
func at(ms int) time.Time { return noon.Add(time.Duration(ms) * time.Millisecond) }

const lease = time.Second

func token(claim int) string { return fmt.Sprintf("%031d0", claim) }

// add is an add that was committed within 10 ms.
func add(ms int, request, content string, version int64, outcome outbox.Outcome) *ledger.Commit {
	return &ledger.Commit{
		Caller: "booker", Request: request, Key: key, Content: content, Result: ledger.Committed,
		ID: 1, Version: version, Outcome: outcome, From: at(ms), To: at(ms + 10),
	}
}

// delivery is all that a worker notes of a row that it claims, sends and settles, in
// 40 ms, the provider included.
func delivery(ms, claim int, worker, content string, version int64) []ledger.Record {
	receipt := fmt.Sprintf("r%d", claim)
	return []ledger.Record{
		{Claimed: &ledger.Claimed{Worker: worker, ID: 1, Version: version, Token: token(claim), From: at(ms), To: at(ms + 10)}},
		{Accept: &ledger.Accept{
			Key: key, ID: 1, Version: version, Attempts: 1, Content: content, Receipt: receipt,
			Worker: worker, Claimed: at(ms), Begun: at(ms + 10), At: at(ms + 20),
		}},
		{Settled: &ledger.Settled{
			Worker: worker, ID: 1, Version: version, Token: token(claim), Verdict: outbox.Delivered, Receipt: receipt,
			Result: outbox.LeaseDone, From: at(ms + 30), To: at(ms + 40),
		}},
	}
}

// sent is a row at the end.
func sent(content string, version int64, receipt string) outbox.Notification {
	return outbox.Notification{
		ID: 1, Type: key.Type, BookingID: key.BookingID, CandidateTgID: key.CandidateTgID, Payload: json.RawMessage(content),
		Status: outbox.StatusSent, Attempts: 1, Version: version, SentVersion: version, Receipt: receipt, CreatedAt: at(0), SentAt: at(150),
	}
}

// good is one add, delivered once.
func good() ledger.History {
	return ledger.History{
		Lease:   lease,
		Records: append([]ledger.Record{{Commit: add(0, "a", `"one"`, 1, outbox.OutcomeCreated)}}, delivery(100, 1, "w1", `"one"`, 1)...),
		Rows:    []outbox.Notification{sent(`"one"`, 1, "r1")},
		Drained: true,
	}
}

// failed is one add that the provider refused.
func failed() ledger.History {
	h := good()
	h.Records = h.Records[:1]
	h.Rows[0].Status, h.Rows[0].SentVersion, h.Rows[0].Receipt, h.Rows[0].LastError = outbox.StatusFailed, 0, "", "blocked"
	return h
}

// failedFor is one add that failed for that reason.
func failedFor(reason string, attempts, limit int) ledger.History {
	h := failed()
	h.MaxAttempts, h.Rows[0].LastError, h.Rows[0].Attempts = limit, reason, attempts
	return h
}

// twice is one add, delivered again by another worker 2 s later, as the first noted nothing.
func twice() ledger.History {
	h := good()
	h.Records = append(h.Records[:3], delivery(2100, 2, "w2", `"one"`, 1)...)
	h.Rows[0].Receipt = "r2"
	return h
}

// overlapping is one add, delivered, requeued and delivered again at most once, by a worker
// whose claim began before that of the first and was answered at the given time.
func overlapping(answered int) ledger.History {
	h := good()
	h.Delivery = relay.AtMostOnce
	again := delivery(90, 2, "w2", `"one"`, 1)
	again[0].Claimed.To, again[1].Accept.Begun, again[1].Accept.At = at(answered), at(310), at(320)
	again[2].Settled.From, again[2].Settled.To = at(330), at(340)
	h.Rows[0].Receipt = "r2"
	return history{h}.with(requeue(150, true)).with(again...).History
}

func (h history) with(records ...ledger.Record) history {
	h.Records = append(h.Records, records...)
	return h
}

type history struct{ ledger.History }

func fault(worker string, of outbox.Key, from, to int) ledger.Record {
	return ledger.Record{Fault: &ledger.Fault{Kind: "kill", Worker: worker, Key: of, From: at(from), To: at(to)}}
}

func requeue(ms int, done bool) ledger.Record {
	return ledger.Record{Requeue: &ledger.Requeue{Key: key, Done: done, From: at(ms), To: at(ms + 10)}}
}

// Each violation that Check reports was left out by hand, one at a time, and each
// duplicate, stale settle and row left uncounted, and most conditions turned around
// (117 mutations): a case of TestCheck_finds, TestCheck_allows or their counterparts for
// changes turned red. What stayed green is about printing and about sharing an fsync.

func TestCheck_finds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		history func() ledger.History
		kind    ledger.Kind
	}{
		{"a_committed_add_without_a_row", func() ledger.History {
			h := good()
			h.Rows, h.Records = nil, h.Records[:1]
			return h
		}, ledger.Lost},
		{"a_committed_add_whose_booking_is_gone", func() ledger.History {
			h := good()
			h.Booked = []ledger.Commit{}
			return h
		}, ledger.Lost},
		{"a_row_that_was_never_sent_and_counts_as_sent", func() ledger.History {
			h := good()
			h.Records = h.Records[:1]
			return h
		}, ledger.Lost},
		{"a_receipt_that_the_provider_did_not_give", func() ledger.History {
			h := good()
			h.Rows[0].Receipt = "r9"
			return h
		}, ledger.Lost},
		{"newer_content_that_counts_as_sent_with_the_older", func() ledger.History {
			h := good()
			h.Records = append(h.Records, ledger.Record{Commit: add(110, "b", `"two"`, 2, outbox.OutcomeRefreshed)})
			h.Rows[0].Version, h.Rows[0].Payload = 2, json.RawMessage(`"two"`)
			return h
		}, ledger.Lost},
		{"newer_content_that_the_row_does_not_have", func() ledger.History {
			h := good()
			h.Records = append(h.Records, ledger.Record{Commit: add(110, "b", `"two"`, 2, outbox.OutcomeRefreshed)})
			return h
		}, ledger.Lost},
		{"a_row_with_other_content_than_committed", func() ledger.History {
			h := good()
			h.Rows[0].Payload = json.RawMessage(`"two"`)
			return h
		}, ledger.Lost},
		{"a_row_that_failed_without_a_reason", func() ledger.History {
			h := good()
			h.Rows[0].Status = outbox.StatusFailed
			return h
		}, ledger.Lost},
		{"a_row_that_failed_without_a_reason_beside_a_purge_of_payloads", func() ledger.History {
			h := failed()
			h.Rows[0].LastError = ""
			return history{h}.with(ledger.Record{Purge: &ledger.Purge{From: at(200), To: at(210)}}).History
		}, ledger.Lost},
		{"a_failed_row_without_a_payload_beside_a_purge_of_payloads", func() ledger.History {
			h := failed()
			h.Rows[0].Payload = nil
			return history{h}.with(ledger.Record{Purge: &ledger.Purge{From: at(200), To: at(210)}}).History
		}, ledger.Lost},
		{"a_row_out_of_attempts_that_has_some_left", func() ledger.History { return failedFor("out of attempts; before that: busy", 2, 3) }, ledger.Lost},
		{"a_row_out_of_attempts_of_which_there_is_no_end", func() ledger.History {
			return failedFor("out of attempts: the last delivery left no result", 200, -1)
		}, ledger.Lost},
		{"a_row_out_of_attempts_before_the_first", func() ledger.History { return failedFor("out of attempts", 0, 3) }, ledger.Lost},
		{"a_row_that_expired_and_may_not", func() ledger.History {
			return failedFor("expired: not delivered before 2026-01-01 12:00:00+00", 1, 0)
		}, ledger.Lost},
		{"an_unknown_outcome_that_fails_a_row_of_AtLeastOnce", func() ledger.History {
			h := good()
			h.Rows[0].Status, h.Rows[0].LastError = outbox.StatusFailed, "outcome unknown: it"
			return h
		}, ledger.Lost},
		{"a_row_that_is_pending_when_all_is_drained", func() ledger.History {
			h := good()
			h.Rows[0].Status = outbox.StatusPending
			return h
		}, ledger.Lost},
		{"a_requeued_row_that_is_not_sent_again", func() ledger.History {
			return history{good()}.with(requeue(200, true)).History
		}, ledger.Lost},
		{"a_purged_row_that_was_never_accepted", func() ledger.History {
			h := good()
			h.Rows, h.Records = nil, append(h.Records[:1], ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(200), To: at(210)}})
			return h
		}, ledger.Lost},
		{"a_duplicate_without_a_fault", twice, ledger.Duplicate},
		{"a_duplicate_with_a_fault_of_another_worker", func() ledger.History {
			return history{twice()}.with(fault("w3", outbox.Key{}, 125, 125)).History
		}, ledger.Duplicate},
		{"a_duplicate_with_a_fault_of_another_key", func() ledger.History {
			return history{twice()}.with(fault("", other, 125, 125)).History
		}, ledger.Duplicate},
		{"a_duplicate_with_a_fault_of_the_message_at_another_worker", func() ledger.History {
			f := fault("w3", key, 125, 125)
			f.Fault.Message = true
			return history{twice()}.with(f).History
		}, ledger.Duplicate},
		{"a_duplicate_with_a_harmless_fault", func() ledger.History {
			f := fault("w1", outbox.Key{}, 125, 125)
			f.Fault.Harmless = true
			return history{twice()}.with(f).History
		}, ledger.Duplicate},
		{"a_duplicate_with_a_fault_before_the_first_claim", func() ledger.History {
			return history{twice()}.with(fault("w1", outbox.Key{}, 50, 90)).History
		}, ledger.Duplicate},
		{"a_duplicate_with_a_fault_after_the_second_began", func() ledger.History {
			return history{twice()}.with(fault("w1", outbox.Key{}, 2111, 2111)).History
		}, ledger.Duplicate},
		{"a_duplicate_of_what_was_settled", func() ledger.History {
			h := good()
			h.Records = append(h.Records, delivery(2100, 2, "w2", `"one"`, 1)...)
			h.Rows[0].Receipt = "r2"
			return history{h}.with(fault("w1", outbox.Key{}, 145, 145)).History
		}, ledger.Duplicate},
		{"a_duplicate_under_AtMostOnce", func() ledger.History {
			h := history{twice()}.with(fault("w1", outbox.Key{}, 125, 125)).History
			h.Delivery = relay.AtMostOnce
			return h
		}, ledger.Duplicate},
		{"a_duplicate_requeued_after_both_were_claimed", func() ledger.History { return overlapping(99) }, ledger.Duplicate},
		{"a_duplicate_requeued_only_before", func() ledger.History {
			return history{twice()}.with(requeue(50, true)).History
		}, ledger.Duplicate},
		{"a_duplicate_requeued_only_afterwards", func() ledger.History {
			h := history{twice()}.with(requeue(2200, true)).with(delivery(2300, 3, "w2", `"one"`, 1)...).History
			h.Rows[0].Receipt = "r3"
			return h
		}, ledger.Duplicate},
		{"the_same_version_of_another_row_without_a_purge", func() ledger.History {
			h := twice()
			for _, r := range h.Records[3:] {
				if r.Accept != nil {
					r.Accept.ID = 2
				}
			}
			return h
		}, ledger.Duplicate},
		{"a_rolled_back_add_that_was_sent", func() ledger.History {
			h := good()
			back := add(50, "b", `"two"`, 2, outbox.OutcomeRefreshed)
			back.Result = ledger.RolledBack
			h.Records = append(h.Records, ledger.Record{Commit: back})
			h.Records = append(h.Records, delivery(100, 2, "w1", `"two"`, 2)...)
			return h
		}, ledger.RolledBackSent},
		{"an_unknown_add_that_was_sent_and_is_not_booked", func() ledger.History {
			h := good()
			h.Booked = []ledger.Commit{*h.Records[0].Commit}
			lost := add(50, "b", `"two"`, 2, outbox.OutcomeRefreshed)
			lost.Result = ledger.Unknown
			h.Records = append(h.Records, ledger.Record{Commit: lost})
			h.Records = append(h.Records, delivery(100, 2, "w1", `"two"`, 2)...)
			return h
		}, ledger.RolledBackSent},
		{"a_rolled_back_add_that_is_booked", func() ledger.History {
			h := good()
			h.Booked = []ledger.Commit{*h.Records[0].Commit}
			h.Records[0].Commit.Result = ledger.RolledBack
			return h
		}, ledger.Impossible},
		{"content_that_nobody_committed", func() ledger.History {
			h := good()
			h.Records[2].Accept.Content = `"zero"`
			return h
		}, ledger.Impossible},
		{"a_version_that_nobody_committed", func() ledger.History {
			return history{good()}.with(delivery(200, 2, "w1", `"two"`, 2)[1]).History
		}, ledger.Impossible},
		{"a_row_that_was_accepted_under_another_key", func() ledger.History {
			h := good()
			h.Records[2].Accept.Key = other
			return h
		}, ledger.Impossible},
		{"a_commit_of_no_row", func() ledger.History {
			h := good()
			h.Records, h.Rows = h.Records[:1], nil
			h.Records[0].Commit.ID = 0
			return h
		}, ledger.Impossible},
		{"a_row_of_two_keys", func() ledger.History {
			c := add(50, "b", `"one"`, 1, outbox.OutcomeExisting)
			c.Key = other
			return history{failed()}.with(ledger.Record{Commit: c}).History
		}, ledger.Impossible},
		{"a_version_with_two_contents", func() ledger.History {
			return history{failed()}.with(ledger.Record{Commit: add(50, "b", `"two"`, 1, outbox.OutcomeRefreshed)}).History
		}, ledger.Impossible},
		{"a_row_with_a_version_that_nobody_committed", func() ledger.History {
			h := failed()
			h.Rows[0].Version = 2
			return h
		}, ledger.Impossible},
		{"a_row_with_a_status_of_nobody", func() ledger.History {
			h := failed()
			h.Rows[0].Status = "done"
			return h
		}, ledger.Impossible},
		{"a_row_that_is_never_due", func() ledger.History {
			h := failed()
			h.Rows[0].Status, h.Rows[0].CreatedAt, h.Drained = outbox.StatusPending, time.Time{}, false
			return h
		}, ledger.Lost},
		{"two_rows_of_a_key", func() ledger.History {
			h := good()
			h.Rows = append(h.Rows, h.Rows[0])
			h.Rows[1].ID = 2
			return h
		}, ledger.TwoRows},
		{"a_row_that_nobody_committed", func() ledger.History {
			h := good()
			h.Rows = append(h.Rows, h.Rows[0])
			h.Rows[1].ID, h.Rows[1].BookingID = 2, other.BookingID
			return h
		}, ledger.Impossible},
		{"content_older_than_what_was_committed_before_the_claim", func() ledger.History {
			h := good()
			h.Records = append(h.Records, ledger.Record{Commit: add(80, "b", `"two"`, 2, outbox.OutcomeRefreshed)})
			h.Records = append(h.Records, delivery(200, 2, "w1", `"two"`, 2)...)
			h.Rows[0] = sent(`"two"`, 2, "r2")
			return h
		}, ledger.OlderContent},
		{"a_stale_settle_that_passed", func() ledger.History {
			h := good()
			return history{h}.with(ledger.Record{Claimed: &ledger.Claimed{Worker: "w2", ID: 1, Version: 1, Token: token(2), From: at(121), To: at(125)}}).History
		}, ledger.StalePassed},
		{"an_add_that_met_a_unique_violation", func() ledger.History {
			h := good()
			c := add(50, "b", `"two"`, 0, "")
			c.Result, c.Code = ledger.RolledBack, "23505"
			return history{h}.with(ledger.Record{Commit: c}).History
		}, ledger.BrokenAdd},
		{"an_add_in_an_aborted_transaction", func() ledger.History {
			h := good()
			c := add(50, "b", `"two"`, 0, "")
			c.Result, c.Code = ledger.RolledBack, "25P02"
			return history{h}.with(ledger.Record{Commit: c}).History
		}, ledger.BrokenAdd},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := tc.history()
			v := ledger.Check(h)
			require.Equal(t, 1, v.Count(tc.kind), "%v", v.Violations)
			require.NotEmpty(t, h.Of(v.Violations[0].Key, v.Violations[0].ID))
		})
	}
}

func TestCheck_allows(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		history func() ledger.History
		want    ledger.Verdict
	}{
		{"one_delivery", good, ledger.Verdict{Adds: 1, Accepted: 1, Sent: 1}},
		{"newer_content_delivered_after_the_older", func() ledger.History {
			h := good()
			h.Records[3].Settled.Result = outbox.LeaseSuperseded
			h.Records = append(h.Records, ledger.Record{Commit: add(111, "b", `"two"`, 2, outbox.OutcomeRefreshed)})
			h.Records = append(h.Records, delivery(200, 2, "w1", `"two"`, 2)...)
			h.Rows[0] = sent(`"two"`, 2, "r2")
			return h
		}, ledger.Verdict{Adds: 2, Accepted: 2, Sent: 1}},
		{"newer_content_committed_while_the_older_was_claimed", func() ledger.History {
			h := good()
			h.Records[3].Settled.Result = outbox.LeaseSuperseded
			h.Records = append(h.Records, ledger.Record{Commit: add(91, "b", `"two"`, 2, outbox.OutcomeRefreshed)})
			h.Records = append(h.Records, delivery(200, 2, "w1", `"two"`, 2)...)
			h.Rows[0] = sent(`"two"`, 2, "r2")
			return h
		}, ledger.Verdict{Adds: 2, Accepted: 2, Sent: 1}},
		{"an_add_to_a_row_that_was_sent", func() ledger.History {
			return history{good()}.with(ledger.Record{Commit: add(500, "b", `"two"`, 1, outbox.OutcomeExisting)}).History
		}, ledger.Verdict{Adds: 2, Accepted: 1, Sent: 1}},
		{"a_row_that_failed_with_a_reason", failed, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_that_is_out_of_attempts", func() ledger.History {
			return failedFor("out of attempts: the last delivery left no result", 3, 3)
		}, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_that_is_out_of_attempts_of_which_nothing_is_known", func() ledger.History {
			return failedFor("out of attempts", 1, 0)
		}, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_whose_sender_words_its_reason_like_ours", func() ledger.History {
			return failedFor("out of attempts to guess the PIN", 1, -1)
		}, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_whose_sender_says_that_something_expired", func() ledger.History {
			return failedFor("expired: the token", 1, -1)
		}, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_that_expired", func() ledger.History {
			h := failedFor("expired: not delivered before 2026-01-01 12:00:00+00", 1, 3)
			h.Rows[0].NotAfter = noon
			return h
		}, ledger.Verdict{Adds: 1, Failed: 1}},
		{"a_row_that_is_pending_and_due_before_all_is_drained", func() ledger.History {
			h := good()
			h.Records, h.Drained = h.Records[:1], false
			h.Rows[0].Status, h.Rows[0].SentVersion, h.Rows[0].Receipt = outbox.StatusPending, 0, ""
			return h
		}, ledger.Verdict{Adds: 1, Pending: 1}},
		{"a_rolled_back_add_that_is_not_sent", func() ledger.History {
			back := add(50, "b", `"two"`, 2, outbox.OutcomeRefreshed)
			back.Result = ledger.RolledBack
			return history{good()}.with(ledger.Record{Commit: back}).History
		}, ledger.Verdict{Adds: 1, Accepted: 1, Sent: 1}},
		{"an_unknown_add_that_was_sent_and_is_booked", func() ledger.History {
			h := good()
			h.Booked = []ledger.Commit{*h.Records[0].Commit}
			h.Records[0].Commit.Result = ledger.Unknown
			return h
		}, ledger.Verdict{Adds: 1, Accepted: 1, Sent: 1}},
		{"an_unknown_add_that_was_sent_where_nothing_is_booked", func() ledger.History {
			h := good()
			h.Records[0].Commit.Result = ledger.Unknown
			return h
		}, ledger.Verdict{Accepted: 1, Sent: 1}},
		{"a_duplicate_with_a_fault_of_the_worker", func() ledger.History {
			return history{twice()}.with(fault("w1", outbox.Key{}, 125, 125)).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesAllowed: 1}},
		{"a_duplicate_with_a_stall_of_the_worker", func() ledger.History {
			stall := fault("w1", outbox.Key{}, 125, 125)
			stall.Fault.Observed = true
			return history{twice()}.with(stall).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesAllowed: 1, DuplicatesStalled: 1}},
		{"a_duplicate_with_a_fault_of_everybody", func() ledger.History {
			return history{twice()}.with(fault("", outbox.Key{}, 125, 2000)).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesAllowed: 1}},
		{"a_duplicate_with_a_fault_of_the_key", func() ledger.History {
			return history{twice()}.with(fault("", key, 125, 125)).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesAllowed: 1}},
		{"a_duplicate_while_a_caller_held_the_row_for_long", func() ledger.History {
			c := add(121, "b", `"one"`, 1, outbox.OutcomeRefreshed)
			c.To = at(2000)
			return history{twice()}.with(ledger.Record{Commit: c}).History
		}, ledger.Verdict{Adds: 2, Accepted: 2, Sent: 1, DuplicatesAllowed: 1}},
		{"a_duplicate_that_was_requeued", func() ledger.History {
			return history{twice()}.with(requeue(500, true)).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesOnPurpose: 1}},
		{"a_duplicate_under_AtMostOnce_that_may_have_been_requeued", func() ledger.History {
			h := history{twice()}.with(requeue(500, false)).History
			h.Delivery = relay.AtMostOnce
			return h
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesOnPurpose: 1}},
		{"a_duplicate_that_was_requeued_while_the_claim_of_it_waited", func() ledger.History { return overlapping(300) },
			ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesOnPurpose: 1}},
		{"a_requeued_row_of_which_a_Reconciler_knew", func() ledger.History {
			h := history{good()}.with(requeue(200, true)).History
			h.Reconciled = true
			return h
		}, ledger.Verdict{Adds: 1, Accepted: 1, Sent: 1, RequeuesAnswered: 1}},
		{"a_stale_settle_that_was_refused", func() ledger.History {
			h := history{twice()}.with(fault("w1", outbox.Key{}, 121, 2200)).History
			stale := *good().Records[3].Settled
			stale.Result, stale.From, stale.To = outbox.LeaseStale, at(2200), at(2210)
			return history{h}.with(ledger.Record{Settled: &stale}).History
		}, ledger.Verdict{Adds: 1, Accepted: 2, Sent: 1, DuplicatesAllowed: 1, StaleRefused: 1}},
		{"a_row_that_was_purged_after_it_was_sent", func() ledger.History {
			h := good()
			h.Rows = nil
			return history{h}.with(ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(200), To: at(210)}}).History
		}, ledger.Verdict{Adds: 1, Accepted: 1}},
		{"the_same_version_of_another_row_after_a_purge", func() ledger.History {
			h := good()
			again := add(300, "b", `"one"`, 1, outbox.OutcomeCreated)
			again.ID = 2
			h.Records = append(h.Records, ledger.Record{Commit: again}, ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(200), To: at(210)}})
			for _, r := range delivery(400, 2, "w1", `"one"`, 1) {
				if r.Accept != nil {
					r.Accept.ID = 2
					h.Records = append(h.Records, r)
				}
			}
			h.Rows[0].ID, h.Rows[0].Receipt = 2, "r2"
			return h
		}, ledger.Verdict{Adds: 2, Accepted: 2, Sent: 1, DuplicatesOnPurpose: 1}},
		{"a_row_whose_payload_was_purged", func() ledger.History {
			h := good()
			h.Rows[0].Payload, h.Rows[0].Receipt = nil, ""
			return history{h}.with(ledger.Record{Purge: &ledger.Purge{From: at(200), To: at(210)}}).History
		}, ledger.Verdict{Adds: 1, Accepted: 1, Sent: 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, ledger.Check(tc.history()))
		})
	}
}
