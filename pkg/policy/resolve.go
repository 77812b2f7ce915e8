package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/postern-cni/postern/pkg/object"
)

// Resolve works out the model. It changes nothing of its input.
func Resolve(in Input) *Model {
	r := &resolver{
		namespaces: map[string]labels.Set{},
		owners:     owners(in),
		peers:      map[string]*Peers{},
		named:      map[string]Named{},
	}
	for _, n := range in.Cluster.Namespaces {
		r.namespaces[n.Name] = n.Labels
	}
	for a, pods := range r.owners {
		if r.eligible(pods) {
			r.addresses = append(r.addresses, a)
		}
	}
	slices.SortFunc(r.addresses, netip.Addr.Compare)
	m := &Model{}
	for _, l := range in.Local {
		m.Pods = append(m.Pods, Guarded{Local: l})
	}
	m.index()
	for _, np := range in.Cluster.Policies {
		p, problems := read(np)
		if len(problems) > 0 {
			m.Problems = append(m.Problems, Problem{p.name, strings.Join(problems, "; ")})
		}
		for i := range m.Pods {
			if p.selects(m.Pods[i].Pod) {
				r.add(&m.Pods[i], p)
			}
		}
	}
	return m
}

// resolver holds what is looked up while the rules of policies are read.
type resolver struct {
	namespaces map[string]labels.Set
	// owners are the pods that claim an address. Only what holds for all of them holds for the address.
	owners    map[netip.Addr][]*object.Pod
	addresses []netip.Addr // those that can be a peer, sorted
	peers     map[string]*Peers
	named     map[string]Named
}

// owners finds who claims each address. A record of this node beats any status; nil stands for somebody who is no peer: an
// attached pod that is not known, has ended, or uses its node's network.
func owners(in Input) map[netip.Addr][]*object.Pod {
	claims := map[netip.Addr][]*object.Pod{}
	recorded := map[*object.Pod]bool{}
	for _, l := range in.Local {
		for _, a := range l.Addresses {
			claims[a] = append(claims[a], l.Pod)
		}
		if l.Pod != nil && len(l.Addresses) > 0 {
			recorded[l.Pod] = true
		}
	}
	local := maps.Clone(claims)
	for _, pod := range in.Cluster.Pods {
		if pod.Ended || recorded[pod] {
			continue
		}
		for _, a := range pod.IPs {
			if _, here := local[a]; !here {
				claims[a] = append(claims[a], pod)
			}
		}
	}
	return claims
}

func (r *resolver) eligible(pods []*object.Pod) bool {
	return !slices.ContainsFunc(pods, func(p *object.Pod) bool { return p == nil || p.Ended || p.HostNetwork })
}

// add gives an interface the rules of a policy that selects its pod.
func (r *resolver) add(g *Guarded, p *parsed) {
	if p.ingress {
		g.Ingress.Isolated = true
		for _, rule := range p.in {
			out := Rule{Origin: rule.origin, Peers: r.resolve(rule.peers), AnyPort: rule.anyPort, Ports: slices.Clone(rule.ports)}
			for _, n := range rule.named {
				if number, ok := portOf(g.Pod, n.name, n.protocol); ok {
					out.Ports = append(out.Ports, Port{n.protocol, number, number})
				}
			}
			g.Ingress.Rules = append(g.Ingress.Rules, out)
		}
	}
	if p.egress {
		g.Egress.Isolated = true
		for _, rule := range p.out {
			out := Rule{Origin: rule.origin, Peers: r.resolve(rule.peers), AnyPort: rule.anyPort, Ports: rule.ports}
			for _, n := range rule.named {
				if named, ok := r.resolveNamed(rule.peers, n); ok {
					out.Named = append(out.Named, named)
				}
			}
			g.Egress.Rules = append(g.Egress.Rules, out)
		}
	}
}

// resolve finds the addresses of a list of peers; nil stays nil: everyone.
func (r *resolver) resolve(list *peerList) *Peers {
	if list == nil {
		return nil
	}
	key := list.key()
	if p := r.peers[key]; p != nil {
		return p
	}
	p := &Peers{Selectors: list.selectorKey(), Blocks: list.blocks, pods: map[netip.Addr]bool{}}
	for _, a := range r.addresses {
		if r.all(a, list) {
			p.Pods = append(p.Pods, a)
			p.pods[a] = true
		}
	}
	r.peers[key] = p
	return p
}

// all reports whether every owner of an address is selected by the list.
func (r *resolver) all(a netip.Addr, list *peerList) bool {
	for _, pod := range r.owners[a] {
		if !slices.ContainsFunc(list.selectors, func(s selector) bool { return s.matches(pod, r.namespaces) }) {
			return false
		}
	}
	return true
}

// resolveNamed finds the addresses and numbers of a named port among the pods of a list, or among all pods for everyone.
func (r *resolver) resolveNamed(list *peerList, n namedPort) (Named, bool) {
	if list != nil && len(list.selectors) == 0 {
		return Named{}, false
	}
	key := fmt.Sprintf("%s/%s of ", n.name, n.protocol)
	if list == nil {
		key += "every pod"
	} else {
		key += list.selectorKey()
	}
	if known, ok := r.named[key]; ok {
		return known, true
	}
	out := Named{Key: key, Protocol: n.protocol}
	for _, a := range r.addresses {
		if list != nil && !r.all(a, list) {
			continue
		}
		if number, ok := r.sharedPort(a, n); ok {
			out.Members = append(out.Members, netip.AddrPortFrom(a, number))
		}
	}
	r.named[key] = out
	return out, true
}

// sharedPort is the number that all owners of an address have for a named port.
func (r *resolver) sharedPort(a netip.Addr, n namedPort) (uint16, bool) {
	var number uint16
	for i, pod := range r.owners[a] {
		got, ok := portOf(pod, n.name, n.protocol)
		if !ok || i > 0 && got != number {
			return 0, false
		}
		number = got
	}
	return number, true
}

// portOf looks a named port up in a pod: the first that has the name and the protocol, as Services do it.
func portOf(pod *object.Pod, name string, protocol corev1.Protocol) (uint16, bool) {
	for _, p := range pod.Ports {
		if p.Name == name && p.Protocol == protocol {
			return p.Number, true
		}
	}
	return 0, false
}

// selects reports whether the policy applies to a pod.
func (p *parsed) selects(pod *object.Pod) bool {
	return pod != nil && !pod.HostNetwork && pod.Namespace == p.namespace && p.pods.Matches(labels.Set(pod.Labels))
}

// directions reads policyTypes: absent, Ingress always, and Egress where there are egress rules.
func directions(spec *networkingv1.NetworkPolicySpec) (ingress, egress bool, problems []string) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0, nil
	}
	for _, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			ingress = true
		case networkingv1.PolicyTypeEgress:
			egress = true
		default:
			ingress, egress = true, true
			problems = append(problems, fmt.Sprintf("spec.policyTypes: %q: Ingress and Egress are known", t))
		}
	}
	return ingress, egress, problems
}
