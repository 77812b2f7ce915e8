package addrmap_test

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/postern-cni/postern/pkg/addrmap"
)

func TestItHoldsWhatAMapOfAddressesHolds(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	any := func() netip.Addr {
		n := byte(r.IntN(40))
		switch r.IntN(3) {
		case 0:
			return netip.AddrFrom4([4]byte{10, 255, 0, n})
		case 1:
			return netip.AddrFrom16([16]byte{0: 0xfd, 15: n})
		}
		return netip.AddrFrom4([4]byte{n, 0, 0, n})
	}
	var m addrmap.Map[int]
	want := map[netip.Addr]int{}
	for i := range 20000 {
		a := any()
		if r.IntN(2) == 0 {
			m.Put(a, i)
			want[a] = i
		} else {
			m.Delete(a)
			delete(want, a)
		}
		b := any()
		v, ok := m.Get(b)
		w, is := want[b]
		if v != w || ok != is || m.Has(b) != is || m.Len() != len(want) {
			t.Fatalf("after %d steps %s is %d, %v of %d entries; want %d, %v of %d", i, b, v, ok, m.Len(), w, is, len(want))
		}
	}
	if got := maps.Collect(m.All()); !maps.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}
