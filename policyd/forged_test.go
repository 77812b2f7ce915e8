package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

const blockedWait = 300 * time.Millisecond

// hostileNode is a node whose administrator has set the sysctls that would open every door, before anything of ours ran.
func hostileNode(t *testing.T, backend string) (n *testnode.Node, a, b *testnode.Pod) {
	t.Helper()
	n = testnode.New(t, testnode.Options{Backend: backend})
	n.NS.Run(t, "sysctl", "-w", "net.ipv4.conf.all.rp_filter=2", "net.ipv4.conf.default.rp_filter=0",
		"net.ipv6.conf.all.accept_ra=2", "net.ipv6.conf.default.accept_ra=2",
		"net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.default.route_localnet=1")
	a = &testnode.Pod{Namespace: "default", Name: "a", UID: "uid-a"}
	b = &testnode.Pod{Namespace: "default", Name: "b", UID: "uid-b"}
	n.Write(t, "pods.yaml", a.Manifest(nil)+b.Manifest(nil))
	n.Policyd(t)
	return n, n.Attach(t, a), n.Attach(t, b)
}

func TestForgedSourceAddressesGetNowhere(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n, a, b := hostileNode(t, backend)
		for _, family := range []struct {
			name             string
			foreign, outside netip.Addr
		}{
			{"IPv4", netip.MustParseAddr("203.0.113.9"), testnode.Outside4},
			{"IPv6", netip.MustParseAddr("2001:db8:9::9"), testnode.Outside6},
		} {
			t.Run(family.name, func(t *testing.T) {
				own, other := a.IP(t, family.outside), b.IP(t, family.outside)
				host := netip.PrefixFrom(family.foreign, family.foreign.BitLen())
				a.NS.Run(t, "ip", "address", "add", host.String(), "dev", "lo", "nodad")
				a.NS.Run(t, "ip", "address", "add", netip.PrefixFrom(other, other.BitLen()).String(), "dev", "lo", "nodad")
				n.NS.Run(t, "ip", "route", "add", host.String(), "via", family.outside.String()) // it lives out there

				atOutside := hear(t, n.Outside, family.outside)
				atPod := hear(t, b.NS, other)
				// The true source last: once it has been heard, what was sent before it would have been heard too.
				for _, from := range []netip.Addr{family.foreign, other, own} {
					send(t, a.NS, from, family.outside)
				}
				a.NS.Run(t, "ip", "address", "del", netip.PrefixFrom(other, other.BitLen()).String(), "dev", "lo") // or it keeps them
				for _, from := range []netip.Addr{family.foreign, own} {
					send(t, a.NS, from, other)
				}
				heardOnly(t, atOutside, own)
				heardOnly(t, atPod, own)
			})
		}
	})
}

// What is for the node itself does not pass FORWARD. Over IPv4 the kernel's own reverse path filter would drop the same packets,
// so it is off here: the rules alone must do it.
func TestForgedSourceAddressesDoNotReachTheNode(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n, a, b := hostileNode(t, backend)
		n.StopPolicyd(t) // or it would turn the filter on again, and put the rules back
		n.NS.Run(t, "sh", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done")
		for _, family := range []struct {
			tables  string
			node    netip.Addr
			foreign netip.Addr
		}{
			{"iptables-", testnode.Node4, netip.MustParseAddr("203.0.113.9")},
			{"ip6tables-", testnode.Node6, netip.MustParseAddr("2001:db8:9::9")},
		} {
			t.Run(family.tables+backend, func(t *testing.T) {
				own, other := a.IP(t, family.node), b.IP(t, family.node)
				for _, from := range []netip.Addr{family.foreign, other} {
					a.NS.Run(t, "ip", "address", "add", netip.PrefixFrom(from, from.BitLen()).String(), "dev", "lo", "nodad")
				}
				atNode := hear(t, n.NS, family.node)
				for _, from := range []netip.Addr{family.foreign, other, own} {
					send(t, a.NS, from, family.node)
				}
				heardOnly(t, atNode, own)
				n.NS.Run(t, family.tables+backend, "-t", "mangle", "-F", "INPUT")
				send(t, a.NS, other, family.node)
				heardOnly(t, atNode, other) // without the rule it arrives, or the test would prove nothing
			})
		}
	})
}

const hearPort = 7007

// hear collects the source addresses of the datagrams that arrive in a namespace.
func hear(t *testing.T, ns *nettest.NS, at netip.Addr) <-chan netip.Addr {
	t.Helper()
	var conn *net.UDPConn
	var err error
	ns.Do(t, func() { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, hearPort))) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	heard := make(chan netip.Addr, 16)
	go func() {
		buf := make([]byte, 16)
		for {
			_, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			heard <- from.Addr().Unmap()
		}
	}()
	return heard
}

func send(t *testing.T, ns *nettest.NS, from, to netip.Addr) {
	t.Helper()
	var err error
	ns.Do(t, func() {
		var conn *net.UDPConn
		conn, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, hearPort)))
		if err == nil {
			_, err = conn.Write([]byte("x"))
			err = errors.Join(err, conn.Close())
		}
	})
	if err != nil {
		t.Fatalf("send from %s to %s: %v", from, to, err)
	}
}

func heardOnly(t *testing.T, heard <-chan netip.Addr, want netip.Addr) {
	t.Helper()
	select {
	case got := <-heard:
		if got != want {
			t.Errorf("a packet with the source %s arrived before that of %s", got, want)
		}
	case <-time.After(5 * time.Second):
		t.Errorf("the packet with the source %s has not arrived", want)
	}
}

func TestAPodsRouterAdvertisementSetsNoRoute(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n, a, _ := hostileNode(t, backend)
		// What is sent is a good advertisement: a host that listens to such takes it.
		host, router := nettest.NewNS(t, "host"), nettest.NewNS(t, "router")
		nettest.Link(t, nettest.End{NS: host, Name: "eth0"}, nettest.End{NS: router, Name: "eth0"})
		host.Run(t, "sysctl", "-w", "net.ipv6.conf.eth0.accept_ra=2")
		nettest.Eventually(t, 10*time.Second, "a route from the advertisement on a host that takes one", func() error {
			_ = advertise(t, router) // once its link-local address is there
			if host.Run(t, "ip", "-6", "route", "show", "default") == "" {
				return errors.New("no default route")
			}
			return nil
		})
		before := n.NS.Run(t, "ip", "-6", "route")
		for range 3 {
			nettest.Eventually(t, 10*time.Second, "send an advertisement", func() error { return advertise(t, a.NS) })
		}
		// The advertisement travels before this request and on the same link, so it has been handled when the answer is here.
		if out, err := a.NS.Try("ping", "-6", "-c", "1", "-W", "5", "fe80::1%eth0"); err != nil {
			t.Logf("no ping here (%v: %s): the routes are looked at over a second instead", err, out)
		}
		holds(t, time.Second, func() error {
			if after := n.NS.Run(t, "ip", "-6", "route"); after != before {
				return fmt.Errorf("routes changed from\n%s to\n%s", before, after)
			}
			return nil
		})
	})
}

// holds asks again and again for as long as given, and ends the test at the first error.
func holds(t *testing.T, long time.Duration, cond func() error) {
	t.Helper()
	end := time.After(long)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := cond(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-end:
			return
		case <-tick.C:
		}
	}
}

// advertise sends a router advertisement (RFC 4861, 4.2) with a lifetime of half an hour to all nodes on eth0.
func advertise(t *testing.T, ns *nettest.NS) (err error) {
	t.Helper()
	ra := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
	ns.Do(t, func() {
		link, errLink := net.InterfaceByName("eth0")
		if errLink != nil {
			t.Fatal(errLink)
		}
		fd, errSocket := unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6)
		if errSocket != nil {
			t.Fatal(errSocket)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255); err != nil {
			t.Fatal(err)
		}
		to := &unix.SockaddrInet6{ZoneId: uint32(link.Index), Addr: netip.MustParseAddr("ff02::1").As16()}
		err = unix.Sendto(fd, ra, 0, to)
	})
	return err
}

func TestAPodDoesNotReachTheNodesLoopback(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n, a, _ := hostileNode(t, backend)
		loopback := netip.MustParseAddr("127.0.0.1")
		service := nettest.TCPServer(t, n.NS, netip.AddrPortFrom(loopback, 0))
		// The pod sends 127.0.0.1 out of its own link.
		a.NS.Run(t, "ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
		a.NS.Run(t, "ip", "route", "del", "local", "127.0.0.1", "dev", "lo", "table", "local")
		a.NS.Run(t, "ip", "route", "add", "127.0.0.1/32", "via", "169.254.1.1", "dev", "eth0",
			"src", a.IP(t, testnode.Node4).String())
		a.NS.Run(t, "sysctl", "-w", "net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.all.accept_local=1")
		from := netip.AddrPortFrom(a.IP(t, testnode.Node4), 0)

		if err := nettest.Dial(a.NS, "tcp", from, service, blockedWait); !nettest.Blocked(err) {
			t.Errorf("the pod to 127.0.0.1 of the node: %v, want silence", err)
		}
		n.StopPolicyd(t) // or it would put the rules back
		n.NS.Run(t, "iptables-"+backend, "-t", "mangle", "-F", "INPUT")
		if err := nettest.Dial(a.NS, "tcp", from, service, 5*time.Second); err != nil {
			t.Errorf("without the rules the same packet does not get through, so the test proves nothing: %v", err)
		}
	})
}

func TestFlushedSetsLetNothingThrough(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := testnode.New(t, testnode.Options{Backend: backend})
		open := &testnode.Pod{Namespace: "default", Name: "open", UID: "uid-open"}
		guarded := &testnode.Pod{Namespace: "guarded", Name: "guarded", UID: "uid-guarded"}
		n.Write(t, "all.yaml", open.Manifest(nil)+guarded.Manifest(nil)+allowEverything)
		n.Policyd(t)
		n.Attach(t, open)
		n.Attach(t, guarded)

		type way struct {
			name     string
			from, to *nettest.NS
			at       netip.AddrPort
		}
		var ways []way
		for _, like := range []netip.Addr{testnode.Outside4, testnode.Outside6} {
			outside := nettest.TCPServer(t, n.Outside, netip.AddrPortFrom(like, 0))
			toOpen := nettest.TCPServer(t, open.NS, netip.AddrPortFrom(open.IP(t, like), 0))
			toGuarded := nettest.TCPServer(t, guarded.NS, netip.AddrPortFrom(guarded.IP(t, like), 0))
			ways = append(ways,
				way{"open pod to outside", open.NS, n.Outside, outside}, way{"guarded pod to outside", guarded.NS, n.Outside, outside},
				way{"outside to open pod", n.Outside, open.NS, toOpen}, way{"outside to guarded pod", n.Outside, guarded.NS, toGuarded},
				way{"open pod to guarded pod", open.NS, guarded.NS, toGuarded},
				way{"guarded pod to open pod", guarded.NS, open.NS, toOpen})
		}
		for _, w := range ways {
			if err := nettest.Dial(w.from, "tcp", netip.AddrPort{}, w.at, 5*time.Second); err != nil {
				t.Errorf("before the flush, %s: %v", w.name, err)
			}
		}
		if sets := n.NS.Run(t, "ipset", "list", "-n"); !strings.Contains(sets, "pst-") {
			t.Fatalf("no sets of ours: %s", sets)
		}
		n.StopPolicyd(t) // or it would fill them again
		n.NS.Run(t, "ipset", "flush")
		for _, w := range ways {
			if err := nettest.Dial(w.from, "tcp", netip.AddrPort{}, w.at, blockedWait); !nettest.Blocked(err) {
				t.Errorf("after the flush, %s at %s: %v, want silence", w.name, w.at, err)
			}
		}
	})
}

const allowEverything = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-everything, namespace: guarded}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - ipBlock: {cidr: 0.0.0.0/0}
    - ipBlock: {cidr: "::/0"}
  egress:
  - to:
    - ipBlock: {cidr: 0.0.0.0/0}
    - ipBlock: {cidr: "::/0"}
`
