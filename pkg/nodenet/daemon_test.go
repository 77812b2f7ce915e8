package nodenet_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nodenet"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/rule"
)

// nodeList is a source that a test changes.
type nodeList struct {
	mu      sync.Mutex
	nodes   []*object.Node
	changes chan struct{}
}

func (l *nodeList) Nodes() ([]*object.Node, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nodes, l.nodes != nil
}

func (l *nodeList) NodeChanges() <-chan struct{} { return l.changes }

func (l *nodeList) set(nodes ...*object.Node) {
	l.mu.Lock()
	l.nodes = nodes
	l.mu.Unlock()
	select {
	case l.changes <- struct{}{}:
	default:
	}
}

// start runs a daemon on a node of a scene until the test ends. change may change its configuration.
func start(t *testing.T, s *scene, n *node, change func(*nodenet.Config)) (*nodenet.Daemon, *nodeList, nodenet.Config) {
	t.Helper()
	list := &nodeList{changes: make(chan struct{}, 1)}
	c := nodenet.Config{Source: list, Node: n.Name, Options: s.options, Conflist: filepath.Join(t.TempDir(), "net.d", "10-postern.conflist"),
		Runtime: nodenet.Runtime{Network: "pods", StateDir: "/run/postern", Backend: iptables.Backend(s.backend)},
		Guarded: func() error { return nil }, RepairInterval: time.Hour, Metrics: metrics.New("test"), Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	if change != nil {
		change(&c)
	}
	var d *nodenet.Daemon
	n.ns.Do(t, func() {
		var err error
		if d, err = nodenet.NewDaemon(c); err != nil {
			t.Fatal(err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		var err error
		enter := nettest.Enter(n.ns, func() { err = d.Run(ctx) })
		done <- errors.Join(enter, err)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return d, list, c
}

// becomes waits until the daemon is ready, or is not and says so in these words.
func becomes(t *testing.T, d *nodenet.Daemon, words string) {
	t.Helper()
	nettest.Eventually(t, limit, fmt.Sprintf("readiness %q", words), func() error {
		err := d.Ready()
		if (err == nil) == (words == "") && (err == nil || strings.Contains(err.Error(), words)) {
			return nil
		}
		return fmt.Errorf("it is %v", err)
	})
}

// conflist reads the configuration as runtime and plugin do; nil if there is none.
func conflist(t *testing.T, path string) *cniconf.Config {
	t.Helper()
	list, err := libcni.ConfListFromFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var conf map[string]any
	if err := json.Unmarshal(list.Plugins[0].Bytes, &conf); err != nil {
		t.Fatal(err)
	}
	conf["cniVersion"], conf["name"] = list.CNIVersion, list.Name
	text, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := cniconf.ParseNetwork(text)
	if err != nil {
		t.Fatalf("the plugin refuses what was written: %v", err)
	}
	return parsed
}

func TestTheConfigurationIsWrittenOnceTheNodeCanTakePods(t *testing.T) {
	s := newScene(t, "nft", shared, 2, nodenet.Options{Tunnel: nodenet.TunnelAlways})
	n := s.nodes[0]
	var mu sync.Mutex
	guarded := errors.New("not all objects have been read yet")
	d, list, c := start(t, s, n, func(c *nodenet.Config) {
		c.Guarded = func() error {
			mu.Lock()
			defer mu.Unlock()
			return guarded
		}
	})
	absent := func(words string) {
		t.Helper()
		becomes(t, d, words)
		if conflist(t, c.Conflist) != nil {
			t.Errorf("the configuration is there although %s", words)
		}
	}
	absent("nodes have been read")
	list.set(s.nodes[1].Node)
	absent("no node node-1")
	bare := *n.Node
	bare.PodCIDRs = nil
	list.set(&bare, s.nodes[1].Node)
	absent("--pod-network-cidr")
	list.set(n.Node, s.nodes[1].Node)
	absent("policies are not enforced yet: not all objects have been read yet")
	mu.Lock()
	guarded = nil
	mu.Unlock()
	becomes(t, d, "")
	got := conflist(t, c.Conflist)
	if got == nil || got.MTU != 1450 || len(got.IPAM.Ranges) != 2 || got.IPAM.Ranges[0].Subnet != n.PodCIDRs[0] ||
		got.IPAM.Ranges[0].Gateway != netip.MustParseAddr("10.244.1.1") || got.NodeAddresses[0] != n.Addresses[0] {
		t.Fatalf("the configuration says %+v", got)
	}

	other := *n.Node
	other.PodCIDRs = nettest.Prefixes("10.244.7.0/24")
	list.set(&other, s.nodes[1].Node)
	nettest.Eventually(t, limit, "the new CIDR in the configuration", func() error {
		if got := conflist(t, c.Conflist); len(got.IPAM.Ranges) != 1 || got.IPAM.Ranges[0].Subnet != other.PodCIDRs[0] {
			return fmt.Errorf("ranges %v", got.IPAM.Ranges)
		}
		return nil
	})
	list.set(s.nodes[1].Node)
	becomes(t, d, "no node node-1")
	if conflist(t, c.Conflist) == nil {
		t.Error("the configuration is gone with the node; its pods are still there")
	}
}

func TestNoNodeIsReadyBesideIPVSUnlessToldTo(t *testing.T) {
	for _, allow := range []bool{false, true} {
		t.Run(fmt.Sprintf("allowed %v", allow), func(t *testing.T) {
			s := newScene(t, "nft", shared, 1, nodenet.Options{})
			nettest.Link(t, nettest.End{NS: s.nodes[0].ns, Name: "kube-ipvs0"}, nettest.End{NS: s.outside, Name: "other"})
			d, list, c := start(t, s, s.nodes[0], func(c *nodenet.Config) { c.AllowIPVS = allow })
			list.set(s.nodes[0].Node)
			if allow {
				becomes(t, d, "")
				return
			}
			becomes(t, d, "IPVS")
			if conflist(t, c.Conflist) != nil {
				t.Error("the configuration is there")
			}
		})
	}
}

func TestWhatSomebodyElseTakesAwayIsPutBack(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newScene(t, backend, apart, 2, nodenet.Options{})
		n := s.nodes[0]
		d, list, _ := start(t, s, n, func(c *nodenet.Config) { c.RepairInterval = 300 * time.Millisecond })
		list.set(n.Node, s.nodes[1].Node)
		becomes(t, d, "")
		look := func() string {
			text := strings.Join(n.routes(t), "\n") + "\n"
			fdb, _ := n.ns.Try("bridge", "fdb", "show", "dev", "postern-vx4")
			text += fdb
			for _, table := range []string{"raw", "mangle", "nat"} {
				for _, family := range []string{"iptables-", "ip6tables-"} {
					for line := range strings.Lines(n.ns.Run(t, family+backend+"-save", "-t", table)) {
						if strings.HasPrefix(line, "-A") {
							text += line
						}
					}
				}
			}
			return text
		}
		want := look()
		for _, damage := range [][]string{
			{"ip", "link", "del", "postern-vx4"},
			{"ip", "route", "flush", "proto", fmt.Sprint(nodenet.Protocol)},
			{"ip", "-6", "route", "flush", "proto", fmt.Sprint(nodenet.Protocol)},
			{"ip", "neigh", "flush", "dev", "postern-vx4", "nud", "permanent"},
			{"iptables-" + backend, "-w", "-t", "mangle", "-F"},
			{"ip6tables-" + backend, "-w", "-t", "raw", "-F"},
			{"iptables-" + backend, "-w", "-t", "nat", "-F", nodenet.ChainMasquerade},
		} {
			n.ns.Run(t, damage[0], damage[1:]...)
			nettest.Eventually(t, limit, strings.Join(damage, " ")+" to be undone", func() error {
				if got := look(); got != want {
					return fmt.Errorf("there is\n%s\nwant\n%s", got, want)
				}
				return nil
			})
		}
	})
}

func TestWhatGoesWithALinkIsPutBackWithoutWaitingForAComparison(t *testing.T) {
	s := newScene(t, "nft", apart, 2, nodenet.Options{})
	n := s.nodes[0]
	d, list, _ := start(t, s, n, nil) // which compares once an hour
	list.set(n.Node, s.nodes[1].Node)
	becomes(t, d, "")
	want := n.routes(t)
	for _, damage := range [][]string{{"ip", "link", "del", "postern-vx4"}, {"ip", "route", "del", "10.244.2.0/24"},
		{"ip", "link", "set", "postern-vx4", "down"}} {
		n.ns.Run(t, damage[0], damage[1:]...)
		nettest.Eventually(t, limit, strings.Join(damage, " ")+" to be undone", func() error {
			if got := n.routes(t); !slices.Equal(got, want) {
				return fmt.Errorf("routes %q, want %q", got, want)
			}
			return nil
		})
	}
}

func TestATunnelThatIsSwitchedOffIsGoneBeforeItsGuard(t *testing.T) {
	s := newScene(t, "nft", apart, 2, nodenet.Options{})
	s.apply(t)
	n := s.nodes[0]
	for _, change := range []func(*nodenet.Options){
		func(o *nodenet.Options) { o.Port++ },
		func(o *nodenet.Options) { o.Tunnel = nodenet.TunnelNever },
	} {
		o := s.options
		change(&o)
		n.ns.Do(t, func() {
			if changes, err := nodenet.Unplug(n.plan); err != nil || len(changes) > 0 {
				t.Errorf("nothing has changed, and Unplug did %q, %v", changes, err)
			}
			plan := nodenet.NewPlan(n.Node, nil, nodenet.Facts{}, o)
			if changes, err := nodenet.Unplug(plan); err != nil || len(changes) != 1 {
				t.Errorf("Unplug did %q, %v; want one device removed", changes, err)
			}
		})
		s.apply(t)
	}
}

func TestWhatWouldDefeatTheNetworkIsFound(t *testing.T) {
	s := newScene(t, "nft", shared, 2, nodenet.Options{})
	s.apply(t)
	n := s.nodes[0]
	dir := t.TempDir()
	path := filepath.Join(dir, "10-postern.conflist")
	for _, name := range []string{"00-other.conflist.bak", "00-README", "87-other.conflist"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kinds := func() map[nodenet.Kind]string {
		t.Helper()
		found := map[nodenet.Kind]string{}
		n.ns.Do(t, func() {
			list, err := nodenet.Surroundings(context.Background(), n.plan, path)
			if err != nil {
				t.Error(err)
			}
			for _, f := range list {
				found[f.Kind] += f.What + "\n"
			}
		})
		return found
	}
	n.ns.Run(t, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	if got := kinds(); len(got) > 0 {
		t.Fatalf("in good times: %v", got)
	}
	for _, tt := range []struct {
		kind  nodenet.Kind
		words string
		spoil func() error
	}{
		{nodenet.OtherCNI, "00-other.conf ", func() error { return os.WriteFile(filepath.Join(dir, "00-other.conf"), nil, 0o600) }},
		{nodenet.TwoBackends, "nft and legacy", func() error {
			_, err := n.ns.Try("iptables-legacy", "-w", "-A", "INPUT", "-j", "ACCEPT")
			return err
		}},
		{nodenet.NoForwarding, "net.ipv6.conf.all.forwarding=1", func() error {
			_, err := n.ns.Try("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
			return err
		}},
		{nodenet.OtherRoute, "192.0.2.99", func() error {
			_, err := n.ns.Try("ip", "route", "add", "10.244.2.0/24", "via", "192.0.2.99")
			return err
		}},
	} {
		if err := tt.spoil(); err != nil {
			t.Logf("%s: %v", tt.kind, err)
			continue
		}
		if got := kinds()[tt.kind]; !strings.Contains(got, tt.words) {
			t.Errorf("%s: found %q, want it to say %q", tt.kind, got, tt.words)
		}
	}
}

var wireNodes = flag.Int("wire-nodes", 100, "how many other nodes there are for TestManyNodesAreWired")

// What a pass costs on a node of a large cluster; -v prints it. An ordinary user's netlink messages are bounded, so it is no
// larger by itself.
func TestManyNodesAreWired(t *testing.T) {
	for _, l := range []layout{shared, apart} {
		t.Run(string(l), func(t *testing.T) {
			s := newScene(t, "nft", l, 1, nodenet.Options{})
			n := s.nodes[0]
			nodes := []*object.Node{n.Node}
			for i := 1; i <= *wireNodes; i++ {
				address := fmt.Sprintf("192.0.2.%d", 100+i%100)
				if l == apart {
					address = fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)
				}
				nodes = append(nodes, nodeOf(fmt.Sprintf("other-%04d", i), address, fmt.Sprintf("10.%d.%d.0/24 fd00:%x::/64", 100+i/250, i%250, i)))
			}
			for _, what := range []string{"all new", "nothing new", "one new"} {
				last := len(nodes) - 1
				if what == "one new" {
					last++
				}
				begin := time.Now()
				n.ns.Do(t, func() {
					facts, err := nodenet.Look(nodes[1:last], s.options)
					if err != nil {
						t.Fatal(err)
					}
					n.plan = nodenet.NewPlan(n.Node, nodes[1:last], facts, s.options)
					looked := time.Since(begin)
					for _, f := range []rule.Family{rule.IPv4, rule.IPv6} {
						s := nodenet.State(n.plan, f)
						if n.states[f] == nil {
							n.plane.Want(s)
						} else {
							n.plane.Change(nodenet.Patch(n.states[f], s))
						}
						n.states[f] = s
					}
					if _, err := n.plane.Apply(context.Background(), nil); err != nil {
						t.Fatal(err)
					}
					ruled := time.Since(begin)
					changes, err := nodenet.Wire(n.plan)
					if err != nil || len(changes) > 0 != (what != "nothing new") {
						t.Errorf("%s: %d changes, %v", what, len(changes), err)
					}
					t.Logf("%s: looked and planned in %v, rules %v, links and routes %v", what, looked, ruled-looked, time.Since(begin)-ruled)
				})
			}
		})
	}
}
