package suite

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Upstream is a part of Kubernetes' own end-to-end suite, which we did not write.
type Upstream struct {
	Focus string // a regular expression of ginkgo, matched with the whole text of a spec
	// Cannot are regular expressions of what cannot run, with the reasons, which the table shows.
	Cannot map[string]string
	Procs  int // how many specs run at the same time
}

// NoSCTP is why specs that open SCTP sockets cannot run; it is empty where they can.
func NoSCTP() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err != nil {
		return fmt.Sprintf("this kernel has no SCTP sockets: opening one says %q", err)
	}
	unix.Close(fd)
	return ""
}

// upstreamLimit is for one part.
const upstreamLimit = 60 * time.Minute

// Run runs the specs that the part and the runner's focus select.
func (r Runner) Upstream(ctx context.Context, u Upstream) []Result {
	began := time.Now()
	fail := func(err error) []Result {
		return []Result{{Suite: r.Suite, Name: "the run of ginkgo", Status: Failed, Reason: err.Error(), Time: time.Since(began)}}
	}
	folder := filepath.Join(r.Logs, strings.Map(fileName, r.Suite))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return fail(err)
	}
	all, err := r.specs(ctx, u.Focus, folder)
	if err != nil {
		return fail(err)
	}
	var run []string
	var results []Result
	for _, spec := range all {
		switch why := u.cannot(spec); {
		case r.Focus != nil && !r.Focus.MatchString(r.Suite+": "+spec):
		case why != "":
			results = append(results, Result{Suite: r.Suite, Name: spec, Status: Skipped, Reason: why})
		default:
			run = append(run, spec)
		}
	}
	if len(run) == 0 {
		return results
	}
	r.say("%s: %d specs, %d at a time ...\n", r.Suite, len(run), u.Procs)
	ran, err := r.ginkgo(ctx, u, run, folder)
	results = append(results, ran...)
	if err != nil && !AnyFailed(ran) { // else the table says what is wrong
		results = append(results, fail(err)...)
	}
	if missing := len(run) - len(ran); missing > 0 && err == nil {
		results = append(results, fail(fmt.Errorf("of %d specs that were to run, %d did not: see %s", len(run), missing, folder))...)
	}
	r.say("%s: took %s\n", r.Suite, seconds(time.Since(began)))
	return results
}

func (u Upstream) cannot(spec string) string {
	for expression, why := range u.Cannot {
		if why != "" && regexp.MustCompile(expression).MatchString(spec) {
			return why
		}
	}
	return ""
}

// specs lists what a focus selects, as JUnit names it, by a run that does nothing.
func (r Runner) specs(ctx context.Context, focus, folder string) ([]string, error) {
	report := filepath.Join(folder, "dry.xml")
	cmd := exec.CommandContext(ctx, r.program("e2e.test"), "--kubeconfig="+r.Cluster.Kubeconfig("admin"), "--provider=skeleton",
		"--ginkgo.dry-run", "--ginkgo.focus="+focus, "--ginkgo.junit-report="+report, "--ginkgo.no-color")
	cmd.Dir = folder
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list the specs of %s: %w: %s", r.Suite, err, tail(out))
	}
	file, err := os.Open(report)
	if err != nil {
		return nil, fmt.Errorf("list the specs of %s: %w", r.Suite, err)
	}
	defer file.Close()
	results, err := ReadJUnit(r.Suite, file)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, result := range results {
		names = append(names, result.Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("list the specs of %s: focus %q selects none", r.Suite, focus)
	}
	return names, nil
}

// labels are what JUnit's names have at their end and a spec's text has not.
var labels = regexp.MustCompile(` \[[^\]]*\]$`)

// ginkgo runs specs and reads the report. Its error is that of the run, which a failed spec makes too.
func (r Runner) ginkgo(ctx context.Context, u Upstream, specs []string, folder string) ([]Result, error) {
	report := filepath.Join(folder, "junit_01.xml")
	_ = os.Remove(report)
	args := []string{fmt.Sprintf("-procs=%d", u.Procs), "--no-color", "--timeout=" + upstreamLimit.String()}
	for _, spec := range specs {
		args = append(args, "--focus="+regexp.QuoteMeta(labels.ReplaceAllString(spec, "")))
	}
	args = append(args, r.program("e2e.test"), "--", "--kubeconfig="+r.Cluster.Kubeconfig("admin"), "--provider=skeleton",
		"--disable-log-dump", "--dump-logs-on-failure=false", "--report-dir="+folder)
	ctx, cancel := context.WithTimeout(ctx, upstreamLimit+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.program("ginkgo"), args...)
	cmd.Dir = folder
	// Interrupted once, all its processes delete their specs' namespaces and report; ginkgo itself does not tell the others. In a
	// group of their own they hear of it from here alone, and not from a terminal as well: twice means to leave all as it is.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	log, err := os.Create(filepath.Join(folder, "ginkgo.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = &progress{runner: r, to: log, all: len(specs), said: time.Now()}, log
	ran := cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // who has not ended with ginkgo; mostly nobody
	}
	file, err := os.Open(report)
	if err != nil {
		return nil, fmt.Errorf("%w; and there is no report (%v): see %s", ran, err, log.Name())
	}
	defer file.Close()
	results, err := ReadJUnit(r.Suite, file)
	if err != nil {
		return nil, err
	}
	for i := range results {
		results[i].Log = log.Name()
	}
	if ran != nil {
		return results, fmt.Errorf("ginkgo: %w: see %s", ran, log.Name())
	}
	return results, nil
}

// progress keeps ginkgo's output and says now and then how far it is: ginkgo prints a dot for each spec that passed.
type progress struct {
	runner Runner
	to     io.Writer
	all    int
	passed int
	said   time.Time
}

func (p *progress) Write(data []byte) (int, error) {
	p.passed += bytes.Count(data, []byte("•"))
	if time.Since(p.said) > 30*time.Second {
		p.runner.say("%s: %d of %d\n", p.runner.Suite, p.passed, p.all)
		p.said = time.Now()
	}
	return p.to.Write(data)
}

func (r Runner) program(name string) string { return filepath.Join(r.Cluster.Dir, "bin", name) }

func tail(out []byte) string {
	const most = 2000
	if len(out) > most {
		out = out[len(out)-most:]
	}
	return string(out)
}

// fileName keeps the characters of a name that a file's may have.
func fileName(c rune) rune {
	switch {
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-':
		return c
	}
	return '-'
}
