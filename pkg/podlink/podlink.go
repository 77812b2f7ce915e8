package podlink

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// Gateways of every pod, one of each family: the node's end answers for them.
var (
	Gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	Gateway6 = netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: 1})
)

// Gateway returns the pod's gateway in the family of an address.
func Gateway(of netip.Addr) netip.Addr {
	if of.Is4() {
		return Gateway4
	}
	return Gateway6
}

// Link is what to wire: the attachment, and routes in the pod besides the default one.
type Link struct {
	*attachment.Attachment
	Routes []netip.Prefix
}

// anyway is a handle that opens a connection for every call, in the namespace of the calling thread.
var anyway = new(netlink.Handle)

// retryFor is how long Create waits for a name that the kernel has not let go of: after a namespace went away with its
// links, that takes up to some 50 ms when many go together.
const retryFor = time.Second

// Create makes the link in the calling thread's network namespace and the container's, and returns the destinations to which
// the container's routes lead over it. A link of the same name that an older sandbox of the pod left is taken over. On failure
// [Delete] removes what was made.
func Create(ctx context.Context, l Link) (routes []netip.Prefix, err error) {
	if routes, err = create(ctx, l); err != nil {
		return nil, fmt.Errorf("link %s to %s in %s: %w", l.HostInterface, l.IfName, l.NetNS, err)
	}
	return routes, nil
}

// ends are ways to the kernel in the two namespaces, one connection each: a call by itself opens one and closes it again.
type ends struct {
	node, pod *netlink.Handle
	netns     ns.NetNS // the pod's
}

func open(path string) (*ends, error) {
	pod, err := ns.GetNS(path)
	if err != nil {
		return nil, err
	}
	e := &ends{netns: pod}
	if e.node, err = netlink.NewHandle(unix.NETLINK_ROUTE); err == nil {
		e.pod, err = netlink.NewHandleAt(netns.NsHandle(pod.Fd()), unix.NETLINK_ROUTE)
	}
	if err != nil {
		e.close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return e, nil
}

func (e *ends) close() {
	for _, h := range []*netlink.Handle{e.node, e.pod} {
		if h != nil {
			h.Close()
		}
	}
	_ = e.netns.Close() // it was only read
}

// within runs fn in the pod's namespace, on this thread: another one would have to be woken.
func (e *ends) within(fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		return err
	}
	defer home.Close()
	if err := netns.Set(netns.NsHandle(e.netns.Fd())); err != nil {
		return err
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(fmt.Sprintf("cannot leave the pod's network namespace, and nothing may be done to the node from there: %v", err))
		}
	}()
	return fn()
}

func create(ctx context.Context, l Link) (routes []netip.Prefix, err error) {
	e, err := open(l.NetNS)
	if err != nil {
		return nil, err
	}
	defer e.close()
	if err := forwarding(l); err != nil {
		return nil, err
	}
	host, err := e.addVeth(ctx, l)
	if err != nil {
		return nil, err
	}
	if err := settle(l, host); err != nil {
		return nil, err
	}
	if err := e.hostEnd(l, host); err != nil {
		return nil, err
	}
	if routes, err = e.podEnd(l); err != nil {
		return nil, fmt.Errorf("the pod's end: %w", err)
	}
	if err := e.awaitCarrier(ctx, l.HostInterface); err != nil {
		return nil, err
	}
	return routes, e.hostRoutes(l, host) // last: from here on packets reach a pod that can answer
}

// carrierLimit is how long the node's end may take to have a carrier; then it works, or it will when it has.
const carrierLimit = time.Second

// awaitCarrier waits until the node's end sends what it is given. It was set up before the pod's end, so without a carrier, and
// the kernel gives it a queue that swallows everything until a work item has noticed the carrier (dev_activate,
// net/sched/sch_generic.c). To ask for the link makes newer kernels do that at once (linkwatch_sync_dev, net/core/link_watch.c).
func (e *ends) awaitCarrier(ctx context.Context, name string) error {
	deadline := time.Now().Add(carrierLimit)
	for {
		host, err := e.node.LinkByName(name)
		if err != nil {
			return fmt.Errorf("ask for the carrier of the node's end: %w", err)
		}
		if host.Attrs().OperState == netlink.OperUp || time.Now().After(deadline) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the carrier of the node's end: %w", ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// addVeth makes the pair, both ends down, the pod's end in its namespace under its final name.
func (e *ends) addVeth(ctx context.Context, l Link) (netlink.Link, error) {
	hostMAC, errHost := net.ParseMAC(l.HostMAC)
	podMAC, errPod := net.ParseMAC(l.PodMAC)
	if err := errors.Join(errHost, errPod); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = l.HostInterface, l.MTU, hostMAC
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: l.IfName, PeerHardwareAddr: podMAC,
		PeerMTU: uint32(l.MTU), PeerNamespace: netlink.NsFd(int(e.netns.Fd()))}
	deadline := time.Now().Add(retryFor)
	for {
		err := e.node.LinkAdd(veth)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || time.Now().After(deadline) {
			return nil, fmt.Errorf("create the veth: %w", err)
		}
		removed, err := e.makeRoom(l)
		if err != nil {
			return nil, err
		}
		if removed {
			continue
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("create the veth: the name is taken, and %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return veth, nil
}

// settle gives the node's end its alias and its settings, whose values nobody has chosen yet: to ask for each first takes longer.
// The alias and what netlink can set (IFLA_AF_SPEC; of IPv6 only how addresses are made) are one message, the rest is files.
func settle(l Link, host netlink.Link) error {
	var files []sysctl.Setting
	spec, v4, v6 := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil), nl.NewRtAttr(ifla4Conf, nil), nl.NewRtAttr(unix.AF_INET6, nil)
	for _, s := range hostSettings(l) {
		value, err := strconv.ParseUint(s.Value, 10, 8)
		if err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
		name := path.Base(s.Path)
		place, numbered := places4[name]
		switch {
		case numbered && strings.HasPrefix(s.Path, "ipv4/"):
			v4.AddRtAttr(place+1, nl.Uint32Attr(uint32(value)))
		case name == genMode:
			v6.AddRtAttr(ifla6GenMode, nl.Uint8Attr(uint8(value)))
			spec.AddChild(v6)
		default:
			files = append(files, s)
		}
	}
	spec.AddRtAttr(unix.AF_INET, nil).AddChild(v4)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(host.Attrs().Index)
	request := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	request.AddData(message)
	request.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(l.Key().String())))
	request.AddData(spec)
	if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("set the alias and the settings of the node's end: %w", err)
	}
	return sysctl.Write(files...)
}

// makeRoom finds out which of the two names is taken. The pod's is an error; what has the node's is removed.
func (e *ends) makeRoom(l Link) (removed bool, err error) {
	if _, err := e.pod.LinkByName(l.IfName); err == nil {
		return false, fmt.Errorf("the pod has an interface %s already; another plugin of the list may have made it", l.IfName)
	}
	return removeOld(e.node, l.HostInterface)
}

// removeOld removes what has the name: the link of an older sandbox of the same pod, or of an ADD that was killed.
func removeOld(h *netlink.Handle, name string) (removed bool, err error) {
	old, err := h.LinkByName(name)
	if notFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for an older link: %w", err)
	}
	if err := h.LinkDel(old); err != nil && !gone(err) {
		return false, fmt.Errorf("remove the older sandbox's link: %w", err)
	}
	return true, nil
}

func notFound(err error) bool {
	var e netlink.LinkNotFoundError
	return errors.As(err, &e)
}

func gone(err error) bool { return errors.Is(err, unix.ENODEV) || notFound(err) }

// hostEnd sets the node's end up; IPv6 neighbours need its link-local address, IPv4 needs none.
func (e *ends) hostEnd(l Link, host netlink.Link) error {
	if err := e.node.LinkSetUp(host); err != nil {
		return fmt.Errorf("set the node's end up: %w", err)
	}
	if has6(l) {
		return hostGateway(e.node, host)
	}
	return nil
}

func hostGateway(h *netlink.Handle, host netlink.Link) error {
	gateway := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(Gateway6, 64)), Flags: unix.IFA_F_NODAD}
	if err := h.AddrAdd(host, gateway); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add %s to the node's end: %w", Gateway6, err)
	}
	return nil
}

// hostRoutes leads the pod's addresses to the link.
func (e *ends) hostRoutes(l Link, host netlink.Link) error {
	for _, a := range l.Addresses {
		if err := hostNeighbour(e.node, l, host, a); err != nil {
			return err
		}
		if err := hostRoute(e.node, host, a, nodeAddressOf(l, a)); err != nil {
			return err
		}
	}
	return nil
}

func hostNeighbour(h *netlink.Handle, l Link, host netlink.Link, a netip.Addr) error {
	mac, err := net.ParseMAC(l.PodMAC)
	if err != nil {
		return err
	}
	if err := h.NeighSet(neighbour(host, a, mac)); err != nil {
		return fmt.Errorf("set the neighbour %s: %w", a, err)
	}
	return nil
}

// hostRoute leads an address to the link, with the node's address as source unless it is invalid.
func hostRoute(h *netlink.Handle, host netlink.Link, a, source netip.Addr) error {
	route := &netlink.Route{LinkIndex: host.Attrs().Index, Dst: ipNet(single(a)), Scope: netlink.SCOPE_LINK, Src: source.AsSlice()}
	if err := h.RouteReplace(route); err != nil {
		return fmt.Errorf("set the route to %s: %w", a, err)
	}
	return nil
}

// nodeAddressOf is the node's own address in the family of a pod's; invalid where it has none.
func nodeAddressOf(l Link, a netip.Addr) netip.Addr {
	for _, node := range l.NodeAddresses {
		if node.Is4() == a.Is4() {
			return node
		}
	}
	return netip.Addr{}
}

func (e *ends) podEnd(l Link) (routes []netip.Prefix, err error) {
	if settings := podSettings(l); len(settings) > 0 {
		if err := e.within(func() error { return sysctl.Write(settings...) }); err != nil {
			return nil, err
		}
	}
	link, err := e.pod.LinkByName(l.IfName)
	if err != nil {
		return nil, err
	}
	if err := e.pod.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set up: %w", err)
	}
	mac, err := net.ParseMAC(l.HostMAC)
	if err != nil {
		return nil, err
	}
	for _, a := range l.Addresses {
		of, err := podAddress(e.pod, l, link, a, mac)
		if err != nil {
			return nil, err
		}
		routes = append(routes, of...)
	}
	return routes, nil
}

func podAddress(h *netlink.Handle, l Link, link netlink.Link, a netip.Addr, hostMAC net.HardwareAddr) (routes []netip.Prefix, err error) {
	addr := &netlink.Addr{IPNet: ipNet(single(a))}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, addr); err != nil {
		return nil, fmt.Errorf("add %s: %w", a, err)
	}
	if err := h.NeighSet(neighbour(link, Gateway(a), hostMAC)); err != nil {
		return nil, fmt.Errorf("set the neighbour %s: %w", Gateway(a), err)
	}
	index := link.Attrs().Index
	if a.Is4() { // every interface has its own way to the one gateway
		gateway := &netlink.Route{LinkIndex: index, Dst: ipNet(single(Gateway4)), Scope: netlink.SCOPE_LINK, Src: a.AsSlice()}
		if err := h.RouteAppend(gateway); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("add the route to %s: %w", Gateway4, err)
		}
	}
	for _, dst := range destinations(l, a) {
		err := h.RouteAdd(through(index, a, dst, unix.RT_TABLE_MAIN))
		if err == nil {
			routes = append(routes, dst)
			continue
		}
		if !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("add the route to %s: %w", dst, err)
		}
		if dst.Bits() == 0 { // another interface has the default route
			if err := bySource(h, index, a, dst); err != nil {
				return nil, err
			}
		}
	}
	return routes, nil
}

// destinations are those of a family that the pod's routes lead to over the link: everything, and what the configuration adds.
func destinations(l Link, a netip.Addr) []netip.Prefix {
	everything := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	if a.Is4() {
		everything = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	list := []netip.Prefix{everything}
	for _, dst := range l.Routes {
		if dst.Addr().Is4() == a.Is4() {
			list = append(list, dst)
		}
	}
	return list
}

// through is a route by the link's gateway.
func through(index int, a netip.Addr, dst netip.Prefix, table int) *netlink.Route {
	return &netlink.Route{LinkIndex: index, Dst: ipNet(dst), Gw: Gateway(a).AsSlice(), Src: a.AsSlice(), Table: table,
		Flags: int(netlink.FLAG_ONLINK)}
}

// tableBase and the link's index make the number of a further interface's own routing table in the pod.
const tableBase = 0x70730000

// bySource gives a further interface of a pod a default route of its own, for packets with its own address: a reply that left
// by the first interface would have a source there that is not that link's, and be dropped as forged.
func bySource(h *netlink.Handle, index int, a netip.Addr, everything netip.Prefix) error {
	table := tableBase + index
	if err := h.RouteReplace(through(index, a, everything, table)); err != nil {
		return fmt.Errorf("add the default route for packets from %s: %w", a, err)
	}
	rule := netlink.NewRule()
	rule.Src, rule.Table, rule.Family = ipNet(single(a)), table, unix.AF_INET6
	if a.Is4() {
		rule.Family = unix.AF_INET
	}
	if err := h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add the rule for packets from %s: %w", a, err)
	}
	return nil
}

// Delete removes the link if it belongs to the attachment: by its alias, or because it has none yet, which only a killed ADD
// leaves. That there is no such link is no error; nor is it that the pod's namespace has taken it along meanwhile. The caller
// holds the lock of the host interface.
func Delete(hostInterface string, owner attachment.Key) error {
	return StartDelete(hostInterface, owner)()
}

// StartDelete begins a [Delete], in the network namespace of the calling thread. What it returns waits until it is done.
func StartDelete(hostInterface string, owner attachment.Key) (done func() error) {
	failed := func(err error) error {
		if err == nil || gone(err) {
			return nil
		}
		return fmt.Errorf("delete link %s: %w", hostInterface, err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE) // a connection stays in its namespace, whatever thread uses it
	if err != nil {
		return func() error { return failed(err) }
	}
	link, err := h.LinkByName(hostInterface)
	if err != nil || link.Attrs().Alias != "" && link.Attrs().Alias != owner.String() {
		h.Close()
		return func() error { return failed(err) }
	}
	ended := make(chan error, 1)
	go func() {
		defer h.Close()
		ended <- h.LinkDel(link)
	}()
	return func() error { return failed(<-ended) }
}

// Owned returns the links of ours whose alias is the attachment's key: for a DEL that finds no record.
func Owned(owner attachment.Key) (names []string, err error) {
	all, err := Owners()
	for name, key := range all {
		if key == owner.String() {
			names = append(names, name)
		}
	}
	return names, err
}

// Owners returns every link of ours by name, with the key of its attachment as its alias has it; empty where it has none.
func Owners() (map[string]string, error) {
	list, err := whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	owners := map[string]string{}
	for _, l := range list {
		if pods(l.Attrs().Name) {
			owners[l.Attrs().Name] = l.Attrs().Alias
		}
	}
	return owners, nil
}

func neighbour(link netlink.Link, a netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(),
		HardwareAddr: mac}
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// DeleteAny removes a link of ours whoever it belongs to.
func DeleteAny(hostInterface string) error {
	if _, err := removeOld(anyway, hostInterface); err != nil {
		return fmt.Errorf("delete link %s: %w", hostInterface, err)
	}
	return nil
}
