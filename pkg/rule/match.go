package rule

import "net/netip"

// In matches the interface a packet came in on. A name ending in "+" matches every interface that begins so.
type In struct {
	Name string
	Not  bool
}

// Out matches the interface a packet goes out on; names as in [In].
type Out struct {
	Name string
	Not  bool
}

// Proto is a transport protocol by its name in iptables: tcp, udp, sctp, icmp, ipv6-icmp.
type Proto string

const (
	TCP    Proto = "tcp"
	UDP    Proto = "udp"
	SCTP   Proto = "sctp"
	ICMP   Proto = "icmp"
	ICMPv6 Proto = "ipv6-icmp"
)

// Protocol matches the transport protocol.
type Protocol struct{ Proto Proto }

// DestPorts matches the destination port of TCP, UDP or SCTP, From and To included. It stands after a [Protocol].
type DestPorts struct {
	Proto    Proto
	From, To uint16
}

// Source matches the source address.
type Source struct {
	Prefix netip.Prefix
	Not    bool
}

// Dest matches the destination address.
type Dest struct {
	Prefix netip.Prefix
	Not    bool
}

// InSet matches membership in a set (xt_set). Dirs says what of the packet is looked up, one word for each part of the
// set's type, comma separated: "src", "dst", "src,src" (for hash:net,iface: source and incoming interface),
// "dst,dst" (destination and outgoing interface; for hash:ip,port: destination and destination port).
type InSet struct {
	Name string
	Dirs string
	Not  bool
}

// SourceMAC matches the Ethernet source address, of packets that come in by a link that has such.
type SourceMAC struct{ MAC [6]byte }

// CTState matches conntrack's view of the packet: a comma-separated list, in alphabetical order, of ESTABLISHED, INVALID,
// NEW, RELATED, UNTRACKED, DNAT, SNAT (iptables-extensions(8), conntrack, --ctstate).
type CTState struct {
	States string
	Not    bool
}

// Syn matches TCP packets that ask for a connection (SYN set; RST, ACK and FIN clear). It stands after Protocol{TCP}.
type Syn struct{ Not bool }

// AddrType matches the kind of the packet's address by the routing table, LOCAL for instance.
type AddrType struct {
	DstType string // "" or LOCAL
	SrcType string // "" or LOCAL
}

// ICMPType matches one ICMP or ICMPv6 type by number. It stands after Protocol{ICMP} or Protocol{ICMPv6}.
type ICMPType struct {
	Proto Proto
	Type  uint8
}

func (In) isMatch()        {}
func (Out) isMatch()       {}
func (Protocol) isMatch()  {}
func (DestPorts) isMatch() {}
func (Source) isMatch()    {}
func (Dest) isMatch()      {}
func (InSet) isMatch()     {}
func (SourceMAC) isMatch() {}
func (CTState) isMatch()   {}
func (Syn) isMatch()       {}
func (AddrType) isMatch()  {}
func (ICMPType) isMatch()  {}
