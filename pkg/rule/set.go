package rule

import (
	"fmt"
	"net/netip"
)

// SetType is an ipset type name (ipset(8)).
type SetType string

const (
	HashIP       SetType = "hash:ip"
	HashNet      SetType = "hash:net"
	HashIPPort   SetType = "hash:ip,port"
	HashNetIface SetType = "hash:net,iface"
)

// Role says when a set may change while a new state is put into force: what leaves goes before the rules, what joins comes
// after them, and a pod is ready only when everything else stands.
type Role uint8

const (
	// Peers are the sets that a pod's rules look peers up in.
	Peers Role = iota
	// Open lists the (address, interface) pairs that no policy isolates in one direction.
	Open
	// Ready lists the (address, interface) pairs of the pods whose guard stands complete. It is the last to gain a member
	// and the first to lose one.
	Ready
	// Local lists the addresses of this node's pods, whose packets come from nowhere but their own interface. It gains
	// members before the rules and loses them last.
	Local
)

// Set is an ipset. Names have at most 31 characters (IPSET_MAXNAMELEN-1).
type Set struct {
	Name    string
	Type    SetType
	Family  Family
	Role    Role
	Entries []Entry // sorted by [Entry.Compare], no two alike
	// Definition says for people what the set holds ("namespaces tenant=manning", "blocks 192.0.2.0/24").
	Definition string
}

// Entry is one member of a set; the fields beyond Prefix are filled as the set's type asks.
type Entry struct {
	// Prefix is the address (with /32 or /128) or the network, host bits zero. Never /0: the kernel stores that as a host
	// address. Compilers split it into two halves.
	Prefix netip.Prefix
	Iface  string // hash:net,iface
	Proto  Proto  // hash:ip,port
	Port   uint16 // hash:ip,port
}

// Host is the entry of an address.
func Host(a netip.Addr) Entry { return Entry{Prefix: netip.PrefixFrom(a, a.BitLen())} }

// Compare orders entries: by address, prefix length, interface, protocol, port. It returns -1, 0 or 1.
func (e Entry) Compare(o Entry) int {
	if c := e.Prefix.Compare(o.Prefix); c != 0 {
		return c
	}
	for _, c := range []int{compare(e.Iface, o.Iface), compare(e.Proto, o.Proto), compare(e.Port, o.Port)} {
		if c != 0 {
			return c
		}
	}
	return 0
}

func compare[T string | Proto | uint16](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// String prints the entry as ipset(8) does: "10.0.0.1", "10.0.0.0/8", "10.0.0.1,tcp:80", "10.0.0.1,pst0123456789ab".
func (e Entry) String() string {
	s := e.Prefix.String()
	if e.Prefix.IsSingleIP() {
		s = e.Prefix.Addr().String()
	}
	switch {
	case e.Iface != "":
		s += "," + e.Iface
	case e.Proto != "":
		s += fmt.Sprintf(",%s:%d", e.Proto, e.Port)
	}
	return s
}
