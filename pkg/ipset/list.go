package ipset

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/rule"
)

// listHeader asks for sets without their entries (IPSET_FLAG_LIST_HEADER of linux/netfilter/ipset/ip_set.h).
const listHeader = 1 << 2

// Counts returns the number of entries of each set whose name begins with the prefix. No entry is copied, but the kernel counts
// those of a hash each time (mtype_ext_size): some 10 ns each, so fifty sets of ten thousand take 5 ms. An entry that was
// exchanged for another does not show.
func (s *Sets) Counts(prefix string) (map[string]int, error) {
	found, err := s.dump(prefix, listHeader)
	if err != nil {
		return nil, wrap("count", prefix+"*", err)
	}
	counts := make(map[string]int, len(found))
	for name, l := range found {
		counts[name] = l.count
	}
	return counts, nil
}

// Count returns the number of entries of one set, for the price of that one, or an error that is [ErrNotExist].
func (s *Sets) Count(name string) (int, error) {
	found, err := s.dump(name, listHeader, name)
	if err == nil && found[name] == nil {
		err = ErrNotExist
	}
	if err != nil {
		return 0, wrap("count", name, err)
	}
	return found[name].count, nil
}

// List returns the sets whose names begin with the prefix, sorted, with their entries sorted. Role and Definition are not
// in the kernel. Of a set of a type that postern does not use, the entries are there as far as they have an address.
func (s *Sets) List(prefix string) ([]rule.Set, error) {
	found, err := s.dump(prefix, 0)
	if err != nil {
		return nil, wrap("list", prefix+"*", err)
	}
	sets := make([]rule.Set, 0, len(found))
	for _, name := range slices.Sorted(maps.Keys(found)) {
		set := found[name].set
		slices.SortFunc(set.Entries, compare)
		sets = append(sets, set)
	}
	return sets, nil
}

// compare is [rule.Entry.Compare] of entries of one set, quickly: their networks have no host bits, and mostly differ.
func compare(a, b rule.Entry) int {
	c := a.Prefix.Addr().Compare(b.Prefix.Addr())
	if c == 0 {
		c = cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits())
	}
	if c == 0 {
		c = a.Compare(b)
	}
	return c
}

// listing is what the messages of a dump have told of a set so far.
type listing struct {
	set   rule.Set
	count int
}

func (s *Sets) dump(prefix string, flags uint32, one ...string) (found map[string]*listing, err error) {
	const tries = 5
	for range tries {
		request := s.begin(nl.IPSET_CMD_LIST, unix.NLM_F_DUMP)
		for _, name := range one {
			request = nfnetlink.Text(request, nl.IPSET_ATTR_SETNAME, name)
		}
		if flags != 0 {
			request = nfnetlink.Uint32(request, nl.IPSET_ATTR_FLAGS|unix.NLA_F_NET_BYTEORDER, flags)
		}
		found = map[string]*listing{}
		err = s.socket.Ask(request, func(attributes []byte) { read(attributes, prefix, found) })
		if !errors.Is(err, nfnetlink.ErrInterrupted) {
			break
		}
	}
	return found, err
}

// read takes in one message: the header of a set whose name begins with the prefix, or some of its entries, or both.
func read(attributes []byte, prefix string, found map[string]*listing) {
	var l *listing
	name := ""
	nlevents.Attributes(attributes, func(typ uint16, value []byte) {
		if typ == nl.IPSET_ATTR_SETNAME {
			name = zeroTerminated(value)
			if l = found[name]; l == nil && strings.HasPrefix(name, prefix) {
				l = &listing{set: rule.Set{Name: name, Family: rule.IPv4}}
				found[name] = l
			}
		}
		if l == nil {
			return // the name stands first, and is not one that is asked for
		}
		switch {
		case typ == nl.IPSET_ATTR_TYPENAME:
			l.set.Type = rule.SetType(zeroTerminated(value))
		case typ == nl.IPSET_ATTR_FAMILY && len(value) == 1 && value[0] == unix.AF_INET6:
			l.set.Family = rule.IPv6
		case typ == nl.IPSET_ATTR_DATA:
			l.count = elements(value)
		case typ == nl.IPSET_ATTR_ADT:
			if l.set.Entries == nil {
				l.set.Entries = make([]rule.Entry, 0, min(l.count, MinRoom))
			}
			nlevents.Attributes(value, func(_ uint16, value []byte) {
				if e, ok := decode(value); ok {
					l.set.Entries = append(l.set.Entries, e)
				}
			})
		}
	})
}

// elements is the number of entries that a set's header tells.
func elements(header []byte) (n int) {
	nlevents.Attributes(header, func(typ uint16, value []byte) {
		if typ == nl.IPSET_ATTR_ELEMENTS && len(value) == 4 {
			n = int(binary.BigEndian.Uint32(value))
		}
	})
	return n
}

func zeroTerminated(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}
