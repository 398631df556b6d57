//go:build unix

package pgserver

import (
	"errors"
	"fmt"
	"syscall"
)

const (
	sigFreeze = syscall.SIGSTOP
	sigThaw   = syscall.SIGCONT
)

// signalTo takes a process that is gone for one that got the signal.
func signalTo(pid int, sig syscall.Signal) error {
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("process %d: %v: %w", pid, sig, err)
	}
	return nil
}
