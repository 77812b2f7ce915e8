package nettest_test

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// pair returns two namespaces with a link between them, dual stack.
func pair(t *testing.T) (client, server *nettest.NS) {
	t.Helper()
	client, server = nettest.NewNS(t, "client"), nettest.NewNS(t, "server")
	nettest.Link(t,
		nettest.End{NS: client, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.1/24", "2001:db8::1/64")},
		nettest.End{NS: server, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.2/24", "2001:db8::2/64")})
	return client, server
}

func TestServersTellTheClientItsAddress(t *testing.T) {
	client, server := pair(t)
	for _, at := range []string{"192.0.2.2:0", "[2001:db8::2]:0"} {
		from := netip.MustParseAddr("192.0.2.1")
		if strings.HasPrefix(at, "[") {
			from = netip.MustParseAddr("2001:db8::1")
		}
		for proto, to := range map[string]netip.AddrPort{
			"tcp": nettest.TCPServer(t, server, netip.MustParseAddrPort(at)),
			"udp": nettest.UDPServer(t, server, netip.MustParseAddrPort(at)),
		} {
			seen, err := nettest.Peer(client, proto, netip.AddrPort{}, to, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if seen.Addr() != from {
				t.Errorf("%s %s sees %s, want %s", proto, to, seen.Addr(), from)
			}
		}
	}
}

func TestBlockedTellsADropFromARefusal(t *testing.T) {
	client, _ := pair(t)
	to := netip.MustParseAddrPort("192.0.2.2:9")
	if err := nettest.Dial(client, "tcp", netip.AddrPort{}, to, 30*time.Second); err == nil || nettest.Blocked(err) {
		t.Errorf("a closed port: %v, want a refusal", err)
	}
	client.Run(t, "iptables-nft", "-A", "OUTPUT", "-p", "tcp", "-j", "DROP")
	if err := nettest.Dial(client, "tcp", netip.AddrPort{}, to, 100*time.Millisecond); !nettest.Blocked(err) {
		t.Errorf("a dropped SYN: %v, want a timeout", err)
	}
}

func TestNamesThatAreTakenGetANumber(t *testing.T) {
	a, b := nettest.NewNS(t, "twin"), nettest.NewNS(t, "twin")
	if a.Name != "twin" || b.Name != "twin-2" {
		t.Fatalf("names %s and %s", a.Name, b.Name)
	}
	a.Run(t, "ip", "link", "add", "only-in-a", "type", "veth")
	if out, err := b.Try("ip", "link", "show", "only-in-a"); err == nil {
		t.Fatalf("the twin has it too: %s", out)
	}
	if _, err := a.Try("sh", "-c", "echo why; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("error %v does not hold the output", err)
	}
}

func TestTheProcessStaysInItsOwnNamespace(t *testing.T) {
	home := nettest.Self(t)
	before := home.Run(t, "readlink", "/proc/self/ns/net")
	elsewhere := nettest.NewNS(t, "elsewhere")
	t.Run("Do", func(t *testing.T) {
		t.Cleanup(func() {
			if !t.Skipped() {
				t.Error("fn did not end the test")
			}
		})
		elsewhere.Do(t, func() { t.Skip("on purpose: fn ends the goroutine while it is in the other namespace") })
	})
	out, err := exec.Command("readlink", "/proc/self/ns/net").Output()
	if err != nil || string(out) != before {
		t.Errorf("a child is in %s (%v), want %s", out, err, before)
	}
	if links := home.Run(t, "ip", "-o", "link"); strings.Count(links, "\n") != 1 {
		t.Errorf("the scratch host has more than lo:\n%s", links)
	}
}

func TestACommandIsTheProgramItself(t *testing.T) {
	ns := nettest.NewNS(t, "commands")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	cmd := ns.Command(ctx, "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, 5*time.Second, "nsenter becomes sleep", func() error {
		comm, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/comm")
		if err == nil && string(comm) != "sleep\n" {
			err = &os.PathError{Op: "is", Path: string(comm), Err: os.ErrInvalid}
		}
		return err
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a killed command succeeds")
	}
}

func TestBackendsWorkSideBySide(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		ns := nettest.NewNS(t, backend)
		for _, family := range []string{"iptables-", "ip6tables-"} {
			ns.Run(t, family+backend, "-w", "-t", "mangle", "-A", "FORWARD", "-p", "tcp", "-j", "DROP")
			if out := ns.Run(t, family+backend+"-save", "-t", "mangle"); !strings.Contains(out, "-A FORWARD -p tcp -j DROP") {
				t.Errorf("the rule is not there:\n%s", out)
			}
		}
	})
}

func TestBuildMakesAProgramOnce(t *testing.T) {
	const pkg = "golang.org/x/sys/unix" // a library: go build -o writes an archive, which is enough here
	first := nettest.Build(t, pkg)
	if again := nettest.Build(t, pkg); again != first {
		t.Errorf("built twice: %s and %s", first, again)
	}
	if _, err := os.Stat(first); err != nil {
		t.Error(err)
	}
}
