package world_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// programs is a folder with those of the node.
func programs(t *testing.T) string {
	t.Helper()
	return nettest.Programs(t, map[string]string{"postern": "plugin", "policyd": "policyd"})
}

// The world's node is the test's own network namespace, so there is one test, with one backend.
func TestAPodIsAttachedGuardedAndReached(t *testing.T) {
	nettest.Need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	n, err := world.New(ctx, table.Env{Bin: programs(t), Dir: t.TempDir()}, "nft")
	if err != nil {
		t.Fatal(err)
	}
	pod := world.Pod{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web"},
		Ports: []world.Port{{Host: 8080, Container: 80, Protocol: "tcp"}}}
	if err := n.Write("pod-web", pod.Object()); err != nil {
		t.Fatal(err)
	}
	policyd, err := n.StartPolicyd(ctx, "--pprof")
	if err != nil {
		t.Fatal(err)
	}
	if err := policyd.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	addrs, err := n.Attach(ctx, pod)
	if err != nil || len(addrs) != 1 || !world.PodRange.Contains(addrs[0]) {
		t.Fatalf("the pod has %v, %v; want one address of %s", addrs, err, world.PodRange)
	}
	reach(t, pod, addrs[0])
	for _, page := range []string{"/metrics", "/debug/pprof/"} {
		if got := get(t, policyd.URL+page); !strings.Contains(got, "go") {
			t.Errorf("%s: %s", page, got)
		}
	}
	if err := errors.Join(n.Detach(ctx, pod), n.RemoveSandbox(pod.Sandbox()), policyd.Stop()); err != nil {
		t.Error(err)
	}
}

// reach connects to the pod from the machine outside.
func reach(t *testing.T, pod world.Pod, addr netip.Addr) {
	t.Helper()
	var listener net.Listener
	err := world.In(pod.Path(), func() (err error) {
		listener, err = net.Listen("tcp4", ":80")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, target := range []string{addr.String() + ":80", world.NodeAddress.String() + ":8080"} {
		err := world.In(world.SandboxPath(world.Outside), func() error {
			conn, err := net.DialTimeout("tcp4", target, 10*time.Second)
			if err != nil {
				return err
			}
			return conn.Close()
		})
		if err != nil {
			t.Errorf("from the machine outside: %v", err)
		}
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	answer, err := http.Get(url)
	if err != nil {
		return fmt.Sprint(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		return fmt.Sprint(answer.Status, err)
	}
	return string(text)
}

// A thread that stays in a sandbox keeps its links for ever. The first thread of a process stays when its goroutine ends, so
// it is looked at, after each of many sandboxes.
func TestTheFirstThreadStaysInNoSandbox(t *testing.T) {
	nettest.Need(t)
	var n world.Node
	for i := range 200 {
		name := fmt.Sprintf("thread-%d", i)
		path, err := n.Sandbox(name)
		if err != nil {
			t.Fatal(err)
		}
		var sandbox unix.Stat_t
		if err := errors.Join(unix.Stat(path, &sandbox), n.RemoveSandbox(name)); err != nil {
			t.Fatal(err)
		}
		first, err := os.Readlink(fmt.Sprintf("/proc/self/task/%d/ns/net", os.Getpid()))
		if err != nil || first == fmt.Sprintf("net:[%d]", sandbox.Ino) {
			t.Fatalf("sandbox %d: the first thread is in %s, %v", i, first, err)
		}
	}
}
