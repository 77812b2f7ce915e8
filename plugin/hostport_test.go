package main

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// ports reads mappings: "8080:80/tcp", "198.51.100.10/8080:80/udp".
func ports(texts ...string) []attachment.PortMapping {
	var list []attachment.PortMapping
	for _, text := range texts {
		var m attachment.PortMapping
		if at, rest, ok := strings.Cut(text, "/"); ok && (strings.Contains(at, ".") || strings.Contains(at, "::")) {
			m.HostIP, text = netip.MustParseAddr(at), rest
		}
		if _, err := fmt.Sscanf(text, "%d:%d/%s", &m.HostPort, &m.ContainerPort, &m.Protocol); err != nil {
			panic(text)
		}
		list = append(list, m)
	}
	return list
}

// served attaches a pod with ports that answers on TCP 80 and UDP 53 at all its addresses.
func served(t *testing.T, n *testnode.Node, name string, mappings ...string) *testnode.Pod {
	t.Helper()
	p := n.Attach(t, &testnode.Pod{Namespace: "default", Name: name, UID: "uid-" + name, Ports: ports(mappings...)})
	serve(t, p)
	return p
}

func serve(t *testing.T, p *testnode.Pod) {
	t.Helper()
	for _, like := range []netip.Addr{testnode.Node4, testnode.Node6} {
		nettest.TCPServer(t, p.NS, netip.AddrPortFrom(p.IP(t, like), 80))
		nettest.UDPServer(t, p.NS, netip.AddrPortFrom(p.IP(t, like), 53))
	}
}

// eachNode runs a test on both backends, on a node whose pods nobody guards.
func eachNode(t *testing.T, test func(t *testing.T, n *testnode.Node)) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		test(t, testnode.New(t, testnode.Options{Backend: backend, Policy: attachment.PolicyNone}))
	})
}

func reach(from *nettest.NS, proto, to string) error {
	return nettest.Dial(from, proto, netip.AddrPort{}, netip.MustParseAddrPort(to), soon)
}

// A port of the node leads to the pod's, and the same port of another machine does not.
func TestHostPort1ReachesThePodOnItsNodeAlone(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		web := served(t, n, "web", "8080:80/tcp", "8053:53/udp", "8099:99/sctp")
		client := n.Attach(t, &testnode.Pod{Namespace: "default", Name: "client", UID: "uid-client"})
		for _, node := range []netip.Addr{testnode.Node4, testnode.Node6} {
			for proto, port := range map[string]uint16{"tcp": 8080, "udp": 8053} {
				if err := reach(n.Outside, proto, netip.AddrPortFrom(node, port).String()); err != nil {
					t.Error(err)
				}
			}
		}
		// The machine outside has the same port open itself: that is what the node and its pods reach there.
		for _, outside := range []netip.Addr{testnode.Outside4, testnode.Outside6} {
			at := nettest.TCPServer(t, n.Outside, netip.AddrPortFrom(outside, 8080))
			for _, from := range []*nettest.NS{n.NS, client.NS, web.NS} {
				if err := reach(from, "tcp", at.String()); err != nil {
					t.Errorf("the other machine's own port: %v", err)
				}
			}
		}
		// The kernel of these tests may have no SCTP sockets; the rule is there in any case.
		for _, tool := range []string{"iptables-", "ip6tables-"} {
			out := n.NS.Run(t, tool+n.Backend()+"-save", "-t", "nat")
			if !strings.Contains(out, "-p sctp") || !strings.Contains(out, "8099") {
				t.Errorf("%snat has no rule for SCTP port 8099:\n%s", tool, out)
			}
		}
	})
}

func TestHostPort2AnswersOnEveryAddressOrOnHostIPAlone(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		n.NS.Run(t, "ip", "address", "add", "198.51.100.11/24", "dev", "uplink")
		served(t, n, "one", "198.51.100.11/8080:80/tcp")
		served(t, n, "four", "0.0.0.0/8081:80/tcp")
		served(t, n, "six", "::/8082:80/tcp")
		served(t, n, "all", "8083:80/tcp")
		for to, want := range map[string]bool{
			"198.51.100.11:8080": true, "198.51.100.10:8080": false, "[2001:db8::10]:8080": false,
			"198.51.100.11:8081": true, "198.51.100.10:8081": true, "[2001:db8::10]:8081": false,
			"198.51.100.10:8082": false, "[2001:db8::10]:8082": true,
			"198.51.100.11:8083": true, "198.51.100.10:8083": true, "[2001:db8::10]:8083": true,
		} {
			if err := reach(n.Outside, "tcp", to); (err == nil) != want {
				t.Errorf("%s: %v, want reached: %v", to, err, want)
			}
		}
	})
}

func TestHostPort3FromEverywhereWithTheClientsAddressKept(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		web := served(t, n, "web", "8080:80/tcp", "8053:53/udp")
		client := n.Attach(t, &testnode.Pod{Namespace: "default", Name: "client", UID: "uid-client"})
		for _, tt := range []struct {
			what string
			from *nettest.NS
			to   string
			seen netip.Addr // invalid: whatever
		}{
			{"another machine", n.Outside, "198.51.100.10", testnode.Outside4},
			{"another machine, IPv6", n.Outside, "2001:db8::10", testnode.Outside6},
			{"the node", n.NS, "198.51.100.10", testnode.Node4},
			{"the node, IPv6", n.NS, "2001:db8::10", testnode.Node6},
			{"the node's loopback", n.NS, "127.0.0.1", testnode.Node4},
			{"another pod", client.NS, "198.51.100.10", client.IP(t, testnode.Node4)},
			{"another pod, IPv6", client.NS, "2001:db8::10", client.IP(t, testnode.Node6)},
			{"the pod itself", web.NS, "198.51.100.10", netip.Addr{}},
			{"the pod itself, IPv6", web.NS, "2001:db8::10", netip.Addr{}},
		} {
			for proto, port := range map[string]uint16{"tcp": 8080, "udp": 8053} {
				to := netip.AddrPortFrom(netip.MustParseAddr(tt.to), port)
				seen, err := nettest.Peer(tt.from, proto, netip.AddrPort{}, to, soon)
				if err != nil || tt.seen.IsValid() && seen.Addr() != tt.seen {
					t.Errorf("%s: the pod sees %v, want %v: %v", tt.what, seen, tt.seen, err)
				}
			}
		}
	})
}

func TestHostPort4ConflictsAreRefusedWithTheOwnersName(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		served(t, n, "first", "8080:80/tcp")
		refused := func(mapping string, words ...string) {
			t.Helper()
			p := n.Sandbox(t, &testnode.Pod{Namespace: "default", Name: "second", UID: "uid-second", Ports: ports(mapping)})
			err := n.Add(p)
			if err == nil {
				t.Errorf("%s was given twice", mapping)
				return
			}
			for _, w := range words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%s: the error does not say %q: %v", mapping, w, err)
				}
			}
			if out := p.NS.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
				t.Errorf("%s: the refused pod has a link: %s", mapping, out)
			}
		}
		refused("8080:81/tcp", "8080", "default/first")
		refused("198.51.100.10/8080:81/tcp", "8080", "default/first")

		sshd := nettest.TCPServer(t, n.NS, netip.MustParseAddrPort("198.51.100.10:2222"))
		refused("2222:80/tcp", "2222")
		if err := reach(n.Outside, "tcp", sshd.String()); err != nil {
			t.Errorf("the host's service does not go on: %v", err)
		}
		nettest.TCPServer(t, n.NS, netip.MustParseAddrPort("127.0.0.1:3333"))
		served(t, n, "third", "3333:80/tcp") // a listener on the loopback is none of the world's
		served(t, n, "udp", "8080:53/udp")   // another protocol
		served(t, n, "ip", "2001:db8::10/2222:80/tcp")
	})
}

// A client that talks to a UDP port all the time reaches the pod once there is one, and nobody after it has gone; a flow to
// another port lives on.
func TestHostPort5UDPFlowsFollowTheMapping(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		from := netip.AddrPortFrom(testnode.Outside4, 40000)
		to := netip.AddrPortFrom(testnode.Node4, 8053)
		served(t, n, "other", "7000:80/tcp") // with the first hostPort, the kernel begins to track connections
		other := nettest.UDPServer(t, n.NS, netip.AddrPortFrom(testnode.Node4, 9053))
		if err := nettest.Dial(n.Outside, "udp", from, other, soon); err != nil {
			t.Fatal(err)
		}
		_ = nettest.Dial(n.Outside, "udp", from, to, never) // makes a flow that leads to the node itself
		p := served(t, n, "dns", "8053:53/udp")
		if err := nettest.Dial(n.Outside, "udp", from, to, soon); err != nil {
			t.Errorf("after ADD, with a flow from before: %v", err)
		}
		if err := n.Del(p); err != nil {
			t.Fatal(err)
		}
		if after := flows(t, n); strings.Contains(after, ":8053") || !strings.Contains(after, ":9053") {
			t.Errorf("flows after DEL:\n%s", after)
		}
	})
}

// flows lists the node's connection tracking table.
func flows(t *testing.T, n *testnode.Node) (out string) {
	t.Helper()
	n.NS.Do(t, func() {
		list, err := conntrack.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			out += f.String() + "\n"
		}
	})
	return out
}

// A pod without mappings needs no iptables at all; one with them does. Rules that somebody flushed come back by themselves.
func TestHostPort6NoMappingNoIPTablesAndFlushedRulesComeBack(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := testnode.New(t, testnode.Options{Backend: backend})
		conf := func(more string) string {
			return strings.Replace(alone(n, "1.0.0", more), `"nft"`, fmt.Sprintf("%q", backend), 1)
		}
		nothing := "PATH=" + t.TempDir()
		if _, err := call(t, n, "ADD", conf(""), append(container(nettest.NewNS(t, "box"), "plain"), nothing)...); err != nil {
			t.Errorf("without mappings and without iptables: %v", err)
		}
		mapped := `, "runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "tcp"}]}`
		_, err := call(t, n, "ADD", conf(mapped), append(container(nettest.NewNS(t, "box"), "mapped"), nothing)...)
		if err == nil || !strings.Contains(err.Msg, "iptables") {
			t.Errorf("with mappings and without iptables: %v, want an error that says so", err)
		}

		web := &testnode.Pod{Namespace: "default", Name: "web", UID: "uid-web", Ports: ports("8080:80/tcp")}
		n.Write(t, "pod.yaml", web.Manifest(nil))
		n.Policyd(t)
		serve(t, n.Attach(t, web))
		for _, tool := range []string{"iptables-", "ip6tables-"} {
			n.NS.Run(t, tool+backend, "-t", "nat", "-F")
			n.NS.Run(t, tool+backend, "-t", "raw", "-F")
		}
		for _, node := range []netip.Addr{testnode.Node4, testnode.Node6} {
			nettest.Eventually(t, soon, "the port comes back", func() error {
				return nettest.Dial(n.Outside, "tcp", netip.AddrPort{}, netip.AddrPortFrom(node, 8080), never)
			})
		}
	})
}

func TestHostPort7GoneAfterDELAndAfterGC(t *testing.T) {
	eachNode(t, func(t *testing.T, n *testnode.Node) {
		rules := func() (out string) {
			for _, tool := range []string{"iptables-", "ip6tables-"} {
				out += n.NS.Run(t, tool+n.Backend()+"-save", "-t", "nat")
			}
			return out
		}
		a, b, c := served(t, n, "a", "8080:80/tcp"), served(t, n, "b", "8081:80/tcp"), served(t, n, "c", "8082:80/tcp")
		if err := n.Del(a); err != nil {
			t.Fatal(err)
		}
		if out := rules(); strings.Contains(out, "8080") || !strings.Contains(out, "8081") || !strings.Contains(out, "8082") {
			t.Errorf("after DEL of 8080:\n%s", out)
		}
		if err := n.GC(c); err != nil {
			t.Fatal(err)
		}
		if out := rules(); strings.Contains(out, "8081") || !strings.Contains(out, "8082") {
			t.Errorf("after GC of 8081:\n%s", out)
		}
		for to, want := range map[string]bool{"198.51.100.10:8080": false, "198.51.100.10:8081": false, "198.51.100.10:8082": true} {
			if err := reach(n.Outside, "tcp", to); (err == nil) != want {
				t.Errorf("%s: %v, want reached: %v", to, err, want)
			}
		}
		if _, err := os.Stat(b.NS.Path); err != nil {
			t.Errorf("GC took the runtime's namespace: %v", err)
		}
	})
}
