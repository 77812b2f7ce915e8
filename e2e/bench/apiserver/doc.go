// Package apiserver runs etcd and a kube-apiserver in the namespaces of the calling process, for benchmarks that need an API
// server with a large cluster in it and nothing else of a cluster: no scheduler, no controllers, no kubelet.
//
// What is in the cluster comes from a [Plan]: each object follows from the plan's seed and the object's number alone, so the same
// plan makes the same cluster, and one with more pods has those of the smaller one. Everything is made through the API, by many
// connections' worth of requests at the same time.
//
// A pod of the plan has 4.6 KB as the API server sends it, of which 2.5 KB are managed fields: it is like one that a controller
// made and whose status kubelet wrote.
package apiserver
