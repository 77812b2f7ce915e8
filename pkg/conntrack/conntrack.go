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
	err := errNoFilter
	if addr.Is4() {
		err = deleteFiltered(addressFilters(addr)...)
	}
	if errors.Is(err, errNoFilter) {
		err = deleteEach(family(addr), func(f Flow) bool { return f.touches(func(a netip.Addr) bool { return a == addr }) })
	}
	if err != nil {
		return fmt.Errorf("delete flows of %s: %w", addr, err)
	}
	return nil
}

// errNoFilter means that the kernel cannot do a filtered deletion, or not as it should.
var errNoFilter = errors.New("no filtered deletion")

func deleteFiltered(filters ...filter) error {
	for _, f := range filters {
		err := f.delete()
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return errNoFilter
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// DeleteUDPPort deletes the UDP flows, in every zone, whose original destination is this port. An invalid hostIP means
// every address of both families, an unspecified one every address of its family, any other that address alone.
func DeleteUDPPort(port uint16, hostIP netip.Addr) error {
	hostIP = hostIP.Unmap()
	families := []uint8{unix.AF_INET, unix.AF_INET6}
	if hostIP.IsValid() {
		families = []uint8{family(hostIP)}
	}
	exact := hostIP.IsValid() && !hostIP.IsUnspecified()
	for _, fam := range families {
		err := errNoFilter
		if !exact || hostIP.Is4() {
			err = deleteFiltered(udpPortFilter(fam, port, hostIP, exact))
		}
		if errors.Is(err, errNoFilter) {
			err = deleteEach(fam, func(f Flow) bool {
				return f.Proto == unix.IPPROTO_UDP && f.Orig.Dst.Port() == port && (!exact || f.Orig.Dst.Addr() == hostIP)
			})
		}
		if err != nil {
			return fmt.Errorf("delete UDP flows to %v port %d: %w", hostIP, port, err)
		}
	}
	return nil
}

// List returns the flows that have one of the addresses as source or destination in either direction; without addresses,
// all. It reads the whole table of the families asked for, once each.
func List(addrs ...netip.Addr) ([]Flow, error) {
	wanted := map[netip.Addr]bool{}
	families := map[uint8]bool{}
	for _, a := range addrs {
		wanted[a.Unmap()], families[family(a.Unmap())] = true, true
	}
	var flows []Flow
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if len(addrs) > 0 && !families[fam] {
			continue
		}
		err := dump(fam, func(f Flow) {
			if len(addrs) == 0 || f.touches(func(a netip.Addr) bool { return wanted[a] }) {
				flows = append(flows, f)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return flows, nil
}

// Delete deletes a flow that [List] returned. It succeeds where the flow has gone, also if another with the same tuples
// is in its place, which stays.
func Delete(f Flow) error {
	if f.tuple == "" {
		return fmt.Errorf("delete flow %v: it does not come from List", f)
	}
	req := request(nl.IPCTNL_MSG_CT_DELETE, family(f.Orig.Src.Addr()), unix.NLM_F_ACK)
	req.AddData(nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, []byte(f.tuple)))
	req.AddData(nl.NewRtAttr(nl.CTA_ID, nl.BEUint32Attr(f.ID)))
	if f.Zone != 0 {
		req.AddData(nl.NewRtAttr(nl.CTA_ZONE, nl.BEUint16Attr(f.Zone)))
	}
	if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete flow %v: %w", f, err)
	}
	return nil
}

func request(msg int, family uint8, flags int) *nl.NetlinkRequest {
	const subsystem = 1 // NFNL_SUBSYS_CTNETLINK
	req := nl.NewNetlinkRequest(subsystem<<8|msg, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: 1})
	return req
}

// dump calls each with every flow of a family. A dump that the kernel marks as interrupted has missed nothing that was
// there from its start to its end: the mark speaks of a table that was resized, and the dump is repeated then.
func dump(family uint8, each func(Flow)) error {
	const tries = 5
	var err error
	for range tries {
		var flows []Flow
		var bad error
		req := request(nl.IPCTNL_MSG_CT_GET, family, unix.NLM_F_DUMP)
		err = req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
			f, err := parseFlow(msg)
			if err != nil {
				bad = err
				return false
			}
			flows = append(flows, f)
			return true
		})
		if err == nil && bad == nil {
			for _, f := range flows {
				each(f)
			}
			return nil
		}
		if err = errors.Join(err, bad); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return fmt.Errorf("list flows: %w", err)
}

// deleteEach is the way of kernels that cannot filter a deletion.
func deleteEach(family uint8, match func(Flow) bool) error {
	var doomed []Flow
	err := dump(family, func(f Flow) {
		if match(f) {
			doomed = append(doomed, f)
		}
	})
	for _, f := range doomed {
		err = errors.Join(err, Delete(f))
	}
	return err
}

// filter is a deletion of all flows whose tuple in one direction has certain parts.
type filter struct {
	family uint8
	tuple  *nl.RtAttr // CTA_TUPLE_ORIG or CTA_TUPLE_REPLY, with the parts that flags name and no others
	side   int        // ctaFilterOrigFlags or ctaFilterReplyFlags
	flags  uint32
}

func (f filter) delete() error {
	req := request(nl.IPCTNL_MSG_CT_DELETE, f.family, unix.NLM_F_ACK)
	req.AddData(f.tuple)
	flags := nl.NewRtAttr(ctaFilter|unix.NLA_F_NESTED, nil)
	flags.AddRtAttr(f.side, nl.Uint32Attr(f.flags))
	req.AddData(flags)
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

// addressFilters returns the four filters that together find an IPv4 address anywhere in a flow.
func addressFilters(addr netip.Addr) []filter {
	var out []filter
	for _, end := range []struct {
		attr  int
		flags uint32
	}{{nl.CTA_IP_V4_SRC, filterIPSrc}, {nl.CTA_IP_V4_DST, filterIPDst}} {
		for tuple, side := range map[int]int{nl.CTA_TUPLE_ORIG: ctaFilterOrigFlags, nl.CTA_TUPLE_REPLY: ctaFilterReplyFlags} {
			t := nl.NewRtAttr(tuple|unix.NLA_F_NESTED, nil)
			t.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil).AddRtAttr(end.attr, addr.AsSlice())
			out = append(out, filter{family(addr), t, side, end.flags})
		}
	}
	return out
}

// udpPortFilter finds UDP flows by their original destination; exact, with hostIP of IPv4, by its address too.
func udpPortFilter(family uint8, port uint16, hostIP netip.Addr, exact bool) filter {
	t := nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, nil)
	flags := uint32(filterProtoNum | filterProtoDstPort)
	if exact {
		t.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil).AddRtAttr(nl.CTA_IP_V4_DST, hostIP.AsSlice())
		flags |= filterIPDst
	}
	p := t.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil)
	p.AddRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(unix.IPPROTO_UDP))
	p.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(port))
	return filter{family, t, ctaFilterOrigFlags, flags}
}
