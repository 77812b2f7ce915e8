// Package latency measures how long a change in the API takes until a pod sees it: from right before the call to the first
// connection that shows it, of a pod that tries all the time (row 16).
//
// Two clusters run at the same time, a large one and an empty one, each with an API server, etcd, policyd and pods in namespaces
// of its own, and take turns. The benchmark's own process starts the two sides and tells each when to measure; see [Bench],
// [Large] and [Empty].
//
// A try is one SYN, sent over a raw socket, to a port on which nobody listens: where policies let it pass, the other pod's kernel
// refuses it at once, and where they do not, nothing comes back. Nothing waits for a try, so there is one every 200 µs, and that
// is how far the time of a change is known.
package latency
