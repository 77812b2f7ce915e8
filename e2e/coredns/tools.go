//go:build tools

// Package coredns pins the DNS server of the end-to-end cluster.
package coredns

import _ "github.com/coredns/coredns"
