package nodenet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/podlink"
)

// Look asks the kernel, in the network namespace of the calling thread, for what a plan has to know.
func Look(others []*object.Node, o Options) (Facts, error) {
	facts := Facts{Uplinks: map[netip.Addr]Uplink{}, Shared: map[netip.Addr]int{}}
	list, err := whole(netlink.LinkList)
	if err != nil {
		return facts, fmt.Errorf("list links: %w", err)
	}
	links := map[int]*netlink.LinkAttrs{}
	for _, l := range list {
		links[l.Attrs().Index] = l.Attrs()
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return facts, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		l, ip := links[a.LinkIndex], address(a.IP)
		if l != nil && ip.IsGlobalUnicast() {
			u := Uplink{Index: l.Index, Name: l.Name, MTU: l.MTU}
			if l.Flags&net.FlagLoopback != 0 { // it says nothing of the links that packets take
				u.MTU = podlink.DefaultMTU
			}
			facts.Uplinks[ip] = u
		}
	}
	if o.Tunnel == TunnelAlways {
		return facts, nil // whatever links are shared
	}
	for _, n := range others {
		for _, a := range n.Addresses {
			if link := sharedLink(a, links); link != 0 {
				facts.Shared[a] = link
			}
		}
	}
	return facts, nil
}

// sharedLink is the index of the link that another node's address is on; zero where it is behind a router, is not reached at all,
// or where the link is one on which nobody is asked for (a tunnel that knows by itself what goes where, and pods it does not).
func sharedLink(a netip.Addr, links map[int]*netlink.LinkAttrs) int {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) != 1 { // no way there, as yet
		return 0
	}
	r := routes[0]
	l := links[r.LinkIndex]
	if r.Gw != nil || r.Via != nil || r.Type != unix.RTN_UNICAST || l == nil ||
		l.Flags&(net.FlagPointToPoint|net.FlagLoopback) != 0 || l.RawFlags&unix.IFF_NOARP != 0 {
		return 0
	}
	return r.LinkIndex
}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// whole repeats a dump until nothing changed under it: the kernel marks one that may have gaps (NLM_F_DUMP_INTR).
func whole[T any](dump func() ([]T, error)) (list []T, err error) {
	const tries = 100
	for range tries {
		if list, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}
