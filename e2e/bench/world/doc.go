// Package world is the node of a benchmark: a link to a machine outside, sandboxes, pods that the real plugin attaches through
// libcni as a container runtime does, and policyd as a process, reading a folder of manifests or an API server.
//
//	outside 192.0.2.1 ──uplink── 192.0.2.2 node ──pst…── pods 10.244.0.0/20
//
// It is for a process that is init of namespaces of its own (package isolate): the process's network namespace is the node, and
// all files are on the tmpfs of /run. So nothing here takes away more than a benchmark wants to have taken away.
package world
