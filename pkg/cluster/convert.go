package cluster

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/object"
)

// toPod keeps of a Pod what matters.
func toPod(p *corev1.Pod) *object.Pod {
	var podIPs []string
	for _, ip := range p.Status.PodIPs {
		podIPs = append(podIPs, ip.IP)
	}
	return &object.Pod{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID),
		Mirror: p.Annotations[corev1.MirrorPodAnnotationKey],
		Node:   p.Spec.NodeName, Labels: object.LabelsOf(p.Labels),
		IPs: addresses(podIPs, p.Status.PodIP), Ports: ports(&p.Spec),
		HostNetwork: p.Spec.HostNetwork,
		Ended:       ended(p.Status.Phase),
		Terminating: p.DeletionTimestamp != nil,
	}
}

func ended(phase corev1.PodPhase) bool {
	return phase == corev1.PodSucceeded || phase == corev1.PodFailed
}

// addresses reads status.podIPs, or status.podIP where there are none.
func addresses(podIPs []string, podIP string) []netip.Addr {
	if len(podIPs) == 0 {
		podIPs = []string{podIP}
	}
	var list []netip.Addr
	for _, text := range podIPs {
		if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" && !slices.Contains(list, a.Unmap()) {
			list = append(list, a.Unmap())
		}
	}
	return list
}

// ports lists the named ports of containers and of init containers that stay (sidecars).
func ports(s *corev1.PodSpec) []object.Port {
	var list []object.Port
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			list = withPort(list, p.Name, p.Protocol, p.ContainerPort)
		}
	}
	for i := range s.Containers {
		add(&s.Containers[i])
	}
	for i := range s.InitContainers {
		if r := s.InitContainers[i].RestartPolicy; r != nil && *r == corev1.ContainerRestartPolicyAlways {
			add(&s.InitContainers[i])
		}
	}
	return list
}

// withPort adds a port of a container to a list, if it has a name.
func withPort(list []object.Port, name string, protocol corev1.Protocol, number int32) []object.Port {
	if name == "" || number < 1 || number > 65535 {
		return list
	}
	if protocol == "" {
		protocol = corev1.ProtocolTCP
	}
	return append(list, object.Port{Name: name, Protocol: protocol, Number: uint16(number)})
}

// toNode keeps of a Node what other nodes reach it and its pods by.
func toNode(n *corev1.Node) *object.Node {
	out := &object.Node{Name: n.Name}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if addr, err := netip.ParseAddr(a.Address); err == nil && !slices.Contains(out.Addresses, addr.Unmap()) {
			out.Addresses = append(out.Addresses, addr.Unmap())
		}
	}
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for _, text := range cidrs {
		if p, err := netip.ParsePrefix(text); err == nil && !p.Addr().Is4In6() && !slices.Contains(out.PodCIDRs, p.Masked()) {
			out.PodCIDRs = append(out.PodCIDRs, p.Masked())
		}
	}
	return out
}

func toNamespace(n *corev1.Namespace) *object.Namespace {
	return &object.Namespace{Name: n.Name, Labels: n.Labels}
}

// toPolicy keeps name and spec.
func toPolicy(p *networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Generation: p.Generation},
		Spec:       p.Spec,
	}
}
