package control

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

func loopback(t *testing.T) {
	t.Helper()
	nettest.Need(t)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestWhatReachesPolicydIsSeenOnTheWire(t *testing.T) {
	loopback(t)
	w, err := listenOnWire()
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	server, err := net.Listen("tcp4", fmt.Sprint(":", apiserver.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	serve := func(address string, size int) {
		conn, err := net.Dial("tcp4", net.JoinHostPort(address, fmt.Sprint(apiserver.Port)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if _, err := peer.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
	}
	serve("127.0.0.1", 5000)
	serve(apiserver.Watched, least-1)
	if at, err := w.first(); err == nil {
		t.Errorf("something that is no event to policyd was seen at %v", at)
	}
	serve(apiserver.Watched, 5000)
	if err := w.forget(); err != nil {
		t.Fatal(err)
	}
	if at, err := w.first(); err == nil {
		t.Errorf("what was to be forgotten was seen at %v", at)
	}
	begin := time.Now()
	serve(apiserver.Watched, 5000)
	at, err := w.first()
	if err != nil || at.Before(begin) || at.After(time.Now()) {
		t.Errorf("the event was seen at %v, after %v: %v", at, begin, err)
	}
}

func TestAnAddressIsSeenInASet(t *testing.T) {
	nettest.Need(t)
	list, err := ipset.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer list.Close()
	if err := list.Create(rule.Set{Name: "some", Type: rule.HashIP, Family: rule.IPv4}, 0); err != nil {
		t.Fatal(err)
	}
	defer list.Destroy("some")
	socket, err := nfnetlink.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	kernel, address := sets{socket}, netip.MustParseAddr("10.1.2.3")
	if in, err := kernel.has("some", address); in || err != nil {
		t.Fatalf("the empty set has it: %v, %v", in, err)
	}
	if _, err := kernel.has("none", address); err == nil {
		t.Error("a set that is not there was asked")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() {
		_ = list.Add("some", rule.Entry{Prefix: netip.PrefixFrom(address, 32)})
	}()
	if _, err := kernel.until(ctx, "some", address); err != nil {
		t.Error(err)
	}
}

func TestCommitsAreSeen(t *testing.T) {
	nettest.Need(t)
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			write := func(rules string) {
				t.Helper()
				text := "*mangle\n:BEN-I-aa - [0:0]\n" + rules + "COMMIT\n"
				if err := restoreTables(ctx, backend, saved{text, text}); err != nil {
					t.Fatal(err)
				}
			}
			write("")
			kernel, err := openTables(backend)
			if err != nil {
				t.Fatal(err)
			}
			defer kernel.close()
			noted, err := kernel.watch()
			if err != nil {
				t.Fatal(err)
			}
			write("-A BEN-I-aa -j DROP\n")
			if err := noted.settle(ctx, 2); err != nil {
				t.Error(err)
			}
			if times, err := noted.end(); err != nil || len(times) != 2 {
				t.Errorf("commits of two families were seen at %v, %v", times, err)
			}
		})
	}
}
