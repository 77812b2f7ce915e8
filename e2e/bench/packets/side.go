package packets

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/e2e/bench/world"
)

const (
	namespace   = "team"
	rules       = 20              // of each pod and direction
	pairs       = 5               // on a node with as many pods
	port        = 8080            // at which the server listens
	goneLimit   = 5 * time.Minute // for the kernel to take away the links of removed sandboxes
	clientPorts = "1024 65535"    // more than the connections of a turn
)

// side is one node, some pods of which are measured.
type side struct {
	pods    int
	guarded bool
	node    *world.Node
	policyd *world.Policyd // nil if it is not guarded

	boxes []world.Pod
	pairs []pair
	rates map[string][]float64 // by kind of load; those that are not there are not measured
}

// pair is measured. There are several, which take turns: how fast one is depends a little on where in memory the kernel has put
// what it needs for it, and on every side that is another place.
type pair struct{ client, server pod }

type pod struct {
	netns string
	addr  netip.Addr
}

// newSide makes a node with its pods, and returns when everything is in force.
func newSide(ctx context.Context, first *world.Node, pods int, guarded bool) (*side, error) {
	name := fmt.Sprintf("bare-%d", pods)
	if guarded {
		name = fmt.Sprintf("guarded-%d", pods)
	}
	node, err := first.Beside(ctx, name)
	if err != nil {
		return nil, err
	}
	s := &side{pods: pods, guarded: guarded, node: node, rates: map[string][]float64{}}
	for i := range pods {
		s.boxes = append(s.boxes, newPod(name, i))
	}
	if guarded {
		err = s.guard(ctx)
	} else {
		err = s.bare(ctx)
	}
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.Addr, pods)
	err = world.Each(pods, func(i int) error {
		all, err := node.Attach(ctx, s.boxes[i])
		if err == nil {
			addrs[i] = all[0]
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for i := 0; i+1 < pods && len(s.pairs) < pairs; i += 2 {
		p := pair{pod{s.boxes[i].Path(), addrs[i]}, pod{s.boxes[i+1].Path(), addrs[i+1]}}
		s.pairs = append(s.pairs, p)
		err = errors.Join(err, world.In(p.client.netns, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(clientPorts), 0o644)
		}))
	}
	if guarded {
		err = errors.Join(err, s.policyd.Settle(ctx))
	}
	return s, err
}

// newPod is a client if its number is even and one of the first, a server if it is odd, else a peer that some rules admit.
func newPod(node string, number int) world.Pod {
	app := fmt.Sprintf("app-%d", number%rules)
	if number < 2*pairs {
		app = []string{"client", "server"}[number%2]
	}
	name := fmt.Sprintf("pod-%d", number)
	return world.Pod{Namespace: namespace, Name: name, Labels: map[string]string{"app": app}, Box: node + "-" + name}
}

// guard writes the cluster and starts policyd.
func (s *side) guard(ctx context.Context) (err error) {
	list := struct {
		metav1.TypeMeta `json:",inline"`
		Items           []any `json:"items"`
	}{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "List"}}
	list.Items = append(list.Items, &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: namespace}}, everybodysPolicy())
	for _, p := range s.boxes {
		list.Items = append(list.Items, p.Object())
	}
	if err := s.node.Write("cluster", list); err != nil {
		return err
	}
	if s.policyd, err = s.node.StartPolicyd(ctx); err != nil {
		return err
	}
	return s.policyd.Settle(ctx)
}

// everybodysPolicy isolates all pods in both directions. Of the rules each has a peer of its own, and every other one the
// server's port; the last one lets client and server talk.
func everybodysPolicy() *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "everybody"},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"}}}
	add := func(from, to string, ports ...networkingv1.NetworkPolicyPort) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peer(from), Ports: ports})
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peer(to), Ports: ports})
	}
	for i := range rules - 2 {
		number := port
		if i%2 == 1 {
			number = 9000 + i
		}
		app := fmt.Sprintf("app-%d", i)
		add(app, app, portOf(corev1.ProtocolTCP, number))
	}
	add("client", "server", portOf(corev1.ProtocolUDP, port), portOf(corev1.ProtocolTCP, port)) // two rules of iptables
	return p
}

func peer(app string) []networkingv1.NetworkPolicyPeer {
	return []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}}
}

func portOf(protocol corev1.Protocol, number int) networkingv1.NetworkPolicyPort {
	at := intstr.FromInt(number)
	return networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &at}
}

// bare has the plugin attach pods without a guard, and turns conntrack on.
func (s *side) bare(ctx context.Context) (err error) {
	if s.node.Postern, err = s.node.Network(s.node.Path(), s.node.Config(map[string]any{"policy": "none"})); err != nil {
		return err
	}
	return s.node.In(func() error {
		return world.Run(ctx, `
iptables-nft -N conntrack
iptables-nft -A conntrack -m conntrack --ctstate NEW`)
	})
}

// end takes the side away.
func (s *side) end(ctx context.Context) (err error) {
	if s.policyd != nil {
		err = s.policyd.Stop()
	}
	for _, p := range s.boxes {
		err = errors.Join(err, s.node.RemoveSandbox(p.Sandbox()))
	}
	return errors.Join(err, s.node.Quiet(ctx, goneLimit))
}
