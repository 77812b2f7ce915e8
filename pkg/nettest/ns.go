package nettest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// nsDir is where ip-netns(8) keeps its names, so that `ip -n NAME` works in tests too.
	nsDir = "/run/netns"
	// selfPath names the scratch host: the namespace that the test process itself is in.
	selfPath = nsDir + "/self"
)

// NS is a network namespace with a name.
type NS struct {
	Name string // as ip netns lists it
	Path string // a bind mount of the namespace, for setns, nsenter or CNI_NETNS
}

// Self returns the scratch host, the namespace that the test process is in.
func Self(t testing.TB) *NS {
	t.Helper()
	Need(t)
	return &NS{Name: filepath.Base(selfPath), Path: selfPath}
}

// NewNS makes a network namespace with lo up, and removes its name when the test ends. If the name is taken, by a test
// that runs at the same time, the new one gets a number after it: use the Name of what is returned.
func NewNS(t testing.TB, name string) *NS {
	t.Helper()
	Need(t)
	ns := &NS{Name: name}
	for i := 2; ; i++ {
		ns.Path = filepath.Join(nsDir, ns.Name)
		file, err := os.OpenFile(ns.Path, os.O_CREATE|os.O_EXCL, 0o444)
		if err == nil {
			err = file.Close()
		}
		if errors.Is(err, fs.ErrExist) {
			ns.Name = fmt.Sprintf("%s-%d", name, i)
			continue
		}
		if err != nil {
			t.Fatalf("name namespace %s: %v", ns.Name, err)
		}
		break
	}
	t.Cleanup(func() { ns.remove(t) })
	if err := ns.create(); err != nil {
		t.Fatalf("create namespace %s: %v", ns.Name, err)
	}
	return ns
}

// create makes the namespace that the file at ns.Path will name.
func (ns *NS) create() error {
	return elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := bindNS(ns.Path); err != nil {
			return err
		}
		return upLoopback()
	})
}

// remove takes the name away; the namespace itself ends with the last process or socket in it. A test may have removed the
// name already, to see what happens then.
func (ns *NS) remove(t testing.TB) {
	if err := unix.Unmount(ns.Path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) &&
		!errors.Is(err, unix.ENOENT) {
		t.Errorf("unmount namespace %s: %v", ns.Name, err)
	}
	if err := os.Remove(ns.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove namespace %s: %v", ns.Name, err)
	}
}

// Remove takes the namespace's name away before the test ends, as a runtime does that deletes a sandbox.
func (ns *NS) Remove(t testing.TB) {
	t.Helper()
	ns.remove(t)
}

// Do runs fn in the namespace, on the caller's goroutine, so fn may call t.Fatal. Goroutines that fn starts are not in the
// namespace, but every socket that fn opens stays in it.
func (ns *NS) Do(t testing.TB, fn func()) {
	t.Helper()
	if err := ns.do(func() error { fn(); return nil }); err != nil {
		t.Fatal(err)
	}
}

// Enter runs fn in the namespace as [NS.Do] does, for callers outside of a test's own goroutine, which may not end the test.
func Enter(ns *NS, fn func()) error { return ns.do(func() error { fn(); return nil }) }

func (ns *NS) do(fn func() error) error {
	return elsewhere(func() error {
		fd, err := unix.Open(ns.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", ns.Name, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", ns.Name, err)
		}
		return nil
	}, fn)
}

// elsewhere locks the goroutine to its thread, moves the thread to another network namespace, runs fn there and brings the
// thread back. A thread that cannot be brought back stays locked and so ends with its goroutine; others are kept, for the
// end of a thread kills the children it started with Pdeathsig.
func elsewhere(move, fn func() error) error {
	runtime.LockOSThread()
	back, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open the thread's namespace: %w", err)
	}
	defer func() {
		if unix.Setns(back, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		unix.Close(back)
	}()
	if err := move(); err != nil {
		return err
	}
	return fn()
}

// bindNS mounts the calling thread's network namespace on path.
func bindNS(path string) error {
	file, err := os.OpenFile(path, os.O_CREATE, 0o444)
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the network namespace on %s: %w", path, err)
	}
	return nil
}

func upLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// Command returns a command that starts in the namespace. Its process is the program itself (nsenter executes it), so it
// can be signalled. Like any exec.Cmd it is the caller's to wait for.
func (ns *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + ns.Path, "--", name}, args...)...)
}

// Run runs a command in the namespace and returns what it printed, stdout and stderr together. The test ends if it fails.
func (ns *NS) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := ns.Try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Try runs a command in the namespace and returns what it printed; the error of one that failed has the output in it.
func (ns *NS) Try(name string, args ...string) (string, error) {
	out, err := ns.Command(context.Background(), name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("in %s: %s %s: %w: %s", ns.Name, name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// End is one end of a [Link].
type End struct {
	NS        *NS
	Name      string         // of the interface
	Addresses []netip.Prefix // IPv6 ones are usable at once: no duplicate address detection
}

// Prefixes parses addresses with their prefix lengths, for an [End]. It panics on a mistake.
func Prefixes(addresses ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addresses {
		out = append(out, netip.MustParsePrefix(a))
	}
	return out
}

// Link joins two namespaces with a veth pair, both ends up. It goes with the namespaces.
func Link(t testing.TB, a, b End) {
	t.Helper()
	if err := link(a, b); err != nil {
		t.Fatalf("link %s in %s to %s in %s: %v", a.Name, a.NS.Name, b.Name, b.NS.Name, err)
	}
}

func link(a, b End) error {
	peer, err := os.Open(b.NS.Path)
	if err != nil {
		return err
	}
	defer peer.Close()
	err = a.NS.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = a.Name
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: b.Name, PeerNamespace: netlink.NsFd(int(peer.Fd()))}
		return netlink.LinkAdd(veth)
	})
	if err != nil {
		return fmt.Errorf("create the veth: %w", err)
	}
	for _, end := range []End{a, b} {
		if err := end.NS.do(end.setUp); err != nil {
			return fmt.Errorf("set up %s: %w", end.Name, err)
		}
	}
	for _, end := range []End{a, b} {
		if err := end.NS.do(end.awaitUp); err != nil {
			return fmt.Errorf("wait for %s: %w", end.Name, err)
		}
	}
	return nil
}

// awaitUp waits until the end sends. The end that is set up first has no carrier then, and its queue swallows everything until the
// kernel has handled the carrier's coming: a worker does so up to a second later (net/core/link_watch.c), or whoever asks for the
// link's state. Without this, 33 of 40 first frames were lost.
func (e End) awaitUp() error {
	const limit, pause = 30 * time.Second, 2 * time.Millisecond
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		l, err := netlink.LinkByName(e.Name)
		if err != nil {
			return err
		}
		if state := l.Attrs().OperState; state == netlink.OperUp {
			return nil
		} else if time.Now().After(deadline) {
			return fmt.Errorf("%s after %v, want up", state, limit)
		}
	}
}

// setUp gives the end its addresses; it runs in the end's namespace.
func (e End) setUp() error {
	l, err := netlink.LinkByName(e.Name)
	if err != nil {
		return err
	}
	// Without this, neighbours cannot be asked for during the two seconds that the link's own address is tentative.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+e.Name+"/accept_dad", []byte("0"), 0o644); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	for _, prefix := range e.Addresses {
		addr, err := netlink.ParseAddr(prefix.String())
		if err != nil {
			return err
		}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add %s: %w", prefix, err)
		}
	}
	return nil
}
