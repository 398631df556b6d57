package outbox_test

import (
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// What tests read is docs/roles.md itself. Mutations tried, and what each turns red:
//
//	a right left out of a block of the docs     TestRoles/...
//	a right too many in a block                 TestRoles/..., "is not needed", or as the role may do more
//	42501 not taken for ErrSetup                TestRowSecurity
//	maxLookups without a bound                  TestRowSecurity/an_invisible_row... (does not end)

// documentedGrants returns the blocks of SQL under a heading of docs/roles.md, with
// the name of the role put in.
func documentedGrants(t testing.TB, heading, role string) (blocks []string) {
	t.Helper()
	doc, err := os.ReadFile("docs/roles.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(doc), "\n## "+heading+"\n")
	require.True(t, found, heading)
	section, _, _ = strings.Cut(section, "\n## ")
	named := "outbox_" + strings.ToLower(heading)
	for _, m := range regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(section, -1) {
		require.Contains(t, m[1], named)
		blocks = append(blocks, strings.ReplaceAll(m[1], "TO "+named+";", "TO "+role+";"))
	}
	require.NotEmpty(t, blocks)
	return blocks
}

var grantForm = regexp.MustCompile(`^GRANT ([A-Z, ]+) ON (.*) TO (\w+);$`)

// right is one privilege of a GRANT.
type right struct{ privilege, object, role string }

func (r right) grant() string {
	return "GRANT " + r.privilege + " ON " + r.object + " TO " + r.role + ";"
}

func (r right) revoke() string {
	return "REVOKE " + r.privilege + " ON " + r.object + " FROM " + r.role + ";"
}

// rightsOf takes a block of grants apart.
func rightsOf(t testing.TB, block string) (rights []right) {
	t.Helper()
	for line := range strings.Lines(block) {
		m := grantForm.FindStringSubmatch(strings.TrimSpace(line))
		require.NotNil(t, m, "not a GRANT: %s", line)
		for privilege := range strings.SplitSeq(m[1], ", ") {
			rights = append(rights, right{privilege, m[2], m[3]})
		}
	}
	return rights
}

// roleActions are what roles are for. Each works on the key of its name, which is
// there and pending, or in another state where it says so.
var roleActions = map[string]func(ctx context.Context, db *pgtest.DB, own *outbox.PGStore, pool *pgxpool.Pool) error{
	"add": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, pool *pgxpool.Pool) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			for _, n := range []outbox.NewNotification{{Type: pgtest.Name("new")}, {Type: "add", CorrelationID: pgtest.Name("c")}, {Type: "sent"}} {
				if _, err := own.AddNotification(ctx, tx, n); err != nil {
					return err
				}
			}
			_, err := own.AddNotifications(ctx, tx, []outbox.NewNotification{
				{Type: pgtest.Name("new")}, {Type: "add", CorrelationID: pgtest.Name("c")}, {Type: "sent"}})
			return err
		})
	},
	"deliver": func(ctx context.Context, db *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		if _, err := db.TryAdd(ctx, outbox.NewNotification{Type: "deliver"}); err != nil {
			return err
		}
		res, err := own.Claim(ctx, outbox.ClaimOptions{Limit: 1, Lease: time.Hour, Types: []string{"deliver"}})
		if err != nil {
			return err
		}
		lease := outbox.Lease{ID: 1}
		if len(res.Claimed) > 0 {
			lease = res.Claimed[0].Lease
		}
		if _, err := own.Extend(ctx, []outbox.Lease{lease}, time.Hour); err != nil {
			return err
		}
		_, err = own.Settle(ctx, []outbox.Settlement{{Lease: lease, Verdict: outbox.HandedBack}})
		return err
	},
	"read": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		if _, err := own.Get(ctx, outbox.Key{Type: "sent"}); err != nil {
			return err
		}
		if _, err := own.List(ctx, outbox.Filter{}); err != nil {
			return err
		}
		_, err := own.Stats(ctx)
		return err
	},
	"requeue": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		if _, err := own.RequeueMatching(ctx, outbox.Filter{Status: outbox.StatusFailed}); err != nil {
			return err
		}
		_, err := own.Requeue(ctx, outbox.Key{Type: "failed"})
		return err
	},
	"purge": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		_, err := own.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Microsecond, Types: []string{"nobody"}})
		return err
	},
	"delete": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		_, err := own.Purge(ctx, outbox.PurgeOptions{OlderThan: time.Microsecond, Types: []string{"nobody"}, Delete: true})
		return err
	},
	"migrate_again": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		return own.Migrate(ctx)
	},
	"listen": func(ctx context.Context, _ *pgtest.DB, own *outbox.PGStore, _ *pgxpool.Pool) error {
		listening, cancel := context.WithCancel(ctx)
		if err := own.Listen(listening, cancel); listening.Err() == nil {
			return err
		}
		return nil
	},
}

// closedDB is a migrated database where nobody has a right but its owner. Adopted: its
// table was made by another service.
func closedDB(t testing.TB, adopted bool) *pgtest.DB {
	t.Helper()
	db := pgtest.NewEmptyDB(t)
	if adopted {
		db.MustExec(t, pythonTable, pgx.QueryExecModeSimpleProtocol)
	}
	require.NoError(t, db.Store.Migrate(t.Context()))
	db.MustExec(t, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
	for _, typ := range []string{"add", "sent", "failed"} {
		db.Add(t, outbox.NewNotification{Type: typ})
		if typ != "add" {
			db.MustExec(t, "UPDATE outbox_notifications SET status = $1 WHERE type = $1", typ)
		}
	}
	return db
}

// TestRoles gives roles the rights that docs/roles.md lists for them.
func TestRoles(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		heading string
		isFor   []string // what needs each of the rights
		may     []string // what they allow besides
	}{
		{"Adding", []string{"add", "migrate_again"}, []string{"deliver", "read", "requeue", "purge", "listen"}},
		{"Delivering", []string{"deliver"}, []string{"read", "requeue", "purge", "listen"}},
		{"Reading", []string{"read"}, []string{"listen"}},
		{"Operating", []string{"read", "requeue", "purge"}, []string{"deliver", "listen"}},
		{"Deleting", []string{"delete"}, []string{"deliver", "read", "requeue", "purge", "listen"}},
	} {
		for _, adopted := range []bool{false, true} {
			name := strings.ToLower(c.heading) + "_on_a_new_table"
			if adopted {
				name = strings.ToLower(c.heading) + "_on_a_table_taken_over"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				role := newRole(t, "role")
				db := closedDB(t, adopted)
				pool := as(t, db, role, nil)
				own, err := outbox.NewPGStore(pool, outbox.Config{Notify: true, Logger: discard})
				require.NoError(t, err)
				blocks := documentedGrants(t, c.heading, role)
				if !adopted {
					blocks = blocks[:1] // the others are about what was taken over
				}
				rights := rightsOf(t, strings.Join(blocks, ""))
				for _, r := range rights {
					db.MustExec(t, r.grant())
				}
				for action, do := range roleActions {
					err := do(t.Context(), db, own, pool)
					if slices.Contains(c.isFor, action) || slices.Contains(c.may, action) {
						require.NoError(t, err, action)
						continue
					}
					require.Equal(t, "42501", sqlState(t, err), action)
					require.ErrorIs(t, err, outbox.ErrSetup, action)
					require.ErrorContains(t, err, "outbox: ", action)
				}
				for _, r := range rights {
					db.MustExec(t, r.revoke())
					needed := slices.ContainsFunc(c.isFor, func(action string) bool {
						err := roleActions[action](t.Context(), db, own, pool)
						if err == nil {
							return false
						}
						require.Equal(t, "42501", sqlState(t, err), "%s without %s", action, r.grant())
						return true
					})
					require.True(t, needed, "is not needed: %s", r.grant())
					db.MustExec(t, r.grant())
				}
			})
		}
	}

	t.Run("listening", func(t *testing.T) {
		t.Parallel()
		db := closedDB(t, false)
		pool := as(t, db, newRole(t, "role"), nil)
		own, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		require.NoError(t, roleActions["listen"](t.Context(), db, own, pool))
	})

	t.Run("migrating", func(t *testing.T) {
		t.Parallel()
		for _, prepare := range []string{"", "taken over"} {
			role := newRole(t, "role")
			db := pgtest.NewEmptyDB(t)
			db.MustExec(t, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
			if prepare != "" {
				db.MustExec(t, pythonTable, pgx.QueryExecModeSimpleProtocol)
				db.MustExec(t, "ALTER TABLE outbox_notifications OWNER TO "+role)
			}
			pool := as(t, db, role, nil)
			rights := rightsOf(t, documentedGrants(t, "Migrating", role)[0])
			for _, left := range rights {
				for _, r := range rights {
					if r != left {
						db.MustExec(t, r.grant())
					}
				}
				err := outbox.Migrate(t.Context(), pool)
				require.ErrorIs(t, err, outbox.ErrSetup, "without %s", left.grant())
				require.Equal(t, "42501", sqlState(t, err))
				for _, r := range rights {
					db.MustExec(t, r.revoke())
				}
			}
			for _, r := range rights {
				db.MustExec(t, r.grant())
			}
			require.NoError(t, outbox.Migrate(t.Context(), pool))
			require.Zero(t, db.Count(t))
		}
	})
	t.Run("migrating_without_owning_the_table", func(t *testing.T) {
		t.Parallel()
		role := newRole(t, "role")
		db := pgtest.NewEmptyDB(t)
		db.MustExec(t, pythonTable, pgx.QueryExecModeSimpleProtocol)
		db.MustExec(t, "GRANT CREATE ON SCHEMA public TO "+role+"; GRANT ALL ON outbox_notifications TO "+role, pgx.QueryExecModeSimpleProtocol)
		before := describe(t, db)
		err := outbox.Migrate(t.Context(), as(t, db, role, nil))
		require.ErrorIs(t, err, outbox.ErrSetup)
		require.ErrorContains(t, err, "must be owner of table outbox_notifications")
		require.Equal(t, before, describe(t, db))
	})
	t.Run("migrating_without_a_schema", func(t *testing.T) {
		t.Parallel()
		role := newRole(t, "role")
		db := pgtest.NewEmptyDB(t)
		own, err := outbox.NewPGStore(as(t, db, role, nil), outbox.Config{Schema: "their own", Logger: discard})
		require.NoError(t, err)
		require.ErrorIs(t, own.Migrate(t.Context()), outbox.ErrSetup)
		db.MustExec(t, "GRANT CREATE ON DATABASE "+db.Config().ConnConfig.Database+" TO "+role)
		require.NoError(t, own.Migrate(t.Context()))
	})
}

func describeRows(t testing.TB, db *pgtest.DB) string {
	t.Helper()
	return pgtest.One[string](t, db, "SELECT string_agg(o::text, E'\n' ORDER BY id) FROM outbox_notifications AS o")
}

// TestRowSecurity has policies on the table.
func TestRowSecurity(t *testing.T) {
	t.Parallel()
	// secured returns a store whose role has all rights, and the policy.
	secured := func(t *testing.T, policy string) (*pgtest.DB, *outbox.PGStore, *pgxpool.Pool, string) {
		role := newRole(t, "tenant")
		db := closedDB(t, false)
		for _, block := range documentedGrants(t, "Adding", role)[:1] {
			db.MustExec(t, block, pgx.QueryExecModeSimpleProtocol)
		}
		db.MustExec(t, "ALTER TABLE outbox_notifications ENABLE ROW LEVEL SECURITY;"+policy, pgx.QueryExecModeSimpleProtocol)
		pool := as(t, db, role, nil)
		own, err := outbox.NewPGStore(pool, outbox.Config{Logger: discard})
		require.NoError(t, err)
		return db, own, pool, role
	}
	const ofTenant = "CREATE POLICY tenant ON outbox_notifications USING (type LIKE 'mine%')"

	t.Run("what_a_role_sees_and_may_write_is_added_and_delivered", func(t *testing.T) {
		t.Parallel()
		_, own, pool, _ := secured(t, ofTenant)
		for guess := range outbox.Guesses {
			own.AlwaysGuess(guess)
			require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
				for _, want := range []outbox.Outcome{outbox.OutcomeCreated, outbox.OutcomeRefreshed} {
					res, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "mine" + itoa(guess), Payload: want})
					require.NoError(t, err)
					require.Equal(t, want, res.Outcome)
					many, err := own.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "mine too" + itoa(guess), Payload: want}})
					require.NoError(t, err)
					require.Equal(t, want, many[0].Outcome)
				}
				return nil
			}))
		}
		res, err := own.Claim(t.Context(), outbox.ClaimOptions{Limit: 100, Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, res.Claimed, 2*outbox.Guesses)
		done, err := own.Settle(t.Context(), []outbox.Settlement{{Lease: res.Claimed[0].Lease, Verdict: outbox.Delivered}})
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseDone}, done)
		stats, err := own.Stats(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 1, stats.Sent)
		require.Zero(t, stats.Failed, "one is hidden")
	})

	t.Run("what_operates_is_about_the_rows_of_the_role", func(t *testing.T) {
		t.Parallel()
		db, own, pool, role := secured(t, ofTenant)
		db.MustExec(t, "GRANT DELETE ON outbox_notifications TO "+role)
		for _, status := range []outbox.Status{outbox.StatusPending, outbox.StatusSent, outbox.StatusFailed} {
			db.Add(t, outbox.NewNotification{Type: "mine " + string(status), Payload: 1})
			db.MustExec(t, "UPDATE outbox_notifications SET status = $1 WHERE type = $2", status, "mine "+string(status))
		}
		db.MustExec(t, "UPDATE outbox_notifications SET sent_at = now() - interval '1 day' WHERE status = 'sent'")
		list, err := own.List(t.Context(), outbox.Filter{})
		require.NoError(t, err)
		require.Len(t, list, 3)
		all, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 10, Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, all.Claimed, 2, "one of them is hidden from the role")
		extended, err := own.Extend(t.Context(), []outbox.Lease{all.Claimed[0].Lease, all.Claimed[1].Lease}, time.Hour)
		require.NoError(t, err)
		require.Equal(t, []outbox.LeaseResult{outbox.LeaseStale, outbox.LeaseDone}, extended)

		purged, err := own.Purge(t.Context(), outbox.PurgeOptions{OlderThan: time.Hour, Delete: true})
		require.NoError(t, err)
		require.EqualValues(t, 1, purged)
		n, err := own.Requeue(t.Context(), outbox.Key{Type: "sent"}, outbox.Key{Type: "mine failed"})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, outbox.StatusSent, db.Get(t, outbox.Key{Type: "sent"}).Status)
		db.MustExec(t, "UPDATE outbox_notifications SET status = 'failed' WHERE type = 'mine failed'")
		matching, err := own.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed})
		require.NoError(t, err)
		require.Len(t, matching, 1)
		require.Equal(t, outbox.StatusFailed, db.Get(t, outbox.Key{Type: "failed"}).Status)
		require.NoError(t, pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			_, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "mine sent"})
			return err
		}), "the purged one is forgotten")
	})

	// SELECT ... FOR UPDATE takes rows that both kinds of policies cover, and passes over others
	// without a word.
	t.Run("rows_that_are_shown_and_cannot_be_locked_are_passed_over", func(t *testing.T) {
		t.Parallel()
		db, own, pool, role := secured(t, "CREATE POLICY shown ON outbox_notifications FOR SELECT USING (true); CREATE POLICY made ON outbox_notifications FOR INSERT WITH CHECK (true)")
		db.MustExec(t, "GRANT DELETE ON outbox_notifications TO "+role)
		db.MustExec(t, "UPDATE outbox_notifications SET sent_at = now() - interval '1 day', payload_json = '{\"a\": 1}' WHERE status = 'sent'")
		before := describeRows(t, db)
		tx := pgtest.Begin(t, pool, pgx.TxOptions{})
		for guess := range outbox.Guesses {
			own.AlwaysGuess(guess)
			for _, typ := range []string{"add", "sent", "failed"} {
				_, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: typ, CorrelationID: "new"})
				require.ErrorContains(t, err, "a trigger or a policy on the table suppressed it")
			}
			_, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "new" + itoa(guess)})
			require.NoError(t, err, "the transaction goes on")
		}
		_, err := own.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "add", CorrelationID: "new"}})
		if err == nil || !strings.Contains(err.Error(), "suppressed it") { // as PostgreSQL 18 has it
			require.Equal(t, "42501", sqlState(t, err))
			require.ErrorIs(t, err, outbox.ErrSetup)
		}
		require.NoError(t, tx.Rollback(t.Context()))

		list, err := own.List(t.Context(), outbox.Filter{})
		require.NoError(t, err)
		require.Len(t, list, 3)
		stats, err := own.Stats(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 1, stats.Pending)
		claim, err := own.Claim(t.Context(), outbox.ClaimOptions{Limit: 10, Lease: time.Hour})
		require.NoError(t, err)
		require.Empty(t, claim.Claimed)
		n, err := own.Requeue(t.Context(), outbox.Key{Type: "sent"}, outbox.Key{Type: "failed"})
		require.NoError(t, err)
		require.Zero(t, n)
		matching, err := own.RequeueMatching(t.Context(), outbox.Filter{Status: outbox.StatusFailed})
		require.NoError(t, err)
		require.Empty(t, matching)
		for _, remove := range []bool{false, true} {
			purged, err := own.Purge(t.Context(), outbox.PurgeOptions{OlderThan: time.Hour, Delete: remove})
			require.NoError(t, err)
			require.Zero(t, purged)
		}
		require.Equal(t, before, describeRows(t, db))

		theirs, err := db.Store.Claim(t.Context(), outbox.ClaimOptions{Limit: 1, Lease: time.Hour})
		require.NoError(t, err)
		lease := theirs.Claimed[0].Lease
		held := []outbox.LeaseResult{outbox.LeaseHeld}
		extended, err := own.Extend(t.Context(), []outbox.Lease{lease}, time.Hour)
		require.NoError(t, err)
		require.Equal(t, held, extended, "as a row that somebody holds locked")
		settled, err := own.Settle(t.Context(), []outbox.Settlement{{Lease: lease, Verdict: outbox.Delivered}})
		require.NoError(t, err)
		require.Equal(t, held, settled)
	})

	for guess := range outbox.Guesses {
		t.Run("an_invisible_row_under_the_key_is_an_error_that_says_so/guess_"+itoa(guess), func(t *testing.T) {
			t.Parallel()
			db, own, pool, _ := secured(t, "CREATE POLICY tenant ON outbox_notifications USING (status = 'pending') WITH CHECK (true)")
			own.AlwaysGuess(guess)
			tx := pgtest.Begin(t, pool, pgx.TxOptions{})
			_, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "sent"})
			require.ErrorContains(t, err, "a trigger or a policy on the table suppressed it")
			_, err = own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "add"})
			require.NoError(t, err, "the transaction goes on")
			_, err = own.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "sent"}, {Type: "other"}})
			if err == nil || !strings.Contains(err.Error(), "suppressed it") { // as PostgreSQL 18 has it
				require.Equal(t, "42501", sqlState(t, err))
				require.ErrorIs(t, err, outbox.ErrSetup)
			}
			require.NoError(t, tx.Rollback(t.Context()))
			require.Equal(t, 3, db.Count(t))
		})
	}

	t.Run("a_refused_row_is_an_error_of_the_set-up", func(t *testing.T) {
		t.Parallel()
		db, own, pool, role := secured(t, ofTenant)
		refused := func() {
			t.Helper()
			for _, add := range []func(tx pgx.Tx) error{
				func(tx pgx.Tx) error {
					_, err := own.AddNotification(t.Context(), tx, outbox.NewNotification{Type: "theirs"})
					return err
				},
				func(tx pgx.Tx) error {
					_, err := own.AddNotifications(t.Context(), tx, []outbox.NewNotification{{Type: "mine"}, {Type: "theirs"}})
					return err
				},
			} {
				err := pgx.BeginFunc(t.Context(), pool, add)
				require.Equal(t, "42501", sqlState(t, err))
				require.ErrorIs(t, err, outbox.ErrSetup)
				require.ErrorContains(t, err, "row-level security policy")
			}
			require.Equal(t, 3, db.Count(t))
		}
		refused()

		// Owning the table helps until FORCE.
		db.MustExec(t, "ALTER TABLE outbox_notifications OWNER TO "+role)
		db.MustExec(t, "ALTER TABLE outbox_notifications FORCE ROW LEVEL SECURITY")
		refused()
		db.MustExec(t, "ALTER TABLE outbox_notifications NO FORCE ROW LEVEL SECURITY")
		require.NoError(t, roleActions["add"](t.Context(), db, own, pool))
		db.MustExec(t, "ALTER TABLE outbox_notifications FORCE ROW LEVEL SECURITY; ALTER ROLE "+role+" BYPASSRLS", pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, roleActions["add"](t.Context(), db, own, pool))
	})
}
