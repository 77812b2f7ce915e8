package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// endsWithin is the time in which flows end that are no longer allowed; a test checks five times that.
const endsWithin = time.Second

// A speaker is who speaks over a flow while its permission goes, or, with "then", who speaks first afterwards.
var speakers = []string{"client", "server", "then client", "then server"}

const (
	flowPort = 7000
	nodePort = 9700
)

// revokeScene has servers of all kinds: db is closed in both directions, as web is; in is closed for ingress alone; free is
// open.
type revokeScene struct {
	*scene
	flows []*spoken
	port  int // the last one that a client got
}

// open opens a flow.
func (s *revokeScene) open(t *testing.T, proto, from, to, speaker string, by, at netip.AddrPort) {
	t.Helper()
	s.port = max(s.port, 20000) + 1
	name := fmt.Sprintf("%s %s to %s at %s, %s speaks", proto, from, to, by, speaker)
	s.flows = append(s.flows, &spoken{openFlow(t, name, proto, s.port, s.where[from], s.where[to], by, at), from, to, speaker})
}

// spoken is a flow of a test's with its role.
type spoken struct {
	*flow
	from, to string // names of the scene
	speaker  string // of speakers, or "both" for one that another rule allows
}

var revokePolicies = [][2]string{
	{"shop/closed", "  podSelector: {matchExpressions: [{key: app, operator: In, values: [db, web, gone]}]}\n  policyTypes: [Ingress, Egress]"},
	{"shop/in-closed", "  podSelector: {matchExpressions: [{key: app, operator: In, values: [in, was-in]}]}\n  policyTypes: [Ingress]"},
	{"shop/web", "  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]"},
	{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from:
    - podSelector: {matchLabels: {app: web}}
    - namespaceSelector: {matchLabels: {tenant: manning}}
    - ipBlock: {cidr: 198.51.100.1/32}
    - ipBlock: {cidr: "2001:db8::1/128"}`},
	{"shop/in", `
  podSelector: {matchLabels: {app: in}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: other}}}, {ipBlock: {cidr: 198.51.100.1/32}}, {ipBlock: {cidr: "2001:db8::1/128"}}]`},
	{"shop/keep", `
  podSelector: {matchExpressions: [{key: app, operator: In, values: [db, in, was-in]}]}
  ingress: [{from: [{podSelector: {matchLabels: {app: keeper}}}]}]`},
}

const revokeBank = "tenant=manning"

func newRevokeScene(t *testing.T, backend string) *revokeScene {
	t.Helper()
	pods := []*scenePod{pod("shop/web", "app=web", ""), pod("shop/db", "app=db", ""), pod("shop/in", "app=in", ""),
		pod("shop/free", "app=free", ""), pod("shop/other", "app=other", ""), pod("shop/keeper", "app=keeper", ""),
		pod("bank/web", "app=web", "")}
	pods[1].host = []attachment.PortMapping{{HostPort: nodePort, ContainerPort: flowPort, Protocol: "tcp"},
		{HostPort: nodePort, ContainerPort: flowPort, Protocol: "udp"}}
	s := &revokeScene{scene: newScene(t, backend, namespace("bank", revokeBank), pods...)}
	for _, service := range []string{"10.96.0.9", "fd00:96::9"} {
		at := netip.MustParseAddr(service)
		s.redirect(netip.AddrPortFrom(at, 80), netip.AddrPortFrom(s.address("shop/db", at.Is4()), flowPort))
	}
	return s
}

// revokePaths are the ways between a client and a server; by is the address that the client asks for, if not the server's.
var revokePaths = []struct {
	from, to, by string
	protos       string
	keep         bool
}{
	{"shop/web", "shop/db", "", "tcp udp", false},
	{"shop/web", "shop/db", "service", "tcp udp", false},
	{"outside", "shop/db", "", "tcp udp", false},
	{"outside", "shop/db", "hostPort", "tcp udp", false},
	{"bank/web", "shop/db", "", "tcp udp", false},
	{"shop/other", "shop/in", "", "tcp", false},
	{"outside", "shop/in", "", "tcp", false},
	{"shop/other", "shop/free", "", "tcp", false},
	{"shop/keeper", "shop/db", "", "tcp udp", true},
	{"shop/keeper", "shop/in", "", "tcp", true},
}

// openAll puts the policies into force and opens every kind of flow, with every kind of speaker, in both families.
func (s *revokeScene) openAll(t *testing.T) {
	t.Helper()
	s.apply(revokePolicies...)
	s.flows = nil
	for _, p := range revokePaths {
		for _, proto := range strings.Fields(p.protos) {
			for _, v4 := range []bool{true, false} {
				who := speakers
				if p.keep {
					who = []string{"both"}
				}
				for _, speaker := range who {
					at := netip.AddrPortFrom(s.address(p.to, v4), flowPort)
					to := at
					switch {
					case p.by == "hostPort":
						to = netip.AddrPortFrom(s.address("node", v4), nodePort)
					case p.by == "service" && v4:
						to = netip.MustParseAddrPort("10.96.0.9:80")
					case p.by == "service":
						to = netip.MustParseAddrPort("[fd00:96::9]:80")
					}
					s.open(t, proto, p.from, p.to, speaker, to, at)
				}
			}
		}
	}
	s.begin(t)
}

// begin lets those speak who speak while the permission goes.
func (s *revokeScene) begin(t *testing.T) {
	t.Helper()
	established(t, s.flows)
	for _, f := range s.flows {
		f.toServer.speak(f.speaker == "client" || f.speaker == "both")
		f.toBack.speak(f.speaker == "server" || f.speaker == "both")
	}
}

func TestFlowsEndWithinASecondAfterTheirPermission(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newRevokeScene(t, backend)
		for _, c := range []struct {
			name  string
			take  func()
			back  func()
			takes func(f *spoken) bool
		}{
			{"the policy is removed",
				func() { s.Remove(t, "policy-shop-db.yaml"); s.Remove(t, "policy-shop-in.yaml") }, func() {},
				func(f *spoken) bool { return f.to != "shop/free" }},
			{"the policy is edited",
				func() {
					s.Write(t, "policy-shop-db.yaml", networkPolicy("shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{namespaceSelector: {}}], ports: [{port: 80}]}]"))
					s.Write(t, "policy-shop-in.yaml", networkPolicy("shop/in", "  podSelector: {matchLabels: {app: in}}\n  ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24}}]}]"))
				}, func() {},
				func(f *spoken) bool { return f.to != "shop/free" }},
			{"the client's pod gets another label",
				func() { s.write("shop/web", "app=gone") }, func() { s.write("shop/web", "app=web") },
				func(f *spoken) bool { return f.from == "shop/web" }},
			{"the server's pod gets another label",
				func() { s.write("shop/in", "app=was-in") }, func() { s.write("shop/in", "app=in") },
				func(f *spoken) bool { return f.to == "shop/in" }},
			{"the client's namespace gets another label",
				func() { s.Write(t, "manifests.yaml", namespace("bank", "tenant=other")) },
				func() { s.Write(t, "manifests.yaml", namespace("bank", revokeBank)) },
				func(f *spoken) bool { return f.from == "bank/web" }},
			{"the client's namespace loses its label",
				func() { s.Write(t, "manifests.yaml", namespace("bank", "")) },
				func() { s.Write(t, "manifests.yaml", namespace("bank", revokeBank)) },
				func(f *spoken) bool { return f.from == "bank/web" }},
			{"a first policy closes the server",
				func() {
					s.Write(t, "first.yaml", networkPolicy("shop/first", "  podSelector: {matchLabels: {app: free}}"))
				},
				func() { s.Remove(t, "first.yaml") },
				func(f *spoken) bool { return f.to == "shop/free" }},
		} {
			t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
				s.openAll(t)
				begin := time.Now()
				c.take()
				s.ended(t, c.name, begin, func(f *spoken) bool { return f.speaker != "both" && c.takes(f) })
				c.back()
				s.Settle(t)
			})
		}
	})
}

// write gives a pod other labels and does not wait.
func (s *revokeScene) write(name, labels string) {
	s.pods[name].labels = pod(name, labels, "").labels
	s.writePod(s.pods[name])
}

// ended sees that flows end in time and stay ended, whoever speaks next, and that the others do not lose a byte.
func (s *revokeScene) ended(t *testing.T, what string, begin time.Time, taken func(*spoken) bool) {
	t.Helper()
	const silence = 1500 * time.Millisecond // TCP repeats what was lost after 0.2, 0.6 and 1.4 s
	var over, kept []*spoken
	for _, f := range s.flows {
		if taken(f) {
			over = append(over, f)
		} else {
			kept = append(kept, f)
		}
	}
	alive := eventually(5*endsWithin+2*silence, func() (alive []string) {
		for _, f := range over {
			if last := f.lastHeard(); time.Since(last) < silence || time.Since(begin) < silence {
				alive = append(alive, f.name)
			}
		}
		return alive
	})
	for _, name := range alive {
		t.Errorf("%s: still carries data after %v: %s", what, time.Since(begin).Round(time.Millisecond), name)
	}
	var latest time.Duration
	for _, f := range over {
		after := f.lastHeard().Sub(begin)
		latest = max(latest, after)
		if after > 5*endsWithin && !slices.Contains(alive, f.name) {
			t.Errorf("%s: ended after %v, want at most %v: %s", what, after, endsWithin, f.name)
		}
	}
	t.Logf("%s (%s): of %d flows that lost their permission the last was heard after %v; %d others go on", what, s.Backend(), len(over),
		latest.Round(time.Millisecond), len(kept))
	s.stayEnded(t, what, over)
	for _, f := range kept {
		f.toServer.speak(false)
		f.toBack.speak(false)
	}
	limit := time.Now().Add(10 * time.Second) // for all of them together
	for _, f := range kept {
		got, _, _ := f.toServer.heard()
		err := errors.Join(wholeBy(limit, &f.toServer), wholeBy(limit, &f.toBack))
		if err != nil {
			t.Errorf("%s: a flow that is still allowed has lost something after %d numbers: %s: %v", what, got, f.name, err)
		}
	}
}

// stayEnded lets those speak who were silent.
func (s *revokeScene) stayEnded(t *testing.T, what string, over []*spoken) {
	t.Helper()
	heard := map[*spoken]time.Time{}
	for _, f := range over {
		heard[f] = f.lastHeard()
		f.toServer.speak(f.speaker == "then client")
		f.toBack.speak(f.speaker == "then server")
	}
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(speakEvery) {
		for _, f := range over {
			if last := f.lastHeard(); last.After(heard[f]) {
				t.Errorf("%s: what was said %v later arrived: %s", what, last.Sub(heard[f]).Round(time.Millisecond), f.name)
				heard[f] = last.Add(time.Hour) // once is enough
			}
		}
	}
	for _, f := range over {
		f.toServer.speak(false)
		f.toBack.speak(false)
	}
}

// wholeBy waits until everything has arrived, and says what is wrong if it has not by then.
func wholeBy(limit time.Time, d *direction) error {
	for {
		err := d.whole()
		if err == nil || time.Now().After(limit) {
			return err
		}
		time.Sleep(speakEvery)
	}
}

// eventually asks until nobody is left or the limit is over, and returns who is.
func eventually(limit time.Duration, who func() []string) []string {
	for end := time.Now().Add(limit); ; time.Sleep(speakEvery) {
		left := who()
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

// An address that another pod gets brings none of its former owner's flows along: neither one elsewhere, whose flows with a pod
// of this node were allowed for its labels, nor one here.
func TestAnAddressThatChangesItsOwnerCarriesNoFlowOver(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		t.Run("elsewhere", func(t *testing.T) { addressMovesElsewhere(t, backend) })
		for _, c := range []struct{ name, labels string }{{"to a guarded pod", "app=guarded"}, {"to an open pod", "app=open"}} {
			t.Run(c.name, func(t *testing.T) { addressMovesHere(t, backend, c.labels) })
		}
	})
}

func addressMovesElsewhere(t *testing.T, backend string) {
	s := &revokeScene{scene: newScene(t, backend, "", pod("shop/db", "app=db", ""), pod("shop/keeper", "app=keeper", ""))}
	owner := func(name, labels string) string {
		p := pod(name, labels, "")
		p.spec = "  nodeName: elsewhere\n"
		p.status = fmt.Sprintf(`{phase: Running, podIPs: [{ip: %s}, {ip: %q}]}`, testnode.Outside4, testnode.Outside6)
		return p.manifest()
	}
	s.Write(t, "far.yaml", owner("shop/far", "app=web"))
	s.apply(
		[2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  policyTypes: [Ingress, Egress]\n  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]"},
		[2]string{"shop/keep", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: keeper}}}]}]"})
	for _, v4 := range []bool{true, false} {
		at := netip.AddrPortFrom(s.address("shop/db", v4), flowPort)
		for _, proto := range []string{"tcp", "udp"} {
			for _, speaker := range speakers {
				s.open(t, proto, "outside", "shop/db", speaker, at, at)
			}
			s.open(t, proto, "shop/keeper", "shop/db", "both", at, at)
		}
	}
	s.begin(t)
	begin := time.Now()
	s.Write(t, "far.yaml", owner("shop/heir", "app=heir"))
	s.ended(t, "the address has another owner elsewhere", begin, func(f *spoken) bool { return f.from == "outside" })
}

func addressMovesHere(t *testing.T, backend, labels string) {
	node := testnode.New(t, testnode.Options{Backend: backend, Ranges: []string{"10.244.1.0/29", "fd00:10:244:1::/125"},
		Conf: map[string]any{"ipam": map[string]any{"reuseAfter": "0s"}}})
	s := &revokeScene{scene: newSceneOn(t, node, "", pod("shop/web", "app=web", ""), pod("shop/former", "app=former", ""))}
	s.apply([2]string{"shop/guarded", "  podSelector: {matchLabels: {app: guarded}}\n  policyTypes: [Ingress, Egress]"})
	former := s.pods["shop/former"]
	for _, v4 := range []bool{true, false} {
		at := netip.AddrPortFrom(former.addrs[v4], flowPort)
		for _, proto := range []string{"tcp", "udp"} {
			for _, from := range []string{"outside", "shop/web"} {
				s.open(t, proto, from, "shop/former", "client", at, at)
			}
		}
	}
	s.begin(t) // they speak on and on, whoever has the address
	if err := s.Del(former.at); err != nil {
		t.Fatalf("DEL shop/former: %v", err)
	}
	heir := s.heir(t, former.addrs[true], labels)
	// The address's new owner has its predecessor's sockets and counts what comes.
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(speakEvery) {
		if n := heir.tcp(t); n > 0 {
			t.Fatalf("%d TCP packets of a former owner's flow arrived at the address's new owner", n)
		}
		if n := heir.udp(t); n > 0 && labels == "app=guarded" {
			t.Fatalf("%d datagrams of a former owner's flow arrived at the address's new owner, who is closed", n)
		}
	}
	var spoke uint64
	for _, f := range s.flows {
		_, sent, _ := f.toServer.heard()
		spoke += sent
	}
	t.Logf("%d numbers were sent to the address before and after it changed its owner (%s)", spoke, backend)
}

// heir is a pod that counts from before its first packet on.
type heir struct{ *testnode.Pod }

// heir attaches pods until one gets the address.
func (s *revokeScene) heir(t *testing.T, want netip.Addr, labels string) heir {
	t.Helper()
	for i := range 8 {
		p := pod(fmt.Sprintf("shop/heir-%d", i), labels, "")
		s.writePod(p)
		_, name, _ := strings.Cut(p.name, "/")
		h := heir{s.Sandbox(t, &testnode.Pod{Namespace: "shop", Name: name, UID: p.uid})}
		for _, tables := range []string{"iptables-nft", "ip6tables-nft"} {
			h.NS.Run(t, tables, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", fmt.Sprint(flowPort))
			h.NS.Run(t, tables, "-t", "raw", "-A", "PREROUTING", "-p", "udp", "--dport", fmt.Sprint(flowPort))
		}
		if err := s.Add(h.Pod); err != nil {
			t.Fatalf("ADD %s: %v", p.name, err)
		}
		if h.IP(t, want) == want {
			return h
		}
	}
	t.Fatalf("nobody got %s", want)
	return heir{}
}

func (h heir) tcp(t *testing.T) uint64 { return h.counted(t, "tcp") }
func (h heir) udp(t *testing.T) uint64 { return h.counted(t, "udp") }

func (h heir) counted(t *testing.T, proto string) (n uint64) {
	t.Helper()
	for _, tables := range []string{"iptables-nft", "ip6tables-nft"} {
		for line := range strings.Lines(h.NS.Run(t, tables, "-t", "raw", "-nvxL", "PREROUTING")) {
			var packets uint64
			if _, err := fmt.Sscan(line, &packets); err == nil && strings.Contains(line, proto+" dpt:") {
				n += packets
			}
		}
	}
	return n
}
