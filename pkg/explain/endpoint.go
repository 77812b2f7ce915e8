package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/object"
)

// Endpoint is one end of a connection.
type Endpoint struct {
	// Pods have the address; none for an address outside of the cluster. Of several, all must be admitted.
	Pods []*object.Pod
	// Address is invalid for a pod that has none yet: then no address block holds it.
	Address netip.Addr
	// Node is true for the node's own address: between a node and its own pods everything passes.
	Node bool
}

// String names the end for people: "shop/db (10.244.1.4)".
func (e Endpoint) String() string {
	var names []string
	for _, p := range e.Pods {
		names = append(names, p.Key())
	}
	switch {
	case len(names) == 0 && e.Node:
		return fmt.Sprintf("%s (the node)", e.Address)
	case len(names) == 0:
		return e.Address.String()
	case !e.Address.IsValid():
		return names[0] + " (no address yet)"
	}
	return fmt.Sprintf("%s (%s)", strings.Join(names, " and "), e.Address)
}

// Find returns what a text means, "NAMESPACE/POD" or an IP address: one endpoint for each address. node are the node's own
// addresses; it may be empty.
func Find(c object.Cluster, text string, node []netip.Addr) ([]Endpoint, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return []Endpoint{At(c, a.Unmap(), node)}, nil
	}
	i := slices.IndexFunc(c.Pods, func(p *object.Pod) bool { return p.Key() == text })
	if i < 0 {
		return nil, fmt.Errorf("%q: no such pod, and not an IP address; name a pod as NAMESPACE/POD", text)
	}
	pod := c.Pods[i]
	switch {
	case pod.Ended:
		return nil, fmt.Errorf("pod %s has ended: it has no address any more", text)
	case len(pod.IPs) == 0:
		return []Endpoint{{Pods: []*object.Pod{pod}}}, nil
	}
	var ends []Endpoint
	for _, a := range pod.IPs {
		ends = append(ends, At(c, a, node))
	}
	return ends, nil
}

// At returns the endpoint that has an address. Pods on the host network are their node, and ended pods have no address.
func At(c object.Cluster, a netip.Addr, node []netip.Addr) Endpoint {
	e := Endpoint{Address: a, Node: slices.Contains(node, a) || a.IsLoopback()}
	for _, p := range c.Pods {
		if !p.Ended && !p.HostNetwork && slices.Contains(p.IPs, a) {
			e.Pods = append(e.Pods, p)
		}
	}
	return e
}

// Between answers for two ends as [Find] reads them: once for each family that both have.
func Between(
	c object.Cluster, from, to string, protocol corev1.Protocol, port uint16, node []netip.Addr,
) ([]Answer, error) {
	sources, err := Find(c, from, node)
	dests, err2 := Find(c, to, node)
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	var answers []Answer
	for _, s := range sources {
		for _, d := range dests {
			if !s.Address.IsValid() || !d.Address.IsValid() || s.Address.Is4() == d.Address.Is4() {
				answers = append(answers, Explain(c, Query{From: s, To: d, Protocol: protocol, Port: port}))
			}
		}
	}
	if len(answers) == 0 {
		return nil, fmt.Errorf("%s and %s have no address of one family", from, to)
	}
	return answers, nil
}
