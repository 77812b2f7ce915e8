package hostport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// restore is Tables over iptables-restore in a namespace, for the few words that this package uses.
type restore struct {
	ns     *nettest.NS
	name   string // ip6tables-legacy
	writes *int
}

func (r restore) Append(_ context.Context, chains map[rule.Table][]rule.Chain) error {
	var b strings.Builder
	for table, list := range chains {
		fmt.Fprintf(&b, "*%s\n%sCOMMIT\n", table, rulesText(list))
	}
	return r.run(b.String())
}

func (r restore) Write(_ context.Context, want *rule.State) error {
	var b strings.Builder
	for table, list := range want.Chains {
		fmt.Fprintf(&b, "*%s\n", table)
		for _, c := range list {
			fmt.Fprintf(&b, ":%s - [0:0]\n", c.Name)
		}
		for _, h := range want.Hooks {
			line := ruleText(h.Rule)
			if h.Table == table {
				check := append([]string{"-t", string(table), "-C", h.Chain}, strings.Fields(line)...)
				if _, err := r.ns.Try(r.name, check...); err != nil {
					fmt.Fprintf(&b, "-I %s 1 %s\n", h.Chain, line)
				}
			}
		}
		fmt.Fprintf(&b, "%sCOMMIT\n", rulesText(list))
	}
	return r.run(b.String())
}

func (r restore) run(text string) error {
	*r.writes++
	cmd := r.ns.Command(context.Background(), r.name+"-restore", "--noflush")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s in\n%s", err, out, text)
	}
	return nil
}

func rulesText(chains []rule.Chain) string {
	var b strings.Builder
	for _, c := range chains {
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "-A %s %s\n", c.Name, ruleText(r))
		}
	}
	return b.String()
}

func ruleText(r rule.Rule) string {
	var b strings.Builder
	for _, m := range r.Matches {
		switch m := m.(type) {
		case rule.In:
			fmt.Fprintf(&b, "-i %s ", m.Name)
		case rule.Out:
			fmt.Fprintf(&b, "-o %s ", m.Name)
		case rule.Source:
			fmt.Fprintf(&b, "%s-s %s ", map[bool]string{true: "! "}[m.Not], m.Prefix)
		case rule.Dest:
			fmt.Fprintf(&b, "%s-d %s ", map[bool]string{true: "! "}[m.Not], m.Prefix)
		case rule.Protocol:
			fmt.Fprintf(&b, "-p %s ", m.Proto)
		case rule.DestPorts:
			fmt.Fprintf(&b, "-m %s --dport %d ", m.Proto, m.From)
		case rule.CTState:
			fmt.Fprintf(&b, "-m conntrack --ctstate %s ", m.States)
		case rule.AddrType:
			fmt.Fprintf(&b, "-m addrtype --dst-type %s ", m.DstType)
		default:
			panic(fmt.Sprintf("match %T", m))
		}
	}
	switch a := r.Action.(type) {
	case rule.DNAT:
		return b.String() + "-j DNAT --to-destination " + a.To.String()
	case rule.SNAT:
		return b.String() + "-j SNAT --to-source " + a.To.String()
	case rule.Drop:
		return b.String() + "-j DROP"
	case rule.Jump:
		return b.String() + "-j " + a.Chain
	}
	panic(fmt.Sprintf("action %T", r.Action))
}

// node is a node at 192.0.2.1 and fd00:2::1 (and .11, ::11) with another machine at .2 and ::2, and pods 1 and 2.
type node struct {
	host, machine *nettest.NS
	pods          map[int]*nettest.NS
	env           Env
	writes        int
}

func newNode(t *testing.T, backend string) *node {
	n := &node{host: nettest.NewNS(t, "node"), machine: nettest.NewNS(t, "machine"), pods: map[int]*nettest.NS{}}
	nettest.Link(t,
		nettest.End{NS: n.host, Name: "eth0",
			Addresses: nettest.Prefixes("192.0.2.1/24", "192.0.2.11/24", "fd00:2::1/64", "fd00:2::11/64")},
		nettest.End{NS: n.machine, Name: "eth0", Addresses: nettest.Prefixes("192.0.2.2/24", "fd00:2::2/64")})
	n.host.Do(t, func() {
		for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+path, []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	for i := 1; i <= 2; i++ {
		n.pods[i] = nettest.NewNS(t, fmt.Sprintf("pod%d", i))
		a, link := pod(i), fmt.Sprintf("pst%d", i)
		v4, v6 := a.Addresses[0].String(), a.Addresses[1].String()
		nettest.Link(t, nettest.End{NS: n.host, Name: link, Addresses: nettest.Prefixes("fe80::1/64")},
			nettest.End{NS: n.pods[i], Name: "eth0", Addresses: nettest.Prefixes(v4+"/32", v6+"/128")})
		n.host.Run(t, "ip", "route", "add", v4+"/32", "dev", link, "src", "192.0.2.1")
		n.host.Run(t, "ip", "route", "add", v6+"/128", "dev", link, "src", "fd00:2::1")
		n.pods[i].Run(t, "ip", "route", "add", "169.254.1.1", "dev", "eth0")
		n.pods[i].Run(t, "ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0")
		n.pods[i].Run(t, "ip", "route", "add", "default", "via", "fe80::1", "dev", "eth0")
		n.pods[i].Run(t, "ip", "neigh", "replace", "169.254.1.1",
			"lladdr", macOf(t, n.host, link), "dev", "eth0", "nud", "permanent")
	}
	n.env = Env{Tables: func(f rule.Family) (Tables, error) {
		name := map[rule.Family]string{rule.IPv4: "iptables-", rule.IPv6: "ip6tables-"}[f] + backend
		return restore{n.host, name, &n.writes}, nil
	}}
	return n
}

func macOf(t *testing.T, ns *nettest.NS, link string) string {
	fields := strings.Fields(ns.Run(t, "ip", "-o", "link", "show", "dev", link))
	for i, f := range fields {
		if f == "link/ether" {
			return fields[i+1]
		}
	}
	t.Fatalf("no MAC of %s in %v", link, fields)
	return ""
}

func records(all ...*attachment.Attachment) Records {
	return func() ([]*attachment.Attachment, error) { return all, nil }
}

func (n *node) apply(t *testing.T, a *attachment.Attachment, known ...*attachment.Attachment) (err error) {
	t.Helper()
	n.host.Do(t, func() { err = Apply(context.Background(), n.env, a, records(known...)) })
	return err
}

func (n *node) remove(t *testing.T, a *attachment.Attachment, known ...*attachment.Attachment) {
	t.Helper()
	n.host.Do(t, func() {
		if err := Remove(context.Background(), n.env, a, records(known...)); err != nil {
			t.Fatal(err)
		}
	})
}

const patience = 2 * time.Second

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestHostPortReachesThePodFromEverywhere(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		a := pod(1, "8080:80/tcp", "8053:53/udp", "8099:99/sctp")
		if err := n.apply(t, a); err != nil {
			t.Fatal(err)
		}
		if n.writes != 2 {
			t.Errorf("%d restores, want one a family", n.writes)
		}
		for _, addr := range a.Addresses {
			nettest.TCPServer(t, n.pods[1], netip.AddrPortFrom(addr, 80))
			nettest.UDPServer(t, n.pods[1], netip.AddrPortFrom(addr, 53))
		}
		for _, tt := range []struct {
			what     string
			from     *nettest.NS
			to, seen string
		}{
			{"another machine", n.machine, "192.0.2.1", "192.0.2.2"},
			{"another machine, second address", n.machine, "192.0.2.11", "192.0.2.2"},
			{"another machine, IPv6", n.machine, "fd00:2::1", "fd00:2::2"},
			{"the node", n.host, "192.0.2.1", "192.0.2.1"},
			{"the node, IPv6", n.host, "fd00:2::1", "fd00:2::1"},
			{"the node's loopback", n.host, "127.0.0.1", "192.0.2.1"},
			{"another pod", n.pods[2], "192.0.2.1", "10.244.1.2"},
			{"another pod, IPv6", n.pods[2], "fd00:2::1", "fd00:1::2"},
			{"itself", n.pods[1], "192.0.2.1", "192.0.2.1"},
			{"itself, IPv6", n.pods[1], "fd00:2::1", "fd00:2::1"},
		} {
			for proto, port := range map[string]uint16{"tcp": 8080, "udp": 8053} {
				to := netip.AddrPortFrom(netip.MustParseAddr(tt.to), port)
				seen, err := nettest.Peer(tt.from, proto, netip.AddrPort{}, to, patience)
				if err != nil || seen.Addr().String() != tt.seen {
					t.Errorf("%s, %s: the pod sees %v, want %s: %v", tt.what, proto, seen, tt.seen, err)
				}
			}
		}
		n.remove(t, a, a)
		for _, to := range []string{"192.0.2.1:8080", "[fd00:2::1]:8080"} {
			if nettest.Dial(n.machine, "tcp", netip.AddrPort{}, at(to), patience) == nil {
				t.Errorf("%s reaches the pod after Remove", to)
			}
		}
	})
}

func TestHostIPAnswersAtThatAddressAlone(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		first, second := pod(1, "192.0.2.11/8080:80/tcp"), pod(2, "8081:80/tcp")
		if err := errors.Join(n.apply(t, first), n.apply(t, second, first)); err != nil {
			t.Fatal(err)
		}
		for i, a := range []*attachment.Attachment{first, second} {
			nettest.TCPServer(t, n.pods[i+1], netip.AddrPortFrom(a.Addresses[0], 80))
		}
		for to, reached := range map[string]bool{"192.0.2.11:8080": true, "192.0.2.1:8080": false, "192.0.2.1:8081": true} {
			if err := nettest.Dial(n.machine, "tcp", netip.AddrPort{}, at(to), patience); (err == nil) != reached {
				t.Errorf("%s: %v, want reached: %v", to, err, reached)
			}
		}
	})
}

// Upstream's conformance test of hostPort does this on IPv6 nodes.
func TestIPv6LoopbackLeadsToAPodFromAnyAddressButItself(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		a := pod(1, "::1/8080:80/tcp", "8081:80/tcp")
		if err := n.apply(t, a); err != nil {
			t.Fatal(err)
		}
		nettest.TCPServer(t, n.pods[1], netip.AddrPortFrom(a.Addresses[1], 80))
		own := nettest.TCPServer(t, n.host, at("[::1]:8080"))
		for _, tt := range []struct {
			what     string
			ns       *nettest.NS
			from, to string
			seen     string // by the server; empty where nobody is reached
		}{
			{"hostIP ::1, from the node's address", n.host, "[fd00:2::1]:0", "[::1]:8080", "fd00:2::1"},
			{"no hostIP, from the node's address", n.host, "[fd00:2::1]:0", "[::1]:8081", "fd00:2::1"},
			{"from ::1, the node's own server", n.host, "[::1]:0", own.String(), "::1"},
			{"hostIP ::1 is no other address", n.machine, "[fd00:2::2]:0", "[fd00:2::1]:8080", ""},
		} {
			seen, err := nettest.Peer(tt.ns, "tcp", at(tt.from), at(tt.to), patience)
			if reached := tt.seen != ""; (err == nil) != reached || reached && seen.Addr().String() != tt.seen {
				t.Errorf("%s: the server sees %v, want %q: %v", tt.what, seen, tt.seen, err)
			}
		}
	})
}

func TestLoopbackIsClosedToPodsThoughRouteLocalnetWasSet(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		n.host.Do(t, func() {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		})
		n.pods[2].Run(t, "ip", "route", "add", "table", "100", "default", "via", "169.254.1.1", "dev", "eth0")
		n.pods[2].Run(t, "ip", "rule", "add", "pref", "1", "to", "127.9.9.9", "lookup", "100")
		n.pods[2].Run(t, "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
		n.pods[2].Do(t, func() {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		})
		nettest.TCPServer(t, n.host, at("127.9.9.9:99"))
		client := at("10.244.1.2:0")
		if err := nettest.Dial(n.pods[2], "tcp", client, at("127.9.9.9:99"), patience); err != nil {
			t.Fatalf("without the rules the pod reaches the loopback, or the test shows nothing: %v", err)
		}
		if err := n.apply(t, pod(1, "8080:80/tcp")); err != nil {
			t.Fatal(err)
		}
		if err := nettest.Dial(n.pods[2], "tcp", client, at("127.9.9.9:99"), time.Second/2); !nettest.Blocked(err) {
			t.Errorf("pod to the node's loopback: %v, want no answer", err)
		}
	})
}

func TestPortOfAListeningProcessIsRefusedWithItsName(t *testing.T) {
	n := newNode(t, "nft")
	listen := func(proto, addr string) {
		n.host.Do(t, func() {
			var c interface{ Close() error }
			var err error
			if proto == "udp" {
				c, err = net.ListenPacket("udp", addr)
			} else {
				c, err = net.Listen(proto, addr)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		})
	}
	listen("tcp", ":7001")
	listen("tcp", "127.0.0.1:7002")
	listen("tcp", "192.0.2.1:7003")
	listen("tcp6", "[::]:7004")
	listen("udp", ":7005")
	n.host.Do(t, func() {
		client, err := net.DialUDP("udp", &net.UDPAddr{Port: 7006}, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 53})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
	})
	for mapping, conflict := range map[string]bool{
		"7001:80/tcp": true, "0.0.0.0/7001:80/tcp": true, "7001:80/udp": false, "7000:80/tcp": false,
		"7002:80/tcp": false, "127.0.0.1/7002:80/tcp": true, "192.0.2.1/7002:80/tcp": false,
		"7003:80/tcp": true, "192.0.2.11/7003:80/tcp": false, "::/7003:80/tcp": false,
		"0.0.0.0/7004:80/tcp": false, "::/7004:80/tcp": true,
		"7005:80/udp": true, "7006:80/udp": false,
	} {
		n.host.Do(t, func() {
			err := Conflicts(pod(1, mapping), nil, true)
			var found *ConflictError
			if errors.As(err, &found) != conflict || !conflict && err != nil {
				t.Errorf("%s: %v, want a conflict: %v", mapping, err, conflict)
			}
			if conflict && !strings.Contains(fmt.Sprint(err), fmt.Sprintf("(pid %d)", os.Getpid())) {
				t.Errorf("%v does not name this process", err)
			}
			if err := Conflicts(pod(1, mapping), nil, false); err != nil {
				t.Errorf("processes left out: %v", err)
			}
		})
	}
}

func TestUDPFlowFromBeforeTheMappingMovesToThePod(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		first := pod(2, "9999:9/tcp")
		if err := n.apply(t, first); err != nil { // conntrack sees packets from now on
			t.Fatal(err)
		}
		a := pod(1, "192.0.2.1/8053:53/udp")
		nettest.UDPServer(t, n.pods[1], netip.AddrPortFrom(a.Addresses[0], 53))
		from := at("192.0.2.2:4444")
		if nettest.Dial(n.machine, "udp", from, at("192.0.2.1:8053"), time.Second/5) == nil {
			t.Fatal("the port answers before it is mapped")
		}
		if err := n.apply(t, a, first); err != nil {
			t.Fatal(err)
		}
		if err := nettest.Dial(n.machine, "udp", from, at("192.0.2.1:8053"), patience); err != nil {
			t.Errorf("the client's old flow: %v", err)
		}
		n.remove(t, a, first)
		if nettest.Dial(n.machine, "udp", from, at("192.0.2.1:8053"), time.Second/5) == nil {
			t.Error("the flow outlives the mapping")
		}
	})
}

func TestPortOfADeadPodIsFree(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		dead, fresh := pod(2, "8080:80/tcp"), pod(1, "8080:80/tcp")
		if err := n.apply(t, dead); err != nil {
			t.Fatal(err)
		}
		var conflict *ConflictError
		if err := n.apply(t, fresh, dead); !errors.As(err, &conflict) || conflict.Process {
			t.Fatalf("beside a living pod: %v, want a conflict", err)
		}
		dead.NetNS = "/run/netns/gone"
		if err := n.apply(t, fresh, dead); err != nil {
			t.Fatal(err)
		}
		nettest.TCPServer(t, n.pods[1], netip.AddrPortFrom(fresh.Addresses[0], 80))
		if err := nettest.Dial(n.machine, "tcp", netip.AddrPort{}, at("192.0.2.1:8080"), patience); err != nil {
			t.Error(err)
		}
	})
}

func TestSecondPodIsAppendedInOneRestoreAndAMissingChainIsWrittenWhole(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t, backend)
		first, second := pod(1, "0.0.0.0/8080:80/tcp"), pod(2, "0.0.0.0/8081:80/tcp")
		if err := errors.Join(n.apply(t, first), n.apply(t, second, first)); err != nil || n.writes != 2 {
			t.Fatalf("%d restores for two pods, want one each: %v", n.writes, err)
		}
		n.host.Run(t, "iptables-"+backend, "-t", "nat", "-F")
		n.host.Run(t, "iptables-"+backend, "-t", "nat", "-X")
		nettest.TCPServer(t, n.pods[1], netip.AddrPortFrom(first.Addresses[0], 80))
		nettest.TCPServer(t, n.pods[2], netip.AddrPortFrom(second.Addresses[0], 80))
		if err := n.apply(t, second, first); err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{"192.0.2.1:8080", "192.0.2.1:8081"} {
			if err := nettest.Dial(n.machine, "tcp", netip.AddrPort{}, at(to), patience); err != nil {
				t.Error(err)
			}
		}
	})
}
