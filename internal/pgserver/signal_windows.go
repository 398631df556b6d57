package pgserver

import (
	"errors"
	"syscall"
)

// There is no way to freeze a process.
const (
	sigFreeze syscall.Signal = -1
	sigThaw   syscall.Signal = -1
)

func signalTo(int, syscall.Signal) error { return errors.ErrUnsupported }
