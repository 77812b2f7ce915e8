// Package addrmap is a map from addresses of hosts that takes a few bytes an entry. In a cluster of a hundred thousand pods the
// lists of peers have a million entries, nearly all of IPv4; the Go type of an address takes 24 bytes and is something for the
// garbage collector to follow.
package addrmap

import (
	"encoding/binary"
	"iter"
	"net/netip"
)

// Map holds a value for each of some addresses. The zero value is an empty map that is ready to use. Addresses of IPv4 must not
// be mapped into IPv6 ([netip.Addr.Unmap]), and those of IPv6 have no zone.
type Map[V any] struct {
	v4 map[uint32]V
	v6 map[[16]byte]V
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func address(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// Get returns the value of an address, and whether it has one.
func (m *Map[V]) Get(a netip.Addr) (v V, ok bool) {
	if a.Is4() {
		v, ok = m.v4[number(a)]
	} else {
		v, ok = m.v6[a.As16()]
	}
	return v, ok
}

// Has reports whether an address has a value.
func (m *Map[V]) Has(a netip.Addr) bool {
	_, ok := m.Get(a)
	return ok
}

// Put gives an address a value.
func (m *Map[V]) Put(a netip.Addr, v V) {
	if a.Is4() {
		if m.v4 == nil {
			m.v4 = map[uint32]V{}
		}
		m.v4[number(a)] = v
		return
	}
	if m.v6 == nil {
		m.v6 = map[[16]byte]V{}
	}
	m.v6[a.As16()] = v
}

// Delete takes an address out.
func (m *Map[V]) Delete(a netip.Addr) {
	if a.Is4() {
		delete(m.v4, number(a))
	} else {
		delete(m.v6, a.As16())
	}
}

// Len is the number of addresses.
func (m *Map[V]) Len() int { return len(m.v4) + len(m.v6) }

// All goes through them, in no order.
func (m *Map[V]) All() iter.Seq2[netip.Addr, V] {
	return func(yield func(netip.Addr, V) bool) {
		for n, v := range m.v4 {
			if !yield(address(n), v) {
				return
			}
		}
		for b, v := range m.v6 {
			if !yield(netip.AddrFrom16(b), v) {
				return
			}
		}
	}
}
