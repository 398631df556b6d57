package pgserver

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

var (
	//go:embed image/build.sh
	buildScript []byte
	//go:embed image/entrypoint.sh
	entrypointScript []byte
)

// pgbouncerTag is the image of the PgBouncer that containers run.
const pgbouncerTag = "outbox-pgbouncer:1.24"

// stampLabel is the label of built images that holds buildStamp.
const stampLabel = "outbox.stamp"

// buildStamp names this version of the build scripts. The script computes the same.
func buildStamp() string {
	h := sha256.New()
	h.Write(buildScript)
	h.Write(entrypointScript)
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// serverImage is an image that the daemon has.
type serverImage struct {
	tag      string
	origin   string // for humans
	official bool
}

// postgresImage returns an image of that version, pulling or building it if the
// daemon has none. A local one decides before the network is tried.
func postgresImage(ctx context.Context, cli *client.Client, version string, logf func(string, ...any)) (serverImage, error) {
	tag := "postgres:" + version
	official := serverImage{tag, "official image " + tag, true}
	built := serverImage{"outbox-" + tag, "image built from Debian's packages", false}

	if _, err := cli.ImageInspect(ctx, official.tag); err == nil {
		return official, nil
	}
	if isBuilt(ctx, cli, built.tag) {
		return built, nil
	}
	logf("pulling image %s", official.tag)
	pullErr := pullImage(ctx, cli, official.tag)
	if pullErr == nil {
		return official, nil
	}
	logf("no registry for image %s: building it from Debian's packages, in about 15 seconds", official.tag)
	if err := buildImage(ctx, built.tag); err != nil {
		return serverImage{}, fmt.Errorf("image %s: pull: %w; build: %w", official.tag, pullErr, err)
	}
	return built, nil
}

// pgbouncerImage makes sure that the daemon has pgbouncerTag. There is no official
// image to pull: it is built, where this is not Debian on a Debian base image.
func pgbouncerImage(ctx context.Context, cli *client.Client, logf func(string, ...any)) error {
	if isBuilt(ctx, cli, pgbouncerTag) {
		return nil
	}
	logf("building image %s from Debian's packages, in about 10 seconds", pgbouncerTag)
	buildErr := buildImage(ctx, pgbouncerTag)
	if buildErr == nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, "docker", "build", "--quiet", "--tag", pgbouncerTag, "--label", stampLabel+"="+buildStamp(), "-")
	cmd.Stdin = strings.NewReader(`FROM debian:trixie-slim
RUN apt-get -qq update && apt-get -qq install --no-install-recommends pgbouncer && rm -rf /var/lib/apt/lists/*
USER nobody
EXPOSE 6432
`)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("image %s: %w; docker build: %w: %s", pgbouncerTag, buildErr, err, tail(out))
	}
	return nil
}

// isBuilt says whether the daemon has the image from the current build scripts.
func isBuilt(ctx context.Context, cli *client.Client, tag string) bool {
	image, err := cli.ImageInspect(ctx, tag)
	return err == nil && image.Config != nil && image.Config.Labels[stampLabel] == buildStamp()
}

// pullImage pulls an image. A registry that does not answer is given up on soon;
// one that does may take as long as ctx allows.
func pullImage(ctx context.Context, cli *client.Client, tag string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := time.AfterFunc(10*time.Second, func() { cancel(errors.New("the registry does not answer")) })
	defer patience.Stop()

	pull, err := cli.ImagePull(ctx, tag, client.ImagePullOptions{})
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	defer pull.Close()
	for _, err := range pull.JSONMessages(ctx) {
		if err != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		patience.Stop()
	}
	return context.Cause(ctx)
}

// buildImage runs the build script, which does nothing for an image that another
// process has built meanwhile.
func buildImage(ctx context.Context, tag string) error {
	dir, err := os.MkdirTemp("", "outbox-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "build.sh")
	if err := os.WriteFile(script, buildScript, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "entrypoint.sh"), entrypointScript, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "bash", script, tag)
	// The script removes its own temporary files when it is asked to end.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, tail(out))
	}
	return nil
}

// Prepare gets the images of those PostgreSQL versions and of PgBouncer ready, so
// that no test has to wait for them. It fails where there is no Docker. Logf, as in
// [Options] but required, is called concurrently.
func Prepare(ctx context.Context, logf func(format string, args ...any), versions ...string) error {
	cli, err := connectDocker(ctx)
	if err != nil {
		return fmt.Errorf("pgserver: docker: %w", err)
	}
	defer cli.Close()
	errs := make(chan error)
	for _, v := range versions {
		go func() {
			_, err := postgresImage(ctx, cli, v, logf)
			errs <- err
		}()
	}
	go func() { errs <- pgbouncerImage(ctx, cli, logf) }()
	for range len(versions) + 1 {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	return nil
}
