package ipset

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/rule"
)

// Add puts entries into a set. What is there already stays.
func (s *Sets) Add(name string, entries ...rule.Entry) error {
	return s.change("add to", nl.IPSET_CMD_ADD, name, entries)
}

// Del takes entries out of a set. What is not there is no error.
func (s *Sets) Del(name string, entries ...rule.Entry) error {
	return s.change("delete from", nl.IPSET_CMD_DEL, name, entries)
}

// change sends many entries in one message. Where the kernel refuses one of them, those before it are done and those behind it
// are not, and each is sent by itself, so that the error names the one.
func (s *Sets) change(verb string, command int, name string, entries []rule.Entry) error {
	for _, e := range entries {
		if e.Prefix.Bits() == 0 {
			return fmt.Errorf("ipset %s %s: %s: the kernel stores /0 as a host address; use two halves", verb, name, e)
		}
	}
	for len(entries) > 0 {
		n, err := s.changeSome(command, name, entries)
		for i := 0; err != nil && i < n; i++ {
			if _, err := s.changeSome(command, name, entries[i:i+1]); err != nil {
				return wrap(verb, name+" "+entries[i].String(), err)
			}
		}
		entries = entries[n:]
	}
	return nil
}

// changeSome sends as many entries as a message holds and returns how many.
func (s *Sets) changeSome(command int, name string, entries []rule.Entry) (n int, err error) {
	request := nfnetlink.Text(s.begin(command, 0), nl.IPSET_ATTR_SETNAME, name)
	request = nfnetlink.Uint32(request, nl.IPSET_ATTR_LINENO|unix.NLA_F_NET_BYTEORDER, 0) // a list is refused without it
	request = nfnetlink.Nested(request, nl.IPSET_ATTR_ADT, func(b []byte) []byte {
		for n < len(entries) && len(b) < nfnetlink.MostRequested {
			b = encode(b, entries[n])
			n++
		}
		return b
	})
	return n, s.socket.Ask(request, nil)
}

func encode(b []byte, e rule.Entry) []byte {
	return nfnetlink.Nested(b, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
		b = nfnetlink.Nested(b, nl.IPSET_ATTR_IP, func(b []byte) []byte {
			if a := e.Prefix.Addr(); a.Is4() {
				ip := a.As4()
				return nfnetlink.Attribute(b, nl.IPSET_ATTR_IPADDR_IPV4|unix.NLA_F_NET_BYTEORDER, ip[:]...)
			}
			ip := e.Prefix.Addr().As16()
			return nfnetlink.Attribute(b, nl.IPSET_ATTR_IPADDR_IPV6|unix.NLA_F_NET_BYTEORDER, ip[:]...)
		})
		if !e.Prefix.IsSingleIP() {
			b = nfnetlink.Attribute(b, nl.IPSET_ATTR_CIDR, byte(e.Prefix.Bits()))
		}
		if e.Proto != "" {
			b = nfnetlink.Attribute(b, nl.IPSET_ATTR_PROTO, protoNumbers[e.Proto])
			b = nfnetlink.Attribute(b, nl.IPSET_ATTR_PORT|unix.NLA_F_NET_BYTEORDER, byte(e.Port>>8), byte(e.Port))
		}
		if e.Iface != "" {
			b = nfnetlink.Text(b, nl.IPSET_ATTR_IFACE, e.Iface)
		}
		return b
	})
}

// decode reads the attributes of one entry, as far as they are those of the types that [rule.Set] knows; ok says that there is
// an address, or a network, at least.
func decode(data []byte) (e rule.Entry, ok bool) {
	var addr netip.Addr
	bits := -1
	proto, port := uint8(0), uint16(0)
	nlevents.Attributes(data, func(typ uint16, value []byte) {
		switch {
		case typ == nl.IPSET_ATTR_IP:
			nlevents.Attributes(value, func(_ uint16, value []byte) { addr, _ = netip.AddrFromSlice(value) })
		case typ == nl.IPSET_ATTR_CIDR && len(value) == 1:
			bits = int(value[0])
		case typ == nl.IPSET_ATTR_PROTO && len(value) == 1:
			proto = value[0]
		case typ == nl.IPSET_ATTR_PORT && len(value) == 2:
			port = binary.BigEndian.Uint16(value)
		case typ == nl.IPSET_ATTR_IFACE:
			e.Iface = zeroTerminated(value)
		}
	})
	if bits < 0 {
		bits = addr.BitLen()
	}
	if proto != 0 {
		e.Proto, e.Port = protoName(proto), port
	}
	e.Prefix = netip.PrefixFrom(addr, bits)
	return e, e.Prefix.IsValid()
}

var protoNumbers = map[rule.Proto]uint8{
	rule.TCP: unix.IPPROTO_TCP, rule.UDP: unix.IPPROTO_UDP, rule.SCTP: unix.IPPROTO_SCTP,
}

func protoName(n uint8) rule.Proto {
	for p, number := range protoNumbers {
		if number == n {
			return p
		}
	}
	return rule.Proto(fmt.Sprint(n))
}
