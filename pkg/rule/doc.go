// Package rule holds netfilter state as data: tables, chains, rules with their matches and actions, and ipset sets.
//
// It is what the compilers ([github.com/postern-cni/postern/pkg/compile], [github.com/postern-cni/postern/pkg/hostport])
// write and what the packages that touch the kernel (iptables, ipset, dataplane) read. It knows nothing of Kubernetes, runs
// nothing and renders nothing: text for iptables-restore is made in package iptables.
//
// Every value here is comparable or plainly printable, so that a test states the expected kernel state as data, and a
// simulator can walk a packet through it. The words are those of iptables-extensions(8) and ipset(8).
package rule
