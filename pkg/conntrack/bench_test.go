package conntrack

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nfnetlink"
)

// An address that has no flows, among 100,000 flows of others in its family: go test -bench . -run NONE ./pkg/conntrack
func BenchmarkAmongOthers(b *testing.B) {
	for name, net := range map[string]string{"IPv4": "10.0.0.0", "IPv6": "fd00::"} {
		ns := nettest.NewNS(b, "ct")
		ns.Do(b, func() { others(b, netip.MustParseAddr(net), 100_000) })
		one := netip.MustParseAddr(net).Next()
		for what, do := range map[string]func() error{
			"List":            func() error { _, err := List(); return err },
			"List/one":        func() error { _, err := List(one); return err },
			"DeleteAddresses": func() error { return DeleteAddresses(one) },
		} {
			b.Run(what+"/"+name, func(b *testing.B) {
				ns.Do(b, func() {
					before := processorTime(b)
					for b.Loop() {
						if err := do(); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric((processorTime(b)-before)/float64(b.N), "cpu-ms/op")
				})
			})
		}
	}
}

// processorTime is what the process has used, in milliseconds: what is read here is large enough for other work on the machine to
// stand in its way.
func processorTime(b *testing.B) float64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e6
}

// others makes UDP flows between addresses of a network, each from one of its own.
func others(b *testing.B, net netip.Addr, n int) {
	ct, err := open()
	if err != nil {
		b.Fatal(err)
	}
	defer ct.Close()
	at := func(i int) netip.Addr {
		bytes := net.AsSlice()
		last := len(bytes) - 1
		bytes[last-2], bytes[last-1], bytes[last] = byte(1+i>>16), byte(i>>8), byte(i)
		a, _ := netip.AddrFromSlice(bytes)
		return a
	}
	ports := func(src, dst uint16) func([]byte) []byte {
		return func(b []byte) []byte {
			b = nfnetlink.Attribute(b, nl.CTA_PROTO_NUM, unix.IPPROTO_UDP)
			return nfnetlink.Uint16(nfnetlink.Uint16(b, nl.CTA_PROTO_SRC_PORT, src), nl.CTA_PROTO_DST_PORT, dst)
		}
	}
	for i := range n {
		from, to := netip.AddrPortFrom(at(i), 4000), netip.AddrPortFrom(at(i%100+1<<18), 53)
		ct.create(b, 0, Tuple{from, to}, Tuple{to, from}, ports(4000, 53), ports(53, 4000))
	}
}
