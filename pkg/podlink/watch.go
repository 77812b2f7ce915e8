package podlink

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nlevents"
)

// Watcher notices what takes a pod's link apart on the node's side, in the network namespace of the thread that made it: its
// routes, neighbours and addresses deleted or replaced, the node's end set down or changed, reverse path filtering or forwarding
// switched off, the node's own addresses gone or back. What makes a link is not reported. The end of a link announces the end of
// its routes first, so that a report may be of a link that is being deleted: [Restore] finds nothing then.
//
// The kernel does not announce the IPv4 routes that go with a link's being set down or with an address of the node, nor most
// sysctls; the first two are told by what they follow from.
type Watcher struct {
	socket *nlevents.Socket
	h      *netlink.Handle // in the namespace of the socket, whatever thread asks

	mu      sync.Mutex
	changes chan []string // holds one value at most

	// Used only while the socket is read.
	seen    seen
	pending map[string]bool
}

// seen is what the announcements so far add up to.
type seen struct {
	links      map[int]linkState      // ours
	routes     map[netip.Addr]int     // to hosts over links of ours
	neighbours map[neighbourAt]string // permanent ones of links of ours, with their MAC
	node       map[netip.Addr]bool    // addresses on other links
}

type linkState struct {
	name, mac string
	mtu       int
	up        bool
}

type neighbourAt struct {
	link int
	addr netip.Addr
}

// NewWatcher begins to watch.
func NewWatcher() (*Watcher, error) {
	socket, err := nlevents.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR,
		unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF,
		unix.RTNLGRP_IPV6_NETCONF)
	if err != nil {
		return nil, fmt.Errorf("watch links: %w", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		socket.Close()
		return nil, fmt.Errorf("watch links: %w", err)
	}
	w := &Watcher{socket: socket, h: h, changes: make(chan []string, 1), pending: map[string]bool{}}
	if w.seen, err = w.look(); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Close ends the watch.
func (w *Watcher) Close() {
	w.socket.Close()
	w.h.Close()
}

// Changes delivers the names of the links to look at, sorted, all since the last value was taken.
func (w *Watcher) Changes() <-chan []string { return w.changes }

// Run reports until the context ends; an error means that nothing is noticed any more.
func (w *Watcher) Run(ctx context.Context) error {
	if err := w.socket.Run(ctx, w.read); err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	return nil
}

func (w *Watcher) read() error {
	lost, err := w.socket.Read(w.take)
	if err != nil {
		return err
	}
	if lost { // nobody knows what: look, and have every link looked at
		if w.seen, err = w.look(); err != nil {
			return err
		}
		w.all()
	}
	w.report()
	return nil
}

// report adds the pending names to those that nobody has taken yet.
func (w *Watcher) report() {
	if len(w.pending) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case names := <-w.changes:
		for _, name := range names {
			w.pending[name] = true
		}
	default:
	}
	w.changes <- slices.Sorted(maps.Keys(w.pending)) // only report sends, so there is room
	clear(w.pending)
}

func (w *Watcher) all() {
	for _, l := range w.seen.links {
		w.pending[l.name] = true
	}
}

// touched has a link looked at, if it is one of ours.
func (w *Watcher) touched(index int) {
	if l, ours := w.seen.links[index]; ours {
		w.pending[l.name] = true
	}
}

// look reads what there is.
func (w *Watcher) look() (seen, error) {
	s := seen{map[int]linkState{}, map[netip.Addr]int{}, map[neighbourAt]string{}, map[netip.Addr]bool{}}
	list, err := whole(w.h.LinkList)
	if err != nil {
		return s, fmt.Errorf("list links: %w", err)
	}
	for _, l := range list {
		if a := l.Attrs(); pods(a.Name) {
			s.links[a.Index] = linkState{a.Name, a.HardwareAddr.String(), a.MTU, a.Flags&net.FlagUp != 0}
		}
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return w.h.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return s, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && s.links[a.LinkIndex].name == "" {
			s.node[addr.Unmap()] = true
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := whole(func() ([]netlink.Route, error) { return w.h.RouteList(nil, family) })
		if err != nil {
			return s, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil || s.links[r.LinkIndex].name == "" {
				continue
			}
			if addr, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				s.routes[addr.Unmap()] = r.LinkIndex
			}
		}
		neighbours, err := whole(func() ([]netlink.Neigh, error) { return w.h.NeighList(0, family) })
		if err != nil {
			return s, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range neighbours {
			addr, ok := netip.AddrFromSlice(n.IP)
			if ok && n.State&netlink.NUD_PERMANENT != 0 && s.links[n.LinkIndex].name != "" {
				s.neighbours[neighbourAt{n.LinkIndex, addr.Unmap()}] = n.HardwareAddr.String()
			}
		}
	}
	return s, nil
}

// Lengths of the headers that follow netlink's (linux/rtnetlink.h, if_addr.h, neighbour.h, netconf.h).
const (
	ifinfomsg  = 16
	rtmsg      = 12
	ifaddrmsg  = 8
	ndmsg      = 12
	netconfmsg = 4 // one byte, and padding
)

// take is called for every announcement, in the kernel's order.
func (w *Watcher) take(m nlevents.Message) {
	var header int
	var take func(nlevents.Message, attributes)
	switch m.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		header, take = ifinfomsg, w.link
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		header, take = rtmsg, w.route
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		header, take = ifaddrmsg, w.address
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		header, take = ndmsg, w.neighbour
	case unix.RTM_NEWNETCONF:
		header, take = netconfmsg, w.setting
	}
	if take == nil || len(m.Data) < header {
		return
	}
	a := attributes{}
	nlevents.Attributes(m.Data[header:], func(typ uint16, value []byte) { a[typ] = value })
	take(m, a)
}

// attributes of a message by type; one that is not there is empty, its number 0 and its address invalid.
type attributes map[uint16][]byte

func (a attributes) number(typ uint16) int {
	if len(a[typ]) != 4 {
		return 0
	}
	return int(int32(binary.NativeEndian.Uint32(a[typ])))
}

func (a attributes) address(typ uint16) netip.Addr {
	addr, _ := netip.AddrFromSlice(a[typ])
	return addr.Unmap()
}

func (a attributes) mac(typ uint16) string { return net.HardwareAddr(a[typ]).String() }

func (w *Watcher) link(m nlevents.Message, a attributes) {
	if m.Data[0] != unix.AF_UNSPEC {
		return // a bridge speaks of its port
	}
	index := int(int32(binary.NativeEndian.Uint32(m.Data[4:])))
	before, known := w.seen.links[index]
	now := linkState{name: strings.TrimRight(string(a[unix.IFLA_IFNAME]), "\x00"), mac: a.mac(unix.IFLA_ADDRESS),
		mtu: a.number(unix.IFLA_MTU), up: binary.NativeEndian.Uint32(m.Data[8:])&unix.IFF_UP != 0}
	if m.Type == unix.RTM_DELLINK || !pods(now.name) {
		if known {
			w.forget(index, before.name)
		}
		return
	}
	w.seen.links[index] = now
	if known && (before.mac != now.mac || before.mtu != now.mtu || before.up && !now.up) {
		w.touched(index)
	}
}

// forget drops a link that is no more.
func (w *Watcher) forget(index int, name string) {
	delete(w.pending, name)
	delete(w.seen.links, index)
	maps.DeleteFunc(w.seen.routes, func(_ netip.Addr, link int) bool { return link == index })
	maps.DeleteFunc(w.seen.neighbours, func(at neighbourAt, _ string) bool { return at.link == index })
}

func (w *Watcher) route(m nlevents.Message, a attributes) {
	dst, index := a.address(unix.RTA_DST), a.number(unix.RTA_OIF)
	if !dst.IsValid() || int(m.Data[1]) != dst.BitLen() {
		return
	}
	had, guarded := w.seen.routes[dst]
	_, ours := w.seen.links[index]
	switch {
	case m.Type == unix.RTM_DELROUTE && guarded && had == index:
		delete(w.seen.routes, dst)
		w.touched(index)
	case m.Type == unix.RTM_NEWROUTE && ours:
		w.seen.routes[dst] = index
		if m.Flags&unix.NLM_F_REPLACE != 0 {
			w.touched(index)
		}
	case m.Type == unix.RTM_NEWROUTE && guarded: // over another link, perhaps in place of ours
		w.touched(had)
	}
}

func (w *Watcher) address(m nlevents.Message, a attributes) {
	addr := a.address(unix.IFA_LOCAL)
	if !addr.IsValid() {
		addr = a.address(unix.IFA_ADDRESS)
	}
	index := int(int32(binary.NativeEndian.Uint32(m.Data[4:])))
	gone := m.Type == unix.RTM_DELADDR
	if _, ours := w.seen.links[index]; ours {
		if gone && addr == Gateway6 {
			w.touched(index)
		}
		return
	}
	// A router's advertisement announces the same address again and again, and one that is still tentative serves no route.
	tentative := !gone && m.Data[2]&unix.IFA_F_TENTATIVE != 0
	if w.seen.node[addr] != gone || tentative || addr.IsLinkLocalUnicast() {
		return
	}
	if gone {
		delete(w.seen.node, addr)
	} else {
		w.seen.node[addr] = true
	}
	w.all()
}

func (w *Watcher) neighbour(m nlevents.Message, a attributes) {
	at := neighbourAt{int(int32(binary.NativeEndian.Uint32(m.Data[4:]))), a.address(unix.NDA_DST)}
	if _, ours := w.seen.links[at.link]; !ours {
		return
	}
	before, known := w.seen.neighbours[at]
	permanent := binary.NativeEndian.Uint16(m.Data[8:])&netlink.NUD_PERMANENT != 0
	mac := a.mac(unix.NDA_LLADDR)
	switch {
	case m.Type == unix.RTM_NEWNEIGH && permanent:
		w.seen.neighbours[at] = mac
		if known && before != mac {
			w.touched(at.link)
		}
	case known:
		delete(w.seen.neighbours, at)
		w.touched(at.link)
	}
}

// Attributes and values of linux/netconf.h.
const (
	netconfIfindex    = 1
	netconfForwarding = 2
	netconfRPFilter   = 3
	netconfAll        = -1 // the index that stands for net.ipv4.conf.all
)

func (w *Watcher) setting(_ nlevents.Message, a attributes) {
	index := a.number(netconfIfindex)
	if len(a[netconfForwarding]) == 4 && index == netconfAll && a.number(netconfForwarding) == 0 {
		w.all()
	}
	if len(a[netconfRPFilter]) == 4 && a.number(netconfRPFilter) != 1 {
		w.touched(index)
	}
}
