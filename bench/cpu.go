package main

import (
	"bytes"
	"os"
	"strconv"
	"time"
)

// meter reads CPU clocks, which do not mind what else the machine does.
type meter struct {
	server, client func() time.Duration
	knowsServer    bool
}

func zero() time.Duration { return 0 }

// newMeter returns a meter of the server in that container. Its cgroup tells, in
// version 1 or 2, if Docker runs on this machine.
func newMeter(container string) meter {
	m := meter{server: zero, client: clientCPU}
	for _, read := range []func() (time.Duration, bool){
		func() (time.Duration, bool) {
			return readCounter("/sys/fs/cgroup/cpuacct/docker/"+container+"/cpuacct.usage", nil, time.Nanosecond)
		},
		func() (time.Duration, bool) {
			return readCounter("/sys/fs/cgroup/system.slice/docker-"+container+".scope/cpu.stat", []byte("usage_usec "), time.Microsecond)
		},
		func() (time.Duration, bool) { // with the driver cgroupfs
			return readCounter("/sys/fs/cgroup/docker/"+container+"/cpu.stat", []byte("usage_usec "), time.Microsecond)
		},
	} {
		if _, ok := read(); ok && container != "" {
			m.knowsServer = true
			m.server = func() time.Duration { d, _ := read(); return d }
			break
		}
	}
	return m
}

// readCounter reads the number after prefix in a file.
func readCounter(file string, prefix []byte, unit time.Duration) (time.Duration, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	_, text, found := bytes.Cut(text, prefix)
	line, _, _ := bytes.Cut(text, []byte("\n"))
	n, err := strconv.ParseInt(string(line), 10, 64)
	return time.Duration(n) * unit, found && err == nil
}
