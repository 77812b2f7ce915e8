package podlink

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// end is the node's end of a link, and what leads to it, as the kernel has it.
type end struct {
	link       netlink.Link // its index and name
	alias, mac string
	mtu        int
	up         bool
	gateway    bool                      // it has the gateway's IPv6 address
	neighbours map[netip.Addr]string     // those known for good, with their MAC
	routes     map[netip.Addr]netip.Addr // the addresses whose packets go over the link, with the route's source
	setting    func(sysctl.Setting) (string, error)
	onNode     func(netip.Addr) (bool, error) // the node has the address, and it can be a route's source
}

// ask finds out about one link; nil if it is not there.
func ask(l Link) (*end, error) {
	host, err := netlink.LinkByName(l.HostInterface)
	if notFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the node's end: %w", err)
	}
	at := host.Attrs()
	e := &end{link: host, alias: at.Alias, mac: at.HardwareAddr.String(), mtu: at.MTU, up: at.Flags&net.FlagUp != 0,
		neighbours: map[netip.Addr]string{}, routes: map[netip.Addr]netip.Addr{}, setting: sysctl.Setting.Read, onNode: onNode}
	if has6(l) {
		addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(host, unix.AF_INET6) })
		if err != nil {
			return nil, fmt.Errorf("list the addresses of the node's end: %w", err)
		}
		for _, a := range addrs {
			ones, _ := a.Mask.Size()
			got, ok := netip.AddrFromSlice(a.IP)
			e.gateway = e.gateway || ok && got == Gateway6 && ones == 64
		}
	}
	for _, a := range l.Addresses {
		family := neighbour(host, a, nil).Family
		list, err := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(at.Index, family) })
		if err != nil {
			return nil, fmt.Errorf("list the neighbours of the node's end: %w", err)
		}
		for _, n := range list {
			if got, ok := netip.AddrFromSlice(n.IP); ok && n.State&netlink.NUD_PERMANENT != 0 {
				e.neighbours[got.Unmap()] = n.HardwareAddr.String()
			}
		}
		if source, there := hostRouteSource(host, a); there {
			e.routes[a] = source
		}
	}
	return e, nil
}

// Faulty returns the attachments of a list whose links are there and may not be as Create made them, for [Restore] to look at. It
// reads the links, addresses, neighbours and routes of the whole node, once each, which for many links takes far less than to ask
// for each. What makes packets for a pod go another way than by a route to its very address it does not see.
func Faulty(list []*attachment.Attachment) (faulty []*attachment.Attachment, err error) {
	ends, err := allEnds()
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		l, e := Link{Attachment: a}, ends[a.HostInterface]
		if e == nil || e.alias != l.Key().String() {
			continue
		}
		if faults, err := hostFaults(l, e); len(faults) > 0 || err != nil {
			faulty = append(faulty, a)
		}
	}
	return faulty, nil
}

// allEnds finds out about all pods' links, by name.
func allEnds() (map[string]*end, error) {
	byName, byIndex, own := map[string]*end{}, map[int]*end{}, map[netip.Addr]bool{}
	onNode := func(a netip.Addr) (bool, error) { return own[a], nil }
	forwards := map[sysctl.Setting]string{}
	for _, s := range []sysctl.Setting{forwarding4, forwarding6} {
		forwards[s], _ = s.Read() // what cannot be read is no value that is wanted
	}
	err := dump(unix.RTM_GETLINK, unix.AF_UNSPEC, ifinfomsg, func(header []byte, a attributes) {
		name := strings.TrimRight(string(a[unix.IFLA_IFNAME]), "\x00")
		if !pods(name) {
			return
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Index = name, int(int32(binary.NativeEndian.Uint32(header[4:])))
		e := &end{link: &netlink.Device{LinkAttrs: attrs}, alias: strings.TrimRight(string(a[unix.IFLA_IFALIAS]), "\x00"),
			mac: a.mac(unix.IFLA_ADDRESS), mtu: a.number(unix.IFLA_MTU),
			up:         binary.NativeEndian.Uint32(header[8:])&unix.IFF_UP != 0,
			neighbours: map[netip.Addr]string{}, routes: map[netip.Addr]netip.Addr{}, onNode: onNode}
		settings := settingsOf(a[unix.IFLA_AF_SPEC])
		e.setting = func(s sysctl.Setting) (string, error) {
			if value, whole := forwards[s]; whole {
				return value, nil
			}
			return settings.value(s)
		}
		byName[name], byIndex[attrs.Index] = e, e
	})
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	err = dump(unix.RTM_GETADDR, unix.AF_UNSPEC, ifaddrmsg, func(header []byte, a attributes) {
		addr := a.address(unix.IFA_LOCAL)
		if !addr.IsValid() {
			addr = a.address(unix.IFA_ADDRESS)
		}
		if header[2]&unix.IFA_F_TENTATIVE == 0 {
			own[addr] = true
		}
		if e := byIndex[int(int32(binary.NativeEndian.Uint32(header[4:])))]; e != nil && addr == Gateway6 && header[1] == 64 {
			e.gateway = true
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		err := dump(unix.RTM_GETNEIGH, family, ndmsg, func(header []byte, a attributes) {
			e := byIndex[int(int32(binary.NativeEndian.Uint32(header[4:])))]
			if e != nil && binary.NativeEndian.Uint16(header[8:])&netlink.NUD_PERMANENT != 0 {
				e.neighbours[a.address(unix.NDA_DST)] = a.mac(unix.NDA_LLADDR)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		seen := map[netip.Addr]*end{} // nil where the route is not over a link of ours
		err = dump(unix.RTM_GETROUTE, family, rtmsg, func(header []byte, a attributes) {
			dst := a.address(unix.RTA_DST)
			if !dst.IsValid() || int(header[1]) != dst.BitLen() {
				return
			}
			e := byIndex[a.number(unix.RTA_OIF)]
			other, another := seen[dst]
			seen[dst] = e
			switch {
			case another && other != nil: // which of the two is taken, only the kernel can say
				delete(other.routes, dst)
			case !another && e != nil:
				e.routes[dst] = a.address(unix.RTA_PREFSRC)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	return byName, nil
}

// skipStats leaves the counters out of what the kernel says about links (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
const skipStats = 1 << 3

// dump calls each for every object of a kind, with its header of a length, in the namespace of the calling thread. The attributes
// are each's only until it returns; their values stay.
func dump(typ, family, length int, each func(header []byte, a attributes)) error {
	messages, err := whole(func() ([][]byte, error) {
		request := nl.NewNetlinkRequest(typ, unix.NLM_F_DUMP)
		header := make([]byte, length)
		header[0] = byte(family)
		request.AddRawData(header)
		if typ == unix.RTM_GETLINK {
			request.AddRawData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)).Serialize())
		}
		return request.Execute(unix.NETLINK_ROUTE, 0)
	})
	if err != nil {
		return err
	}
	a := attributes{}
	for _, m := range messages {
		if len(m) < length {
			return fmt.Errorf("a message of %d bytes, where its header has %d", len(m), length)
		}
		clear(a)
		nlevents.Attributes(m[length:], func(typ uint16, value []byte) { a[typ] = value })
		each(m, a)
	}
	return nil
}

// conf is the settings of a link of one family as netlink has them: 32-bit numbers.
type conf []byte

// settings of a link by family, and how it makes IPv6 addresses.
type settings struct {
	v4, v6  conf
	genMode []byte
}

// Places of settings in netlink's arrays: IPV4_DEVCONF_* of linux/ip.h less one, and DEVCONF_* of linux/ipv6.h.
var (
	places4 = map[string]int{"accept_redirects": 3, "send_redirects": 5, "rp_filter": 7}
	places6 = map[string]int{"accept_ra": 3, "accept_redirects": 4, "disable_ipv6": 26, "accept_dad": 27}
)

// Attributes of linux/if_link.h.
const (
	ifla4Conf    = 1 // IFLA_INET_CONF
	ifla6Conf    = 2 // IFLA_INET6_CONF
	ifla6GenMode = 8 // IFLA_INET6_ADDR_GEN_MODE
)

// genMode is how a link makes IPv6 addresses: a setting that is no number of the array.
const genMode = "addr_gen_mode"

func settingsOf(spec []byte) (s settings) {
	nlevents.Attributes(spec, func(family uint16, value []byte) {
		nlevents.Attributes(value, func(typ uint16, value []byte) {
			switch {
			case family == unix.AF_INET && typ == ifla4Conf:
				s.v4 = value
			case family == unix.AF_INET6 && typ == ifla6Conf:
				s.v6 = value
			case family == unix.AF_INET6 && typ == ifla6GenMode:
				s.genMode = value
			}
		})
	})
	return s
}

// value returns that of a setting of the link, as its file has it; an error that is fs.ErrNotExist where netlink does not say.
func (s settings) value(of sysctl.Setting) (string, error) {
	name, all, places := path.Base(of.Path), s.v4, places4
	if strings.HasPrefix(of.Path, "ipv6/") {
		all, places = s.v6, places6
		if name == genMode && len(s.genMode) > 0 {
			return strconv.Itoa(int(s.genMode[0])), nil
		}
	}
	place, known := places[name]
	if !known || len(all) < 4*place+4 {
		return "", fmt.Errorf("%s among the settings of the link: %w", of, fs.ErrNotExist)
	}
	return strconv.Itoa(int(int32(binary.NativeEndian.Uint32(all[4*place:])))), nil
}
