//go:build !linux

package pgserver

import (
	"errors"
	"os"
	"os/exec"
)

// confine does nothing here: there is no parent-death signal, and dropping root is
// left to whoever runs tests as root on such a system.
func confine(*exec.Cmd, *account) {}

// lockDir always fails here, so that no directory is ever taken for abandoned.
func lockDir(string) (*os.File, error) { return nil, errors.ErrUnsupported }
