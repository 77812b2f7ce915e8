package conntrack

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nlevents"
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

// Touches reports whether an address at either end of either direction is a wanted one.
func (f Flow) Touches(wanted func(netip.Addr) bool) bool {
	return wanted(f.Orig.Src.Addr()) || wanted(f.Orig.Dst.Addr()) || wanted(f.Reply.Src.Addr()) || wanted(f.Reply.Dst.Addr())
}

// Attributes that package nl does not name (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaFilter          = 25
	ctaFilterOrigFlags = 1

	filterIPDst        = 1 << 1
	filterProtoNum     = 1 << 3
	filterProtoDstPort = 1 << 5
)

// parseFlow reads the attributes of one message of a dump. Its tuple is valid as long as they are.
func parseFlow(attributes []byte) (f Flow, tuple []byte, err error) {
	var hasOrig, hasReply bool
	nlevents.Attributes(attributes, func(typ uint16, value []byte) {
		switch {
		case typ == nl.CTA_TUPLE_ORIG:
			tuple = value
			f.Orig, f.Proto, hasOrig = parseTuple(value)
		case typ == nl.CTA_TUPLE_REPLY:
			f.Reply, _, hasReply = parseTuple(value)
		case typ == nl.CTA_ZONE && len(value) == 2:
			f.Zone = binary.BigEndian.Uint16(value)
		case typ == nl.CTA_ID && len(value) == 4:
			f.ID = binary.BigEndian.Uint32(value)
		}
	})
	if !hasOrig || !hasReply {
		return Flow{}, nil, fmt.Errorf("a flow without both its tuples: %x", attributes)
	}
	return f, tuple, nil
}

func parseTuple(b []byte) (t Tuple, proto uint8, ok bool) {
	var src, dst netip.Addr
	var srcPort, dstPort uint16
	hasProto := false
	nlevents.Attributes(b, func(part uint16, b []byte) {
		nlevents.Attributes(b, func(typ uint16, value []byte) {
			switch {
			case part == nl.CTA_TUPLE_IP && (typ == nl.CTA_IP_V4_SRC || typ == nl.CTA_IP_V6_SRC):
				src, _ = netip.AddrFromSlice(value)
			case part == nl.CTA_TUPLE_IP && (typ == nl.CTA_IP_V4_DST || typ == nl.CTA_IP_V6_DST):
				dst, _ = netip.AddrFromSlice(value)
			case part == nl.CTA_TUPLE_PROTO && typ == nl.CTA_PROTO_NUM && len(value) == 1:
				proto, hasProto = value[0], true
			case part == nl.CTA_TUPLE_PROTO && typ == nl.CTA_PROTO_SRC_PORT && len(value) == 2:
				srcPort = binary.BigEndian.Uint16(value)
			case part == nl.CTA_TUPLE_PROTO && typ == nl.CTA_PROTO_DST_PORT && len(value) == 2:
				dstPort = binary.BigEndian.Uint16(value)
			}
		})
	})
	t = Tuple{netip.AddrPortFrom(src, srcPort), netip.AddrPortFrom(dst, dstPort)}
	return t, proto, src.IsValid() && dst.IsValid() && hasProto
}

// family returns the address family of netlink for an address.
func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
