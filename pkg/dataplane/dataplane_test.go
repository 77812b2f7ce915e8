package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// state is a small wanted one: a chain that looks peers up, hooked into FORWARD, and a ready set.
func state(f rule.Family, peers ...rule.Entry) *rule.State {
	return &rule.State{
		Family: f,
		Sets: []rule.Set{
			{Name: peerSet(f), Type: rule.HashIP, Family: f, Role: rule.Peers, Entries: peers},
			{Name: rule.ReadySet(f), Type: rule.HashNetIface, Family: f, Role: rule.Ready},
		},
		Chains: map[rule.Table][]rule.Chain{rule.Mangle: {
			{Name: "POSTERN-FORWARD", Rules: []rule.Rule{{Action: rule.Jump{Chain: "PST-I-a"}}}},
			{Name: "PST-I-a", Rules: []rule.Rule{
				{Matches: []rule.Match{rule.InSet{Name: peerSet(f), Dirs: "src"}}, Action: rule.Return{}},
				{Action: rule.Drop{}}}},
		}},
		Hooks: []rule.Hook{{Table: rule.Mangle, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: "POSTERN-FORWARD"}}}},
	}
}

func peerSet(f rule.Family) string { return fmt.Sprintf("pst-p%d-test", f) }

func address(f rule.Family, n int) rule.Entry {
	a := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
	if f == rule.IPv6 {
		a = netip.AddrFrom16([16]byte{0: 0xfd, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	return rule.Entry{Prefix: netip.PrefixFrom(a, a.BitLen())}
}

// inNode runs a test in a namespace of its own, with a plane that wants the small state.
func inNode(t *testing.T, backend string, test func(t *testing.T, p *Plane, ns *nettest.NS)) {
	ns := nettest.NewNS(t, "node")
	ns.Do(t, func() {
		p, err := Open(iptables.Backend(backend), Policies)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		for _, f := range rule.Families {
			p.Want(state(f, address(f, 1)))
		}
		test(t, p, ns)
	})
}

func apply(t *testing.T, p *Plane) Result {
	t.Helper()
	result, err := p.Apply(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func members(t *testing.T, name string) []rule.Entry {
	t.Helper()
	sets, err := ipset.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sets.Close()
	list, err := sets.List(name)
	if err != nil || len(list) != 1 {
		t.Fatalf("sets %s: %v, %v", name, list, err)
	}
	return list[0].Entries
}

func TestASecondApplyAndARestartWriteNothing(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, _ *nettest.NS) {
			if r := apply(t, p); r.Restores != 2 || !r.Tightened {
				t.Errorf("the first: %+v, want a restore for each family", r)
			}
			if r := apply(t, p); r.Wrote() {
				t.Errorf("the second: %+v", r)
			}
			again, err := Open(iptables.Backend(backend), Policies)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			for _, f := range rule.Families {
				again.Want(state(f, address(f, 1)))
			}
			if r := apply(t, again); r.Wrote() {
				t.Errorf("another plane that wants the same: %+v", r)
			}
		})
	})
}

func TestAMemberThatJoinsIsOneMessageAndNoRestore(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, _ *nettest.NS) {
			apply(t, p)
			join := rule.NewPatch(rule.IPv4)
			join.Join[peerSet(rule.IPv4)] = []rule.Entry{address(rule.IPv4, 2)}
			p.Change(join)
			if r := apply(t, p); !reflect.DeepEqual(r, Result{SetMessages: 1}) {
				t.Errorf("joined with %+v", r)
			}
			leave := rule.NewPatch(rule.IPv4)
			leave.Leave[peerSet(rule.IPv4)] = []rule.Entry{address(rule.IPv4, 1), address(rule.IPv4, 3)}
			p.Change(leave)
			if r := apply(t, p); !reflect.DeepEqual(r, Result{SetMessages: 1, Tightened: true}) {
				t.Errorf("left with %+v", r)
			}
			if got := members(t, peerSet(rule.IPv4)); !slices.Equal(got, []rule.Entry{address(rule.IPv4, 2)}) {
				t.Errorf("members %v", got)
			}
		})
	})
}

// The kernel never grows a set beyond the number of entries it was made for.
func TestASetGrowsPastItsRoom(t *testing.T) {
	inNode(t, "nft", func(t *testing.T, p *Plane, _ *nettest.NS) {
		apply(t, p)
		const many = 2 * ipset.MinRoom
		join := rule.NewPatch(rule.IPv4)
		for n := range many {
			join.Join[peerSet(rule.IPv4)] = append(join.Join[peerSet(rule.IPv4)], address(rule.IPv4, 2+n))
		}
		p.Change(join)
		apply(t, p)
		if got := len(members(t, peerSet(rule.IPv4))); got != many+1 {
			t.Errorf("%d members, want %d", got, many+1)
		}
		if r := apply(t, p); r.Wrote() {
			t.Errorf("grown, and still to do: %+v", r)
		}
		p.Reread()
		if r := apply(t, p); r.Wrote() {
			t.Errorf("read again, and the kernel is not as it was thought to be: %+v", r)
		}
	})
}

func TestAChainThatIsRefusedIsClosedAndStopsNoOther(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, ns *nettest.NS) {
			apply(t, p)
			bad := rule.NewPatch(rule.IPv4)
			impossible := rule.In{Name: "a-name-that-is-longer-than-any"}
			bad.SetChain(rule.Mangle, "PST-I-a", []rule.Rule{{Matches: []rule.Match{impossible}, Action: rule.Return{}}})
			bad.SetChain(rule.Mangle, "PST-I-b", []rule.Rule{{Action: rule.Return{}, Comment: "good"}})
			p.Change(bad)
			if r := apply(t, p); len(r.Refused) != 1 || !strings.Contains(r.Refused[0].Error(), "PST-I-a") {
				t.Fatalf("refused: %v, want an error that names the chain", r.Refused)
			}
			rules := ns.Run(t, "iptables-"+backend+"-save", "-t", "mangle")
			if !strings.Contains(rules, "refused") || !strings.Contains(rules, "good") || strings.Contains(rules, "-A PST-I-a -m set") {
				t.Errorf("the refused chain is not closed, or the other is not there:\n%s", rules)
			}
			if r := apply(t, p); len(r.Refused) != 1 {
				t.Error("the second try does not say that it was refused again")
			}
			p.Want(state(rule.IPv4))
			if r := apply(t, p); len(r.Refused) > 0 || !r.Wrote() {
				t.Errorf("mended, and %+v", r)
			}
		})
	})
}

func TestAHeldLockIsAnErrorAndTheNextApplyGoesOn(t *testing.T) {
	inNode(t, "legacy", func(t *testing.T, p *Plane, _ *nettest.NS) {
		lockFile := os.Getenv("XTABLES_LOCKFILE")
		if lockFile == "" {
			lockFile = "/run/xtables.lock"
		}
		lock, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		nettest.Eventually(t, 30*time.Second, "the lock of the tables", func() error {
			return unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) // a test beside this one may hold it
		})
		for _, f := range p.family {
			f.tables.Wait = time.Second
		}
		if _, err := p.Apply(context.Background(), nil); !errors.Is(err, iptables.ErrLocked) {
			t.Errorf("with the lock held: %v", err)
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
			t.Fatal(err)
		}
		apply(t, p)
	})
}

func TestWhatOthersDidIsFoundAndPutRight(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, ns *nettest.NS) {
			tables := "iptables-" + backend
			for _, tt := range []struct {
				name, found string
				command     []string
			}{
				{"a flushed chain", "chain PST-I-a of table mangle has other rules", []string{tables, "-t", "mangle", "-F", "PST-I-a"}},
				{"a rule more", "chain PST-I-a of table mangle has other rules",
					[]string{tables, "-t", "mangle", "-I", "PST-I-a", "-s", "192.0.2.1", "-j", "ACCEPT"}},
				{"no hook", "lead into our chains of table mangle", []string{tables, "-t", "mangle", "-F", "FORWARD"}},
				{"somebody before the hook", "lead into our chains of table mangle",
					[]string{tables, "-t", "mangle", "-I", "FORWARD", "-j", "ACCEPT"}},
				{"a chain with a name of ours", "chain PST-X of table raw is not one", []string{tables, "-t", "raw", "-N", "PST-X"}},
				{"a set with a name of ours", "set pst-x is not one", []string{"ipset", "create", "pst-x", "hash:ip"}},
				{"a member less", "lacks 1 entries and has 0 foreign", []string{"ipset", "flush", peerSet(rule.IPv4)}},
				{"a member more", "lacks 0 entries and has 1 foreign", []string{"ipset", "add", peerSet(rule.IPv4), "192.0.2.1"}},
			} {
				apply(t, p)
				ns.Run(t, tt.command[0], tt.command[1:]...)
				found, err := p.Refresh(context.Background())
				if err != nil || len(found) != 1 || !strings.Contains(found[0].What, tt.found) {
					t.Errorf("%s: found %v, %v", tt.name, found, err)
				}
				if again, err := p.Refresh(context.Background()); err != nil || len(again) > 0 {
					t.Errorf("%s: found twice: %v, %v", tt.name, again, err)
				}
				if r := apply(t, p); !r.Wrote() {
					t.Errorf("%s: nothing was repaired", tt.name)
				}
				if rest, err := p.Refresh(context.Background()); err != nil || len(rest) > 0 {
					t.Errorf("%s: not put right: %v, %v", tt.name, rest, err)
				}
				p.Reread()
				if r := apply(t, p); r.Wrote() {
					t.Errorf("%s: after the repair the kernel still differs: %+v", tt.name, r)
				}
			}
		})
	})
}

func TestTheFamiliesAreIndependentAndAFailureIsTriedAgain(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, ns *nettest.NS) {
			restores := 0
			p.Fail = func(step string) error {
				if step == "restore" {
					if restores++; restores == 1 {
						return errors.New("broken on purpose")
					}
				}
				return nil
			}
			if _, err := p.Apply(context.Background(), nil); err == nil || !strings.HasPrefix(err.Error(), "IPv4: ") {
				t.Fatalf("%v, want an error of IPv4 alone", err)
			}
			if rules := ns.Run(t, "ip6tables-"+backend+"-save", "-t", "mangle"); !strings.Contains(rules, "-A PST-I-a") {
				t.Errorf("IPv6 waits for IPv4:\n%s", rules)
			}
			apply(t, p)
			if rules := ns.Run(t, "iptables-"+backend+"-save", "-t", "mangle"); !strings.Contains(rules, "-A PST-I-a") {
				t.Errorf("IPv4 was not tried again:\n%s", rules)
			}
		})
	})
}

// Where nobody is ready yet, peers are filled in while the rules are written.
func TestNobodyBecomesReadyWithoutPeers(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, _ *nettest.NS) {
			pod := address(rule.IPv4, 2)
			pod.Iface = "pod"
			want := func(peers ...rule.Entry) *rule.State {
				s := state(rule.IPv4, peers...)
				s.Sets[1].Entries = []rule.Entry{pod}
				return s
			}
			p.Want(want(address(rule.IPv6, 1))) // which the kernel does not take
			if _, err := p.Apply(context.Background(), nil); err == nil || !strings.HasPrefix(err.Error(), "IPv4: ") {
				t.Fatalf("%v, want an error of IPv4 alone", err)
			}
			if ready := members(t, rule.ReadySet(rule.IPv4)); len(ready) > 0 {
				t.Errorf("%v are ready without their peers", ready)
			}
			p.Want(want(address(rule.IPv4, 1)))
			apply(t, p)
			peers, ready := members(t, peerSet(rule.IPv4)), members(t, rule.ReadySet(rule.IPv4))
			if len(peers) != 1 || len(ready) != 1 {
				t.Errorf("tried again, peers are %v and ready are %v, want one each", peers, ready)
			}
			if r := apply(t, p); r.Wrote() {
				t.Errorf("once more: %+v", r)
			}
		})
	})
}

func TestCleanupLeavesNothingOfOursAndEverythingOfOthers(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		inNode(t, backend, func(t *testing.T, p *Plane, ns *nettest.NS) {
			tables := "iptables-" + backend
			ns.Run(t, tables, "-t", "mangle", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT")
			ns.Run(t, tables, "-t", "nat", "-N", "OTHERS")
			ns.Run(t, "ipset", "create", "others", "hash:ip")
			kernel := func() string {
				var out strings.Builder
				for _, table := range []string{"raw", "mangle", "filter", "nat"} {
					for line := range strings.Lines(ns.Run(t, tables+"-save", "-t", table)) {
						if !strings.HasPrefix(line, "#") {
							out.WriteString(strings.Split(line, " [")[0] + "\n")
						}
					}
				}
				return out.String() + ns.Run(t, "ipset", "list", "-n")
			}
			before := kernel()
			apply(t, p)
			if kernel() == before {
				t.Fatal("nothing was written")
			}
			for range 2 {
				if err := Cleanup(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
			if after := kernel(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	})
}

// On nft a commit that removes something takes many times as long as one that only adds.
func TestRulesThatLackAtTheEndOfAChainAreAdded(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		ns := nettest.NewNS(t, "node")
		ns.Do(t, func() {
			tables, err := iptables.New(iptables.Backend(backend), rule.IPv4)
			if err != nil {
				t.Fatal(err)
			}
			chain := func(sources ...string) string {
				t.Helper()
				c := rule.Chain{Name: "POSTERN-HOSTPORT"}
				for _, source := range sources {
					c.Rules = append(c.Rules, rule.Rule{Matches: []rule.Match{rule.Source{Prefix: netip.MustParsePrefix(source)}},
						Action: rule.Return{}})
				}
				err := WriteRules(t.Context(), tables, HostPorts, &rule.State{Family: rule.IPv4,
					Chains: map[rule.Table][]rule.Chain{rule.NAT: {c}},
					Hooks: []rule.Hook{{Table: rule.NAT, Chain: "PREROUTING",
						Rule: rule.Rule{Action: rule.Jump{Chain: "POSTERN-HOSTPORT"}}}}})
				if err != nil {
					t.Fatal(err)
				}
				var found []string
				for line := range strings.Lines(ns.Run(t, "iptables-"+backend+"-save", "-c", "-t", "nat")) {
					if counters, text, is := strings.Cut(line, " -A POSTERN-HOSTPORT -s "); is {
						found = append(found, counters+" "+strings.Fields(text)[0])
					}
				}
				return strings.Join(found, ", ")
			}
			chain("10.0.0.1/32")
			ns.Run(t, "iptables-"+backend, "-t", "nat", "-R", "POSTERN-HOSTPORT", "1", "-s", "10.0.0.1/32", "-j", "RETURN",
				"-c", "7", "700")
			for _, step := range []struct {
				sources []string
				want    string
			}{
				{[]string{"10.0.0.1/32", "10.0.0.2/32"}, "[7:700] 10.0.0.1/32, [0:0] 10.0.0.2/32"}, // what was there is untouched
				{[]string{"10.0.0.1/32", "10.0.0.3/32"}, "[0:0] 10.0.0.1/32, [0:0] 10.0.0.3/32"},
				{[]string{"10.0.0.3/32"}, "[0:0] 10.0.0.3/32"},
				{[]string{"10.0.0.4/32", "10.0.0.3/32"}, "[0:0] 10.0.0.4/32, [0:0] 10.0.0.3/32"},
				{nil, ""},
				{[]string{"10.0.0.5/32"}, "[0:0] 10.0.0.5/32"},
			} {
				if got := chain(step.sources...); got != step.want {
					t.Errorf("%v: the chain has %s, want %s", step.sources, got, step.want)
				}
			}
		})
	})
}

// An older layout has another type of set under a name that is wanted, in use.
func TestALayoutIsUpgradedWhereverItWasInterrupted(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for interruption := 0; ; interruption++ {
			finished := false
			inNode(t, backend, func(t *testing.T, p *Plane, ns *nettest.NS) {
				for _, f := range rule.Families {
					old := state(f, address(f, 1))
					old.Sets[0].Type = rule.HashNet
					old.Sets[1].Type = rule.HashIP
					p.Want(old)
				}
				apply(t, p)
				steps := 0
				for _, f := range rule.Families {
					p.Want(state(f, address(f, 1), address(f, 2)))
				}
				p.Fail = func(step string) error {
					if steps++; steps > interruption+1 {
						return errors.New("killed")
					}
					return nil
				}
				_, err := p.Apply(context.Background(), nil)
				finished = err == nil
				again, err := Open(iptables.Backend(backend), Policies)
				if err != nil {
					t.Fatal(err)
				}
				defer again.Close()
				for _, f := range rule.Families {
					again.Want(state(f, address(f, 1), address(f, 2)))
				}
				apply(t, again)
				for _, f := range rule.Families {
					if got := members(t, peerSet(f)); len(got) != 2 {
						t.Errorf("interrupted at step %d: members %v", interruption, got)
					}
				}
				if sets := ns.Run(t, "ipset", "list", "-n"); strings.Contains(sets, "instead") {
					t.Errorf("interrupted at step %d: left over: %s", interruption, sets)
				}
				again.Reread()
				if r := apply(t, again); r.Wrote() {
					t.Errorf("interrupted at step %d: the kernel is not as it was thought to be: %+v", interruption, r)
				}
			})
			if finished || t.Failed() {
				t.Logf("interrupted at each of %d steps", interruption)
				return
			}
		}
	})
}
