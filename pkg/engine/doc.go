// Package engine is policyd at work: it brings together what the cluster says (package cluster) and what is attached (package
// attachment), works out what must be in the kernel (policy, compile), puts it there (dataplane), and tells the plugin when a pod
// is guarded (gate).
//
// One goroutine does it all, pass after pass (loop). Whatever happens (an object changes, a record comes, the plugin asks) only
// asks for a pass; a pass takes in all that has changed by then, so what comes together is handled together, works out what follows
// from that alone, and writes it. A pass that finds nothing to do writes nothing. Nothing at all is written before all objects have
// been read once. What somebody else does to our part of the kernel is noticed (watch, glance) and looked at (repair, and without a
// reason repairRest); the next pass puts it right. Attachments whose container is gone are collected beside all that (collect).
package engine
