package ledger_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
)

// row is a state of the row of key: of that version, with a lease of a claim unless that is 0.
func row(status outbox.Status, version, sentVersion int64, claim, until int) *ledger.State {
	s := &ledger.State{Status: status, Version: version, SentVersion: sentVersion, Payload: version}
	if sentVersion > 0 {
		s.Receipt = "r1"
	}
	if claim > 0 {
		end := at(until)
		s.Token, s.LeaseUntil, s.LeaseVersion = token(claim), &end, &version
	}
	return s
}

func change(ms int, before, after *ledger.State) ledger.Change {
	return ledger.Change{Seq: int64(ms), ID: 1, At: at(ms), Began: at(ms), Before: before, After: after}
}

// recorded is good, with the changes of its row.
func recorded() ledger.History {
	h := good()
	pending, leased, sent := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusSent, 1, 1, 0, 0)
	h.Changes = []ledger.Change{change(5, nil, pending), change(105, pending, leased), change(135, leased, sent)}
	return h
}

// found is h with an add that is booked, too.
func found(h *ledger.History, of *ledger.Commit) ([]ledger.Record, []ledger.Commit) {
	return append(h.Records, ledger.Record{Commit: of}), []ledger.Commit{*h.Records[0].Commit, *of}
}

func TestCheck_finds_in_the_changes_of_a_row(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		changes func(h *ledger.History)
		kind    ledger.Kind
	}{
		{"a_settle_without_its_token", func(h *ledger.History) {
			h.Changes[2].Before = row(outbox.StatusPending, 1, 0, 2, 1105)
		}, ledger.StalePassed},
		{"a_settle_that_did_nothing", func(h *ledger.History) { h.Changes = h.Changes[:2] }, ledger.StalePassed},
		{"a_settle_with_another_receipt", func(h *ledger.History) { h.Changes[2].After.Receipt = "r0" }, ledger.StalePassed},
		{"a_claim_that_was_given_what_the_row_did_not_have", func(h *ledger.History) {
			h.Records[1].Claimed.Version = 2
		}, ledger.OlderContent},
		{"a_claim_that_was_never_made", func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Claimed: &ledger.Claimed{Worker: "w2", ID: 1, Version: 1, Token: token(9), From: at(50), To: at(60)}})
		}, ledger.OlderContent},
		{"a_claim_of_a_row_that_another_held", func(h *ledger.History) {
			before := row(outbox.StatusPending, 1, 0, 7, 106)
			h.Changes[1].Before = before
		}, ledger.LeaseBroken},
		{"a_token_that_leased_the_row_before", func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Claimed: &ledger.Claimed{Worker: "w1", ID: 1, Version: 1, Token: token(1), From: at(45), To: at(55)}})
			h.Changes = append(h.Changes, change(50, row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 1, 1050)),
				change(60, row(outbox.StatusPending, 1, 0, 1, 1050), row(outbox.StatusPending, 1, 0, 0, 0)))
		}, ledger.LeaseBroken},
		{"a_refresh_that_ended_a_lease", func(h *ledger.History) {
			leased, refreshed := row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 2, 0, 1, 1105)
			refreshed.LeaseUntil = nil
			h.Changes = append(h.Changes, change(110, leased, refreshed))
		}, ledger.LeaseBroken},
		{"a_repeat_that_ended_a_lease", func(h *ledger.History) {
			leased, repeated := row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 1, 0, 1, 1105)
			repeated.LeaseUntil = nil
			h.Changes = append(h.Changes, change(110, leased, repeated))
		}, ledger.LeaseBroken},
		{"a_lease_that_was_made_shorter", func(h *ledger.History) {
			h.Changes = append(h.Changes, change(110, row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 1, 0, 1, 110)))
		}, ledger.LeaseBroken},
		{"a_repeat_that_took_attempts_from_a_delivery", func(h *ledger.History) {
			leased, repeated := row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 1, 0, 1, 1105)
			leased.Attempts = 1
			h.Changes = append(h.Changes, change(110, leased, repeated))
		}, ledger.LeaseBroken},
		{"a_claim_before_the_row_was_due", func(h *ledger.History) {
			later := at(500)
			h.Changes[1].Before.NextRetryAt = &later
		}, ledger.Impossible},
		{"a_claim_of_a_row_that_had_expired", func(h *ledger.History) {
			before := at(50)
			h.Changes[1].Before.NotAfter = &before
		}, ledger.Impossible},
		{"a_row_that_failed_as_expired_and_was_not", func(h *ledger.History) {
			later, failed := at(500), row(outbox.StatusFailed, 1, 0, 0, 0)
			failed.Error = "expired: not delivered before tomorrow"
			before := row(outbox.StatusPending, 1, 0, 0, 0)
			before.NotAfter = &later
			h.Changes = append(h.Changes, change(190, before, failed))
		}, ledger.Lost},
		{"a_row_that_failed_for_what_was_to_be_tried_again", func(h *ledger.History) {
			h.Permanent, h.MaxAttempts = []string{"blocked"}, 3
			failed := row(outbox.StatusFailed, 1, 0, 0, 0)
			failed.Error = "busy"
			h.Changes = append(h.Changes, change(190, row(outbox.StatusPending, 1, 0, 5, 1105), failed))
		}, ledger.Lost},
		{"newer_content_marked_as_sent", func(h *ledger.History) { h.Changes[2].Before.Version = 2 }, ledger.Lost},
		{"a_lease_for_other_content", func(h *ledger.History) { *h.Changes[1].After.LeaseVersion = 9 }, ledger.OlderContent},
		{"a_version_that_fell", func(h *ledger.History) {
			h.Changes = append(h.Changes, change(90, row(outbox.StatusPending, 2, 0, 0, 0), row(outbox.StatusPending, 1, 0, 0, 0)))
		}, ledger.Impossible},
		{"content_that_changed_without_a_version", func(h *ledger.History) {
			after := row(outbox.StatusPending, 1, 0, 0, 0)
			after.Payload = "other"
			h.Changes = append(h.Changes, change(90, row(outbox.StatusPending, 1, 0, 0, 0), after))
		}, ledger.Impossible},
		{"an_add_that_changed_nothing_and_made_a_version", func(h *ledger.History) {
			before, after := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 2, 0, 0, 0)
			after.Payload = before.Payload
			h.Changes = append(h.Changes, change(90, before, after))
		}, ledger.Duplicate},
		{"an_add_that_changed_a_settled_row", func(h *ledger.History) {
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), row(outbox.StatusSent, 2, 1, 0, 0)))
		}, ledger.Impossible},
		{"a_settled_row_that_became_pending_by_itself", func(h *ledger.History) {
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), row(outbox.StatusPending, 1, 0, 0, 0)))
		}, ledger.Impossible},
		{"a_row_that_was_deleted", func(h *ledger.History) {
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), nil))
		}, ledger.Lost},
		{"a_pending_row_that_was_deleted_by_a_purge", func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(80), To: at(100)}})
			h.Changes = append(h.Changes, change(90, row(outbox.StatusPending, 1, 0, 0, 0), nil))
		}, ledger.Lost},
		{"an_add_that_found_a_row_settled_before_it_ever_was", func(h *ledger.History) {
			existing := *add(50, "b", `"two"`, 1, outbox.OutcomeExisting)
			h.Booked = []ledger.Commit{*h.Records[0].Commit, existing}
			h.Records = append(h.Records[:1], ledger.Record{Commit: &existing})
			h.Rows[0].Status, h.Rows[0].SentVersion, h.Rows[0].Receipt, h.Rows[0].LastError = outbox.StatusFailed, 0, "", "blocked"
			h.Changes = h.Changes[:2]
		}, ledger.Lost},
		{"an_add_that_found_a_row_settled_which_was_settled_only_later", func(h *ledger.History) {
			begun := add(110, "b", `"two"`, 0, "")
			begun.Result, begun.To = ledger.Unknown, time.Time{}
			h.Records, h.Booked = found(h, add(110, "b", `"two"`, 1, outbox.OutcomeExisting))
			h.Records = append(h.Records, ledger.Record{Commit: begun})
		}, ledger.Lost},
		{"an_add_that_found_a_row_settled_which_had_been_requeued", func(h *ledger.History) {
			h.Records, h.Booked = found(h, add(500, "b", `"two"`, 1, outbox.OutcomeExisting))
			h.Records = append(h.Records, ledger.Record{Requeue: &ledger.Requeue{Key: key, From: at(180), To: at(195)}})
			h.Records = append(h.Records, delivery(600, 2, "w1", `"one"`, 1)...)
			h.Rows[0].Receipt = "r2"
			pending, leased, again := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 2, 1605), row(outbox.StatusSent, 1, 1, 0, 0)
			again.Receipt = "r2"
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), pending), change(605, pending, leased), change(635, leased, again))
		}, ledger.Lost},
		{"an_add_that_found_a_row_settled_of_another_version", func(h *ledger.History) {
			first := *h.Records[0].Commit
			h.Records, h.Booked = found(h, add(500, "b", `"two"`, 2, outbox.OutcomeExisting))
			first.Request, first.Version, first.Outcome, first.Content = "c", 2, outbox.OutcomeRefreshed, `"two"`
			h.Records, h.Booked = append(h.Records, ledger.Record{Commit: &first}), append(h.Booked, first)
			h.Rows[0].Version, h.Rows[0].SentVersion, h.Rows[0].Payload = 2, 2, json.RawMessage(`"two"`)
			h.Records = append(h.Records, ledger.Record{Accept: &ledger.Accept{
				Key: key, ID: 1, Version: 2, Content: `"two"`, Receipt: "r1", Worker: "w1", Claimed: at(100), Begun: at(110), At: at(120),
			}})
		}, ledger.Lost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := recorded()
			require.Empty(t, ledger.Check(h).Violations)
			tc.changes(&h)
			v := ledger.Check(h)
			require.Equal(t, 1, v.Count(tc.kind), "%v", v.Violations)
			require.NotEmpty(t, h.Of(key, 1))
		})
	}
}

// requeued has the row of h be requeued, and not sent again.
func requeued(h *ledger.History) {
	h.Records = append(h.Records, ledger.Record{Requeue: &ledger.Requeue{Key: key, From: at(180), To: at(191)}})
	h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), row(outbox.StatusPending, 1, 0, 0, 0)))
}

func TestCheck_allows_in_the_changes_of_a_row(t *testing.T) {
	t.Parallel()
	for name, changes := range map[string]func(h *ledger.History){
		"a_claim_after_the_lease_has_ended": func(h *ledger.History) {
			h.Changes[1].Before = row(outbox.StatusPending, 1, 0, 7, 104)
		},
		"a_claim_that_is_repeated_and_was_heard": func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Claimed: &ledger.Claimed{Worker: "w1", ID: 1, Version: 1, Token: token(1), From: at(45), To: at(55)}})
			first := row(outbox.StatusPending, 1, 0, 1, 1050)
			h.Changes[1].Before = first
			h.Changes = append(h.Changes, change(50, row(outbox.StatusPending, 1, 0, 0, 0), first))
		},
		"a_token_that_came_late_and_was_not_heard_again": func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Claimed: &ledger.Claimed{Worker: "w1", ID: 1, Version: 1, Token: token(7), From: at(45), To: at(55)}})
			pending, first, late := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 7, 1050), row(outbox.StatusPending, 1, 0, 7, 90)
			h.Changes[1].Before = late
			h.Changes = append(h.Changes, change(50, pending, first), change(60, first, pending), change(70, pending, late))
		},
		"a_token_of_a_claim_that_nobody_heard_of": func(h *ledger.History) {
			h.Changes = append(h.Changes, change(50, row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 1, 80)),
				change(85, row(outbox.StatusPending, 1, 0, 1, 80), row(outbox.StatusPending, 1, 0, 2, 95)),
				change(90, row(outbox.StatusPending, 1, 0, 2, 95), row(outbox.StatusPending, 1, 0, 0, 0)))
		},
		"a_claim_that_is_repeated": func(h *ledger.History) {
			before := row(outbox.StatusPending, 1, 0, 1, 1100)
			before.Token = token(1)[:31] + "1"
			h.Changes[1].Before = before
		},
		"a_refresh_that_keeps_the_lease": func(h *ledger.History) {
			leased, refreshed := row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 2, 0, 1, 1105)
			h.Changes = append(h.Changes, change(110, leased, refreshed))
		},
		"an_add_that_found_the_row_settled": func(h *ledger.History) {
			existing := *add(500, "b", `"two"`, 1, outbox.OutcomeExisting)
			h.Booked = []ledger.Commit{*h.Records[0].Commit, existing}
			h.Records = append(h.Records, ledger.Record{Commit: &existing})
		},
		"an_add_that_found_the_row_settled_meanwhile": func(h *ledger.History) {
			h.Records, h.Booked = found(h, add(130, "b", `"two"`, 1, outbox.OutcomeExisting))
		},
		"an_add_that_found_the_row_settled_when_it_was_run_again": func(h *ledger.History) {
			first := add(50, "b", `"two"`, 0, "")
			first.Result = ledger.RolledBack
			h.Records, h.Booked = found(h, add(500, "b", `"two"`, 1, outbox.OutcomeExisting))
			h.Records = append(h.Records, ledger.Record{Commit: first})
		},
		"an_add_that_found_the_row_settled_when_it_was_run_before": func(h *ledger.History) {
			h.Records, h.Booked = found(h, add(500, "b", `"two"`, 1, outbox.OutcomeExisting))
			h.Records = append(h.Records, ledger.Record{Commit: add(185, "b", `"two"`, 1, outbox.OutcomeExisting)})
			requeued(h)
		},
		"an_add_that_found_the_row_settled_and_never_told": func(h *ledger.History) {
			existing := add(50, "b", `"two"`, 1, outbox.OutcomeExisting)
			existing.Result, existing.To = ledger.Unknown, time.Time{}
			h.Records, h.Booked = found(h, existing)
		},
		"an_add_that_found_the_row_settled_of_which_nothing_was_noted": func(h *ledger.History) {
			existing := add(50, "b", `"two"`, 1, outbox.OutcomeExisting)
			h.Records, h.Booked = found(h, existing)
			h.Records = h.Records[:len(h.Records)-1]
		},
		"an_add_that_found_the_row_settled_just_before_it_was_requeued": func(h *ledger.History) {
			h.Records, h.Booked = found(h, add(185, "b", `"two"`, 1, outbox.OutcomeExisting))
			requeued(h)
		},
		"an_add_that_changed_the_recruiter_alone": func(h *ledger.History) {
			before, after := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 2, 0, 0, 0)
			after.Payload, after.Recruiter = before.Payload, 5.0
			h.Changes = append(h.Changes, change(90, before, after))
		},
		"a_refresh_of_a_lease_that_has_ended": func(h *ledger.History) {
			refreshed := row(outbox.StatusPending, 2, 0, 7, 80)
			refreshed.LeaseUntil = nil
			h.Changes = append(h.Changes, change(90, row(outbox.StatusPending, 1, 0, 7, 80), refreshed))
		},
		"a_settled_row_that_was_requeued": func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Requeue: &ledger.Requeue{Key: key, From: at(180), To: time.Time{}}})
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), row(outbox.StatusPending, 1, 0, 0, 0)))
		},
		"a_sent_row_that_was_purged": func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(180), To: at(200)}})
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), nil))
			h.Rows = nil
		},
		"a_failed_row_that_was_purged": func(h *ledger.History) {
			h.Records = append(h.Records[:1], ledger.Record{Purge: &ledger.Purge{Delete: true, From: at(180), To: at(200)}})
			failed := row(outbox.StatusFailed, 1, 0, 0, 0)
			failed.Error = "blocked"
			h.Changes = append(h.Changes[:1], change(120, row(outbox.StatusPending, 1, 0, 0, 0), failed), change(190, failed, nil))
			h.Rows = nil
		},
		"a_payload_that_was_purged": func(h *ledger.History) {
			h.Records = append(h.Records, ledger.Record{Purge: &ledger.Purge{From: at(180), To: at(200)}})
			after := row(outbox.StatusSent, 1, 1, 0, 0)
			after.Payload = nil
			h.Changes = append(h.Changes, change(190, row(outbox.StatusSent, 1, 1, 0, 0), after))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := recorded()
			changes(&h)
			require.Empty(t, ledger.Check(h).Violations)
		})
	}
}
