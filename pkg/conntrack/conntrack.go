package conntrack

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DeleteAddress deletes every flow, in every zone, that has the address as source or destination, in its original or its
// reply direction.
func DeleteAddress(addr netip.Addr) error {
	addr = addr.Unmap()
	if !addr.IsValid() || addr.IsUnspecified() {
		return fmt.Errorf("delete flows of %q: an address of a host is needed", addr)
	}
	if err := deleteAll(addressFilters(addr)); err != nil {
		return fmt.Errorf("delete flows of %s: %w", addr, err)
	}
	return nil
}

// DeleteUDPPort deletes the UDP flows, in every zone, whose original destination is this port. An invalid hostIP means
// every address of both families, an unspecified one every address of its family, any other that address alone.
func DeleteUDPPort(port uint16, hostIP netip.Addr) error {
	hostIP = hostIP.Unmap()
	of := []uint8{unix.AF_INET, unix.AF_INET6}
	if hostIP.IsValid() {
		of = []uint8{family(hostIP)}
	}
	for _, fam := range of {
		if err := deleteAll([]filter{udpPortFilter(fam, port, hostIP)}); err != nil {
			return fmt.Errorf("delete UDP flows to %v port %d: %w", hostIP, port, err)
		}
	}
	return nil
}

// deleteAll deletes what one of some filters of one family finds: the kernel does, or, where it cannot, a dump shows which.
func deleteAll(filters []filter) error {
	t, err := open()
	if err != nil {
		return err
	}
	defer t.Close()
	for _, f := range filters {
		if err = t.deleteFiltered(f); err != nil {
			break
		}
	}
	if errors.Is(err, errNoFilter) {
		err = t.deleteEach(filters)
	}
	return err
}

// deleteEach is the way of kernels that cannot filter a deletion.
func (t table) deleteEach(filters []filter) error {
	doomed, err := t.dump(filters[0].family, func(f Flow) bool {
		for _, filter := range filters {
			if filter.finds(f) {
				return true
			}
		}
		return false
	})
	for _, f := range doomed {
		err = errors.Join(err, t.delete(f))
	}
	return err
}

// Delete deletes a flow that [List] returned. It succeeds where the flow has gone, also if another with the same tuples
// is in its place, which stays.
func Delete(f Flow) error {
	if f.tuple == "" {
		return fmt.Errorf("delete flow %v: it does not come from List", f)
	}
	t, err := open()
	if err != nil {
		return err
	}
	defer t.Close()
	return t.delete(f)
}

// List returns the flows that have one of the addresses as source or destination in either direction; without addresses,
// all. It reads the table once: all of it, or that of one family if the addresses are of one.
func List(addrs ...netip.Addr) ([]Flow, error) {
	t, err := open()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	wanted := map[netip.Addr]bool{}
	asked := map[uint8]bool{}
	for _, a := range addrs {
		wanted[a.Unmap()], asked[family(a.Unmap())] = true, true
	}
	of := uint8(unix.AF_UNSPEC)
	for fam := range asked {
		if len(asked) == 1 {
			of = fam
		}
	}
	return t.dump(of, func(f Flow) bool {
		return len(addrs) == 0 || f.touches(func(a netip.Addr) bool { return wanted[a] })
	})
}

// filter is for the deletion of flows whose tuple in one direction has certain parts.
type filter struct {
	family uint8
	// broken says that the kernel compares such addresses the wrong way round.
	broken bool
	tuple  []byte // CTA_TUPLE_ORIG or CTA_TUPLE_REPLY, with the parts that flags name and no others
	side   uint16 // ctaFilterOrigFlags or ctaFilterReplyFlags
	flags  uint32
	finds  func(Flow) bool // the same here
}

// addressFilters returns the four filters that together find an address anywhere in a flow.
func addressFilters(addr netip.Addr) (filters []filter) {
	src, dst := uint16(nl.CTA_IP_V4_SRC), uint16(nl.CTA_IP_V4_DST)
	if addr.Is6() {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	add := func(tuple, side, end uint16, flags uint32, at func(Flow) netip.AddrPort) {
		filters = append(filters, filter{
			family: family(addr), broken: addr.Is6(), tuple: tupleOf(tuple, end, addr, nil), side: side, flags: flags,
			finds: func(f Flow) bool { return at(f).Addr() == addr },
		})
	}
	add(nl.CTA_TUPLE_ORIG, ctaFilterOrigFlags, src, filterIPSrc, func(f Flow) netip.AddrPort { return f.Orig.Src })
	add(nl.CTA_TUPLE_ORIG, ctaFilterOrigFlags, dst, filterIPDst, func(f Flow) netip.AddrPort { return f.Orig.Dst })
	add(nl.CTA_TUPLE_REPLY, ctaFilterReplyFlags, src, filterIPSrc, func(f Flow) netip.AddrPort { return f.Reply.Src })
	add(nl.CTA_TUPLE_REPLY, ctaFilterReplyFlags, dst, filterIPDst, func(f Flow) netip.AddrPort { return f.Reply.Dst })
	return filters
}

// udpPortFilter finds UDP flows by their original destination: a port, and an address if one is given.
func udpPortFilter(family uint8, port uint16, hostIP netip.Addr) filter {
	exact := hostIP.IsValid() && !hostIP.IsUnspecified()
	f := filter{
		family: family, broken: exact && hostIP.Is6(), side: ctaFilterOrigFlags, flags: filterProtoNum | filterProtoDstPort,
		finds: func(f Flow) bool {
			return f.Proto == unix.IPPROTO_UDP && f.Orig.Dst.Port() == port && (!exact || f.Orig.Dst.Addr() == hostIP)
		},
	}
	end := uint16(nl.CTA_IP_V4_DST)
	if exact {
		f.flags |= filterIPDst
		if hostIP.Is6() {
			end = nl.CTA_IP_V6_DST
		}
	} else {
		hostIP = netip.Addr{}
	}
	f.tuple = tupleOf(nl.CTA_TUPLE_ORIG, end, hostIP, &port)
	return f
}
