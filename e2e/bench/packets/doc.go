// Package packets measures what a guarded node costs the packets of its pods: new connections (rows 13 and 14) and the packets of
// flows that are there (row 15).
//
// Each side is a node in a network namespace of its own, with pods that the plugin attached, and on all but one of them policyd
// has written policies: every pod is isolated, with 20 rules in each direction. The node beside has pods with the same links and
// routes, attached with "policy": "none", and no rules; conntrack is on there too, as it is on every node that translates a
// Service's addresses: one rule in a chain that nobody jumps to turns it on.
//
// Both ends are one thread on one processor: what a pod sends the kernel carries to the other end before the call returns, so
// nothing waits, nothing is woken, and all the time that passes is the packets'. A turn is some tens of milliseconds, and the
// sides alternate, so that what else the machine does falls on all. Each turn begins with no flow in the node's table.
package packets
