package verify

import (
	"os"
	"strconv"
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
		from, _ := strconv.Atoi(os.Getenv("FROM"))
		for n := uint64(from); n < uint64(from+tmpWalks(o.walks)); n++ {
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

func tmpWalks(n int) int {
	if s := os.Getenv("W"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	return n
}

func TestEveryMistakeInTheEngineIsFoundByWalks(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, _ := quick(t)
		for _, b := range saboteurs() {
			text, found, err := b.search(o, iptables.Backend(backend))
			if err != nil || !found {
				t.Errorf("%s: %s: %v", b.name, text, err)
			}
			t.Logf("%s: %s", b.name, text)
		}
	})
}
