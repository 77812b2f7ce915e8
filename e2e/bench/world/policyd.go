package world

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	listen      = "127.0.0.1:9478" // policyd's own default: the node is nobody else's
	settleLimit = 5 * time.Minute  // for policyd to enforce what there is, in a large cluster on a busy machine
	stopLimit   = 20 * time.Second // for policyd to end after SIGTERM
	startPause  = 5 * time.Millisecond
)

// Policyd is a running daemon.
type Policyd struct {
	Pid int
	URL string // its local port: /metrics, and /debug/pprof/ with --pprof
	Log string // file that it writes

	node  *Node
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
}

// StartPolicyd starts policyd and does not wait for anything: see [Policyd.Settle]. Objects come from the folder that
// [Node.Write] writes unless the flags say --from or --kubeconfig. It ends with the process, or when it is told to.
func (n *Node) StartPolicyd(_ context.Context, flags ...string) (*Policyd, error) {
	n.started++
	d := &Policyd{node: n, URL: "http://" + listen, ended: make(chan struct{}),
		Log: filepath.Join(n.Dir, fmt.Sprintf("policyd-%s-%d.log", n.Backend, n.started))}
	log, err := os.Create(d.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := []string{"run", "--node", NodeName, "--state-dir", n.stateDir, "--iptables-backend", n.Backend, "--listen", listen}
	if !slices.ContainsFunc(flags, func(f string) bool {
		return strings.HasPrefix(f, "--from") || strings.HasPrefix(f, "--kubeconfig")
	}) {
		args = append(args, "--from", n.manifests)
	}
	d.cmd = exec.Command(n.program("policyd"), append(args, flags...)...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := n.In(d.cmd.Start); err != nil {
		return nil, fmt.Errorf("start policyd: %w", err)
	}
	d.Pid = d.cmd.Process.Pid
	go func() {
		defer close(d.ended)
		_ = d.cmd.Wait() // whoever misses it says so, with its log
	}()
	return d, nil
}

func (n *Node) program(name string) string { return filepath.Join(n.Bin, name) }

// Settle waits until what the folder or the API server holds now is in force: policyd status --wait.
func (d *Policyd) Settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		status := exec.CommandContext(ctx, d.node.program("policyd"), "status", "--wait", "--state-dir", d.node.stateDir,
			"--timeout", settleLimit.String())
		out, err := status.CombinedOutput()
		if err == nil {
			return nil
		}
		select {
		case <-d.ended:
			return fmt.Errorf("policyd has ended, and its log says why: %s: %s", d.Log, d.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("wait for policyd: %w: %s", err, out)
		case <-time.After(startPause): // it has only just been started: no socket yet
		}
	}
}

// lastWords of its log.
func (d *Policyd) lastWords() string {
	const most = 1000
	text, err := os.ReadFile(d.Log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-most):])
}

// Stop ends policyd as its service manager does; what it wrote to the kernel stays in force.
func (d *Policyd) Stop() error {
	err := d.signal(syscall.SIGTERM, stopLimit)
	if err != nil {
		return errors.Join(err, d.Kill())
	}
	return nil
}

// Kill ends it at once.
func (d *Policyd) Kill() error { return d.signal(syscall.SIGKILL, stopLimit) }

func (d *Policyd) signal(sig syscall.Signal, limit time.Duration) error {
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end policyd: %w", err)
	}
	select {
	case <-d.ended:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("policyd has not ended %s after the signal %s; its log: %s", limit, sig, d.Log)
	}
}
