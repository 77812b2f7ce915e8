// Package nodenet connects the pods of different nodes: routes to the other nodes' pod CIDRs, a VXLAN tunnel where nodes do not
// share a link, masquerading of what leaves the cluster, and the configuration by which the container runtime finds the plugin.
//
// It has a pure core: [NewPlan] works out, from this node, the other nodes and what the kernel says of its own links ([Facts]),
// the wanted devices, routes and rules ([State]). Thin edges make it so: [Look] reads, [Wire] writes links and routes, package
// dataplane the rules (scope dataplane.Nodes), package nodefiles the runtime's files. [Daemon] does all that again when a node
// changes or somebody else has changed the kernel. Nothing here judges what pods may do: that is policy's.
//
// # Routes
//
// Nodes share a link where the routing table has the other node's address on a link without a router in between, and the link
// is one on which neighbours are asked for (no point-to-point link). Then the other node's pods are routed by its address, with
// this node's address as the source of what the node itself sends. Our routes carry protocol number [Protocol] and metric
// [Metric], by which they are told from others' (rtnetlink(7), rtm_protocol); a route of somebody else's for the same destination
// has mostly a smaller metric and so precedes. The node's own pod CIDR is unreachable but for the pods that are there, so that a
// packet for a pod that is gone does not go out by the default route and come back, round and round.
//
// # Tunnel
//
// VXLAN (RFC 7348) over UDP port 8472, the kernel's default: 4789, IANA's, is what hypervisors' own networks listen on, and some
// take such packets out of their guests' traffic. One device a family of the addresses that nodes reach each other by; both
// families of pods go through either. Every other node has a static forwarding entry and a static neighbour, which is the first
// address of its pod CIDR after the network's own: the ipam gives it to no pod, the other node's device holds it, and it is the
// source of what the node itself sends to remote pods. A policy that admits a node through the tunnel has this address in its
// ipBlock; without the tunnel it is the node's address.
//
// The tunnel is no way in:
//
//   - Pods can send nothing to the tunnel's port of any machine, and nobody reaches it by a translated address (a Service whose
//     endpoint is a node): dropped in mangle INPUT and FORWARD, where destinations are final.
//   - In INPUT, UDP to that port comes from the address of a node or is dropped. A pod's packet is dropped whatever its source.
//   - The source of a packet inside belongs to the pod CIDRs of the node that sent it. Two checks together say so. The kernel
//     refuses a known Ethernet source from any other outer address than that of its static entry, if the device learns
//     (vxlan_snoop: "Don't migrate static entries, drop packets"); and raw PREROUTING drops what does not have the Ethernet
//     source of the node that the inner address belongs to. So learning is on, for its refusal, and what it learns is never used.
//
// What is left: who can send packets with a node's address as their source from outside, on a network that does not prevent
// it, can speak for that node. Against that there are only encrypted networks.
//
// # Masquerade
//
// What pods send to a destination outside leaves with the node's address: outside are all addresses but the nodes' pod CIDRs, a
// list of the administrator's, and, without the tunnel, the nodes' own addresses. With the tunnel, a remote node sees this node's
// address, for its answer to a pod would go through the tunnel with a source that is not of its pod CIDR. Never is anything
// masqueraded from pod to pod, so policies judge real addresses.
package nodenet
