package verify

import (
	"testing"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
)

// Whatever the path, with faults, crashes, restarts and foreign edits, the engine leads to the kernel that a fresh start leads to,
// and lets nothing pass on the way that the objects do not.
func TestWalksThroughTheEngineEndWhereAFreshStartDoes(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, _ := quick(t)
		for n := range uint64(o.walks / 2) { // a second each, and more
			w, err := o.engineWalk(iptables.Backend(backend), n)
			if err != nil || w.Found != "" {
				t.Fatal(err, w.Found)
			}
		}
	})
}

func TestMistakesInTheEngineAreFoundByWalks(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, _ := quick(t)
		for _, b := range saboteurs() {
			if text, found, err := b.search(o, iptables.Backend(backend)); err != nil || !found {
				t.Errorf("%s: %s: %v", b.name, text, err)
			}
		}
	})
}

// Walks of few steps are what a walk is cut down to: they end well too.
func TestAWalkWithoutStepsEndsWhereItBegan(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		if w, err := takeWalk(iptables.Backend(backend), nil, nil); err != nil || w.Found != "" {
			t.Error(err, w.Found)
		}
	})
}
