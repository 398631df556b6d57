//go:build installed

package pgserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// These need an installed PostgreSQL even where there is Docker, hence the tag:
// OUTBOX_PG_BINARIES=1 go test -tags installed.

// A killed test binary takes its server along, and the next one removes its data.
func TestStart_installed_server_dies_with_its_process(t *testing.T) {
	t.Parallel()
	for _, state := range []string{running, paused} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), asChild+"="+state, "OUTBOX_PG_BINARIES=1")
			cmd.Stderr = os.Stderr
			stdout, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			var dir, url string
			_, err = fmt.Fscanln(bufio.NewReader(stdout), &dir, &url)
			require.NoError(t, err)
			require.NoError(t, cmd.Process.Kill())
			require.Error(t, cmd.Wait())

			require.Eventually(t, func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second) // a paused one does not answer
				defer cancel()
				conn, err := pgx.Connect(ctx, url)
				if err == nil {
					conn.Close(ctx)
				}
				left, globErr := filepath.Glob(filepath.Join(dir, ".s.PGSQL.*")) // what it removes last, and dir is younger then
				return errors.Is(err, syscall.ECONNREFUSED) && globErr == nil && len(left) == 0
			}, time.Minute, 10*time.Millisecond, "the server ends")

			removeAbandoned(filepath.Dir(dir))
			require.DirExists(t, dir, "it is too young to be taken for abandoned")
			old := time.Now().Add(-2 * time.Minute)
			require.NoError(t, os.Chtimes(dir, old, old))
			require.Eventually(t, func() bool { // a test beside this one may be removing it
				removeAbandoned(filepath.Dir(dir))
				_, err := os.Stat(dir)
				return errors.Is(err, fs.ErrNotExist)
			}, time.Minute, 10*time.Millisecond, "it is removed")
		})
	}
}
