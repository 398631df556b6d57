// Command bench measures this library beside its peers and beside hand-written SQL,
// on one server in one run, and prints tables in Markdown. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// size is how much is measured.
type size struct {
	rounds int           // of each comparison
	round  time.Duration // of each contender in a round
	conns  []int         // connections that add at once

	preload int // rows in each contender's table beforehand
	batch   int // notifications in a transaction
	wire    int // adds whose WAL is counted

	deliver       int // messages
	deliverRounds int

	latency       time.Duration // of each contender in a round
	latencyRounds int

	small, large, later int // rows sent, rows sent, rows due tomorrow
	claimRounds         int

	beside, hold time.Duration // before and after, and while a transaction is held open
}

func fullSize() size {
	return size{
		rounds: 25, round: 100 * time.Millisecond, conns: []int{1, 8, 32},
		preload: 100_000, batch: 1000, wire: 1000,
		deliver: 20_000, deliverRounds: 7,
		latency: 5 * time.Second, latencyRounds: 2,
		small: 10_000, large: 10_000_000, later: 1_000_000, claimRounds: 25,
		beside: 20 * time.Second, hold: time.Minute,
	}
}

func quickSize() size {
	return size{
		rounds: 5, round: 50 * time.Millisecond, conns: []int{1, 8, 32},
		preload: 10_000, batch: 1000, wire: 300,
		deliver: 5_000, deliverRounds: 3,
		latency: time.Second, latencyRounds: 1,
		small: 10_000, large: 200_000, later: 100_000, claimRounds: 7,
		beside: 3 * time.Second, hold: 5 * time.Second,
	}
}

type options struct {
	url   string // "": a server of our own
	run   *regexp.Regexp
	quick bool
	size  size
}

func main() {
	os.Exit(command())
}

func command() int {
	quick := flag.Bool("quick", false, "fewer and shorter rounds, smaller tables: in under 2 minutes, to see that it works")
	run := flag.String("run", "", "measure only the sections whose name this regular expression matches")
	url := flag.String("url", "", "measure on this server, as its superuser, in a database made for it; default: a server is started")
	out := flag.String("out", "results", "directory for the raw results")
	rounds := flag.Int("rounds", 0, "rounds of each comparison; 0: 25 of adding, 7 of delivering, less with -quick")
	round := flag.Duration("round", 0, "how long each contender works in a round; 0: 100ms, 50ms with -quick")
	hold := flag.Duration("hold", 0, "for how long a transaction is held open in section held; 0: 1m, 5s with -quick")
	list := flag.Bool("list", false, "list the sections")
	flag.Parse()

	if *list {
		for _, s := range sections {
			fmt.Println(s.name)
		}
		return 0
	}
	opts := options{url: *url, quick: *quick, size: fullSize()}
	if *quick {
		opts.size = quickSize()
	}
	var err error
	opts.run, err = regexp.Compile(*run)
	switch {
	case err != nil:
		err = fmt.Errorf("-run: %w", err)
	case !slices.ContainsFunc(sections, func(s section) bool { return opts.run.MatchString(s.name) }):
		err = fmt.Errorf("-run %s: no such section, see -list", *run)
	case *rounds < 0:
		err = fmt.Errorf("-rounds %d is negative", *rounds)
	case *round < 0:
		err = fmt.Errorf("-round %v is negative", *round)
	case *hold < 0:
		err = fmt.Errorf("-hold %v is negative", *hold)
	case flag.NArg() > 0:
		err = fmt.Errorf("%q is not a flag", flag.Arg(0))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	if *rounds > 0 {
		opts.size.rounds, opts.size.deliverRounds, opts.size.claimRounds = *rounds, *rounds, *rounds
	}
	if *round > 0 {
		opts.size.round = *round
	}
	if *hold > 0 {
		opts.size.hold = *hold
	}
	if *hold >= 5*time.Minute {
		opts.size.beside = 2 * time.Minute // enough for autovacuum to come by
	}

	// A reader of our output that went away must not leave the server behind either.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	rep := newReport(os.Stdout)
	err = measure(ctx, opts, rep)
	if err != nil && ctx.Err() != nil {
		err = errors.New("interrupted") // which all that was under way has to say too
	}
	if len(rep.Records) > 0 {
		file := filepath.Join(*out, rep.Date.Format("2006-01-02T150405")+".json")
		if writeErr := rep.writeRaw(file); writeErr != nil {
			err = errors.Join(err, writeErr)
		} else {
			fmt.Fprintln(os.Stderr, "raw results:", file)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// bench is a run.
type bench struct {
	size
	url   string
	db    *pgxpool.Pool // for what is not measured
	meter meter
	rep   *report
}

type section struct {
	name, title string
	run         func(context.Context, *bench) error
}

var sections = []section{
	{"add/new", "Add, new key: BEGIN, business row, add, COMMIT", addNew},
	{"add/pending", "Add, repeat of a pending key, payload changed", addPending},
	{"add/unchanged", "Add, repeat of a pending key, nothing changed", addUnchanged},
	{"add/settled", "Add, repeat of a settled key", addSettled},
	{"add/mixed", "Add, of five three new, one pending, one settled, one after the other", addMixed},
	{"add/wrong", "Add, after sixteen new keys one that is pending, so that each guess is wrong", addWrong},
	{"wire", "Round trips and WAL of one add", wire},
	{"goside", "Go side of one add", goSide},
	{"batch", "Many in one transaction", batches},
	{"deliver", "Delivery with a sender that does nothing", deliver},
	{"latency", "From commit to Send, 100 adds a second", latency},
	{"notify", "NOTIFY: BEGIN, business row, add of a new key, COMMIT", notify},
	{"large", "Large tables", large},
	{"held", "A transaction elsewhere is held open, 800 adds a second", held},
}

// measure runs the sections asked for and prints as it goes.
func measure(ctx context.Context, opts options, rep *report) (err error) {
	b := &bench{size: opts.size, rep: rep}
	stop, err := b.start(ctx, opts.url)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if err := rep.header(ctx, b); err != nil {
		return err
	}
	began := time.Now()
	for _, s := range sections {
		if !opts.run.MatchString(s.name) {
			continue
		}
		rep.begin(s.name, s.title)
		start := time.Now()
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if err := b.exec(ctx, "CHECKPOINT"); err != nil {
			return err
		}
		rep.printf("%s: %.0f s.\n\n", s.name, time.Since(start).Seconds())
	}
	rep.printTargets(opts.quick)
	rep.printf("In all %.0f s.\n", time.Since(began).Seconds())
	return nil
}
