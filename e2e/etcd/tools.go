//go:build tools

// Package etcd pins the release of etcd behind the API server of the benchmarks: Debian's is too old for an API server to stream
// lists to its clients (they fall back to one long answer), which any etcd that Kubernetes asks for today can.
package etcd

import _ "go.etcd.io/etcd/server/v3"
