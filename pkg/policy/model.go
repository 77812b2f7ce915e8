package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/object"
)

// Input is all that the meaning of policies depends on.
type Input struct {
	Cluster object.Cluster
	// Local are the pod interfaces of this node, attached or expected.
	Local []Local
}

// Local is one interface of a pod on this node.
type Local struct {
	// Pod is the very pointer that stands in Cluster.Pods. It is nil where the attached pod is not known (yet, or any more):
	// then the interface is closed, and its addresses belong to nobody.
	Pod       *object.Pod
	Interface string // the host end
	// Addresses are those of the record, which beats any pod's status; empty for a pod that is only expected.
	Addresses []netip.Addr
	// Ready lets packets through, as far as policies allow; false closes both directions.
	Ready bool
}

// Model is what the policies mean for this node.
type Model struct {
	// Pods has one element for each of [Input.Local], sorted by interface.
	Pods []Guarded
	// Problems are the policies that cannot be used as written, sorted by policy.
	Problems []Problem

	at map[netip.Addr]*Guarded
}

// Problem is a policy that cannot be used as written. The pods that it selects are closed in its directions.
type Problem struct {
	Policy string // namespace/name
	Reason string // all that is wrong with it
}

// Guarded is an interface with what its pod's policies say.
type Guarded struct {
	Local
	Ingress, Egress Side
}

// Side is one direction of a pod: not isolated, everything passes; isolated, only what a rule allows does.
type Side struct {
	Isolated bool
	Rules    []Rule
}

// Rule is one rule of one policy, for one pod: what matches a peer and a port is allowed.
type Rule struct {
	Origin string // "namespace/name ingress 0", for people
	// Peers is nil where the rule speaks of everyone.
	Peers *Peers
	// AnyPort is true for a rule that names no ports: every port of every protocol. Otherwise Ports and Named, of which
	// both may be empty: such a rule allows nothing.
	AnyPort bool
	Ports   []Port
	// Named are egress rules' ports that each peer pod has under its own number.
	Named []Named
}

// Port is a range of ports of one protocol; 0 to 65535 is the whole protocol.
type Port struct {
	Protocol corev1.Protocol
	From, To uint16
}

// Named are the (address, port) pairs behind a named port of an egress rule's peers.
type Named struct {
	Key      string // what it means, in words that are the same for the same meaning
	Protocol corev1.Protocol
	Members  []netip.AddrPort // sorted
}

// Peers is a list of peers, shared by all rules that say the same.
type Peers struct {
	// Selectors is what selects pods among the peers, in words that are the same for the same meaning; empty for none.
	Selectors string
	Pods      []netip.Addr   // of the selected pods, sorted
	Blocks    []netip.Prefix // disjoint, sorted, exceptions taken away; /0 possible

	pods map[netip.Addr]bool
}

// contains reports whether an address is a peer.
func (p *Peers) contains(a netip.Addr) bool {
	return p == nil || p.pods[a] || slices.ContainsFunc(p.Blocks, func(b netip.Prefix) bool { return b.Contains(a) })
}

// At returns the guarded interface that has an address, nil if none has.
func (m *Model) At(a netip.Addr) *Guarded { return m.at[a] }

// Allowed reports whether the first packet of a flow may pass on this node: from src to the real destination dst, after any
// translation. protocol is "" for one that policies cannot name (ICMP). own says which addresses are the node's own:
// between a node and its own pods everything passes.
func (m *Model) Allowed(src, dst netip.Addr, protocol corev1.Protocol, port uint16, own func(netip.Addr) bool) bool {
	from, to := m.at[src], m.at[dst]
	if from == nil && to == nil || src == dst || own(src) || own(dst) {
		return true
	}
	if from != nil && !from.Ready || to != nil && !to.Ready {
		return false
	}
	return (from == nil || from.Egress.allows(dst, dst, protocol, port)) &&
		(to == nil || to.Ingress.allows(src, dst, protocol, port))
}

// allows reports whether one direction lets a packet pass whose other end is peer and whose destination is (dst, port).
func (s *Side) allows(peer, dst netip.Addr, protocol corev1.Protocol, port uint16) bool {
	return !s.Isolated || slices.ContainsFunc(s.Rules, func(r Rule) bool { return r.allows(peer, dst, protocol, port) })
}

func (r *Rule) allows(peer, dst netip.Addr, protocol corev1.Protocol, port uint16) bool {
	for _, n := range r.Named {
		if n.Protocol == protocol && slices.Contains(n.Members, netip.AddrPortFrom(dst, port)) {
			return true
		}
	}
	if !r.Peers.contains(peer) {
		return false
	}
	return r.AnyPort || slices.ContainsFunc(r.Ports, func(p Port) bool {
		return p.Protocol == protocol && p.From <= port && port <= p.To
	})
}

// index sorts the pods and fills in who has which address.
func (m *Model) index() {
	slices.SortFunc(m.Pods, func(a, b Guarded) int {
		return cmp.Or(strings.Compare(a.Interface, b.Interface), slices.CompareFunc(a.Addresses, b.Addresses, netip.Addr.Compare))
	})
	m.at = map[netip.Addr]*Guarded{}
	for i := range m.Pods {
		for _, a := range m.Pods[i].Addresses {
			if m.at[a] == nil || m.Pods[i].Ready {
				m.at[a] = &m.Pods[i]
			}
		}
	}
}
