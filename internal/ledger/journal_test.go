package ledger_test

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox/internal/ledger"
)

func TestJournal_returns_what_was_appended(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "journal")
	j, err := ledger.Create(path)
	require.NoError(t, err)
	records := good().Records
	require.NoError(t, j.Append(records[:1]...))
	require.NoError(t, j.Note(records[1:]...))
	var writers sync.WaitGroup
	for range 20 {
		writers.Go(func() { require.NoError(t, j.Append(records[0])) })
	}
	writers.Wait()
	require.NoError(t, j.Close())
	read, err := ledger.Read(path)
	require.NoError(t, err)
	require.Equal(t, records, read[:len(records)])
	require.Len(t, read, len(records)+20)
	_, err = ledger.Create(path)
	require.ErrorIs(t, err, os.ErrExist)
}

func TestJournal_leaves_out_a_torn_last_line_and_no_other(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "journal")
	j, err := ledger.Create(path)
	require.NoError(t, err)
	require.NoError(t, j.Append(good().Records...))
	require.NoError(t, j.Close())
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, text[:len(text)-2], 0o644))
	read, err := ledger.Read(path)
	require.NoError(t, err)
	require.Equal(t, good().Records[:3], read)
	require.NoError(t, os.WriteFile(path, text[1:], 0o644))
	_, err = ledger.Read(path)
	require.ErrorContains(t, err, "line 1")
}
