// Package attach does what the CNI specification asks of a plugin: ADD, DEL, CHECK, STATUS and GC. It holds the order of the
// steps and their undoing; each step itself is another package's.
//
// ADD: locks, a connection to policyd, addresses, the record, a word to policyd, the link, host ports, policyd's word that the
// pod is guarded.
// The record comes before the kernel is touched, so that DEL and GC find whatever a killed ADD leaves. The connection to
// policyd comes before the link, since a link is closed only as long as policyd's rules are in force.
//
// DEL: the ready entry, the link and host ports at the same time, flows, the record, and the addresses last. It needs the
// container ID and the interface name alone; every part may be missing, and what belongs to another container stays.
package attach
