package explain

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/object"
)

// peer asks whether the other end of the connection is the peer.
func (e *explainer) peer(
	np *networkingv1.NetworkPolicy, p *networkingv1.NetworkPolicyPeer, d networkingv1.PolicyType, owner *object.Pod,
) (bool, string) {
	other := e.query.From
	if d == networkingv1.PolicyTypeEgress {
		other = e.query.To
	}
	switch {
	case p.IPBlock != nil:
		return inBlock(p.IPBlock, other.Address)
	case owner == nil:
		return false, fmt.Sprintf("selects pods, and %s is none", other)
	}
	return e.selected(np.Namespace, p, owner)
}

// selected asks whether a peer's selectors hold a pod.
func (e *explainer) selected(namespace string, p *networkingv1.NetworkPolicyPeer, pod *object.Pod) (bool, string) {
	if pod.HostNetwork {
		return false, fmt.Sprintf("selects pods, and %s is on its node's network", pod.Key())
	}
	if p.NamespaceSelector == nil && pod.Namespace != namespace {
		return false, fmt.Sprintf("selects pods of namespace %s alone", namespace)
	}
	if p.NamespaceSelector != nil {
		has, exists := e.namespaceLabels(pod.Namespace)
		if !exists {
			return false, fmt.Sprintf("namespace %s does not exist", pod.Namespace)
		}
		if s, _ := metav1.LabelSelectorAsSelector(p.NamespaceSelector); !s.Matches(labels.Set(has)) {
			return false, fmt.Sprintf("wants namespaces with (%s), and %s has (%s)", s, pod.Namespace, labels.Set(has))
		}
	}
	if p.PodSelector != nil {
		if s, _ := metav1.LabelSelectorAsSelector(p.PodSelector); !s.Matches(&pod.Labels) {
			return false, fmt.Sprintf("wants pods with (%s), and %s has (%s)", s, pod.Key(), pod.Labels)
		}
	}
	return true, "matches " + pod.Key()
}

func (e *explainer) namespaceLabels(name string) (map[string]string, bool) {
	for _, n := range e.cluster.Namespaces {
		if n.Name == name {
			return n.Labels, true
		}
	}
	return nil, false
}

func inBlock(b *networkingv1.IPBlock, a netip.Addr) (bool, string) {
	cidr := netip.MustParsePrefix(b.CIDR).Masked()
	if !a.IsValid() || !cidr.Contains(a) {
		return false, fmt.Sprintf("wants %s", b.CIDR)
	}
	for _, text := range b.Except {
		if netip.MustParsePrefix(text).Masked().Contains(a) {
			return false, fmt.Sprintf("wants %s except %s", b.CIDR, text)
		}
	}
	return true, fmt.Sprintf("holds %s in %s", a, b.CIDR)
}

// anyPort asks whether one of a rule's ports is the query's. No ports mean every port of every protocol.
func (e *explainer) anyPort(ports []networkingv1.NetworkPolicyPort, d networkingv1.PolicyType, block bool) (bool, string) {
	if len(ports) == 0 {
		return true, "every port"
	}
	var wants []string
	for i := range ports {
		if e.port(&ports[i], d, block) {
			return true, "port " + describe(&ports[i])
		}
		wants = append(wants, describe(&ports[i]))
	}
	return false, fmt.Sprintf("wants port %s, not %s", strings.Join(wants, " or "), e.query.port())
}

func (e *explainer) port(p *networkingv1.NetworkPolicyPort, d networkingv1.PolicyType, block bool) bool {
	if protocolOf(p) != e.query.Protocol {
		return false
	}
	switch {
	case p.Port == nil:
		return true
	case p.Port.Type == intstr.Int && p.EndPort == nil:
		return int32(e.query.Port) == p.Port.IntVal
	case p.Port.Type == intstr.Int:
		return p.Port.IntVal <= int32(e.query.Port) && int32(e.query.Port) <= *p.EndPort
	case block && d == networkingv1.PolicyTypeEgress, len(e.query.To.Pods) == 0:
		return false
	}
	for _, pod := range e.query.To.Pods {
		if number, ok := named(pod, p.Port.StrVal, e.query.Protocol); !ok || number != e.query.Port {
			return false
		}
	}
	return true
}

// named looks a port up in the destination pod, as Services do: the first with the name and the protocol.
func named(pod *object.Pod, name string, protocol corev1.Protocol) (uint16, bool) {
	for _, p := range pod.Ports {
		if p.Name == name && p.Protocol == protocol {
			return p.Number, true
		}
	}
	return 0, false
}

func protocolOf(p *networkingv1.NetworkPolicyPort) corev1.Protocol {
	if p.Protocol == nil {
		return corev1.ProtocolTCP
	}
	return *p.Protocol
}

func describe(p *networkingv1.NetworkPolicyPort) string {
	switch {
	case p.Port == nil:
		return "any/" + string(protocolOf(p))
	case p.EndPort != nil:
		return fmt.Sprintf("%s-%d/%s", p.Port, *p.EndPort, protocolOf(p))
	}
	return fmt.Sprintf("%s/%s", p.Port, protocolOf(p))
}

// unusable lists what makes a policy impossible to use as written.
func unusable(np *networkingv1.NetworkPolicy) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, t := range np.Spec.PolicyTypes {
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			say("policyTypes has %q", t)
		}
	}
	if _, err := metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err != nil {
		say("podSelector: %v", err)
	}
	for i, r := range np.Spec.Ingress {
		out = append(out, unusableRule(fmt.Sprintf("ingress[%d]", i), r.From, r.Ports)...)
	}
	for i, r := range np.Spec.Egress {
		out = append(out, unusableRule(fmt.Sprintf("egress[%d]", i), r.To, r.Ports)...)
	}
	return out
}

func unusableRule(at string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, at+" "+fmt.Sprintf(format, args...)) }
	for _, p := range ports {
		switch protocolOf(&p) {
		case corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP:
		default:
			say("has protocol %q", protocolOf(&p))
		}
		number := p.Port != nil && p.Port.Type == intstr.Int
		if number && (p.Port.IntVal < 1 || p.Port.IntVal > 65535) {
			say("has port %d", p.Port.IntVal)
		}
		if p.EndPort != nil && (!number || *p.EndPort < p.Port.IntVal || *p.EndPort > 65535) {
			say("has endPort %d, which ends no range", *p.EndPort)
		}
	}
	for _, p := range peers {
		if p.IPBlock == nil && p.PodSelector == nil && p.NamespaceSelector == nil {
			say("has an empty peer")
		}
		if p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil) {
			say("has an ipBlock beside a selector")
		}
		for _, s := range []*metav1.LabelSelector{p.PodSelector, p.NamespaceSelector} {
			if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
				say("has a selector that cannot be read: %v", err)
			}
		}
		if p.IPBlock != nil {
			out = append(out, unusableBlock(at, p.IPBlock)...)
		}
	}
	return out
}

func unusableBlock(at string, b *networkingv1.IPBlock) []string {
	cidr, ok := parseCIDR(b.CIDR)
	if !ok {
		return []string{fmt.Sprintf("%s has cidr %q, which is none", at, b.CIDR)}
	}
	var out []string
	for _, text := range b.Except {
		except, ok := parseCIDR(text)
		if !ok {
			out = append(out, fmt.Sprintf("%s has exception %q, which is no CIDR", at, text))
		} else if !cidr.Contains(except.Addr()) || except.Bits() < cidr.Bits() {
			out = append(out, fmt.Sprintf("%s has exception %s, which is not in %s", at, text, b.CIDR))
		}
	}
	return out
}

func parseCIDR(text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err == nil && !p.Addr().Is4In6()
}
