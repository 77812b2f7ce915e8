package compile_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// dice makes a world by chance: the same for the same seed.
type dice struct{ *rand.Rand }

func (d dice) chance(n int) bool { return d.IntN(n) == 0 }

func one[T any](d dice, of ...T) T { return of[d.IntN(len(of))] }

func some[T any](d dice, most int, draw func() T) []T {
	var list []T
	for range d.IntN(most + 1) {
		list = append(list, draw())
	}
	return list
}

// world is a cluster, seen from one of its nodes.
type world struct {
	dice
	cluster object.Cluster
	local   []policy.Local
	// addresses are those worth a packet: of pods, whatever they are, and of nobody.
	addresses []netip.Addr
}

var (
	namespaces = []string{"a", "b", "c"}
	numbers    = []uint16{1, 53, 80, 81, 5353, 65535}
	portNames  = []string{"web", "dns"}
	values     = map[string][]string{"app": {"web", "db"}, "tier": {"x", "y"}}
)

const (
	pods4 = "10.0.0.%d"
	pods6 = "fd00::%x"
)

func newWorld(seed, n uint64) *world {
	w := &world{dice: dice{rand.New(rand.NewPCG(seed, n))}}
	for _, a := range []string{"192.0.2.1", "192.0.2.2", "203.0.113.7", "10.1.0.1", "2001:db8::1", "2001:db8::2", "fd01::7"} {
		w.addresses = append(w.addresses, netip.MustParseAddr(a))
	}
	for _, name := range namespaces {
		if w.chance(12) {
			continue // an event that is late: its pods are known already
		}
		l := w.labels()
		l[corev1.LabelMetadataName] = name
		w.cluster.Namespaces = append(w.cluster.Namespaces, &object.Namespace{Name: name, Labels: l})
	}
	w.pods()
	for i := range 2 + w.IntN(7) {
		w.cluster.Policies = append(w.cluster.Policies, w.policy(fmt.Sprintf("policy%d", i)))
	}
	return w
}

func (w *world) protocol() corev1.Protocol {
	return one(w.dice, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
}

func (w *world) labels() map[string]string {
	l := map[string]string{}
	for _, key := range []string{"app", "tier"} {
		if !w.chance(3) {
			l[key] = one(w.dice, values[key]...)
		}
	}
	return l
}

// pods makes six pods of this node, in every state that a local one can be in, and seven of others.
func (w *world) pods() {
	free := w.Perm(16) // the last digits of the pods' addresses
	next := func() []netip.Addr {
		n := 16 + free[0]
		free = free[1:]
		pair := []netip.Addr{netip.MustParseAddr(fmt.Sprintf(pods4, n)), netip.MustParseAddr(fmt.Sprintf(pods6, n))}
		w.addresses = append(w.addresses, pair...)
		return one(w.dice, pair, pair, pair, pair[:1], pair[1:])
	}
	for i := range 13 {
		pod := &object.Pod{Namespace: one(w.dice, namespaces...), Name: fmt.Sprintf("p%02d", i), Node: "other", Labels: w.labels()}
		pod.Ports = some(w.dice, 3, func() object.Port {
			return object.Port{Name: one(w.dice, portNames...), Protocol: w.protocol(), Number: one(w.dice, numbers...)}
		})
		w.cluster.Pods = append(w.cluster.Pods, pod)
		if i < 6 {
			pod.Node = "here"
			w.attach(pod, i, next)
			continue
		}
		switch known := w.addresses[w.IntN(len(w.addresses))]; {
		case i == 6:
			pod.HostNetwork, pod.IPs = true, w.addresses[:1]
		case i == 7:
			pod.Ended, pod.IPs = true, []netip.Addr{known} // which may be another pod's by now
		case i == 8:
			pod.IPs = []netip.Addr{w.remote(next)} // claimed by two: one of the statuses is old
		default:
			pod.IPs, pod.Terminating = next(), w.chance(4)
		}
	}
	if w.chance(3) { // attached, and no object is known for it
		w.local = append(w.local, policy.Local{Interface: w.link("unknown"), Addresses: next()})
	}
}

// remote returns an address that a pod of another node will have too, or one of a pod of this node.
func (w *world) remote(next func() []netip.Addr) netip.Addr {
	if w.chance(3) && len(w.local[0].Addresses) > 0 {
		return w.local[0].Addresses[0]
	}
	taken := next()
	other := &object.Pod{Namespace: one(w.dice, namespaces...), Name: "twin", Node: "third", Labels: w.labels(), IPs: taken}
	other.Ports = w.cluster.Pods[w.IntN(len(w.cluster.Pods))].Ports
	w.cluster.Pods = append(w.cluster.Pods, other)
	return one(w.dice, taken...)
}

// attach gives a local pod its records.
func (w *world) attach(pod *object.Pod, i int, next func() []netip.Addr) {
	l := policy.Local{Pod: pod, Interface: w.link(pod.Name), Addresses: next(), Ready: true}
	pod.IPs = l.Addresses
	switch i {
	case 2:
		pod.IPs = one(w.dice, nil, next()) // the status lags behind the record
	case 3:
		w.local = append(w.local, policy.Local{Pod: pod, Interface: w.link(pod.Name + " net1"), Addresses: next(), Ready: true})
	case 4:
		pod.Ended = w.chance(2)
		l.Ready = pod.Ended
	case 5:
		if w.chance(2) { // placed here, not attached yet: its address is the former sandbox's
			l.Addresses, l.Ready = nil, false
		}
	}
	w.local = append(w.local, l)
}

func (w *world) link(of string) string {
	return attachment.HostInterface(attachment.GuardedPrefix, of, "eth0")
}

func (w *world) policy(name string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
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

func (w *world) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for range w.IntN(3) {
		key := one(w.dice, "app", "tier")
		e := metav1.LabelSelectorRequirement{Key: key, Operator: one(w.dice, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn,
			metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist, "")}
		switch e.Operator {
		case "":
			s.MatchLabels = map[string]string{key: one(w.dice, values[key]...)}
			continue
		case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
			e.Values = values[key][:1+w.IntN(2)]
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func (w *world) peer() networkingv1.NetworkPolicyPeer {
	switch w.IntN(7) {
	case 0, 1:
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector()}
	case 2, 3:
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: w.selector()}
	case 4:
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector(), NamespaceSelector: w.selector()}
	}
	return networkingv1.NetworkPolicyPeer{IPBlock: w.block()}
}

// block draws a block around an address that packets have, with exceptions around other such addresses.
func (w *world) block() *networkingv1.IPBlock {
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
func (w *world) length(a netip.Addr, least int) int {
	return one(w.dice, least, least, min(least+1, a.BitLen()), a.BitLen(), max(least, a.BitLen()-3), max(least, a.BitLen()-4),
		least+w.IntN(a.BitLen()-least+1))
}

func (w *world) port() networkingv1.NetworkPolicyPort {
	var p networkingv1.NetworkPolicyPort
	if !w.chance(3) {
		protocol := w.protocol()
		p.Protocol = &protocol
	}
	switch number := int32(one(w.dice, numbers...)); w.IntN(6) {
	case 0: // the whole protocol
	case 1, 2:
		port := intstr.FromString(one(w.dice, portNames...))
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
func (w *world) spoil(np *networkingv1.NetworkPolicy) {
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

// packet draws the first packet of a flow, with a pod of this node that is ready at one end at least.
func (w *world) packet() packet {
	var ready []netip.Addr
	for _, l := range w.local {
		if l.Ready {
			ready = append(ready, l.Addresses...)
		}
	}
	p := packet{src: one(w.dice, ready...), port: one(w.dice, numbers...), state: "NEW"}
	if w.chance(4) {
		p.port += one[uint16](w.dice, 1, 65535) // on either side of a range's end
	}
	for !p.dst.IsValid() || rule.FamilyOf(p.dst) != rule.FamilyOf(p.src) {
		p.dst = one(w.dice, w.addresses...)
	}
	if w.chance(2) {
		p.src, p.dst = p.dst, p.src
	}
	p.proto = one(w.dice, rule.TCP, rule.TCP, rule.UDP, rule.SCTP, rule.ICMP)
	p.syn = p.proto == rule.TCP
	if p.proto == rule.ICMP {
		p.port = 0
		if rule.FamilyOf(p.src) == rule.IPv6 {
			p.proto = rule.ICMPv6
		}
	}
	p.in, p.out = w.linkOf(p.src), w.linkOf(p.dst)
	return p
}

// linkOf is the interface that leads to an address.
func (w *world) linkOf(a netip.Addr) string {
	if i := slices.IndexFunc(w.local, func(l policy.Local) bool { return slices.Contains(l.Addresses, a) }); i >= 0 {
		return w.local[i].Interface
	}
	return "eth0"
}

// String is the world as manifests, with the node's records as comments.
func (w *world) String() string {
	var b strings.Builder
	show := func(o any) {
		text, err := yaml.Marshal(o)
		fmt.Fprintf(&b, "---\n%s", text)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	for _, n := range w.cluster.Namespaces {
		show(&corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels}})
	}
	for _, p := range w.cluster.Pods {
		out := &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels},
			Spec:       corev1.PodSpec{NodeName: p.Node, HostNetwork: p.HostNetwork, Containers: []corev1.Container{{Name: "c"}}}}
		for _, port := range p.Ports {
			out.Spec.Containers[0].Ports = append(out.Spec.Containers[0].Ports,
				corev1.ContainerPort{Name: port.Name, Protocol: port.Protocol, ContainerPort: int32(port.Number)})
		}
		for _, ip := range p.IPs {
			out.Status.PodIPs = append(out.Status.PodIPs, corev1.PodIP{IP: ip.String()})
		}
		if p.Ended {
			out.Status.Phase = corev1.PodSucceeded
		}
		show(out)
	}
	for _, np := range w.cluster.Policies {
		show(np)
	}
	for _, l := range w.local {
		name := "nobody known"
		if l.Pod != nil {
			name = l.Pod.Key()
		}
		fmt.Fprintf(&b, "# %s of %s has %v, ready %v\n", l.Interface, name, l.Addresses, l.Ready)
	}
	return b.String()
}
