package main

import (
	"bytes"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/ledger"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(roleVariable); spec != "" {
		os.Exit(runChild(spec))
	}
	os.Exit(m.Run())
}

// Mutations tried, with -seed 3, and what the rig made of each, within two rounds:
//
//	settle without the token check                lost: sent by a receipt that was never given for that version
//	settle without the version check              lost: "version 2 was sent, and version 3 counts as sent with it"
//	settle of the first of a batch alone          duplicates that had been settled before; stale settles passed
//	a refresh clears the lease                    leases not respected, older content sent, duplicates
//	a claim ignores leases                        duplicates, leases not respected
//	AtMostOnce claims an unknown outcome again    duplicates, at most once
//	no ON CONFLICT in an add                      23505
//	a repeated add always makes a new version     duplicates: "an add that changed nothing made a new version"
//	an add to a row in flight finds it settled    lost: "found version 1 settled, which it was at no time"
//	out of attempts after three                   lost: "failed after 3 attempts, of 25"
//	an error that can be tried again is for good  lost: "failed after 1 attempts, of -1, for what was to be tried again"
//	rows expire an hour early                     lost: "failed as expired, and was not"
//	a claim an hour before the row is due         other violations: "a row was claimed that was not due"
//	a repeat takes the attempts of a delivery     leases not respected: "a refresh changed the attempts"
//	a repeat that changes nothing ends the lease  leases not respected
//	results dropped of rows that a caller holds   duplicates: "though nothing kept it from settling"
//	a repeated claim leases rows that it had      leases not respected: "leased a second time by one token"
//
// One it does not see, as the failing call explains each duplicate that it causes:
//
//	results dropped on a settle error             TestServerFaults of package relay
//
// What else relays may do wrong is tried by [TestRun_finds_a_relay].

// TestRun is a short slice of what make chaos does, by a fixed seed. It is not parallel
// to the test of failovers: both need the machine.
func TestRun_finds_nothing_lost_and_nothing_twice(t *testing.T) {
	var out bytes.Buffer
	// By this seed, something happens to the server within 2 s in each of the rounds.
	opts := options{seed: 184, dir: t.TempDir(), length: 8 * time.Second, report: newReport()}
	ok, err := run(t.Context(), opts, limits{rounds: 4}, &out)
	t.Log(out.String())
	require.NoError(t, err)
	require.True(t, ok)
	adds, accepted := 0, 0
	for _, s := range opts.report.modes {
		adds, accepted = adds+s.total.Adds, accepted+s.total.Accepted
	}
	// Well below what a busy machine does.
	require.Equal(t, 4, opts.report.rounds)
	require.GreaterOrEqual(t, adds, 300)
	require.GreaterOrEqual(t, accepted, 150)
	require.GreaterOrEqual(t, len(opts.report.faults), 20, "kinds")
	require.GreaterOrEqual(t, opts.report.injected(), 60)
	// One of each sort.
	for _, sort := range []string{"kill -9 of a worker", "kill -9 of a booker", "SIGSTOP of a", "server ", " for a worker", "provider ", "COMMIT"} {
		require.True(t, slices.ContainsFunc(slices.Collect(maps.Keys(opts.report.faults)), func(k string) bool { return strings.Contains(k, sort) }), sort)
	}
}

func TestIdle_has_a_round_fail_that_did_nothing(t *testing.T) {
	t.Parallel()
	fault := ledger.Record{Fault: &ledger.Fault{Kind: "kill"}}
	stall := ledger.Record{Fault: &ledger.Fault{Kind: "stall", Observed: true}}
	busy := func() result {
		return result{verdict: ledger.Verdict{Adds: 1, Accepted: 1}, history: ledger.History{Records: []ledger.Record{fault}}}
	}
	require.NoError(t, busy().idle())
	for name, change := range map[string]func(*result){
		"nothing was added":                 func(res *result) { res.verdict.Adds = 0 },
		"the provider accepted nothing":     func(res *result) { res.verdict.Accepted = 0 },
		"no fault was injected":             func(res *result) { res.history.Records[0] = stall },
		"the new primary delivered nothing": func(res *result) { res.failover = &failover{} },
	} {
		res := busy()
		change(&res)
		require.EqualError(t, res.idle(), name)
	}
}

func TestMissing(t *testing.T) {
	t.Parallel()
	rep := newReport()
	require.Equal(t, named, rep.missing())
	for _, k := range named[1:] {
		rep.faults[k] = 1
	}
	require.Equal(t, named[:1], rep.missing())
}

func TestDrawPlan_is_the_same_for_the_same_seed(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"worker", "booker"} {
		for n := range 100 {
			rng := func() *round {
				r := &round{number: n}
				r.draw(newRand(7, n))
				return r
			}
			require.Equal(t, rng().spec, rng().spec)
			require.Equal(t, drawPlan(role, time.Second, newRand(7, n)), drawPlan(role, time.Second, newRand(7, n)))
		}
	}
}

func TestSameClock(t *testing.T) {
	t.Parallel()
	before := time.Date(2026, 1, 1, 0, 0, 0, 1_700, time.UTC)
	after := before.Add(time.Millisecond)
	for _, there := range []time.Time{before.Truncate(time.Microsecond), before, after} {
		require.NoError(t, sameClock(before, there, after))
	}
	require.ErrorContains(t, sameClock(before, before.Add(-time.Second), after), "clock is -1s off ours")
	require.ErrorContains(t, sameClock(before, after.Add(time.Second), after), "clock is 1s off ours")
}

func TestLimited_leaves_behind_what_does_not_return(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		defer close(stuck)
		require.EqualError(t, limited("removing a toxic", func() error {
			<-stuck
			return nil
		}), "removing a toxic: toxiproxy has not returned within 10s")
		require.NoError(t, limited("it", func() error { return nil }))
		require.ErrorIs(t, limited("it", func() error { return errNothingBroken }), errNothingBroken)
	})
}

func TestMannerOf_spreads_well(t *testing.T) {
	t.Parallel()
	seen := make(map[manner]int)
	const sends = 10_000
	for n := range sends {
		seen[mannerOf(1, ledger.Accept{ID: int64(n), Version: int64(n)})]++
	}
	require.InDelta(t, sends*3/4, seen[well], sends/20)
	for _, m := range manners {
		require.InDelta(t, sends/4/len(manners), seen[m], sends/30, "%s", m)
	}
}
