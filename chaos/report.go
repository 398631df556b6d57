package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/seed3357934d/outbox/internal/ledger"
)

// report sums up rounds.
type report struct {
	faults   map[string]int // injected, by kind
	observed map[string]int // and not injected, by kind
	modes    map[string]*sum
	rounds   int

	failovers []*failover
}

// sum is of all rounds of one mode.
type sum struct {
	rounds, injected int
	requeues, purges int
	total            ledger.Verdict
}

func newReport() *report {
	return &report{faults: make(map[string]int), observed: make(map[string]int), modes: make(map[string]*sum)}
}

func (rep *report) add(res result) {
	s := rep.modes[res.mode]
	if s == nil {
		s = &sum{}
		rep.modes[res.mode] = s
	}
	rep.rounds++
	s.rounds++
	if res.failover != nil {
		rep.failovers = append(rep.failovers, res.failover)
	}
	for _, r := range res.history.Records {
		switch {
		case r.Requeue != nil:
			s.requeues++
		case r.Purge != nil:
			s.purges++
		case r.Fault == nil:
		case r.Fault.Observed:
			rep.observed[r.Fault.Kind]++
		default:
			rep.faults[r.Fault.Kind]++
			s.injected++
		}
	}
	v, t := res.verdict, &s.total
	t.Adds += v.Adds
	t.Accepted += v.Accepted
	t.Sent += v.Sent
	t.Failed += v.Failed
	t.DuplicatesAllowed += v.DuplicatesAllowed
	t.DuplicatesStalled += v.DuplicatesStalled
	t.DuplicatesOnPurpose += v.DuplicatesOnPurpose
	t.StaleRefused += v.StaleRefused
	t.RequeuesAnswered += v.RequeuesAnswered
	t.Violations = append(t.Violations, v.Violations...)
}

func (rep *report) injected() int {
	n := 0
	for _, s := range rep.modes {
		n += s.injected
	}
	return n
}

// named are the kinds without which a long run has not shown what it is to show.
var named = []string{
	"kill -9 of a worker", "kill -9 of a worker after claim", "kill -9 of a worker before send", "kill -9 of a worker after accept",
	"kill -9 of a worker before settle", "kill -9 of a worker after settle", "kill -9 of a worker after renew",
	"kill -9 of a worker with a claim written", "kill -9 of a worker with a settle half written", "kill -9 of a worker with a settle written",
	"kill -9 of a worker with a settle answered", "kill -9 of a worker with a renewal written",
	"SIGSTOP of a worker", "SIGSTOP of a worker after accept", "SIGSTOP of a worker before settle",
	"kill -9 of a booker", "kill -9 of a booker with COMMIT written", string(cutWritten), string(cutAnswered), string(holdsRows), string(idles),
	serverKilled, "server process of a session killed with -9", "server restarted", "server frozen",
	"pg_terminate_backend storm", "pg_cancel_backend storm", "too many connections", "pool exhausted",
	"half-open, requests lost for a worker", "half-open, answers lost for a worker", "latency for a worker", "connection reset for a worker",
	"cut in the middle of a message for a worker", "row locked past the lease", "table locked", "provider down",
	string(panics), string(panicsAfter), string(exits), string(ignoresCtx), string(fails), string(refuses), string(hangs), string(acceptsHangs), string(cutsAfter),
}

// longRun is from how many faults on each of the named kinds has to be among them.
const longRun = 10_000

func (rep *report) missing() []string {
	return slices.DeleteFunc(slices.Clone(named), func(k string) bool { return rep.faults[k] > 0 })
}

// print prints the tables, in Markdown.
func (rep *report) print(out io.Writer, seed uint64, took time.Duration) {
	fmt.Fprintf(out, "\nSeed %d, %d rounds, %v: %d faults of %d kinds injected.\n\n", seed, rep.rounds, took.Round(time.Second), rep.injected(), len(rep.faults))
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	table := func(title, count string, of map[string]int) {
		fmt.Fprintf(w, "| %s\t| %s\t|\n| ---\t| ---\t|\n", title, count)
		all := 0
		for _, k := range slices.SortedFunc(maps.Keys(of), func(a, b string) int { return cmp.Or(of[b]-of[a], cmp.Compare(a, b)) }) {
			fmt.Fprintf(w, "| %s\t| %d\t|\n", k, of[k])
			all += of[k]
		}
		fmt.Fprintf(w, "| all\t| %d\t|\n\n", all)
		_ = w.Flush() // as all of fmt.Fprint
	}
	table("fault", "injected", rep.faults)
	table("what else befell them", "seen", rep.observed)

	modes := slices.Sorted(maps.Keys(rep.modes))
	fmt.Fprint(w, "| \t")
	for _, m := range modes {
		fmt.Fprintf(w, "| %s\t", m)
	}
	fmt.Fprintln(w, "|")
	for range len(modes) + 1 {
		fmt.Fprint(w, "| ---\t")
	}
	fmt.Fprintln(w, "|")
	count := func(k ledger.Kind) func(*sum) int { return func(s *sum) int { return s.total.Count(k) } }
	for _, line := range []struct {
		name string
		of   func(*sum) int
	}{
		{"rounds", func(s *sum) int { return s.rounds }},
		{"faults injected", func(s *sum) int { return s.injected }},
		{"adds committed", func(s *sum) int { return s.total.Adds }},
		{"messages accepted", func(s *sum) int { return s.total.Accepted }},
		{"requeues by an operator", func(s *sum) int { return s.requeues }},
		{"purges by an operator", func(s *sum) int { return s.purges }},
		{"rows sent in the end", func(s *sum) int { return s.total.Sent }},
		{"rows failed with a reason", func(s *sum) int { return s.total.Failed }},
		{"lost", count(ledger.Lost)},
		{"duplicates allowed", func(s *sum) int { return s.total.DuplicatesAllowed }},
		{"of these, by what was not injected", func(s *sum) int { return s.total.DuplicatesStalled }},
		{"duplicates not allowed", count(ledger.Duplicate)},
		{"duplicates on purpose", func(s *sum) int { return s.total.DuplicatesOnPurpose }},
		{"requeues that a Reconciler answered", func(s *sum) int { return s.total.RequeuesAnswered }},
		{"stale settles refused", func(s *sum) int { return s.total.StaleRefused }},
		{"stale settles that passed", count(ledger.StalePassed)},
		{"rolled-back adds sent", count(ledger.RolledBackSent)},
		{"keys with two rows", count(ledger.TwoRows)},
		{"older content sent", count(ledger.OlderContent)},
		{"leases not respected", count(ledger.LeaseBroken)},
		{"23505 or 25P02", count(ledger.BrokenAdd)},
		{"other violations", count(ledger.Impossible)},
	} {
		fmt.Fprintf(w, "| %s\t", line.name)
		for _, m := range modes {
			fmt.Fprintf(w, "| %d\t", line.of(rep.modes[m]))
		}
		fmt.Fprintln(w, "|")
	}
	_ = w.Flush()
	printFailovers(out, rep.failovers)
}

// printViolations prints each violation with the whole history of its key.
func printViolations(out io.Writer, res result, most int) {
	for i, v := range res.verdict.Violations {
		if i == most {
			fmt.Fprintf(out, "... and %d more\n", len(res.verdict.Violations)-most)
			return
		}
		fmt.Fprintf(out, "VIOLATION in round %d (%s): %s\n", res.number, res.mode, v)
		for _, line := range res.history.Of(v.Key, v.ID) {
			fmt.Fprintln(out, "   ", line)
		}
	}
}
