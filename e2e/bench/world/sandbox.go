package world

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
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
		runtime.LockOSThread() // for good: the thread is in the new namespace, and ends with the goroutine
		done <- makeSandbox(name)
	}()
	if err := <-done; err != nil {
		return "", fmt.Errorf("make sandbox %s: %w", name, err)
	}
	return path, nil
}

func makeSandbox(name string) error {
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
