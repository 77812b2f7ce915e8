package verify

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/rule"
)

// datagram is a packet on the wire. Its id comes back from wherever it arrives.
type datagram struct {
	from, to netip.Addr
	protocol rule.Proto
	sport    uint16
	dport    uint16
	id       uint32
	kind     kind
}

// kind is which packet of a flow it is.
type kind int

const (
	opens   kind = iota // SYN, a UDP datagram, INIT, an echo request
	replies             // SYN and ACK, a UDP datagram, INIT ACK, an echo reply
	carries             // ACK: TCP in the middle of a flow
	fails               // an ICMP error about the packet that opened the flow
)

var numbersOf = map[rule.Proto]uint8{
	rule.TCP: unix.IPPROTO_TCP, rule.UDP: unix.IPPROTO_UDP, rule.SCTP: unix.IPPROTO_SCTP,
	rule.ICMP: unix.IPPROTO_ICMP, rule.ICMPv6: unix.IPPROTO_ICMPV6,
}

const etherLen = 14

// frame is the datagram for a link whose end has this address.
func (d datagram) frame(to net.HardwareAddr) []byte {
	out := make([]byte, 12, 128)
	copy(out, to)
	copy(out[6:], net.HardwareAddr{2, 0, 0, 0, 0, 9}) // anybody's
	ether := uint16(unix.ETH_P_IP)
	if d.from.Is6() {
		ether = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(out, ether), d.packet()...)
}

// packet is the datagram from its IP header on.
func (d datagram) packet() []byte {
	number := numbersOf[d.protocol]
	body := d.body()
	if d.kind == fails {
		number, body = unix.IPPROTO_ICMP, d.failure()
		if d.from.Is6() {
			number = unix.IPPROTO_ICMPV6
		}
	}
	d.checksum(body, number)
	return append(header(d.from, d.to, number, len(body), uint16(d.id)), body...)
}

// header is an IPv4 header (RFC 791, 3.1) or an IPv6 one (RFC 8200, 3).
func header(from, to netip.Addr, protocol uint8, length int, id uint16) []byte {
	if from.Is6() {
		h := []byte{0x60, 0, 0, 0}
		h = binary.BigEndian.AppendUint16(h, uint16(length))
		h = append(h, protocol, 64)
		return append(append(h, from.AsSlice()...), to.AsSlice()...)
	}
	h := []byte{0x45, 0}
	h = binary.BigEndian.AppendUint16(h, uint16(20+length))
	h = binary.BigEndian.AppendUint16(h, id)
	h = append(h, 0, 0, 64, protocol, 0, 0)
	h = append(append(h, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], ^sum(0, h))
	return h
}

// body is the transport's part, without its checksum.
func (d datagram) body() []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, d.sport), d.dport)
	id := binary.BigEndian.AppendUint32(nil, d.id)
	switch d.protocol {
	case rule.TCP: // RFC 9293, 3.1: the sequence number is the id, and a reply's peer sent the same one
		const fin, syn, ack = 0x01, 0x02, 0x10
		b := append(ports, id...)
		switch d.kind {
		case opens:
			return append(b, 0, 0, 0, 0, 5<<4, syn, 0xff, 0xff, 0, 0, 0, 0)
		case replies:
			return append(binary.BigEndian.AppendUint32(b, d.id+1), 5<<4, syn|ack, 0xff, 0xff, 0, 0, 0, 0)
		}
		return append(binary.BigEndian.AppendUint32(b, 1), 5<<4, ack, 0xff, 0xff, 0, 0, 0, 0)
	case rule.UDP:
		return append(append(ports, 0, 12, 0, 0), id...)
	case rule.SCTP: // RFC 9260, 3.3.2 and 3.3.3: the initiate tag is the id; a reply carries the one it got as its tag
		chunk, tag := byte(1), []byte{0, 0, 0, 0}
		if d.kind == replies {
			chunk, tag = 2, id
		}
		b := append(append(ports, tag...), 0, 0, 0, 0, chunk, 0, 0, 20)
		return append(append(b, id...), 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1)
	}
	echo := map[rule.Proto]map[kind]byte{rule.ICMP: {opens: 8, replies: 0}, rule.ICMPv6: {opens: 128, replies: 129}}
	return append([]byte{echo[d.protocol][d.kind], 0, 0, 0}, id...)
}

// failure says that the packet that opened the flow the other way found nobody at its port (RFC 792; RFC 4443, 3.1).
func (d datagram) failure() []byte {
	first := d
	first.from, first.to, first.sport, first.dport, first.kind = d.to, d.from, d.dport, d.sport, opens
	about := []byte{3, 3, 0, 0, 0, 0, 0, 0}
	if d.from.Is6() {
		about = []byte{1, 4, 0, 0, 0, 0, 0, 0}
	}
	return append(about, first.packet()...)
}

// checksum fills in the transport's checksum: conntrack calls a packet with a wrong one INVALID.
func (d datagram) checksum(body []byte, number uint8) {
	pseudo := func() uint16 {
		p := append(d.from.AsSlice(), d.to.AsSlice()...)
		return sum(0, append(p, 0, number, byte(len(body)>>8), byte(len(body))))
	}
	switch number {
	case unix.IPPROTO_TCP:
		binary.BigEndian.PutUint16(body[16:], ^sum(pseudo(), body))
	case unix.IPPROTO_UDP:
		binary.BigEndian.PutUint16(body[6:], ^sum(pseudo(), body))
	case unix.IPPROTO_ICMP:
		binary.BigEndian.PutUint16(body[2:], ^sum(0, body))
	case unix.IPPROTO_ICMPV6:
		binary.BigEndian.PutUint16(body[2:], ^sum(pseudo(), body))
	case unix.IPPROTO_SCTP:
		binary.LittleEndian.PutUint32(body[8:], crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	}
}

// sum is the Internet checksum before its complement (RFC 1071).
func sum(start uint16, data []byte) uint16 {
	total := uint32(start)
	for i := 0; i+1 < len(data); i += 2 {
		total += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		total += uint32(data[len(data)-1]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}

// idOf finds the id in a frame that arrived; false for frames that are none of ours.
func idOf(frame []byte) (uint32, bool) {
	if len(frame) < etherLen {
		return 0, false
	}
	ether, b := binary.BigEndian.Uint16(frame[12:]), frame[etherLen:]
	return idIn(b, ether == unix.ETH_P_IP, ether == unix.ETH_P_IPV6)
}

func idIn(b []byte, four, six bool) (uint32, bool) {
	var protocol uint8
	switch {
	case four && len(b) > 20:
		protocol, b = b[9], b[20:]
	case six && len(b) > 40:
		protocol, b = b[6], b[40:]
	default:
		return 0, false
	}
	at := map[uint8]int{unix.IPPROTO_TCP: 4, unix.IPPROTO_UDP: 8, unix.IPPROTO_SCTP: 16,
		unix.IPPROTO_ICMP: 4, unix.IPPROTO_ICMPV6: 4}
	switch {
	case protocol == unix.IPPROTO_ICMP && b[0] == 3 || protocol == unix.IPPROTO_ICMPV6 && b[0] == 1:
		return idIn(b[min(8, len(b)):], four, six) // of the packet that it is about
	case protocol == unix.IPPROTO_ICMPV6 && b[0] != 128 && b[0] != 129:
		return 0, false // neighbours, routers, listeners
	}
	offset, known := at[protocol]
	if !known || len(b) < offset+4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b[offset:]), true
}
