package iptables_test

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// Every match and action, written and read back in both backends and families, must come back as it was.
func TestWhatIsWrittenIsReadBack(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for _, family := range rule.Families {
			t.Run(family.String(), func(t *testing.T) {
				ns := nettest.NewNS(t, "rules")
				set, inet := "pst-test", "inet"
				if family == rule.IPv6 {
					inet = "inet6"
				}
				ns.Run(t, "ipset", "create", set, "hash:net,iface", "family", inet)
				ns.Run(t, "ipset", "create", "pst-port", "hash:ip,port", "family", inet)
				ns.Do(t, func() {
					tables, err := iptables.New(iptables.Backend(backend), family)
					if err != nil {
						t.Fatal(err)
					}
					for table, rules := range samples(family) {
						chain := rule.Chain{Name: "POSTERN-SAMPLE", Rules: rules}
						text := iptables.Render(iptables.Change{Table: table, Replace: []rule.Chain{{Name: "POSTERN-OTHER"}, chain}})
						if err := tables.Restore(context.Background(), text); err != nil {
							t.Fatalf("%v\n%s", err, text)
						}
						got, err := tables.Save(context.Background(), table)
						if err != nil {
							t.Fatal(err)
						}
						back := got.Chains[chain.Name]
						if len(back) != len(rules) {
							t.Fatalf("%d rules came back of %d: %+v", len(back), len(rules), back)
						}
						for i, want := range rules {
							if !iptables.Equal(back[i], want) {
								t.Errorf("%s:\n wrote %+v\n read  %+v", iptables.Args(want), want, back[i])
							}
						}
					}
				})
			})
		}
	})
}

func samples(family rule.Family) map[rule.Table][]rule.Rule {
	one, net, icmp := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.0/24"), rule.ICMP
	if family == rule.IPv6 {
		one, net, icmp = netip.MustParsePrefix("2001:db8::1/128"), netip.MustParsePrefix("2001:db8::/32"), rule.ICMPv6
	}
	r := func(a rule.Action, m ...rule.Match) rule.Rule {
		return rule.Rule{Matches: m, Action: a, Comment: "team-a/allow web 0"}
	}
	tcp, udp, sctp := rule.Protocol{Proto: rule.TCP}, rule.Protocol{Proto: rule.UDP}, rule.Protocol{Proto: rule.SCTP}
	mangle := []rule.Rule{
		{Action: rule.Drop{}},
		{Action: rule.Return{}, Comment: strings.Repeat("long ", 80)},
		r(rule.Accept{}, rule.In{Name: "pst+"}, rule.Out{Name: "pst0123456789ab", Not: true}),
		r(rule.Drop{}, rule.In{Name: "pst+", Not: true}, rule.Out{Name: "pst+"}),
		r(rule.Goto{Chain: "POSTERN-OTHER"}, tcp, rule.DestPorts{Proto: rule.TCP, From: 80, To: 80}),
		r(rule.Jump{Chain: "POSTERN-OTHER"}, udp, rule.DestPorts{Proto: rule.UDP, From: 53, To: 54}),
		r(rule.Return{}, sctp, rule.DestPorts{Proto: rule.SCTP, From: 7, To: 7}),
		r(rule.Return{}, tcp, rule.DestPorts{Proto: rule.TCP, From: 0, To: 65534}),
		r(rule.Return{}, rule.Source{Prefix: one}, rule.Dest{Prefix: net, Not: true}),
		r(rule.Return{}, rule.Source{Prefix: net, Not: true}, rule.Dest{Prefix: one}),
		r(rule.Return{}, rule.InSet{Name: "pst-test", Dirs: "src,src"}),
		r(rule.Return{}, rule.InSet{Name: "pst-test", Dirs: "dst,dst", Not: true}),
		r(rule.Return{}, rule.InSet{Name: "pst-port", Dirs: "dst,dst"}),
		r(rule.Return{}, rule.InSet{Name: "pst-port", Dirs: "dst,dst"}, tcp, rule.DestPorts{Proto: rule.TCP, From: 1, To: 9}),
		r(rule.Return{}, rule.CTState{States: "ESTABLISHED"}),
		r(rule.Return{}, rule.CTState{States: "NEW", Not: true}, rule.Protocol{Proto: icmp}),
		r(rule.Return{}, rule.CTState{States: "ESTABLISHED,RELATED"}),
		r(rule.Drop{}, tcp, rule.Syn{Not: true}),
		r(rule.Drop{}, tcp, rule.Syn{}),
		r(rule.Drop{}, rule.AddrType{DstType: "LOCAL"}),
		r(rule.Drop{}, rule.Protocol{Proto: icmp}, rule.ICMPType{Proto: icmp, Type: 8}),
	}
	return map[rule.Table][]rule.Rule{
		rule.Mangle: mangle,
		rule.Raw: {
			r(rule.Return{}, rule.In{Name: "vx+"}, rule.Source{Prefix: net}, rule.SourceMAC{MAC: [6]byte{2, 0xab, 3, 4, 5, 0xff}}),
		},
		rule.Filter: {r(rule.Accept{}, rule.In{Name: "pst+"})},
		rule.NAT: {
			r(rule.DNAT{To: netip.AddrPortFrom(one.Addr(), 80)}, tcp, rule.DestPorts{Proto: rule.TCP, From: 9000, To: 9000}),
			r(rule.SNAT{To: one.Addr()}, rule.CTState{States: "DNAT"}),
			r(rule.Masquerade{}), r(rule.Masquerade{RandomPorts: true}),
		},
	}
}

// With legacy every packet passes through each table that is there, so none is made by a look.
func TestSaveMakesNoTable(t *testing.T) {
	ns := nettest.NewNS(t, "tables")
	ns.Do(t, func() {
		for _, f := range rule.Families {
			tables, err := iptables.New(iptables.Legacy, f)
			if err != nil {
				t.Fatal(err)
			}
			if a, err := tables.Save(t.Context(), rule.Raw); err != nil || len(a.Chains)+len(a.Hooks) > 0 {
				t.Errorf("%s: of a table that is not there: %v, error %v; want nothing", f, a, err)
			}
		}
		for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
			if names, err := os.ReadFile("/proc/thread-self/net/" + file); err != nil || len(names) > 0 {
				t.Errorf("%s has %q, error %v; want nothing", file, names, err)
			}
		}
	})
}
