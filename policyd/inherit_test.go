package main

import (
	"net/netip"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// A new owner of an address inherits no flow, for there is none: from and to the addresses of the node's range that no pod has,
// no flow begins. Others, outside of the range, show that it would be seen.
func TestNoFlowBeginsFromOrToAnAddressThatNoPodHas(t *testing.T) {
	free := []netip.Addr{netip.MustParseAddr("10.244.1.200"), netip.MustParseAddr("fd00:10:244:1::200")}
	other := []netip.Addr{netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd00:99::1")}
	gateway := []netip.Addr{testnode.Outside4, testnode.Outside6}
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newScene(t, backend, "", pod("shop/open", "app=open", ""))
		open := s.pods["shop/open"]
		for i, bits := range []string{"/32", "/128"} {
			for _, a := range []netip.Addr{free[i], other[i]} {
				s.Outside.Run(t, "ip", "addr", "add", a.String()+bits, "dev", "eth0", "nodad")
				s.NS.Run(t, "ip", "route", "add", a.String()+bits, "via", gateway[i].String())
			}
		}
		flows := func(a netip.Addr) (n int) {
			var list []conntrack.Flow
			var err error
			s.NS.Do(t, func() { list, err = conntrack.List(a) })
			if err != nil {
				t.Fatal(err)
			}
			return len(list)
		}
		send := func(a netip.Addr) {
			pod := open.addrs[a.Is4()]
			for n := range 20 {
				port := uint16(4000 + n)
				_ = nettest.Dial(open.at.NS, "udp", netip.AddrPortFrom(pod, port), netip.AddrPortFrom(a, 53), time.Millisecond)
				_ = nettest.Dial(s.Outside, "udp", netip.AddrPortFrom(a, port), netip.AddrPortFrom(pod, 9), time.Millisecond)
			}
		}
		for i := range free {
			send(other[i])
			if n := flows(other[i]); n < 20 {
				t.Fatalf("%s: %d flows of an address elsewhere, some 40 were tried: this test sees nothing", other[i], n)
			}
			send(free[i])
			if n := flows(free[i]); n > 0 {
				t.Errorf("%s: %d flows of an address of the range that no pod has", free[i], n)
			}
		}
	})
}
