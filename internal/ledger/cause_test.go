package ledger_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/ledger"
)

// again is twice, with the changes of its row and all that its workers could note, and a
// fault that hit everybody: the lease of the first worker ended at 1,105 ms.
func again() ledger.History {
	h := history{twice()}.with(fault("", outbox.Key{}, 110, 2100)).History
	h.Watched = true
	pending, first, second := row(outbox.StatusPending, 1, 0, 0, 0), row(outbox.StatusPending, 1, 0, 1, 1105), row(outbox.StatusPending, 1, 0, 2, 3105)
	sent := row(outbox.StatusSent, 1, 1, 0, 0)
	sent.Receipt = "r2"
	h.Changes = []ledger.Change{change(5, nil, pending), change(105, pending, first), change(2105, first, second), change(2135, second, sent)}
	return h
}

// returned is again, where the first worker settled the row as not delivered.
func returned() ledger.History {
	h := again()
	pending := row(outbox.StatusPending, 1, 0, 0, 0)
	h.Changes[2].Before = pending
	h.Changes = append(h.Changes, change(135, h.Changes[1].After, pending))
	return h
}

// lateAgain is again, where the first worker sent after the end of its lease.
func lateAgain() ledger.History {
	h := again()
	h.Records[2].Accept.At, h.Records[2].Accept.Begun = at(1500), at(1490)
	return h
}

// lateAfterFailover is lateAgain, in what an asynchronous failover at that time has left.
func lateAfterFailover(caughtUp, promoted int) func() ledger.History {
	return func() ledger.History {
		h := lateAgain()
		h.Booked = []ledger.Commit{*h.Records[0].Commit}
		h, _ = h.Survived(ledger.Failover{CaughtUp: at(caughtUp), Promoted: at(promoted)})
		return h
	}
}

func trouble(text string, from, to int) ledger.Record {
	return ledger.Record{Trouble: &ledger.Trouble{Worker: "w1", Call: "settle", Text: text, From: at(from), To: at(to)}}
}

// underWay is a call that took long and has not ended.
func underWay(from int) ledger.Record {
	r := trouble("", from, 0)
	r.Trouble.To = time.Time{}
	return r
}

// hit is a fault of the first worker, or of one of its messages.
func hit(from, to int, change func(*ledger.Fault)) ledger.Record {
	r := fault("w1", outbox.Key{}, from, to)
	change(r.Fault)
	return r
}

func kills(f *ledger.Fault)   { f.Kills = true }
func halts(f *ledger.Fault)   { f.Halts = true }
func message(f *ledger.Fault) { f.Key, f.Message = key, true }

func TestCheck_blames_a_worker_that_nothing_kept_from_settling(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		history func() ledger.History
		records []ledger.Record
		blamed  string // "": the duplicate is allowed
	}{
		{"though_a_fault_hit_everybody", again, nil, "though nothing kept it from settling between 12:00:00.120000 and 12:00:01.105000"},
		{"though_a_fault_hit_its_connections", again, []ledger.Record{hit(110, 2000, func(*ledger.Fault) {})}, "nothing kept it"},
		{"unless_it_was_killed", again, []ledger.Record{hit(150, 150, kills)}, ""},
		{"though_it_was_killed_late", again, []ledger.Record{hit(700, 700, kills)}, "between 12:00:00.120000 and 12:00:00.700000"},
		{"unless_it_stood_still", again, []ledger.Record{hit(150, 1200, halts)}, ""},
		{"though_it_stood_still_for_a_moment", again, []ledger.Record{hit(150, 500, halts)}, "between 12:00:00.500000 and 12:00:01.105000"},
		{"unless_the_message_was_hit", again, []ledger.Record{hit(130, 200, message)}, ""},
		{"though_a_message_of_another_worker_was_hit", again, []ledger.Record{hit(130, 200, func(f *ledger.Fault) { message(f); f.Worker = "w3" })}, "nothing kept it"},
		{"unless_each_of_its_calls_failed", again, []ledger.Record{trouble("no answer", 130, 430), trouble("no answer", 500, 800)}, ""},
		{"unless_it_was_killed_in_a_call", again, []ledger.Record{underWay(130), hit(900, 900, kills)}, ""},
		{"though_a_call_was_under_way_and_it_was_not_killed", again, []ledger.Record{underWay(130)}, "nothing kept it"},
		{"though_a_call_took_long_that_ended", again, []ledger.Record{underWay(130), trouble("", 130, 330), hit(2000, 2000, kills)}, "between 12:00:00.380000 and 12:00:01.105000"},
		{"though_a_call_failed_and_none_was_made_again", again, []ledger.Record{trouble("no answer", 130, 430)}, "between 12:00:00.480000 and 12:00:01.105000"},
		{"though_calls_failed_in_any_order", again, []ledger.Record{trouble("no answer", 900, 1000), trouble("no answer", 130, 300)}, "between 12:00:00.350000 and 12:00:00.900000"},
		{"unless_its_pauses_grew_with_the_failures", again, []ledger.Record{
			trouble("refused", 130, 131), trouble("refused", 180, 181), trouble("refused", 280, 281), trouble("refused", 480, 481),
		}, ""},
		{"though_one_call_failed_early_and_one_late", again, []ledger.Record{trouble("refused", 130, 131), trouble("refused", 1000, 1001)}, "between 12:00:00.181000 and 12:00:01.000000"},
		{"if_it_did_not_renew_the_lease_before_it_sent", lateAgain, nil, "nothing kept it from renewing it between 12:00:00.105000 and 12:00:01.105000"},
		{"unless_it_could_not_renew_the_lease_before_it_sent", lateAgain, []ledger.Record{trouble("no answer", 500, 1100)}, ""},
		{"if_it_let_a_lease_end_that_it_had_renewed", func() ledger.History {
			h := again()
			renewed := row(outbox.StatusPending, 1, 0, 1, 1700)
			h.Changes[2].Before = renewed
			h.Changes = append(h.Changes, change(700, h.Changes[1].After, renewed))
			return h
		}, []ledger.Record{trouble("no answer", 130, 900)}, "let the lease of the first end at 12:00:01.700000"},
		{"if_an_add_saw_that_the_lease_had_ended", func() ledger.History {
			h := again()
			ended := row(outbox.StatusPending, 1, 0, 1, 0)
			ended.LeaseUntil = nil
			h.Changes[2].Before = ended
			h.Changes = append(h.Changes, change(1500, h.Changes[1].After, ended))
			return h
		}, []ledger.Record{hit(800, 800, message)}, "though nothing kept it from settling"},
		{"unless_a_call_was_slow", again, []ledger.Record{trouble("", 130, 1100)}, ""},
		{"though_a_call_was_somewhat_slow", again, []ledger.Record{trouble("", 550, 650)}, "nothing kept it"},
		{"if_it_settled_the_row_as_not_delivered", returned, nil, "settled the first as not delivered"},
		{"unless_it_did_as_the_message_was_hit", returned, []ledger.Record{hit(130, 130, message)}, ""},
		{"though_it_did_before_the_message_was_hit", returned, []ledger.Record{hit(136, 140, message)}, "settled the first as not delivered"},
		{"unless_it_had_settled_what_a_failover_lost", func() ledger.History {
			h := history{again()}.with(good().Records[3]).History
			h.Booked = []ledger.Commit{*h.Records[0].Commit}
			h, lost := h.Survived(ledger.Failover{Killed: at(200), Promoted: at(300)})
			if lost.Settles != 1 {
				panic("no settlement is lost")
			}
			return h
		}, nil, ""},
		{"unless_a_failover_may_have_lost_that_it_renewed_the_lease", lateAfterFailover(200, 800), nil, ""},
		{"if_it_did_not_renew_the_lease_after_a_failover", lateAfterFailover(200, 300), nil, "from renewing it between 12:00:00.300000 and 12:00:01.105000"},
		{"if_it_did_not_renew_the_lease_before_a_failover", lateAfterFailover(900, 1200), nil, "from renewing it between 12:00:00.105000 and 12:00:00.900000"},
		{"though_it_did_after_a_halt_before_the_send", returned, []ledger.Record{hit(50, 100, halts)}, "settled the first as not delivered"},
		{"though_calls_failed_that_were_well_in_between", again, []ledger.Record{
			trouble("refused", 130, 131), trouble("refused", 190, 191), trouble("refused", 450, 451),
		}, "between 12:00:00.501000 and 12:00:01.105000"},
		{"if_both_are_of_one_claim", func() ledger.History {
			h := again()
			h.Records[4].Accept.Worker, h.Records[4].Accept.Claimed = "w1", h.Records[2].Accept.Claimed
			return h
		}, []ledger.Record{hit(150, 150, kills)}, "by one claim of w1"},
		{"unless_the_record_of_changes_is_not_there", func() ledger.History {
			h := again()
			h.Changes = nil
			return h
		}, nil, ""},
		{"unless_it_notes_nothing", func() ledger.History {
			h := again()
			h.Watched = false
			return h
		}, nil, ""},
		{"unless_it_was_killed_and_sent_before_it_was_dead", func() ledger.History {
			return history{twice()}.with(hit(95, 95, kills)).History
		}, nil, ""},
		{"but_nobody_if_the_only_fault_began_after_the_claim", func() ledger.History {
			h := history{twice()}.with(fault("", outbox.Key{}, 2111, 2111)).History
			h.Records[4].Accept.Begun = at(2115)
			return h
		}, nil, "and nothing happened to w1"},
		{"but_nobody_if_it_was_killed_after_the_claim", twice, []ledger.Record{hit(2111, 2111, kills)}, "and nothing happened to w1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			v := ledger.Check(history{tc.history()}.with(tc.records...).History)
			if tc.blamed == "" {
				require.Empty(t, v.Violations)
				require.Equal(t, 1, v.DuplicatesAllowed)
				return
			}
			require.Len(t, v.Violations, 1)
			require.Equal(t, ledger.Duplicate, v.Violations[0].Kind)
			require.Contains(t, v.Violations[0].Text, tc.blamed)
		})
	}
}
