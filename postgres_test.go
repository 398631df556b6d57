package outbox_test

import (
	"flag"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/seed3357934d/outbox/internal/pgtest"
)

// seedGiven: -rapid.seed was.
var seedGiven bool

func TestMain(m *testing.M) {
	flag.Parse()
	// A failure tells its seed.
	if err := flag.Set("rapid.nofailfile", "true"); err != nil {
		panic(err)
	}
	seedGiven = flag.Lookup("rapid.seed").Value.String() != "0"
	checks, given := os.Getenv("OUTBOX_TEST_CHECKS"), flag.Lookup("rapid.checks")
	if checks != "" && given.Value.String() == given.DefValue { // -rapid.checks would fail in packages without it
		if err := flag.Set("rapid.checks", checks); err != nil {
			panic(err)
		}
	}
	pgtest.Main(m)
}

// seeding is held while the flag of the seed is set for one check.
var seeding sync.Mutex

// check is rapid.Check, which does 100 checks, or as many as -rapid.checks or
// OUTBOX_TEST_CHECKS says. In CI they are always the same, and begin with a seed of the
// test's own; else they are others in every run. -rapid.seed goes before both. Rapid has
// one flag for all tests of the process, and has read it when it first calls prop.
func check(t *testing.T, seed uint64, prop func(*rapid.T)) {
	if os.Getenv("CI") == "" || seedGiven {
		rapid.Check(t, prop)
		return
	}
	seeding.Lock()
	begun := sync.OnceFunc(seeding.Unlock)
	defer begun()
	require.NoError(t, flag.Set("rapid.seed", strconv.FormatUint(seed, 10)))
	rapid.Check(t, func(t *rapid.T) {
		begun()
		prop(t)
	})
}

var discard = slog.New(slog.DiscardHandler)

// lease does by hand what a claim does to the row: a token, an end, an attempt.
func lease(t testing.TB, db *pgtest.DB, id int64, until string) {
	t.Helper()
	db.MustExec(t, `UPDATE outbox_notifications SET attempts = attempts + 1, locked_at = now(),
		lease_token = gen_random_uuid(), lease_until = now() + $2::text::interval WHERE id = $1`, id, until)
}

// leaseOf returns the row's token, "" for none, and when it ends.
func leaseOf(t testing.TB, db *pgtest.DB, id int64) string {
	t.Helper()
	return pgtest.One[string](t, db, `SELECT coalesce(lease_token::text || ' until ' || lease_until, '')
		FROM outbox_notifications WHERE id = $1`, id)
}

func itoa(n int) string { return strconv.Itoa(n) }
