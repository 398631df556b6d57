//go:build !linux

package pgserver

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// confine does nothing here: there is no parent-death signal, and dropping root is
// left to whoever runs tests as root on such a system.
func confine(*exec.Cmd, *account) {}

// detach does nothing here: cmd ignores signals.
func detach(*exec.Cmd) {}

// lockDir always fails here, so that no directory is ever taken for abandoned.
func lockDir(string) (*os.File, error) { return nil, errors.ErrUnsupported }

// processes reads the process table.
func processes() ([]processInfo, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=").Output()
	if err != nil {
		return nil, fmt.Errorf("ps: %w", err)
	}
	var all []processInfo
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		var p processInfo
		var state string
		if _, err := fmt.Sscan(lines.Text(), &p.pid, &p.parent, &state); err != nil {
			return nil, fmt.Errorf("ps: %q: %w", lines.Text(), err)
		}
		p.stopped, p.zombie = state[0] == 'T', state[0] == 'Z'
		all = append(all, p)
	}
	return all, nil
}
