package nodenet_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nodenet"
	"github.com/postern-cni/postern/pkg/rule"
)

// inner is a datagram in a VXLAN packet.
type inner struct {
	srcMAC, dstMAC [6]byte
	src, dst       netip.Addr
	payload        string
}

// vxlan writes a VXLAN packet, without the outer headers (RFC 7348, section 5).
func (i inner) vxlan() []byte {
	var udp bytes.Buffer
	for _, word := range []uint16{serverPort, serverPort, uint16(8 + len(i.payload)), 0} {
		_ = binary.Write(&udp, binary.BigEndian, word)
	}
	udp.WriteString(i.payload)
	datagram := udp.Bytes()
	var ip, pseudo []byte
	etherType := []byte{0x08, 0x00}
	if i.src.Is4() {
		ip = append([]byte{0x45, 0, 0, byte(20 + len(datagram)), 0, 1, 0, 0, 64, 17, 0, 0}, i.src.AsSlice()...)
		ip = append(ip, i.dst.AsSlice()...)
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	} else {
		etherType = []byte{0x86, 0xdd}
		ip = append([]byte{0x60, 0, 0, 0, 0, byte(len(datagram)), 17, 64}, i.src.AsSlice()...)
		ip = append(ip, i.dst.AsSlice()...)
	}
	pseudo = append(append(append(pseudo, i.src.AsSlice()...), i.dst.AsSlice()...), 0, 17, 0, byte(len(datagram)))
	binary.BigEndian.PutUint16(datagram[6:], checksum(append(pseudo, datagram...)))
	const vni = nodenet.DefaultVNI
	out := []byte{0x08, 0, 0, 0, vni >> 16, vni >> 8 & 0xff, vni & 0xff, 0}
	out = append(append(append(out, i.dstMAC[:]...), i.srcMAC[:]...), etherType...)
	return append(append(out, ip...), datagram...)
}

// checksum is that of RFC 1071.
func checksum(data []byte) uint16 {
	var sum uint32
	for i, b := range data {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	for sum>>16 > 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// inbox is what has arrived at a pod.
type inbox struct {
	mu  sync.Mutex
	got map[string]bool
}

// listen collects the payloads of datagrams.
func listen(t *testing.T, ns *nettest.NS, addresses []netip.Addr) *inbox {
	t.Helper()
	box := &inbox{got: map[string]bool{}}
	for _, a := range addresses {
		var conn *net.UDPConn
		var err error
		ns.Do(t, func() { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at(a))) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 1500)
			for {
				n, _, err := conn.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				box.mu.Lock()
				box.got[string(buf[:n])] = true
				box.mu.Unlock()
			}
		}()
	}
	return box
}

func (b *inbox) has(payload string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.got[payload]
}

func send(t *testing.T, ns *nettest.NS, to netip.AddrPort, what []byte) {
	t.Helper()
	var err error
	ns.Do(t, func() {
		var conn *net.UDPConn
		if conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); err == nil {
			_, err = conn.Write(what)
			conn.Close()
		}
	})
	if err != nil {
		t.Fatalf("%s sends to %s: %v", ns.Name, to, err)
	}
}

// undernets repeats a test for both families of the nodes' own addresses, on nodes that share no link.
func undernets(t *testing.T, test func(t *testing.T, s *scene, outer int)) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for outer, f := range rule.Families {
			t.Run("over "+f.String(), func(t *testing.T) {
				s := newScene(t, backend, apart, 3, nodenet.Options{})
				for _, n := range s.nodes {
					n.Addresses = n.Addresses[outer : outer+1]
				}
				s.apply(t)
				test(t, s, outer)
			})
		}
	})
}

func TestTheTunnelIsNoWayIn(t *testing.T) {
	undernets(t, func(t *testing.T, s *scene, outer int) {
		one, two := s.nodes[0], s.nodes[1]
		victim, addresses := one.pod(t, 10)
		box := listen(t, victim, addresses)
		neighbour, _ := one.pod(t, 11)
		remote, _ := two.pod(t, 10)
		port := netip.AddrPortFrom(one.Addresses[0], nodenet.DefaultPort)
		mac := func(n *node) [6]byte { return nodenet.MAC(n.Addresses[0]) }

		// What a Service does whose endpoint is a node, with and without the masquerading of kube-proxy.
		service := netip.AddrPortFrom(addrs("10.96.0.1", "fd00:10:96::1")[outer], 53)
		iptables := []string{"iptables", "ip6tables"}[outer] + "-" + s.backend
		for _, n := range []*node{one, two} {
			n.ns.Run(t, iptables, "-w", "-t", "nat", "-A", "PREROUTING", "-d", service.Addr().String(), "-p", "udp", "--dport", "53",
				"-j", "DNAT", "--to-destination", port.String())
		}
		two.ns.Run(t, iptables, "-w", "-t", "nat", "-I", "POSTROUTING", "-p", "udp", "-d", port.Addr().String(), "-j", "MASQUERADE")
		s.outside.Run(t, "ip", "route", "add", service.Addr().String(), "via", s.gatewayOf(outsideNumber)[outer].String())
		s.middle.Run(t, "ip", "route", "add", service.Addr().String(), "via", two.Addresses[0].String())

		for family, to := range addresses {
			pod := func(n, number int) netip.Addr {
				return netip.MustParseAddr(fmt.Sprintf([]string{"10.244.%d.%d", "fd00:10:244:%d::%x"}[family], n, number))
			}
			own := inner{srcMAC: mac(two), dstMAC: mac(one), src: pod(2, 10), dst: to}
			with := func(change func(*inner)) inner {
				i := own
				change(&i)
				return i
			}
			for i, tt := range []struct {
				name string
				from *nettest.NS
				to   netip.AddrPort
				what inner
			}{
				{"a node, with the source of another node's pod", two.ns, port, with(func(i *inner) { i.src = pod(3, 10) })},
				{"a node, with the source and the MAC of another node", two.ns, port, with(func(i *inner) { i.src, i.srcMAC = pod(3, 10), mac(s.nodes[2]) })},
				{"a node, with a MAC that nobody has", two.ns, port, with(func(i *inner) { i.srcMAC[5]++ })},
				{"a node, with the source of a pod of this node", two.ns, port, with(func(i *inner) { i.src = pod(1, 11) })},
				{"a node, with this node's source and MAC", two.ns, port, with(func(i *inner) { i.src, i.srcMAC = pod(1, 11), mac(one) })},
				{"a node, with a source of the outside", two.ns, port, with(func(i *inner) { i.src = addrs("203.0.113.7", "2001:db8:99::7")[family] })},
				{"a machine outside", s.outside, port, own},
				{"a machine outside, by a Service of another node", s.outside, service, own},
				{"a pod of this node", neighbour, port, own},
				{"a pod of this node, by a Service", neighbour, service, own},
				{"a pod of another node", remote, port, own},
				{"a pod of another node, by a Service", remote, service, own},
			} {
				bad, good := fmt.Sprintf("bad %d %d", family, i), own
				good.payload = fmt.Sprintf("good %d %d", family, i)
				tt.what.payload = bad
				send(t, tt.from, tt.to, tt.what.vxlan())
				nettest.Eventually(t, limit, "what the node itself sends", func() error {
					send(t, two.ns, port, good.vxlan())
					if !box.has(good.payload) {
						return fmt.Errorf("not there")
					}
					return nil
				})
				if box.has(bad) {
					t.Errorf("%s gets through the tunnel to %s", tt.name, to)
				}
			}
		}
	})
}
