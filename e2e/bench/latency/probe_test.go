package latency

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) {
	if is, err := Prober(); is {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	nettest.Main(m)
}

// twoPods are namespaces that reach each other.
func twoPods(t *testing.T) (p *prober, to *nettest.NS) {
	from, to := nettest.NewNS(t, "from"), nettest.NewNS(t, "to")
	nettest.Link(t, nettest.End{NS: from, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.1/24")},
		nettest.End{NS: to, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.2/24")})
	p, err := newProber(from.Path, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	return p, to
}

func TestAChangeIsSeenWhenItIsMade(t *testing.T) {
	const pause = 30 * time.Millisecond // nothing changes meanwhile, so nothing may be seen
	p, to := twoPods(t)
	for _, test := range []struct {
		verb string
		open bool
	}{{"-A", false}, {"-D", true}, {"-A", false}, {"-D", true}} {
		start := time.Now()
		var made time.Duration
		seen, err := p.see(t.Context(), test.open, func(context.Context) error {
			time.Sleep(pause)
			_, err := to.Try("iptables-nft", test.verb, "INPUT", "-p", "tcp", "-j", "DROP")
			made = time.Since(start)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("iptables %s was done after %s and seen after %s, to within %s", test.verb, made, seen.After, seen.Gap)
		if seen.After < pause || seen.After > made+seen.Gap {
			t.Errorf("iptables %s was seen after %s, and made between %s and %s", test.verb, seen.After, pause, made)
		}
	}
}

func TestWhatIsSoAlreadyIsNoChange(t *testing.T) {
	p, _ := twoPods(t)
	_, err := p.see(t.Context(), true, func(context.Context) error { t.Error("the change is made"); return nil })
	if err == nil || !strings.Contains(err.Error(), "before the change") {
		t.Errorf("error %v", err)
	}
}
