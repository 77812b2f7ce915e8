package ipset_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

// address is the n-th of a family.
func address(family rule.Family, n int) netip.Prefix {
	b := [16]byte{0: 0xfd, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)}
	a := netip.AddrFrom16(b)
	if family == rule.IPv4 {
		a = netip.AddrFrom4([4]byte{10, b[13], b[14], b[15]})
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// filled has a set of each type that postern uses in both families, with a number of entries.
func filled(entries int) (sets []rule.Set) {
	for _, family := range rule.Families {
		for _, typ := range []rule.SetType{rule.HashIP, rule.HashNet, rule.HashIPPort, rule.HashNetIface} {
			set := rule.Set{Name: fmt.Sprintf("pst-%d-%d", len(sets), family), Type: typ, Family: family}
			for n := range entries {
				e := rule.Entry{Prefix: address(family, n)}
				switch typ {
				case rule.HashIPPort:
					e.Proto, e.Port = rule.TCP, 80
				case rule.HashNetIface:
					e.Iface = "pst0123456789ab"
				}
				set.Entries = append(set.Entries, e)
			}
			sets = append(sets, set)
		}
	}
	return sets
}

func fill(t testing.TB, sets *ipset.Sets, list ...rule.Set) {
	t.Helper()
	for _, set := range list {
		if err := sets.Create(set, len(set.Entries)); err != nil {
			t.Fatal(err)
		}
		if err := sets.Add(set.Name, set.Entries...); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCountsShowWhatSomebodyElseDidToASet(t *testing.T) {
	ns := nettest.NewNS(t, "sets")
	ns.Do(t, func() {
		sets, err := ipset.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer sets.Close()
		want := map[string]int{}
		compare := func(after string) {
			t.Helper()
			got, err := sets.Counts("pst-")
			if err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(got, want) {
				t.Errorf("%s: counted %v, want %v", after, got, want)
			}
		}
		compare("nothing was made")
		const entries = 7
		list := filled(entries)
		fill(t, sets, list...)
		for _, set := range list {
			want[set.Name] = entries
		}
		ns.Run(t, "ipset", "create", "KUBE-CLUSTER-IP", "hash:ip")
		compare("ours and another were made")

		ns.Run(t, "ipset", "flush", list[0].Name)
		want[list[0].Name] = 0
		compare("one was flushed")
		ns.Run(t, "ipset", "del", list[1].Name, list[1].Entries[0].String())
		want[list[1].Name]--
		compare("an entry was deleted")
		ns.Run(t, "ipset", "add", list[7].Name, "2001:db8::/32,pst0")
		want[list[7].Name]++
		compare("an entry was added")
		ns.Run(t, "ipset", "destroy", list[2].Name)
		delete(want, list[2].Name)
		compare("one was destroyed")
		ns.Run(t, "ipset", "flush")
		for name := range want {
			want[name] = 0
		}
		compare("all were flushed")
	})
}

// Fifty sets of ten thousand entries: go test -bench . -run NONE ./pkg/ipset
func BenchmarkCounts(b *testing.B) {
	large(b, func(sets *ipset.Sets) error {
		counts, err := sets.Counts("pst-")
		if err == nil && (len(counts) != 50 || counts["pst-7"] != 10_000) {
			err = fmt.Errorf("counted %v", counts)
		}
		return err
	})
}

// The same by reading all of them.
func BenchmarkList(b *testing.B) {
	large(b, func(sets *ipset.Sets) error {
		_, err := sets.List("pst-")
		return err
	})
}

func large(b *testing.B, look func(*ipset.Sets) error) {
	nettest.NewNS(b, "sets").Do(b, func() {
		sets, err := ipset.Open()
		if err != nil {
			b.Fatal(err)
		}
		defer sets.Close()
		const entries = 10_000
		set := rule.Set{Type: rule.HashIP, Family: rule.IPv4}
		for n := range entries {
			set.Entries = append(set.Entries, rule.Entry{Prefix: address(rule.IPv4, n)})
		}
		for i := range 50 {
			set.Name = fmt.Sprintf("pst-%d", i)
			fill(b, sets, set)
		}
		for b.Loop() {
			if err := look(sets); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// Ten thousand entries into an empty set: in one call, one by one, and once more where all are there.
func BenchmarkAdd(b *testing.B) {
	set := rule.Set{Name: "pst-add", Type: rule.HashIP, Family: rule.IPv4}
	for n := range 10_000 {
		set.Entries = append(set.Entries, rule.Entry{Prefix: address(rule.IPv4, n)})
	}
	for _, tt := range []struct {
		name  string
		there bool
		each  int
	}{{"at once", false, len(set.Entries)}, {"at once, there already", true, len(set.Entries)}, {"one by one", false, 1}} {
		b.Run(tt.name, func(b *testing.B) {
			nettest.NewNS(b, "sets").Do(b, func() {
				sets, err := ipset.Open()
				if err != nil {
					b.Fatal(err)
				}
				defer sets.Close()
				fill(b, sets, set)
				for b.Loop() {
					b.StopTimer()
					if err := sets.Flush(set.Name); err != nil && !tt.there {
						b.Fatal(err)
					}
					b.StartTimer()
					for entries := range slices.Chunk(set.Entries, tt.each) {
						if err := sets.Add(set.Name, entries...); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		})
	}
}
