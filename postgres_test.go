package outbox_test

import (
	"flag"
	"log/slog"
	"os"
	"strconv"
	"testing"

	"github.com/seed3357934d/outbox/internal/pgtest"
)

// What the flags of rapid are where the command line does not say otherwise: few checks, as
// every run has others but in CI, and no files of failures, as a failure tells its seed.
func TestMain(m *testing.M) {
	flags := map[string]string{"rapid.checks": "20", "rapid.nofailfile": "true"}
	if os.Getenv("CI") != "" {
		flags["rapid.seed"] = "1"
	}
	for name, value := range flags {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	pgtest.Main(m)
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
