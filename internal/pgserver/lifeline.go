package pgserver

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
)

// A lifeline is a connection or pipe that the kernel closes when this process ends,
// however it ends. A process beside the server reads from the other end of it, and at its
// end ends the server. It holds in a debugger, and needs no clock.

// watchLifeline, before processOne, has the container end when its standard input does.
// What runs in the background is given none unless it is named.
const watchLifeline = `exec 3<&0
(cat <&3 >/dev/null; kill -QUIT 1) &
`

// containerLifeline returns options for a container that is removed when this process
// has ended, and what holds it until then. The container's input stays open as long as
// the connection that is attached to it, which is made before it starts.
func containerLifeline() ([]testcontainers.ContainerCustomizer, *heldConn) {
	held := new(heldConn)
	return []testcontainers.ContainerCustomizer{
		testcontainers.WithConfigModifier(func(c *container.Config) { c.OpenStdin, c.StdinOnce, c.AttachStdin = true, true, true }),
		testcontainers.WithHostConfigModifier(func(h *container.HostConfig) { h.AutoRemove = true }),
		testcontainers.WithAdditionalLifecycleHooks(testcontainers.ContainerLifecycleHooks{
			PostCreates: []testcontainers.ContainerHook{func(ctx context.Context, c testcontainers.Container) error {
				return held.attach(ctx, c.GetContainerID())
			}},
		}),
	}, held
}

// heldConn is the connection to a container's input. It is not to be collected as garbage
// while the server is in use.
type heldConn struct {
	cli  *client.Client
	conn *client.HijackedResponse
}

func (h *heldConn) attach(ctx context.Context, id string) (err error) {
	if h.cli, err = connectDocker(ctx); err != nil {
		return err
	}
	attached, err := h.cli.ContainerAttach(ctx, id, client.ContainerAttachOptions{Stream: true, Stdin: true})
	if err != nil {
		return errors.Join(err, h.cli.Close())
	}
	h.conn = &attached.HijackedResponse
	return nil
}

func (h *heldConn) close() {
	if h != nil && h.conn != nil {
		h.conn.Close()
		h.cli.Close()
	}
}

// watchScript ends a server and removes its data when its standard input ends, and does
// nothing if it reads a line. $1 is the server's process, $2 the directory. Where nobody
// reaps orphans the process can be signalled for ever: it waits for 10 s at most.
const watchScript = `trap '' INT TERM HUP
read -r line && exit
kill -QUIT "$1"
n=0
while kill -0 "$1" && [ $((n += 1)) -le 100 ]; do sleep 0.1; done
rm -rf "$2"`

// watcher is the process that holds the other end of an installed server's lifeline.
type watcher struct {
	cmd  *exec.Cmd
	line io.WriteCloser
}

// watchInstalled has the server of that process and its directory go when this process
// has ended.
func watchInstalled(pid int, dir string) (*watcher, error) {
	w := &watcher{cmd: exec.Command("/bin/sh", "-c", watchScript, "sh", strconv.Itoa(pid), dir)}
	w.cmd.Dir = os.TempDir()
	detach(w.cmd)
	var err error
	if w.line, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return w, w.cmd.Start()
}

// dismiss lets the watcher go without harm.
func (w *watcher) dismiss() error {
	if w == nil {
		return nil
	}
	_, err := io.WriteString(w.line, "\n")
	return errors.Join(err, w.line.Close(), w.cmd.Wait())
}
