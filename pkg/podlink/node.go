package podlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
)

// Destinations of the documentation blocks (RFC 5737, RFC 3849): asking for the route there finds the default route's source.
var far = map[bool]net.IP{true: net.IPv4(192, 0, 2, 1).To4(), false: net.ParseIP("2001:db8::1")}

// Node finds out about the node that the calling thread is on. It asks each thing once.
type Node struct {
	h       *netlink.Handle
	sources map[bool]source // by "is IPv4"
}

// source is that of the default route, and the route's link.
type source struct {
	address netip.Addr // invalid where there is no such route
	link    netlink.Link
}

// OpenNode opens a way to the kernel.
func OpenNode() (*Node, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &Node{h, map[bool]source{}}, nil
}

// Close closes it.
func (n *Node) Close() { n.h.Close() }

// Addresses finds the node's own address in each family that pods have: the source of its default route, else the first address
// of global scope on a link that is no pod's. A family in which there is none is left out.
func (n *Node) Addresses(pods []netip.Addr) ([]netip.Addr, error) {
	var found []netip.Addr
	for _, v4 := range []bool{true, false} {
		if !slices.ContainsFunc(pods, func(a netip.Addr) bool { return a.Is4() == v4 }) {
			continue
		}
		a, err := n.address(v4)
		if err != nil {
			return nil, err
		}
		if a.IsValid() {
			found = append(found, a)
		}
	}
	return found, nil
}

func (n *Node) address(v4 bool) (netip.Addr, error) {
	if s := n.source(v4); s.address.IsValid() {
		return s.address, nil
	}
	links, err := n.links()
	if err != nil {
		return netip.Addr{}, err
	}
	addrs, err := addresses(n.h, v4)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range addrs {
		addr, ok := netip.AddrFromSlice(a.IP)
		if ok && a.Scope == unix.RT_SCOPE_UNIVERSE && links[a.LinkIndex] != nil && addr.Unmap().IsGlobalUnicast() {
			return addr.Unmap(), nil
		}
	}
	return netip.Addr{}, nil
}

// source costs the same however many pods there are.
func (n *Node) source(v4 bool) source {
	if s, asked := n.sources[v4]; asked {
		return s
	}
	n.sources[v4] = source{}
	routes, err := n.h.RouteGet(far[v4])
	if err != nil || len(routes) == 0 {
		return source{}
	}
	a, ok := netip.AddrFromSlice(routes[0].Src)
	link, err := n.h.LinkByIndex(routes[0].LinkIndex)
	if !ok || err != nil || pods(link.Attrs().Name) || link.Attrs().Flags&net.FlagLoopback != 0 {
		return source{}
	}
	n.sources[v4] = source{a.Unmap(), link}
	return n.sources[v4]
}

// whole repeats a dump until nothing changed under it: the kernel marks one that may have gaps (NLM_F_DUMP_INTR), which is
// common while many pods come.
func whole[T any](dump func() ([]T, error)) (list []T, err error) {
	const tries = 100
	for range tries {
		if list, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return list, err
}

// links returns those that are neither loopback nor a pod's, by index.
func (n *Node) links() (map[int]netlink.Link, error) {
	list, err := whole(n.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := map[int]netlink.Link{}
	for _, l := range list {
		if !pods(l.Attrs().Name) && l.Attrs().Flags&net.FlagLoopback == 0 {
			out[l.Attrs().Index] = l
		}
	}
	return out, nil
}

// pods reports whether a link's name is one that we give.
func pods(name string) bool {
	return strings.HasPrefix(name, attachment.GuardedPrefix) || strings.HasPrefix(name, attachment.UnguardedPrefix)
}

func addresses(h *netlink.Handle, v4 bool) ([]netlink.Addr, error) {
	family := unix.AF_INET6
	if v4 {
		family = unix.AF_INET
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return h.AddrList(nil, family) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	return addrs, nil
}

// Uplink is the link that holds the node's address of a family; nil if none does.
func (n *Node) Uplink(nodeAddresses []netip.Addr, v4 bool) (netlink.Link, error) {
	for _, node := range nodeAddresses {
		if node.Is4() != v4 {
			continue
		}
		if s := n.source(v4); s.address == node {
			return s.link, nil
		}
		addrs, err := addresses(n.h, v4)
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if addr, ok := netip.AddrFromSlice(a.IP); ok && addr.Unmap() == node {
				return n.h.LinkByIndex(a.LinkIndex)
			}
		}
	}
	return nil, nil
}

// DefaultMTU is a pod's where the node has no address to take it from.
const DefaultMTU = 1500

// MTU is that of the link with the node's address; of two, the smaller.
func (n *Node) MTU(nodeAddresses []netip.Addr) (int, error) {
	mtu := 0
	for _, v4 := range []bool{true, false} {
		link, err := n.Uplink(nodeAddresses, v4)
		if err != nil {
			return 0, err
		}
		if link != nil && (mtu == 0 || link.Attrs().MTU < mtu) {
			mtu = link.Attrs().MTU
		}
	}
	if mtu == 0 || mtu > 65535 {
		return DefaultMTU, nil
	}
	return mtu, nil
}
