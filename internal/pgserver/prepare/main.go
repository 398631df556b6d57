// Command prepare gets a machine ready for the tests: "prepare 15 17 18" has the
// images of those PostgreSQL versions pulled or built. It prints what the tests
// will run on, for the Makefile: "docker", else "installed", else "nothing". What a
// human should know goes to standard error.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	logf := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

	err := pgserver.Prepare(ctx, logf, os.Args[1:]...)
	if err == nil {
		fmt.Println("docker")
		return
	}
	logf("%v", err)
	if err := pgserver.CheckInstalled(ctx); err != nil {
		logf("%v", err)
		fmt.Println("nothing")
		return
	}
	fmt.Println("installed")
}
