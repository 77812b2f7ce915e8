package cni

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/e2e/bench/world"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/rule"
)

const (
	namespaces = 10 // of the API, in each five apps, so that pods are selected by some policies and peers of others
	apps       = 5
	spares     = 10 // the pods that are measured, by turns: each has its sandbox, and waits in the API to be started
	floorSet   = "floor"
)

// build makes the nodes and starts policyd on ours.
func (b *bench) build(ctx context.Context) (err error) {
	if b.node, err = world.New(ctx, b.env, b.env.Backends[0]); err != nil {
		return err
	}
	if err := write(b.node); err != nil {
		return err
	}
	b.ours = &side{name: "postern", node: b.node, network: b.node.Postern, guarded: true}
	if b.theirs, err = b.elsewhere("peer", ptp()); err != nil {
		return err
	}
	if b.theirsPorts, err = b.elsewhere("peer", ptp(), portmap()); err != nil {
		return err
	}
	if b.floor, err = b.elsewhere("floor", map[string]any{"type": "floor"}); err != nil {
		return err
	}
	b.floor.args = floorArgs
	if err := world.In(world.SandboxPath("node-floor"), makeFloorSet); err != nil {
		return err
	}
	if b.wants(5) {
		if err := b.buildFew(ctx); err != nil {
			return err
		}
	}
	return b.guard(ctx, b.node)
}

// buildFew makes a further node of ours, which stays with as many pods as there are at the first level of row 5.
func (b *bench) buildFew(ctx context.Context) error {
	node, err := b.node.Beside(ctx, "few")
	if err != nil {
		return err
	}
	b.few = &side{name: "few", node: node, network: node.Postern, guarded: true}
	if err := write(node); err != nil {
		return err
	}
	return b.guard(ctx, node)
}

// guard starts policyd on a node.
func (b *bench) guard(ctx context.Context, n *world.Node) error {
	d, err := n.StartPolicyd(ctx)
	if err != nil {
		return err
	}
	b.policyds = append(b.policyds, d)
	return d.Settle(ctx)
}

// elsewhere is a side with a network namespace of its own for a node, so that no side sees the others' links come and go.
func (b *bench) elsewhere(name string, plugins ...map[string]any) (*side, error) {
	node, err := b.node.Sandbox("node-" + name)
	if err != nil {
		return nil, err
	}
	network, err := b.node.Network(node, world.List(name, plugins...))
	if err != nil {
		return nil, err
	}
	s := &side{name: name, node: b.node, network: network}
	return s, world.In(node, func() error { // the source of the floor's routes
		return world.Run(context.Background(), "ip addr replace "+world.NodeAddress.String()+"/32 dev lo")
	})
}

// ptp does postern's job by upstream's means: a veth pair, point to point, with one address and a default route.
func ptp() map[string]any {
	return map[string]any{"type": "ptp", "mtu": 1500, "ipMasq": false, "ipam": map[string]any{
		"type": "host-local", "dataDir": "/run/host-local",
		"ranges": [][]map[string]any{{{"subnet": world.PodRange.String()}}},
		"routes": []map[string]any{{"dst": "0.0.0.0/0"}},
	}}
}

func portmap() map[string]any {
	return map[string]any{"type": "portmap", "capabilities": map[string]any{"portMappings": true}}
}

// floorArgs tell the floor what postern finds out. Each spare has an address of its own.
func floorArgs(number int) [][2]string {
	addr := world.PodRange.Addr().As4()
	addr[3] = byte(10 + number)
	return [][2]string{{"ADDRESS", fmt.Sprintf("%d.%d.%d.%d", addr[0], addr[1], addr[2], addr[3])},
		{"NODE_ADDRESS", world.NodeAddress.String()}, {"SET", floorSet}}
}

func makeFloorSet() error {
	sets, err := ipset.Open()
	if err != nil {
		return err
	}
	defer sets.Close()
	return sets.Create(rule.Set{Name: floorSet, Type: rule.HashNetIface, Family: rule.IPv4}, 0)
}

// pod number i of the cluster; of a kind, "pod" or "spare".
func pod(kind string, i int) world.Pod {
	return world.Pod{Namespace: fmt.Sprintf("team-%d", i%namespaces), Name: fmt.Sprintf("%s-%d", kind, i),
		Labels: map[string]string{"app": fmt.Sprintf("app-%d", i/namespaces%apps)}}
}

// spare pod number i, with two ports of the node if they are asked for.
func spare(i int, ports bool) world.Pod {
	p := pod("spare", i)
	if ports {
		host := uint16(20000 + i)
		p.Ports = []world.Port{{Host: host, Container: 80, Protocol: "tcp"}, {Host: host, Container: 53, Protocol: "udp"}}
	}
	return p
}

// write writes what does not change in a node's cluster: namespaces, policies, and the spare pods.
func write(node *world.Node) error {
	for n := range namespaces {
		name := fmt.Sprintf("team-%d", n)
		if err := node.Write("namespace-"+name, &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"team": fmt.Sprint(n)}}}); err != nil {
			return err
		}
		for _, p := range []*networkingv1.NetworkPolicy{ingress(n), egress(n)} {
			if err := node.Write("policy-"+name+"-"+p.Name, p); err != nil {
				return err
			}
		}
	}
	for i := range spares {
		if err := node.Write(fmt.Sprintf("spare-%d", i), spare(i, false).Object()); err != nil {
			return err
		}
	}
	return nil
}

// ingress admits to a team's pods those of the team's first app, and those of the next team, each on a port.
func ingress(team int) *networkingv1.NetworkPolicy {
	next := labelled("team", fmt.Sprint((team+1)%namespaces))
	return policy(team, "ingress", networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: labelled("app", "app-0")}}, Ports: ports(corev1.ProtocolTCP, 80)},
			{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: next}}, Ports: ports(corev1.ProtocolTCP, 8080)},
		},
	})
}

// egress lets a team's pods reach each other, names, and a network outside.
func egress(team int) *networkingv1.NetworkPolicy {
	outside := &networkingv1.IPBlock{CIDR: "192.0.2.0/24", Except: []string{"192.0.2.128/25"}}
	return policy(team, "egress", networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{
			{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}},
			{Ports: ports(corev1.ProtocolUDP, 53)},
			{To: []networkingv1.NetworkPolicyPeer{{IPBlock: outside}}, Ports: ports(corev1.ProtocolTCP, 443)},
		},
	})
}

func policy(team int, name string, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprintf("team-%d", team), Name: name}, Spec: spec}
}

func labelled(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

func ports(protocol corev1.Protocol, number int32) []networkingv1.NetworkPolicyPort {
	port := intstr.FromInt32(number)
	return []networkingv1.NetworkPolicyPort{{Protocol: &protocol, Port: &port}}
}
