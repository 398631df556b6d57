package pgserver

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBuildStamp_is_the_scripts_own(t *testing.T) {
	out, err := exec.Command("bash", "-c", "cat image/build.sh image/entrypoint.sh | sha256sum | cut -c1-16").Output()
	require.NoError(t, err)
	require.Equal(t, strings.TrimSpace(string(out)), buildStamp())
}
