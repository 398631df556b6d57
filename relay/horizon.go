package relay

import "time"

// horizon keeps claims from walking through the index's dead entries of rows that were
// delivered before. While a transaction is held open anywhere in the cluster, nothing can
// remove those, and each claim that looks for due rows from the beginning passes over all
// of them. Once that takes long, claims begin a little before the last row that was claimed.
//
// Rows can fall due behind it: requeued, refreshed or handed back ones, those whose
// lease has ended or whose caller was long about its commit, those that were locked. So a
// whole claim, from the beginning, is made again and again: after wholeShare times what
// the last one took, a minute at most.
//
// The times are those of the database's clock. It belongs to one goroutine.
type horizon struct {
	last  time.Time     // when the last row that was claimed fell due; zero: not known
	slow  int           // whole claims running that were slow; one may have been an accident
	took  time.Duration // by the last of them
	lost  int           // whole claims running that had no answer
	every time.Duration // how long after a whole claim the next one is made
	at    time.Time     // when the last whole claim ended
}

const (
	wholeShare = 20              // whole claims take up to a twentieth of the time
	wholeLeast = time.Minute     // at least so often, however long they take
	overlap    = 2 * time.Second // a row falls due when its transaction begins, and is seen when that commits
	quickClaim = 10 * time.Millisecond
	quickRow   = 50 * time.Microsecond // for each row found
)

// since is from where to claim; zero: from the beginning.
func (h *horizon) since() time.Time {
	if h.slow < 2 || h.last.IsZero() || time.Since(h.at) >= h.every {
		return time.Time{}
	}
	return h.last.Add(-overlap)
}

// claimed takes note of a claim from since that took so long and found so many rows, all
// that it was to find if full, the last of which fell due at last.
func (h *horizon) claimed(since time.Time, took time.Duration, found int, full bool, last time.Time) {
	if since.IsZero() {
		h.at, h.lost = time.Now(), 0
		if took < quickClaim+time.Duration(found)*quickRow {
			h.slow, h.took = 0, 0
		} else {
			h.slowClaim(took)
		}
	}
	if full || last.After(h.last) { // what is behind a full claim has been claimed, but nothing else
		h.last = last
	}
}

// slowClaim takes note of a whole claim that took, or was given, so long.
func (h *horizon) slowClaim(took time.Duration) {
	// The lesser of two, so that one accident does not put off the next for long.
	h.every = min(wholeShare*took, wholeLeast)
	if h.slow > 0 {
		h.every = min(wholeShare*h.took, h.every)
	}
	h.slow, h.took = h.slow+1, took
}

// timedOut takes note of a whole claim that had no answer in that time, and reports whether
// to go on without one. The first may have been an accident: it is to be repeated, as
// what it leased after all would cost an attempt.
func (h *horizon) timedOut(after time.Duration) bool {
	h.slowClaim(after)
	h.at = time.Now()
	h.lost++
	return h.lost > 1 && !h.since().IsZero()
}
