package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/isolate"
)

// The test's program is also the one that runs a benchmark in namespaces of its own.
func TestMain(m *testing.M) {
	if isolate.Inside() {
		os.Exit(run(context.Background(), fakes(), os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// fakes are benchmarks that hold, fall short, break, and write half of a report before they break.
func fakes() []table.Bench {
	bench := func(row int, name string, ours float64, err error) table.Bench {
		return table.Bench{Name: name, Rows: []int{row}, Run: func(ctx context.Context, env table.Env) (table.Report, error) {
			env.Say("row %d with %s", row, env.Backends)
			link := exec.CommandContext(ctx, "ip", "link", "add", "mine", "type", "veth", "peer", "name", "theirs")
			if out, err := link.CombinedOutput(); err != nil {
				return table.Report{}, errors.Join(err, errors.New(string(out))) // somebody was here before
			}
			return table.Report{Lines: []table.Line{{Row: row, Backend: env.Backends[0], What: name,
				Ours: []float64{ours, ours}, Theirs: []float64{1, 1}, Mark: table.AtMost(1)}}}, err
		}}
	}
	return []table.Bench{
		bench(1, "breaks", 0.5, errors.New("out of luck")), bench(3, "holds", 0.5, nil), bench(5, "short", 2, nil),
		{Name: "part", Run: func(context.Context, table.Env) (table.Report, error) { panic("nobody asked for it") }},
	}
}

// try runs the program, and returns its exit status, what it printed, and the folder of its results.
func try(t *testing.T, args ...string) (code int, stdout, stderr, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces of its own")
	}
	var out, progress bytes.Buffer
	dir = t.TempDir()
	code = run(t.Context(), fakes(), append(args, "-dir", dir, "-bin", dir), &out, &progress)
	t.Logf("exit status %d\n%s%s", code, out.String(), progress.String())
	return code, out.String(), progress.String(), dir
}

func TestALineThatHoldsIsExitStatusZero(t *testing.T) {
	code, out, progress, dir := try(t, "-rows", "3", "-backend", "legacy")
	if code != 0 || !strings.Contains(out, "holds (legacy)") || !strings.Contains(progress, "holds legacy: row 3 with [legacy]\n") {
		t.Errorf("exit status %d", code)
	}
	var result struct {
		Lines []table.Line
		Facts table.Facts
	}
	text, err := os.ReadFile(filepath.Join(dir, resultFile))
	if err == nil {
		err = json.Unmarshal(text, &result)
	}
	if err != nil || len(result.Lines) != 1 || len(result.Lines[0].Ours) != 2 || result.Facts.Kernel == "" {
		t.Errorf("the results are %s, error %v", text, err)
	}
	if _, err := os.Stat(filepath.Join(dir, ratiosFile)); err != nil {
		t.Error(err)
	}
}

func TestALineThatFallsShortIsExitStatusOne(t *testing.T) {
	if code, out, _, _ := try(t, "-rows", "5"); code != 1 || !strings.Contains(out, "FALLS SHORT: row 5, short (nft)") {
		t.Errorf("exit status %d", code)
	}
}

func TestABenchmarkThatBreaksIsToldAndDoesNotStopTheOthers(t *testing.T) {
	code, out, _, _ := try(t)
	if code != 1 || !strings.Contains(out, "FAILED: breaks with nft: exit status 1; its last words: bench: out of luck") {
		t.Errorf("exit status %d", code)
	}
	for _, line := range []string{"breaks (nft)", "holds (nft)", "holds (legacy)", "short (nft)"} {
		if !strings.Contains(out, line) {
			t.Errorf("the table lacks %s", line)
		}
	}
}

func TestAnInterruptedRunSaysSo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces of its own")
	}
	if code := run(ctx, fakes(), []string{"-dir", t.TempDir()}, io.Discard, io.Discard); code != 130 {
		t.Errorf("exit status %d", code)
	}
}

func TestRowsThatDoNotDependOnTheBackendAreMeasuredOnce(t *testing.T) {
	bench := table.Bench{Rows: []int{1, 2, 3}}
	o := options{rows: map[int]bool{1: true, 3: true}, backends: []string{"nft", "legacy"}}
	if got := o.rowsOf(bench, "nft"); !slices.Equal(got, []int{1, 3}) {
		t.Errorf("with nft: %v", got)
	}
	if got := o.rowsOf(bench, "legacy"); !slices.Equal(got, []int{3}) {
		t.Errorf("with legacy: %v", got)
	}
	o.backends = []string{"legacy"}
	if got := o.rowsOf(bench, "legacy"); !slices.Equal(got, []int{1, 3}) {
		t.Errorf("with legacy alone: %v", got)
	}
}

func TestAQuickRunHasOneBackendUnlessItIsToldOtherwise(t *testing.T) {
	for _, c := range []struct{ args, want []string }{
		{nil, []string{"nft", "legacy"}},
		{[]string{"-quick"}, []string{"nft"}},
		{[]string{"-quick", "-backend", "both"}, []string{"nft", "legacy"}},
		{[]string{"-backend", "legacy"}, []string{"legacy"}},
	} {
		if o, err := parse(fakes(), c.args, io.Discard); err != nil || !slices.Equal(o.backends, c.want) {
			t.Errorf("%q: %v, want %v, error %v", c.args, o.backends, c.want, err)
		}
	}
}

func TestRowsAreReadWithBlanksOrCommas(t *testing.T) {
	for list, want := range map[string]map[int]bool{
		"": {1: true, 3: true, 5: true}, "3": {3: true}, " 1  5 ": {1: true, 5: true}, "1,5": {1: true, 5: true},
	} {
		if got, err := wanted(list, fakes()); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, error %v", list, got, err)
		}
	}
}

func TestWhatCannotBeDoneIsRefused(t *testing.T) {
	for _, args := range [][]string{
		{"-rows", "2"}, {"-rows", "x"}, {"-backend", "ebpf"}, {"1", "2"}, {"-record", "docs", "-quick"},
		{"-record", "docs", "-rows", "3"}, {"-record", "docs", "-backend", "nft"}, {"-nonsense"},
	} {
		if code := run(t.Context(), fakes(), args, io.Discard, io.Discard); code != 2 {
			t.Errorf("%q: exit status %d, want 2", args, code)
		}
	}
}

func TestAPageShowsTheRunThatIsRecorded(t *testing.T) {
	folder := t.TempDir()
	page, err := os.ReadFile("../docs/" + pageFile)
	if err == nil {
		err = os.WriteFile(filepath.Join(folder, pageFile), page, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	measured := table.Line{Row: 1, What: "something that is measured", Ours: []float64{1}}
	result := table.Judge(table.Facts{}, table.Report{Lines: []table.Line{measured}}, nil)
	if err := record(folder, result); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(folder, pageFile))
	if err != nil || !bytes.Contains(got, []byte("| 1 | "+measured.What+" |")) || !bytes.Contains(got, []byte("("+ratiosFile+")")) {
		t.Errorf("error %v; the page is\n%s", err, got)
	}
	if _, err := os.Stat(filepath.Join(folder, ratiosFile)); err != nil {
		t.Error(err)
	}
	result.Failed = []string{"something broke"}
	if err := record(folder, result); err == nil {
		t.Error("a run in which something broke is recorded")
	}
}

func TestLinesAreCutWhereTheyEnd(t *testing.T) {
	var out bytes.Buffer
	s := (&lines{out: &out, start: time.Now()}).of("cni")
	for _, piece := range []string{"one\ntw", "o\n", "\nthree"} {
		if _, err := s.Write([]byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	s.end()
	var got []string
	for line := range strings.Lines(out.String()) {
		_, rest, _ := strings.Cut(line, "] ")
		got = append(got, rest)
	}
	if want := []string{"cni: one\n", "cni: two\n", "cni: \n", "cni: three\n"}; !slices.Equal(got, want) || s.last != "three" {
		t.Errorf("got %q, last %q", got, s.last)
	}
}
