package ipset

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// datagram is what the kernel sends of a set with some entries.
func datagram(name string, typ rule.SetType, family byte, entries ...rule.Entry) []byte {
	s := &Sets{socket: &nfnetlink.Socket{}}
	b := nfnetlink.Text(s.begin(nl.IPSET_CMD_LIST, unix.NLM_F_MULTI), nl.IPSET_ATTR_SETNAME, name)
	b = nfnetlink.Text(b, nl.IPSET_ATTR_TYPENAME, string(typ))
	b = nfnetlink.Attribute(b, nl.IPSET_ATTR_FAMILY, family)
	b = nfnetlink.Nested(b, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
		return nfnetlink.Uint32(b, nl.IPSET_ATTR_ELEMENTS|unix.NLA_F_NET_BYTEORDER, uint32(len(entries)))
	})
	b = nfnetlink.Nested(b, nl.IPSET_ATTR_ADT, func(b []byte) []byte {
		for _, e := range entries {
			b = encode(b, e)
		}
		return b
	})
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// FuzzDump reads what a kernel might send: nothing of it makes the reader panic, list what was not asked for, or an entry without
// an address.
func FuzzDump(f *testing.F) {
	p := netip.MustParsePrefix
	one := datagram("pst-ip", rule.HashIP, unix.AF_INET,
		rule.Entry{Prefix: p("192.0.2.1/32")}, rule.Entry{Prefix: p("192.0.2.2/32")})
	f.Add(one)
	f.Add(slices.Concat(one, datagram("pst-net", rule.HashNet, unix.AF_INET6, rule.Entry{Prefix: p("2001:db8::/32")})))
	f.Add(datagram("pst-port", rule.HashIPPort, unix.AF_INET6, rule.Entry{Prefix: p("2001:db8::1/128"), Proto: rule.SCTP, Port: 80}))
	f.Add(datagram("pst-iface", rule.HashNetIface, unix.AF_INET, rule.Entry{Prefix: p("192.0.2.0/24"), Iface: "pst0123456789ab"}))
	f.Add(datagram("another", rule.HashIP, unix.AF_INET, rule.Entry{Prefix: p("192.0.2.1/32")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		found := map[string]*listing{}
		_, _, _ = nfnetlink.Split(b, 0, func(attributes []byte) { read(attributes, "pst-", found) })
		for name, l := range found {
			if !strings.HasPrefix(name, "pst-") || l.set.Name != name {
				t.Errorf("listed %q under %q", l.set.Name, name)
			}
			for _, e := range l.set.Entries {
				if !e.Prefix.IsValid() {
					t.Errorf("%s: an entry without an address: %v", name, e)
				}
			}
		}
	})
}

func TestWhatIsEncodedIsDecoded(t *testing.T) {
	p := netip.MustParsePrefix
	for _, e := range []rule.Entry{{Prefix: p("192.0.2.1/32")}, {Prefix: p("128.0.0.0/1")}, {Prefix: p("2001:db8::/32")},
		{Prefix: p("2001:db8::1/128"), Proto: rule.UDP, Port: 65535}, {Prefix: p("192.0.2.0/24"), Iface: "pst0123456789ab"}} {
		if got, ok := decode(encode(nil, e)[unix.SizeofNlAttr:]); !ok || got != e {
			t.Errorf("%s came back as %s, %v", e, got, ok)
		}
	}
}
