// Package cni measures what a container runtime waits for: ADD and DEL of a pod, through libcni, each with all its processes,
// with the answer of policyd, and on tmpfs whatever is written.
//
// Three sides take turns, each on a node of its own, a network namespace: postern; the plugins that people chain, ptp with
// host-local and portmap; and a floor, one plugin that does a pod's bare kernel work (e2e/bench/floor). Where the first node gets
// more and more pods, a second one of postern's takes turns with it that stays with few. Pods are IPv4, with a default route.
// Between two calls there is a pause, so that what one leaves for later, in the kernel or in policyd, does not fall on the next.
package cni
