// Package ipset keeps sets in the kernel through netlink (NFNL_SUBSYS_IPSET), over sockets that stay open: one add costs some 20 µs.
//
// Three facts of the kernel shape it. A prefix of length 0 is stored as a host address without a word, so it is refused here
// (write two halves). The default limit of 65,536 entries is never grown by the kernel, so each set is created with room for
// twice its content. A set in use can be swapped with another one of the same type and family, but not destroyed.
//
// Changes of sets are announced nowhere. That somebody else emptied one shows in the number of its entries, which costs little to
// ask for ([Sets.Counts]).
package ipset

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/rule"
)

// Errors that callers decide on.
var (
	ErrNotExist = errors.New("the set does not exist")
	ErrInUse    = errors.New("the set is in use by a rule or another set")
	ErrFull     = errors.New("the set is full")
)

// MinRoom is the smallest number of entries a set is created for.
const MinRoom = 65536

// Sets is a handle on the kernel's sets in the network namespace in which it was opened. It is not safe for concurrent use.
type Sets struct {
	h   *netlink.Handle
	raw *nl.SocketHandle // for requests that the library does not know
}

// Open opens the netlink sockets.
func Open() (*Sets, error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink for ipset: %w", err)
	}
	raw, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("open netlink for ipset: %w", err)
	}
	return &Sets{h, &nl.SocketHandle{Socket: raw}}, nil
}

// Close closes the sockets.
func (s *Sets) Close() {
	s.h.Close()
	s.raw.Close()
}

// Create makes an empty set with room for twice a number of entries, and [MinRoom] at least.
func (s *Sets) Create(set rule.Set, entries int) error {
	family := uint8(unix.AF_INET)
	if set.Family == rule.IPv6 {
		family = unix.AF_INET6
	}
	room := uint32(max(MinRoom, 2*entries))
	err := s.h.IpsetCreate(set.Name, string(set.Type), netlink.IpsetCreateOptions{Family: family, MaxElements: room})
	return wrap("create", set.Name, err)
}

// Add puts entries into a set. What is there already stays.
func (s *Sets) Add(name string, entries ...rule.Entry) error {
	return s.each("add to", name, entries, s.h.IpsetAdd)
}

// Del takes entries out of a set. What is not there is no error.
func (s *Sets) Del(name string, entries ...rule.Entry) error {
	return s.each("delete from", name, entries, s.h.IpsetDel)
}

func (s *Sets) each(verb, name string, entries []rule.Entry, do func(string, *netlink.IPSetEntry) error) error {
	for _, e := range entries {
		if e.Prefix.Bits() == 0 {
			return fmt.Errorf("ipset %s %s: %s: the kernel stores /0 as a host address; use two halves", verb, name, e)
		}
		if err := do(name, encode(e)); err != nil {
			return wrap(verb, name+" "+e.String(), err)
		}
	}
	return nil
}

// Swap exchanges the contents of two sets of one type and family, at once.
func (s *Sets) Swap(a, b string) error { return wrap("swap", a+" "+b, s.h.IpsetSwap(a, b)) }

// Flush empties a set.
func (s *Sets) Flush(name string) error { return wrap("flush", name, s.h.IpsetFlush(name)) }

// Destroy removes a set. That it is not there is no error.
func (s *Sets) Destroy(name string) error {
	err := wrap("destroy", name, s.h.IpsetDestroy(name))
	if errors.Is(err, ErrNotExist) {
		return nil
	}
	return err
}

// List returns the sets whose names begin with the prefix, sorted, with their entries sorted. Role and Definition are not
// in the kernel.
func (s *Sets) List(prefix string) ([]rule.Set, error) {
	all, err := s.h.IpsetListAll()
	if err != nil {
		return nil, wrap("list", prefix+"*", err)
	}
	byName := map[string]*rule.Set{} // a large set comes in pieces
	for _, r := range all {
		if !strings.HasPrefix(r.SetName, prefix) {
			continue
		}
		set := byName[r.SetName]
		if set == nil {
			set = &rule.Set{Name: r.SetName, Type: rule.SetType(r.TypeName), Family: rule.IPv4}
			if r.Family == unix.AF_INET6 {
				set.Family = rule.IPv6
			}
			byName[r.SetName] = set
		}
		for i := range r.Entries {
			set.Entries = append(set.Entries, decode(&r.Entries[i], set.Type, set.Family))
		}
	}
	sets := make([]rule.Set, 0, len(byName))
	for _, set := range byName {
		slices.SortFunc(set.Entries, rule.Entry.Compare)
		sets = append(sets, *set)
	}
	slices.SortFunc(sets, func(a, b rule.Set) int { return strings.Compare(a.Name, b.Name) })
	return sets, nil
}

func encode(e rule.Entry) *netlink.IPSetEntry {
	out := &netlink.IPSetEntry{IP: net.IP(e.Prefix.Addr().AsSlice()), Replace: true}
	if !e.Prefix.IsSingleIP() {
		out.CIDR = uint8(e.Prefix.Bits())
	}
	if e.Iface != "" {
		out.IFace = e.Iface
	}
	if e.Proto != "" {
		proto, port := protoNumber(e.Proto), e.Port
		out.Protocol, out.Port = &proto, &port
	}
	return out
}

func decode(e *netlink.IPSetEntry, typ rule.SetType, family rule.Family) rule.Entry {
	addr, _ := netip.AddrFromSlice(e.IP)
	if family == rule.IPv4 {
		addr = addr.Unmap()
	}
	bits := addr.BitLen()
	if e.CIDR != 0 {
		bits = int(e.CIDR)
	}
	out := rule.Entry{Prefix: netip.PrefixFrom(addr, bits), Iface: e.IFace}
	if typ == rule.HashIPPort && e.Protocol != nil && e.Port != nil {
		out.Proto, out.Port = protoName(*e.Protocol), *e.Port
	}
	return out
}

var protoNumbers = map[rule.Proto]uint8{
	rule.TCP: unix.IPPROTO_TCP, rule.UDP: unix.IPPROTO_UDP, rule.SCTP: unix.IPPROTO_SCTP,
}

func protoNumber(p rule.Proto) uint8 { return protoNumbers[p] }

func protoName(n uint8) rule.Proto {
	for p, number := range protoNumbers {
		if number == n {
			return p
		}
	}
	return rule.Proto(fmt.Sprint(n))
}

// wrap turns the kernel's numbers (linux/netfilter/ipset/ip_set.h) into this package's errors.
func wrap(verb, object string, err error) error {
	if err == nil {
		return nil
	}
	var code nl.IPSetError
	if errors.As(err, &code) {
		switch uintptr(code) {
		case nl.IPSET_ERR_TYPE_SPECIFIC:
			return fmt.Errorf("ipset %s %s: %w (%v)", verb, object, ErrFull, err)
		case nl.IPSET_ERR_BUSY, nl.IPSET_ERR_REFERENCED:
			return fmt.Errorf("ipset %s %s: %w", verb, object, ErrInUse)
		case nl.IPSET_ERR_EXIST_SETNAME2: // of a swap: there is no second one
			return fmt.Errorf("ipset %s %s: %w", verb, object, ErrNotExist)
		}
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("ipset %s %s: %w", verb, object, ErrNotExist)
	}
	return fmt.Errorf("ipset %s %s: %w", verb, object, err)
}
