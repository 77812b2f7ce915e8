package nodenet_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nodenet"
)

// ways repeats a test for every way that packets may take between nodes.
func ways(t *testing.T, test func(t *testing.T, backend string, l layout, tunnel nodenet.Tunnel)) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for _, w := range []struct {
			layout layout
			tunnel nodenet.Tunnel
		}{{shared, nodenet.TunnelAuto}, {shared, nodenet.TunnelAlways}, {apart, nodenet.TunnelAuto}} {
			t.Run(string(w.layout)+", tunnel "+string(w.tunnel), func(t *testing.T) { test(t, backend, w.layout, w.tunnel) })
		}
	})
}

func TestPodsOfDifferentNodesReachEachOtherByTheirOwnAddresses(t *testing.T) {
	ways(t, func(t *testing.T, backend string, l layout, tunnel nodenet.Tunnel) {
		s := newScene(t, backend, l, 3, nodenet.Options{Tunnel: tunnel})
		s.apply(t)
		var pods []*nettest.NS
		var addresses [][]netip.Addr
		for _, n := range s.nodes {
			ns, a := n.pod(t, 10)
			serve(t, ns, a...)
			pods, addresses = append(pods, ns), append(addresses, a)
		}
		for i, from := range pods {
			for j, to := range addresses {
				for family := range to {
					if i == j {
						continue
					}
					if got := seenAs(t, from, at(to[family])); got != addresses[i][family] {
						t.Errorf("the pod of node %d is seen as %s by that of node %d, want %s", i+1, got, j+1, addresses[i][family])
					}
				}
			}
		}
	})
}

// What ipBlocks have to say of a node, and what nodes see of pods.
func TestNodesAndRemotePodsSeeEachOtherByTheAddressesThatAreDocumented(t *testing.T) {
	ways(t, func(t *testing.T, backend string, l layout, tunnel nodenet.Tunnel) {
		s := newScene(t, backend, l, 2, nodenet.Options{Tunnel: tunnel})
		s.apply(t)
		tunnelled := tunnel == nodenet.TunnelAlways || l == apart
		pod, addresses := s.nodes[1].pod(t, 10)
		serve(t, pod, addresses...)
		serve(t, s.nodes[0].ns, s.nodes[0].Addresses...)
		for family := range addresses {
			node, want := s.nodes[0].Addresses[family], s.nodes[0].Addresses[family]
			if tunnelled {
				want = nodenet.Gateway(s.nodes[0].PodCIDRs[family])
			}
			if got := seenAs(t, s.nodes[0].ns, at(addresses[family])); got != want {
				t.Errorf("the node is seen by a remote pod as %s, want %s", got, want)
			}
			want = addresses[family]
			if tunnelled { // else its answers would have a source that no node's pods have
				want = s.nodes[1].Addresses[family]
			}
			if got := seenAs(t, pod, at(node)); got != want {
				t.Errorf("a pod is seen by a remote node as %s, want %s", got, want)
			}
		}
	})
}

// Beside kube-proxy, which translates the destination on one node and has that node's address take the client's place.
func TestAServiceOfOneNodeLeadsToAPodOfAnother(t *testing.T) {
	ways(t, func(t *testing.T, backend string, l layout, tunnel nodenet.Tunnel) {
		s := newScene(t, backend, l, 2, nodenet.Options{Tunnel: tunnel})
		s.apply(t)
		one := s.nodes[0]
		pod, addresses := s.nodes[1].pod(t, 10)
		local, localAt := one.pod(t, 10)
		serve(t, pod, addresses...)
		for family, program := range []string{"iptables-", "ip6tables-"} {
			program += backend
			service, node := addrs("10.96.0.1", "fd00:10:96::1")[family], one.Addresses[family]
			for _, to := range []netip.Addr{service, node} {
				one.ns.Run(t, program, "-w", "-t", "nat", "-A", "PREROUTING", "-d", to.String(), "-p", "tcp", "--dport", "8080", "-j", "DNAT",
					"--to-destination", at(addresses[family]).String())
			}
			one.ns.Run(t, program, "-w", "-t", "nat", "-A", "POSTROUTING", "-m", "conntrack", "--ctorigdst", node.String(), "-j", "MASQUERADE")
			if got := seenAs(t, local, at(service)); got != localAt[family] {
				t.Errorf("a pod is seen through a Service as %s, want %s", got, localAt[family])
			}
			want := node
			if tunnel == nodenet.TunnelAlways || l == apart {
				want = nodenet.Gateway(one.PodCIDRs[family])
			}
			if got := seenAs(t, s.outside, at(node)); got != want {
				t.Errorf("the outside is seen through a node's port as %s, want %s", got, want)
			}
		}
	})
}

func TestWhatLeavesTheClusterHasTheNodesAddress(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for _, keep := range []bool{false, true} {
			t.Run(map[bool]string{false: "elsewhere", true: "to where pods' addresses are kept"}[keep], func(t *testing.T) {
				o := nodenet.Options{}
				if keep {
					o.KeepSource = nettest.Prefixes("192.0.2.96/29", "::/0")
				}
				s := newScene(t, backend, shared, 1, o)
				s.apply(t)
				n := s.nodes[0]
				pod, addresses := n.pod(t, 10)
				outside := s.addresses(outsideNumber)
				serve(t, s.outside, outside...)
				for family, cidr := range n.PodCIDRs {
					s.outside.Run(t, "ip", "route", "add", cidr.String(), "via", n.Addresses[family].String())
					want := n.Addresses[family]
					if keep {
						want = addresses[family]
					}
					if got := seenAs(t, pod, at(outside[family])); got != want {
						t.Errorf("the pod is seen as %s, want %s", got, want)
					}
				}
				serve(t, pod, addresses...)
				for family, a := range addresses {
					if got := seenAs(t, s.outside, at(a)); got != outside[family] {
						t.Errorf("the outside is seen by the pod as %s, want %s", got, outside[family])
					}
				}
			})
		}
	})
}

// The refusal comes out of the tunnel too: its source is the other node's in there.
func TestAnAddressOfANodesRangeWithoutAPodIsUnreachable(t *testing.T) {
	s := newScene(t, "nft", apart, 2, nodenet.Options{})
	s.apply(t)
	n := s.nodes[0]
	pod, _ := n.pod(t, 10)
	s.nodes[1].pod(t, 10) // since when it forwards
	for _, a := range addrs("10.244.1.77", "fd00:10:244:1::77", "10.244.2.77", "fd00:10:244:2::77") {
		err := nettest.Dial(pod, "tcp", netip.AddrPort{}, at(a), limit)
		if err == nil || nettest.Blocked(err) {
			t.Errorf("%s: %v, want a refusal by the node", a, err)
		}
	}
}

func TestRoutesAreThoseOfTheNodesThatAre(t *testing.T) {
	s := newScene(t, "nft", shared, 3, nodenet.Options{})
	s.apply(t)
	n := s.nodes[0]
	own := []string{"unreachable 10.244.1.0/24", "unreachable fd00:10:244:1::/64"}
	check := func(when string, want ...string) {
		t.Helper()
		if _, err := s.applyNode(t, n); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		want = append(want, own...)
		slices.Sort(want)
		if got := n.routes(t); !slices.Equal(got, want) {
			t.Errorf("%s:\n got  %q\n want %q", when, got, want)
		}
		if again, err := s.applyNode(t, n); err != nil || len(wiredOnly(again)) > 0 {
			t.Errorf("%s, again: %q, %v; want nothing to do", when, again, err)
		}
	}
	two := []string{"10.244.2.0/24 via 192.0.2.2 dev eth0 src 192.0.2.1", "fd00:10:244:2::/64 via 2001:db8::2 dev eth0 src 2001:db8::1"}
	three := []string{"10.244.3.0/24 via 192.0.2.3 dev eth0 src 192.0.2.1", "fd00:10:244:3::/64 via 2001:db8::3 dev eth0 src 2001:db8::1"}
	check("at first", slices.Concat(two, three)...)

	foreign := []string{"10.244.2.0/24 via 192.0.2.99 dev eth0 proto static metric 3000", "203.0.113.0/24 via 192.0.2.99 dev eth0"}
	for _, r := range foreign {
		n.ns.Run(t, "ip", append([]string{"route", "add"}, fields(r)...)...)
	}
	s.nodes[1].Addresses = addrs("192.0.2.22", "2001:db8::22")
	two = []string{"10.244.2.0/24 via 192.0.2.22 dev eth0 src 192.0.2.1", "fd00:10:244:2::/64 via 2001:db8::22 dev eth0 src 2001:db8::1"}
	check("a node has other addresses", slices.Concat(two, three)...)

	s.nodes[2].PodCIDRs = nettest.Prefixes("10.244.33.0/24", "fd00:10:244:33::/64")
	three = []string{"10.244.33.0/24 via 192.0.2.3 dev eth0 src 192.0.2.1", "fd00:10:244:33::/64 via 2001:db8::3 dev eth0 src 2001:db8::1"}
	check("a node has other CIDRs", slices.Concat(two, three)...)

	n.ns.Run(t, "ip", "link", "set", "eth0", "down") // which takes routes along
	n.ns.Run(t, "ip", "link", "set", "eth0", "up")
	n.ns.Run(t, "ip", "-6", "addr", "replace", "2001:db8::1/64", "dev", "eth0", "nodad")
	n.ns.Run(t, "ip", append([]string{"route", "add"}, fields(foreign[0])...)...)
	check("after the link was down", slices.Concat(two, three)...)

	s.nodes = []*node{s.nodes[0], s.nodes[2]}
	check("a node is gone", three...)
	n.ns.Do(t, func() {
		if err := nodenet.Unwire(); err != nil {
			t.Fatal(err)
		}
	})
	if got := n.routes(t); len(got) > 0 {
		t.Errorf("after Unwire: %q", got)
	}
	if got := n.ns.Run(t, "ip", "route", "show", "proto", "static"); len(fields(got)) == 0 {
		t.Error("somebody else's route is gone")
	}
}

func TestTheTunnelFollowsTheNodes(t *testing.T) {
	s := newScene(t, "nft", apart, 3, nodenet.Options{})
	s.apply(t)
	n := s.nodes[0]
	check := func(when string, fdb ...string) {
		t.Helper()
		if _, err := s.applyNode(t, n); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		out, _ := n.ns.Try("bridge", "fdb", "show", "dev", "postern-vx4")
		for _, want := range fdb {
			if !slices.Contains(fields(out), want) {
				t.Errorf("%s: no entry for %s in\n%s", when, want, out)
			}
		}
		if entries := len(fields(out)); entries != 5*len(fdb) {
			t.Errorf("%s: want %d entries in\n%s", when, len(fdb), out)
		}
		if again, err := s.applyNode(t, n); err != nil || len(wiredOnly(again)) > 0 {
			t.Errorf("%s, again: %q, %v; want nothing to do", when, again, err)
		}
	}
	check("at first", "10.0.2.10", "10.0.3.10")
	s.nodes[1].Addresses = addrs("10.0.22.10")
	check("a node has another address", "10.0.22.10", "10.0.3.10")
	n.ns.Run(t, "ip", "neigh", "flush", "dev", "postern-vx4", "nud", "permanent")
	n.ns.Run(t, "ip", "link", "set", "postern-vx4", "down")
	check("after somebody has set it down", "10.0.22.10", "10.0.3.10")
	n.ns.Run(t, "ip", "link", "del", "postern-vx4")
	check("after somebody has removed it", "10.0.22.10", "10.0.3.10")
	if out := n.ns.Run(t, "ip", "link", "show", "postern-vx4"); !slices.Contains(fields(out), "1450") {
		t.Errorf("MTU is not 1450: %s", out)
	}
	s.nodes = s.nodes[:1]
	if _, err := s.applyNode(t, n); err != nil {
		t.Fatal(err)
	}
	if out, err := n.ns.Try("ip", "link", "show", "postern-vx4"); err == nil {
		t.Errorf("without another node the device is still there: %s", out)
	}
}
