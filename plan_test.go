package outbox_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgtest"
)

// planNode is what EXPLAIN (FORMAT JSON) says of a node, as far as asked here.
type planNode struct {
	Type      string     `json:"Node Type"`
	Relation  string     `json:"Relation Name"`
	Index     string     `json:"Index Name"`
	IndexCond string     `json:"Index Cond"`
	Filter    string     `json:"Filter"`
	Plans     []planNode `json:"Plans"`
}

// scans returns the nodes that read the table.
func (n planNode) scans() []planNode {
	var found []planNode
	if strings.Contains(n.Type, "Scan") && (n.Relation == "outbox_notifications" || n.Index != "") && !strings.HasPrefix(n.Relation, "pg_") {
		found = append(found, n)
	}
	for _, sub := range n.Plans {
		found = append(found, sub.scans()...)
	}
	return found
}

// TestPlan shows on 1,000,000 rows that every scan of the table, in plans for
// given values and in the generic plan alike, is an index scan on the whole key
// or on the id.
func TestPlan(t *testing.T) {
	t.Parallel()
	db := pgtest.NewDB(t)
	// Half have no booking, nearly half no candidate, and most are of one type: the
	// planner takes the columns to be independent and expects some 200,000 rows
	// where both are NULL. Nearly all are sent.
	db.Fill(t, `INSERT INTO outbox_notifications (type, booking_id, candidate_tg_id, status)
		SELECT CASE WHEN i % 10 = 0 THEN 'type2' ELSE 'type1' END, CASE WHEN i % 2 = 1 THEN i END,
			CASE WHEN i % 2 = 0 OR i % 100 = 11 THEN i + 1000000000 END, CASE WHEN i % 100 = 0 THEN 'pending' ELSE 'sent' END
		FROM generate_series(1, 1000000) i`)

	explain := func(t *testing.T, tx pgx.Tx, sql string) planNode {
		var doc []struct{ Plan planNode }
		require.NoError(t, json.Unmarshal(pgtest.One[json.RawMessage](t, tx, "EXPLAIN (FORMAT JSON) "+sql), &doc))
		return doc[0].Plan
	}
	requireIndexes := func(t *testing.T, plan planNode, key outbox.Key) {
		scans := plan.scans()
		require.NotEmpty(t, scans)
		byKey := 0
		for _, s := range scans {
			require.Contains(t, s.Type, "Index", "%+v", s)
			switch s.Index {
			case "outbox_notifications_pkey":
				require.Contains(t, s.IndexCond, "id = ")
			case "outbox_notifications_key":
				byKey++
				for column, absent := range map[string]bool{"type": false, "booking_id": key.BookingID == 0, "candidate_tg_id": key.CandidateTgID == 0} {
					want := column
					if absent {
						want += " IS NULL"
					}
					require.Contains(t, s.IndexCond, want)
				}
			default:
				require.Fail(t, "another index", "%+v", s)
			}
		}
		require.NotZero(t, byKey)
	}
	for _, key := range []outbox.Key{{Type: "type1", BookingID: 11, CandidateTgID: 1000000011}, {Type: "type1", BookingID: 13},
		{Type: "type1", CandidateTgID: 1000000008}, {Type: "type1"}} {
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			t.Run(fmt.Sprintf("%s/%s", strings.ReplaceAll(key.String(), `"`, ""), mode), func(t *testing.T) {
				tx := db.MustBegin(t)
				_, err := tx.Exec(t.Context(), "SET LOCAL plan_cache_mode = "+mode)
				require.NoError(t, err)
				booking, candidate := "NULL", "NULL"
				if key.BookingID != 0 {
					booking = fmt.Sprint(key.BookingID)
				}
				if key.CandidateTgID != 0 {
					candidate = fmt.Sprint(key.CandidateTgID)
				}
				_, err = tx.Exec(t.Context(), "PREPARE add AS "+db.Store.AddSQL(key))
				require.NoError(t, err)
				requireIndexes(t, explain(t, tx, fmt.Sprintf("EXECUTE add ('%s', %s, %s, NULL, '{\"a\": 1}', NULL, NULL, NULL)",
					key.Type, booking, candidate)), key)

				for guess := 1; guess < outbox.Guesses; guess++ {
					_, err = tx.Exec(t.Context(), "PREPARE guess AS "+db.Store.GuessSQL(guess, key))
					require.NoError(t, err)
					requireIndexes(t, explain(t, tx, fmt.Sprintf("EXECUTE guess ('%s', %s, %s, NULL, '{\"a\": 1}', NULL, NULL, NULL)",
						key.Type, booking, candidate)), key)
					_, err = tx.Exec(t.Context(), "DEALLOCATE guess")
					require.NoError(t, err)
				}

				array := func(v string) string { return "array_fill(" + v + ", ARRAY[1000])" }
				_, err = tx.Exec(t.Context(), "PREPARE add_many AS "+db.Store.AddManySQL(key))
				require.NoError(t, err)
				columns := strings.Join([]string{array("'" + key.Type + "'::text"), array(booking + "::bigint"), array(candidate + "::bigint"),
					array("NULL::bigint"), array("'1'::json"), array("NULL::text"), array("NULL::timestamptz"), array("NULL::timestamptz")}, ", ")
				requireIndexes(t, explain(t, tx, "EXECUTE add_many ("+columns+", NULL, NULL, NULL, NULL, NULL)"), key)
				_, err = tx.Exec(t.Context(), "PREPARE new_many AS "+db.Store.NewManySQL(key))
				require.NoError(t, err)
				requireIndexes(t, explain(t, tx, "EXECUTE new_many ("+columns+", NULL, NULL)"), key)
				_, err = tx.Exec(t.Context(), "DEALLOCATE add; DEALLOCATE add_many; DEALLOCATE new_many") // they outlive the transaction
				require.NoError(t, err)
				require.NoError(t, tx.Rollback(t.Context()))
			})
		}
	}
}
