package pgserver

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// confine has cmd run as the given user (nil: the current one) and die with the
// thread that starts it.
func confine(cmd *exec.Cmd, as *account) {
	// SIGQUIT is PostgreSQL's immediate shutdown: children go too. A process group of
	// its own keeps the terminal's Ctrl-C for the program, which may want to clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT, Setpgid: true}
	if as != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(as.uid), Gid: uint32(as.gid)}
	}
}

// detach keeps what ends this process by way of its group or terminal from cmd.
func detach(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// lockDir takes the lock that marks dir as in use until the file is closed, which
// the kernel does for a process that is killed. It fails where the lock is taken.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// processes reads the process table. Processes that end meanwhile are left out.
func processes() ([]processInfo, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var all []processInfo
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// pid (name) state parent ...; the name may have anything in it
		var p processInfo
		var state string
		if _, err := fmt.Sscan(string(stat), &p.pid); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if _, err := fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &p.parent); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		p.stopped, p.zombie = state == "T", state == "Z" || state == "X"
		all = append(all, p)
	}
	return all, nil
}
