package iptables

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/postern-cni/postern/pkg/rule"
)

// Backend is one of the two implementations of iptables; each sees its own rules alone.
type Backend string

const (
	NFT    Backend = "nft"
	Legacy Backend = "legacy"
)

// Errors that callers decide on; each comes wrapped with the command's own words.
var (
	ErrLocked     = errors.New("another program holds the xtables lock")
	ErrMissingSet = errors.New("a set that a rule names does not exist")
	ErrRefused    = errors.New("the rules were refused")
)

// LineError is a restore that was refused because of one line of its text; nothing of that line's table has changed.
type LineError struct {
	Line int    // from 1
	Text string // the line
	Why  string // what iptables-restore says
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d, %q: %s", e.Line, e.Text, e.Why) }

// Is makes a LineError an [ErrRefused].
func (e *LineError) Is(target error) bool { return target == ErrRefused }

// DefaultWait is how long a restore waits for the xtables lock (legacy).
const DefaultWait = 5 * time.Second

// Tables runs the programs of one backend and family in the caller's network namespace.
type Tables struct {
	Backend Backend
	Family  rule.Family
	Wait    time.Duration // for the lock; DefaultWait if 0
	// Inherit are files that the child keeps open: locks that must not be free before it has ended.
	Inherit []*os.File
	// Watcher is told what of the changes it sees is ours; nil for none.
	Watcher *Watcher

	restore string   // the program
	list    []string // what lists a table, but for its name
}

// New finds the backend's programs. The error says which is missing.
func New(backend Backend, family rule.Family) (*Tables, error) {
	if backend != NFT && backend != Legacy {
		return nil, fmt.Errorf("iptables backend %q: nft and legacy are known", backend)
	}
	prefix := "iptables-"
	if family == rule.IPv6 {
		prefix = "ip6tables-"
	}
	// iptables-nft-save reads all tables to print one, and iptables-nft that one alone. With legacy, iptables-save takes no lock.
	lister, args := "", []string{"-S", "-t"}
	if backend == Legacy {
		lister, args = "-save", []string{"-t"}
	}
	programs := map[string]string{"-restore": "", lister: ""}
	for verb := range programs {
		name := prefix + string(backend) + verb
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, fmt.Errorf("find %s: %w; install iptables 1.8 or newer", name, err)
		}
		programs[verb] = path
	}
	return &Tables{Backend: backend, Family: family, restore: programs["-restore"],
		list: append([]string{programs[lister]}, args...)}, nil
}

// Restore runs text, as [Render] makes it, with --noflush. Empty text runs nothing.
func (t *Tables) Restore(ctx context.Context, text string) error {
	if text == "" {
		return nil
	}
	args := []string{"--noflush"}
	if t.Backend == Legacy {
		wait := t.Wait
		if wait == 0 {
			wait = DefaultWait
		}
		args = append(args, "-w", strconv.Itoa(max(1, int(wait/time.Second))))
	}
	write := t.Watcher.begin(t, text)
	_, err := t.run(ctx, t.restore, &input{text, write.started}, args...)
	write.ended(err == nil)
	if err != nil {
		return fmt.Errorf("%s: %w", t.restore, refine(err, text))
	}
	return nil
}

// Save reads our part of a table. Of one that is not there it is empty, and the table is not made.
func (t *Tables) Save(ctx context.Context, table rule.Table) (*Actual, error) {
	nothing := &Actual{Chains: map[string][]rule.Rule{}}
	if there, err := t.exists(table); err != nil || !there {
		return nothing, err
	}
	command := append(slices.Clone(t.list), string(table))
	out, err := t.run(ctx, command[0], nil, command[1:]...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(command, " "), err)
	}
	if t.Backend == NFT {
		out = "*" + string(table) + "\n" + out
	}
	if a := Parse(out, t.Family)[table]; a != nil {
		return a, nil
	}
	return nothing, nil // it went meanwhile
}

// exists asks whether a legacy table is there, since looking into it would make it, and every packet would pass through it from
// then on.
func (t *Tables) exists(table rule.Table) (bool, error) {
	if t.Backend != Legacy {
		return true, nil
	}
	names, err := legacyTables(t.Family)
	return slices.Contains(names, string(table)), err
}

// legacyTables are the names of the legacy tables that are there.
func legacyTables(family rule.Family) ([]string, error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if family == rule.IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the names of legacy tables: %w", err)
	}
	return strings.Fields(string(text)), nil
}

// commandError is a program that did not exit with 0.
type commandError struct {
	code   int
	stderr string
	err    error
}

func (e *commandError) Error() string { return fmt.Sprintf("%v: %s", e.err, e.stderr) }
func (e *commandError) Unwrap() error { return e.err }

// input is what a program reads; started is called with its process number before it can read any of that.
type input struct {
	text    string
	started func(pid int)
}

// run runs a program that dies with this one. The kernel sends Pdeathsig when the thread that forked ends, so the
// goroutine keeps its thread until the program has ended.
func (t *Tables) run(ctx context.Context, path string, stdin *input, args ...string) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, path, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.ExtraFiles = t.Inherit
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := feed(cmd, stdin); err != nil {
		return "", &commandError{cmd.ProcessState.ExitCode(), strings.TrimSpace(stderr.String()), err}
	}
	return stdout.String(), nil
}

// feed runs a command as its Run does, but calls stdin.started between the start and the first byte.
func feed(cmd *exec.Cmd, stdin *input) error {
	if stdin == nil {
		return cmd.Run()
	}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	stdin.started(cmd.Process.Pid)
	_, err = io.WriteString(pipe, stdin.text)
	if errors.Is(err, syscall.EPIPE) {
		err = nil // it ended before it had read all, and says why itself
	}
	err = cmp.Or(err, pipe.Close())
	return cmp.Or(cmd.Wait(), err)
}

// What the programs say. These are compiled when something has failed: the plugin is started for each pod, and seldom needs them.
const (
	lineNumber = `line:? (\d+)`
	noSet      = `Set \S+ doesn't exist`
)

// refine gives the errors that callers decide on a type. Exit status 4 is a resource problem, the lock among them.
func refine(err error, text string) error {
	var c *commandError
	if !errors.As(err, &c) {
		return err
	}
	switch {
	case c.code == 4 && strings.Contains(c.stderr, "xtables lock"):
		return fmt.Errorf("%w: %s", ErrLocked, c.stderr)
	case regexp.MustCompile(noSet).MatchString(c.stderr):
		return fmt.Errorf("%w: %s", ErrMissingSet, c.stderr)
	}
	if m := regexp.MustCompile(lineNumber).FindStringSubmatch(c.stderr); m != nil {
		n, _ := strconv.Atoi(m[1])
		if lines := strings.Split(text, "\n"); n >= 1 && n <= len(lines) {
			return &LineError{Line: n, Text: lines[n-1], Why: c.stderr}
		}
	}
	if c.code > 0 { // it was not killed
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}
