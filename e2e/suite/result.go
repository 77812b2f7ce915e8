package suite

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Status is how a case ended.
type Status string

const (
	Passed  Status = "passed"
	Failed  Status = "failed"
	Skipped Status = "skipped"
)

// Result is how one case of a suite ended, ours or upstream's.
type Result struct {
	Suite  string
	Name   string
	Status Status
	// Reason is the first failure, or why it was skipped.
	Reason string
	Time   time.Duration
	Log    string // a file, or empty
}

// AnyFailed reports whether a case failed.
func AnyFailed(results []Result) bool {
	for _, r := range results {
		if r.Status == Failed {
			return true
		}
	}
	return false
}

// count is a line of the table.
type count struct {
	suite                   string
	passed, failed, skipped int
	time                    time.Duration
}

func (c *count) add(r Result) {
	switch r.Status {
	case Passed:
		c.passed++
	case Failed:
		c.failed++
	case Skipped:
		c.skipped++
	}
	c.time += r.Time
}

// counts are the table's lines, in the order in which suites first appear, and the line of all together.
func counts(results []Result) (lines []*count, all count) {
	bySuite := map[string]*count{}
	all.suite = "all"
	for _, r := range results {
		line, known := bySuite[r.Suite]
		if !known {
			line = &count{suite: r.Suite}
			bySuite[r.Suite], lines = line, append(lines, line)
		}
		line.add(r)
		all.add(r)
	}
	return lines, all
}

// Table prints how the run ended: a line a suite, and below, by name, every case that failed or was skipped, with the reason.
func Table(w io.Writer, results []Result) {
	lines, all := counts(results)
	if len(lines) != 1 {
		lines = append(lines, &all)
	}
	width := len("suite")
	for _, l := range lines {
		width = max(width, len(l.suite))
	}
	fmt.Fprintf(w, "%-*s  passed  failed  skipped       time\n", width, "suite")
	for _, l := range lines {
		fmt.Fprintf(w, "%-*s  %6d  %6d  %7d  %9s\n", width, l.suite, l.passed, l.failed, l.skipped, seconds(l.time))
	}
	list(w, "Skipped", Skipped, results)
	list(w, "Failed", Failed, results)
}

// list prints the cases of one status. Failures come last in a run's output, where one looks first.
func list(w io.Writer, title string, status Status, results []Result) {
	first := true
	for _, r := range results {
		if r.Status != status {
			continue
		}
		if first {
			fmt.Fprintf(w, "\n%s:\n", title)
			first = false
		}
		fmt.Fprintf(w, "  %s: %s\n", r.Suite, r.Name)
		reason := r.Reason
		if reason == "" {
			reason = "no reason was given"
		}
		for line := range strings.Lines(strings.TrimSpace(reason)) {
			fmt.Fprintf(w, "      %s\n", strings.TrimRight(line, "\n"))
		}
		if r.Log != "" {
			fmt.Fprintf(w, "      log: %s\n", r.Log)
		}
	}
}

// seconds are precise enough for the table.
func seconds(d time.Duration) string { return d.Round(100 * time.Millisecond).String() }
