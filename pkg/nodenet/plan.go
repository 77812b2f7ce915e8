package nodenet

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/rule"
)

// Tunnel says when pods' packets go to other nodes through VXLAN.
type Tunnel string

const (
	// TunnelAuto takes the tunnel to nodes that share no link with this one.
	TunnelAuto Tunnel = "auto"
	// TunnelAlways takes it to every node: clouds often drop pod addresses even within a subnet.
	TunnelAlways Tunnel = "always"
	// TunnelNever leaves nodes that share no link to the routers in between.
	TunnelNever Tunnel = "never"
)

// Defaults of the tunnel.
const (
	DefaultPort = 8472
	// DefaultVNI is "pst"; other software takes small numbers.
	DefaultVNI = 0x707374
)

// Options are an administrator's wishes, the same on every node.
type Options struct {
	Tunnel Tunnel
	Port   uint16 // of the tunnel, UDP
	VNI    int    // of the tunnel, 1 to 1<<24-1
	// KeepSource are destinations outside of the cluster that see pods' own addresses.
	KeepSource []netip.Prefix
	// Families are those that pods must have; none: what the node's pod CIDRs give.
	Families []rule.Family
}

// Facts are what a plan has to know of this node's kernel.
type Facts struct {
	// Uplinks are the links that hold addresses of this node, by address.
	Uplinks map[netip.Addr]Uplink
	// Shared are the addresses of other nodes that are on a link of this node, with that link's index.
	Shared map[netip.Addr]int
}

// Uplink is a link that holds an address of this node.
type Uplink struct {
	Index int
	Name  string
	MTU   int
}

// Plan is what this node should be like.
type Plan struct {
	Node *object.Node
	// Addresses are this node's own, at most one of each family: those by which others reach it and its links hold.
	Addresses []netip.Addr
	// MTU is for pods' links.
	MTU     int
	Devices []Device
	Routes  []Route // sorted by destination
	// Members are the addresses of all other nodes: whom the tunnel listens to.
	Members []netip.Addr
	// Origins says which Ethernet source a packet from the tunnel has, by where its inner source belongs.
	Origins []Origin // sorted by address
	// Inside are the destinations that see pods' own addresses; sorted, no two alike.
	Inside []netip.Prefix
	// Findings are what is wrong with the nodes as the API has them.
	Findings []Finding
	options  Options
}

// Device is a VXLAN device.
type Device struct {
	Name  string
	Local netip.Addr // outer source
	MTU   int
	// Addresses are what the node itself sends from: of its pod CIDRs.
	Addresses []netip.Addr
	Peers     []Peer
	Port      uint16
	VNI       int
}

// Peer is another node behind a device.
type Peer struct {
	Address  netip.Addr // outer destination
	Gateways []netip.Addr
}

// Route is one of ours. The zero Via is a route that refuses.
type Route struct {
	Dst    netip.Prefix
	Via    netip.Addr
	Source netip.Addr
	Link   int    // index of the link; zero: Device says which
	Device string // name of a [Device]
}

// Origin binds a pod CIDR to the node that packets from it come from.
type Origin struct {
	Prefix netip.Prefix
	MAC    [6]byte
}

// DevicePrefix begins the names of our devices. It is none of those of pods' links.
const DevicePrefix = "postern-vx"

func deviceName(f rule.Family) string { return fmt.Sprintf("%s%d", DevicePrefix, f) }

// overhead is what VXLAN takes of an MTU: inner Ethernet 14, VXLAN 8, UDP 8, and the outer IP header.
func overhead(f rule.Family) int {
	if f == rule.IPv4 {
		return 50
	}
	return 70
}

// MAC is the Ethernet address of the device of the node with an outer address: locally administered (IEEE 802, section 8.2.2).
// Nodes need not tell each other.
func MAC(outer netip.Addr) (mac [6]byte) {
	sum := sha256.Sum256([]byte("postern " + outer.String()))
	copy(mac[:], sum[:])
	mac[0] = mac[0]&^1 | 2
	return mac
}

// Gateway is the address of a pod CIDR that is the node's own; invalid where there is no room for one.
func Gateway(cidr netip.Prefix) netip.Addr {
	if cidr.Addr().BitLen()-cidr.Bits() < 2 {
		return netip.Addr{}
	}
	return cidr.Masked().Addr().Next()
}

// planner is a plan in the making.
type planner struct {
	Plan
	facts   Facts
	devices map[rule.Family]*Device
	// claimed are the pod CIDRs that somebody has, with the name of the node, by length: mostly all have one.
	claimed map[int]map[netip.Prefix]string
}

// claim gives a pod CIDR to a node, or returns the CIDR that it overlaps, and whose that is.
func (p *planner) claim(cidr netip.Prefix, node string) (taken netip.Prefix, by string) {
	for length, list := range p.claimed {
		if length <= cidr.Bits() {
			if cover, err := cidr.Addr().Prefix(length); err == nil && list[cover] != "" {
				return cover, list[cover]
			}
			continue
		}
		for other, by := range list {
			if cidr.Overlaps(other) {
				return other, by
			}
		}
	}
	if p.claimed[cidr.Bits()] == nil {
		p.claimed[cidr.Bits()] = map[netip.Prefix]string{}
	}
	p.claimed[cidr.Bits()][cidr] = node
	return netip.Prefix{}, ""
}

// NewPlan works out what a node should be like. others are sorted by name.
func NewPlan(node *object.Node, others []*object.Node, facts Facts, o Options) *Plan {
	p := &planner{Plan: Plan{Node: node, options: o}, facts: facts, devices: map[rule.Family]*Device{},
		claimed: map[int]map[netip.Prefix]string{}}
	p.self()
	for _, n := range others {
		p.other(n)
	}
	p.finish()
	return &p.Plan
}

func (p *planner) find(kind Kind, format string, args ...any) {
	p.Findings = append(p.Findings, Finding{Kind: kind, What: fmt.Sprintf(format, args...)})
}

// self takes in this node.
func (p *planner) self() {
	for _, f := range rule.Families {
		if a := addressOf(p.Node, f); p.facts.Uplinks[a] != (Uplink{}) {
			p.Addresses = append(p.Addresses, a)
		} else if a.IsValid() {
			p.find(ForeignAddress, "no link of this machine holds %s, which node %s has as its InternalIP: give kubelet the right "+
				"--node-ip", a, p.Node.Name)
		}
	}
	if len(p.Addresses) == 0 {
		p.find(NoAddress, "node %s has no InternalIP that a link of this machine holds: give kubelet --node-ip", p.Node.Name)
	}
	if len(p.Node.PodCIDRs) == 0 {
		p.find(NoPodCIDR, "node %s has no podCIDR, so there are no addresses for its pods: give `kubeadm init` a --pod-network-cidr, "+
			"or kube-controller-manager --allocate-node-cidrs and --cluster-cidr", p.Node.Name)
	}
	for _, f := range p.options.Families {
		if !p.hasPods(f) || !p.own(f).IsValid() {
			p.find(NoFamily, "node %s lacks %s, which its pods must have by --families: it needs a podCIDR of that family (`kubeadm init "+
				"--pod-network-cidr` takes one of each, with a comma between) and an InternalIP of it (kubelet's --node-ip, likewise)",
				p.Node.Name, f)
		}
	}
	for _, cidr := range p.Node.PodCIDRs {
		p.claim(cidr, p.Node.Name)
		p.Inside = append(p.Inside, cidr)
		p.Routes = append(p.Routes, Route{Dst: cidr})
	}
}

// other takes in another node.
func (p *planner) other(n *object.Node) {
	p.Members = append(p.Members, n.Addresses...)
	for _, a := range n.Addresses {
		if p.options.Tunnel == TunnelNever || p.options.Tunnel == TunnelAuto && p.facts.Shared[a] != 0 {
			p.Inside = append(p.Inside, single(a))
		}
	}
	for _, cidr := range n.PodCIDRs {
		if taken, by := p.claim(cidr, n.Name); by != "" {
			p.find(Overlap, "podCIDR %s of node %s overlaps %s of node %s and is left out: give nodes podCIDRs of their own", cidr, n.Name,
				taken, by)
			continue
		}
		p.Inside = append(p.Inside, cidr)
		p.reach(n, cidr)
	}
}

// reach finds the way to another node's pods.
func (p *planner) reach(n *object.Node, cidr netip.Prefix) {
	f := rule.FamilyOf(cidr.Addr())
	via, own := addressOf(n, f), p.own(f)
	if link := p.facts.Shared[via]; p.options.Tunnel != TunnelAlways && link != 0 && own.IsValid() {
		p.Routes = append(p.Routes, Route{Dst: cidr, Via: via, Source: own, Link: link})
		return
	}
	if p.options.Tunnel == TunnelNever {
		return
	}
	gateway, source := Gateway(cidr), p.tunnelSource(f)
	d, outer := p.device(n)
	switch {
	case d == nil:
		p.find(NoWay, "node %s has no InternalIP of a family in which this node has one too: its pods %s are not reached", n.Name, cidr)
		return
	case !gateway.IsValid() || !source.IsValid():
		p.find(NoWay, "the pods %s of node %s are not reached through the tunnel: both nodes need a podCIDR of that family with "+
			"at least four addresses", cidr, n.Name)
		return
	}
	p.Routes = append(p.Routes, Route{Dst: cidr, Via: gateway, Source: source, Device: d.Name})
	p.Origins = append(p.Origins, Origin{Prefix: cidr, MAC: MAC(outer)})
	if last := len(d.Peers) - 1; last >= 0 && d.Peers[last].Address == outer {
		d.Peers[last].Gateways = append(d.Peers[last].Gateways, gateway)
	} else {
		d.Peers = append(d.Peers, Peer{Address: outer, Gateways: []netip.Addr{gateway}})
	}
}

// device is the one that leads to a node, and the node's address by which: the first family in which both have one, on
// either node.
func (p *planner) device(n *object.Node) (*Device, netip.Addr) {
	for _, f := range rule.Families {
		own, outer := p.own(f), addressOf(n, f)
		if !own.IsValid() || !outer.IsValid() {
			continue
		}
		if p.devices[f] == nil {
			p.devices[f] = &Device{Name: deviceName(f), Local: own, MTU: p.tunnelMTU(own), Port: p.options.Port, VNI: p.options.VNI,
				Addresses: p.tunnelSources()}
		}
		return p.devices[f], outer
	}
	return nil, netip.Addr{}
}

func (p *planner) tunnelMTU(own netip.Addr) int {
	return p.facts.Uplinks[own].MTU - overhead(rule.FamilyOf(own))
}

func (p *planner) tunnelSources() (list []netip.Addr) {
	for _, cidr := range p.Node.PodCIDRs {
		if a := Gateway(cidr); a.IsValid() {
			list = append(list, a)
		}
	}
	return list
}

func (p *planner) tunnelSource(f rule.Family) netip.Addr { return first(p.tunnelSources(), f) }

// own is this node's address of a family; invalid if it has none.
func (p *planner) own(f rule.Family) netip.Addr { return first(p.Addresses, f) }

func (p *planner) finish() {
	for _, f := range rule.Families {
		if d := p.devices[f]; d != nil && len(d.Peers) > 0 {
			p.Devices = append(p.Devices, *d)
		}
	}
	p.MTU = p.podMTU()
	for _, k := range p.options.KeepSource {
		p.Inside = append(p.Inside, halves(k)...)
	}
	slices.SortFunc(p.Inside, netip.Prefix.Compare)
	p.Inside = slices.Compact(p.Inside)
	slices.SortFunc(p.Members, netip.Addr.Compare)
	p.Members = slices.DeleteFunc(slices.Compact(p.Members), func(a netip.Addr) bool { return slices.Contains(p.Node.Addresses, a) })
	slices.SortFunc(p.Routes, func(a, b Route) int { return a.Dst.Addr().Compare(b.Dst.Addr()) })
	slices.SortFunc(p.Origins, func(a, b Origin) int { return a.Prefix.Addr().Compare(b.Prefix.Addr()) })
}

// podMTU is what fits through every way that pods' packets may take; zero where nothing is known.
func (p *planner) podMTU() (mtu int) {
	least := func(n int) {
		if mtu == 0 || n < mtu {
			mtu = n
		}
	}
	for _, a := range p.Addresses {
		least(p.facts.Uplinks[a].MTU)
	}
	for _, d := range p.Devices {
		least(d.MTU)
	}
	if p.options.Tunnel == TunnelAlways && len(p.Addresses) > 0 { // also before there is another node
		least(p.tunnelMTU(p.Addresses[0]))
	}
	return mtu
}

// addressOf is a node's first address of a family; invalid if it has none.
func addressOf(n *object.Node, f rule.Family) netip.Addr { return first(n.Addresses, f) }

func first(list []netip.Addr, f rule.Family) netip.Addr {
	for _, a := range list {
		if rule.FamilyOf(a) == f {
			return a
		}
	}
	return netip.Addr{}
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// halves splits /0, which no set can hold.
func halves(p netip.Prefix) []netip.Prefix {
	if p.Bits() > 0 {
		return []netip.Prefix{p.Masked()}
	}
	upper := p.Masked().Addr().AsSlice()
	upper[0] = 0x80
	a, _ := netip.AddrFromSlice(upper)
	return []netip.Prefix{netip.PrefixFrom(p.Masked().Addr(), 1), netip.PrefixFrom(a, 1)}
}

func hardware(mac [6]byte) net.HardwareAddr { return mac[:] }
