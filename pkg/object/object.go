// Package object holds the few fields of Pods, Namespaces and Nodes that postern reads, and the cluster as one value.
//
// Package cluster fills these from an API server or a folder of manifests and drops everything else, so that a remote pod
// costs a few hundred bytes. Packages policy and explain read them, Nodes package nodenet. NetworkPolicies are kept as the API's
// own type.
// Values are immutable once handed out: whoever sees a change makes a new one.
package object

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// Pod is what matters of a Pod.
type Pod struct {
	Namespace, Name string
	// UID is metadata.uid; empty only for pods from manifests that give none.
	UID string
	// Mirror is the value of the annotation kubernetes.io/config.mirror: a static pod's identity on its node, which is what
	// the runtime passes as K8S_POD_UID for it.
	Mirror string
	// Node is spec.nodeName.
	Node   string
	Labels Labels
	// IPs are status.podIPs (at most one of each family), in the API's order.
	IPs   []netip.Addr
	Ports []Port
	// HostNetwork pods are no peers and are not selected: their traffic is their node's.
	HostNetwork bool
	// Ended is true for phases Succeeded and Failed: such a pod has no address any more, whatever its status shows.
	Ended bool
	// Terminating is true once metadata.deletionTimestamp is set. The pod still has its address.
	Terminating bool
}

// Port is a named container port: of a container or of a restartable init container (sidecar).
type Port struct {
	Name     string
	Protocol corev1.Protocol // TCP, UDP or SCTP; never empty
	Number   uint16
}

// Identity is the string that names the pod's host interface (see attachment.HostInterface): the mirror annotation, else the
// UID, else "namespace/name".
func (p *Pod) Identity() string {
	switch {
	case p.Mirror != "":
		return p.Mirror
	case p.UID != "":
		return p.UID
	}
	return p.Namespace + "/" + p.Name
}

// Key returns "namespace/name".
func (p *Pod) Key() string { return p.Namespace + "/" + p.Name }

// Namespace is what matters of a Namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Node is what matters of a Node.
type Node struct {
	Name string
	// Addresses are those of status.addresses with the type InternalIP, in the API's order: how other nodes reach it.
	Addresses []netip.Addr
	// PodCIDRs are spec.podCIDRs (at most one of each family), host bits zero: the addresses of its pods.
	PodCIDRs []netip.Prefix
}

// Cluster is the state of the world at one moment, each list sorted by namespace and name.
type Cluster struct {
	Pods       []*Pod
	Namespaces []*Namespace
	Policies   []*networkingv1.NetworkPolicy
	Nodes      []*Node
}

// PolicyKey returns a NetworkPolicy's "namespace/name".
func PolicyKey(np *networkingv1.NetworkPolicy) string { return np.Namespace + "/" + np.Name }

// Changes are objects that are new, other than they were, or gone (nil): Pods and Policies by "namespace/name",
// Namespaces and Nodes by name.
type Changes struct {
	Pods       map[string]*Pod
	Namespaces map[string]*Namespace
	Policies   map[string]*networkingv1.NetworkPolicy
	Nodes      map[string]*Node
}
