package nodenet_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nodenet"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/podlink"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// needVXLAN skips the test where the kernel makes no VXLAN device.
func needVXLAN(t *testing.T) {
	t.Helper()
	ns := nettest.NewNS(t, "try")
	if out, err := ns.Try("ip", "link", "add", "try", "type", "vxlan", "id", "1", "dstport", "8472"); err != nil {
		t.Skipf("the kernel makes no VXLAN device: %v: %s", err, out)
	}
}

// layout says how nodes are joined.
type layout string

const (
	shared layout = "on one link"
	apart  layout = "apart" // each on a link of its own, to a router that knows nothing of pods
)

// scene is some nodes and a machine outside of the cluster.
//
//	shared: all on 192.0.2.0/24, 2001:db8::/64    apart: node 1 on 10.0.1.0/24, 2001:db8:1::/64, and so on; outside on number 99
type scene struct {
	layout  layout
	backend string
	options nodenet.Options
	nodes   []*node
	middle  *nettest.NS // the switch or the router
	outside *nettest.NS
}

type node struct {
	*object.Node
	ns     *nettest.NS
	plane  *dataplane.Plane
	plan   *nodenet.Plan
	states map[rule.Family]*rule.State
}

const outsideNumber = 99

func newScene(t *testing.T, backend string, l layout, n int, o nodenet.Options) *scene {
	t.Helper()
	if o.Tunnel == "" {
		o.Tunnel = nodenet.TunnelAuto
	}
	o.Port, o.VNI = nodenet.DefaultPort, nodenet.DefaultVNI
	if o.Tunnel == nodenet.TunnelAlways || l == apart {
		needVXLAN(t)
	}
	s := &scene{layout: l, backend: backend, options: o, middle: nettest.NewNS(t, "middle"), outside: nettest.NewNS(t, "outside")}
	if l == shared {
		s.middle.Run(t, "ip", "link", "add", "name", "br0", "up", "type", "bridge")
	} else {
		s.middle.Run(t, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	}
	s.join(t, s.outside, outsideNumber)
	for i := 1; i <= n; i++ {
		s.add(t, backend, i)
	}
	return s
}

// addresses are those of machine i.
func (s *scene) addresses(i int) []netip.Addr {
	if s.layout == shared {
		return addrs(fmt.Sprintf("192.0.2.%d", i), fmt.Sprintf("2001:db8::%d", i))
	}
	return addrs(fmt.Sprintf("10.0.%d.10", i), fmt.Sprintf("2001:db8:%d::10", i))
}

// gatewayOf are the router's addresses on the link of machine i.
func (s *scene) gatewayOf(i int) []netip.Addr {
	return addrs(fmt.Sprintf("10.0.%d.1", i), fmt.Sprintf("2001:db8:%d::1", i))
}

// join joins machine i to the others.
func (s *scene) join(t *testing.T, ns *nettest.NS, i int) {
	t.Helper()
	a, port := s.addresses(i), fmt.Sprintf("port%d", i)
	end := nettest.End{NS: ns, Name: "eth0", Addresses: []netip.Prefix{netip.PrefixFrom(a[0], 24), netip.PrefixFrom(a[1], 64)}}
	if s.layout == shared {
		nettest.Link(t, end, nettest.End{NS: s.middle, Name: port})
		s.middle.Run(t, "ip", "link", "set", port, "master", "br0")
		return
	}
	router := s.gatewayOf(i)
	nettest.Link(t, end, nettest.End{NS: s.middle, Name: port,
		Addresses: []netip.Prefix{netip.PrefixFrom(router[0], 24), netip.PrefixFrom(router[1], 64)}})
	for _, r := range router {
		ns.Run(t, "ip", "route", "add", "default", "via", r.String())
	}
}

func (s *scene) add(t *testing.T, backend string, i int) *node {
	t.Helper()
	n := &node{states: map[rule.Family]*rule.State{}, ns: nettest.NewNS(t, fmt.Sprintf("node%d", i)), Node: &object.Node{Name: fmt.Sprintf("node-%d", i), Addresses: s.addresses(i),
		PodCIDRs: nettest.Prefixes(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:10:244:%d::/64", i))}}
	s.join(t, n.ns, i)
	n.ns.Do(t, func() {
		var err error
		if n.plane, err = dataplane.Open(iptables.Backend(backend), dataplane.Nodes); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(n.plane.Close)
	s.nodes = append(s.nodes, n)
	return n
}

// apply has every node know all nodes.
func (s *scene) apply(t *testing.T) {
	t.Helper()
	for _, n := range s.nodes {
		if _, err := s.applyNode(t, n); err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
		if len(n.plan.Findings) > 0 {
			t.Fatalf("%s: %+v", n.Name, n.plan.Findings)
		}
	}
}

// applyNode does what policyd does on a node.
func (s *scene) applyNode(t *testing.T, n *node) (changes []string, err error) {
	t.Helper()
	var others []*object.Node
	for _, o := range s.nodes {
		if o != n {
			others = append(others, o.Node)
		}
	}
	n.ns.Do(t, func() {
		facts, e := nodenet.Look(others, s.options)
		if e != nil {
			t.Fatal(e)
		}
		n.plan = nodenet.NewPlan(n.Node, others, facts, s.options)
		for _, f := range rule.Families {
			s := nodenet.State(n.plan, f)
			if n.states[f] == nil {
				n.plane.Want(s)
			} else {
				n.plane.Change(nodenet.Patch(n.states[f], s))
			}
			n.states[f] = s
		}
		result, e := n.plane.Apply(context.Background(), nil)
		if e != nil {
			t.Fatalf("%s: rules: %v", n.Name, e)
		}
		if result.Wrote() {
			changes = append(changes, fmt.Sprintf("rules: %+v", result))
		}
		wired, e := nodenet.Wire(n.plan)
		changes, err = append(changes, wired...), e
	})
	return changes, err
}

// pod attaches a pod with the number to a node, as the plugin does it.
func (n *node) pod(t *testing.T, number int) (*nettest.NS, []netip.Addr) {
	t.Helper()
	ns := nettest.NewNS(t, fmt.Sprintf("%s-pod%d", n.Name, number))
	a := &attachment.Attachment{ContainerID: ns.Name, IfName: "eth0", NetNS: ns.Path, MTU: max(n.plan.MTU, 1280),
		HostInterface: attachment.HostInterface(attachment.GuardedPrefix, ns.Name, "eth0"),
		HostMAC:       "02:00:00:00:00:01", PodMAC: "02:00:00:00:00:02", NodeAddresses: n.plan.Addresses}
	for _, cidr := range n.PodCIDRs {
		addr := cidr.Addr()
		for range number {
			addr = addr.Next()
		}
		a.Addresses = append(a.Addresses, addr)
	}
	n.ns.Do(t, func() {
		if _, err := podlink.Create(context.Background(), podlink.Link{Attachment: a}); err != nil {
			t.Fatal(err)
		}
	})
	return ns, a.Addresses
}

const serverPort = 8080

// limit is for what must happen; a machine under load takes long.
const limit = 20 * time.Second

// seenAs returns the address under which a server at to sees a client; it waits for the way to be there.
func seenAs(t *testing.T, from *nettest.NS, to netip.AddrPort) netip.Addr {
	t.Helper()
	got, err := nettest.Peer(from, "tcp", netip.AddrPort{}, to, limit)
	if err != nil {
		t.Errorf("%s does not reach %s: %v", from.Name, to, err)
	}
	return got.Addr()
}

// serve listens on all addresses of a machine that are given.
func serve(t *testing.T, ns *nettest.NS, at ...netip.Addr) {
	t.Helper()
	for _, a := range at {
		nettest.TCPServer(t, ns, netip.AddrPortFrom(a, serverPort))
	}
}

func at(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, serverPort) }

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// routes lists a node's routes of ours, as ip shows them without what is always there.
func (n *node) routes(t *testing.T) []string {
	t.Helper()
	var list []string
	n.ns.Do(t, func() {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: nodenet.Protocol}, netlink.RT_FILTER_PROTOCOL)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range routes {
				text := r.Dst.String()
				if r.Gw == nil {
					text = "unreachable " + text
				} else {
					link, err := netlink.LinkByIndex(r.LinkIndex)
					if err != nil {
						t.Fatal(err)
					}
					text += fmt.Sprintf(" via %s dev %s src %s", r.Gw, link.Attrs().Name, r.Src)
				}
				list = append(list, text)
			}
		}
	})
	slices.Sort(list)
	return list
}

func fields(text string) []string { return strings.Fields(text) }

// wiredOnly leaves out what rules were written: the plane of these tests is told anew what is wanted each time.
func wiredOnly(changes []string) []string {
	return slices.DeleteFunc(changes, func(c string) bool { return strings.HasPrefix(c, "rules: ") })
}
