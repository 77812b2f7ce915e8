package policy

import (
	"net/netip"
	"slices"
)

// subtract takes a prefix away from disjoint ones: what is left of a larger one are the halves beside the way down to it.
func subtract(from []netip.Prefix, away netip.Prefix) []netip.Prefix {
	var rest []netip.Prefix
	for _, p := range from {
		switch {
		case !p.Overlaps(away):
			rest = append(rest, p)
		case p.Bits() < away.Bits():
			for p.Bits() < away.Bits() {
				low, high := halves(p)
				if low.Overlaps(away) {
					p, rest = low, append(rest, high)
				} else {
					p, rest = high, append(rest, low)
				}
			}
		}
	}
	return rest
}

// halves splits a prefix that is not a single address.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits() + 1
	raw := p.Addr().AsSlice()
	low = netip.PrefixFrom(p.Addr(), bits)
	raw[(bits-1)/8] |= 0x80 >> ((bits - 1) % 8)
	upper, _ := netip.AddrFromSlice(raw)
	return low, netip.PrefixFrom(upper, bits)
}

// disjoint brings a union of prefixes into its one smallest form: sorted, none inside of another, no two halves of one.
func disjoint(list []netip.Prefix) []netip.Prefix {
	list = slices.SortedFunc(slices.Values(list), netip.Prefix.Compare)
	var out []netip.Prefix
	for _, p := range list {
		if len(out) > 0 && out[len(out)-1].Overlaps(p) {
			continue // sorted: what comes before is the larger one
		}
		out = append(out, p)
		for len(out) > 1 {
			a, b := out[len(out)-2], out[len(out)-1]
			if a.Bits() != b.Bits() || a.Bits() == 0 || a.Addr().BitLen() != b.Addr().BitLen() {
				break
			}
			parent := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
			if a.Addr() != parent.Addr() || !parent.Contains(b.Addr()) {
				break
			}
			out = append(out[:len(out)-2], parent)
		}
	}
	return out
}

// Halves returns the two halves of a prefix of length 0, which ipset cannot hold, and any other prefix as it is.
func Halves(p netip.Prefix) []netip.Prefix {
	if p.Bits() > 0 {
		return []netip.Prefix{p}
	}
	low, high := halves(p)
	return []netip.Prefix{low, high}
}
