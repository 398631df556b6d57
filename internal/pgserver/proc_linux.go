package pgserver

import (
	"os"
	"os/exec"
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
