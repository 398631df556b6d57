package outbox

import "time"

// A probe that fails is a matter of package relay's tests. Here each is to arrive.
func init() { probeTime = 30 * time.Second }

// What the tests in package outbox_test see of the inside.

// CheckPayload is what an add does to a payload given as raw JSON.
func CheckPayload(b []byte) error {
	s := jsonScanner{b: b}
	return s.document()
}

// MaybeNotJSONBSQL is the guard in front of the cast of a stored payload_json.
const MaybeNotJSONBSQL = maybeNotJSONBSQL

// Guesses are what a store may expect of the next add.
const Guesses = founds

// AlwaysGuess has adds expect one outcome, whatever those before them found. The
// guess 0 is none.
func (s *PGStore) AlwaysGuess(guess int) {
	for i := range s.sql.guess {
		s.sql.guess[i], s.sql.guessMany[i] = s.sql.guess[guess], s.sql.guessMany[guess]
	}
}

// GuessSQL is the statement that a guess has adds of the key begin with.
func (s *PGStore) GuessSQL(guess int, k Key) string { return s.sql.guess[guess][k.shape()] }

// AddSQL, AddManySQL and NewManySQL are the statements for a key with the parts that k has.
func (s *PGStore) AddSQL(k Key) string     { return s.sql.add[k.shape()] }
func (s *PGStore) AddManySQL(k Key) string { return s.sql.addMany[k.shape()] }
func (s *PGStore) NewManySQL(k Key) string { return s.sql.guessMany[foundNone][k.shape()] }

// ClaimSQL, ExtendSQL and SettleSQL are the statements of delivery.
func (s *PGStore) ClaimSQL() string  { return s.sql.claim }
func (s *PGStore) ExtendSQL() string { return s.sql.extend }
func (s *PGStore) SettleSQL() string { return s.sql.settle }
func (s *PGStore) ClaimLock() string { return s.claimLock(nil) }

// The statements of the operator's side.
func (s *PGStore) RequeueSQL(k Key) string            { return s.sql.requeue[k.shape()] }
func (s *PGStore) RequeueMatchingSQL(f Filter) string { return s.requeueMatchingSQL(f) }
func (s *PGStore) ListSQL(f Filter) string            { return s.listSQL(f) }
func (s *PGStore) PurgeSQL(o PurgeOptions) string     { return s.purgeSQL(o) }
func (s *PGStore) DepthSQL() string                   { return s.fill(depthSQL) }
