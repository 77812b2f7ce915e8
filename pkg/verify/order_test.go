package verify

import (
	"net/netip"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/object"
)

// lookingEverywhere looks at the kernel before every step of the engine.
func lookingEverywhere() *saboteur {
	return &saboteur{step: func(w *walker, _ string) error {
		w.last, w.lookIn = "", 1
		return nil
	}}
}

// twoPods makes two pods of this node, and a policy.
func twoPods(np *networkingv1.NetworkPolicy) step {
	s := step{records: map[attachment.Key]*attachment.Attachment{}, chance: 1}
	s.Pods = map[string]*object.Pod{}
	s.Namespaces = map[string]*object.Namespace{"a": {Name: "a"}}
	for i, name := range []string{"client", "server"} {
		p := &object.Pod{Namespace: "a", Name: name, Node: thisNode, Labels: object.LabelsOf(map[string]string{"app": name})}
		s.Pods[p.Key()] = p
		a := &attachment.Attachment{Version: 1, ContainerID: name, IfName: "eth0", NetNS: "/proc/self/ns/net",
			Pod: attachment.Pod{Namespace: "a", Name: name}, Policy: attachment.PolicyEnforce,
			Addresses: []netip.Addr{addressPair(i)[0]}, Created: time.Unix(1, 0), HostInterface: hostInterface(p.Identity(), "eth0")}
		s.records[a.Key()] = a
	}
	return withPolicy(s, np)
}

func withPolicy(s step, np *networkingv1.NetworkPolicy) step {
	s.Policies = map[string]*networkingv1.NetworkPolicy{object.PolicyKey(np): np}
	return s
}

func policyOf(types ...networkingv1.PolicyType) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"},
		Spec: networkingv1.NetworkPolicySpec{PolicyTypes: types}}
}

// While a policy changes, no packet passes of which the sender is judged as before and the receiver as after, or the other way
// round.
func TestTheTwoEndsOfAPacketChangeTogether(t *testing.T) {
	closed := policyOf(networkingv1.PolicyTypeIngress)
	other := policyOf(networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress)
	other.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
	mirrored := policyOf(networkingv1.PolicyTypeEgress)
	back := policyOf(networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress)
	back.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{}}
	for _, c := range []struct {
		name          string
		before, after *networkingv1.NetworkPolicy
	}{
		{"ingress is opened, egress closed that no policy spoke of", closed, other},
		{"egress is opened, ingress closed that no policy spoke of", mirrored, back},
		{"ingress is given up, egress closed", closed, mirrored},
		{"egress is given up, ingress closed", mirrored, closed},
		{"both are given up for the other", other, closed},
	} {
		t.Run(c.name, func(t *testing.T) {
			nettest.Backends(t, func(t *testing.T, backend string) {
				steps := []step{twoPods(c.before), withPolicy(step{chance: 2}, c.after)}
				got, err := takeWalk(iptables.Backend(backend), steps, lookingEverywhere())
				if err != nil || got.Found != "" {
					t.Errorf("%v %s", err, got.Found)
				}
			})
		})
	}
}
