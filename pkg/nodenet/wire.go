package nodenet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/rule"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// By these our routes are known. The metric is larger than those that routes mostly have (IPv4 0, IPv6 1024).
const (
	Protocol = 112
	Metric   = 2048
	// metricOwn, of the route that refuses the node's own CIDR, lets every other one precede.
	metricOwn = 1 << 20
)

// learnable bounds what the device learns, which nobody needs; see the package comment.
const learnable = 1 << 16

// wiring is one call of Wire.
type wiring struct {
	changes []string
	errs    []error
}

func (w *wiring) did(format string, args ...any) {
	w.changes = append(w.changes, fmt.Sprintf(format, args...))
}

func (w *wiring) fail(err error) { w.errs = append(w.errs, err) }

// Wire makes devices, neighbours and routes what the plan says, in the network namespace of the calling thread, and returns what
// it changed in words. The rules are in force already: what comes out of a new tunnel is judged. Whatever fails stops nothing
// else; the same call again goes on.
func Wire(p *Plan) ([]string, error) {
	w := &wiring{}
	links := map[string]int{}
	for _, d := range p.Devices {
		if link, err := w.device(d); err != nil {
			w.fail(fmt.Errorf("tunnel device %s: %w", d.Name, err))
		} else {
			links[d.Name] = link.Attrs().Index
			w.peers(d, link.Attrs().Index)
		}
	}
	w.routes(p.Routes, links)
	for _, d := range p.Devices {
		if index := links[d.Name]; index != 0 {
			w.strangers(d, index)
		}
	}
	w.otherDevices(links)
	return w.changes, errors.Join(w.errs...)
}

// Unplug takes away the devices of ours that listen where the plan's rules keep nobody out: on another port, or with the tunnel
// switched off. It comes before the rules; all else waits for Wire.
func Unplug(p *Plan) ([]string, error) {
	w := &wiring{}
	for _, f := range rule.Families {
		link, err := netlink.LinkByName(deviceName(f))
		if err != nil {
			continue
		}
		if v, ok := link.(*netlink.Vxlan); ok && (p.options.Tunnel == TunnelNever || v.Port != int(p.options.Port)) {
			w.remove(link)
		}
	}
	return w.changes, errors.Join(w.errs...)
}

// Unwire takes away every route and device of ours.
func Unwire() error {
	w := &wiring{}
	w.routes(nil, nil)
	w.otherDevices(nil)
	return errors.Join(w.errs...)
}

// device makes a device, or makes it right.
func (w *wiring) device(d Device) (netlink.Link, error) {
	want := vxlan(d)
	is, err := netlink.LinkByName(d.Name)
	switch {
	case err == nil && sameDevice(is, want):
	case err == nil:
		if is.Type() != "vxlan" {
			return nil, fmt.Errorf("a link of this name is there and is no VXLAN device but %s: it has to go", is.Type())
		}
		if err := netlink.LinkDel(is); err != nil {
			return nil, fmt.Errorf("remove the old one: %w", err)
		}
		fallthrough
	case errors.As(err, &netlink.LinkNotFoundError{}):
		if err := netlink.LinkAdd(want); err != nil {
			return nil, fmt.Errorf("make it: %w; another VXLAN device with this VNI and port may be there", err)
		}
		w.did("made device %s", d.Name)
		if is, err = netlink.LinkByName(d.Name); err != nil {
			return nil, err
		}
	default:
		return nil, err
	}
	return is, w.settle(d, is)
}

func vxlan(d Device) *netlink.Vxlan {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = d.Name, d.MTU, hardware(MAC(d.Local))
	return &netlink.Vxlan{LinkAttrs: attrs, VxlanId: d.VNI, Port: int(d.Port), SrcAddr: d.Local.AsSlice(), Learning: true,
		Limit: learnable, UDPCSum: true}
}

// sameDevice compares what cannot be changed while a device is there, and its address, with which its neighbours would go.
func sameDevice(is netlink.Link, want *netlink.Vxlan) bool {
	v, ok := is.(*netlink.Vxlan)
	return ok && v.VxlanId == want.VxlanId && v.Port == want.Port && v.SrcAddr.Equal(want.SrcAddr) && v.Learning == want.Learning &&
		v.Limit == want.Limit && !v.FlowBased && bytes.Equal(v.HardwareAddr, want.HardwareAddr)
}

// settle sets what can be changed while the device is there: settings, MTU, addresses, up.
func (w *wiring) settle(d Device, link netlink.Link) error {
	if err := settings(d); err != nil {
		return err
	}
	if link.Attrs().MTU != d.MTU {
		if err := netlink.LinkSetMTU(link, d.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", d.MTU, err)
		}
		w.did("set MTU %d of %s", d.MTU, d.Name)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
		w.did("set up %s", d.Name)
	}
	return w.addresses(d, link)
}

// settings keep the device from listening to advertisements and from addresses of its own making. The origin of packets is
// checked by rules, whatever the sysctl of all interfaces says.
func settings(d Device) error {
	v4, v6 := "ipv4/conf/"+d.Name+"/", "ipv6/conf/"+d.Name+"/"
	for _, s := range []sysctl.Setting{sysctl.Of(v4+"rp_filter", "0"), sysctl.Of(v4+"accept_redirects", "0"),
		sysctl.Of(v4+"send_redirects", "0"), sysctl.Of(v6+"accept_ra", "0"), sysctl.Of(v6+"accept_redirects", "0"),
		sysctl.Of(v6+"addr_gen_mode", "1"), sysctl.Of(v6+"disable_ipv6", "0")} {
		if _, err := s.Set(); err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	return nil
}

func (w *wiring) addresses(d Device, link netlink.Link) error {
	list, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(link, unix.AF_UNSPEC) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	var have []netip.Addr
	for i := range list {
		a := address(list[i].IP)
		if slices.Contains(d.Addresses, a) {
			have = append(have, a)
		} else if err := netlink.AddrDel(link, &list[i]); err != nil {
			return fmt.Errorf("remove address %s: %w", a, err)
		}
	}
	for _, a := range d.Addresses {
		if slices.Contains(have, a) {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(single(a))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", a, err)
		}
		w.did("gave %s to %s", a, d.Name)
	}
	return nil
}

// entry is a forwarding entry (a MAC and an outer address) or a neighbour (an inner address and a MAC).
type entry struct {
	mac [6]byte
	ip  netip.Addr
}

// wantedEntries are a device's, by netlink family.
func wantedEntries(d Device) map[int]map[entry]bool {
	want := map[int]map[entry]bool{unix.AF_BRIDGE: {}, unix.AF_INET: {}, unix.AF_INET6: {}}
	for _, peer := range d.Peers {
		mac := MAC(peer.Address)
		want[unix.AF_BRIDGE][entry{mac, peer.Address}] = true
		for _, g := range peer.Gateways {
			family := unix.AF_INET
			if rule.FamilyOf(g) == rule.IPv6 {
				family = unix.AF_INET6
			}
			want[family][entry{mac, g}] = true
		}
	}
	return want
}

// static lists the entries of one netlink family that do not age. What the device has learned ages.
func static(index, family int) (map[entry]netlink.Neigh, error) {
	list, err := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours and forwarding entries: %w", err)
	}
	out := map[entry]netlink.Neigh{}
	for _, n := range list {
		if n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 && n.LinkIndex == index {
			out[entry{[6]byte(n.HardwareAddr), address(n.IP)}] = n
		}
	}
	return out, nil
}

// peers adds what is missing of a device's entries.
func (w *wiring) peers(d Device, index int) {
	for family, list := range wantedEntries(d) {
		have, err := static(index, family)
		if err != nil {
			w.fail(fmt.Errorf("tunnel device %s: %w", d.Name, err))
			continue
		}
		for e := range list {
			if _, there := have[e]; there {
				continue
			}
			n := &netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, IP: e.ip.AsSlice(),
				HardwareAddr: hardware(e.mac)}
			if family == unix.AF_BRIDGE {
				n.Flags = netlink.NTF_SELF
			}
			if err := netlink.NeighSet(n); err != nil {
				w.fail(fmt.Errorf("tunnel device %s: add %s at %s: %w", d.Name, e.ip, n.HardwareAddr, err))
				continue
			}
			w.did("added %s at %s to %s", e.ip, n.HardwareAddr, d.Name)
		}
	}
}

// strangers removes static entries that no peer of the device has.
func (w *wiring) strangers(d Device, index int) {
	for family, list := range wantedEntries(d) {
		have, err := static(index, family)
		if err != nil {
			w.fail(fmt.Errorf("tunnel device %s: %w", d.Name, err))
			continue
		}
		for e, n := range have {
			// Multicast groups that the device listens to show as neighbours without end.
			if list[e] || e.ip.IsMulticast() {
				continue
			}
			n.Family = family
			if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				w.fail(fmt.Errorf("tunnel device %s: remove %s at %s: %w", d.Name, e.ip, n.HardwareAddr, err))
				continue
			}
			w.did("removed %s at %s from %s", e.ip, n.HardwareAddr, d.Name)
		}
	}
}

// otherDevices removes VXLAN devices of ours that are not wanted.
func (w *wiring) otherDevices(wanted map[string]int) {
	for _, f := range rule.Families {
		name := deviceName(f)
		link, err := netlink.LinkByName(name)
		if wanted[name] != 0 || err != nil || link.Type() != "vxlan" {
			continue
		}
		w.remove(link)
	}
}

func (w *wiring) remove(link netlink.Link) {
	if err := netlink.LinkDel(link); err != nil {
		w.fail(fmt.Errorf("remove device %s: %w", link.Attrs().Name, err))
		return
	}
	w.did("removed device %s", link.Attrs().Name)
}

// routes makes our routes what is wanted. Those of others are not touched, whatever they say.
func (w *wiring) routes(want []Route, links map[string]int) {
	have := map[netip.Prefix][]netlink.Route{}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := ours(family)
		if err != nil {
			w.fail(err)
			return
		}
		for _, r := range list {
			have[prefixOf(&r)] = append(have[prefixOf(&r)], r)
		}
	}
	for _, r := range want {
		full := r.netlink(links)
		if full == nil {
			delete(have, r.Dst) // its device could not be made; what is there stays
			continue
		}
		rest := slices.DeleteFunc(have[r.Dst], func(is netlink.Route) bool { return sameRoute(&is, full) })
		if len(rest) == len(have[r.Dst]) {
			rest = w.addRoute(full, rest)
		}
		have[r.Dst] = rest
	}
	for _, list := range have {
		for _, r := range list {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				w.fail(fmt.Errorf("remove our route %s: %w", word(&r), err))
				continue
			}
			w.did("removed route %s", word(&r))
		}
	}
}

// addRoute adds a route. If ours for the same destination with that metric is there, it takes its place at once, so that no
// packet finds none. What of the old ones is still there is returned.
func (w *wiring) addRoute(r *netlink.Route, was []netlink.Route) []netlink.Route {
	verb, do := "added", netlink.RouteAdd
	replaced := func(o netlink.Route) bool { return o.Priority == r.Priority }
	if slices.ContainsFunc(was, replaced) {
		verb, do = "changed", netlink.RouteReplace
	}
	if err := do(r); err != nil {
		why := ""
		if errors.Is(err, unix.EEXIST) {
			why = "; there is one of somebody else's with our metric, which is left alone"
		}
		w.fail(fmt.Errorf("add route %s: %w%s", word(r), err, why))
	} else {
		w.did("%s route %s", verb, word(r))
	}
	return slices.DeleteFunc(was, replaced)
}

// ours lists our routes of a family.
func ours(family int) ([]netlink.Route, error) {
	list, err := whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Protocol: Protocol, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list our routes: %w", err)
	}
	return list, nil
}

// netlink is the route as netlink wants it; nil if its device is missing.
func (r Route) netlink(links map[string]int) *netlink.Route {
	out := &netlink.Route{Dst: ipNet(r.Dst), Protocol: Protocol, Priority: Metric, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}
	if !r.Via.IsValid() {
		out.Type, out.Priority = unix.RTN_UNREACHABLE, metricOwn
		return out
	}
	out.Gw, out.Src, out.LinkIndex = r.Via.AsSlice(), r.Source.AsSlice(), r.Link
	if r.Device != "" {
		out.LinkIndex = links[r.Device]
		out.SetFlag(netlink.FLAG_ONLINK)
	}
	if out.LinkIndex == 0 {
		return nil
	}
	return out
}

// sameRoute compares a route that is there with a wanted one. IPv6 shows refusing routes at lo.
func sameRoute(is, want *netlink.Route) bool {
	if is.Type != want.Type || is.Priority != want.Priority {
		return false
	}
	if is.Type == unix.RTN_UNREACHABLE {
		return true
	}
	return is.Gw.Equal(want.Gw) && is.Src.Equal(want.Src) && is.LinkIndex == want.LinkIndex && len(is.MultiPath) == 0
}

func prefixOf(r *netlink.Route) netip.Prefix {
	if r.Dst == nil {
		return netip.Prefix{}
	}
	ones, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(address(r.Dst.IP), ones)
}

// word names a route in messages.
func word(r *netlink.Route) string {
	if r.Type == unix.RTN_UNREACHABLE {
		return "unreachable " + r.Dst.String()
	}
	return fmt.Sprintf("%s via %s on link %d", r.Dst, r.Gw, r.LinkIndex)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
