// Package testnode makes a node out of network namespaces, for tests: the node itself, a machine outside of it that pods can
// reach and be reached from, and pods that the real plugin attaches through libcni, as a container runtime does it. The real
// policyd can run on it, reading a folder of manifests.
//
// A test asks for what it needs and gets a failure with the program's own words when something goes wrong. Everything ends
// with the test: daemons are stopped by their process, pods are taken with their namespaces.
//
//	outside 198.51.100.1 ──uplink── 198.51.100.10 node ──pst…── pods 10.244.1.0/24
//	        2001:db8::1                2001:db8::10                  fd00:10:244:1::/64
package testnode
