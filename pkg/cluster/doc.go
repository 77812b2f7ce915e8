// Package cluster is where Pods, Namespaces, NetworkPolicies and Nodes come from: an API server ([FromAPI]) or, without any
// cluster, a folder of manifests ([FromFolder]). Both keep only what postern reads (package object) and are the same to
// their user: objects may be used once [Source.Synced], and [Source.Changes] says when to look again.
package cluster

import (
	"context"

	"github.com/postern-cni/postern/pkg/object"
)

// Source is what FromAPI and FromFolder return.
type Source interface {
	// Run keeps the objects up to date until the context ends; it returns an error only where it cannot work at all.
	Run(ctx context.Context) error
	// Changes receives a value after a change; several changes may be one value. The first of a quiet time is told at once, and one
	// that follows others closely up to a tenth of a second later.
	Changes() <-chan struct{}
	// Synced is false until everything has been read once. Before that, nothing may be concluded from what is missing.
	Synced() bool
	// Snapshot returns the objects as they are now.
	Snapshot() object.Cluster
	// Nodes returns the nodes as they are now, and whether all have been read once: what Snapshot and Synced say, of nodes alone.
	Nodes() (nodes []*object.Node, synced bool)
	// NodeChanges receives a value after a change of a node; several changes may be one value.
	NodeChanges() <-chan struct{}
	// Take returns what has changed since it was last called; at first, everything.
	Take() object.Changes
	// Problems says in words what keeps the source from knowing the objects as they are; empty in good times.
	Problems() []string
	// Reread returns once Snapshot holds everything that was written before the call.
	Reread(ctx context.Context) error
}

// signal is a channel that holds one value at most. Nobody listens to a nil one.
type signal chan struct{}

func newSignal() signal { return make(signal, 1) }

func (s signal) send() {
	select {
	case s <- struct{}{}:
	default:
	}
}
