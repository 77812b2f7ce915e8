package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// A scene is a node with some pods, each of which answers on the TCP ports 80, 81, 82 and 5432 and the UDP ports 53 and 54.
// Tests state who reaches whom in a table; every line is tried with real packets, in both families.
type scene struct {
	*testnode.Node
	t      *testing.T
	pods   map[string]*scenePod // by namespace/name
	where  map[string]*nettest.NS
	daemon *testnode.Policyd
}

// scenePod is a pod as the manifests have it.
type scenePod struct {
	name   string // namespace/name
	labels map[string]string
	ports  string // named ports as JSON: a container's ports
	uid    string
	meta   string // further fields of the metadata, as ", key: value"
	spec   string // further lines of the spec
	status string
	host   []attachment.PortMapping
	at     *testnode.Pod
	addrs  map[bool]netip.Addr // by "is IPv4"
}

var (
	sceneTCP = []uint16{80, 81, 82, 5432}
	sceneUDP = []uint16{53, 54}
)

// pod describes a pod of a scene: "shop/web", "app=web,tier=front", and a container's ports as "http:80/TCP,dns:53/UDP".
func pod(name, labels, ports string) *scenePod {
	p := &scenePod{name: name, labels: map[string]string{}, uid: "uid-" + strings.ReplaceAll(name, "/", "-")}
	for _, kv := range fields(labels) {
		k, v, _ := strings.Cut(kv, "=")
		p.labels[k] = v
	}
	type containerPort struct {
		Name          string `json:"name"`
		ContainerPort int    `json:"containerPort"`
		Protocol      string `json:"protocol"`
	}
	list := []containerPort{}
	for _, text := range fields(ports) {
		var c containerPort
		name, rest, _ := strings.Cut(text, ":")
		c.Name = name
		if _, err := fmt.Sscanf(rest, "%d/%s", &c.ContainerPort, &c.Protocol); err != nil {
			panic(text)
		}
		list = append(list, c)
	}
	text, err := json.Marshal(list)
	if err != nil {
		panic(err)
	}
	p.ports = string(text)
	return p
}

func fields(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

func (p *scenePod) manifest() string {
	namespace, name, _ := strings.Cut(p.name, "/")
	labels, err := json.Marshal(p.labels)
	if err != nil {
		panic(err)
	}
	text := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, uid: %q, labels: %s%s}\nspec:\n"+
		"  containers:\n  - {name: c, image: none, ports: %s}\n%s", name, namespace, p.uid, labels, p.meta, p.ports, p.spec)
	if p.status != "" {
		text += "status: " + p.status + "\n"
	}
	return text
}

// newScene makes the node, attaches the pods and starts policyd, with namespaces as they are (further manifests may
// declare them with labels).
func newScene(t *testing.T, backend string, manifests string, pods ...*scenePod) *scene {
	t.Helper()
	return newSceneOn(t, testnode.New(t, testnode.Options{Backend: backend}), manifests, pods...)
}

// newSceneOn is newScene on a node of the test's own.
func newSceneOn(t *testing.T, node *testnode.Node, manifests string, pods ...*scenePod) *scene {
	t.Helper()
	s := &scene{
		Node:  node,
		t:     t,
		pods:  map[string]*scenePod{},
		where: map[string]*nettest.NS{},
	}
	s.where["node"], s.where["outside"] = s.NS, s.Outside
	s.Write(t, "manifests.yaml", manifests)
	for _, p := range pods {
		s.writePod(p)
	}
	s.daemon = s.Policyd(t)
	for _, p := range pods {
		s.attach(p)
	}
	s.serve("outside", testnode.Outside4, testnode.Outside6)
	return s
}

func (s *scene) writePod(p *scenePod) {
	s.Write(s.t, "pod-"+strings.ReplaceAll(p.name, "/", "-")+".yaml", p.manifest())
}

// relabel gives a pod other labels.
func (s *scene) relabel(name, labels string) {
	s.pods[name].labels = pod(name, labels, "").labels
	s.writePod(s.pods[name])
	s.Settle(s.t)
}

func (s *scene) attach(p *scenePod) {
	namespace, name, _ := strings.Cut(p.name, "/")
	p.at = s.Attach(s.t, &testnode.Pod{Namespace: namespace, Name: name, UID: p.uid, Ports: p.host})
	p.addrs = map[bool]netip.Addr{true: p.at.IP(s.t, testnode.Node4), false: p.at.IP(s.t, testnode.Node6)}
	s.pods[p.name], s.where[p.name] = p, p.at.NS
	s.serve(p.name, p.addrs[true], p.addrs[false])
}

// restart ends a pod and starts it anew: another UID, another sandbox, another address.
func (s *scene) restart(name string) {
	s.t.Helper()
	p := *s.pods[name]
	if err := s.Del(p.at); err != nil {
		s.t.Fatalf("DEL %s: %v", name, err)
	}
	p.uid += "-again"
	s.writePod(&p)
	s.attach(&p)
}

// serve listens on the scene's ports at some addresses.
func (s *scene) serve(name string, addrs ...netip.Addr) {
	for _, a := range addrs {
		for _, port := range sceneTCP {
			nettest.TCPServer(s.t, s.where[name], netip.AddrPortFrom(a, port))
		}
		for _, port := range sceneUDP {
			nettest.UDPServer(s.t, s.where[name], netip.AddrPortFrom(a, port))
		}
	}
}

// apply writes policies (name, and spec in YAML) and waits until they are in force.
func (s *scene) apply(policies ...[2]string) {
	s.t.Helper()
	for _, p := range policies {
		s.Write(s.t, "policy-"+strings.ReplaceAll(p[0], "/", "-")+".yaml", networkPolicy(p[0], p[1]))
	}
	s.Settle(s.t)
}

// withdraw deletes policies.
func (s *scene) withdraw(names ...string) {
	s.t.Helper()
	for _, name := range names {
		s.Remove(s.t, "policy-"+strings.ReplaceAll(name, "/", "-")+".yaml")
	}
	s.Settle(s.t)
}

// networkPolicy returns the manifest of a NetworkPolicy: "namespace/name" and the lines of its spec, indented by two.
func networkPolicy(name, spec string) string {
	namespace, name, _ := strings.Cut(name, "/")
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s, namespace: %s}\nspec:\n%s\n",
		name, namespace, strings.Trim(spec, "\n"))
}

// namespace returns the manifest of a Namespace with labels as in [pod].
func namespace(name, labels string) string {
	text, err := json.Marshal(pod("x/x", labels, "").labels)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: %s}\n---\n", name, text)
}

const (
	yesWait = 5 * time.Second
	noWait  = 300 * time.Millisecond
)

// expect tries every line of a table "from to protocol/port verdict [family]" in parallel, in both families unless one is
// named. from and to are pods, "outside" or "node"; to may be an address. The protocols are tcp, udp, sctp and icmp (without
// port). "yes" wants an answer, "no" wants silence: a refusal would be an answer.
func (s *scene) expect(table string) {
	s.t.Helper()
	var wg sync.WaitGroup
	for _, line := range strings.Split(table, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 4 {
			s.t.Fatalf("line %q: want from, to, protocol/port, verdict", line)
		}
		for _, v4 := range []bool{true, false} {
			if len(f) > 4 && (f[4] == "v4") != v4 || s.where[f[0]] == nil {
				if s.where[f[0]] == nil {
					s.t.Fatalf("line %q: nobody is called %s", line, f[0])
				}
				continue
			}
			wg.Go(func() { s.try(f, v4) })
		}
	}
	wg.Wait()
}

func (s *scene) try(f []string, v4 bool) {
	to, proto, want := s.address(f[1], v4), f[2], f[3] == "yes"
	if !to.IsValid() {
		return
	}
	wait := noWait
	if want {
		wait = yesWait
	}
	name, text, _ := strings.Cut(proto, "/")
	var err error
	var port uint16
	if _, scan := fmt.Sscan(text, &port); scan != nil && name != "icmp" {
		panic(text)
	}
	switch name {
	case "icmp":
		err = echo(s.where[f[0]], to, wait)
	case "sctp":
		err = associate(s.where[f[0]], s.where[f[1]], netip.AddrPortFrom(to, port), wait)
	default:
		err = nettest.Dial(s.where[f[0]], name, netip.AddrPort{}, netip.AddrPortFrom(to, port), wait)
	}
	switch {
	case want && err != nil:
		s.t.Errorf("%s -> %s (%s) %s: want an answer, got %v", f[0], f[1], to, proto, err)
	case !want && err == nil:
		s.t.Errorf("%s -> %s (%s) %s: want silence, got an answer", f[0], f[1], to, proto)
	case !want && !nettest.Blocked(err):
		s.t.Errorf("%s -> %s (%s) %s: want silence, got %v", f[0], f[1], to, proto, err)
	}
}

// address is where somebody is reached; invalid where a literal address is of the other family.
func (s *scene) address(who string, v4 bool) netip.Addr {
	if a, err := netip.ParseAddr(who); err == nil {
		if a.Is4() != v4 {
			return netip.Addr{}
		}
		return a
	}
	switch p := s.pods[who]; {
	case p != nil:
		return p.addrs[v4]
	case who == "outside" && v4:
		return testnode.Outside4
	case who == "outside":
		return testnode.Outside6
	case who == "node" && v4:
		return testnode.Node4
	case who == "node":
		return testnode.Node6
	}
	s.t.Errorf("nobody is called %s", who)
	return netip.Addr{}
}

// echo sends an ICMP or ICMPv6 echo request and waits for the reply.
func echo(ns *nettest.NS, to netip.Addr, wait time.Duration) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var conn net.Conn
	var err error
	dialer := net.Dialer{Timeout: wait}
	if enter := nettest.Enter(ns, func() { conn, err = dialer.DialContext(context.Background(), network, to.String()) }); enter != nil {
		return enter
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	packet := []byte{request, 0, 0, 0, 0x70, 0x73, 0, 1}
	if to.Is4() { // the kernel fills in the checksum of ICMPv6 alone (RFC 3542, 3.1)
		sum := ^(uint16(request)<<8 + 0x7073 + 1)
		packet[2], packet[3] = byte(sum>>8), byte(sum)
	}
	if _, err := conn.Write(packet); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	buf := make([]byte, 256)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		answer := buf[:n]
		if to.Is4() && n > 20 { // a raw socket gives the IPv4 header too
			answer = answer[4*(answer[0]&0x0f):]
		}
		if len(answer) >= 8 && answer[0] == reply && answer[4] == 0x70 && answer[5] == 0x73 {
			return nil
		}
	}
}

// associate sends the first packet of an SCTP association (RFC 9260, 3.3.2) again and again until it is seen at the other end.
// The kernel need not know SCTP: both ends are raw sockets.
func associate(from, to *nettest.NS, at netip.AddrPort, wait time.Duration) error {
	network := "ip4:sctp"
	if at.Addr().Is6() {
		network = "ip6:sctp"
	}
	var in net.PacketConn
	var out net.Conn
	var err, err2 error
	enter := nettest.Enter(to, func() { in, err = net.ListenPacket(network, at.Addr().String()) })
	enter2 := nettest.Enter(from, func() { out, err2 = net.Dial(network, at.Addr().String()) })
	if err := errors.Join(enter, enter2, err, err2); err != nil {
		return err
	}
	defer in.Close()
	defer out.Close()
	packet := make([]byte, 32)
	binary.BigEndian.PutUint16(packet[0:], uint16(40000+rand.IntN(20000)))
	binary.BigEndian.PutUint16(packet[2:], at.Port())
	// One chunk of 20 bytes, INIT: tag, window, streams out and in, first number.
	copy(packet[12:], []byte{1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1})
	binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))
	buf := make([]byte, 128)
	for end := time.Now().Add(wait); ; {
		if _, err := out.Write(packet); err != nil && time.Now().After(end) {
			return err
		}
		if err := in.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return err
		}
		n, _, err := in.ReadFrom(buf)
		if err == nil && bytes.Equal(buf[:n], packet) {
			return nil
		}
		if err != nil && time.Now().After(end) {
			return err
		}
	}
}

// figures reads the daemon's metrics that have no labels.
func (s *scene) figures() map[string]float64 { return figures(s.t, s.NS, s.daemon) }

func figures(t testing.TB, ns *nettest.NS, d *testnode.Policyd) map[string]float64 {
	t.Helper()
	_, at, _ := strings.Cut(d.Log(), "serving metrics and health")
	_, at, _ = strings.Cut(at, "address=")
	at, _, _ = strings.Cut(at, "\n")
	client := http.Client{Timeout: yesWait, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
			enter := nettest.Enter(ns, func() { c, err = (&net.Dialer{}).DialContext(ctx, network, at) })
			return c, errors.Join(enter, err)
		}}}
	response, err := client.Get("http://" + at + "/metrics")
	if err != nil {
		t.Fatalf("read policyd's metrics: %v", err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("read policyd's metrics: %v", err)
	}
	found := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		var name string
		var value float64
		if n, _ := fmt.Sscanf(line, "%s %g", &name, &value); n == 2 && name != "#" {
			found[name] = value
		}
	}
	return found
}

// eachScene runs a test on both backends.
func eachScene(t *testing.T, manifests string, pods func() []*scenePod, test func(s *scene)) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		test(newScene(t, backend, manifests, pods()...))
	})
}

// redirect gives the node a Service-like address translation, as kube-proxy would: what goes to at, TCP and UDP, is sent to a pod.
func (s *scene) redirect(at, to netip.AddrPort) {
	s.t.Helper()
	tables := "iptables-" + s.Backend()
	if at.Addr().Is6() {
		tables = "ip6tables-" + s.Backend()
	}
	for _, chain := range []string{"PREROUTING", "OUTPUT"} {
		for _, proto := range []string{"tcp", "udp"} {
			s.NS.Run(s.t, tables, "-t", "nat", "-A", chain, "-d", at.Addr().String(), "-p", proto, "--dport",
				fmt.Sprint(at.Port()), "-j", "DNAT", "--to-destination", to.String())
		}
	}
}

// conn is an open connection to a server that echoes lines.
type conn struct {
	net.Conn
}

// open connects and waits for the server's greeting.
func (s *scene) open(from, to string, port uint16, v4 bool) (*conn, error) {
	var c net.Conn
	var err error
	dialer := net.Dialer{Timeout: yesWait}
	at := netip.AddrPortFrom(s.address(to, v4), port)
	if enter := nettest.Enter(s.where[from], func() { c, err = dialer.DialContext(context.Background(), "tcp", at.String()) }); enter != nil {
		return nil, enter
	}
	if err != nil {
		return nil, err
	}
	s.t.Cleanup(func() { c.Close() })
	buf := make([]byte, 128)
	if err := c.SetReadDeadline(time.Now().Add(yesWait)); err != nil {
		return nil, err
	}
	_, err = c.Read(buf)
	return &conn{c}, err
}

// alive sends a line and waits for its echo.
func (c *conn) alive(wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("still here\n")); err != nil {
		return err
	}
	buf := make([]byte, 128)
	n, err := c.Read(buf)
	if err == nil && n == 0 {
		err = errors.New("nothing came back")
	}
	return err
}

// pipe runs a command in a namespace with a text on its standard input.
func pipe(ns *nettest.NS, stdin, name string, args ...string) error {
	cmd := ns.Command(context.Background(), name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("in %s: %s %s: %w: %s\n%s", ns.Name, name, strings.Join(args, " "), err, out, stdin)
	}
	return nil
}
