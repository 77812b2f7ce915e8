// Package podlink wires a pod to its node: a veth pair, point to point, no bridge.
//
//	pod                                     node
//	eth0  10.244.1.5/32, fd00::5/128        pst…  fe80::1/64, and no IPv4 address
//	  default via 169.254.1.1 ─┐              10.244.1.5/32 dev pst… src NODE
//	  default via fe80::1 ─────┴─ host MAC    10.244.1.5 lladdr POD MAC permanent
//
// The gateway is an address that nobody else has on the link (RFC 3927, RFC 4291), and both ends know each other's MAC, so no
// ARP or neighbour discovery happens on the way of a packet, and no duplicate-address detection delays the first one. All
// traffic of a pod is routed and passes FORWARD once.
//
// What the kernel makes of a link is settled before the link goes up, on the node's end:
//
//   - Both MACs are given at creation, or udev rewrites them. The link's alias (ifalias) is the container ID and the
//     pod's interface, "ID@eth0": DEL of an old sandbox leaves the new one's link alone.
//   - accept_ra, accept_redirects and send_redirects are 0, and IPv6 is off where the pod has none: with default.accept_ra=2 a
//     pod's router advertisement would set the node's default route. rp_filter is 1; where all.rp_filter is 2 the kernel takes
//     the larger value, and IPv6 has no such thing: it is policyd's rules in mangle that drop forged sources.
//   - The node's end has no IPv4 address: with one, strict reverse path would accept more than the pod's own.
//   - What somebody else takes away of all this the kernel announces, mostly, before the command that did it has ended
//     ([Watcher]), and [Restore] puts it back; [Faulty] looks at all links at once. Routes that go with the node's own address,
//     or with a link that is set down, go without a word of their own.
//   - Removing a veth takes 15 to 18 ms (RCU), its name is free at once.
package podlink
