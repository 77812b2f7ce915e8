package verify

import (
	networkingv1 "k8s.io/api/networking/v1"
	"slices"

	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
)

// shrink takes away from a world what it can while it still differs: policies, pods, rules, peers, ports, exceptions, labels.
func shrink(w *World, differs func(*World) bool) *World {
	for smaller := true; smaller; {
		smaller = false
		list := cuts(w)
		for i := 0; i < len(list); {
			if less := list[i](); differs(less) {
				w, list, smaller = less, cuts(less), true
			} else {
				i++
			}
		}
	}
	return w
}

// cuts are the ways to take one thing away, the large ones first. None changes the world itself.
func cuts(w *World) []func() *World {
	var list []func() *World
	for i := range w.Cluster.Policies {
		list = append(list, func() *World {
			less := *w
			less.Cluster.Policies = without(w.Cluster.Policies, i)
			return &less
		})
	}
	for _, p := range w.Cluster.Pods {
		list = append(list, func() *World { return replacePod(w, p, nil) })
	}
	for i := range w.Local {
		list = append(list, func() *World {
			less := *w
			less.Local = without(w.Local, i)
			return &less
		})
	}
	for i, np := range w.Cluster.Policies {
		for _, cut := range policyCuts(np) {
			list = append(list, func() *World {
				less := *w
				less.Cluster.Policies = slices.Clone(w.Cluster.Policies)
				less.Cluster.Policies[i] = np.DeepCopy()
				cut(&less.Cluster.Policies[i].Spec)
				return &less
			})
		}
	}
	for i := range w.Cluster.Namespaces {
		list = append(list, func() *World {
			less := *w
			less.Cluster.Namespaces = without(w.Cluster.Namespaces, i)
			return &less
		})
	}
	for _, p := range w.Cluster.Pods {
		for _, less := range podCuts(p) {
			list = append(list, func() *World { return replacePod(w, p, less) })
		}
	}
	return list
}

// policyCuts are the ways to take one thing away from a policy.
func policyCuts(np *networkingv1.NetworkPolicy) []func(*networkingv1.NetworkPolicySpec) {
	type spec = networkingv1.NetworkPolicySpec
	var list []func(*spec)
	for i, r := range np.Spec.Ingress {
		list = append(list, func(s *spec) { s.Ingress = without(s.Ingress, i) })
		for _, cut := range ruleCuts(r.From, r.Ports) {
			list = append(list, func(s *spec) { cut(&s.Ingress[i].From, &s.Ingress[i].Ports) })
		}
	}
	for i, r := range np.Spec.Egress {
		list = append(list, func(s *spec) { s.Egress = without(s.Egress, i) })
		for _, cut := range ruleCuts(r.To, r.Ports) {
			list = append(list, func(s *spec) { cut(&s.Egress[i].To, &s.Egress[i].Ports) })
		}
	}
	if len(np.Spec.PodSelector.MatchLabels)+len(np.Spec.PodSelector.MatchExpressions) > 0 {
		list = append(list, func(s *spec) { s.PodSelector.MatchLabels, s.PodSelector.MatchExpressions = nil, nil })
	}
	return list
}

// ruleCuts are the ways to take a peer, a port or an exception away from a rule, and to let a selector select everything.
func ruleCuts(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) []func(
	*[]networkingv1.NetworkPolicyPeer, *[]networkingv1.NetworkPolicyPort) {
	type (
		peerList = []networkingv1.NetworkPolicyPeer
		portList = []networkingv1.NetworkPolicyPort
	)
	var list []func(*peerList, *portList)
	for i, peer := range peers {
		list = append(list, func(p *peerList, _ *portList) { *p = without(*p, i) })
		if peer.IPBlock != nil {
			for e := range peer.IPBlock.Except {
				list = append(list, func(p *peerList, _ *portList) { (*p)[i].IPBlock.Except = without((*p)[i].IPBlock.Except, e) })
			}
		}
		if s := peer.PodSelector; s != nil && len(s.MatchLabels)+len(s.MatchExpressions) > 0 {
			list = append(list, func(p *peerList, _ *portList) {
				(*p)[i].PodSelector.MatchLabels, (*p)[i].PodSelector.MatchExpressions = nil, nil
			})
		}
		if s := peer.NamespaceSelector; s != nil && len(s.MatchLabels)+len(s.MatchExpressions) > 0 {
			list = append(list, func(p *peerList, _ *portList) {
				(*p)[i].NamespaceSelector.MatchLabels, (*p)[i].NamespaceSelector.MatchExpressions = nil, nil
			})
		}
	}
	for i := range ports {
		list = append(list, func(_ *peerList, p *portList) { *p = without(*p, i) })
	}
	return list
}

// podCuts are a pod with one thing less.
func podCuts(p *object.Pod) []*object.Pod {
	var list []*object.Pod
	cut := func(change func(*object.Pod)) {
		less := *p
		change(&less)
		list = append(list, &less)
	}
	for i := range p.Ports {
		cut(func(less *object.Pod) { less.Ports = without(p.Ports, i) })
	}
	if p.Labels != (object.Labels{}) {
		cut(func(less *object.Pod) { less.Labels = object.Labels{} })
	}
	if p.Terminating {
		cut(func(less *object.Pod) { less.Terminating = false })
	}
	return list
}

// replacePod puts another pod, or with nil none, into the place of one, in the node's records too.
func replacePod(w *World, old, pod *object.Pod) *World {
	out := *w
	out.Cluster.Pods, out.Local = nil, nil
	for _, p := range w.Cluster.Pods {
		if p != old {
			out.Cluster.Pods = append(out.Cluster.Pods, p)
		} else if pod != nil {
			out.Cluster.Pods = append(out.Cluster.Pods, pod)
		}
	}
	for _, l := range w.Local {
		if l.Pod != old {
			out.Local = append(out.Local, l)
		} else if pod != nil {
			out.Local = append(out.Local, policy.Local{Pod: pod, Interface: l.Interface, Addresses: l.Addresses, Ready: l.Ready})
		}
	}
	return &out
}

func without[T any](list []T, i int) []T { return slices.Delete(slices.Clone(list), i, i+1) }
