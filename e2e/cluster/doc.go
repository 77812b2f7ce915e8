// Package cluster brings up a Kubernetes cluster on one machine, of real parts and without a container engine: etcd, an API
// server, a controller manager and a scheduler, and nodes that each run containerd, kubelet and kube-proxy. Read in this order it
// also says what a node needs:
//
//	config.go        what can be chosen, and the addresses that follow from it
//	network.go       the nodes' links: one shared, or each behind a router
//	pki.go           certificates and kubeconfigs
//	controlplane.go  etcd, kube-apiserver, kube-controller-manager, kube-scheduler
//	node.go          a node seen from outside: its namespaces, starting, running a command in it, a power cut
//	cgroups.go       its part of the machine's control groups
//	inside.go        a node seen from inside: the first process, which mounts, and starts containerd, kubelet and kube-proxy
//	install.go       postern, from the manifests and the image, as a user installs it
//	cluster.go       all of that in order; taking it down again
//	process.go       the programs that were started, known by process id and start time
//
// The control plane runs in a network namespace named postern-e2e, each node in network, mount, PID, UTS, IPC and cgroup
// namespaces of its own with a /run, /etc, /opt and /var of its own. Callers must run in the network namespace postern-e2e
// (Enter), where nodes, pods and the API server are reached by their addresses. The machine's own namespace, its files outside of
// the cluster's folder, and its kernel-wide settings stay as they are.
package cluster
