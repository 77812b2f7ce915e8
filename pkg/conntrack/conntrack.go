package conntrack

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DeleteAddresses deletes every flow, in every zone, that has one of the addresses as source or destination, in its original or
// its reply direction. It reads the table once, however many addresses there are; without any, it does nothing.
func DeleteAddresses(addrs ...netip.Addr) error {
	wanted := map[netip.Addr]bool{}
	var families Families
	for _, addr := range addrs {
		addr = addr.Unmap()
		if !addr.IsValid() || addr.IsUnspecified() {
			return fmt.Errorf("delete flows of %q: an address of a host is needed", addr)
		}
		wanted[addr] = true
		families.Add(addr)
	}
	if err := DeleteTouching(families, func(a netip.Addr) bool { return wanted[a] }); err != nil {
		return fmt.Errorf("%w: of %v", err, addrs)
	}
	return nil
}

// Families are those that a deletion is about.
type Families struct{ IPv4, IPv6 bool }

// Add adds the family of an address.
func (f *Families) Add(a netip.Addr) {
	f.IPv4, f.IPv6 = f.IPv4 || a.Unmap().Is4(), f.IPv6 || !a.Unmap().Is4()
}

// toRead is the family of netlink for a reading of the table that finds flows of these; without any, of both.
func (f Families) toRead() uint8 {
	switch f {
	case Families{IPv4: true}:
		return unix.AF_INET
	case Families{IPv6: true}:
		return unix.AF_INET6
	}
	return unix.AF_UNSPEC
}

// DeleteTouching is [DeleteAddresses] for the addresses that which names.
func DeleteTouching(families Families, which func(netip.Addr) bool) error {
	if families == (Families{}) {
		return nil
	}
	t, err := open()
	if err != nil {
		return err
	}
	defer t.Close()
	if err := t.deleteEach(families.toRead(), func(f Flow) bool { return f.Touches(which) }); err != nil {
		return fmt.Errorf("delete flows: %w", err)
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
		if err := deleteFound(udpPortFilter(fam, port, hostIP)); err != nil {
			return fmt.Errorf("delete UDP flows to %v port %d: %w", hostIP, port, err)
		}
	}
	return nil
}

// deleteFound deletes what a filter finds: the kernel does, or, where it cannot, a dump shows which.
func deleteFound(f filter) error {
	t, err := open()
	if err != nil {
		return err
	}
	defer t.Close()
	if err = t.deleteFiltered(f); errors.Is(err, errNoFilter) {
		err = t.deleteEach(f.family, f.finds)
	}
	return err
}

// deleteEach deletes the flows of a family that match, one by one.
func (t table) deleteEach(family uint8, match func(Flow) bool) error {
	doomed, err := t.dump(family, match)
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
	var families Families
	for _, a := range addrs {
		wanted[a.Unmap()] = true
		families.Add(a)
	}
	return t.dump(families.toRead(), func(f Flow) bool {
		return len(addrs) == 0 || f.Touches(func(a netip.Addr) bool { return wanted[a] })
	})
}

// filter is for the deletion of flows whose original tuple has certain parts.
type filter struct {
	family uint8
	// broken says that the kernel compares such addresses the wrong way round.
	broken bool
	tuple  []byte // CTA_TUPLE_ORIG, with the parts that flags name and no others
	flags  uint32
	finds  func(Flow) bool // the same here
}

// udpPortFilter finds UDP flows by their original destination: a port, and an address if one is given.
func udpPortFilter(family uint8, port uint16, hostIP netip.Addr) filter {
	exact := hostIP.IsValid() && !hostIP.IsUnspecified()
	f := filter{
		family: family, broken: exact && hostIP.Is6(), flags: filterProtoNum | filterProtoDstPort,
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
