package testnode

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/postern-cni/postern/pkg/nettest"
)

func types100GC(p *Pod) types.GCAttachment {
	return types.GCAttachment{ContainerID: p.ContainerID, IfName: p.IfName}
}

// Policyd is a running daemon.
type Policyd struct {
	cmd  *exec.Cmd
	log  lockedBuffer
	done chan struct{}
}

// Policyd starts `policyd run --from` on the node's folder of manifests, and waits until what the folder holds is in force.
func (n *Node) Policyd(t testing.TB, args ...string) *Policyd {
	t.Helper()
	d := n.StartPolicyd(t, args...)
	n.Settle(t)
	return d
}

// StartPolicyd starts policyd and does not wait for anything. Its log is shown if the test fails.
func (n *Node) StartPolicyd(t testing.TB, args ...string) *Policyd {
	t.Helper()
	return n.StartProgram(t, nettest.Build(t, "policyd"), args...)
}

// StartProgram is [Node.StartPolicyd] with another build of the daemon.
func (n *Node) StartProgram(t testing.TB, program string, args ...string) *Policyd {
	t.Helper()
	d := &Policyd{done: make(chan struct{})}
	all := append([]string{"run", "--from", n.Manifests, "--state-dir", n.StateDir, "--iptables-backend", n.opts.Backend,
		"--listen", "127.0.0.1:0"}, args...)
	d.cmd = n.NS.Command(context.Background(), program, all...)
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	if err := d.cmd.Start(); err != nil {
		t.Fatalf("start policyd: %v", err)
	}
	n.daemon = d
	go func() {
		defer close(d.done)
		_ = d.cmd.Wait() // how it ended is the test's business: see Stop and Log
	}()
	t.Cleanup(func() {
		d.Stop(t, syscall.SIGKILL)
		if t.Failed() {
			t.Logf("policyd's log:\n%s", d.Log())
		}
	})
	return d
}

// StopPolicyd ends the daemon that was started last; what it wrote stays in force, and nobody repairs it.
func (n *Node) StopPolicyd(t testing.TB) {
	t.Helper()
	n.daemon.Stop(t, syscall.SIGTERM)
}

// Stop ends the daemon with a signal and waits until it is gone.
func (d *Policyd) Stop(t testing.TB, sig syscall.Signal) {
	t.Helper()
	select {
	case <-d.done:
		return
	default:
	}
	if err := d.cmd.Process.Signal(sig); err != nil && !strings.Contains(err.Error(), "finished") {
		t.Errorf("signal policyd: %v", err)
	}
	select {
	case <-d.done:
	case <-time.After(20 * time.Second):
		t.Errorf("policyd has not ended 20 s after %v", sig)
	}
}

// Log returns what the daemon has written so far.
func (d *Policyd) Log() string { return d.log.String() }

// Settle waits until what the folder of manifests holds now is in force (policyd status --wait).
func (n *Node) Settle(t testing.TB) {
	t.Helper()
	policyd := nettest.Build(t, "policyd")
	nettest.Eventually(t, 30*time.Second, "policyd status --wait", func() error {
		_, err := n.NS.Try(policyd, "status", "--wait", "--state-dir", n.StateDir)
		return err
	})
}

// lockedBuffer lets a test read what a process is still writing.
type lockedBuffer struct {
	sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.Lock()
	defer b.Unlock()
	return b.Buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.Lock()
	defer b.Unlock()
	return b.Buffer.String()
}
