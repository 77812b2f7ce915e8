package apiserver

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Plan says what is in a cluster. The first Local pods are on the node of that name and have no address before
// [Server.SetAddresses]; the others are spread over other nodes. Local pods are in the first tenth of the namespaces, which have
// half of the policies.
type Plan struct {
	Seed                       uint64
	Node                       string
	Local                      int
	Pods, Namespaces, Policies int
}

const (
	apps        = 40
	teams       = 20
	podsPerNode = 100
	// Fellows is the number of local pods in the first namespace, where there are as many; they have the label [Fellow].
	Fellows = 10
)

// Labels that whoever measures may count on.
const (
	// Fellow is a label of the first [Fellows] local pods and of no others; its value is "yes".
	Fellow = "bench-fellow"
	// Guest is a label that no pod has to begin with. The first policy lets in, to all pods of the first namespace, pods of any
	// namespace whose Guest is "yes".
	Guest = "bench-guest"
)

var (
	envs  = []string{"prod", "staging", "dev"}
	tiers = []string{"frontend", "backend", "backend", "backend", "cache", "worker", "worker", "batch", "database", "frontend"}
)

// chance is what decides about object number i of a kind.
func (p Plan) chance(kind, i int) *rand.Rand {
	return rand.New(rand.NewPCG(p.Seed<<8|uint64(kind), uint64(i)))
}

const (
	ofPods = iota
	ofPolicies
)

func app(i int) string      { return fmt.Sprintf("app-%02d", i) }
func (p Plan) crowded() int { return max(1, p.Namespaces/10) }

// NamespaceName is the name of namespace i.
func NamespaceName(i int) string { return fmt.Sprintf("ns-%04d", i) }

// Namespace i of the plan.
func (p Plan) Namespace(i int) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: NamespaceName(i), Labels: map[string]string{
		"team": fmt.Sprintf("team-%02d", i%teams), "env": envs[i%len(envs)],
	}}}
}

// Nodes is their number: of the pods' node, and enough for the others.
func (p Plan) Nodes() int { return 1 + (p.Pods-p.Local+podsPerNode-1)/podsPerNode }

func (p Plan) nodeName(i int) string {
	if i == 0 {
		return p.Node
	}
	return fmt.Sprintf("node-%04d", i)
}

func nodeAddress(i int) string { return fmt.Sprintf("172.16.%d.%d", i/250, 1+i%250) }

// podCIDR is the range of a remote node.
func podCIDR(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + i/256), byte(i), 0}), 24)
}

// NodeObject i of the plan; the first is the one with the local pods.
func (p Plan) NodeObject(i int) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: p.nodeName(i), Labels: map[string]string{
		corev1.LabelHostname: p.nodeName(i), corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64",
	}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddress(i)}}
	if i > 0 {
		n.Spec.PodCIDR = podCIDR(i).String()
		n.Spec.PodCIDRs = []string{n.Spec.PodCIDR}
	}
	return n
}

// namespaceOf pod i: local pods fill the first namespace with [Fellows] and go round the crowded ones; others go round all.
func (p Plan) namespaceOf(i int) string {
	switch {
	case i < Fellows && i < p.Local:
		return NamespaceName(0)
	case i < p.Local:
		return NamespaceName(i % p.crowded())
	}
	return NamespaceName(i % p.Namespaces)
}

// PodName is the namespace and the name of pod i.
func (p Plan) PodName(i int) (namespace, name string) {
	r := p.chance(ofPods, i)
	return p.namespaceOf(i), fmt.Sprintf("%s-%08x-%05d", app(r.IntN(apps)), p.hash(i), i)
}

// hash is the one of a ReplicaSet's template: pods of an app in a namespace share it.
func (p Plan) hash(i int) uint32 {
	var sum uint32 = 2166136261
	for _, c := range []byte(p.namespaceOf(i)) {
		sum = (sum ^ uint32(c)) * 16777619
	}
	return sum
}

// RemoteAddress is the one of pod i, which is not local.
func (p Plan) RemoteAddress(i int) netip.Addr {
	i -= p.Local
	a := podCIDR(1 + i/podsPerNode).Addr().As4()
	a[3] = byte(2 + i%podsPerNode)
	return netip.AddrFrom4(a)
}

// PolicyObject i of the plan. Kinds of peers go round; the first policy is the one for [Guest], the second lets in most of the
// cluster's pods.
func (p Plan) PolicyObject(i int) *networkingv1.NetworkPolicy {
	r := p.chance(ofPolicies, i)
	namespace := i / 2 % p.crowded()
	if i%2 == 1 && i > 1 && p.Namespaces > p.crowded() {
		namespace = p.crowded() + i/2%(p.Namespaces-p.crowded())
	}
	policy := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{
		Namespace: NamespaceName(namespace), Name: fmt.Sprintf("policy-%04d", i),
		Labels: map[string]string{"app.kubernetes.io/managed-by": "bench"},
	}}
	switch i {
	case 0:
		policy.Spec = ingress(metav1.LabelSelector{}, ports(r), peer(&metav1.LabelSelector{}, is(Guest, "yes")))
		return policy
	case 1:
		most := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
			{Key: "tier", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"database"}},
			{Key: "tier", Operator: metav1.LabelSelectorOpExists},
		}}
		policy.Spec = ingress(metav1.LabelSelector{}, ports(r), peer(&metav1.LabelSelector{}, most))
		return policy
	}
	selected := metav1.LabelSelector{}
	if i/2 >= p.crowded() { // the first policy of a namespace selects all of its pods
		selected = *is("tier", tiers[r.IntN(len(tiers))])
	}
	policy.Spec = ingress(selected, ports(r), peers(r, i)...)
	if r.IntN(4) == 0 {
		policy.Spec.PolicyTypes = append(policy.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		policy.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: peers(r, i+1), Ports: ports(r)}, {Ports: dns()}}
	}
	return policy
}

// peers of policy i, of one to three kinds.
func peers(r *rand.Rand, i int) []networkingv1.NetworkPolicyPeer {
	var list []networkingv1.NetworkPolicyPeer
	for k := range 1 + r.IntN(3) {
		switch (i/2 + k) % 5 {
		case 0, 1:
			list = append(list, peer(nil, is("app", app(r.IntN(apps)))))
		case 2:
			list = append(list, peer(is("team", fmt.Sprintf("team-%02d", r.IntN(teams))), nil))
		case 3:
			list = append(list, peer(is("env", envs[r.IntN(len(envs))]), is("app", app(r.IntN(apps)))))
		case 4:
			block := netip.AddrFrom4([4]byte{192, 168, byte(r.IntN(16) * 16), 0})
			list = append(list, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{
				CIDR: netip.PrefixFrom(block, 20).String(), Except: []string{netip.PrefixFrom(block.Next(), 24).Masked().String()}}})
		}
	}
	return list
}

func peer(namespaces, pods *metav1.LabelSelector) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{NamespaceSelector: namespaces, PodSelector: pods}
}

func is(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

func ingress(
	selected metav1.LabelSelector, ports []networkingv1.NetworkPolicyPort, from ...networkingv1.NetworkPolicyPeer,
) networkingv1.NetworkPolicySpec {
	return networkingv1.NetworkPolicySpec{
		PodSelector: selected, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{From: from, Ports: ports}},
	}
}

func ports(r *rand.Rand) []networkingv1.NetworkPolicyPort {
	var list []networkingv1.NetworkPolicyPort
	tcp := corev1.ProtocolTCP
	for range 1 + r.IntN(2) {
		number := intstr.FromInt32([]int32{80, 443, 8080, 5432, 6379, 9090}[r.IntN(6)])
		list = append(list, networkingv1.NetworkPolicyPort{Protocol: &tcp, Port: &number})
	}
	return list
}

func dns() []networkingv1.NetworkPolicyPort {
	udp, tcp, port := corev1.ProtocolUDP, corev1.ProtocolTCP, intstr.FromInt32(53)
	return []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &port}, {Protocol: &tcp, Port: &port}}
}
