package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/object"
)

// anIngressRule has peers by their label app, or by a block, and TCP ports by their number or name.
func anIngressRule(peers, ports string) (r networkingv1.NetworkPolicyIngressRule) {
	for _, p := range strings.Fields(peers) {
		peer := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": p}}}
		if strings.Contains(p, "/") {
			peer = networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: p}}
		}
		r.From = append(r.From, peer)
	}
	for _, p := range strings.Fields(ports) {
		at := intstr.Parse(p)
		r.Ports = append(r.Ports, networkingv1.NetworkPolicyPort{Port: &at})
	}
	return r
}

// Pod "here" listens at the named port "web", 80. One address has two owners, of which one is a and one is b.
func theRulesOfOnePolicy(rules ...networkingv1.NetworkPolicyIngressRule) []Rule {
	pods := map[string]*object.Pod{}
	for name, app := range map[string]string{"here": "", "one": "a", "two": "b", "three": "a", "four": "b"} {
		pods["team/"+name] = &object.Pod{Namespace: "team", Name: name, Labels: object.LabelsOf(map[string]string{"app": app}),
			IPs: []netip.Addr{netip.MustParseAddr(map[string]string{"here": "10.0.0.1", "one": "10.0.0.2", "two": "10.0.0.3",
				"three": "10.0.0.4", "four": "10.0.0.4"}[name])}}
	}
	here := pods["team/here"]
	here.Ports = []object.Port{{Name: "web", Protocol: "TCP", Number: 80}}
	x := NewIndex()
	x.Update(Changes{Changes: object.Changes{Pods: pods, Namespaces: map[string]*object.Namespace{"team": {Name: "team"}},
		Policies: map[string]*networkingv1.NetworkPolicy{"team/p": {ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "p"},
			Spec: networkingv1.NetworkPolicySpec{Ingress: rules}}}},
		Locals: map[string]*Local{"link": {Pod: here, Interface: "link", Addresses: here.IPs}}})
	return x.Local("link").Ingress.Rules
}

func TestWhatAPolicysRulesSayOfOnePortIsOneRule(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rules []networkingv1.NetworkPolicyIngressRule
		want  []string // origin, ports, members, blocks
	}{
		{"the same ports", []networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "80"), anIngressRule("b", "80")},
			[]string{"team/p ingress 0,1 80-80 [10.0.0.2 10.0.0.3] []"}},
		{"some ports are the same", []networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "80 81 80"), anIngressRule("b", "81")},
			[]string{"team/p ingress 0 80-80 [10.0.0.2] []", "team/p ingress 0,1 81-81 [10.0.0.2 10.0.0.3] []"}},
		{"an address of two pods, each of which another rule has, is in neither", // and with one rule for both it is:
			[]networkingv1.NetworkPolicyIngressRule{anIngressRule("a", ""), anIngressRule("b", ""), anIngressRule("a b", "81")},
			[]string{"team/p ingress 0,1 any [10.0.0.2 10.0.0.3] []", "team/p ingress 2 81-81 [10.0.0.2 10.0.0.3 10.0.0.4] []"}},
		{"other ports between them",
			[]networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "80"), anIngressRule("a", "81"), anIngressRule("b", "80")},
			[]string{"team/p ingress 0,2 80-80 [10.0.0.2 10.0.0.3] []", "team/p ingress 1 81-81 [10.0.0.2] []"}},
		{"one of them is for everyone",
			[]networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "80"), anIngressRule("", "80"), anIngressRule("b", "80")},
			[]string{"team/p ingress 0,1,2 80-80 everyone"}},
		{"no ports are not no rule", []networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "web"), anIngressRule("b", "")},
			[]string{"team/p ingress 0 80-80 [10.0.0.2] []", "team/p ingress 1 any [10.0.0.3] []"}},
		{"named ports are the same by name",
			[]networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "web"), anIngressRule("b", "80"), anIngressRule("b", "web")},
			[]string{"team/p ingress 0,2 80-80 [10.0.0.2 10.0.0.3] []", "team/p ingress 1 80-80 [10.0.0.3] []"}},
		{"a name that the pod does not have", []networkingv1.NetworkPolicyIngressRule{anIngressRule("a", "metrics")},
			[]string{"team/p ingress 0 1-0 [10.0.0.2] []"}},
		{"blocks and pods", []networkingv1.NetworkPolicyIngressRule{anIngressRule("192.0.2.0/25", "80"), anIngressRule("b", "80"),
			anIngressRule("192.0.2.128/25", "80")},
			[]string{"team/p ingress 0,1,2 80-80 [10.0.0.3] [192.0.2.0/24]"}},
	} {
		var got []string
		for _, r := range theRulesOfOnePolicy(tt.rules...) {
			text := r.Origin + " any"
			if r.Port != (Port{}) {
				text = fmt.Sprintf("%s %d-%d", r.Origin, r.Port.From, r.Port.To)
			}
			if r.Peers == nil {
				got = append(got, text+" everyone")
				continue
			}
			var members []netip.Addr
			if r.Peers.Pods != nil {
				for _, m := range r.Peers.Pods.Members() {
					members = append(members, m.Addr())
				}
			}
			var blocks []netip.Prefix
			if r.Peers.Blocks != nil {
				blocks = r.Peers.Blocks.Prefixes
			}
			got = append(got, fmt.Sprintf("%s %v %v", text, members, blocks))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
	}
}
