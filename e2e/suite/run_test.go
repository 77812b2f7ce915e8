package suite

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// outcomes are the results' names and how they ended, for comparing.
func outcomes(results []Result) string {
	var b strings.Builder
	for _, r := range results {
		b.WriteString(r.Name + " " + string(r.Status) + ": " + r.Reason + "\n")
	}
	return b.String()
}

func TestACaseTakesNothingWithIt(t *testing.T) {
	var cleaned []string
	clean := func(t *T, name string) { t.Cleanup(func(context.Context) { cleaned = append(cleaned, name) }) }
	cases := []Case{
		{Name: "passes", Run: func(context.Context, *T) {}},
		{Name: "panics", Run: func(_ context.Context, t *T) { clean(t, "of a panic"); panic("on purpose") }},
		{Name: "fails at once", Run: func(_ context.Context, t *T) {
			clean(t, "of a failure")
			t.Fatalf("no %d", 1)
			panic("not here")
		}},
		{Name: "fails twice", Run: func(_ context.Context, t *T) { t.Errorf("first"); t.Errorf("second") }},
		{Name: "skipped", Run: func(_ context.Context, t *T) { clean(t, "of a skip"); t.Skipf("no SCTP sockets"); panic("not here") }},
		{Name: "skipped after a failure", Run: func(_ context.Context, t *T) { t.Errorf("wrong"); t.Skipf("too late") }},
		{Name: "ends when told to", Limit: 10 * time.Millisecond, Run: func(ctx context.Context, t *T) {
			clean(t, "second")
			clean(t, "first")
			<-ctx.Done()
			t.Fatalf("waited: %v", ctx.Err())
		}},
		{Name: "its clean-up fails", Run: func(_ context.Context, t *T) {
			clean(t, "after a failed clean-up")
			t.Cleanup(func(context.Context) { t.Fatalf("cannot clean up") })
		}},
		{Name: "passes too", Run: func(context.Context, *T) {}},
	}
	results := Runner{Suite: "ours", Logs: t.TempDir()}.Run(t.Context(), cases)
	want := `passes passed: 
panics failed: panic: on purpose
fails at once failed: no 1
fails twice failed: first
skipped skipped: no SCTP sockets
skipped after a failure failed: wrong
ends when told to failed: waited: context deadline exceeded
its clean-up fails failed: cannot clean up
passes too passed: 
`
	if got := outcomes(results); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	const order = "of a panic, of a failure, of a skip, first, second, after a failed clean-up"
	if got := strings.Join(cleaned, ", "); got != order {
		t.Errorf("cleaned up: %s; want: %s", got, order)
	}
	for _, r := range results {
		if _, err := os.Stat(r.Log); err != nil {
			t.Errorf("%s: its log: %v", r.Name, err)
		}
	}
	log, _ := os.ReadFile(results[1].Log)
	if !strings.Contains(string(log), "run_test.go") {
		t.Errorf("the log of a panic does not say where: %s", log)
	}
}

func TestFocusSelectsAndAnInterruptEndsTheRest(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	cases := []Case{
		{Name: "one", Run: func(_ context.Context, t *T) { interrupt(); t.Errorf("interrupted") }},
		{Name: "two", Run: func(context.Context, *T) { panic("not selected") }},
		{Name: "once more", Run: func(context.Context, *T) { panic("not reached") }},
	}
	var progress bytes.Buffer
	r := Runner{Suite: "ours", Logs: t.TempDir(), Focus: regexp.MustCompile("ours: on"), Progress: &progress}
	const want = "one failed: interrupted\nonce more failed: the run was interrupted\n"
	if got := outcomes(r.Run(ctx, cases)); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if !strings.Contains(progress.String(), "ours: one: failed") {
		t.Errorf("progress:\n%s", progress.String())
	}
}

func TestTableCountsBySuiteAndNamesWhatDidNotPass(t *testing.T) {
	var out bytes.Buffer
	Table(&out, []Result{
		{Suite: "NetworkPolicy", Name: "a", Status: Passed, Time: 90 * time.Second},
		{Suite: "NetworkPolicy", Name: "b [Feature:SCTP]", Status: Skipped, Reason: "this kernel has no SCTP sockets"},
		{Suite: "ours", Name: "c", Status: Failed, Reason: "one line\nand another", Time: 1234 * time.Millisecond, Log: "log/c.log"},
		{Suite: "NetworkPolicy", Name: "d", Status: Passed, Time: time.Second},
		{Suite: "ours", Name: "e", Status: Skipped},
	})
	const want = `suite          passed  failed  skipped       time
NetworkPolicy       2       0        1      1m31s
ours                0       1        1       1.2s
all                 2       1        2    1m32.2s

Skipped:
  NetworkPolicy: b [Feature:SCTP]
      this kernel has no SCTP sockets
  ours: e
      no reason was given

Failed:
  ours: c
      one line
      and another
      log: log/c.log
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}
