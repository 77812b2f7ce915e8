package world

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/postern-cni/postern/pkg/attachment"
)

const sandboxes = "/run/netns" // where ip netns has its names

// SandboxPath is that of a sandbox's network namespace.
func SandboxPath(name string) string { return filepath.Join(sandboxes, name) }

// Sandbox makes a network namespace with lo up, as a container runtime does for a pod, unless it is there, and returns its path.
func (n *Node) Sandbox(name string) (path string, err error) {
	path = SandboxPath(name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	done := make(chan error)
	go func() {
		// For good: the thread ends with the goroutine. The process's first thread does not, so it must not stay in there.
		runtime.LockOSThread()
		done <- makeSandbox(name)
	}()
	if err := <-done; err != nil {
		return "", fmt.Errorf("make sandbox %s: %w", name, err)
	}
	return path, nil
}

func makeSandbox(name string) (err error) {
	origin, err := netns.Get()
	if err != nil {
		return err
	}
	defer origin.Close()
	defer func() { err = errors.Join(err, netns.Set(origin)) }()
	handle, err := netns.NewNamed(name)
	if err != nil {
		return err
	}
	defer handle.Close()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// RemoveSandbox takes a sandbox away, and with it the links in it; the kernel does that some time later.
func (n *Node) RemoveSandbox(name string) error {
	if err := netns.DeleteNamed(name); err != nil {
		return fmt.Errorf("remove sandbox %s: %w", name, err)
	}
	return nil
}

// Quiet waits until the kernel has taken away every pod's link of the node: those of removed sandboxes go some time later, many
// take long, and what is measured meanwhile waits for the same locks.
func (n *Node) Quiet(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		var links []netlink.Link
		err := n.In(func() (err error) { links, err = netlink.LinkList(); return err })
		if err == nil && !slices.ContainsFunc(links, podLink) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the links of removed sandboxes to go: %w", errors.Join(ctx.Err(), err))
		case <-time.After(quietPause):
		}
	}
}

const quietPause = 50 * time.Millisecond // listing a thousand links disturbs too

func podLink(l netlink.Link) bool {
	name := l.Attrs().Name
	return strings.HasPrefix(name, attachment.GuardedPrefix) || strings.HasPrefix(name, attachment.UnguardedPrefix)
}
