package conntrack

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// create puts a UDP flow into the table of the calling thread's namespace.
func create(t *testing.T, zone uint16, orig, reply Tuple) {
	t.Helper()
	fam := family(orig.Src.Addr())
	src, dst := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if fam == unix.AF_INET6 {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	req := request(nl.IPCTNL_MSG_CT_NEW, fam, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	for kind, tuple := range map[int]Tuple{nl.CTA_TUPLE_ORIG: orig, nl.CTA_TUPLE_REPLY: reply} {
		a := nl.NewRtAttr(kind|unix.NLA_F_NESTED, nil)
		ip := a.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil)
		ip.AddRtAttr(src, tuple.Src.Addr().AsSlice())
		ip.AddRtAttr(dst, tuple.Dst.Addr().AsSlice())
		p := a.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil)
		p.AddRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(unix.IPPROTO_UDP))
		p.AddRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(tuple.Src.Port()))
		p.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(tuple.Dst.Port()))
		req.AddData(a)
	}
	req.AddData(nl.NewRtAttr(nl.CTA_TIMEOUT, nl.BEUint32Attr(600)))
	if zone != 0 {
		req.AddData(nl.NewRtAttr(nl.CTA_ZONE, nl.BEUint16Attr(zone)))
	}
	if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
		t.Fatalf("create flow %v: %v", orig, err)
	}
}

func flow(src, dst, replySrc, replyDst string) (Tuple, Tuple) {
	p := netip.MustParseAddrPort
	return Tuple{p(src), p(dst)}, Tuple{p(replySrc), p(replyDst)}
}

// table fills the namespace with flows; each names what is special about it by its source port.
func table(t *testing.T) {
	t.Helper()
	add := func(zone uint16, src, dst, replySrc, replyDst string) {
		o, r := flow(src, dst, replySrc, replyDst)
		create(t, zone, o, r)
	}
	add(0, "10.0.0.1:1", "10.0.0.2:53", "10.0.0.2:53", "10.0.0.1:1")
	add(7, "10.0.0.1:2", "10.0.0.3:53", "10.0.0.3:53", "10.0.0.1:2")     // in a zone
	add(0, "10.0.0.9:3", "10.0.0.8:8053", "10.0.0.1:53", "10.0.0.9:3")   // translated to .1
	add(0, "10.0.0.4:4", "10.0.0.5:8054", "10.0.0.5:8054", "10.0.0.1:4") // translated from .4 to .1
	add(0, "10.0.0.6:5", "10.0.0.7:8053", "10.0.0.7:8053", "10.0.0.6:5") // not .1
	add(7, "10.0.0.6:6", "10.0.0.7:8053", "10.0.0.7:8053", "10.0.0.6:6") // not .1, in a zone
	add(0, "10.0.0.6:8053", "10.0.0.7:9", "10.0.0.7:9", "10.0.0.6:8053") // the port as a source
	add(0, "[fd00::1]:7", "[fd00::2]:8053", "[fd00::2]:8053", "[fd00::1]:7")
	add(0, "[fd00::3]:8", "[fd00::4]:8053", "[fd00::1]:8053", "[fd00::3]:8")
	add(0, "[fd00::5]:9", "[fd00::6]:53", "[fd00::6]:53", "[fd00::5]:9")
}

func ports(t *testing.T, addrs ...netip.Addr) map[uint16]bool {
	t.Helper()
	flows, err := List(addrs...)
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint16]bool{}
	for _, f := range flows {
		got[f.Orig.Src.Port()] = true
	}
	return got
}

var all = []uint16{1, 2, 3, 4, 5, 6, 8053, 7, 8, 9}

func wantGone(t *testing.T, gone ...uint16) {
	t.Helper()
	got := ports(t)
	for _, p := range gone {
		if got[p] {
			t.Errorf("flow %d is still there", p)
		}
	}
	if len(got) != len(all)-len(gone) {
		t.Errorf("%d flows are left, want %d: %v", len(got), len(all)-len(gone), got)
	}
}

func TestDeletionTakesTheFlowsItNamesAndNoOther(t *testing.T) {
	a := netip.MustParseAddr
	for _, tt := range []struct {
		name   string
		delete func() error
		gone   []uint16
	}{
		{"IPv4 address, either direction, any zone", func() error { return DeleteAddress(a("10.0.0.1")) }, []uint16{1, 2, 3, 4}},
		{"IPv4-mapped address", func() error { return DeleteAddress(a("::ffff:10.0.0.1")) }, []uint16{1, 2, 3, 4}},
		{"IPv6 address", func() error { return DeleteAddress(a("fd00::1")) }, []uint16{7, 8}},
		{"address with no flow", func() error { return DeleteAddress(a("192.0.2.1")) }, nil},
		{"port, any address", func() error { return DeleteUDPPort(8053, netip.Addr{}) }, []uint16{3, 5, 6, 7, 8}},
		{"port, any IPv4", func() error { return DeleteUDPPort(8053, a("0.0.0.0")) }, []uint16{3, 5, 6}},
		{"port, any IPv6", func() error { return DeleteUDPPort(8053, a("::")) }, []uint16{7, 8}},
		{"port at an address", func() error { return DeleteUDPPort(8053, a("10.0.0.8")) }, []uint16{3}},
		{"port at an IPv6 address", func() error { return DeleteUDPPort(8053, a("fd00::4")) }, []uint16{8}},
		{"dump and delete, as on kernels without the filter", func() error {
			return deleteEach(unix.AF_INET, func(f Flow) bool { return f.touches(func(x netip.Addr) bool { return x == a("10.0.0.1") }) })
		}, []uint16{1, 2, 3, 4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nettest.NewNS(t, "ct").Do(t, func() {
				table(t)
				if err := tt.delete(); err != nil {
					t.Fatal(err)
				}
				wantGone(t, tt.gone...)
			})
		})
	}
}

func TestListFindsAnAddressInEitherDirection(t *testing.T) {
	nettest.NewNS(t, "ct").Do(t, func() {
		table(t)
		if got := ports(t, netip.MustParseAddr("10.0.0.1")); len(got) != 4 || !got[1] || !got[2] || !got[3] || !got[4] {
			t.Errorf("flows of 10.0.0.1: %v, want 1 to 4", got)
		}
	})
}

func TestDeleteLeavesAFlowThatTookTheDeletedOnesPlace(t *testing.T) {
	nettest.NewNS(t, "ct").Do(t, func() {
		o, r := flow("10.0.0.1:1", "10.0.0.2:53", "10.0.0.2:53", "10.0.0.1:1")
		create(t, 0, o, r)
		old, err := List()
		if err != nil || len(old) != 1 {
			t.Fatal(old, err)
		}
		if old[0].Orig != o || old[0].Reply != r || old[0].Proto != unix.IPPROTO_UDP {
			t.Fatalf("read %v, want %v, %v", old[0], o, r)
		}
		other := old[0]
		other.ID++
		if err := Delete(other); err != nil || len(ports(t)) != 1 {
			t.Errorf("deletion of another entry: %v, %d flows left, want 1", err, len(ports(t)))
		}
		for range 2 { // the second finds nothing and succeeds
			if err := Delete(old[0]); err != nil || len(ports(t)) != 0 {
				t.Errorf("deletion: %v, %d flows left, want 0", err, len(ports(t)))
			}
		}
	})
}

// What a kernel without CTA_FILTER sees is the same message less that attribute.
func TestKernelWithoutTheFilterDeletesNothing(t *testing.T) {
	nettest.NewNS(t, "ct").Do(t, func() {
		table(t)
		addr := netip.MustParseAddr("10.0.0.8")
		filters := append(addressFilters(netip.MustParseAddr("10.0.0.1")),
			udpPortFilter(unix.AF_INET, 8053, addr, true), udpPortFilter(unix.AF_INET, 8053, netip.Addr{}, false))
		for _, f := range filters {
			req := request(nl.IPCTNL_MSG_CT_DELETE, f.family, unix.NLM_F_ACK)
			req.AddData(f.tuple)
			if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); !errors.Is(err, unix.EINVAL) {
				t.Errorf("flags %#x: %v, want EINVAL", f.flags, err)
			}
		}
		wantGone(t)
	})
}

func TestDeleteAddressRefusesWhatIsNoHost(t *testing.T) {
	for _, a := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if DeleteAddress(a) == nil {
			t.Errorf("DeleteAddress(%v) succeeded", a)
		}
	}
}
