package iptables_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// hostile are words that a text for iptables-restore could trip over.
var hostile = []string{"", "team-a/allow web 0", `a" -j ACCEPT`, "a\nCOMMIT\n*filter\n-F", `\`, `a\"`, "'", "!", "-j", "--", "#", "%s", "\x00",
	"\x7f", "\xff\xfe", "ü", strings.Repeat("x", 255), strings.Repeat("ü", 200), " ", "\t", "$(reboot)", "*raw", ":PST - [0:0]", "[1:2]"}

// dice draws by chance: the same for the same seed.
type dice struct{ *rand.Rand }

func throw(seed uint64) dice { return dice{rand.New(rand.NewPCG(seed, 0))} }

func (d dice) coin() bool { return d.IntN(2) == 0 }

func one[T any](d dice, of ...T) T { return of[d.IntN(len(of))] }

// prefix draws one of the family with length 1 or more, some of them single addresses.
func (d dice) prefix(f rule.Family) netip.Prefix {
	raw := make([]byte, map[rule.Family]int{rule.IPv4: 4, rule.IPv6: 16}[f])
	for i := range raw {
		raw[i] = byte(d.Uint32())
	}
	a, _ := netip.AddrFromSlice(raw)
	if f == rule.IPv6 && a.Is4In6() || d.coin() {
		a = map[rule.Family]netip.Addr{rule.IPv4: netip.MustParseAddr("192.0.2.1"), rule.IPv6: netip.MustParseAddr("2001:db8::1")}[f]
	}
	if d.coin() {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return netip.PrefixFrom(a, 1+d.IntN(a.BitLen())).Masked()
}

func (d dice) link() string { return one(d, "pst+", "pst0123456789ab", "eth0", "lo", "a.b-c_d@1") }

// matches draws conditions of one rule, no kind twice: first what stands for itself, then a protocol and what follows it.
func (d dice) matches(f rule.Family) (list []rule.Match) {
	sets := []rule.InSet{{Name: "pst-iface", Dirs: one(d, "src,src", "dst,dst")}, {Name: "pst-net", Dirs: one(d, "src", "dst")},
		{Name: "pst-port", Dirs: "dst,dst"}, {Name: "pst-ip", Dirs: one(d, "src", "dst")}}
	in := sets[d.IntN(len(sets))]
	in.Not = d.coin()
	for _, m := range []rule.Match{
		rule.In{Name: d.link(), Not: d.coin()},
		rule.Out{Name: d.link(), Not: d.coin()},
		rule.Source{Prefix: d.prefix(f), Not: d.coin()},
		rule.Dest{Prefix: d.prefix(f), Not: d.coin()},
		in,
		rule.CTState{States: one(d, "ESTABLISHED", "INVALID,NEW", "NEW,RELATED,UNTRACKED", "DNAT", "SNAT"), Not: d.coin()},
		rule.AddrType{DstType: "LOCAL", SrcType: one(d, "", "LOCAL")},
		rule.SourceMAC{MAC: [6]byte{byte(d.Uint32()), byte(d.Uint32()), 0xab, byte(d.Uint32()), 0, byte(d.Uint32())}},
	} {
		if d.IntN(3) == 0 {
			list = append(list, m)
		}
	}
	icmp := map[rule.Family]rule.Proto{rule.IPv4: rule.ICMP, rule.IPv6: rule.ICMPv6}[f]
	proto := one(d, rule.TCP, rule.UDP, rule.SCTP, icmp, "")
	if proto == "" {
		return list
	}
	list = append(list, rule.Protocol{Proto: proto})
	switch from := uint16(d.Uint32()); {
	case d.coin():
	case proto == icmp:
		list = append(list, rule.ICMPType{Proto: icmp, Type: uint8(d.IntN(255))})
	case proto == rule.TCP && d.coin():
		list = append(list, rule.Syn{Not: d.coin()})
	default:
		list = append(list, rule.DestPorts{Proto: proto, From: from, To: one(d, from, max(from, uint16(d.Uint32())), 65535)})
	}
	return list
}

// chains draws two chains, of which the first may lead to the second.
func (d dice) chains(f rule.Family, comment string) []rule.Chain {
	list := []rule.Chain{{Name: "PST-I-0123456789ab"}, {Name: "POSTERN-FUZZ-" + strings.Repeat("x", 15)}} // 28 characters
	for i := range list {
		actions := []rule.Action{rule.Drop{}, rule.Accept{}, rule.Return{}}
		if i == 0 {
			actions = append(actions, rule.Jump{Chain: list[1].Name}, rule.Goto{Chain: list[1].Name})
		}
		for range d.IntN(6) {
			r := rule.Rule{Matches: d.matches(f), Action: one(d, actions...)}
			if d.coin() {
				r.Comment = comment
			}
			list[i].Rules = append(list[i].Rules, r)
		}
	}
	return list
}

// program is iptables-restore of one backend and family.
type program struct {
	backend iptables.Backend
	family  rule.Family
}

func programs(t testing.TB) (list []program) {
	t.Helper()
	for _, b := range []iptables.Backend{iptables.NFT, iptables.Legacy} {
		for _, f := range rule.Families {
			if _, err := iptables.New(b, f); err != nil {
				t.Skip(err)
			}
			list = append(list, program{b, f})
		}
	}
	return list
}

// accepts sees that `iptables-restore --test` takes a text, in the calling thread's namespace.
func (p program) accepts(t *testing.T, text string) {
	t.Helper()
	name := map[rule.Family]string{rule.IPv4: "iptables-", rule.IPv6: "ip6tables-"}[p.family] + string(p.backend) + "-restore"
	cmd := exec.Command(name, "--test", "--noflush")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s --test: %v: %s\n%s", name, err, out, text)
	}
}

// lines counts the lines of a text that begin so: what a comment could smuggle in.
func lines(text, prefix string) (n int) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, prefix) {
			n++
		}
	}
	return n
}

// FuzzRules renders rules of every kind with a hostile comment: both backends must take them, and what one of them has taken
// must be read back as it was.
func FuzzRules(f *testing.F) {
	for i, comment := range hostile {
		f.Add(uint64(i), comment)
	}
	ns := nettest.NewNS(f, "rules")
	for family, inet := range map[string]string{"": "inet", "6": "inet6"} {
		for name, typ := range map[string]string{"pst-iface": "hash:net,iface", "pst-net": "hash:net", "pst-port": "hash:ip,port",
			"pst-ip": "hash:ip"} {
			ns.Run(f, "ipset", "create", name+family, typ, "family", inet)
		}
	}
	all := programs(f)
	f.Fuzz(func(t *testing.T, seed uint64, comment string) {
		ns.Do(t, func() {
			for i, p := range all {
				chains := throw(seed).chains(p.family, comment)
				if p.family == rule.IPv6 {
					forIPv6(chains)
				}
				text := iptables.Render(iptables.Change{Table: rule.Mangle, Replace: chains})
				if got, want := lines(text, "-A "), len(chains[0].Rules)+len(chains[1].Rules); got != want || lines(text, "*") != 1 {
					t.Fatalf("%d rules became %d lines:\n%s", want, got, text)
				}
				p.accepts(t, text)
				if int(seed%uint64(len(all))) == i {
					p.readsBack(t, chains, text)
				}
			}
		})
	})
}

// forIPv6 names the sets of that family.
func forIPv6(chains []rule.Chain) {
	for _, c := range chains {
		for _, r := range c.Rules {
			for i, m := range r.Matches {
				if in, ok := m.(rule.InSet); ok {
					in.Name += "6"
					r.Matches[i] = in
				}
			}
		}
	}
}

func (p program) readsBack(t *testing.T, chains []rule.Chain, text string) {
	t.Helper()
	tables, err := iptables.New(p.backend, p.family)
	if err != nil {
		t.Fatal(err)
	}
	if err := tables.Restore(context.Background(), text); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	actual, err := tables.Save(context.Background(), rule.Mangle)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chains {
		back := actual.Chains[c.Name]
		if len(back) != len(c.Rules) {
			t.Fatalf("%s: %d rules came back of %d:\n%s", c.Name, len(back), len(c.Rules), text)
		}
		for i, want := range c.Rules {
			if !iptables.Equal(back[i], want) {
				t.Errorf("%s %s:%s\n wrote %+v\n read  %+v", p.backend, c.Name, iptables.Args(want), want, back[i])
			}
		}
	}
}

// FuzzPolicies renders what policies with hostile names and values compile to.
func FuzzPolicies(f *testing.F) {
	for i, word := range hostile {
		f.Add(uint64(i), word, hostile[(i+5)%len(hostile)], hostile[(i+11)%len(hostile)])
	}
	ns := nettest.NewNS(f, "policies")
	all := programs(f)
	f.Fuzz(func(t *testing.T, seed uint64, name, value, port string) {
		c := throw(seed).cluster(name, value, port)
		var locals []policy.Local
		for _, p := range c.Pods {
			link := attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), "eth0")
			locals = append(locals, policy.Local{Pod: p, Interface: link, Addresses: p.IPs, Ready: true})
		}
		m := policy.Resolve(policy.Input{Cluster: c, Local: locals})
		ns.Do(t, func() {
			defer ipsetProgram(t, "", "destroy")
			for _, family := range rule.Families {
				state := compile.State(m, family)
				setsOf(t, state)
				text := rendered(t, state)
				for _, p := range all {
					if p.family == family {
						p.accepts(t, text)
					}
				}
			}
		})
	})
}

// setsOf makes a state's sets, for rules that name them.
func setsOf(t *testing.T, s *rule.State) {
	t.Helper()
	var text strings.Builder
	for _, set := range s.Sets {
		fmt.Fprintf(&text, "create %s %s family %s\n", set.Name, set.Type, map[rule.Family]string{rule.IPv4: "inet", rule.IPv6: "inet6"}[s.Family])
		for _, e := range set.Entries {
			fmt.Fprintf(&text, "add %s %s\n", set.Name, e)
		}
	}
	ipsetProgram(t, text.String(), "restore")
}

// ipsetProgram runs ipset in the calling thread's namespace.
func ipsetProgram(t *testing.T, stdin string, args ...string) {
	t.Helper()
	cmd := exec.Command("ipset", args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ipset %v: %v: %s\n%s", args, err, out, stdin)
	}
}

func rendered(t *testing.T, s *rule.State) string {
	t.Helper()
	var changes []iptables.Change
	rules := 0
	for _, table := range []rule.Table{rule.Raw, rule.Mangle, rule.Filter} {
		c := iptables.Change{Table: table, Replace: s.Chains[table]}
		for _, h := range s.Hooks {
			if h.Table == table {
				c.Hook = append(c.Hook, h)
			}
		}
		for _, chain := range c.Replace {
			rules += len(chain.Rules)
			if len(chain.Name) > 28 {
				t.Errorf("the name of chain %s is too long", chain.Name)
			}
		}
		changes = append(changes, c)
	}
	text := iptables.Render(changes...)
	if got := lines(text, "-A ") + lines(text, "-I "); got != rules+len(s.Hooks) {
		t.Fatalf("%d rules became %d lines:\n%s", rules+len(s.Hooks), got, text)
	}
	return text
}

// cluster draws pods and policies with these words in every place where the API, or a manifest, may have words.
func (d dice) cluster(name, value, port string) object.Cluster {
	c := object.Cluster{Namespaces: []*object.Namespace{{Name: "a", Labels: map[string]string{"x": value}}}}
	for i := range 1 + d.IntN(3) {
		c.Pods = append(c.Pods, &object.Pod{
			Namespace: "a", Name: fmt.Sprint(name, i), UID: one(d, "", fmt.Sprint(value, i)),
			Labels: object.LabelsOf(map[string]string{"app": value}),
			IPs:    []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.0.0.%d", i+1)), netip.MustParseAddr(fmt.Sprintf("fd00::%d", i+1))},
			Ports: []object.Port{{Name: port, Protocol: one(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP),
				Number: uint16(1 + d.IntN(65535))}},
		})
	}
	for i := range d.IntN(4) {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprint(name, i)}}
		if d.coin() {
			np.Spec.PodSelector.MatchLabels = map[string]string{"app": value}
		}
		for range d.IntN(3) {
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: d.peers(value), Ports: d.ports(port)})
		}
		for range d.IntN(3) {
			np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: d.peers(value), Ports: d.ports(port)})
		}
		c.Policies = append(c.Policies, np)
	}
	return c
}

func (d dice) peers(value string) (list []networkingv1.NetworkPolicyPeer) {
	for range d.IntN(4) {
		selector := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: one(d, "app", "x", value),
			Operator: one(d, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists), Values: []string{value}}}}
		if selector.MatchExpressions[0].Operator == metav1.LabelSelectorOpExists {
			selector.MatchExpressions[0].Values = nil
		}
		whole := d.prefix(one(d, rule.Families[:]...))
		if d.IntN(4) == 0 {
			whole = netip.PrefixFrom(whole.Addr(), 0).Masked()
		}
		block := &networkingv1.IPBlock{CIDR: whole.String()}
		if inner := netip.PrefixFrom(whole.Addr(), min(whole.Bits()+d.IntN(8), whole.Addr().BitLen())); d.coin() {
			block.Except = []string{inner.Masked().String()}
		}
		list = append(list, one(d, networkingv1.NetworkPolicyPeer{PodSelector: selector}, networkingv1.NetworkPolicyPeer{NamespaceSelector: selector},
			networkingv1.NetworkPolicyPeer{PodSelector: selector, NamespaceSelector: &metav1.LabelSelector{}},
			networkingv1.NetworkPolicyPeer{IPBlock: block}))
	}
	return list
}

func (d dice) ports(name string) (list []networkingv1.NetworkPolicyPort) {
	for range d.IntN(4) {
		protocol := one(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
		from := int32(1 + d.IntN(65535))
		to := min(from+int32(d.IntN(1000)), 65535)
		number, named := intstr.FromInt32(from), intstr.FromString(name)
		list = append(list, one(d, networkingv1.NetworkPolicyPort{}, networkingv1.NetworkPolicyPort{Protocol: &protocol},
			networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &number}, networkingv1.NetworkPolicyPort{Port: &number, EndPort: &to},
			networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &named}))
	}
	return slices.Clip(list)
}
