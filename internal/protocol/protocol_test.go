package protocol

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var full = flag.Bool("full", false, "explore up to 5 million states, not a quarter of a million: two minutes or more, and 4 GB")

// TestProtocol explores every interleaving. None breaks an invariant, and from every
// state there is a way to where nothing is left to do.
func TestProtocol(t *testing.T) {
	t.Parallel()
	bounds := []bound{{addsOfA: 1, addsOfB: 1, faults: 2, requeues: 1}}
	if *full {
		bounds = []bound{
			{addsOfA: 1, addsOfB: 1, faults: 3, requeues: 1},
			{addsOfA: 2, addsOfB: 0, faults: 3, requeues: 1},
			{addsOfA: 2, addsOfB: 1, faults: 2, requeues: 0},
			{addsOfA: 2, addsOfB: 2, faults: 1, requeues: 1},
			{addsOfA: 2, addsOfB: 2, faults: 2, requeues: 1},
		}
	}
	for name, rules := range map[string]Rules{"at_least_once": {}, "at_most_once": {AtMostOnce: true}} {
		for _, b := range bounds {
			t.Run(fmt.Sprintf("%s/%d_and_%d_adds_%d_faults_%d_requeues", name, b.addsOfA, b.addsOfB, b.faults, b.requeues), func(t *testing.T) {
				got := explore(rules, start(b))
				require.Empty(t, got.wrong, strings.Join(got.trace, "\n"))
				require.Greater(t, got.states, 10_000, "little was explored")
				t.Logf("%d states, %d steps", got.states, got.steps)
			})
		}
	}
}

// TestMutations leaves out one rule after the other. Each has a shortest way to harm.
func TestMutations(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		rules Rules
		bound bound
		wrong string
		trace string
	}{
		"no_token": {Rules{NoToken: true}, bound{addsOfA: 2, faults: 2}, "4: a stale token changed the row", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: hand back, and not know it
			worker 1: settle a lease that is over
		`},
		"renewed_by_any_token": {Rules{RenewByAnyToken: true}, bound{addsOfA: 1, faults: 1}, "4: a stale token changed the row", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: hand back, and not know it
			worker 1: renew the lease
		`},
		"unknown_outcomes_keep_the_token": {Rules{UnknownKeepsToken: true}, bound{addsOfA: 1, faults: 2}, "4: a stale token changed the row", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: has no answer
			worker 1: settle unknown, and not know it
			worker 1: settle a lease that is over
		`},
		"no_version": {Rules{NoVersion: true}, bound{addsOfA: 2}, "1: marked sent, and its content never was", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
		`},
		"sent_version_of_the_settle": {Rules{SentVersionOfNow: true}, bound{addsOfA: 2}, "1: a version counts as sent that never was", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
		`},
		"settle_writes_the_row_as_it_was_claimed": {Rules{SupersededForgets: true}, bound{addsOfA: 2}, "1: committed content is lost", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
		`},
		"lease_cleared_by_refresh": {Rules{RefreshClearsLease: true}, bound{addsOfA: 2}, "one delivery at a time: claimed while another's lease holds", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 1 finds the row
			caller A: commit
			worker 2: claim
		`},
		"lease_cleared_by_new_content": {Rules{RefreshClearsLeaseOfChanged: true}, bound{addsOfA: 2}, "one delivery at a time: claimed while another's lease holds", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 2: claim
		`},
		"token_changed_by_refresh": {Rules{RefreshChangesToken: true}, bound{addsOfA: 2}, "4: a result is refused, and the row is nobody else's", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 1 finds the row
			caller A: commit
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
		`},
		"claims_mind_no_lease": {Rules{ClaimIgnoresLease: true}, bound{addsOfA: 1}, "one delivery at a time: claimed while another's lease holds", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 2: claim
		`},
		"claims_leave_expired_leases": {Rules{ClaimLeavesExpired: true}, bound{addsOfA: 1, faults: 1}, "1: it can never be delivered nor given up", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: die
		`},
		"adds_lock_no_row": {Rules{NoForUpdate: true}, bound{addsOfA: 2}, "one delivery at a time: claimed while another's lease holds", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			caller A: add 1 finds the row
			worker 1: claim
			caller A: commit
			worker 2: claim
		`},
		"no_ON_CONFLICT": {Rules{NoOnConflict: true}, bound{addsOfA: 1, addsOfB: 1}, "7: a unique violation in a booking", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller B: add 1 finds no row
			caller A: commit
			caller B: insert 1
		`},
		"adds_look_for_pending_rows_only": {Rules{FindPendingOnly: true}, bound{addsOfA: 2}, "7: a unique violation in a booking", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
			caller A: add 1 finds no row
			caller A: insert 1
		`},
		"adds_set_any_row_back_to_pending": {Rules{ReviveSettled: true}, bound{addsOfA: 2}, "5: accepted twice", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: accepted
			worker 1: settle delivered
			caller A: add 1 finds the row
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: accepted
		`},
		"attempts_of_replaced_content_count": {Rules{AttemptsOfOldStay: true}, bound{addsOfA: 2, faults: 2}, "1: failed, and its content was never tried", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: die
			the lease of a dead worker ends
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 1 is frozen: its lease ends
			worker 2: claim
		`},
		"attempts_reset_in_flight": {Rules{AttemptsResetInFlight: true}, bound{addsOfA: 2, faults: 2}, "attempts: claimed more often than there are", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 1 finds the row
			caller A: commit
			worker 1: die
			the lease of a dead worker ends
			worker 1: claim
			worker 1 is frozen: its lease ends
			worker 2: claim
		`},
		"attempts_counted_at_the_settle": {Rules{CountedAtSettle: true}, bound{addsOfA: 1, faults: 2}, "attempts: claimed more often than there are", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: die
			the lease of a dead worker ends
			worker 1: claim
			worker 1 is frozen: its lease ends
			worker 2: claim
		`},
		"ends_that_are_no_attempts": {Rules{EndedIsNoAttempt: true}, bound{addsOfA: 2, faults: 1}, "a settle is wrong about whether there is newer content", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: refused for now
			worker 1 is frozen: its lease ends
			caller A: add 1 finds the row
			caller A: commit
			worker 1: settle retry
		`},
		"at_most_once_retries_what_left_no_result": {Rules{AtMostOnce: true, ExpiredIsRetried: true}, bound{addsOfA: 1, faults: 1}, "5: accepted twice", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			worker 1: send version 1
			worker 1: accepted
			worker 1 is frozen: its lease ends
			worker 2: claim
			worker 2: send version 1
			worker 2: accepted
		`},
		"a_requeue_takes_pending_rows": {Rules{RequeuePending: true}, bound{addsOfA: 1, requeues: 1}, "one delivery at a time: claimed while another's lease holds", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			requeue
			worker 2: claim
		`},
		"new_content_under_the_old_version": {Rules{RefreshKeepsVersion: true}, bound{addsOfA: 2}, "2, 6: what was sent is not the committed content of its version", `
			caller A: add 1 finds no row
			caller A: insert 1
			caller A: commit
			worker 1: claim
			caller A: add 2 finds the row
			caller A: commit
			worker 1: send version 1
			worker 1: accepted
		`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := explore(c.rules, start(c.bound))
			require.Equal(t, c.wrong, got.wrong)
			require.Equal(t, strings.ReplaceAll(strings.TrimSpace(c.trace), "\t", ""), strings.Join(got.trace, "\n"))
		})
	}
}

// explored is what came of following every step from every state.
type explored struct {
	states, steps int
	wrong         string   // the invariant broken, by the shortest way there is
	trace         []string // that way
}

// explore follows every step from every state that can be reached, nearest first, until an
// invariant is broken.
func explore(r Rules, from state) explored {
	type arrival struct {
		state  state
		parent int
		step   string
	}
	index := map[state]int{from: 0}
	all := []arrival{{state: from, parent: -1}}
	back := [][]int32{nil} // by state, those that lead to it
	steps := 0
	trace := func(i int) (names []string) {
		for ; all[i].parent >= 0; i = all[i].parent {
			names = append([]string{all[i].step}, names...)
		}
		return names
	}
	for i := 0; i < len(all); i++ {
		if wrong := all[i].state.check(); wrong != "" {
			return explored{len(all), steps, wrong, trace(i)}
		}
		for _, next := range r.steps(all[i].state) {
			steps++
			j, known := index[next.to]
			if !known {
				j = len(all)
				index[next.to] = j
				all = append(all, arrival{next.to, i, next.name})
				back = append(back, nil)
			}
			back[j] = append(back[j], int32(i))
		}
	}
	// From everywhere there is a way to where all is done.
	ends := make([]bool, len(all))
	var queue []int32
	for i := range all {
		if all[i].state.done() {
			ends[i] = true
			queue = append(queue, int32(i))
		}
	}
	for len(queue) > 0 {
		i := queue[0]
		queue = queue[1:]
		for _, j := range back[i] {
			if !ends[j] {
				ends[j] = true
				queue = append(queue, j)
			}
		}
	}
	for i := range all {
		if !ends[i] {
			return explored{len(all), steps, "1: it can never be delivered nor given up", trace(i)}
		}
	}
	return explored{states: len(all), steps: steps}
}
