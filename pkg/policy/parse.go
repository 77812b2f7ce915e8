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

// parsedRule is one port, or any, with the peers of all of a direction's rules that allow it.
type parsedRule struct {
	origin string
	peers  *peerList // nil: everyone
	on     port
}

// port is a port of a rule: neither a number nor a name is any port.
type port struct {
	number Port
	named  namedPort
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
	rule       int    // of its policy and direction, in which it stands
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
		peers, badPeers := p.peers(i, r.From, fmt.Sprintf("spec.ingress[%d].from", i))
		ports, badPorts := portsOf(r.Ports, fmt.Sprintf("spec.ingress[%d].ports", i))
		p.in, problems = p.with(p.in, "ingress", i, peers, ports), slices.Concat(problems, badPorts, badPeers)
	}
	for i, r := range np.Spec.Egress {
		peers, badPeers := p.peers(i, r.To, fmt.Sprintf("spec.egress[%d].to", i))
		ports, badPorts := portsOf(r.Ports, fmt.Sprintf("spec.egress[%d].ports", i))
		p.out, problems = p.with(p.out, "egress", i, peers, ports), slices.Concat(problems, badPorts, badPeers)
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

// with adds rule number i, port by port, to what allows the port already: a packet is looked up once for all peers that may use it.
func (p *parsed) with(list []parsedRule, direction string, i int, peers *peerList, ports []port) []parsedRule {
	for _, on := range ports {
		at := slices.IndexFunc(list, func(r parsedRule) bool { return r.on == on })
		if at < 0 {
			list = append(list, parsedRule{fmt.Sprintf("%s %s %d", p.name, direction, i), peers, on})
			continue
		}
		list[at].origin += fmt.Sprintf(",%d", i)
		list[at].peers = list[at].peers.plus(peers)
	}
	return list
}

// plus returns the peers of both lists; everyone, if that is one of them.
func (l *peerList) plus(more *peerList) *peerList {
	if l == nil || more == nil {
		return nil
	}
	return &peerList{selectors: slices.Concat(l.selectors, more.selectors), blocks: disjoint(slices.Concat(l.blocks, more.blocks))}
}

// portsOf reads a rule's ports, each once; none are any port.
func portsOf(list []networkingv1.NetworkPolicyPort, at string) (ports []port, problems []string) {
	if len(list) == 0 {
		return []port{{}}, nil
	}
	for i := range list {
		p := readPort(&list[i], func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("%s[%d]: ", at, i)+fmt.Sprintf(format, args...))
		})
		if !slices.Contains(ports, p) {
			ports = append(ports, p)
		}
	}
	return ports, problems
}

// peers reads a rule's peers; none are everyone.
func (p *parsed) peers(rule int, list []networkingv1.NetworkPolicyPeer, at string) (peers *peerList, problems []string) {
	if len(list) == 0 {
		return nil, nil
	}
	peers = &peerList{}
	for i := range list {
		p.peer(peers, rule, &list[i], func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("%s[%d]: ", at, i)+fmt.Sprintf(format, args...))
		})
	}
	peers.blocks = disjoint(peers.blocks)
	return peers, problems
}

func readPort(p *networkingv1.NetworkPolicyPort, bad func(string, ...any)) port {
	protocol := corev1.ProtocolTCP
	if p.Protocol != nil {
		protocol = *p.Protocol
	}
	if protocol != corev1.ProtocolTCP && protocol != corev1.ProtocolUDP && protocol != corev1.ProtocolSCTP {
		bad("protocol %q: TCP, UDP and SCTP are known", protocol)
	}
	switch {
	case p.Port == nil:
		if p.EndPort != nil {
			bad("endPort %d without port", *p.EndPort)
		}
		return port{number: Port{protocol, 0, 65535}}
	case p.Port.Type == intstr.String:
		if p.EndPort != nil {
			bad("endPort %d beside the named port %q: a range needs a number", *p.EndPort, p.Port.StrVal)
		}
		return port{named: namedPort{p.Port.StrVal, protocol}}
	}
	from, to := p.Port.IntVal, p.Port.IntVal
	if from < 1 || from > 65535 {
		bad("port %d is not between 1 and 65535", from)
	}
	if p.EndPort != nil {
		to = *p.EndPort
		if to < from || to > 65535 {
			bad("endPort %d is not between port %d and 65535", to, from)
		}
	}
	return port{number: Port{protocol, uint16(from), uint16(to)}}
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
