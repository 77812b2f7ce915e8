package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/isolate"
)

// reportFile is where a child writes what it found, in its folder.
const reportFile = "report.json"

const (
	// quickLimit and fullLimit are for a benchmark that hangs, and not how long one should take.
	quickLimit = 5 * time.Minute
	fullLimit  = time.Hour
	stopLimit  = 10 * time.Second // for a child to end after SIGTERM
)

// runBench runs one benchmark in namespaces of its own, and in a folder of its own, in which its logs stay.
func (o options) runBench(ctx context.Context, name, backend string, rows []int, out *lines) (table.Report, error) {
	dir := filepath.Join(o.dir, name+"-"+backend)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return table.Report{}, err
	}
	limit := fullLimit
	if o.quick {
		limit = quickLimit
	}
	args := childArgs(name, table.Env{Quick: o.quick, Backends: []string{backend}, Bin: o.bin, Dir: dir}, rows)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	child := out.of(name + " " + backend)
	code, err := isolate.Self{Args: args, Stdout: child, Stderr: child, Grace: stopLimit}.Run(ctx)
	child.end()
	report, readErr := readReport(filepath.Join(dir, reportFile))
	switch {
	case err != nil:
		return report, err
	case ctx.Err() != nil:
		return report, fmt.Errorf("%w after %s at most", ctx.Err(), limit)
	case code != 0:
		return report, fmt.Errorf("exit status %d; its last words: %s", code, child.last)
	}
	return report, readErr
}

// childArgs are the arguments of a process that runs one benchmark in namespaces of its own.
func childArgs(name string, env table.Env, rows []int) []string {
	args := []string{"-child", name, "-backend", env.Backends[0], "-bin", env.Bin, "-dir", env.Dir,
		"-rows", strings.Trim(fmt.Sprint(rows), "[]")}
	if env.Quick {
		args = append(args, "-quick")
	}
	return args
}

// startSide runs a benchmark that is part of another one, and is started by it: it speaks with that through its standard input.
func startSide(ctx context.Context, name string, env table.Env, stdin *os.File) error {
	if err := os.MkdirAll(env.Dir, 0o755); err != nil {
		return err
	}
	code, err := isolate.Self{Args: childArgs(name, env, slices.Sorted(maps.Keys(env.Rows))),
		Stdin: stdin, Stdout: os.Stdout, Stderr: os.Stderr, Grace: stopLimit}.Run(ctx)
	if err == nil && code != 0 {
		err = fmt.Errorf("%s ended with exit status %d", name, code)
	}
	return err
}

func writeReport(file string, report table.Report) error {
	text, err := json.Marshal(report)
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return os.WriteFile(file, text, 0o644)
}

func readReport(file string) (table.Report, error) {
	var report table.Report
	text, err := os.ReadFile(file)
	if err != nil {
		return report, fmt.Errorf("read the report: %w", err)
	}
	if err := json.Unmarshal(text, &report); err != nil {
		return report, fmt.Errorf("read the report %s: %w", file, err)
	}
	return report, nil
}

// lines writes lines of several sources, each with the time since the start and the source's name.
type lines struct {
	mu    sync.Mutex
	out   io.Writer
	start time.Time
}

func progress(out io.Writer) *lines { return &lines{out: out, start: time.Now()} }

// Say writes a line of the program itself.
func (l *lines) Say(format string, args ...any) { l.write("bench", fmt.Sprintf(format, args...)) }

func (l *lines) write(name, line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.out, "[%6.1fs] %s: %s\n", time.Since(l.start).Seconds(), name, line)
}

// of is a writer for one source.
func (l *lines) of(name string) *source { return &source{lines: l, name: name} }

// source cuts what is written into lines.
type source struct {
	lines *lines
	name  string
	rest  []byte
	last  string // the last line that was not empty
}

// Write is called by one goroutine: os/exec has one pipe for a command whose stdout and stderr are the same writer.
func (s *source) Write(p []byte) (int, error) {
	s.rest = append(s.rest, p...)
	for {
		line, rest, whole := bytes.Cut(s.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		s.rest = rest
		s.put(string(line))
	}
}

// end writes a last line that was not ended.
func (s *source) end() {
	if len(s.rest) > 0 {
		s.put(string(s.rest))
		s.rest = nil
	}
}

func (s *source) put(line string) {
	s.lines.write(s.name, line)
	if strings.TrimSpace(line) != "" {
		s.last = line
	}
}
