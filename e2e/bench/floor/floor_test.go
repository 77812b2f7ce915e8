package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

const set = "floor"

// A floor that did less than a pod needs would be too low, and one that did more would be no floor.
func TestTheFloorsPodIsLikePosterns(t *testing.T) {
	nettest.Need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	n := node(t, ctx)
	ours := attached(t, ctx, n, "ours", n.Config(map[string]any{"policy": "none"}), func() {})
	address := netip.MustParseAddr("10.244.9.9")
	floors := attached(t, ctx, n, "floors", world.List("floor", map[string]any{"type": "floor"}), func() {
		if got := members(t); len(got) != 1 || got[0].Prefix.Addr() != address || !strings.HasPrefix(got[0].Iface, "flr") {
			t.Errorf("the set has %v", got)
		}
	}, [2]string{"ADDRESS", address.String()}, [2]string{"NODE_ADDRESS", world.NodeAddress.String()}, [2]string{"SET", set})
	for what, text := range ours {
		if floors[what] != text {
			t.Errorf("%s: postern's pod has\n%s\nthe floor's\n%s", what, text, floors[what])
		}
	}
	if got, links := members(t), ip(t, "-br", "link"); len(got) > 0 || strings.Contains(links, "flr") {
		t.Errorf("after DEL there are %v in the set, and the links\n%s", got, links)
	}
}

func node(t *testing.T, ctx context.Context) *world.Node {
	t.Helper()
	bin := nettest.Programs(t, map[string]string{"postern": "plugin", "floor": "e2e/bench/floor"})
	n, err := world.New(ctx, table.Env{Bin: bin, Dir: t.TempDir()}, "nft")
	if err != nil {
		t.Fatal(err)
	}
	sets, err := ipset.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sets.Close()
	if err := sets.Create(rule.Set{Name: set, Type: rule.HashNetIface, Family: rule.IPv4}, 0); err != nil {
		t.Fatal(err)
	}
	return n
}

// attached attaches a pod, describes it with its names and addresses replaced by words, calls meanwhile, and detaches it.
func attached(t *testing.T, ctx context.Context, n *world.Node, name string, list map[string]any, meanwhile func(),
	args ...[2]string) map[string]string {
	t.Helper()
	network, err := n.Network("", list)
	if err != nil {
		t.Fatal(err)
	}
	p := world.Pod{Namespace: "shop", Name: name}
	if _, err := n.Sandbox(p.Sandbox()); err != nil {
		t.Fatal(err)
	}
	addrs, err := network.Add(ctx, p, args...)
	if err != nil {
		t.Fatal(err)
	}
	found := describe(t, p, addrs[0])
	meanwhile()
	if err := network.Del(ctx, p, args...); err != nil {
		t.Error(err)
	}
	return found
}

func describe(t *testing.T, p world.Pod, addr netip.Addr) map[string]string {
	t.Helper()
	route, err := netlink.RouteGet(addr.AsSlice())
	if err != nil {
		t.Fatal(err)
	}
	host, err := netlink.LinkByIndex(route[0].LinkIndex)
	if err != nil {
		t.Fatal(err)
	}
	name := host.Attrs().Name
	found := settings(t, name, "the node's ")
	found["the node's route"] = ip(t, "route", "show", "dev", name)
	found["the node's neighbours"] = ip(t, "neigh", "show", "dev", name)
	found["the node's addresses"] = ip(t, "-o", "addr", "show", "dev", name)
	var eth0 netlink.Link
	err = world.In(p.Path(), func() (err error) {
		if eth0, err = netlink.LinkByName("eth0"); err != nil {
			return err
		}
		found["the pod's link"] = ip(t, "-o", "link", "show", "dev", "eth0")
		found["the pod's addresses"] = ip(t, "-4", "-br", "addr", "show", "dev", "eth0")
		found["the pod's routes"] = ip(t, "route")
		found["the pod's neighbours"] = ip(t, "neigh", "show", "nud", "permanent")
		maps.Copy(found, settings(t, "eth0", "the pod's "))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	words := strings.NewReplacer(addr.String(), "ADDRESS", name, "HOST", host.Attrs().HardwareAddr.String(), "HOSTMAC",
		eth0.Attrs().HardwareAddr.String(), "PODMAC", fmt.Sprintf("if%d", host.Attrs().Index), "HOSTINDEX",
		fmt.Sprintf("%d: ", eth0.Attrs().Index), "INDEX: ", "link-netns "+p.Sandbox(), "", "link-netnsid 0", "")
	for what, text := range found {
		found[what] = words.Replace(text)
	}
	return found
}

// members of the floor's set.
func members(t *testing.T) []rule.Entry {
	t.Helper()
	sets, err := ipset.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sets.Close()
	list, err := sets.List(set)
	if err != nil || len(list) != 1 {
		t.Fatalf("list the set: %v, %v", list, err)
	}
	return list[0].Entries
}

// settings of a link, all there are.
func settings(t *testing.T, link, of string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, family := range []string{"ipv4", "ipv6"} {
		files, err := filepath.Glob("/proc/sys/net/" + family + "/conf/" + link + "/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil { // some are unreadable until they are set
				found[of+family+" "+filepath.Base(file)] = string(text)
			}
		}
	}
	if len(found) < 50 {
		t.Errorf("%s has %d settings", link, len(found))
	}
	return found
}

// ip runs ip(8) in the calling thread's network namespace.
func ip(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
	return string(out)
}
