package policy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func prefixes(texts ...string) []netip.Prefix {
	list := []netip.Prefix{}
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

func TestSubtractLeavesTheHalvesBesideTheWayDown(t *testing.T) {
	for _, tt := range []struct {
		from []string
		away string
		want []string
	}{
		{[]string{"10.0.0.0/8"}, "10.0.0.0/8", nil},
		{[]string{"10.0.0.0/8"}, "0.0.0.0/0", nil},
		{[]string{"10.0.0.0/8"}, "11.0.0.0/8", []string{"10.0.0.0/8"}},
		{[]string{"10.0.0.0/8"}, "2001:db8::/32", []string{"10.0.0.0/8"}},
		{[]string{"10.0.0.0/30"}, "10.0.0.1/32", []string{"10.0.0.0/32", "10.0.0.2/31"}},
		{[]string{"0.0.0.0/0"}, "128.0.0.0/1", []string{"0.0.0.0/1"}},
		{[]string{"0.0.0.0/1", "192.0.0.0/2"}, "192.0.0.0/3", []string{"0.0.0.0/1", "224.0.0.0/3"}},
		{[]string{"10.0.0.1/32"}, "10.0.0.1/32", nil},
		{[]string{"2001:db8::/126"}, "2001:db8::3/128", []string{"2001:db8::/127", "2001:db8::2/128"}},
		{[]string{"::/0"}, "8000::/1", []string{"::/1"}},
	} {
		if got := disjoint(subtract(prefixes(tt.from...), netip.MustParsePrefix(tt.away))); !slices.Equal(got, prefixes(tt.want...)) {
			t.Errorf("%v without %s is %v, want %v", tt.from, tt.away, got, tt.want)
		}
	}
}

func TestDisjointIsTheSmallestForm(t *testing.T) {
	for _, tt := range []struct{ list, want []string }{
		{nil, nil},
		{[]string{"10.0.0.0/8", "10.1.0.0/16"}, []string{"10.0.0.0/8"}},
		{[]string{"10.1.0.0/16", "10.0.0.0/8", "10.0.0.0/8"}, []string{"10.0.0.0/8"}},
		{[]string{"10.0.0.0/9", "10.128.0.0/9"}, []string{"10.0.0.0/8"}},
		{[]string{"10.128.0.0/9", "11.0.0.0/9"}, []string{"10.128.0.0/9", "11.0.0.0/9"}}, // side by side, and no halves of one
		{[]string{"0.0.0.0/2", "64.0.0.0/2", "128.0.0.0/1"}, []string{"0.0.0.0/0"}},
		{[]string{"0.0.0.0/0", "::/0"}, []string{"0.0.0.0/0", "::/0"}},
		{[]string{"255.255.255.255/32", "::/128"}, []string{"255.255.255.255/32", "::/128"}},
		{[]string{"::/1", "8000::/1"}, []string{"::/0"}},
		{[]string{"10.0.0.0/32", "10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/30"}, []string{"10.0.0.0/29"}},
	} {
		if got := disjoint(prefixes(tt.list...)); !slices.Equal(got, prefixes(tt.want...)) {
			t.Errorf("%v becomes %v, want %v", tt.list, got, tt.want)
		}
	}
}

// The model holds addresses one by one: in a world of eight bits, below one prefix of each family. Every set of prefixes there
// is 256 booleans, and nothing of the arithmetic under test is in it.
type world [256]bool

var bases = prefixes("198.51.100.0/24", "2001:db8::/120")

// inWorld makes a prefix of the world: its base's bits and some more.
func inWorld(base netip.Prefix, low byte, more int) netip.Prefix {
	raw := base.Addr().AsSlice()
	raw[len(raw)-1] = low
	a, _ := netip.AddrFromSlice(raw)
	return netip.PrefixFrom(a, base.Bits()+more).Masked()
}

// mark sets the addresses of a prefix, comparing the last byte bit by bit.
func (w *world) mark(p netip.Prefix, value bool) {
	raw := p.Addr().AsSlice()
	low, more := raw[len(raw)-1], p.Bits()-(p.Addr().BitLen()-8)
	for i := range w {
		same := true
		for bit := range more {
			same = same && byte(i)>>(7-bit)&1 == low>>(7-bit)&1
		}
		if same {
			w[i] = value
		}
	}
}

func worldOf(list []netip.Prefix) (w world) {
	for _, p := range list {
		w.mark(p, true)
	}
	return w
}

func TestSubtractAndDisjointAgreeWithAModelAddressByAddress(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		base := bases[random.IntN(len(bases))]
		pick := func() netip.Prefix { return inWorld(base, byte(random.Uint32()), random.IntN(9)) }
		var list []netip.Prefix
		for range random.IntN(6) {
			list = append(list, pick())
		}
		before := slices.Clone(list)
		form := disjoint(list)
		if !slices.Equal(list, before) {
			t.Fatalf("disjoint changed its input %v to %v", before, list)
		}
		if worldOf(form) != worldOf(list) {
			t.Fatalf("%v is not the same as %v", form, list)
		}
		smallest(t, form)
		rest := slices.Clone(form)
		model := worldOf(form)
		for range random.IntN(4) {
			away := pick()
			rest = subtract(rest, away)
			model.mark(away, false)
		}
		if worldOf(rest) != model {
			t.Fatalf("%v is not what is left of %v", rest, form)
		}
		apart(t, rest)
	}
}

func apart(t *testing.T, list []netip.Prefix) {
	t.Helper()
	for i, p := range list {
		if p != p.Masked() {
			t.Fatalf("%v: %s has host bits", list, p)
		}
		for _, q := range list[:i] {
			if p.Overlaps(q) {
				t.Fatalf("%v: %s and %s overlap", list, q, p)
			}
		}
	}
}

// smallest sees that a form is sorted, apart, and has no two halves of one prefix.
func smallest(t *testing.T, form []netip.Prefix) {
	t.Helper()
	apart(t, form)
	if !slices.IsSortedFunc(form, netip.Prefix.Compare) {
		t.Fatalf("%v is not sorted", form)
	}
	for _, p := range form {
		for _, q := range form {
			if p.Bits() == 0 || p == q || p.Bits() != q.Bits() || p.Addr().BitLen() != q.Addr().BitLen() {
				continue
			}
			if netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked() == netip.PrefixFrom(q.Addr(), q.Bits()-1).Masked() {
				t.Fatalf("%v: %s and %s are the halves of one", form, p, q)
			}
		}
	}
}

// anyPrefix is one of either family, of any length, near to others so that they meet.
func anyPrefix(random *rand.Rand) netip.Prefix {
	raw := make([]byte, 4+12*random.IntN(2))
	for i := range raw {
		if random.IntN(3) == 0 {
			raw[i] = byte(random.Uint32())
		}
	}
	a, _ := netip.AddrFromSlice(raw)
	return netip.PrefixFrom(a, random.IntN(a.BitLen()+1)).Masked()
}

// hits reports whether an address is in a list: by the standard library, whose Contains is not under test.
func hits(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// edges are the addresses at which membership can change: the first and last of each prefix, and their neighbours.
func edges(list []netip.Prefix) (out []netip.Addr) {
	for _, p := range list {
		first, last := p.Addr(), p.Addr().AsSlice()
		for bit := p.Bits(); bit < first.BitLen(); bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
		}
		end, _ := netip.AddrFromSlice(last)
		out = append(out, first, end, first.Prev(), end.Next())
	}
	return slices.DeleteFunc(out, func(a netip.Addr) bool { return !a.IsValid() })
}

func TestPropertiesOfPrefixesOfAnyLengthAndFamily(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		var list, away []netip.Prefix
		for range random.IntN(8) {
			list = append(list, anyPrefix(random))
		}
		for range random.IntN(4) {
			away = append(away, anyPrefix(random))
		}
		form := disjoint(list)
		smallest(t, form)
		if again := disjoint(form); !slices.Equal(again, form) {
			t.Fatalf("%v once more becomes %v", form, again)
		}
		random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		if other := disjoint(list); !slices.Equal(other, form) {
			t.Fatalf("the order of %v matters: %v and %v", list, form, other)
		}
		rest := form
		for _, a := range away {
			rest = subtract(rest, a)
		}
		apart(t, rest)
		rest = disjoint(rest)
		for _, a := range edges(slices.Concat(list, away, rest)) {
			if hits(form, a) != hits(list, a) {
				t.Fatalf("%s: %v and %v differ", a, list, form)
			}
			if want := hits(list, a) && !hits(away, a); hits(rest, a) != want {
				t.Fatalf("%s in %v without %v, which is %v: %v", a, list, away, rest, !want)
			}
		}
	}
}

func TestHalvesSplitAWholeFamilyAlone(t *testing.T) {
	for _, tt := range []struct {
		p    string
		want []string
	}{
		{"0.0.0.0/0", []string{"0.0.0.0/1", "128.0.0.0/1"}},
		{"::/0", []string{"::/1", "8000::/1"}},
		{"10.0.0.0/8", []string{"10.0.0.0/8"}},
		{"128.0.0.0/1", []string{"128.0.0.0/1"}},
		{"::1/128", []string{"::1/128"}},
	} {
		if got := Halves(netip.MustParsePrefix(tt.p)); !slices.Equal(got, prefixes(tt.want...)) {
			t.Errorf("%s: %v, want %v", tt.p, got, tt.want)
		}
	}
	for bits := range 32 {
		low, high := halves(netip.PrefixFrom(netip.MustParseAddr("255.255.255.255"), bits).Masked())
		if low.Overlaps(high) || low.Bits() != bits+1 || high.Bits() != bits+1 || !low.Addr().Less(high.Addr()) {
			t.Errorf("halves of a /%d: %s and %s", bits, low, high)
		}
	}
}
