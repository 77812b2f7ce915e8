// Package compile makes rules and sets of the policy model, for one family at a time. It is pure: the same model gives the same
// state, whatever the path that led to it.
//
// All filtering is in table mangle, where a DROP is final whatever other software accepts later in filter:
//
//	FORWARD            jumps to POSTERN-FORWARD first
//	POSTERN-FORWARD    from or to a pod link whose (address, interface) is not ready: drop
//	                   a local pod's address from anywhere else: drop
//	                   established, and ICMP errors of a flow: return, for other software's rules to see
//	                   a new flow from or to an address of this node's range that no pod has: drop
//	                   TCP that opens nothing and belongs to nothing, from or to a pod: drop
//	                   -i pst+ jumps to POSTERN-FROM, then -o pst+ to POSTERN-TO
//	POSTERN-FROM       the dispatch tree over the interfaces of isolated pods; where it ends: not isolated (open set), return; drop
//	POSTERN-FROM-3a    a branch of the tree: the interfaces pst3a…
//	PST-E-3a…          the egress of one isolated pod: a return for each (port, peers) that a policy allows; last, a drop
//	POSTERN-TO, PST-I  the same for ingress
//	INPUT              jumps to POSTERN-INPUT first
//	POSTERN-INPUT      from a pod link, for the node's loopback or with a source that is not the pod's: drop
//
// The tree is entered with goto, so that a return in a pod's chain means "allowed here" and leads back to POSTERN-FORWARD, where
// the other direction is judged. Ready comes before established: no packet of a former owner's flow passes to an address's new
// owner between its link and its guard, and a flushed ready set closes everything.
//
// The drop of new flows of this node's range keeps the addresses that nobody has free of flows, so that a new owner inherits
// none, and nobody needs to look for them while a pod is waiting (reading the flow table takes milliseconds).
//
// A family that no pod of the node has or can get an address of ([policy.Index.Serves]) has the shared chains alone, which drop
// everything, for nobody is ready.
//
// Table filter holds one chain: the acceptance of pod traffic that passed, for hosts whose FORWARD policy is DROP.
//
// What every packet of a flow passes is kept short: each hook costs some 0.1 µs, with nft each match of a module as much, and a
// set of pairs 0.25 to 0.35 µs. So there is nothing in raw, a source is checked once, by the ready set, on the way that the
// packet takes, and no look into a set comes before a match that costs less.
package compile
