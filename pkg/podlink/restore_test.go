package podlink_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/podlink"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// limit is for what must happen, however busy the machine is.
const limit = 30 * time.Second

// node is one with an uplink to an outside machine, and a pod.
type node struct {
	ns, outside, pod *nettest.NS
	a                *attachment.Attachment
	server           map[bool]netip.AddrPort // of the pod, by whether it is IPv4
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{ns: nettest.NewNS(t, "node"), outside: nettest.NewNS(t, "outside"), pod: nettest.NewNS(t, "pod"),
		server: map[bool]netip.AddrPort{}}
	nettest.Link(t,
		nettest.End{NS: n.ns, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.1/24", "2001:db8::1/64")},
		nettest.End{NS: n.outside, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.2/24", "2001:db8::2/64")})
	n.outside.Run(t, "ip", "route", "add", "10.244.0.0/16", "via", "192.0.2.1")
	n.outside.Run(t, "ip", "-6", "route", "add", "fd00::/16", "via", "2001:db8::1")
	n.ns.Run(t, "ip", "route", "add", "default", "via", "192.0.2.2")
	n.ns.Run(t, "ip", "-6", "route", "add", "default", "via", "2001:db8::2")
	n.a = n.attach(t, n.pod, 5)
	for _, a := range n.a.Addresses {
		n.server[a.Is4()] = nettest.TCPServer(t, n.pod, netip.AddrPortFrom(a, 80))
	}
	n.reachable(t)
	return n
}

// attach makes the link of a pod with the addresses of a number.
func (n *node) attach(t testing.TB, pod *nettest.NS, number byte) *attachment.Attachment {
	t.Helper()
	id := fmt.Sprintf("container-%d", number)
	a := &attachment.Attachment{ContainerID: id, IfName: "eth0", NetNS: pod.Path,
		HostInterface: attachment.HostInterface(attachment.GuardedPrefix, id, "eth0"),
		HostMAC:       fmt.Sprintf("0e:00:00:00:01:%02x", number), PodMAC: fmt.Sprintf("0e:00:00:00:02:%02x", number), MTU: 1400,
		Addresses:     []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, number}), netip.AddrFrom16([16]byte{0: 0xfd, 15: number})},
		NodeAddresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}}
	n.ns.Do(t, func() {
		if _, err := podlink.Create(context.Background(), podlink.Link{Attachment: a}); err != nil {
			t.Fatal(err)
		}
	})
	return a
}

// reachable tries the pod from outside in both families.
func (n *node) reachable(t testing.TB) {
	t.Helper()
	for _, to := range n.server {
		if err := nettest.Dial(n.outside, "tcp", netip.AddrPort{}, to, limit); err != nil {
			t.Errorf("the pod cannot be reached from outside: %v", err)
		}
	}
}

func (n *node) restore(t testing.TB, a *attachment.Attachment) (restored []string) {
	t.Helper()
	n.ns.Do(t, func() {
		var err error
		if restored, err = podlink.Restore(a); err != nil {
			t.Error(err)
		}
	})
	return restored
}

// faulty looks at all links at once, and reports whether that of an attachment is among those to be restored.
func (n *node) faulty(t testing.TB, a *attachment.Attachment) bool {
	t.Helper()
	var found []*attachment.Attachment
	n.ns.Do(t, func() {
		var err error
		if found, err = podlink.Faulty([]*attachment.Attachment{a}); err != nil {
			t.Error(err)
		}
	})
	return len(found) == 1
}

// watch begins to watch; the function that it returns waits until the watcher has named a link, and returns all it named.
func (n *node) watch(t *testing.T) (named func(link string) ([]string, time.Time)) {
	t.Helper()
	var w *podlink.Watcher
	n.ns.Do(t, func() {
		var err error
		if w, err = podlink.NewWatcher(); err != nil {
			t.Fatal(err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Run(ctx); err != nil {
			t.Errorf("the watcher ended: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait(); w.Close() })
	return func(link string) ([]string, time.Time) {
		t.Helper()
		var all []string
		for deadline := time.After(limit); ; {
			select {
			case names := <-w.Changes():
				if all = append(all, names...); slices.Contains(names, link) {
					return all, time.Now()
				}
			case <-deadline:
				t.Fatalf("%s was not named within %v; %v were", link, limit, all)
			}
		}
	}
}

// Each is done to the node by a shell; LINK stands for the node's end.
var damages = []struct {
	name, do string
	want     []string // parts of what Restore says
	silent   bool     // the kernel does not announce it
}{
	{name: "IPv4 route deleted", do: "ip route del 10.244.1.5", want: []string{"no route to 10.244.1.5"}},
	{name: "IPv6 route deleted", do: "ip -6 route del fd00::5", want: []string{"no route to fd00::5"}},
	{name: "all routes of the link flushed", do: "ip route flush dev LINK; ip -6 route flush dev LINK",
		want: []string{"no route to 10.244.1.5", "no route to fd00::5"}},
	{name: "route without its source", do: "ip route replace 10.244.1.5 dev LINK scope link",
		want: []string{"route to 10.244.1.5 has the source that the kernel chooses, not 192.0.2.1"}},
	{name: "IPv4 route over another link", do: "ip route replace 10.244.1.5 dev eth0", want: []string{"no route to 10.244.1.5"}},
	{name: "IPv6 route over another link", do: "ip -6 route replace fd00::5 dev eth0", want: []string{"no route to fd00::5"}},
	{name: "neighbours deleted", do: "ip neigh del 10.244.1.5 dev LINK; ip -6 neigh del fd00::5 dev LINK",
		want: []string{"MAC 0e:00:00:00:02:05 of 10.244.1.5", "MAC 0e:00:00:00:02:05 of fd00::5"}},
	{name: "neighbour with another MAC", do: "ip neigh replace 10.244.1.5 lladdr 0e:00:00:00:00:99 nud permanent dev LINK",
		want: []string{"MAC 0e:00:00:00:02:05 of 10.244.1.5"}},
	{name: "neighbour not permanent", do: "ip neigh replace 10.244.1.5 lladdr 0e:00:00:00:02:05 nud reachable dev LINK",
		want: []string{"MAC 0e:00:00:00:02:05 of 10.244.1.5"}},
	{name: "gateway address deleted", do: "ip addr del fe80::1/64 dev LINK", want: []string{"address fe80::1/64"}},
	{name: "addresses flushed", do: "ip addr flush dev LINK", want: []string{"address fe80::1/64"}},
	{name: "down", do: "ip link set LINK down",
		want: []string{"the node's end is down", "no route to 10.244.1.5", "address fe80::1/64"}},
	{name: "down and up", do: "ip link set LINK down; ip link set LINK up",
		want: []string{"no route to 10.244.1.5", "no route to fd00::5"}},
	{name: "MTU", do: "ip link set LINK mtu 1300", want: []string{"MTU 1300, not 1400"}},
	{name: "MAC", do: "ip link set LINK address 0e:00:00:00:00:99",
		want: []string{"MAC 0e:00:00:00:00:99, not 0e:00:00:00:01:05"}},
	{name: "IPv4 forwarding off", do: "sysctl -qw net.ipv4.ip_forward=0", want: []string{"net.ipv4.ip_forward is not 1"}},
	{name: "IPv6 forwarding off", do: "sysctl -qw net.ipv6.conf.all.forwarding=0",
		want: []string{"net.ipv6.conf.all.forwarding is not 1"}},
	{name: "reverse path filter off", do: "sysctl -qw net.ipv4.conf.LINK.rp_filter=0", want: []string{"rp_filter is not 1"}},
	{name: "router advertisements accepted", do: "sysctl -qw net.ipv6.conf.LINK.accept_ra=2",
		want: []string{"accept_ra is not 0"}, silent: true},
	{name: "IPv6 off on the link", do: "sysctl -qw net.ipv6.conf.LINK.disable_ipv6=1",
		want: []string{"disable_ipv6 is not 0", "address fe80::1/64", "no route to fd00::5"}},
	{name: "the node's address lost", do: "ip addr del 192.0.2.1/24 dev eth0; ip addr add 192.0.2.9/24 dev eth0",
		want: []string{"no route to 10.244.1.5"}},
}

func TestWhatSomebodyTakesFromALinkIsNoticedAndPutBack(t *testing.T) {
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			n := newNode(t)
			named := n.watch(t)
			n.ns.Run(t, "sh", "-ec", strings.ReplaceAll(d.do, "LINK", n.a.HostInterface))
			done := time.Now()
			if !d.silent {
				_, at := named(n.a.HostInterface)
				t.Logf("noticed %v after it was done", at.Sub(done).Round(10*time.Microsecond))
			}
			if !n.faulty(t, n.a) {
				t.Error("a look at all links does not find it")
			}
			start := time.Now()
			restored := n.restore(t, n.a)
			t.Logf("put right in %v: %s", time.Since(start).Round(10*time.Microsecond), strings.Join(restored, "; "))
			for _, want := range d.want {
				if !strings.Contains(strings.Join(restored, "\n"), want) {
					t.Errorf("it did not say %q", want)
				}
			}
			n.ns.Do(t, func() {
				if err := podlink.Check(podlink.Link{Attachment: n.a}); err != nil {
					t.Error(err)
				}
			})
			if again := n.restore(t, n.a); len(again) > 0 {
				t.Errorf("put back again: %v", again)
			}
			if n.faulty(t, n.a) {
				t.Error("a look at all links finds something although all was put back")
			}
			if !strings.Contains(d.name, "the node's address") {
				n.reachable(t)
			}
		})
	}
}

// The kernel deletes routes whose source address the node loses. The pod stays reachable without, and the route has its source
// again with the address.
func TestTheSourceOfARouteComesBackWithTheNodesAddress(t *testing.T) {
	n := newNode(t)
	named := n.watch(t)
	n.ns.Run(t, "ip", "addr", "del", "192.0.2.1/24", "dev", "eth0")
	named(n.a.HostInterface)
	n.restore(t, n.a)
	route := n.ns.Run(t, "ip", "route", "show", "10.244.1.5")
	if !strings.Contains(route, n.a.HostInterface) || strings.Contains(route, "src") {
		t.Errorf("the node has lost its address, and the route is %q", route)
	}
	n.ns.Run(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "eth0")
	named(n.a.HostInterface)
	n.restore(t, n.a)
	if route := n.ns.Run(t, "ip", "route", "show", "10.244.1.5"); !strings.Contains(route, "src 192.0.2.1") {
		t.Errorf("the node has its address again, and the route is %q", route)
	}
}

func TestRestoreWritesNothingWhereNothingIsWrong(t *testing.T) {
	n := newNode(t)
	other := *n.a
	other.ContainerID = "an older sandbox"
	gone := *n.a
	gone.HostInterface = "pst000000000000"
	var events *nlevents.Socket
	n.ns.Do(t, func() {
		var err error
		if events, err = nlevents.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF); err != nil {
			t.Fatal(err)
		}
	})
	defer events.Close()
	for name, a := range map[string]*attachment.Attachment{"a whole link": n.a, "another's link": &other, "no link": &gone} {
		if restored := n.restore(t, a); len(restored) > 0 || n.faulty(t, a) {
			t.Errorf("%s: %v", name, restored)
		}
	}
	lost, err := events.Read(func(m nlevents.Message) { t.Errorf("the kernel announced a change of type %d", m.Type) })
	if lost || err != nil {
		t.Errorf("read announcements: lost some %v, %v", lost, err)
	}
	// Another's link stays as it is, broken or not.
	n.ns.Run(t, "ip", "route", "del", "10.244.1.5")
	if restored := n.restore(t, &other); len(restored) > 0 {
		t.Errorf("another's link was touched: %v", restored)
	}
}

func TestRestoreIsSafeAgainstTheEndOfALink(t *testing.T) {
	n := newNode(t)
	const rounds = 20
	for i := range rounds {
		pod := nettest.NewNS(t, "short")
		a := n.attach(t, pod, byte(100+i))
		n.ns.Run(t, "ip", "link", "set", a.HostInterface, "down")
		var wg sync.WaitGroup
		wg.Go(func() {
			err := nettest.Enter(n.ns, func() {
				if err := podlink.Delete(a.HostInterface, a.Key()); err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Error(err)
			}
		})
		n.restore(t, a)
		wg.Wait()
		if restored := n.restore(t, a); len(restored) > 0 {
			t.Errorf("a link that is gone was restored: %v", restored)
		}
	}
}

func TestAStubbornRivalIsNamed(t *testing.T) {
	n := newNode(t)
	n.ns.Run(t, "ip", "-6", "route", "add", "fd00::5", "dev", "eth0", "metric", "1")
	var err error
	n.ns.Do(t, func() { _, err = podlink.Restore(n.a) })
	if err == nil || !strings.Contains(err.Error(), "no route to fd00::5") {
		t.Errorf("a better route of somebody else's stands, and Restore says: %v", err)
	}
}

// Pods that come, go and talk are no reason to look; a DEL is announced like damage, and is over when it is looked at.
func TestTheComingOfPodsIsNotReported(t *testing.T) {
	n := newNode(t)
	named := n.watch(t)
	var others []*attachment.Attachment
	for i := range 5 {
		others = append(others, n.attach(t, nettest.NewNS(t, "more"), byte(10+i)))
	}
	n.reachable(t)
	n.pod.Try("ping", "-6", "-c1", "-W1", "fe80::1%eth0")
	n.ns.Run(t, "ip", "route", "del", "10.244.1.5")
	if names, _ := named(n.a.HostInterface); len(names) != 1 {
		t.Errorf("%v were named, and only %s was touched", names, n.a.HostInterface)
	}
	n.restore(t, n.a)
	for _, a := range others {
		n.ns.Do(t, func() {
			if err := podlink.Delete(a.HostInterface, a.Key()); err != nil {
				t.Error(err)
			}
		})
	}
	n.ns.Run(t, "ip", "route", "del", "10.244.1.5")
	names, _ := named(n.a.HostInterface)
	for _, name := range names {
		for _, a := range others {
			if name == a.HostInterface && len(n.restore(t, a)) > 0 {
				t.Errorf("%s was deleted and is restored", name)
			}
		}
	}
}

func TestLinksThatWereThereBeforeAreWatched(t *testing.T) {
	n := newNode(t)
	named := n.watch(t)
	for range 3 {
		n.ns.Run(t, "ip", "-6", "route", "del", "fd00::5")
		named(n.a.HostInterface)
		if restored := n.restore(t, n.a); len(restored) != 1 {
			t.Errorf("put back %v, want the one route", restored)
		}
	}
}

// What a look at a whole node costs: go test -bench Look -run NONE ./pkg/podlink
func BenchmarkLook(b *testing.B) {
	n := newNode(b)
	list := []*attachment.Attachment{n.a}
	for i := range 99 {
		list = append(list, n.attach(b, nettest.NewNS(b, "more"), byte(10+i)))
	}
	for name, look := range map[string]func() (found int, err error){
		"at all links at once": func() (int, error) {
			faulty, err := podlink.Faulty(list)
			return len(faulty), err
		},
		"at each link": func() (found int, err error) {
			for _, a := range list {
				restored, failed := podlink.Restore(a)
				found, err = found+len(restored), errors.Join(err, failed)
			}
			return found, err
		},
	} {
		b.Run(name, func(b *testing.B) {
			n.ns.Do(b, func() {
				for b.Loop() {
					if found, err := look(); found > 0 || err != nil {
						b.Fatal(found, err)
					}
				}
			})
		})
	}
}
