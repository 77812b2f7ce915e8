package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
)

const oneNode = `apiVersion: v1
kind: Node
metadata: {name: node-1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"]}
status: {addresses: [{type: InternalIP, address: 10.0.1.10}, {type: InternalIP, address: "2001:db8:1::10"}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-2}
spec: {podCIDRs: [10.244.2.0/24, "fd00:10:244:2::/64"]}
status: {addresses: [{type: InternalIP, address: 10.0.2.10}, {type: InternalIP, address: "2001:db8:2::10"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web, labels: {app: web}}
spec: {nodeName: node-1}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}
`

// installed is a whole node as the manifests make it, with folders of its own in place of the machine's.
func installed(t *testing.T, backend string) (w *wholeNode, root string) {
	t.Helper()
	manifests := t.TempDir()
	if err := os.WriteFile(filepath.Join(manifests, "all.yaml"), []byte(oneNode), 0o600); err != nil {
		t.Fatal(err)
	}
	root = t.TempDir()
	for _, folder := range []string{"etc/udev/rules.d", "etc/systemd/network", "etc/NetworkManager/conf.d", "etc/sysctl.d"} {
		if err := os.MkdirAll(filepath.Join(root, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, folder := range []string{"/run", os.TempDir()} { // state, and what t.TempDir gives
		link := filepath.Join(root, folder)
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(folder, link); err != nil {
			t.Fatal(err)
		}
	}
	w = wholeNodes(t, backend, manifests, 1, "--tunnel=always")[0]
	w.ns.Run(t, nettest.Build(t, "policyd"), "install", "--root", root, "--cni-bin-dir", w.binDir,
		"--cni-plugin", nettest.Build(t, "plugin"), "--loopback", nettest.Build(t, "plugin"))
	return w, root
}

// uninstall returns the command that takes everything off the node.
func (w *wholeNode) uninstall(root string) []string {
	return []string{"cleanup", "--all", "--root", root, "--state-dir", w.stateDir, "--cni-conf", w.conflist,
		"--cni-bin-dir", w.binDir}
}

// everything lists what a node's kernel and folders hold.
func (w *wholeNode) everything(t *testing.T, root, backend string) string {
	t.Helper()
	var all strings.Builder
	for _, command := range []string{"iptables-" + backend + "-save", "ip6tables-" + backend + "-save", "ipset save", "ip -o link",
		"ip -o addr", "ip route show table all", "ip -6 route show table all", "ip rule"} {
		words := strings.Fields(command)
		all.WriteString(w.ns.Run(t, words[0], words[1:]...))
	}
	for _, dir := range []string{filepath.Join(root, "etc"), w.stateDir, w.binDir, filepath.Dir(w.conflist)} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // it is not there, or has gone meanwhile
			}
			if !e.IsDir() || path == w.stateDir {
				fmt.Fprintln(&all, "file", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all.String()
}

// remainders are the lines of a listing that have a name of ours.
func remainders(listing string) (list []string) {
	for line := range strings.Lines(listing) {
		if slices.ContainsFunc([]string{"POSTERN", "PST-", "pst", "psx", "postern", "proto 112", "proto postern"},
			func(word string) bool { return strings.Contains(line, word) }) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return list
}

func TestUninstallLeavesNothingOfOursAndEverythingOfOthers(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		w, root := installed(t, backend)
		pod, _ := w.attach(t, "shop", "web", attachment.PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"})
		iptables := "iptables-" + backend
		theirs := [][]string{{iptables, "-N", "THEIRS"}, {iptables, "-A", "FORWARD", "-j", "THEIRS"},
			{iptables, "-t", "mangle", "-A", "FORWARD", "-s", "192.0.2.7", "-j", "ACCEPT"}, {"ipset", "create", "theirs", "hash:ip"},
			{"ip", "route", "add", "10.244.9.0/24", "via", "10.0.1.1"},
			{"ip", "link", "add", "theirs0", "type", "veth", "peer", "theirs1"}}
		for _, command := range theirs {
			w.ns.Run(t, command[0], command[1:]...)
		}
		before := w.everything(t, root, backend)
		if n := len(remainders(before)); n < 40 {
			t.Fatalf("only %d things of ours are there before, so this test proves nothing:\n%s", n, before)
		}
		w.stop()
		for try := range 2 {
			out := w.ns.Run(t, nettest.Build(t, "policyd"), w.uninstall(root)...)
			if !strings.Contains(out, "removed everything of postern") {
				t.Errorf("the command says %s", out)
			}
			after := w.everything(t, root, backend)
			for _, line := range remainders(after) {
				t.Errorf("after uninstall %d: %s", try+1, line)
			}
			for _, word := range []string{"-A FORWARD -j THEIRS", "-A FORWARD -s 192.0.2.7/32 -j ACCEPT", "create theirs hash:ip",
				"10.244.9.0/24 via 10.0.1.1", "theirs0"} {
				if !strings.Contains(after, word) {
					t.Errorf("after uninstall %d, %q of others is gone:\n%s", try+1, word, after)
				}
			}
		}
		if out := pod.Run(t, "ip", "-o", "link", "show", "type", "veth"); out != "" {
			t.Errorf("the pod still has a link: %s", out)
		}
	})
}

func TestUninstallWaitsForPolicydAndKeepsWatch(t *testing.T) {
	w, root := installed(t, "nft")
	w.attach(t, "shop", "web")
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	said := func() string {
		text, err := os.ReadFile(out.Name())
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	cmd := w.ns.Command(context.Background(), nettest.Build(t, "policyd"),
		append(w.uninstall(root), "--listen", "127.0.0.1:9479")...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil || t.Failed() {
			t.Errorf("cleanup: %v\n%s", err, said())
		}
	})
	ready := func() (err error) {
		w.ns.Do(t, func() {
			var conn net.Conn
			if conn, err = net.DialTimeout("tcp", "127.0.0.1:9479", time.Second); err == nil {
				err = conn.Close()
			}
		})
		return err
	}
	nettest.Eventually(t, 30*time.Second, "it to wait", func() error {
		if !strings.Contains(said(), "another policyd is running") {
			return errors.New("it does not say so")
		}
		return nil
	})
	if ready() == nil || len(remainders(w.everything(t, root, "nft"))) < 40 {
		t.Fatal("it did not wait for policyd's end")
	}
	w.stop()
	nettest.Eventually(t, 2*time.Minute, "the clean-up", ready)
	gone := func() error {
		if left := remainders(w.everything(t, root, "nft")); len(left) > 0 {
			return fmt.Errorf("left are %q", left)
		}
		return nil
	}
	if err := gone(); err != nil {
		t.Error(err)
	}
	// Whoever installs postern again finds the uninstaller still there for a moment: kubelet has made the folder, and the container
	// that installs has ended, when policyd is not there yet to hold its lock.
	if err := os.MkdirAll(w.stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	plugin := filepath.Join(w.binDir, "postern")
	if err := os.WriteFile(plugin, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) { // its clock ticks thrice
		if _, err := os.Stat(plugin); err != nil {
			t.Fatalf("the plugin that was installed anew: %v", err)
		}
	}
	// What an ADD leaves that was waiting for its lock meanwhile.
	if err := os.MkdirAll(filepath.Join(w.stateDir, "attachments"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.ns.Run(t, "ip", "link", "add", "pst0123456789ab", "type", "veth", "peer", "name", "other")
	nettest.Eventually(t, 30*time.Second, "what came back to be removed", gone)
}
