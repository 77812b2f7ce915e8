package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
)

// wholeNode is a node with nothing but policyd on it: plugin, configuration and routes are policyd's to bring.
type wholeNode struct {
	name     string
	ns       *nettest.NS
	address  [2]netip.Addr // IPv4, IPv6
	stateDir string
	binDir   string
	conflist string
	stop     func()
}

// wholeNodes makes nodes on links of their own, joined by a router that knows nothing of pods, and starts policyd on each.
func wholeNodes(t *testing.T, backend, manifests string, n int, flags ...string) []*wholeNode {
	t.Helper()
	router := nettest.NewNS(t, "router")
	router.Run(t, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	var nodes []*wholeNode
	for i := 1; i <= n; i++ {
		w := &wholeNode{name: fmt.Sprintf("node-%d", i), binDir: filepath.Join(t.TempDir(), "bin"),
			conflist: filepath.Join(t.TempDir(), "net.d", "10-postern.conflist"), address: [2]netip.Addr{
				netip.MustParseAddr(fmt.Sprintf("10.0.%d.10", i)), netip.MustParseAddr(fmt.Sprintf("2001:db8:%d::10", i))}}
		w.ns = nettest.NewNS(t, w.name)
		var err error
		if w.stateDir, err = os.MkdirTemp("/run", "postern-"); err != nil {
			t.Fatal(err)
		}
		nettest.Link(t, nettest.End{NS: w.ns, Name: "eth0", Addresses: nettest.Prefixes(w.address[0].String()+"/24", w.address[1].String()+"/64")},
			nettest.End{NS: router, Name: fmt.Sprintf("port%d", i), Addresses: nettest.Prefixes(fmt.Sprintf("10.0.%d.1/24", i),
				fmt.Sprintf("2001:db8:%d::1/64", i))})
		w.ns.Run(t, "ip", "route", "add", "default", "via", fmt.Sprintf("10.0.%d.1", i))
		w.ns.Run(t, "ip", "route", "add", "default", "via", fmt.Sprintf("2001:db8:%d::1", i))
		if out, err := w.ns.Try("ip", "link", "add", "try", "type", "vxlan", "id", "1", "dstport", "8472"); err != nil {
			t.Skipf("the kernel makes no VXLAN device: %v: %s", err, out)
		}
		w.ns.Run(t, "ip", "link", "del", "try")
		nodes = append(nodes, w)
		w.start(t, backend, manifests, flags...)
	}
	return nodes
}

// start starts policyd until the test ends or stop is called.
func (w *wholeNode) start(t *testing.T, backend, manifests string, flags ...string) {
	t.Helper()
	var log bytes.Buffer
	args := append([]string{"run", "--from", manifests, "--node", w.name, "--state-dir", w.stateDir, "--iptables-backend", backend,
		"--listen", "127.0.0.1:0", "--node-network", "--cni-conf", w.conflist, "--cni-bin-dir", w.binDir,
		"--cni-plugin", nettest.Build(t, "plugin")}, flags...)
	cmd := w.ns.Command(context.Background(), nettest.Build(t, "policyd"), args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("policyd on %s: %v", w.name, err)
		}
		if t.Failed() {
			t.Logf("policyd on %s:\n%s", w.name, log.String())
		}
	}
	t.Cleanup(w.stop)
}

// attach does what a runtime does: it reads the configuration that is there and calls the plugin that it names.
func (w *wholeNode) attach(
	t *testing.T, namespace, name string, ports ...attachment.PortMapping,
) (*nettest.NS, [2]netip.Addr) {
	t.Helper()
	nettest.Eventually(t, 30*time.Second, "the CNI configuration of "+w.name, func() error {
		_, err := os.Stat(w.conflist)
		return err
	})
	list, err := libcni.ConfListFromFile(w.conflist)
	if err != nil {
		t.Fatal(err)
	}
	pod := nettest.NewNS(t, "pod-"+name)
	cni := libcni.NewCNIConfigWithCacheDir([]string{w.binDir}, filepath.Join(w.stateDir, "libcni"), nil)
	rt := &libcni.RuntimeConf{ContainerID: "sandbox-" + name, NetNS: pod.Path, IfName: "eth0",
		Args: [][2]string{{"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", "uid-" + name}}}
	if len(ports) > 0 {
		rt.CapabilityArgs = map[string]any{"portMappings": ports}
	}
	var addresses [2]netip.Addr
	w.ns.Do(t, func() {
		var result types.Result
		nettest.Eventually(t, 2*time.Minute, fmt.Sprintf("ADD %s on %s", name, w.name), func() error { // as a runtime tries again
			var err error
			result, err = cni.AddNetworkList(context.Background(), list, rt)
			return err
		})
		full, err := types100.NewResultFromResult(result)
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range full.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			addresses[map[bool]int{true: 0, false: 1}[a.Unmap().Is4()]] = a.Unmap()
		}
	})
	return pod, addresses
}

// A cluster of two nodes that share no link, with nothing but policyd on them: pods reach each other through the tunnel by their own
// addresses, policies judge those, and cleaning up leaves nothing.
func TestPodsOfTwoNodesAreConnectedAndGuarded(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		manifests := t.TempDir()
		write := func(name, text string) {
			t.Helper()
			temp := filepath.Join(manifests, "."+name)
			if err := errors.Join(os.WriteFile(temp, []byte(text), 0o600), os.Rename(temp, filepath.Join(manifests, name))); err != nil {
				t.Fatal(err)
			}
		}
		var text strings.Builder
		for i := 1; i <= 2; i++ {
			fmt.Fprintf(&text, "apiVersion: v1\nkind: Node\nmetadata: {name: node-%d}\nspec: {podCIDRs: [10.244.%d.0/24, \"fd00:10:244:%d::/64\"]}\n"+
				"status: {addresses: [{type: InternalIP, address: 10.0.%d.10}, {type: InternalIP, address: \"2001:db8:%d::10\"}]}\n---\n", i, i, i, i, i)
		}
		write("nodes.yaml", text.String())
		pod := func(name, node, status string) string {
			return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, uid: uid-%s, labels: {app: %s}}\n"+
				"spec: {nodeName: %s}\n%s---\n", name, name, name, node, status)
		}
		pods := pod("web", "node-1", "") + pod("other", "node-1", "") + pod("db", "node-2", "")
		write("pods.yaml", pods)
		write("policy.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: db, namespace: shop}\n"+
			"spec: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}\n")
		nodes := wholeNodes(t, backend, manifests, 2)
		web, webAt := nodes[0].attach(t, "shop", "web")
		other, otherAt := nodes[0].attach(t, "shop", "other")
		db, dbAt := nodes[1].attach(t, "shop", "db")
		status := func(a [2]netip.Addr) string {
			return fmt.Sprintf("status: {podIPs: [{ip: %s}, {ip: \"%s\"}]}\n", a[0], a[1])
		}
		write("pods.yaml", pod("web", "node-1", status(webAt))+pod("other", "node-1", status(otherAt))+pod("db", "node-2", status(dbAt)))
		check := func(when string) {
			t.Helper()
			for family, a := range dbAt {
				at := netip.AddrPortFrom(a, 8080)
				nettest.Eventually(t, 30*time.Second, when+": web to reach db", func() error {
					seen, err := nettest.Peer(web, "tcp", netip.AddrPort{}, at, 2*time.Second)
					if err == nil && seen.Addr() != webAt[family] {
						err = fmt.Errorf("it is seen as %s, and is %s", seen.Addr(), webAt[family])
					}
					return err
				})
				if err := nettest.Dial(other, "tcp", netip.AddrPort{}, at, blockedWait); !nettest.Blocked(err) {
					t.Errorf("%s: other to %s: %v; want no answer", when, at, err)
				}
			}
		}
		for _, a := range dbAt {
			nettest.TCPServer(t, db, netip.AddrPortFrom(a, 8080))
		}
		check("at first")

		nodes[1].stop()
		nodes[1].start(t, backend, manifests)
		check("after a restart of policyd")

		for _, w := range nodes {
			w.stop()
			w.ns.Run(t, nettest.Build(t, "policyd"), "cleanup", "--state-dir", w.stateDir)
			for _, command := range []string{"ip route show proto 112", "ip -6 route show proto 112", "ip -o link show type vxlan", "ipset list -n"} {
				words := strings.Fields(command)
				if out := w.ns.Run(t, words[0], words[1:]...); out != "" {
					t.Errorf("after cleanup, %s on %s: %s", command, w.name, out)
				}
			}
		}
	})
}
