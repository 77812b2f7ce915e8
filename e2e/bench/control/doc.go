// Package control measures policyd in a large cluster: rows 6 to 12, and how each cost grows with the number of pods.
//
// The cluster is in a real API server (package apiserver), and policyd reads it as it does on a node: over TLS, in protobuf. The
// node's pods are attached by the plugin (package world). Nothing else happens in the cluster.
//
// When policyd has been told of a change is read off the wire: the API server answers policyd on an address of its own, and a
// packet socket notes with the kernel's clock when something arrives from there. When the kernel has a change is seen by asking
// it again and again, with pauses, in a thread of its own: whether an address is in a set, or which generation the tables are of.
// A question takes some µs, and the pauses leave the core to policyd, for there may be only two.
package control
