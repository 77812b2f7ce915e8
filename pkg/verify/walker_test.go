package verify

import (
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestWalksThroughTheEngineEndWhereAFreshStartDoes(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, _ := quick(t)
		var sum walked
		begin := time.Now()
		for n := range uint64(o.walks) {
			got, err := takeWalk(iptables.Backend(backend), walk(throw(o.seed, n, forWalks), stepsOfAWalk), nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d %+v %v", n, got, time.Since(begin))
			if sum.add(got); got.Found != "" {
				t.Fatal(n, got.Found)
			}
		}
		t.Logf("%+v, %v", sum, time.Since(begin))
	})
}
