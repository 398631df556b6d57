package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// report is what a run prints, and its raw results.
type report struct {
	out     io.Writer
	section string

	Date    time.Time  `json:"date"`
	About   [][]string `json:"about"`
	Records []record   `json:"records"`
	Targets []target   `json:"targets"`
}

// record is a raw result: what a contender did in a round, or another figure.
type record struct {
	Section   string `json:"section"`
	Case      string `json:"case,omitempty"`
	Contender string `json:"contender"`
	Round     int    `json:"round"`
	*sample
	Values map[string]float64 `json:"values,omitempty"`
}

// target is a figure of a section beside what it should be.
type target struct {
	Work     string  `json:"work"`
	Want     string  `json:"target"`
	Measured float64 `json:"measured"`
	Met      bool    `json:"met"`
}

func newReport(out io.Writer) *report { return &report{out: out, Date: time.Now()} }

func (r *report) printf(format string, args ...any) { fmt.Fprintf(r.out, format, args...) }

func (r *report) begin(section, title string) {
	r.section = section
	r.printf("## %s\n\n", title)
}

// table prints a table in Markdown, its columns as wide as they have to be.
func (r *report) table(rows [][]string) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	line := func(row []string, fill string) {
		for i, cell := range row {
			r.printf("| %s%s ", cell, strings.Repeat(fill, width[i]-len([]rune(cell))))
		}
		r.printf("|\n")
	}
	line(rows[0], " ")
	line(make([]string, len(width)), "-")
	for _, row := range rows[1:] {
		line(row, " ")
	}
	r.printf("\n")
}

func (r *report) value(name, contender string, round int, values map[string]float64) {
	r.Records = append(r.Records, record{Section: r.section, Case: name, Contender: contender, Round: round, Values: values})
}

// atLeast and atMost note a target. They never round in its favour.
func (r *report) atLeast(work string, measured, want float64) {
	r.Targets = append(r.Targets, target{work, fmt.Sprintf("≥ %v", want), measured, measured >= want})
}

func (r *report) atMost(work string, measured, want float64) {
	r.Targets = append(r.Targets, target{work, fmt.Sprintf("≤ %v", want), measured, measured <= want})
}

func (r *report) printTargets(quick bool) {
	if len(r.Targets) == 0 {
		return
	}
	r.printf("## Targets\n\n")
	if quick {
		r.printf("A quick run is too short for its ratios to decide anything.\n\n")
	}
	rows := [][]string{{"work", "target", "measured", "met"}}
	for _, t := range r.Targets {
		met := "yes"
		if !t.Met {
			met = "**no**"
		}
		rows = append(rows, []string{t.Work, t.Want, exact(t.Measured), met})
	}
	r.table(rows)
}

// compare has contenders work in turns, prints a line for each, and returns each
// one's median ratio to the contender named floor.
func (b *bench) compare(ctx context.Context, name, unit, floor string, cs []contender, rounds int) (map[string]float64, error) {
	samples, err := interleave(ctx, b.meter, cs, rounds, b.round)
	if err != nil {
		return nil, err
	}
	var base []sample
	for i, c := range cs {
		if c.name == floor {
			base = samples[i]
		}
		for round, s := range samples[i] {
			b.rep.Records = append(b.rep.Records, record{Section: b.rep.section, Case: name, Contender: c.name, Round: round, sample: &s})
		}
	}
	head := []string{name, unit + "/s", "ratio", "quartiles"}
	if b.meter.knowsServer {
		head = append(head, "server CPU µs", "ratio of it")
	}
	rows := [][]string{append(head, "client CPU µs")}
	result := map[string]float64{}
	for i, c := range cs {
		ratio := spreadOf(ratios(samples[i], base, sample.speed))
		result[c.name] = ratio.median
		row := []string{c.name, number(median(each(samples[i], sample.speed))),
			fmt.Sprintf("%.3f", ratio.median), fmt.Sprintf("%.2f–%.2f", ratio.q1, ratio.q3)}
		if c.name == floor {
			row[0], row[3] = c.name+" (floor)", ""
		}
		if b.meter.knowsServer {
			row = append(row, number(median(each(samples[i], sample.serverUS))),
				fmt.Sprintf("%.2f", median(ratios(samples[i], base, sample.serverUS))))
		}
		rows = append(rows, append(row, number(median(each(samples[i], sample.clientUS)))))
	}
	b.rep.table(rows)
	return result, nil
}

// number is v with three digits, or as many as its whole part has.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1 || v == 0:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}

// exact shows on which side of a target v is.
func exact(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}

// header prints what the figures depend on.
func (r *report) header(ctx context.Context, b *bench) error {
	pool, err := b.pool(ctx, 1) // as those of the contenders
	if err != nil {
		return err
	}
	defer pool.Close()
	version, err := one[string](ctx, pool, "SELECT version()")
	if err != nil {
		return err
	}
	rows, err := pool.Query(ctx, `SELECT name || ' = ' || current_setting(name) FROM pg_settings
		WHERE source IN ('command line', 'configuration file', 'environment variable') AND setting IS DISTINCT FROM boot_val
			AND name NOT IN ('config_file', 'data_directory', 'hba_file', 'ident_file', 'unix_socket_directories', 'port', 'listen_addresses', 'default_text_search_config') AND name NOT LIKE 'lc\_%' AND name !~* 'time_?zone'
		UNION ALL SELECT name || ' = ' || current_setting(name) FROM pg_settings
		WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'wal_level') AND setting = boot_val
		ORDER BY 1`)
	if err != nil {
		return err
	}
	set, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	r.About = [][]string{
		{"", ""},
		{"date", r.Date.Format(time.RFC3339)},
		{"machine", fmt.Sprintf("%s, %d cores, %s", cpuModel(), runtime.NumCPU(), kernel())},
		{"load before", firstLine("/proc/loadavg")},
		{"PostgreSQL", version},
		{"settings", strings.Join(set, ", ")},
		{"Go", runtime.Version()},
		{"outbox", commit()},
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			switch dep.Path {
			case "github.com/jackc/pgx/v5", "github.com/riverqueue/river", "github.com/ThreeDotsLabs/watermill-sql/v4":
				r.About = append(r.About, []string{filepath.Base(strings.TrimSuffix(strings.TrimSuffix(dep.Path, "/v5"), "/v4")), dep.Version})
			}
		}
	}
	r.About = append(r.About, []string{"rounds", fmt.Sprintf("%d of %v for each contender, in turns; medians of the ratios within a round", b.rounds, b.round)})
	r.printf("# outbox beside its peers\n\n")
	r.table(r.About)
	return nil
}

func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty", "--abbrev=12").Output()
	if err != nil {
		return "not in git"
	}
	return strings.TrimSpace(string(out))
}

func firstLine(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return "not known"
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func kernel() string {
	return strings.TrimSpace(runtime.GOOS + " " + strings.TrimSuffix(firstLine("/proc/sys/kernel/osrelease"), "not known"))
}

// writeRaw leaves the raw results behind.
func (r *report) writeRaw(file string) error {
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}
