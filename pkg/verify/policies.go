package verify

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func (w *maker) policy(name string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: one(w.dice, namespaces...), Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *w.selector(),
			PolicyTypes: one(w.dice, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"},
				[]networkingv1.PolicyType{"Ingress", "Egress"}),
			Ingress: some(w.dice, 2, func() networkingv1.NetworkPolicyIngressRule {
				return networkingv1.NetworkPolicyIngressRule{From: some(w.dice, 3, w.peer), Ports: some(w.dice, 3, w.port)}
			}),
			Egress: some(w.dice, 2, func() networkingv1.NetworkPolicyEgressRule {
				return networkingv1.NetworkPolicyEgressRule{To: some(w.dice, 3, w.peer), Ports: some(w.dice, 3, w.port)}
			}),
		},
	}
	if w.chance(10) {
		w.spoil(np)
	}
	return np
}

func (w *maker) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for range w.IntN(3) {
		key := one(w.dice, "app", "tier")
		e := metav1.LabelSelectorRequirement{Key: key, Operator: one(w.dice, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn,
			metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist, "")}
		switch e.Operator {
		case "":
			if s.MatchLabels == nil {
				s.MatchLabels = map[string]string{}
			}
			s.MatchLabels[key] = one(w.dice, values[key]...)
			continue
		case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
			e.Values = values[key][:1+w.IntN(2)]
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

// namespaceSelector is a selector that may also name a namespace, by the label that the API server gives it.
func (w *maker) namespaceSelector() *metav1.LabelSelector {
	s := w.selector()
	if w.chance(4) {
		s = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: one(w.dice, namespaces...)}}
	}
	return s
}

func (w *maker) peer() networkingv1.NetworkPolicyPeer {
	switch w.IntN(7) {
	case 0, 1:
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector()}
	case 2, 3:
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: w.namespaceSelector()}
	case 4:
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector(), NamespaceSelector: w.namespaceSelector()}
	}
	return networkingv1.NetworkPolicyPeer{IPBlock: w.block()}
}

// block draws a block around an address that packets have, with exceptions around other such addresses.
func (w *maker) block() *networkingv1.IPBlock {
	around := w.addresses[w.IntN(len(w.addresses))]
	cidr := netip.PrefixFrom(around, w.length(around, 0))
	b := &networkingv1.IPBlock{CIDR: cidr.String()} // with its host bits
	for range w.IntN(4) {
		a := w.addresses[w.IntN(len(w.addresses))]
		if cidr.Contains(a) {
			b.Except = append(b.Except, netip.PrefixFrom(a, w.length(a, cidr.Bits())).String())
		}
	}
	return b
}

// length draws the length of a prefix; short ones and single addresses more often than their due.
func (w *maker) length(a netip.Addr, least int) int {
	return one(w.dice, least, least, min(least+1, a.BitLen()), a.BitLen(), max(least, a.BitLen()-3), max(least, a.BitLen()-4),
		least+w.IntN(a.BitLen()-least+1))
}

func (w *maker) port() networkingv1.NetworkPolicyPort {
	var p networkingv1.NetworkPolicyPort
	if !w.chance(3) {
		protocol := w.protocol()
		p.Protocol = &protocol
	}
	switch number := int32(one(w.dice, numbers...)); w.IntN(6) {
	case 0: // the whole protocol
	case 1, 2:
		port := intstr.FromString(one(w.dice, "web", "web", "dns", "dns", "nobodys"))
		p.Port = &port
	case 3:
		end := max(number, int32(one(w.dice, numbers...)))
		p.EndPort = &end
		fallthrough
	default:
		port := intstr.FromInt32(number)
		p.Port = &port
	}
	return p
}

// spoil makes a policy one that cannot be used as written.
func (w *maker) spoil(np *networkingv1.NetworkPolicy) {
	end := int32(7)
	number, name, sctp := intstr.FromInt32(80), intstr.FromString("web"), corev1.Protocol("ICMP")
	zero := intstr.FromInt32(0)
	unreadable := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: "Is"}}}
	from := func(p networkingv1.NetworkPolicyPeer) {
		np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{p}})
	}
	ports := func(p networkingv1.NetworkPolicyPort) {
		np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{Ports: []networkingv1.NetworkPolicyPort{p}})
	}
	one(w.dice,
		func() { np.Spec.PodSelector = *unreadable },
		func() { np.Spec.PolicyTypes = []networkingv1.PolicyType{"Both"} },
		func() { from(networkingv1.NetworkPolicyPeer{}) },
		func() { from(networkingv1.NetworkPolicyPeer{PodSelector: unreadable}) },
		func() { from(networkingv1.NetworkPolicyPeer{NamespaceSelector: unreadable}) },
		func() { from(networkingv1.NetworkPolicyPeer{PodSelector: w.selector(), IPBlock: w.block()}) },
		func() { from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/33"}}) },
		func() {
			from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "::ffff:10.0.0.0/120"}})
		},
		func() {
			from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"::/0"}}})
		},
		func() {
			from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"10.0.0.0/7"}}})
		},
		func() { ports(networkingv1.NetworkPolicyPort{EndPort: &end}) },
		func() { ports(networkingv1.NetworkPolicyPort{Port: &number, EndPort: &end}) },
		func() { ports(networkingv1.NetworkPolicyPort{Port: &name, EndPort: &end}) },
		func() { ports(networkingv1.NetworkPolicyPort{Port: &zero}) },
		func() { ports(networkingv1.NetworkPolicyPort{Protocol: &sctp}) },
	)()
}
