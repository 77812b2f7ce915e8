package ipam

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// Range is a span of addresses to give out. The zero Start, End and Gateway mean what their comments say.
type Range struct {
	Subnet netip.Prefix
	// Start and End bound what is given out, both inclusive; by default all of the subnet.
	Start, End netip.Addr
	// Gateway is kept out; by default the first address after the subnet's.
	Gateway netip.Addr
	// Exclude is kept out as well.
	Exclude []netip.Prefix
}

// span is a range made ready: what is given out is [first, last] less the holes, which are sorted, apart, and inside.
type span struct {
	Range
	first, last netip.Addr
	holes       []hole
}

type hole struct{ first, last netip.Addr }

// String names the range in messages: its subnet, and the bounds where they are narrower.
func (r Range) String() string {
	if !r.Start.IsValid() && !r.End.IsValid() {
		return r.Subnet.String()
	}
	s := newSpan(r)
	return fmt.Sprintf("%s (%s to %s)", r.Subnet, s.first, s.last)
}

// Check returns an error unless at least one address can be given out and all parts are of the subnet.
func (r Range) Check() error {
	if !r.Subnet.IsValid() || r.Subnet.Addr().Is4In6() {
		return fmt.Errorf("subnet: %q: an IPv4 or IPv6 prefix is allowed", r.Subnet)
	}
	for _, a := range []netip.Addr{r.Start, r.End, r.Gateway} {
		if a.IsValid() && !r.Subnet.Contains(a) {
			return fmt.Errorf("range %s: %s is no address of it", r.Subnet, a)
		}
	}
	if s := newSpan(r); s.last.Less(s.first) || s.size() == 0 {
		return fmt.Errorf("range %s: no address is left to give out between %s and %s", r.Subnet, s.first, s.last)
	}
	return nil
}

// Prefixes are what the range gives out, as few prefixes as can be. The subnet's own addresses (network, broadcast, and a gateway
// that nobody named) are counted as given out where they are no more than holes of it: nobody else has them either.
func (r Range) Prefixes() []netip.Prefix {
	r.Subnet = r.Subnet.Masked()
	if !r.Start.IsValid() && !r.End.IsValid() && !r.Gateway.IsValid() && len(r.Exclude) == 0 {
		return []netip.Prefix{r.Subnet}
	}
	var all []netip.Prefix
	s := newSpan(r)
	from := s.first
	for _, h := range append(s.holes, hole{first: s.last.Next()}) {
		if !h.first.IsValid() { // the last address of all has none after it
			all = append(all, between(from, s.last)...)
		} else if from.Less(h.first) {
			all = append(all, between(from, h.first.Prev())...)
		}
		from = h.last.Next()
	}
	return all
}

// between covers the addresses from first to last, both included.
func between(first, last netip.Addr) (all []netip.Prefix) {
	for first.IsValid() && !last.Less(first) {
		p := netip.PrefixFrom(first, first.BitLen())
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(first, p.Bits()-1)
			if wider.Masked().Addr() != first || last.Less(lastOf(wider)) {
				break
			}
			p = wider
		}
		all = append(all, p)
		first = lastOf(p).Next()
	}
	return all
}

// Overlaps reports whether both give out, or could give out, the same address.
func (r Range) Overlaps(other Range) bool {
	a, b := newSpan(r), newSpan(other)
	return a.first.BitLen() == b.first.BitLen() && !a.last.Less(b.first) && !b.last.Less(a.first)
}

// newSpan fills in what the range leaves open. The network address, and with IPv4 the broadcast address, of a subnet are
// never given out, except where it has no more than two addresses (RFC 3021, RFC 6164).
func newSpan(r Range) span {
	r.Subnet = r.Subnet.Masked()
	s := span{Range: r, first: r.Subnet.Addr(), last: lastOf(r.Subnet)}
	var out []hole
	if r.Subnet.Addr().BitLen()-r.Subnet.Bits() > 1 {
		out = append(out, hole{s.first, s.first})
		if s.first.Is4() {
			out = append(out, hole{s.last, s.last})
		}
		if !r.Gateway.IsValid() {
			s.Gateway = s.first.Next()
		}
	}
	if s.Gateway.IsValid() {
		out = append(out, hole{s.Gateway, s.Gateway})
	}
	if r.Start.IsValid() {
		s.first = r.Start
	}
	if r.End.IsValid() {
		s.last = r.End
	}
	for _, p := range r.Exclude {
		out = append(out, hole{p.Masked().Addr(), lastOf(p)})
	}
	s.holes = merge(out, s.first, s.last)
	return s
}

// merge clips holes to [first, last], sorts them and joins those that overlap.
func merge(holes []hole, first, last netip.Addr) []hole {
	slices.SortFunc(holes, func(a, b hole) int { return a.first.Compare(b.first) })
	var out []hole
	for _, h := range holes {
		if h.first.BitLen() != first.BitLen() || h.last.Less(first) || last.Less(h.first) {
			continue
		}
		if h.first.Less(first) {
			h.first = first
		}
		if last.Less(h.last) {
			h.last = last
		}
		if n := len(out); n > 0 && !out[n-1].last.Less(h.first) {
			if out[n-1].last.Less(h.last) {
				out[n-1].last = h.last
			}
			continue
		}
		out = append(out, h)
	}
	return out
}

// contains reports whether the range gives out the address.
func (s *span) contains(a netip.Addr) bool {
	return a.IsValid() && s.from(a) == a
}

// from returns the first address at or after a that the range gives out, or the zero Addr where there is none.
func (s *span) from(a netip.Addr) netip.Addr {
	if !a.IsValid() || a.BitLen() != s.first.BitLen() || a.Less(s.first) {
		return netip.Addr{}
	}
	for _, h := range s.holes {
		if !a.Less(h.first) && !h.last.Less(a) {
			a = h.last.Next()
		}
	}
	if !a.IsValid() || s.last.Less(a) {
		return netip.Addr{}
	}
	return a
}

// size is how many addresses the range gives out, at most math.MaxUint64.
func (s *span) size() uint64 {
	n := distance(s.first, s.last)
	for _, h := range s.holes {
		if n != math.MaxUint64 {
			n -= distance(h.first, h.last)
		}
	}
	return n
}

// file names the range's state. It changes with everything that decides which addresses the range gives out, so that a
// changed configuration starts to look for free addresses from the range's beginning.
func (s *span) file() string {
	text := fmt.Appendf(nil, "%s %s", s.first, s.last)
	for _, h := range s.holes { // one by one: of addresses in fields %v shows pointers, which differ in every process
		text = fmt.Appendf(text, " %s-%s", h.first, h.last)
	}
	sum := sha256.Sum256(text)
	return fmt.Sprintf("%s-%s-%s", s.first, s.last, hex.EncodeToString(sum[:4]))
}

// lastOf returns the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 1 << (7 - bit%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// distance counts the addresses from first to last, both included, and stops at math.MaxUint64.
func distance(first, last netip.Addr) uint64 {
	a, b := first.As16(), last.As16()
	aHigh, aLow := binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:])
	bHigh, bLow := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	low := bLow - aLow
	high := bHigh - aHigh
	if bLow < aLow {
		high--
	}
	if high > 0 || low == math.MaxUint64 {
		return math.MaxUint64
	}
	return low + 1
}
