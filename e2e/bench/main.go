// Command bench measures postern beside the plugins that people chain today, and beside floors that do the bare work of the
// kernel: `make bench`, which builds all sides and then calls it.
//
// It measures nothing itself. For each benchmark and each backend of iptables it runs itself again in network, mount and PID
// namespaces of its own, with an empty /run; that process is a benchmark's node, and goes with all that it made. What the
// benchmarks found is one table, JSON with every sample, plots, and with -record the page e2e/docs/performance.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/bench/cni"
	"github.com/postern-cni/postern/e2e/bench/control"
	"github.com/postern-cni/postern/e2e/bench/latency"
	"github.com/postern-cni/postern/e2e/bench/packets"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/isolate"
)

// benches are all there are, in the order in which they run; those without rows are parts that another one starts.
func benches() []table.Bench {
	return []table.Bench{
		cni.Bench(),
		packets.Bench(),
		control.Bench(),
		latency.Bench(startSide), latency.Large(), latency.Empty(),
	}
}

// onBoth are the rows that are measured with both backends of iptables; the others do not depend on it, and are measured with the
// first.
var onBoth = []int{3, 4, 7, 8, 13, 14}

func main() {
	if is, err := latency.Prober(); is {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, benches(), os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options are what the flags say.
type options struct {
	benches  []table.Bench
	rows     map[int]bool
	backends []string
	quick    bool
	bin, dir string
	record   string // the folder of the page, or empty
	child    string // the benchmark that this process is to run, in namespaces of its own
}

func run(ctx context.Context, benches []table.Bench, args []string, stdout, stderr io.Writer) int {
	o, err := parse(benches, args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(stderr, "bench:", err)
		return 2
	case o.child != "":
		err = o.runChild(ctx, stdout)
	default:
		err = o.runAll(ctx, stdout, stderr)
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "bench: interrupted; nothing is left behind")
		return 130
	case err != nil:
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

func parse(benches []table.Bench, args []string, stderr io.Writer) (options, error) {
	o := options{benches: benches}
	var rows, backend string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&rows, "rows", "", `the rows to measure, such as "1 2 13"; all, if it is empty`)
	flags.StringVar(&backend, "backend", "", "of iptables: nft, legacy or both; if it is empty, both, and nft with -quick")
	flags.BoolVar(&o.quick, "quick", false, "few rounds, small clusters and one backend: three minutes for everything")
	flags.StringVar(&o.bin, "bin", "bin/bench", "folder with the programs of all sides")
	flags.StringVar(&o.dir, "dir", "bin/bench/run", "folder to write results, plots and logs in")
	flags.StringVar(&o.record, "record", "", "folder whose performance.md is to show this run; it must be a full one")
	flags.StringVar(&o.child, "child", "", "not for users: run this benchmark here, as init of new namespaces")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("%q: there are flags alone: rows are given as -rows \"1 2\"", flags.Args())
	}
	var err error
	if o.rows, err = wanted(rows, benches); err != nil {
		return o, err
	}
	switch {
	case backend == "nft", backend == "legacy":
		o.backends = []string{backend}
	case backend == "" && o.quick:
		o.backends = []string{"nft"}
	case backend == "", backend == "both":
		o.backends = []string{"nft", "legacy"}
	default:
		return o, fmt.Errorf("-backend %s: must be nft, legacy or both", backend)
	}
	if o.record != "" && (rows != "" || len(o.backends) < 2 || o.quick) {
		return o, errors.New("-record: the page shows full runs alone: leave out -rows, -backend and -quick")
	}
	for _, folder := range []*string{&o.bin, &o.dir} {
		if *folder, err = filepath.Abs(*folder); err != nil {
			return o, err
		}
	}
	return o, nil
}

// wanted reads numbers of rows; none are all that there are.
func wanted(list string, all []table.Bench) (map[int]bool, error) {
	known := map[int]bool{}
	for _, b := range all {
		for _, row := range b.Rows {
			known[row] = true
		}
	}
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ' ' || r == ',' })
	if len(words) == 0 {
		return known, nil
	}
	rows := map[int]bool{}
	for _, word := range words {
		row, err := strconv.Atoi(word)
		if err != nil || !known[row] {
			return nil, fmt.Errorf("-rows %q: there is no row %s", list, word)
		}
		rows[row] = true
	}
	return rows, nil
}

// rowsOf are the rows of a benchmark that are wanted with a backend.
func (o options) rowsOf(b table.Bench, backend string) []int {
	var rows []int
	for _, row := range b.Rows {
		if o.rows[row] && (backend == o.backends[0] || slices.Contains(onBoth, row)) {
			rows = append(rows, row)
		}
	}
	return rows
}

// runAll runs what is wanted, one after the other, and tells what came out.
func (o options) runAll(ctx context.Context, stdout, stderr io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, for namespaces of its own: run it with sudo")
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	start, say := time.Now(), progress(stderr)
	var all table.Report
	var failed []string
	for _, b := range o.benches {
		for _, backend := range o.backends {
			rows := o.rowsOf(b, backend)
			if len(rows) == 0 || ctx.Err() != nil {
				continue
			}
			report, err := o.runBench(ctx, b.Name, backend, rows, say)
			all.Lines, all.Curves = append(all.Lines, report.Lines...), append(all.Curves, report.Curves...)
			if err != nil {
				failed = append(failed, fmt.Sprintf("%s with %s: %v", b.Name, backend, err))
				say.Say("%s", failed[len(failed)-1])
			}
		}
	}
	if err := o.tell(table.Judge(o.facts(ctx, start), all, failed), stdout); err != nil || len(failed) == 0 {
		return err
	}
	return fmt.Errorf("%d benchmarks broke; what they wrote is in %s", len(failed), o.dir)
}

// runChild is what the process in namespaces of its own does: one benchmark.
func (o options) runChild(ctx context.Context, stdout io.Writer) error {
	if !isolate.Inside() {
		return errors.New("-child: only as init of namespaces of its own")
	}
	if err := isolate.Enter(); err != nil {
		return err
	}
	for _, b := range o.benches {
		if b.Name != o.child {
			continue
		}
		report, err := b.Run(ctx, table.Env{
			Quick: o.quick, Rows: o.rows, Backends: o.backends, Bin: o.bin, Dir: o.dir,
			Say: func(format string, args ...any) { fmt.Fprintf(stdout, format+"\n", args...) },
		})
		return errors.Join(err, writeReport(filepath.Join(o.dir, reportFile), report))
	}
	return fmt.Errorf("-child %s: there is no such benchmark", o.child)
}
