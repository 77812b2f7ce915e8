package verify

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// Packet is a packet on its way through the node, after any translation of its addresses.
type Packet struct {
	From     netip.Addr `json:"from"`
	To       netip.Addr `json:"to"`
	Protocol rule.Proto `json:"protocol"`
	Port     uint16     `json:"port,omitempty"` // destination's, for TCP, UDP and SCTP
	// State is conntrack's: NEW, ESTABLISHED or RELATED. Only the first packets of flows are judged by policies.
	State string `json:"state"`
	// Middle is true for TCP that asks for no connection.
	Middle bool `json:"middle,omitempty"`
	// Via is the link of a forged packet: one that does not lead to its source.
	Via string `json:"via,omitempty"`
}

// States of conntrack that packets have.
const (
	stateNew         = "NEW"
	stateEstablished = "ESTABLISHED"
	stateRelated     = "RELATED"
)

func (p Packet) String() string {
	s := fmt.Sprintf("%s %s -> %s, %s", p.Protocol, p.From, netip.AddrPortFrom(p.To, p.Port), p.State)
	if p.Middle {
		s += ", no SYN"
	}
	if p.Via != "" {
		s += ", over " + p.Via
	}
	return s
}

// first reports whether policies judge the packet, if an end of it is a pod that is ready.
func (p Packet) first() bool {
	return p.Via == "" && !p.Middle && p.State != stateEstablished && !(p.State == stateRelated && p.icmp())
}

func (p Packet) icmp() bool { return p.Protocol == rule.ICMP || p.Protocol == rule.ICMPv6 }

func (p Packet) syn() bool { return p.Protocol == rule.TCP && !p.Middle && p.State != stateEstablished }

// named is the protocol in the API's words; "" for one that policies cannot name.
func (p Packet) named() corev1.Protocol {
	if p.icmp() {
		return ""
	}
	return corev1.Protocol(strings.ToUpper(string(p.Protocol)))
}

// uplink is the node's link to everything but its own pods.
const uplink = "eth0"

// linkOf is the link that leads to an address.
func (w *World) linkOf(a netip.Addr) string {
	i := slices.IndexFunc(w.Local, func(l policy.Local) bool { return slices.Contains(l.Addresses, a) })
	if i < 0 {
		return uplink
	}
	return w.Local[i].Interface
}

// in is the link that a packet comes in on.
func (w *World) in(p Packet) string {
	if p.Via != "" {
		return p.Via
	}
	return w.linkOf(p.From)
}

// packet draws a packet with a pod of this node that is ready at one end at least; the first one of a flow, mostly.
func (w *World) packet(d dice) Packet {
	p := w.firstPacket(d)
	switch d.IntN(24) {
	case 0, 1:
		p.State = stateEstablished
	case 2, 3:
		p.State = stateRelated
	case 4:
		p.Middle = p.Protocol == rule.TCP
	case 5:
		w.forge(d, &p)
	}
	return p
}

func (w *World) firstPacket(d dice) Packet {
	p := Packet{From: one(d, w.ready()...), State: stateNew}
	to := w.addresses
	switch d.IntN(10) {
	case 0:
		to = []netip.Addr{p.From}
	case 1, 2, 3:
		to = w.ready()
	}
	if p.To = one(d, to...); rule.FamilyOf(p.To) != rule.FamilyOf(p.From) {
		p.To = one(d, slices.DeleteFunc(slices.Clone(w.addresses), func(a netip.Addr) bool { return a.Is4() != p.From.Is4() })...)
	}
	if d.chance(2) {
		p.From, p.To = p.To, p.From
	}
	if p.Protocol = one(d, rule.TCP, rule.TCP, rule.TCP, rule.UDP, rule.UDP, rule.SCTP, rule.ICMP); p.Protocol == rule.ICMP {
		if p.From.Is6() {
			p.Protocol = rule.ICMPv6
		}
		return p
	}
	p.Port = one(d, numbers...)
	switch d.IntN(4) {
	case 0:
		p.Port = beside(d, p.Port)
	case 1, 2:
		w.aim(d, &p)
	}
	return p
}

// beside draws a port on either side of a number: of the end of a range, say.
func beside(d dice, port uint16) uint16 { return port + one[uint16](d, 1, 65535) }

// aim gives the packet a port that some policy names, or one beside it.
func (w *World) aim(d dice, p *Packet) {
	var all []networkingv1.NetworkPolicyPort
	for _, np := range w.Cluster.Policies {
		for _, r := range np.Spec.Ingress {
			all = append(all, r.Ports...)
		}
		for _, r := range np.Spec.Egress {
			all = append(all, r.Ports...)
		}
	}
	if len(all) == 0 {
		return
	}
	at := one(d, all...)
	if p.Protocol = rule.TCP; at.Protocol != nil && *at.Protocol != "ICMP" {
		p.Protocol = rule.Proto(strings.ToLower(string(*at.Protocol)))
	}
	switch {
	case at.Port == nil:
	case at.Port.Type == intstr.String:
		w.aimAtName(d, p, at.Port.StrVal)
	case at.EndPort != nil && !d.chance(3):
		p.Port = uint16(*at.EndPort)
		if d.chance(2) {
			p.Port++
		}
	default:
		if p.Port = uint16(at.Port.IntVal); d.chance(4) {
			p.Port = beside(d, p.Port)
		}
	}
}

// aimAtName gives the packet the number that a pod has under a name: the destination, mostly.
func (w *World) aimAtName(d dice, p *Packet, name string) {
	var own, all []object.Port
	for _, pod := range w.Cluster.Pods {
		for _, port := range pod.Ports {
			if port.Name != name {
				continue
			}
			if all = append(all, port); slices.Contains(pod.IPs, p.To) {
				own = append(own, port)
			}
		}
	}
	if len(own) > 0 && !d.chance(4) {
		all = own
	}
	if len(all) > 0 {
		p.Port = one(d, all...).Number
	}
}

// forge lets the packet come in on a link that does not lead to its source: of another pod, or, with a local pod's address,
// from outside.
func (w *World) forge(d dice, p *Packet) {
	links := []string{uplink}
	for _, l := range w.Local {
		links = append(links, l.Interface)
	}
	own := w.linkOf(p.From)
	links = slices.DeleteFunc(links, func(l string) bool { return l == own })
	p.Via = one(d, links...)
}

// ready lists the addresses of the pods whose guard stands.
func (w *World) ready() []netip.Addr {
	var list []netip.Addr
	for _, l := range w.Local {
		if l.Ready {
			list = append(list, l.Addresses...)
		}
	}
	return list
}
