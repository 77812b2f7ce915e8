package nodenet_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nodenet"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/rule"
)

func nodeOf(name string, addresses, cidrs string) *object.Node {
	n := &object.Node{Name: name, Addresses: addrs(fields(addresses)...)}
	n.PodCIDRs = nettest.Prefixes(fields(cidrs)...)
	return n
}

// told writes a plan's routes in words.
func told(p *nodenet.Plan) (routes []string) {
	for _, r := range p.Routes {
		switch {
		case !r.Via.IsValid():
			routes = append(routes, "refuse "+r.Dst.String())
		case r.Device != "":
			routes = append(routes, fmt.Sprintf("%s by %s at %s as %s", r.Dst, r.Device, r.Via, r.Source))
		default:
			routes = append(routes, fmt.Sprintf("%s by link %d at %s as %s", r.Dst, r.Link, r.Via, r.Source))
		}
	}
	return routes
}

func TestThePlanFollowsFromTheNodes(t *testing.T) {
	me := nodeOf("me", "192.0.2.1 2001:db8::1", "10.1.0.0/24 fd01::/64")
	uplinks := map[netip.Addr]nodenet.Uplink{me.Addresses[0]: {Index: 2, Name: "eth0", MTU: 1500},
		me.Addresses[1]: {Index: 3, Name: "eth1", MTU: 9000}}
	for _, tt := range []struct {
		name     string
		me       *object.Node
		others   []*object.Node
		shared   []string // addresses on link 2
		tunnel   nodenet.Tunnel
		routes   []string
		mtu      int
		findings []nodenet.Kind
	}{
		{"alone", me, nil, nil, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1500, nil},
		{"alone, always", me, nil, nil, nodenet.TunnelAlways, []string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1450, nil},
		{"on one link", me, []*object.Node{nodeOf("b", "192.0.2.2 2001:db8::2", "10.2.0.0/24 fd02::/64")},
			[]string{"192.0.2.2", "2001:db8::2"}, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24", "10.2.0.0/24 by link 2 at 192.0.2.2 as 192.0.2.1",
				"refuse fd01::/64", "fd02::/64 by link 2 at 2001:db8::2 as 2001:db8::1"}, 1500, nil},
		{"apart", me, []*object.Node{nodeOf("b", "10.9.0.2 2001:db8:9::2", "10.2.0.0/24 fd02::/64")}, nil, nodenet.TunnelAuto,
			[]string{"refuse 10.1.0.0/24", "10.2.0.0/24 by postern-vx4 at 10.2.0.1 as 10.1.0.1",
				"refuse fd01::/64", "fd02::/64 by postern-vx4 at fd02::1 as fd01::1"}, 1450, nil},
		{"apart, never", me, []*object.Node{nodeOf("b", "10.9.0.2", "10.2.0.0/24")}, nil, nodenet.TunnelNever,
			[]string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1500, nil},
		{"on one link, always", me, []*object.Node{nodeOf("b", "192.0.2.2", "10.2.0.0/24")}, []string{"192.0.2.2"}, nodenet.TunnelAlways,
			[]string{"refuse 10.1.0.0/24", "10.2.0.0/24 by postern-vx4 at 10.2.0.1 as 10.1.0.1", "refuse fd01::/64"}, 1450, nil},
		{"IPv6 pods of nodes that share an IPv4 link alone", me, []*object.Node{nodeOf("b", "192.0.2.2", "10.2.0.0/24 fd02::/64")},
			[]string{"192.0.2.2"}, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24", "10.2.0.0/24 by link 2 at 192.0.2.2 as 192.0.2.1",
				"refuse fd01::/64", "fd02::/64 by postern-vx4 at fd02::1 as fd01::1"}, 1450, nil},
		{"another node with IPv6 alone", me, []*object.Node{nodeOf("b", "2001:db8:9::2", "10.2.0.0/24")}, nil, nodenet.TunnelAuto,
			[]string{"refuse 10.1.0.0/24", "10.2.0.0/24 by postern-vx6 at 10.2.0.1 as 10.1.0.1", "refuse fd01::/64"}, 1500, nil},
		{"a node without a CIDR yet, and one without an address", me, []*object.Node{nodeOf("b", "10.9.0.2", ""), nodeOf("c", "", "10.3.0.0/24")},
			nil, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1500, []nodenet.Kind{nodenet.NoWay}},
		{"CIDRs that overlap", me, []*object.Node{nodeOf("b", "192.0.2.2", "10.1.0.128/25"), nodeOf("c", "192.0.2.3", "10.0.0.0/8")},
			[]string{"192.0.2.2", "192.0.2.3"}, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1500,
			[]nodenet.Kind{nodenet.Overlap, nodenet.Overlap}},
		{"a CIDR without room for the node's address", me, []*object.Node{nodeOf("b", "10.9.0.2", "10.2.0.0/31")}, nil, nodenet.TunnelAuto,
			[]string{"refuse 10.1.0.0/24", "refuse fd01::/64"}, 1500, []nodenet.Kind{nodenet.NoWay}},
		{"no CIDR", nodeOf("me", "192.0.2.1", ""), nil, nil, nodenet.TunnelAuto, nil, 1500, []nodenet.Kind{nodenet.NoPodCIDR}},
		{"an address that no link has", nodeOf("me", "192.0.2.77", "10.1.0.0/24"), nil, nil, nodenet.TunnelAuto, []string{"refuse 10.1.0.0/24"}, 0,
			[]nodenet.Kind{nodenet.ForeignAddress, nodenet.NoAddress}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			facts := nodenet.Facts{Uplinks: uplinks, Shared: map[netip.Addr]int{}}
			for _, a := range addrs(tt.shared...) {
				facts.Shared[a] = 2
			}
			p := nodenet.NewPlan(tt.me, tt.others, facts, nodenet.Options{Tunnel: tt.tunnel, Port: nodenet.DefaultPort, VNI: nodenet.DefaultVNI})
			if got := told(p); !slices.Equal(got, tt.routes) {
				t.Errorf("routes\n got  %q\n want %q", got, tt.routes)
			}
			if p.MTU != tt.mtu {
				t.Errorf("MTU %d, want %d", p.MTU, tt.mtu)
			}
			var kinds []nodenet.Kind
			for _, f := range p.Findings {
				kinds = append(kinds, f.Kind)
			}
			if !slices.Equal(kinds, tt.findings) {
				t.Errorf("findings %+v, want %q", p.Findings, tt.findings)
			}
		})
	}
}

func TestANodeWithoutAFamilyThatPodsMustHaveIsNotReady(t *testing.T) {
	both := []rule.Family{rule.IPv4, rule.IPv6}
	for _, tt := range []struct {
		addresses, cidrs string
		need             []rule.Family
		found            int
	}{
		{"192.0.2.1 2001:db8::1", "10.1.0.0/24 fd01::/64", both, 0},
		{"192.0.2.1", "10.1.0.0/24", nil, 0},
		{"192.0.2.1", "10.1.0.0/24", both[:1], 0},
		{"192.0.2.1", "10.1.0.0/24", both, 1},
		{"192.0.2.1", "10.1.0.0/24 fd01::/64", both, 1},
		{"192.0.2.1 2001:db8::1", "10.1.0.0/24", both, 1},
		{"192.0.2.1", "fd01::/64", both, 2},
	} {
		me := nodeOf("me", tt.addresses, tt.cidrs)
		uplinks := map[netip.Addr]nodenet.Uplink{}
		for _, a := range me.Addresses {
			uplinks[a] = nodenet.Uplink{Index: 2, Name: "eth0", MTU: 1500}
		}
		p := nodenet.NewPlan(me, nil, nodenet.Facts{Uplinks: uplinks}, nodenet.Options{Tunnel: nodenet.TunnelAuto, Families: tt.need})
		if len(p.Findings) != tt.found {
			t.Errorf("%s, %s, with %v: found %v, want %d", tt.addresses, tt.cidrs, tt.need, p.Findings, tt.found)
		}
		for _, f := range p.Findings {
			if f.Kind != nodenet.NoFamily || !f.Kind.Blocks() {
				t.Errorf("%s, %s, with %v: found %v", tt.addresses, tt.cidrs, tt.need, f)
			}
		}
	}
}

// The same nodes give the same rules, in whatever order they have come to be known; the API's lists are sorted.
func TestRulesAreForPodsThatLeaveTheCluster(t *testing.T) {
	me := nodeOf("me", "192.0.2.1", "10.1.0.0/24")
	facts := nodenet.Facts{Uplinks: map[netip.Addr]nodenet.Uplink{me.Addresses[0]: {Index: 2, MTU: 1500}},
		Shared: map[netip.Addr]int{netip.MustParseAddr("192.0.2.2"): 2}}
	others := []*object.Node{nodeOf("b", "192.0.2.2", "10.2.0.0/24"), nodeOf("c", "10.9.0.3", "10.3.0.0/24")}
	inside := func(o nodenet.Options) (list []string) {
		s := nodenet.State(nodenet.NewPlan(me, others, facts, o), rule.IPv4)
		for _, e := range s.Sets[0].Entries {
			list = append(list, e.String())
		}
		return list
	}
	for _, tt := range []struct {
		name string
		o    nodenet.Options
		want string
	}{
		{"auto", nodenet.Options{Tunnel: nodenet.TunnelAuto}, "10.1.0.0/24 10.2.0.0/24 10.3.0.0/24 192.0.2.2"},
		{"always", nodenet.Options{Tunnel: nodenet.TunnelAlways}, "10.1.0.0/24 10.2.0.0/24 10.3.0.0/24"},
		{"never", nodenet.Options{Tunnel: nodenet.TunnelNever}, "10.1.0.0/24 10.2.0.0/24 10.3.0.0/24 10.9.0.3 192.0.2.2"},
		{"all keep their address", nodenet.Options{Tunnel: nodenet.TunnelAlways, KeepSource: nettest.Prefixes("0.0.0.0/0", "::/0")},
			"0.0.0.0/1 10.1.0.0/24 10.2.0.0/24 10.3.0.0/24 128.0.0.0/1"},
	} {
		got := inside(tt.o)
		slices.Sort(got)
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: inside are %q, want %q", tt.name, got, tt.want)
		}
	}
}

// walk says whether the rules of table raw let a packet of the tunnel pass, and how many of them it met.
func walk(chains []rule.Chain, name string, src netip.Addr, mac [6]byte) (passes bool, met int) {
	at := slices.IndexFunc(chains, func(c rule.Chain) bool { return c.Name == name })
	for _, r := range chains[at].Rules {
		met++
		matches := true
		for _, m := range r.Matches {
			switch m := m.(type) {
			case rule.Source:
				matches = matches && m.Prefix.Contains(src)
			case rule.SourceMAC:
				matches = matches && m.MAC == mac
			}
		}
		if !matches {
			continue
		}
		switch a := r.Action.(type) {
		case rule.Return:
			return true, met
		case rule.Drop:
			return false, met
		case rule.Goto:
			passes, more := walk(chains, a.Chain, src, mac)
			return passes, met + more
		}
	}
	return true, met
}

func TestAnInnerSourcePassesFromItsOwnNodeAloneHoweverManyThereAre(t *testing.T) {
	me := nodeOf("me", "172.16.0.1", "10.0.0.0/24 fd00::/64")
	facts := nodenet.Facts{Uplinks: map[netip.Addr]nodenet.Uplink{me.Addresses[0]: {Index: 2, MTU: 1500}}}
	for _, n := range []int{1, 16, 17, 300, 5000} {
		seed := rand.Uint64()
		d := rand.New(rand.NewPCG(seed, 0))
		var others []*object.Node
		for _, i := range d.Perm(n) {
			i++
			others = append(others, nodeOf(fmt.Sprint("n", i), fmt.Sprintf("172.17.%d.%d", i/256, i%256),
				fmt.Sprintf("10.%d.%d.0/24 fd00:%x::/64", 1+i/256, i%256, i)))
		}
		p := nodenet.NewPlan(me, others, facts, nodenet.Options{Tunnel: nodenet.TunnelAlways, Port: 1, VNI: 1})
		for _, f := range rule.Families {
			chains := nodenet.State(p, f).Chains[rule.Raw]
			names := map[string]bool{}
			for _, c := range chains {
				if names[c.Name] || len(c.Name) > 28 {
					t.Fatalf("chain %s: twice, or too long a name", c.Name)
				}
				names[c.Name] = true
			}
			most := 0
			for i, o := range others {
				src := nodenet.Gateway(o.PodCIDRs[map[rule.Family]int{rule.IPv4: 0, rule.IPv6: 1}[f]])
				passes, met := walk(chains, nodenet.ChainOrigin, src, nodenet.MAC(o.Addresses[0]))
				if !passes {
					t.Fatalf("seed %d, %d nodes: %s does not pass from its own node", seed, n, src)
				}
				most = max(most, met)
				if other := others[(i+1)%n]; n > 1 {
					if passes, _ := walk(chains, nodenet.ChainOrigin, src, nodenet.MAC(other.Addresses[0])); passes {
						t.Fatalf("seed %d, %d nodes: %s passes from another node", seed, n, src)
					}
				}
			}
			for _, src := range addrs("10.0.0.7", "192.0.2.1", "fd00::7", "2001:db8::1", "fe80::1") {
				if passes, _ := walk(chains, nodenet.ChainOrigin, src, nodenet.MAC(others[0].Addresses[0])); passes {
					t.Errorf("%d nodes: %s, which is nobody's, passes", n, src)
				}
			}
			t.Logf("%d nodes, %s: %d chains, at most %d rules on the way", n, f, len(chains), most)
		}
		again := nodenet.NewPlan(me, slices.Clone(others), facts, nodenet.Options{Tunnel: nodenet.TunnelAlways, Port: 1, VNI: 1})
		if !reflect.DeepEqual(nodenet.State(again, rule.IPv4), nodenet.State(p, rule.IPv4)) {
			t.Error("the same nodes give other rules")
		}
	}
}
