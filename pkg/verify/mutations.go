package verify

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// Short names for what the list below is full of.
type (
	npPolicy   = networkingv1.NetworkPolicy
	npPeer     = networkingv1.NetworkPolicyPeer
	npPort     = networkingv1.NetworkPolicyPort
	npSelector = metav1.LabelSelector
)

// mutations returns them all, by the line that they break. Lines 14 (address translation, which comes before anything here) and
// 15 (change) cannot be broken in a picture that stands still.
func mutations() []mutation {
	list := slices.Concat(isolation(), peers(), blocks(), portNumbers(), namedPorts(), ends(), flows(), shape())
	const last = 1000 // those of no line
	slices.SortStableFunc(list, func(a, b mutation) int { return cmp.Or(a.line, last) - cmp.Or(b.line, last) })
	return list
}

// isolation breaks who is closed at all.
func isolation() []mutation {
	both := []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	return []mutation{
		{line: 1, name: "a policy replaces those of its namespace that came before", kernel: true,
			input: func(in *policy.Input, _ rule.Family) {
				last := map[string]*npPolicy{}
				for _, np := range in.Cluster.Policies {
					last[np.Namespace] = np
				}
				in.Cluster.Policies = slices.DeleteFunc(in.Cluster.Policies, func(np *npPolicy) bool { return last[np.Namespace] != np })
			}},
		{line: 1, name: "a pod that no policy selects is closed", state: inSet("pst-open-", func(_ dice, s *rule.Set) {
			s.Entries = nil
		})},
		{line: 1, name: "a pod that a policy selects is open", state: func(_ dice, s *rule.State) {
			from := slices.IndexFunc(s.Chains[rule.Mangle], func(c rule.Chain) bool { return c.Name == compile.ChainFrom })
			entry := &s.Chains[rule.Mangle][from]
			entry.Rules = slices.Insert(slices.Clone(entry.Rules), 0, rule.Rule{Action: rule.Return{}})
		}},
		{line: 1, name: "a policy selects its whole namespace", input: eachPolicy(func(np *npPolicy) {
			np.Spec.PodSelector = metav1.LabelSelector{}
		})},
		{line: 2, name: "policyTypes absent: egress is closed without egress rules", input: eachPolicy(func(np *npPolicy) {
			if len(np.Spec.PolicyTypes) == 0 {
				np.Spec.PolicyTypes = both
			}
		})},
		{line: 2, name: "policyTypes absent: egress rules close nothing", input: eachPolicy(func(np *npPolicy) {
			if len(np.Spec.PolicyTypes) == 0 {
				np.Spec.PolicyTypes = both[:1]
			}
		})},
		{line: 2, name: "policyTypes [Egress] closes ingress", input: eachPolicy(func(np *npPolicy) {
			if len(np.Spec.PolicyTypes) == 1 && np.Spec.PolicyTypes[0] == networkingv1.PolicyTypeEgress {
				np.Spec.PolicyTypes = both
			}
		})},
		{line: 2, name: "egress: [] with type Egress denies nothing", kernel: true, input: eachPolicy(func(np *npPolicy) {
			if slices.Contains(np.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) && len(np.Spec.Egress) == 0 {
				np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{}}
			}
		})},
		{line: 17, name: "a policy that cannot be used opens", input: func(in *policy.Input, _ rule.Family) {
			bad := unusable(in)
			for _, np := range in.Cluster.Policies {
				if _, err := metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err == nil && bad[np.Namespace+"/"+np.Name] {
					np.Spec.PolicyTypes = both
					np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
					np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{}}
				}
			}
		}},
		{line: 17, name: "a policy that cannot be used is passed over", kernel: true, input: func(in *policy.Input, _ rule.Family) {
			bad := unusable(in)
			in.Cluster.Policies = slices.DeleteFunc(in.Cluster.Policies, func(np *npPolicy) bool {
				return bad[np.Namespace+"/"+np.Name]
			})
		}},
		{line: 17, name: "a policy that cannot be used stops the others", input: func(in *policy.Input, _ rule.Family) {
			if bad := unusable(in); len(bad) > 0 {
				in.Cluster.Policies = slices.DeleteFunc(in.Cluster.Policies, func(np *npPolicy) bool {
					return !bad[np.Namespace+"/"+np.Name]
				})
			}
		}},
	}
}

// peers breaks whom selectors mean.
func peers() []mutation {
	everything := &metav1.LabelSelector{}
	return []mutation{
		{line: 3, name: "from and to absent: nobody", kernel: true, input: eachPolicy(eachRule(func(r *ruleOf) bool {
			return len(r.peers) > 0
		}))},
		{line: 3, name: "from and to absent: the cluster's pods alone", input: eachPolicy(eachRule(func(r *ruleOf) bool {
			if len(r.peers) == 0 {
				r.peers = []npPeer{{NamespaceSelector: everything}}
			}
			return true
		}))},
		{line: 4, name: "podSelector alone: pods of every namespace", kernel: true, input: eachPeer(func(p npPeer) []npPeer {
			if p.PodSelector != nil && p.NamespaceSelector == nil {
				p.NamespaceSelector = everything
			}
			return []npPeer{p}
		})},
		{line: 4, name: "namespaceSelector alone: pods of the policy's namespace", input: eachPeer(func(p npPeer) []npPeer {
			if p.PodSelector == nil && p.NamespaceSelector != nil {
				p.PodSelector, p.NamespaceSelector = everything, nil
			}
			return []npPeer{p}
		})},
		{line: 4, name: "both selectors: namespaceSelector is passed over", input: eachPeer(func(p npPeer) []npPeer {
			if p.PodSelector != nil && p.NamespaceSelector != nil {
				p.NamespaceSelector = nil
			}
			return []npPeer{p}
		})},
		{line: 4, name: "both selectors: either is enough", input: eachPeer(func(p npPeer) []npPeer {
			if p.PodSelector != nil && p.NamespaceSelector != nil {
				return []npPeer{{PodSelector: p.PodSelector}, {NamespaceSelector: p.NamespaceSelector}}
			}
			return []npPeer{p}
		})},
		{line: 4, name: "an empty selector matches nothing", input: eachPolicy(peerSelectors(func(s *npSelector) {
			if len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
				s.MatchLabels = map[string]string{"nobody": "has this"}
			}
		}))},
		{line: 4, name: "matchExpressions are passed over", input: eachSelector(func(s *npSelector) { s.MatchExpressions = nil })},
		{line: 4, name: "matchLabels are passed over", input: eachSelector(func(s *npSelector) { s.MatchLabels = nil })},
		{line: 4, name: "NotIn wants the label to be there", input: operator(metav1.LabelSelectorOpNotIn, func(s *npSelector, i int) {
			s.MatchExpressions = append(s.MatchExpressions,
				metav1.LabelSelectorRequirement{Key: s.MatchExpressions[i].Key, Operator: metav1.LabelSelectorOpExists})
		})},
		{line: 4, name: "In looks at the first value alone", input: operator(metav1.LabelSelectorOpIn, func(s *npSelector, i int) {
			s.MatchExpressions[i].Values = s.MatchExpressions[i].Values[:1]
		})},
		{line: 4, name: "Exists is always true", input: operator(metav1.LabelSelectorOpExists, func(s *npSelector, i int) {
			s.MatchExpressions[i] = metav1.LabelSelectorRequirement{Key: "nobody", Operator: metav1.LabelSelectorOpDoesNotExist}
		})},
		{line: 4, name: "DoesNotExist is read as Exists",
			input: operator(metav1.LabelSelectorOpDoesNotExist, func(s *npSelector, i int) {
				s.MatchExpressions[i].Operator = metav1.LabelSelectorOpExists
			})},
		{line: 6, name: "selectors that find nobody: everyone", state: eachChain("PST-", func(s *rule.State, c *rule.Chain) {
			empty := map[string]bool{}
			for _, set := range s.Sets {
				empty[set.Name] = len(set.Entries) == 0
			}
			for i, r := range c.Rules {
				c.Rules[i].Matches = slices.DeleteFunc(r.Matches, func(m rule.Match) bool {
					in, ok := m.(rule.InSet)
					return ok && empty[in.Name]
				})
			}
		})},
		{line: 12, name: "hostNetwork pods are peers", kernel: true, input: eachPod(func(p *object.Pod) { p.HostNetwork = false })},
		{line: 13, name: "a pod that has ended keeps its address", kernel: true, input: eachPod(func(p *object.Pod) {
			p.Ended = false
		})},
		{line: 13, name: "a terminating pod has no address", input: eachPod(func(p *object.Pod) {
			if p.Terminating {
				p.IPs = nil
			}
		})},
		{line: 16, name: "a pod's first address alone counts", input: eachPod(func(p *object.Pod) {
			p.IPs = p.IPs[:min(1, len(p.IPs))]
		})},
		{name: "of two pods with one address, one that matches is enough", input: func(in *policy.Input, _ rule.Family) {
			taken := map[netip.Addr]bool{}
			for _, p := range in.Cluster.Pods {
				if !p.Ended {
					p.IPs = slices.DeleteFunc(slices.Clone(p.IPs), func(a netip.Addr) bool { return taken[a] })
				}
				for _, a := range p.IPs {
					taken[a] = true
				}
			}
		}},
	}
}

// operator changes every requirement with an operator, in all selectors.
func operator(op metav1.LabelSelectorOperator, change func(*npSelector, int)) func(*policy.Input, rule.Family) {
	return eachSelector(func(s *npSelector) {
		for i := range s.MatchExpressions {
			if s.MatchExpressions[i].Operator == op {
				change(s, i)
			}
		}
	})
}

// blocks breaks the arithmetic of address blocks.
func blocks() []mutation {
	return []mutation{
		{line: 5, name: "exceptions are passed over", kernel: true, input: eachBlock(func(b *networkingv1.IPBlock) bool {
			b.Except = nil
			return true
		})},
		{line: 5, name: "one block's exception is taken from all blocks", kernel: true, input: eachPolicy(eachRule(exceptFromAll))},
		{line: 5, name: "a block with host bits is that host alone", input: eachBlock(func(b *networkingv1.IPBlock) bool {
			if p := netip.MustParsePrefix(b.CIDR); p.Masked() != p {
				b.CIDR, b.Except = netip.PrefixFrom(p.Addr(), p.Addr().BitLen()).String(), nil
			}
			return true
		})},
		{line: 5, name: "/0 is stored as a host address", kernel: true, input: eachBlock(func(b *networkingv1.IPBlock) bool {
			if p := netip.MustParsePrefix(b.CIDR); p.Bits() == 0 {
				b.CIDR, b.Except = netip.PrefixFrom(p.Masked().Addr(), p.Addr().BitLen()).String(), nil
			}
			return true
		})},
		{line: 5, name: "an exception that is the whole block is passed over", input: eachBlock(func(b *networkingv1.IPBlock) bool {
			b.Except = slices.DeleteFunc(b.Except, func(e string) bool {
				return netip.MustParsePrefix(e).Masked() == netip.MustParsePrefix(b.CIDR).Masked()
			})
			return true
		})},
		{line: 5, name: "a set of blocks loses one", state: inSet("pst-n", func(_ dice, s *rule.Set) {
			s.Entries = s.Entries[:len(s.Entries)-1]
		})},
		{line: 5, name: "a block is twice as large", state: inSet("pst-n", func(d dice, s *rule.Set) {
			e := &s.Entries[d.IntN(len(s.Entries))]
			e.Prefix = netip.PrefixFrom(e.Prefix.Addr(), max(1, e.Prefix.Bits()-1)).Masked()
		})},
		{line: 6, name: "blocks of the other family alone: everyone", kernel: true,
			input: otherFamily(func(r *ruleOf, other []npPeer) bool { return len(other) == len(r.peers) })},
		{line: 16, name: "a block of the other family is everyone here", kernel: true,
			input: otherFamily(func(_ *ruleOf, other []npPeer) bool { return len(other) > 0 })},
	}
}

// exceptFromAll takes the exceptions of each block away from all blocks of the rule.
func exceptFromAll(r *ruleOf) bool {
	var excepts []netip.Prefix
	for _, p := range r.peers {
		if p.IPBlock != nil {
			for _, e := range p.IPBlock.Except {
				excepts = append(excepts, netip.MustParsePrefix(e).Masked())
			}
		}
	}
	gone := func(p npPeer) bool {
		if p.IPBlock == nil {
			return false
		}
		cidr := netip.MustParsePrefix(p.IPBlock.CIDR).Masked()
		for _, e := range excepts {
			if e.Overlaps(cidr) && e.Bits() <= cidr.Bits() {
				return true
			}
			if e.Overlaps(cidr) {
				p.IPBlock.Except = append(p.IPBlock.Except, e.String())
			}
		}
		return false
	}
	had := len(r.peers) > 0
	r.peers = slices.DeleteFunc(r.peers, gone)
	return !had || len(r.peers) > 0
}

// otherFamily makes some rules speak of everyone, depending on their blocks of the other family.
func otherFamily(everyone func(r *ruleOf, other []npPeer) bool) func(*policy.Input, rule.Family) {
	return func(in *policy.Input, f rule.Family) {
		eachPolicy(eachRule(func(r *ruleOf) bool {
			var other []npPeer
			for _, p := range r.peers {
				if p.IPBlock != nil && rule.FamilyOf(netip.MustParsePrefix(p.IPBlock.CIDR).Addr()) != f {
					other = append(other, p)
				}
			}
			if everyone(r, other) {
				r.peers = nil
			}
			return true
		}))(in, f)
	}
}

// portNumbers breaks ports and protocols.
func portNumbers() []mutation {
	tcp, udp, sctp := corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP
	all := []*corev1.Protocol{&tcp, &udp, &sctp}
	same := func(p npPort) []npPort { return []npPort{p} }
	numeric := func(p npPort) bool { return p.Port != nil && p.Port.Type == intstr.Int }
	return []mutation{
		{line: 3, name: "ports absent: TCP, UDP and SCTP, and no ICMP", input: eachPolicy(eachRule(func(r *ruleOf) bool {
			if len(r.ports) == 0 {
				r.ports = []npPort{{Protocol: &tcp}, {Protocol: &udp}, {Protocol: &sctp}}
			}
			return true
		}))},
		{line: 3, name: "a rule with ports speaks of every protocol", input: eachPort(func(p npPort) []npPort {
			var list []npPort
			for _, protocol := range all {
				p.Protocol = protocol
				list = append(list, p)
			}
			return list
		})},
		{line: 3, name: "ICMP passes beside ports", kernel: true, state: eachChain("PST-", func(s *rule.State, c *rule.Chain) {
			for i, r := range c.Rules {
				if has(r, func(rule.Protocol) bool { return true }) {
					icmp := map[rule.Family]rule.Proto{rule.IPv4: rule.ICMP, rule.IPv6: rule.ICMPv6}[s.Family]
					c.Rules = slices.Insert(c.Rules, i, rule.Rule{Matches: []rule.Match{rule.Protocol{Proto: icmp}}, Action: rule.Return{}})
					return
				}
			}
		})},
		{line: 6, name: "a named port that nobody has is every port", input: func(in *policy.Input, f rule.Family) {
			eachPort(func(p npPort) []npPort {
				if p.Port != nil && p.Port.Type == intstr.String && !anybodyHas(in.Cluster.Pods, p.Port.StrVal) {
					p.Port = nil
				}
				return same(p)
			})(in, f)
		}},
		{line: 7, name: "protocol defaults to UDP", input: eachPort(func(p npPort) []npPort {
			if p.Protocol == nil {
				p.Protocol = &udp
			}
			return same(p)
		})},
		{line: 7, name: "port absent: no port", input: eachPort(func(p npPort) []npPort {
			if p.Port == nil {
				return nil
			}
			return same(p)
		})},
		{line: 7, name: "endPort is passed over", input: eachPort(func(p npPort) []npPort { p.EndPort = nil; return same(p) })},
		{line: 7, name: "endPort is exclusive", kernel: true, input: eachPort(func(p npPort) []npPort {
			if p.EndPort != nil && *p.EndPort > p.Port.IntVal {
				end := *p.EndPort - 1
				p.EndPort = &end
			}
			return same(p)
		})},
		{line: 7, name: "a range of ports is one too long", input: eachPort(func(p npPort) []npPort {
			if p.EndPort != nil && *p.EndPort < 65535 {
				end := *p.EndPort + 1
				p.EndPort = &end
			}
			return same(p)
		})},
		{line: 7, name: "SCTP is no protocol", kernel: true, input: eachPort(func(p npPort) []npPort {
			if p.Protocol != nil && *p.Protocol == sctp {
				return nil
			}
			return same(p)
		})},
		{line: 7, name: "a number of one protocol is open in all", input: eachPort(func(p npPort) []npPort {
			if !numeric(p) {
				return same(p)
			}
			var list []npPort
			for _, protocol := range all {
				p.Protocol = protocol
				list = append(list, p)
			}
			return list
		})},
	}
}

// namedPorts breaks the looking up of ports by name.
func namedPorts() []mutation {
	return []mutation{
		{line: 8, name: "a named port is found by its name, whatever its protocol", kernel: true, input: eachPod(func(p *object.Pod) {
			for _, port := range slices.Clone(p.Ports) {
				for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
					p.Ports = append(p.Ports, object.Port{Name: port.Name, Protocol: protocol, Number: port.Number})
				}
			}
		})},
		{line: 8, name: "one number for a name in all pods", kernel: true, input: func(in *policy.Input, _ rule.Family) {
			first := map[string]uint16{}
			for _, p := range in.Cluster.Pods {
				for i, port := range p.Ports {
					key := port.Name + string(port.Protocol)
					if _, known := first[key]; !known {
						first[key] = port.Number
					}
					p.Ports[i].Number = first[key]
				}
			}
		}},
		{line: 8, name: "sidecars' ports do not count", input: eachPod(func(p *object.Pod) { p.Ports = p.Ports[:(len(p.Ports)+1)/2] })},
		{line: 8, name: "of two ports with one name, the last counts", input: eachPod(func(p *object.Pod) { slices.Reverse(p.Ports) })},
		{line: 8, name: "a named port without peers admits everybody who listens there", input: numbersFor(func(r *ruleOf) bool {
			return len(r.peers) == 0
		})},
		{line: 8, name: "a named port admits a block", input: numbersFor(func(r *ruleOf) bool {
			return slices.ContainsFunc(r.peers, func(p npPeer) bool { return p.IPBlock != nil })
		})},
		{line: 8, name: "a named port has another number", state: inSet("pst-t", func(d dice, s *rule.Set) {
			s.Entries[d.IntN(len(s.Entries))].Port++
		})},
		{line: 8, name: "a named port has another protocol", state: inSet("pst-t", func(d dice, s *rule.Set) {
			s.Entries[d.IntN(len(s.Entries))].Proto = rule.SCTP
		})},
	}
}

func anybodyHas(pods []*object.Pod, name string) bool {
	return slices.ContainsFunc(pods, func(p *object.Pod) bool {
		return slices.ContainsFunc(p.Ports, func(o object.Port) bool { return o.Name == name })
	})
}

// numbersFor adds to some egress rules, for each named port, the numbers that anybody has under the name.
func numbersFor(which func(*ruleOf) bool) func(*policy.Input, rule.Family) {
	return func(in *policy.Input, f rule.Family) {
		eachPolicy(eachRule(func(r *ruleOf) bool {
			if !r.egress || !which(r) {
				return true
			}
			for _, p := range slices.Clone(r.ports) {
				if p.Port == nil || p.Port.Type != intstr.String {
					continue
				}
				for _, pod := range in.Cluster.Pods {
					for _, port := range pod.Ports {
						if protocol := port.Protocol; port.Name == p.Port.StrVal && (p.Protocol == nil || *p.Protocol == protocol) {
							number := intstr.FromInt32(int32(port.Number))
							r.ports = append(r.ports, npPort{Protocol: &protocol, Port: &number})
						}
					}
				}
			}
			return true
		}))(in, f)
	}
}

// ends breaks which of the two ends count.
func ends() []mutation {
	jumpsTo := func(chain string) func(rule.Rule) bool {
		return func(r rule.Rule) bool { return r.Action == rule.Jump{Chain: chain} }
	}
	return []mutation{
		{line: 10, name: "ingress alone counts", kernel: true,
			state: eachChain(compile.ChainForward, withoutRules(jumpsTo(compile.ChainFrom)))},
		{line: 10, name: "egress alone counts", state: eachChain(compile.ChainForward, withoutRules(jumpsTo(compile.ChainTo)))},
		{line: 10, name: "what egress admits is not asked for ingress", state: eachChain("PST-E-", func(_ *rule.State, c *rule.Chain) {
			for i, r := range c.Rules {
				if r.Action == (rule.Return{}) {
					c.Rules[i].Action = rule.Accept{}
				}
			}
		})},
		{line: 11, name: "a pod does not reach itself", kernel: true, state: eachChain("PST-", withoutRules(func(r rule.Rule) bool {
			return has(r, func(rule.In) bool { return true }) || has(r, func(rule.Out) bool { return true })
		}))},
		{line: 4, name: "peers are looked up at the wrong end", state: eachChain("PST-I-", func(_ *rule.State, c *rule.Chain) {
			for _, r := range c.Rules {
				for i, m := range r.Matches {
					if in, ok := m.(rule.InSet); ok && in.Dirs == "src" {
						in.Dirs = "dst"
						r.Matches[i] = in
					}
				}
			}
		})},
	}
}

// flows breaks which packets are judged.
func flows() []mutation {
	tracked := func(state string) func(rule.CTState) bool {
		return func(m rule.CTState) bool { return m.States == state }
	}
	return []mutation{
		{line: 9, name: "RELATED passes in every protocol", state: eachChain(compile.ChainForward, func(_ *rule.State, c *rule.Chain) {
			for i, r := range c.Rules {
				if has(r, tracked(stateRelated)) {
					c.Rules[i].Matches = slices.DeleteFunc(r.Matches, func(m rule.Match) bool { _, is := m.(rule.Protocol); return is })
				}
			}
		})},
		{line: 9, name: "errors of a flow are judged", state: eachChain(compile.ChainForward, withoutRules(func(r rule.Rule) bool {
			return has(r, tracked(stateRelated))
		}))},
		{line: 9, name: "replies are judged", kernel: true, state: eachChain(compile.ChainForward, withoutRules(func(r rule.Rule) bool {
			return has(r, tracked(stateEstablished))
		}))},
		{line: 9, name: "TCP in the middle of no known flow is judged as a first packet", kernel: true,
			state: eachChain(compile.ChainForward, withoutRules(func(r rule.Rule) bool {
				return has(r, func(m rule.Syn) bool { return m.Not })
			}))},
	}
}

// shape breaks how rules and sets hang together.
func shape() []mutation {
	return []mutation{
		{name: "a set of pods is empty", state: inSet("pst-p", func(_ dice, s *rule.Set) { s.Entries = nil })},
		{name: "a pod is not ready", state: inSet("pst-ready", func(_ dice, s *rule.Set) { s.Entries = s.Entries[1:] })},
		{name: "a pod is not open", state: inSet("pst-open-ingress", func(_ dice, s *rule.Set) { s.Entries = s.Entries[1:] })},
		{name: "a pod has another link", state: inSet("pst-open-egress", func(_ dice, s *rule.Set) { s.Entries[0].Iface = "pst0" })},
		{name: "a pod's drop is a return", state: inChain("PST-", func(_ dice, c *rule.Chain) {
			c.Rules[len(c.Rules)-1].Action = rule.Return{}
		})},
		{name: "a pod's return is a drop", state: inChain("PST-", func(d dice, c *rule.Chain) {
			c.Rules[d.IntN(len(c.Rules))].Action = rule.Drop{}
		})},
		{name: "a pod's chain has lost a rule", state: inChain("PST-", func(d dice, c *rule.Chain) {
			i := d.IntN(len(c.Rules))
			c.Rules = slices.Delete(c.Rules, i, i+1)
		})},
		{name: "a rule has lost its last match", state: inChain("PST-", func(d dice, c *rule.Chain) {
			if r := &c.Rules[d.IntN(len(c.Rules))]; len(r.Matches) > 0 {
				r.Matches = r.Matches[:len(r.Matches)-1]
			}
		})},
		{name: "a pod is led to another's chain", state: inChain(compile.ChainTo, func(_ dice, c *rule.Chain) {
			var leads []int
			for i, r := range c.Rules {
				if _, is := r.Action.(rule.Goto); is {
					leads = append(leads, i)
				}
			}
			if len(leads) > 1 {
				c.Rules[leads[0]].Action = c.Rules[leads[1]].Action
			}
		})},
		{name: "the tree is entered with jump", state: eachChain(compile.ChainFrom, func(_ *rule.State, c *rule.Chain) {
			for i, r := range c.Rules {
				if to, ok := r.Action.(rule.Goto); ok {
					c.Rules[i].Action = rule.Jump(to)
				}
			}
		})},
		{name: "who is not ready passes", state: eachChain(compile.ChainForward, withoutRules(func(r rule.Rule) bool {
			return has(r, func(m rule.InSet) bool { return m.Not })
		}))},
		{name: "a pod's address may come from elsewhere", kernel: true,
			state: eachChain(compile.ChainForward, withoutRules(func(r rule.Rule) bool {
				return has(r, func(m rule.InSet) bool { return m.Dirs == "src" })
			}))},
	}
}
