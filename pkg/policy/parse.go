package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// parsed is a policy in a form that can be matched. One that cannot be used has its directions and no rules.
type parsed struct {
	name, namespace string
	pods            labels.Selector
	ingress, egress bool
	in, out         []parsedRule
}

// parsedRule is one or several rules that allow the same ports.
type parsedRule struct {
	origin  string
	peers   *peerList // nil: everyone
	anyPort bool
	ports   []Port
	named   []namedPort
}

type namedPort struct {
	name     string
	protocol corev1.Protocol
}

// peerList is the from or to of one or several rules.
type peerList struct {
	selectors []selector
	blocks    []netip.Prefix
}

// selector is a peer that selects pods.
type selector struct {
	rule       int    // that has it
	namespace  string // of the policy, where namespaces is nil
	namespaces *asked // nil: the policy's namespace alone
	pods       *asked
}

// asked are labels that are asked for.
type asked struct {
	labels.Selector
	// key and value are the first label that is asked for by value; empty if there is none.
	key, value string
}

func asking(s labels.Selector) *asked {
	a := &asked{Selector: s}
	requirements, _ := s.Requirements() // those of API selectors can always be listed
	for _, r := range requirements {
		equals := r.Operator() == selection.In || r.Operator() == selection.Equals || r.Operator() == selection.DoubleEquals
		if equals && r.Values().Len() == 1 {
			a.key, a.value = r.Key(), r.Values().UnsortedList()[0]
			break
		}
	}
	return a
}

// matches reports whether labels are as asked. To look for one first is several times faster than the selector, which most of
// what is in a large cluster does not match.
func (a *asked) matches(l labels.Labels) bool {
	return (a.key == "" || l.Get(a.key) == a.value) && a.Matches(l)
}

func (s selector) text() string {
	where := "namespace " + s.namespace
	if s.namespaces != nil {
		where = "namespaces " + words(s.namespaces)
	}
	return "pods " + words(s.pods) + " in " + where
}

// words is a selector's text; what selects everything is called "all".
func words(s *asked) string {
	if s.Empty() {
		return "all"
	}
	return "(" + s.String() + ")"
}

// selectorKey is the same for lists that select the same pods for the same reasons, whatever their order.
func (l *peerList) selectorKey() string {
	rules := map[int][]string{}
	for _, s := range l.selectors {
		rules[s.rule] = append(rules[s.rule], s.text())
	}
	keys := make([]string, 0, len(rules))
	for _, texts := range rules {
		keys = append(keys, joined(texts, ", "))
	}
	return joined(keys, "; ")
}

func joined(words []string, by string) string {
	slices.Sort(words)
	return strings.Join(slices.Compact(words), by)
}

// read parses a policy. With problems, the result is closed: no rules.
func read(np *networkingv1.NetworkPolicy) (*parsed, []string) {
	p := &parsed{name: np.Namespace + "/" + np.Name, namespace: np.Namespace}
	var problems []string
	p.ingress, p.egress, problems = directions(&np.Spec)
	var err error
	if p.pods, err = metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err != nil {
		p.pods = labels.Everything() // whom it means is not known, so nobody of its namespace is left open
		problems = append(problems, "spec.podSelector: "+err.Error()+"; all pods of the namespace are closed")
	}
	for i, r := range np.Spec.Ingress {
		rule, bad := p.rule("ingress", "from", i, r.From, r.Ports)
		p.in, problems = with(p.in, i, rule), append(problems, bad...)
	}
	for i, r := range np.Spec.Egress {
		rule, bad := p.rule("egress", "to", i, r.To, r.Ports)
		p.out, problems = with(p.out, i, rule), append(problems, bad...)
	}
	if len(problems) > 0 {
		p.in, p.out = nil, nil
	}
	return p, problems
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

// with adds rule number i: to one that allows the same ports, if there is one, so that a packet is looked up once for both.
func with(rules []parsedRule, i int, r parsedRule) []parsedRule {
	at := slices.IndexFunc(rules, func(o parsedRule) bool {
		return o.anyPort == r.anyPort && slices.Equal(o.ports, r.ports) && slices.Equal(o.named, r.named)
	})
	if at < 0 {
		return append(rules, r)
	}
	one := &rules[at]
	one.origin += fmt.Sprintf(",%d", i)
	if one.peers == nil || r.peers == nil {
		one.peers = nil
		return rules
	}
	one.peers.selectors = append(one.peers.selectors, r.peers.selectors...)
	one.peers.blocks = disjoint(append(one.peers.blocks, r.peers.blocks...))
	return rules
}

func (p *parsed) rule(
	direction, field string, i int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort,
) (parsedRule, []string) {
	rule := parsedRule{origin: fmt.Sprintf("%s %s %d", p.name, direction, i), anyPort: len(ports) == 0}
	at := fmt.Sprintf("spec.%s[%d]", direction, i)
	var problems []string
	bad := func(where, format string, args ...any) {
		problems = append(problems, at+"."+where+": "+fmt.Sprintf(format, args...))
	}
	for j := range ports {
		rule.port(&ports[j], func(format string, args ...any) { bad(fmt.Sprintf("ports[%d]", j), format, args...) })
	}
	if len(peers) == 0 {
		return rule, problems
	}
	rule.peers = &peerList{}
	for j := range peers {
		p.peer(rule.peers, i, &peers[j], func(format string, args ...any) { bad(fmt.Sprintf("%s[%d]", field, j), format, args...) })
	}
	rule.peers.blocks = disjoint(rule.peers.blocks)
	return rule, problems
}

func (r *parsedRule) port(port *networkingv1.NetworkPolicyPort, bad func(string, ...any)) {
	protocol := corev1.ProtocolTCP
	if port.Protocol != nil {
		protocol = *port.Protocol
	}
	if protocol != corev1.ProtocolTCP && protocol != corev1.ProtocolUDP && protocol != corev1.ProtocolSCTP {
		bad("protocol %q: TCP, UDP and SCTP are known", protocol)
	}
	switch {
	case port.Port == nil:
		if port.EndPort != nil {
			bad("endPort %d without port", *port.EndPort)
		}
		r.ports = append(r.ports, Port{protocol, 0, 65535})
	case port.Port.Type == intstr.String:
		if port.EndPort != nil {
			bad("endPort %d beside the named port %q: a range needs a number", *port.EndPort, port.Port.StrVal)
		}
		r.named = append(r.named, namedPort{port.Port.StrVal, protocol})
	default:
		from, to := port.Port.IntVal, port.Port.IntVal
		if from < 1 || from > 65535 {
			bad("port %d is not between 1 and 65535", from)
		}
		if port.EndPort != nil {
			to = *port.EndPort
			if to < from || to > 65535 {
				bad("endPort %d is not between port %d and 65535", to, from)
			}
		}
		r.ports = append(r.ports, Port{protocol, uint16(from), uint16(to)})
	}
}

func (p *parsed) peer(list *peerList, rule int, peer *networkingv1.NetworkPolicyPeer, bad func(string, ...any)) {
	switch {
	case peer.IPBlock != nil && (peer.PodSelector != nil || peer.NamespaceSelector != nil):
		bad("ipBlock stands beside a selector: a peer is one or the other")
	case peer.IPBlock != nil:
		list.blocks = append(list.blocks, block(peer.IPBlock, bad)...)
	case peer.PodSelector == nil && peer.NamespaceSelector == nil:
		bad("empty: needs podSelector, namespaceSelector or ipBlock")
	default:
		s := selector{rule: rule, namespace: p.namespace, pods: asking(labels.Everything())}
		if peer.NamespaceSelector != nil {
			if namespaces, err := metav1.LabelSelectorAsSelector(peer.NamespaceSelector); err != nil {
				bad("namespaceSelector: %v", err)
			} else {
				s.namespace, s.namespaces = "", asking(namespaces)
			}
		}
		if peer.PodSelector != nil {
			if pods, err := metav1.LabelSelectorAsSelector(peer.PodSelector); err != nil {
				bad("podSelector: %v", err)
			} else {
				s.pods = asking(pods)
			}
		}
		list.selectors = append(list.selectors, s)
	}
}

// block returns the prefixes of an ipBlock without those of its exceptions.
func block(b *networkingv1.IPBlock, bad func(string, ...any)) []netip.Prefix {
	whole, err := prefix(b.CIDR)
	if err != nil {
		bad("ipBlock.cidr %q: %v", b.CIDR, err)
		return nil
	}
	rest := []netip.Prefix{whole}
	for i, text := range b.Except {
		except, err := prefix(text)
		if err != nil {
			bad("ipBlock.except[%d] %q: %v", i, text, err)
			continue
		}
		if !whole.Overlaps(except) || except.Bits() < whole.Bits() {
			bad("ipBlock.except[%d] %q is not inside of %q", i, text, b.CIDR)
			continue
		}
		rest = subtract(rest, except)
	}
	return rest
}

// prefix reads a CIDR; host bits are masked.
func prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, err
	}
	if p.Addr().Is4In6() {
		return p, fmt.Errorf("an IPv4 address in IPv6 form; write it as IPv4")
	}
	return p.Masked(), nil
}
