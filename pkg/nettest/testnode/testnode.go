package testnode

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
)

// Addresses of the node's link to the world outside.
var (
	Outside4 = netip.MustParseAddr("198.51.100.1")
	Outside6 = netip.MustParseAddr("2001:db8::1")
	Node4    = netip.MustParseAddr("198.51.100.10")
	Node6    = netip.MustParseAddr("2001:db8::10")
)

// Options choose what a node is like. The zero value is an IPv4 and IPv6 node whose pods are guarded by policyd.
type Options struct {
	Backend string            // iptables backend: "nft" (default) or "legacy"
	Policy  attachment.Policy // default enforce
	Ranges  []string          // subnets for pods; default one of each family
	// Conf is merged into the plugin's configuration and overrides what is there, "ipam" key by key.
	Conf map[string]any
	// Chain holds the configurations of the plugins after postern in the list.
	Chain []map[string]any
	// CNIVersion of the list; default 1.0.0 with 1.1.0 among cniVersions.
	CNIVersion string
}

// Node is one machine of a cluster.
type Node struct {
	NS      *nettest.NS
	Outside *nettest.NS // another machine, on the link "uplink"
	// StateDir is the node's /run/postern, Manifests the folder that policyd reads.
	StateDir  string
	Manifests string
	BinDir    string // with the plugin as "postern"

	opts   Options
	daemon *Policyd // the one that was started last
	list   *libcni.NetworkConfigList
	cni    *libcni.CNIConfig
}

// New makes a node with a link to an outside machine.
func New(t testing.TB, o Options) *Node {
	t.Helper()
	if o.Backend == "" {
		o.Backend = "nft"
	}
	if o.Policy == "" {
		o.Policy = attachment.PolicyEnforce
	}
	if o.Ranges == nil {
		o.Ranges = []string{"10.244.1.0/24", "fd00:10:244:1::/64"}
	}
	if o.CNIVersion == "" {
		o.CNIVersion = "1.0.0"
	}
	n := &Node{
		NS:        nettest.NewNS(t, "node"),
		Outside:   nettest.NewNS(t, "outside"),
		StateDir:  runDir(t),
		Manifests: t.TempDir(),
		BinDir:    t.TempDir(),
		opts:      o,
	}
	nettest.Link(t,
		nettest.End{NS: n.NS, Name: "uplink", Addresses: nettest.Prefixes(Node4.String()+"/24", Node6.String()+"/64")},
		nettest.End{NS: n.Outside, Name: "eth0", Addresses: nettest.Prefixes(Outside4.String()+"/24", Outside6.String()+"/64")})
	for _, subnet := range o.Ranges {
		via := Node4
		if netip.MustParsePrefix(subnet).Addr().Is6() {
			via = Node6
		}
		n.Outside.Run(t, "ip", "route", "add", subnet, "via", via.String())
	}
	if err := os.Symlink(nettest.Build(t, "plugin"), filepath.Join(n.BinDir, "postern")); err != nil {
		t.Fatal(err)
	}
	n.Configure(t, o)
	return n
}

// runDir makes a state folder on the tmpfs of /run, for a real node's is one.
func runDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "postern-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Configure replaces the node's network configuration list by one with these options.
func (n *Node) Configure(t testing.TB, o Options) {
	t.Helper()
	text, err := json.Marshal(n.confList(o))
	if err != nil {
		t.Fatal(err)
	}
	if n.list, err = libcni.NetworkConfFromBytes(text); err != nil {
		t.Fatalf("configuration list %s: %v", text, err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{n.BinDir}, filepath.Join(n.StateDir, "libcni"), nil)
}

// ConfList returns the text of the node's network configuration list.
func (n *Node) ConfList() []byte { return n.list.Bytes }

func (n *Node) confList(o Options) map[string]any {
	ranges := make([]map[string]any, 0, len(o.Ranges))
	for _, subnet := range o.Ranges {
		ranges = append(ranges, map[string]any{"subnet": subnet})
	}
	ipam := map[string]any{"ranges": ranges}
	postern := map[string]any{
		"type":            "postern",
		"policy":          string(o.Policy),
		"stateDir":        n.StateDir,
		"iptablesBackend": o.Backend,
		"capabilities":    map[string]any{"portMappings": true},
	}
	for key, value := range o.Conf {
		if key != "ipam" {
			postern[key] = value
			continue
		}
		for k, v := range value.(map[string]any) {
			ipam[k] = v
		}
	}
	postern["ipam"] = ipam
	list := map[string]any{"cniVersion": o.CNIVersion, "name": "pods", "plugins": append([]map[string]any{postern}, o.Chain...)}
	if o.CNIVersion == "1.0.0" {
		list["cniVersions"] = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	}
	return list
}

// Pod is a sandbox on the node and what was asked for it.
type Pod struct {
	Namespace, Name, UID string
	ContainerID          string
	IfName               string // default eth0
	Ports                []attachment.PortMapping

	NS     *nettest.NS
	Result *types100.Result
}

// IP returns the pod's address of the family of like, as the plugin's result gives it.
func (p *Pod) IP(t testing.TB, like netip.Addr) netip.Addr {
	t.Helper()
	for _, ip := range p.Result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok && a.Unmap().Is4() == like.Is4() {
			return a.Unmap()
		}
	}
	t.Fatalf("pod %s has no address of the family of %s: %v", p.Name, like, p.Result.IPs)
	return netip.Addr{}
}

// Sandbox fills in what a runtime decides for a pod: its network namespace, and a container ID and interface name where
// none are given.
func (n *Node) Sandbox(t testing.TB, p *Pod) *Pod {
	t.Helper()
	if p.NS == nil {
		p.NS = nettest.NewNS(t, "pod-"+p.Name)
	}
	if p.ContainerID == "" {
		p.ContainerID = "sandbox-" + p.NS.Name
	}
	if p.IfName == "" {
		p.IfName = "eth0"
	}
	return p
}

// Attach makes a sandbox and adds it to the network; the test ends if that fails.
func (n *Node) Attach(t testing.TB, p *Pod) *Pod {
	t.Helper()
	if err := n.Add(n.Sandbox(t, p)); err != nil {
		t.Fatalf("ADD %s/%s: %v", p.Namespace, p.Name, err)
	}
	return p
}

// Runtime returns the pod's runtime configuration for libcni, as containerd would have it.
func (p *Pod) Runtime() *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: p.ContainerID, NetNS: p.NS.Path, IfName: p.IfName}
	if p.Name != "" {
		rt.Args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ContainerID}}
		if p.UID != "" {
			rt.Args = append(rt.Args, [2]string{"K8S_POD_UID", p.UID})
		}
	}
	if len(p.Ports) > 0 {
		rt.CapabilityArgs = map[string]any{"portMappings": p.Ports}
	}
	return rt
}

const cniLimit = 60 * time.Second

// do runs a call of libcni in the node's namespace, where the plugin then runs too.
func (n *Node) do(call func(ctx context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), cniLimit)
	defer cancel()
	if enter := nettest.Enter(n.NS, func() { err = call(ctx) }); enter != nil {
		return enter
	}
	return err
}

// Add calls ADD for a pod that has a sandbox, and keeps the result in it.
func (n *Node) Add(p *Pod) error {
	return n.do(func(ctx context.Context) error {
		result, err := n.cni.AddNetworkList(ctx, n.list, p.Runtime())
		if err != nil {
			return err
		}
		p.Result, err = types100.NewResultFromResult(result)
		return err
	})
}

// Del calls DEL.
func (n *Node) Del(p *Pod) error {
	return n.do(func(ctx context.Context) error { return n.cni.DelNetworkList(ctx, n.list, p.Runtime()) })
}

// Check calls CHECK.
func (n *Node) Check(p *Pod) error {
	return n.do(func(ctx context.Context) error { return n.cni.CheckNetworkList(ctx, n.list, p.Runtime()) })
}

// Status calls STATUS, with version 1.1.0 of the specification, which brought it.
func (n *Node) Status() error {
	return n.do(func(ctx context.Context) error { return n.cni.GetStatusNetworkList(ctx, n.at11()) })
}

// GC calls GC: every attachment but those of the given pods is to go.
func (n *Node) GC(valid ...*Pod) error {
	args := &libcni.GCArgs{}
	for _, p := range valid {
		args.ValidAttachments = append(args.ValidAttachments, types100GC(p))
	}
	return n.do(func(ctx context.Context) error { return n.cni.GCNetworkList(ctx, n.at11(), args) })
}

// at11 is the list with the version that has STATUS and GC.
func (n *Node) at11() *libcni.NetworkConfigList {
	list := *n.list
	list.CNIVersion = "1.1.0"
	return &list
}

// Write puts a manifest into policyd's folder, whole at once, under the given file name.
func (n *Node) Write(t testing.TB, file, text string) {
	t.Helper()
	temp := filepath.Join(n.Manifests, "."+file+".new")
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(n.Manifests, file)); err != nil {
		t.Fatal(err)
	}
}

// Remove takes a manifest out of policyd's folder.
func (n *Node) Remove(t testing.TB, file string) {
	t.Helper()
	if err := os.Remove(filepath.Join(n.Manifests, file)); err != nil {
		t.Fatal(err)
	}
}

// Manifest returns a Pod manifest as policyd reads it.
func (p *Pod) Manifest(labels map[string]string) string {
	text, err := json.Marshal(labels)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  namespace: %s\n  uid: %q\n  labels: %s\nspec: {}\n---\n",
		p.Name, p.Namespace, p.UID, text)
}

// Backend is the iptables backend of the node's programs: "nft" or "legacy".
func (n *Node) Backend() string { return n.opts.Backend }
