//go:build unix

package main

import (
	"syscall"
	"time"
)

// clientCPU is the CPU time of this process, its children not included.
func clientCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
