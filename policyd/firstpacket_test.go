package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

const (
	firstPacketPods    = 500
	firstPacketCallers = 10
	// Twenty times fewer addresses than pods: each address serves many, one right after the other.
	firstPacketRange4 = "10.244.7.0/27"
	firstPacketRange6 = "fd00:7::/123"
	// Everybody talks from and to this port, so a new pod's flows look exactly like its predecessor's.
	talkPort = 9000
	tcpPort  = 9001
	// How long a pod lives after its ADD: long enough for several rounds of everybody's packets.
	podLife = 150 * time.Millisecond
)

const denyAll = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny, namespace: deny}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
`

// Five hundred pods under a default deny, each with its sockets open and sending before it has a network at all, and sent to
// by an outside machine and another pod all the time, with the ports of flows that the address's former owner had open:
// no packet reaches any of them, and none of theirs reaches anybody.
func TestNoPacketPassesFromAPodsFirstInstant(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		f := newFirstPacket(t, backend)
		former := f.openFlows(t)
		f.node.Write(t, "policy.yaml", denyAll)
		f.node.Settle(t)
		for _, p := range former {
			if err := f.node.Del(p.Pod); err != nil {
				t.Fatalf("DEL %s: %v", p.Name, err)
			}
		}
		f.heardTCP.Store(0) // until here they were open, and their stacks refused connections
		f.node.Outside.Run(t, "iptables-"+backend, "-t", "raw", "-Z")
		f.startAll(t)
		if heard := f.heardTCP.Load(); heard != 0 {
			t.Errorf("%d TCP connections of pods under the default deny were accepted outside or by the other pod", heard)
		}
		if heard := f.heardUDP.Load(); heard != 0 {
			t.Errorf("%d datagrams of pods under the default deny arrived outside or at the other pod", heard)
		}
		if n := f.synsOutside(t); n != 0 {
			t.Errorf("%d TCP packets from pods arrived outside", n)
		}
		f.checkTheTestSees(t)
	})
}

type firstPacket struct {
	node    *testnode.Node
	ctx     context.Context
	targets []netip.Addr // every address that a pod under the policy can have
	others  []speaker    // who sends to the targets and counts what comes from them: outside, and a pod that is open

	heardUDP, heardTCP atomic.Int64 // from pods named deny-…
}

// speaker is a machine that talks with all pods, in each family.
type speaker struct {
	ns    *nettest.NS
	addrs []netip.Addr
}

func newFirstPacket(t *testing.T, backend string) *firstPacket {
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	f := &firstPacket{ctx: ctx, node: testnode.New(t, testnode.Options{
		Backend: backend,
		Ranges:  []string{firstPacketRange4, firstPacketRange6},
		Conf:    map[string]any{"ipam": map[string]any{"reuseAfter": "0s"}},
	})}
	for _, r := range []string{firstPacketRange4, firstPacketRange6} {
		prefix := netip.MustParsePrefix(r)
		for a := prefix.Addr(); prefix.Contains(a); a = a.Next() {
			f.targets = append(f.targets, a)
		}
	}
	var manifests strings.Builder
	other := &testnode.Pod{Namespace: "open", Name: "other", UID: "other"}
	manifests.WriteString(other.Manifest(nil))
	for i := range firstPacketPods {
		manifests.WriteString(denyPod(i).Manifest(nil))
	}
	for i := range formerPods {
		manifests.WriteString(formerPod(i).Manifest(nil))
	}
	f.node.Write(t, "pods.yaml", manifests.String())
	f.node.Policyd(t)
	f.node.Attach(t, other)
	f.others = []speaker{
		{f.node.Outside, []netip.Addr{testnode.Outside4, testnode.Outside6}},
		{other.NS, []netip.Addr{other.IP(t, testnode.Node4), other.IP(t, testnode.Node6)}},
	}
	f.targets = slices.DeleteFunc(f.targets, func(a netip.Addr) bool { return slices.Contains(f.others[1].addrs, a) })
	f.node.Outside.Run(t, "iptables-"+backend, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-s", firstPacketRange4)
	for _, s := range f.others {
		f.speak(t, s)
	}
	return f
}

func denyPod(i int) *testnode.Pod {
	return &testnode.Pod{Namespace: "deny", Name: fmt.Sprintf("deny-%03d", i), UID: fmt.Sprintf("deny-%03d", i)}
}

// formerPods take most of the range, so that the first pods under the policy inherit their addresses.
const formerPods = 25

func formerPod(i int) *testnode.Pod {
	return &testnode.Pod{Namespace: "talk", Name: fmt.Sprintf("former-%03d", i), UID: fmt.Sprintf("former-%03d", i)}
}

// speak sends to every target all the time, over UDP from the one port and with TCP connections, and counts what pods send.
func (f *firstPacket) speak(t *testing.T, s speaker) {
	for _, a := range s.addrs {
		conn, listener := sockets(t, s.ns, a)
		go f.count(conn, listener)
		go f.sendUDP(conn, a)
		go f.dialTCP(s.ns, a)
	}
}

// sockets opens a UDP and a TCP socket in a namespace; an unspecified address takes both families.
func sockets(t testing.TB, ns *nettest.NS, a netip.Addr) (*net.UDPConn, *net.TCPListener) {
	t.Helper()
	var conn *net.UDPConn
	var listener *net.TCPListener
	var errUDP, errTCP error
	ns.Do(t, func() {
		conn, errUDP = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, talkPort)))
		listener, errTCP = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, tcpPort)))
	})
	if err := errors.Join(errUDP, errTCP); err != nil {
		t.Fatalf("sockets in %s: %v", ns.Name, err)
	}
	t.Cleanup(func() { conn.Close(); listener.Close() })
	return conn, listener
}

func (f *firstPacket) count(conn *net.UDPConn, listener *net.TCPListener) {
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			f.heardTCP.Add(1)
			c.Close()
		}
	}()
	buf := make([]byte, 64)
	for {
		n, _, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && strings.HasPrefix(string(buf[:n]), "deny") {
			f.heardUDP.Add(1)
		}
	}
}

// each calls fn for all targets of a family, a round every few milliseconds, until the test ends.
func (f *firstPacket) each(like netip.Addr, round time.Duration, fn func(netip.Addr)) {
	tick := time.NewTicker(round)
	defer tick.Stop()
	for {
		for _, to := range f.targets {
			if to.Is4() == like.Is4() {
				fn(to)
			}
		}
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (f *firstPacket) sendUDP(conn *net.UDPConn, from netip.Addr) {
	f.each(from, 10*time.Millisecond, func(to netip.Addr) {
		_, _ = conn.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(to, talkPort)) // no route yet, or closed: next round
	})
}

func (f *firstPacket) dialTCP(ns *nettest.NS, from netip.Addr) {
	dialer := net.Dialer{Timeout: 20 * time.Millisecond}
	_ = nettest.Enter(ns, func() {
		f.each(from, 10*time.Millisecond, func(to netip.Addr) {
			if f.ctx.Err() != nil {
				return
			}
			if c, err := dialer.DialContext(f.ctx, "tcp", netip.AddrPortFrom(to, tcpPort).String()); err == nil {
				c.Close()
			}
		})
	})
}

// talker is a pod of the test with its sockets.
type talker struct {
	*testnode.Pod
	gotUDP, gotTCP atomic.Int64
	stop           context.CancelFunc
	done           sync.WaitGroup
}

// prepare makes a pod's sandbox with sockets that listen, and that send from now on: before the pod has a network.
func (f *firstPacket) prepare(t testing.TB, p *testnode.Pod) *talker {
	k := &talker{Pod: f.node.Sandbox(t, p)}
	var ctx context.Context
	ctx, k.stop = context.WithCancel(f.ctx)
	conn, listener := sockets(t, p.NS, netip.IPv6Unspecified())
	context.AfterFunc(ctx, func() { conn.Close(); listener.Close() })
	k.done.Go(func() {
		buf := make([]byte, 64)
		for {
			if _, _, err := conn.ReadFromUDPAddrPort(buf); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				k.gotUDP.Add(1)
			}
		}
	})
	k.done.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			k.gotTCP.Add(1)
			c.Close()
		}
	})
	k.done.Go(func() { f.sendFrom(ctx, p, conn) })
	return k
}

func (f *firstPacket) sendFrom(ctx context.Context, p *testnode.Pod, conn *net.UDPConn) {
	dialer := net.Dialer{Timeout: 10 * time.Millisecond}
	_ = nettest.Enter(p.NS, func() {
		for ctx.Err() == nil {
			for _, other := range f.others {
				for _, a := range other.addrs {
					_, _ = conn.WriteToUDPAddrPort([]byte(p.Name), netip.AddrPortFrom(a, talkPort))
					if c, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(a, tcpPort).String()); err == nil {
						c.Close()
					}
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Millisecond):
			}
		}
	})
}

// openFlows attaches pods that no policy guards, and waits until each has open flows with everybody.
func (f *firstPacket) openFlows(t *testing.T) (former []*talker) {
	for i := range formerPods {
		k := f.prepare(t, formerPod(i))
		f.node.Attach(t, k.Pod)
		former = append(former, k)
	}
	for _, k := range former {
		nettest.Eventually(t, 10*time.Second, "flows with "+k.Name, func() error {
			if k.gotUDP.Load() < 4 || k.gotTCP.Load() == 0 {
				return fmt.Errorf("%d datagrams, %d connections so far", k.gotUDP.Load(), k.gotTCP.Load())
			}
			return nil
		})
	}
	for _, k := range former { // their processes end with the sandbox; the others' packets go on
		k.stop()
		k.done.Wait()
	}
	return former
}

// startAll runs the pods under the default deny through their short lives.
func (f *firstPacket) startAll(t *testing.T) {
	work := make(chan int)
	var wg sync.WaitGroup
	for range firstPacketCallers {
		wg.Go(func() {
			for i := range work {
				f.live(t, denyPod(i))
			}
		})
	}
	for i := range firstPacketPods {
		work <- i
	}
	close(work)
	wg.Wait()
}

func (f *firstPacket) live(t *testing.T, p *testnode.Pod) {
	ns := nettest.NewNS(t, "pod-"+p.Name)
	p.NS = ns
	k := f.prepare(t, p)
	defer k.done.Wait()
	defer k.stop()
	if err := f.node.Add(p); err != nil {
		t.Errorf("ADD %s: %v", p.Name, err)
		return
	}
	select {
	case <-f.ctx.Done():
	case <-time.After(podLife):
	}
	if udp, tcp, in := k.gotUDP.Load(), k.gotTCP.Load(), received(t, ns); udp+tcp+in != 0 {
		t.Errorf("%s (%v): got %d datagrams, %d connections, %d IPv4 packets", p.Name, p.Result.IPs, udp, tcp, in)
	}
	if err := f.probe(netip.AddrPortFrom(p.IP(t, testnode.Node4), tcpPort)); err != nil {
		t.Errorf("%s: its own node cannot reach it: %v", p.Name, err)
	}
	if err := f.node.Del(p); err != nil {
		t.Errorf("DEL %s: %v", p.Name, err)
	}
}

// probe connects from the node as kubelet does, and resets the connection: an orderly end could be repeated to the address's
// next owner, who would count a packet of its own node.
func (f *firstPacket) probe(to netip.AddrPort) (err error) {
	enter := nettest.Enter(f.node.NS, func() {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", to.String(), 5*time.Second); err == nil {
			err = errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close())
		}
	})
	return errors.Join(enter, err)
}

// received counts the IPv4 packets that the namespace's stack has taken in over any link (Ip InReceives of
// /proc/net/snmp).
func received(t testing.TB, ns *nettest.NS) int64 {
	var text []byte
	var err error
	if enter := nettest.Enter(ns, func() { text, err = os.ReadFile("/proc/thread-self/net/snmp") }); enter != nil || err != nil {
		t.Errorf("read snmp of %s: %v %v", ns.Name, enter, err)
		return 0
	}
	lines := strings.Split(string(text), "\n") // names in one line, figures in the next
	names, figures := strings.Fields(lines[0]), strings.Fields(lines[1])
	for i, name := range names {
		if name == "InReceives" {
			n, err := strconv.ParseInt(figures[i], 10, 64)
			if err != nil {
				t.Errorf("snmp of %s: %v", ns.Name, err)
			}
			return n
		}
	}
	t.Errorf("snmp of %s has no InReceives: %s", ns.Name, lines[0])
	return 0
}

// synsOutside is the number of TCP packets from pods under the policy that arrived outside (IPv4).
func (f *firstPacket) synsOutside(t *testing.T) int {
	t.Helper()
	out := f.node.Outside.Run(t, "iptables-"+f.backend(), "-t", "raw", "-nvxL", "PREROUTING")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	n, err := strconv.Atoi(strings.Fields(lines[len(lines)-1])[0])
	if err != nil {
		t.Fatalf("counter: %v in %s", err, out)
	}
	return n
}

func (f *firstPacket) backend() string { return f.node.Backend() }

// checkTheTestSees lifts the policy: now the same pod must be heard and must hear, or the silence before proves nothing.
func (f *firstPacket) checkTheTestSees(t *testing.T) {
	f.node.Remove(t, "policy.yaml")
	f.node.Settle(t)
	k := f.prepare(t, denyPod(0))
	f.node.Attach(t, k.Pod)
	nettest.Eventually(t, 10*time.Second, "traffic without the policy", func() error {
		if k.gotUDP.Load() == 0 || k.gotTCP.Load() == 0 || f.heardUDP.Load() == 0 || f.heardTCP.Load() == 0 ||
			f.synsOutside(t) == 0 || received(t, k.NS) == 0 {
			return fmt.Errorf("got %d datagrams and %d connections, others heard %d and %d, %d packets outside",
				k.gotUDP.Load(), k.gotTCP.Load(), f.heardUDP.Load(), f.heardTCP.Load(), f.synsOutside(t))
		}
		return nil
	})
	k.stop()
	k.done.Wait()
}
