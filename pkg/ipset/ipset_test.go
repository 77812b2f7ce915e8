package ipset_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// inNamespace runs a test with a handle on the sets of a namespace of its own.
func inNamespace(t *testing.T, test func(t *testing.T, s *ipset.Sets)) {
	t.Helper()
	ns := nettest.NewNS(t, "sets")
	ns.Do(t, func() {
		s, err := ipset.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		test(t, s)
	})
}

// kinds repeats a test for each type of set and family, with some entries of it, sorted.
func kinds(t *testing.T, test func(t *testing.T, s *ipset.Sets, set rule.Set, entries []rule.Entry)) {
	for _, family := range rule.Families {
		for typ, entries := range samples(family) {
			t.Run(fmt.Sprintf("%s %s", typ, family), func(t *testing.T) {
				inNamespace(t, func(t *testing.T, s *ipset.Sets) {
					slices.SortFunc(entries, rule.Entry.Compare)
					test(t, s, rule.Set{Name: "pst-test", Type: typ, Family: family}, entries)
				})
			})
		}
	}
}

func samples(family rule.Family) map[rule.SetType][]rule.Entry {
	one, two, net, half := "192.0.2.1/32", "192.0.2.2/32", "198.51.100.0/24", "128.0.0.0/1"
	if family == rule.IPv6 {
		one, two, net, half = "2001:db8::1/128", "2001:db8::2/128", "2001:db8:1::/48", "8000::/1"
	}
	p := netip.MustParsePrefix
	return map[rule.SetType][]rule.Entry{
		rule.HashIP:  {{Prefix: p(one)}, {Prefix: p(two)}},
		rule.HashNet: {{Prefix: p(one)}, {Prefix: p(net)}, {Prefix: p(half)}},
		rule.HashIPPort: {{Prefix: p(one), Proto: rule.TCP, Port: 80}, {Prefix: p(one), Proto: rule.UDP, Port: 80},
			{Prefix: p(one), Proto: rule.SCTP, Port: 80}, {Prefix: p(two), Proto: rule.TCP, Port: 65535}},
		rule.HashNetIface: {{Prefix: p(one), Iface: "pst0123456789ab"}, {Prefix: p(one), Iface: "pst0123456789ac"},
			{Prefix: p(net), Iface: "pst0123456789ab"}},
	}
}

// one returns the only set that is there.
func one(t *testing.T, s *ipset.Sets) rule.Set {
	t.Helper()
	sets, err := s.List("")
	if err != nil {
		t.Fatal(err)
	}
	if len(sets) != 1 {
		t.Fatalf("%d sets: %+v", len(sets), sets)
	}
	return sets[0]
}

func TestWhatIsAddedIsListedAndWhatIsDeletedIsNot(t *testing.T) {
	kinds(t, func(t *testing.T, s *ipset.Sets, set rule.Set, entries []rule.Entry) {
		must(t, s.Create(set, 0))
		if got := one(t, s); len(got.Entries) > 0 || got.Name != set.Name || got.Type != set.Type || got.Family != set.Family {
			t.Errorf("created %+v, listed %+v", set, got)
		}
		must(t, s.Add(set.Name, entries...))
		if got := one(t, s).Entries; !reflect.DeepEqual(got, entries) {
			t.Errorf("added %v, listed %v", entries, got)
		}
		must(t, s.Add(set.Name, entries[0])) // that it is there already is no error
		must(t, s.Del(set.Name, entries[0]))
		must(t, s.Del(set.Name, entries[0])) // nor is that it is not there any more
		if got := one(t, s).Entries; !reflect.DeepEqual(got, entries[1:]) {
			t.Errorf("without %s: %v", entries[0], got)
		}
		must(t, s.Flush(set.Name))
		if got := one(t, s).Entries; len(got) > 0 {
			t.Errorf("flushed, and has %v", got)
		}
		must(t, s.Destroy(set.Name))
		must(t, s.Destroy(set.Name)) // not there: no error
		if sets, err := s.List(""); err != nil || len(sets) > 0 {
			t.Errorf("destroyed, and there are %v, %v", sets, err)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSwapExchangesContents(t *testing.T) {
	kinds(t, func(t *testing.T, s *ipset.Sets, set rule.Set, entries []rule.Entry) {
		other := set
		other.Name = "pst-other"
		must(t, s.Create(set, 0))
		must(t, s.Create(other, 0))
		must(t, s.Add(set.Name, entries[0]))
		must(t, s.Add(other.Name, entries[1:]...))
		must(t, s.Swap(set.Name, other.Name))
		sets, err := s.List("pst-")
		must(t, err)
		if len(sets) != 2 || sets[0].Name != "pst-other" || !reflect.DeepEqual(sets[0].Entries, entries[:1]) ||
			!reflect.DeepEqual(sets[1].Entries, entries[1:]) {
			t.Errorf("after the swap: %+v", sets)
		}
	})
}

func TestSetsOfTwoKindsAreNotSwapped(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		must(t, s.Create(rule.Set{Name: "pst-4", Type: rule.HashIP, Family: rule.IPv4}, 0))
		must(t, s.Create(rule.Set{Name: "pst-6", Type: rule.HashIP, Family: rule.IPv6}, 0))
		must(t, s.Create(rule.Set{Name: "pst-net", Type: rule.HashNet, Family: rule.IPv4}, 0))
		for _, with := range []string{"pst-6", "pst-net"} {
			if err := s.Swap("pst-4", with); err == nil {
				t.Errorf("pst-4 swapped with %s", with)
			}
		}
	})
}

// The kernel counts by regions of its table and so does not keep to the limit exactly (ip_set_hash_gen.h, mtype_add).
func TestAFullSetIsAnErrorOfItsOwn(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		set := rule.Set{Name: "pst-large", Type: rule.HashIP, Family: rule.IPv4}
		must(t, s.Create(set, 0))
		a, n := netip.MustParseAddr("10.0.0.0"), 0
		for ; n < 4*ipset.MinRoom; n++ {
			err := s.Add(set.Name, rule.Entry{Prefix: netip.PrefixFrom(a, 32)})
			if errors.Is(err, ipset.ErrFull) && strings.Contains(err.Error(), "pst-large 10.") {
				break
			}
			must(t, err)
			a = a.Next()
		}
		if n < ipset.MinRoom || n == 4*ipset.MinRoom {
			t.Errorf("%d entries fit into a set for %d", n, ipset.MinRoom)
		}
		// A set of this size comes from the kernel in pieces.
		if got := one(t, s).Entries; len(got) != n || !slices.IsSortedFunc(got, rule.Entry.Compare) {
			t.Errorf("%d entries listed of %d, sorted or not", len(got), n)
		}
	})
}

func TestASetHasRoomForTwiceItsContent(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		for size, want := range map[int]int{0: ipset.MinRoom, ipset.MinRoom / 2: ipset.MinRoom, 100000: 200000} {
			must(t, s.Create(rule.Set{Name: "pst-a", Type: rule.HashIP, Family: rule.IPv4}, size))
			out, err := exec.Command("ipset", "list", "-terse", "pst-a").CombinedOutput()
			must(t, err)
			if !slices.Contains(strings.Fields(string(out)), fmt.Sprint(want)) || !strings.Contains(string(out), " maxelem ") {
				t.Errorf("for %d entries: %s", size, out)
			}
			must(t, s.Destroy("pst-a"))
		}
	})
}

func TestAFullSetIsAnErrorOfItsOwnAmongManyEntries(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		set := rule.Set{Name: "pst-large", Type: rule.HashIP, Family: rule.IPv4}
		must(t, s.Create(set, 0))
		for n := range 2 * ipset.MinRoom {
			set.Entries = append(set.Entries, rule.Entry{Prefix: address(rule.IPv4, n)})
		}
		err := s.Add(set.Name, set.Entries...)
		if !errors.Is(err, ipset.ErrFull) || !strings.Contains(err.Error(), "pst-large 10.") {
			t.Fatalf("twice as many entries as there is room for: %v, want one that is ErrFull and names set and entry", err)
		}
		there := one(t, s).Entries
		if n := len(there); n < ipset.MinRoom || !reflect.DeepEqual(there, set.Entries[:n]) ||
			!strings.Contains(err.Error(), " "+set.Entries[n].String()+":") {
			t.Errorf("%d entries are there, and the error is %v; want all before the one it names", n, err)
		}
	})
}

func TestManyEntriesAreAddedListedAndDeleted(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		want := filled(5000) // several messages each way
		for _, set := range want {
			must(t, s.Create(set, 0))
			must(t, s.Add(set.Name, set.Entries[:100]...))
			must(t, s.Add(set.Name, set.Entries...)) // that some are there already is no error
		}
		got, err := s.List("pst-")
		must(t, err)
		slices.SortFunc(want, func(a, b rule.Set) int { return strings.Compare(a.Name, b.Name) })
		for i := range want {
			if !reflect.DeepEqual(got[i], want[i]) {
				t.Errorf("%s: listed %s %s with %d entries, want %s %s with %d in order", got[i].Name, got[i].Type, got[i].Family,
					len(got[i].Entries), want[i].Type, want[i].Family, len(want[i].Entries))
			}
			must(t, s.Del(want[i].Name, want[i].Entries[1:100]...))
			must(t, s.Del(want[i].Name, want[i].Entries[1:]...)) // nor is that some are not there any more
		}
		got, err = s.List("pst-")
		must(t, err)
		for i := range want {
			if !reflect.DeepEqual(got[i].Entries, want[i].Entries[:1]) {
				t.Errorf("%s: all but one were deleted, and there are %d", got[i].Name, len(got[i].Entries))
			}
		}
	})
}

// Those before it are in the set, as when each is sent by itself.
func TestARefusedEntryAmongManyIsNamed(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		set := rule.Set{Name: "pst-a", Type: rule.HashIP, Family: rule.IPv4}
		must(t, s.Create(set, 0))
		entries := []rule.Entry{{Prefix: address(rule.IPv4, 1)}, {Prefix: address(rule.IPv6, 2)}, {Prefix: address(rule.IPv4, 3)}}
		err := s.Add(set.Name, entries...)
		if err == nil || !strings.Contains(err.Error(), "pst-a "+entries[1].String()) {
			t.Errorf("added %v: %v, want an error that names the second", entries, err)
		}
		if got := one(t, s).Entries; !reflect.DeepEqual(got, entries[:1]) {
			t.Errorf("added %v: the set has %v", entries, got)
		}
	})
}

// The kernel would store it as a host address without a word: a rule for everyone would be one for 0.0.0.0.
func TestAPrefixOfLengthZeroIsRefused(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		for _, tt := range []struct {
			family rule.Family
			all    string
		}{{rule.IPv4, "0.0.0.0/0"}, {rule.IPv6, "::/0"}} {
			set := rule.Set{Name: "pst-net", Type: rule.HashNet, Family: tt.family}
			must(t, s.Create(set, 0))
			e := rule.Entry{Prefix: netip.MustParsePrefix(tt.all)}
			for verb, err := range map[string]error{"add": s.Add(set.Name, e), "del": s.Del(set.Name, e)} {
				if err == nil || !strings.Contains(err.Error(), "/0") {
					t.Errorf("%s %s: %v", verb, tt.all, err)
				}
			}
			if got := one(t, s).Entries; len(got) > 0 {
				t.Errorf("%s: the set has %v", tt.all, got)
			}
			must(t, s.Destroy(set.Name))
		}
	})
}

func TestASetThatIsNotThereIsAnErrorOfItsOwn(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		e := rule.Entry{Prefix: netip.MustParsePrefix("192.0.2.1/32")}
		must(t, s.Create(rule.Set{Name: "pst-here", Type: rule.HashIP, Family: rule.IPv4}, 0))
		for verb, err := range map[string]error{"add": s.Add("pst-none", e), "del": s.Del("pst-none", e), "flush": s.Flush("pst-none"),
			"swap": s.Swap("pst-here", "pst-none"), "swap back": s.Swap("pst-none", "pst-here")} {
			if !errors.Is(err, ipset.ErrNotExist) || !strings.Contains(err.Error(), "pst-none") {
				t.Errorf("%s: %v, want one that is ErrNotExist and names the set", verb, err)
			}
		}
	})
}

func TestASetInUseIsNotDestroyed(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNamespace(t, func(t *testing.T, s *ipset.Sets) {
			for _, tt := range []struct {
				family  rule.Family
				program string
			}{{rule.IPv4, "iptables-" + backend}, {rule.IPv6, "ip6tables-" + backend}} {
				set := rule.Set{Name: "pst-used" + tt.family.String(), Type: rule.HashIP, Family: tt.family}
				must(t, s.Create(set, 0))
				use := []string{"-A", "OUTPUT", "-m", "set", "--match-set", set.Name, "dst", "-j", "DROP"}
				iptables(t, tt.program, use...)
				if err := s.Destroy(set.Name); !errors.Is(err, ipset.ErrInUse) || !strings.Contains(err.Error(), set.Name) {
					t.Errorf("destroy of a set in use: %v", err)
				}
				other := set
				other.Name = "pst-other"
				must(t, s.Create(other, 0))
				must(t, s.Swap(set.Name, other.Name)) // the rule keeps the name, and gets the other's content
				must(t, s.Destroy(other.Name))
				use[0] = "-D"
				iptables(t, tt.program, use...)
				must(t, s.Destroy(set.Name))
			}
		})
	})
}

func TestASetThatIsThereAlreadyIsAnError(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		set := rule.Set{Name: "pst-twice", Type: rule.HashIP, Family: rule.IPv4}
		must(t, s.Create(set, 0))
		if err := s.Create(set, 0); err == nil || !strings.Contains(err.Error(), set.Name) {
			t.Errorf("created twice: %v", err)
		}
	})
}

func TestNamesOfThirtyOneCharactersWorkAndLongerOnesAreRefused(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		set := rule.Set{Name: "pst-" + strings.Repeat("x", 27), Type: rule.HashIP, Family: rule.IPv4}
		must(t, s.Create(set, 0))
		if got := one(t, s).Name; got != set.Name {
			t.Errorf("listed as %q", got)
		}
		set.Name += "x"
		if err := s.Create(set, 0); err == nil {
			t.Error("a name of 32 characters is taken")
		}
	})
}

func TestListKeepsToThePrefix(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		for _, name := range []string{"pst-b", "foreign", "ps", "pst-a", "xpst-a"} {
			must(t, s.Create(rule.Set{Name: name, Type: rule.HashIP, Family: rule.IPv4}, 0))
		}
		sets, err := s.List("pst-")
		must(t, err)
		var names []string
		for _, set := range sets {
			names = append(names, set.Name)
		}
		if want := []string{"pst-a", "pst-b"}; !slices.Equal(names, want) {
			t.Errorf("listed %q, want %q", names, want)
		}
	})
}

// A set of another type that somebody else has made does not disturb.
func TestForeignSetsOfOtherTypesAreListedPast(t *testing.T) {
	ns := nettest.NewNS(t, "sets")
	ns.Run(t, "ipset", "create", "foreign", "bitmap:port", "range", "0-100")
	ns.Run(t, "ipset", "add", "foreign", "7")
	ns.Run(t, "ipset", "create", "lists", "list:set")
	ns.Do(t, func() {
		s, err := ipset.Open()
		must(t, err)
		defer s.Close()
		must(t, s.Create(rule.Set{Name: "pst-a", Type: rule.HashIP, Family: rule.IPv4}, 0))
		if sets, err := s.List("pst-"); err != nil || len(sets) != 1 {
			t.Errorf("listed %v, %v", sets, err)
		}
	})
}

// An older version of postern may have used other types.
func TestSetsOfOursOfOtherTypesAreListedAsFarAsTheyAreUnderstood(t *testing.T) {
	inNamespace(t, func(t *testing.T, s *ipset.Sets) {
		for _, line := range []string{
			"create pst-a hash:net,port family inet6", "add pst-a 2001:db8::/32,tcp:80",
			"create pst-b bitmap:port range 0-100", "add pst-b 7",
			"create pst-c list:set", "add pst-c pst-b",
			"create pst-d hash:ip timeout 600 counters comment skbinfo", "add pst-d 192.0.2.1 comment words skbmark 0x7",
			"create pst-e bitmap:ip range 192.0.2.0/24", "add pst-e 192.0.2.7",
		} {
			if out, err := exec.Command("ipset", strings.Fields(line)...).CombinedOutput(); err != nil {
				t.Fatalf("ipset %s: %v: %s", line, err, out)
			}
		}
		p := netip.MustParsePrefix
		want := []rule.Set{
			{Name: "pst-a", Type: "hash:net,port", Family: rule.IPv6,
				Entries: []rule.Entry{{Prefix: p("2001:db8::/32"), Proto: rule.TCP, Port: 80}}},
			{Name: "pst-b", Type: "bitmap:port", Family: rule.IPv4},
			{Name: "pst-c", Type: "list:set", Family: rule.IPv4},
			{Name: "pst-d", Type: rule.HashIP, Family: rule.IPv4, Entries: []rule.Entry{{Prefix: p("192.0.2.1/32")}}},
			{Name: "pst-e", Type: "bitmap:ip", Family: rule.IPv4, Entries: []rule.Entry{{Prefix: p("192.0.2.7/32")}}},
		}
		got, err := s.List("pst-")
		must(t, err)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("listed %v, want %v", got, want)
		}
	})
}

// iptables runs in the namespace of the test's thread, which a child inherits.
func iptables(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := exec.Command(program, append([]string{"-w"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", program, strings.Join(args, " "), err, out)
	}
}
