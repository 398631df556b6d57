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
	last time.Time     // when the last row that was claimed fell due; zero: not known
	slow time.Duration // what the last whole claim took; 0: it was quick
	at   time.Time     // when that ended
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
	if h.slow == 0 || h.last.IsZero() || time.Since(h.at) >= min(wholeShare*h.slow, wholeLeast) {
		return time.Time{}
	}
	return h.last.Add(-overlap)
}

// claimed takes note of a claim from since that took so long and found so many rows, all
// that it was to find if full, the last of which fell due at last.
func (h *horizon) claimed(since time.Time, took time.Duration, found int, full bool, last time.Time) {
	if since.IsZero() {
		h.slow, h.at = took, time.Now()
		if took < quickClaim+time.Duration(found)*quickRow {
			h.slow = 0
		}
	}
	if full || last.After(h.last) { // what is behind a full claim has been claimed, but nothing else
		h.last = last
	}
}
