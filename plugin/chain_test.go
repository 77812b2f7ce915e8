package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// upstream puts a plugin of the CNI project beside ours.
func upstream(t *testing.T, n *testnode.Node, name string) {
	t.Helper()
	built := nettest.Build(t, "github.com/containernetworking/plugins/plugins/meta/"+name)
	if err := os.Symlink(built, filepath.Join(n.BinDir, name)); err != nil {
		t.Fatal(err)
	}
}

// confDir writes the node's list where cnitool and others look for it.
func confDir(t *testing.T, n *testnode.Node) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "10-pods.conflist"), n.ConfList(), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The CNI project's own tool, with a list of ours and upstream's plugins after it, adds, checks and deletes a namespace.
func TestCNI2CnitoolWithUpstreamPluginsAfterOurs(t *testing.T) {
	cnitool := nettest.Build(t, "github.com/containernetworking/cni/cnitool")
	for _, tt := range []struct {
		plugin  string
		config  map[string]any
		args    string
		applied func(t *testing.T, n *testnode.Node, box *nettest.NS)
	}{
		{"tuning", map[string]any{"type": "tuning", "sysctl": map[string]any{"net.ipv4.conf.IFNAME.arp_notify": "1"}, "mtu": 1400}, "",
			func(t *testing.T, n *testnode.Node, box *nettest.NS) {
				if out := box.Run(t, "ip", "-o", "link", "show", "eth0"); !strings.Contains(out, "mtu 1400") {
					t.Errorf("tuning has not set the MTU: %s", out)
				}
			}},
		{"bandwidth", map[string]any{"type": "bandwidth", "ingressRate": 80000000, "ingressBurst": 80000000}, "",
			func(t *testing.T, n *testnode.Node, box *nettest.NS) {
				if out := n.NS.Run(t, "tc", "qdisc", "show"); !strings.Contains(out, "pst") && !strings.Contains(out, "psx") {
					t.Errorf("bandwidth has shaped nothing: %s", out)
				}
			}},
	} {
		t.Run(tt.plugin, func(t *testing.T) {
			n := testnode.New(t, testnode.Options{Policy: attachment.PolicyNone, Chain: []map[string]any{tt.config}})
			if tt.plugin == "bandwidth" {
				needShaping(t, n)
			}
			upstream(t, n, tt.plugin)
			dir, box := confDir(t, n), nettest.NewNS(t, "box")
			run := func(verb string) {
				t.Helper()
				n.NS.Run(t, "env", "CNI_PATH="+n.BinDir, "NETCONFPATH="+dir, "CNI_IFNAME=eth0", cnitool, verb, "pods", box.Path)
			}
			run("add")
			tt.applied(t, n, box)
			run("check")
			run("del")
			if out := n.NS.Run(t, "ip", "-o", "link"); strings.Contains(out, attachment.UnguardedPrefix) {
				t.Errorf("a link is left: %s", out)
			}
		})
	}
}

// needShaping skips where the kernel has no token bucket filter or no ifb devices, with which bandwidth works.
func needShaping(t *testing.T, n *testnode.Node) {
	t.Helper()
	if _, err := n.NS.Try("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "10k", "latency", "1ms"); err != nil {
		t.Skipf("this kernel has no tbf (CONFIG_NET_SCH_TBF), which the bandwidth plugin needs: %v", err)
	}
	n.NS.Run(t, "tc", "qdisc", "del", "dev", "lo", "root")
}

// Runtimes with the library from before version 1.1.0 of the specification, and with the newest, both attach pods with the
// one list, whose version is 1.0.0, and the newest also with a list of version 1.1.0.
func TestCNI1OlderAndNewestLibraries(t *testing.T) {
	n := testnode.New(t, testnode.Options{})
	pod := &testnode.Pod{Namespace: "default", Name: "web", UID: "uid-web"}
	n.Write(t, "pod.yaml", pod.Manifest(nil))
	n.Policyd(t)
	list := filepath.Join(confDir(t, n), "10-pods.conflist")
	box := nettest.NewNS(t, "box")
	older := func(verb string) string {
		t.Helper()
		return n.NS.Run(t, "env", "CNI_PATH="+n.BinDir, "CNI_CACHE_DIR="+filepath.Join(n.StateDir, "cache112"),
			"K8S_POD_NAMESPACE=default", "K8S_POD_NAME=web", "K8S_POD_UID=uid-web",
			nettest.Build(t, "e2e/libcni112"), verb, list, "older", box.Path, "eth0")
	}
	if out := older("add"); !strings.Contains(out, `"cniVersion": "1.0.0"`) {
		t.Errorf("ADD by libcni v1.1.2: %s", out)
	}
	older("check")
	older("del")

	for _, version := range []string{"1.0.0", "1.1.0"} {
		n.Configure(t, testnode.Options{Backend: "nft", Policy: attachment.PolicyEnforce, CNIVersion: version,
			Ranges: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}})
		p := n.Attach(t, &testnode.Pod{Namespace: "default", Name: "web", UID: "uid-web", ContainerID: "newest-" + version})
		at := nettest.TCPServer(t, p.NS, netip.AddrPortFrom(p.IP(t, testnode.Node4), 0))
		if err := nettest.Dial(n.NS, "tcp", netip.AddrPort{}, at, soon); err != nil {
			t.Errorf("version %s: %v", version, err)
		}
		if err := n.Check(p); err != nil {
			t.Errorf("CHECK, version %s: %v", version, err)
		}
		if err := n.Del(p); err != nil {
			t.Errorf("DEL, version %s: %v", version, err)
		}
	}
}
