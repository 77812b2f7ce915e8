package conntrack

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Tuple is one direction of a flow as its packets show it. Ports are 0 for protocols that have none.
type Tuple struct{ Src, Dst netip.AddrPort }

// Flow is one entry of the table. The reply's source is the real destination: where the original destination was
// translated (a Service, a hostPort), they differ.
type Flow struct {
	Proto       uint8 // IPPROTO_*
	Orig, Reply Tuple
	Zone        uint16
	ID          uint32 // tells an entry from a later one with the same tuples

	tuple string // CTA_TUPLE_ORIG as the kernel gave it, which Delete sends back: it carries ICMP's fields too
}

// String returns the flow for logs: "17 10.0.0.1:53->10.0.0.2:4000, reply ... zone 0".
func (f Flow) String() string {
	return fmt.Sprintf("%d %v->%v, reply %v->%v, zone %d", f.Proto, f.Orig.Src, f.Orig.Dst, f.Reply.Src, f.Reply.Dst, f.Zone)
}

// touches reports whether an address at either end of either direction is a wanted one.
func (f Flow) touches(wanted func(netip.Addr) bool) bool {
	return wanted(f.Orig.Src.Addr()) || wanted(f.Orig.Dst.Addr()) || wanted(f.Reply.Src.Addr()) || wanted(f.Reply.Dst.Addr())
}

// Attributes that package nl does not name (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2

	filterIPSrc        = 1 << 0
	filterIPDst        = 1 << 1
	filterProtoNum     = 1 << 3
	filterProtoDstPort = 1 << 5

	typeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// attributes splits a message into its attributes by type.
func attributes(b []byte) (map[uint16][]byte, error) {
	list, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil, err
	}
	m := make(map[uint16][]byte, len(list))
	for _, a := range list {
		m[a.Attr.Type&typeMask] = a.Value
	}
	return m, nil
}

// parseFlow reads one message of a dump, after the netlink header.
func parseFlow(msg []byte) (Flow, error) {
	if len(msg) < nl.SizeofNfgenmsg {
		return Flow{}, fmt.Errorf("message of %d bytes", len(msg))
	}
	attrs, err := attributes(msg[nl.SizeofNfgenmsg:])
	if err != nil {
		return Flow{}, err
	}
	f := Flow{tuple: string(attrs[nl.CTA_TUPLE_ORIG])}
	if f.Orig, f.Proto, err = parseTuple(attrs[nl.CTA_TUPLE_ORIG]); err != nil {
		return Flow{}, fmt.Errorf("original tuple: %w", err)
	}
	if f.Reply, _, err = parseTuple(attrs[nl.CTA_TUPLE_REPLY]); err != nil {
		return Flow{}, fmt.Errorf("reply tuple: %w", err)
	}
	if z := attrs[nl.CTA_ZONE]; len(z) == 2 {
		f.Zone = binary.BigEndian.Uint16(z)
	}
	if id := attrs[nl.CTA_ID]; len(id) == 4 {
		f.ID = binary.BigEndian.Uint32(id)
	}
	return f, nil
}

func parseTuple(b []byte) (Tuple, uint8, error) {
	parts, err := attributes(b)
	if err != nil {
		return Tuple{}, 0, err
	}
	ip, err := attributes(parts[nl.CTA_TUPLE_IP])
	if err != nil {
		return Tuple{}, 0, err
	}
	proto, err := attributes(parts[nl.CTA_TUPLE_PROTO])
	if err != nil {
		return Tuple{}, 0, err
	}
	src, ok := netip.AddrFromSlice(append(ip[nl.CTA_IP_V4_SRC], ip[nl.CTA_IP_V6_SRC]...))
	dst, ok2 := netip.AddrFromSlice(append(ip[nl.CTA_IP_V4_DST], ip[nl.CTA_IP_V6_DST]...))
	if !ok || !ok2 || len(proto[nl.CTA_PROTO_NUM]) != 1 {
		return Tuple{}, 0, fmt.Errorf("incomplete")
	}
	return Tuple{
		netip.AddrPortFrom(src, port(proto[nl.CTA_PROTO_SRC_PORT])),
		netip.AddrPortFrom(dst, port(proto[nl.CTA_PROTO_DST_PORT])),
	}, proto[nl.CTA_PROTO_NUM][0], nil
}

func port(b []byte) uint16 {
	if len(b) != 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

// family returns the address family of netlink for an address.
func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
