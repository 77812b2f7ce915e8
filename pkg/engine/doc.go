// Package engine is policyd at work: it brings together what the cluster says (package cluster) and what is attached (package
// attachment), works out what must be in the kernel (policy, compile), puts it there (dataplane), and tells the plugin when a pod
// is guarded (gate).
//
// One goroutine does it all, pass after pass. Whatever happens (an object changes, a record comes, the plugin asks, somebody else
// edits our rules) only asks for a pass; a pass looks at everything as it is by then, so events that come together are handled
// together and none can be handled in a wrong order. A pass that finds nothing to do writes nothing. Nothing at all is written
// before all objects have been read once.
package engine
