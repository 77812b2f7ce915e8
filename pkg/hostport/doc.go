// Package hostport makes ports of the node lead to pods: port mappings to NAT rules ([State], pure), conflicts
// ([Conflicts]), and the steps that ADD and DEL take ([Apply], [Remove]).
//
// What the rules stand on:
//
//   - DNAT alone, in nat PREROUTING and OUTPUT, serves other machines, other pods and the node by its own addresses, and the
//     pod sees the client's address.
//   - From 127.0.0.1 the packet must also leave the node: route_localnet=1 on the pod's host end alone (ip-sysctl), and
//     a source that the pod can answer. From the pod to itself (hairpin) the source must not be the pod's own address.
//     Both are SNAT to the node's address; MASQUERADE picks any global address, and is used only where no other is known.
//   - route_localnet lets pods send to the node's 127.0.0.0/8 (CVE-2020-8558), so a drop in raw PREROUTING comes first. It
//     stands whether or not somebody else has set route_localnet.
//   - IPv6 has no route_localnet: the kernel lets no packet from ::1 leave the node. So what a process sends from there, as it does to
//     [::1] unless told otherwise, is left to the node's own servers; what it sends to [::1] from another address of the node
//     reaches the pod.
//
// The chains POSTERN-HOSTPORT, POSTERN-SNAT (nat) and POSTERN-LOOPBACK (raw) and their hooks are all that is written. They
// are a function of the records of attachments, the same whichever program writes them: without any port mapping they are
// there, and empty but for what closes the loopback. The caller of Apply, Remove, or who writes a State, holds the lock
// attachment.HostPorts.
package hostport
