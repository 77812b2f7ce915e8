package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// The numbered tests say what NetworkPolicy means, one test for each point that implementations get wrong.

func shop() []*scenePod {
	return []*scenePod{
		pod("shop/web", "app=web", "http:80/TCP"),
		pod("shop/db", "app=db", "sql:5432/TCP"),
		pod("shop/other", "app=other", ""),
		pod("bank/web", "app=web", "http:81/TCP"),
	}
}

func TestNetworkPolicy1UnselectedIsOpenSelectedIsClosedAndPoliciesOnlyAdd(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.expect(`
			shop/web    shop/db    tcp/5432 yes
			bank/web    shop/db    udp/53   yes
			outside     shop/db    tcp/80   yes
			shop/db     outside    tcp/80   yes
			outside     shop/db    icmp     yes`)
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 5432}]`})
		s.expect(`
			shop/web    shop/db    tcp/5432 yes
			shop/web    shop/db    tcp/80   no
			shop/web    shop/db    icmp     no
			shop/other  shop/db    tcp/5432 no
			bank/web    shop/db    tcp/5432 no
			outside     shop/db    tcp/5432 no
			shop/db     outside    tcp/80   yes
			shop/other  shop/web   tcp/80   yes`)
		s.apply([2]string{"shop/db-more", `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: other}}}]`})
		s.expect(`
			shop/web    shop/db    tcp/5432 yes
			shop/web    shop/db    tcp/80   no
			shop/other  shop/db    tcp/80   yes
			shop/other  shop/db    udp/53   yes
			bank/web    shop/db    tcp/5432 no`)
		// The same for egress: closed, but for the union.
		s.withdraw("shop/db", "shop/db-more")
		s.apply(
			[2]string{"shop/out", "  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]"},
			[2]string{"shop/out-more", "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{ports: [{port: 81}]}]"})
		s.expect(`
			shop/web    shop/db    tcp/80   yes
			shop/web    shop/other tcp/81   yes
			shop/web    shop/other tcp/80   no
			shop/other  shop/db    tcp/80   no
			shop/other  outside    tcp/81   yes
			bank/web    shop/web   tcp/80   yes`)
	})
}

func TestNetworkPolicy2PolicyTypesAbsentMeanIngressAndEgressWhereThereAreRules(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply([2]string{"shop/p", `
  podSelector: {matchLabels: {app: web}}`}) // no types, no rules: ingress alone
		s.expect(`
			shop/web    shop/db    tcp/80   yes
			shop/db     shop/web   tcp/80   no`)
		s.apply([2]string{"shop/p", `
  podSelector: {matchLabels: {app: web}}
  egress:
  - to: [{podSelector: {matchLabels: {app: db}}}]`})
		s.expect(`
			shop/web    shop/db    tcp/80   yes
			shop/web    shop/other tcp/80   no
			shop/db     shop/web   tcp/80   no`)
		s.apply([2]string{"shop/p", `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: []`})
		s.expect(`
			shop/web    shop/db    tcp/80   no
			shop/web    outside    tcp/80   no
			shop/web    outside    icmp     no
			shop/db     shop/web   tcp/80   yes
			outside     shop/web   tcp/80   yes`)
		// Rules of a direction that is not among the types say nothing.
		s.apply([2]string{"shop/p", `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: db}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]`})
		s.expect(`
			shop/web    shop/other tcp/80   yes
			shop/web    outside    udp/53   yes
			shop/db     shop/web   tcp/80   yes
			shop/other  shop/web   tcp/80   no`)
		s.apply([2]string{"shop/p", "  podSelector: {matchLabels: {app: web}}\n  egress: []"}) // no rules: ingress alone
		s.expect(`
			shop/web    shop/db    tcp/80   yes
			shop/db     shop/web   tcp/80   no`)
	})
}

func TestNetworkPolicy3EmptyPeersAndPortsMeanEverybodyAndEverything(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply([2]string{"shop/web", `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress: [{}]
  egress: [{ports: []}]`})
		s.expect(`
			bank/web    shop/web   tcp/80   yes
			outside     shop/web   udp/53   yes
			outside     shop/web   icmp     yes
			shop/web    outside    icmp     yes
			shop/web    bank/web   udp/54   yes`)
		s.apply([2]string{"shop/web", `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [], ports: [{port: 80}]}]
  egress: [{to: [], ports: [{protocol: UDP, port: 53}]}]`})
		s.expect(`
			outside     shop/web   tcp/80   yes
			outside     shop/web   tcp/81   no
			outside     shop/web   udp/53   no
			outside     shop/web   icmp     no
			shop/web    outside    udp/53   yes
			shop/web    outside    udp/54   no
			shop/web    outside    tcp/80   no
			shop/web    outside    icmp     no`)
		s.apply([2]string{"shop/web", `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {}}]}]
  egress: [{to: []}]`})
		s.expect(`
			shop/db     shop/web   icmp     yes
			shop/db     shop/web   sctp/9   yes
			bank/web    shop/web   icmp     no
			bank/web    shop/web   sctp/9   no
			shop/web    outside    tcp/80   yes
			shop/web    outside    icmp     yes`)
	})
}

func TestNetworkPolicy4SelectorsOfPeers(t *testing.T) {
	namespaces := namespace("shop", "tenant=manning") + namespace("bank", "tenant=other")
	eachScene(t, namespaces, shop, func(s *scene) {
		ingress := func(peer string) [2]string {
			return [2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [" + peer + "]}]"}
		}
		for _, c := range []struct{ peer, table string }{
			{"{podSelector: {matchLabels: {app: web}}}", `
				shop/web   shop/db tcp/80 yes
				shop/other shop/db tcp/80 no
				bank/web   shop/db tcp/80 no`},
			{"{namespaceSelector: {matchLabels: {tenant: other}}}", `
				shop/web   shop/db tcp/80 no
				bank/web   shop/db tcp/80 yes`},
			{"{namespaceSelector: {matchLabels: {tenant: manning}}, podSelector: {matchLabels: {app: web}}}", `
				shop/web   shop/db tcp/80 yes
				shop/other shop/db tcp/80 no
				bank/web   shop/db tcp/80 no`},
			{"{namespaceSelector: {}}", `
				shop/other shop/db tcp/80 yes
				bank/web   shop/db tcp/80 yes
				outside    shop/db tcp/80 no`},
			{"{podSelector: {}}", `
				shop/other shop/db tcp/80 yes
				bank/web   shop/db tcp/80 no`},
			{"{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}}", `
				shop/other shop/db tcp/80 yes
				shop/web   shop/db tcp/80 no`},
			{"{podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}, namespaceSelector: {}}", `
				shop/other shop/db tcp/80 no
				bank/web   shop/db tcp/80 no`},
			{"{podSelector: {matchExpressions: [{key: app, operator: Exists}]}, namespaceSelector: {}}", `
				shop/other shop/db tcp/80 yes
				bank/web   shop/db tcp/80 yes
				outside    shop/db tcp/80 no`},
			{"{podSelector: {}, namespaceSelector: {matchLabels: {tenant: other}}}", `
				bank/web   shop/db tcp/80 yes
				shop/other shop/db tcp/80 no`},
			{"{podSelector: {matchLabels: {app: web}}}, {namespaceSelector: {matchLabels: {tenant: other}}}", `
				bank/web   shop/db tcp/80 yes
				shop/web   shop/db tcp/80 yes
				shop/other shop/db tcp/80 no`},
			{"{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [bank]}]}}", `
				bank/web   shop/db tcp/80 yes
				shop/web   shop/db tcp/80 no`},
		} {
			s.apply(ingress(c.peer))
			s.expect(c.table)
		}
		// Selectors left out: of the policy itself (every pod of the namespace).
		s.withdraw("shop/db")
		s.apply([2]string{"shop/all", "  policyTypes: [Ingress]"})
		s.expect(`
			bank/web   shop/db    tcp/80 no
			bank/web   shop/other tcp/80 no
			shop/web   bank/web   tcp/80 yes`)
		s.apply([2]string{"shop/all", "  policyTypes: [Egress]\n  egress: [{to: [{namespaceSelector: {matchLabels: {tenant: other}}}]}]"})
		s.expect(`
			shop/web   bank/web   tcp/80 yes
			shop/web   shop/db    tcp/80 no
			shop/db    outside    tcp/80 no
			bank/web   shop/web   tcp/80 yes`)
	})
}

func TestNetworkPolicy5BlocksAndTheirExceptions(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		// Further addresses of the machine outside; one block excepts what another one admits.
		for _, a := range []string{"203.0.113.1/32", "203.0.113.130/32", "203.0.113.200/32", "2001:db8:5::1/128", "2001:db8:5:8000::1/128"} {
			s.Outside.Run(t, "ip", "address", "add", a, "dev", "eth0", "nodad")
			via := testnode.Outside4
			if strings.Contains(a, ":") {
				via = testnode.Outside6
			}
			s.NS.Run(t, "ip", "route", "add", a, "via", via.String())
		}
		from := func(spec string) [2]string {
			return [2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress:\n  - from:\n" + spec}
		}
		reach := func(source string, want bool) {
			t.Helper()
			a := netip.MustParseAddr(source)
			to := netip.AddrPortFrom(s.address("shop/db", a.Is4()), 80)
			wait := noWait
			if want {
				wait = yesWait
			}
			if err := nettest.Dial(s.Outside, "tcp", netip.AddrPortFrom(a, 0), to, wait); (err == nil) != want {
				t.Errorf("from %s: %v, want admitted: %v", source, err, want)
			}
		}
		s.apply(from(`
    - ipBlock: {cidr: 203.0.113.77/24, except: [203.0.113.128/25]}
    - ipBlock: {cidr: 203.0.113.192/26}
    - ipBlock: {cidr: "2001:db8:5::/48", except: ["2001:db8:5:8000::/49"]}`))
		reach("203.0.113.1", true)
		reach("203.0.113.130", false)
		reach("203.0.113.200", true) // the first block's exception takes nothing from the second
		reach("198.51.100.1", false)
		reach("2001:db8:5::1", true)
		reach("2001:db8:5:8000::1", false)
		reach("2001:db8::1", false)

		s.apply(from(`
    - ipBlock: {cidr: 0.0.0.0/0, except: [203.0.113.1/32]}
    - ipBlock: {cidr: "::/0", except: ["2001:db8:5::1/128"]}`))
		reach("203.0.113.1", false)
		reach("203.0.113.130", true)
		reach("2001:db8:5::1", false)
		reach("2001:db8::1", true)
		s.expect("shop/web shop/db tcp/80 yes  # pods have addresses like everybody")

		s.apply(from(`
    - ipBlock: {cidr: 0.0.0.0/0, except: [0.0.0.0/0]}
    - ipBlock: {cidr: "2001:db8::1/128"}`))
		reach("203.0.113.130", false)
		reach("198.51.100.1", false)
		reach("2001:db8::1", true)
		reach("2001:db8:5::1", false)
		s.apply(from(`
    - ipBlock: {cidr: "::/0", except: ["::/0"]}
    - ipBlock: {cidr: "2001:db8:5:8000::/49", except: ["2001:db8:5:8000::/127"]}
    - ipBlock: {cidr: "2001:db8:5:8000::7/125"}`)) // host bits set; it gives back what the block before it excepts
		reach("2001:db8:5:8000::1", true)
		reach("2001:db8:5::1", false)
		reach("2001:db8::1", false)
		reach("203.0.113.1", false)

		s.withdraw("shop/db")
		s.apply([2]string{"shop/web", fmt.Sprintf(`
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to:
    - ipBlock: {cidr: 198.51.0.0/16, except: [198.51.100.0/30]}
    - ipBlock: {cidr: "2001:db8::/32", except: ["2001:db8::1/128"]}
    - ipBlock: {cidr: %s/32}
    - ipBlock: {cidr: "%s/128"}`, s.address("shop/other", true), s.address("shop/other", false))})
		s.expect(`
			shop/web   outside    tcp/80 no
			shop/web   shop/other tcp/80 yes
			shop/web   shop/db    tcp/80 no`)
	})
}

func TestNetworkPolicy6EmptyPeersAndPortsOfAFamilyAdmitNothing(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]
  egress: [{to: [{ipBlock: {cidr: "::/0"}}]}]`})
		s.expect(`
			shop/web   shop/db  tcp/80 yes v4
			outside    shop/db  tcp/80 yes v4
			shop/web   shop/db  tcp/80 no  v6
			outside    shop/db  icmp   no  v6
			shop/db    outside  tcp/80 no  v4
			shop/db    outside  tcp/80 yes v6`)
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: nobody}}}]}]
  egress: [{ports: [{port: nobody-has-it}]}]`})
		s.expect(`
			shop/web   shop/db  tcp/80 no
			outside    shop/db  tcp/80 no
			shop/db    shop/web tcp/80 no
			shop/db    outside  tcp/80 no`)
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{ports: [{port: nobody-has-it}]}, {from: [{namespaceSelector: {matchLabels: {is: nowhere}}}], ports: [{port: 80}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: nobody}}}]}, {to: [{podSelector: {}}], ports: [{port: nobody-has-it}]}]`})
		s.expect(`
			shop/web   shop/db  tcp/80 no
			shop/web   shop/db  icmp   no
			outside    shop/db  udp/53 no
			shop/db    shop/web tcp/80 no
			shop/db    shop/web icmp   no
			shop/db    outside  tcp/80 no`)
	})
}

func TestNetworkPolicy7PortsAndProtocols(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  ingress: [{ports: [{port: 80, endPort: 81}, {protocol: UDP}, {protocol: SCTP, port: 7}]}]`})
		s.expect(`
			shop/web   shop/db  tcp/80   yes
			shop/web   shop/db  tcp/81   yes
			shop/web   shop/db  tcp/82   no
			shop/web   shop/db  tcp/5432 no
			shop/web   shop/db  udp/53   yes
			shop/web   shop/db  udp/54   yes
			shop/web   shop/db  sctp/7   yes
			shop/web   shop/db  sctp/8   no
			shop/web   shop/db  sctp/80  no
			shop/web   shop/db  icmp     no`)
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{ports: [{protocol: SCTP}, {protocol: UDP, port: 53, endPort: 53}]}]
  egress: [{ports: [{protocol: TCP}, {protocol: SCTP, port: 7, endPort: 9}]}]`})
		s.expect(`
			shop/web   shop/db  sctp/7   yes
			shop/web   shop/db  sctp/80  yes
			shop/web   shop/db  udp/53   yes
			shop/web   shop/db  udp/54   no
			shop/web   shop/db  tcp/53   no
			shop/web   shop/db  tcp/80   no
			shop/db    outside  tcp/5432 yes
			shop/db    outside  udp/53   no
			shop/db    outside  icmp     no
			shop/db    outside  sctp/9   yes
			shop/db    outside  sctp/10  no`)
	})
}

func TestNetworkPolicy8NamedPortsAreTheDestinationPods(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply(
			[2]string{"shop/in", "  podSelector: {matchLabels: {app: web}}\n  ingress: [{ports: [{port: http}]}]"},
			[2]string{"bank/in", "  podSelector: {}\n  ingress: [{ports: [{port: http}]}]"},
			[2]string{"shop/out", `
  podSelector: {matchLabels: {app: other}}
  policyTypes: [Egress]
  egress: [{ports: [{port: http}, {port: sql}]}]`})
		s.expect(`
			shop/db    shop/web  tcp/80   yes
			shop/db    shop/web  tcp/81   no
			shop/db    bank/web  tcp/81   yes   # the same name, another number
			shop/db    bank/web  tcp/80   no
			shop/other shop/web  tcp/80   yes
			shop/other shop/web  tcp/81   no
			shop/other bank/web  tcp/81   yes
			shop/other bank/web  tcp/80   no
			shop/other shop/db   tcp/5432 yes
			shop/other shop/db   tcp/80   no
			shop/other outside   tcp/80   no`)
		s.apply([2]string{"shop/out", `
  podSelector: {matchLabels: {app: other}}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}], ports: [{port: http}]}, {to: [{podSelector: {}}], ports: [{protocol: UDP, port: http}]}]`})
		s.expect(`
			shop/other shop/web  tcp/80   no    # a block has no names
			shop/other outside   tcp/80   no`)
		s.apply([2]string{"shop/out", `
  podSelector: {matchLabels: {app: other}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: web}}, namespaceSelector: {}}], ports: [{port: http}]}]`})
		s.expect(`
			shop/other shop/web  tcp/80   yes
			shop/other bank/web  tcp/81   yes
			shop/other bank/web  tcp/80   no
			shop/other shop/db   tcp/5432 no`)
		// A sidecar's ports count, an ordinary init container's do not. One name stands for a number in each protocol.
		other := s.pods["shop/other"]
		other.ports = `[{name: api, containerPort: 80}, {name: dns, containerPort: 53, protocol: UDP}]`
		other.spec = `  - {name: d, image: none, ports: [{name: dns, containerPort: 81, protocol: TCP}]}
  initContainers:
  - {name: sidecar, image: none, restartPolicy: Always, ports: [{name: side, containerPort: 5432}]}
  - {name: init, image: none, ports: [{name: early, containerPort: 82}]}
`
		s.writePod(other)
		s.withdraw("shop/out", "shop/in")
		s.apply([2]string{"shop/other", `
  podSelector: {matchLabels: {app: other}}
  ingress: [{ports: [{port: side}, {port: early}, {port: dns}, {port: api, protocol: UDP}]}]`})
		s.expect(`
			shop/web   shop/other tcp/5432 yes
			shop/web   shop/other tcp/82   no
			shop/web   shop/other tcp/81   yes
			shop/web   shop/other udp/53   no
			shop/web   shop/other tcp/80   no`)
		s.apply([2]string{"shop/other", "  podSelector: {matchLabels: {app: other}}\n  ingress: [{ports: [{port: dns, protocol: UDP}]}]"})
		s.expect(`
			shop/web   shop/other udp/53   yes
			shop/web   shop/other tcp/81   no
			shop/web   shop/other udp/54   no`)
	})
}

func TestNetworkPolicy9RepliesPassAndErrorsOfAFlow(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply(
			[2]string{"shop/deny", "  podSelector: {}\n  policyTypes: [Ingress, Egress]"},
			[2]string{"shop/web", "  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Egress]\n  egress: [{to: [{ipBlock: {cidr: 198.51.100.0/24}}, {ipBlock: {cidr: \"2001:db8::/64\"}}]}]"})
		for _, v4 := range []bool{true, false} {
			c, err := s.open("shop/web", "outside", 80, v4)
			if err != nil {
				t.Fatalf("open: %v", err)
			}
			if err := c.alive(yesWait); err != nil {
				t.Errorf("the answer does not come back: %v", err)
			}
			// Nobody listens there: the error message belongs to the flow and comes back.
			at := netip.AddrPortFrom(s.address("outside", v4), 9)
			if err := nettest.Dial(s.where["shop/web"], "udp", netip.AddrPort{}, at, yesWait); err == nil || nettest.Blocked(err) {
				t.Errorf("udp to a closed port: %v, want a refusal", err)
			}
		}
		s.expect(`
			outside  shop/web tcp/80 no
			outside  shop/web icmp   no`)
		for _, v4 := range []bool{true, false} {
			s.expectationOpensNothing(v4)
		}
	})
}

// expectationOpensNothing lets the kernel's FTP helper read an allowed connection of shop/web, in which the pod announces a port
// (RFC 959 PORT, RFC 2428 EPRT): the kernel then calls a connection to that port RELATED, and it must not pass all the same.
func (s *scene) expectationOpensNothing(v4 bool) {
	s.t.Helper()
	tables, at := "ip6tables-"+s.Backend(), s.address("shop/web", v4)
	announce := fmt.Sprintf("EPRT |2|%s|5432|\r\n", at)
	if v4 {
		tables = "iptables-" + s.Backend()
		announce = fmt.Sprintf("PORT %s,%d,%d\r\n", strings.ReplaceAll(at.String(), ".", ","), 5432/256, 5432%256)
	}
	nettest.TCPServer(s.t, s.Outside, netip.AddrPortFrom(s.address("outside", v4), 21))
	if out, err := s.NS.Try(tables, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp"); err != nil {
		s.t.Skipf("no FTP helper in this kernel: %v: %s", err, out)
	}
	s.NS.Run(s.t, tables, "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "5432", "-m", "conntrack", "--ctstate", "RELATED")
	c, err := s.open("shop/web", "outside", 21, v4)
	if err != nil {
		s.t.Fatalf("the control connection: %v", err)
	}
	for _, line := range []string{"USER postern\r\n", announce} {
		if _, err := c.Write([]byte(line)); err != nil {
			s.t.Fatal(err)
		}
		if err := c.alive(yesWait); err != nil { // the echo of both: the node has seen the line
			s.t.Fatal(err)
		}
	}
	s.expect("outside shop/web tcp/5432 no v" + map[bool]string{true: "4", false: "6"}[v4])
	counted := s.NS.Run(s.t, tables, "-t", "mangle", "-nvxL", "PREROUTING")
	lines := strings.Split(strings.TrimSpace(counted), "\n")
	if last := strings.Fields(lines[len(lines)-1]); last[0] == "0" {
		s.t.Errorf("the helper expected nothing, so the test proves nothing: %s", counted)
	}
}

func TestNetworkPolicy10BothEndsCount(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		// Denies ingress, allows all egress: the second must not open the first.
		s.apply([2]string{"shop/p", "  podSelector: {}\n  policyTypes: [Ingress, Egress]\n  egress: [{}]"})
		s.expect(`
			shop/web   shop/db  tcp/5432 no
			shop/db    shop/web tcp/80   no
			bank/web   shop/web tcp/80   no
			shop/web   bank/web tcp/80   yes
			shop/web   outside  tcp/80   yes`)
		// And the other way round.
		s.apply([2]string{"shop/p", "  podSelector: {}\n  policyTypes: [Ingress, Egress]\n  ingress: [{}]"})
		s.expect(`
			shop/web   shop/db  tcp/5432 no
			shop/web   bank/web tcp/80   no
			bank/web   shop/web tcp/80   yes`)
		// A pod of another node: what leaves it is judged there, what comes in here.
		remote := pod("shop/remote", "app=remote", "")
		remote.spec = "  nodeName: elsewhere\n"
		remote.status = fmt.Sprintf(`{phase: Running, podIPs: [{ip: %s}, {ip: %q}]}`, testnode.Outside4, testnode.Outside6)
		s.writePod(remote)
		s.apply([2]string{"shop/p", `
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: remote}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]`})
		s.expect(`
			outside    shop/web tcp/80   yes
			outside    shop/db  tcp/80   yes
			shop/web   outside  tcp/80   no
			shop/web   shop/db  tcp/80   no`)
		s.apply([2]string{"shop/p", `
  podSelector: {}
  policyTypes: [Ingress, Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: remote}}}]}]`})
		s.expect(`
			shop/web   outside  tcp/80   yes
			outside    shop/web tcp/80   no`)
	})
}

func TestNetworkPolicy11APodReachesItselfAndItsNodeAndTheNodeItsPods(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply([2]string{"shop/deny", "  podSelector: {}\n  policyTypes: [Ingress, Egress]"})
		s.serve("node", testnode.Node4, testnode.Node6)
		s.expect(`
			shop/web   shop/web tcp/80 yes
			node       shop/web tcp/80 yes
			node       shop/web icmp   yes
			shop/web   node     tcp/80 yes
			shop/web   shop/web udp/53 yes
			shop/web   shop/web icmp   yes
			node       shop/web udp/53 yes
			shop/web   node     udp/53 yes
			shop/web   node     icmp   yes
			outside    shop/web icmp   no
			outside    shop/web tcp/80 no`)
		// Its own Service: translated to itself, with the node's address as source, as kube-proxy's hairpin does it.
		for _, at := range []string{"10.96.0.7", "fd00:96::7"} {
			a := netip.MustParseAddr(at)
			own := s.address("shop/web", a.Is4())
			s.redirect(netip.AddrPortFrom(a, 80), netip.AddrPortFrom(own, 80))
			tables := map[bool]string{true: "iptables-", false: "ip6tables-"}[a.Is4()] + s.Backend()
			s.NS.Run(t, tables, "-t", "nat", "-A", "POSTROUTING", "-s", own.String(), "-d", own.String(), "-j", "SNAT",
				"--to-source", s.address("node", a.Is4()).String())
		}
		s.expect(`
			shop/web   10.96.0.7   tcp/80 yes
			shop/web   fd00:96::7  tcp/80 yes
			shop/db    10.96.0.7   tcp/80 no
			shop/db    fd00:96::7  tcp/80 no`)
		// What is translated at the node's own address to a pod is judged: only to itself may it lead. The node is not.
		for _, v4 := range []bool{true, false} {
			s.redirect(netip.AddrPortFrom(s.address("node", v4), 8080), netip.AddrPortFrom(s.address("shop/web", v4), 80))
			s.redirect(netip.AddrPortFrom(s.address("node", v4), 8081), netip.AddrPortFrom(s.address("bank/web", v4), 80))
		}
		s.expect(`
			shop/web   node        tcp/8080 yes
			shop/db    node        tcp/8080 no
			shop/web   node        tcp/8081 no
			bank/web   node        tcp/8080 no
			outside    node        tcp/8080 no
			outside    node        tcp/8081 yes
			node       node        tcp/8080 yes`)
	})
}

func TestNetworkPolicy12HostNetworkPodsAreTheirNode(t *testing.T) {
	host := pod("shop/agent", "app=agent", "")
	host.spec = "  hostNetwork: true\n  nodeName: elsewhere\n"
	host.status = fmt.Sprintf(`{phase: Running, podIPs: [{ip: %s}, {ip: %q}]}`, testnode.Outside4, testnode.Outside6)
	eachScene(t, host.manifest(), shop, func(s *scene) {
		s.apply([2]string{"shop/p", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: agent}}}]}]"})
		s.expect(`
			outside    shop/db  tcp/80 no
			shop/web   shop/db  tcp/80 no
			node       shop/db  tcp/80 yes`)
		// Here too: no policy selects a pod on the host network, nor does a peer mean it.
		local := pod("shop/local-agent", "app=agent", "")
		local.spec = "  hostNetwork: true\n"
		local.status = fmt.Sprintf(`{phase: Running, podIPs: [{ip: %s}, {ip: %q}]}`, testnode.Node4, testnode.Node6)
		s.writePod(local)
		s.serve("node", testnode.Node4, testnode.Node6)
		s.apply(
			[2]string{"shop/agents", "  podSelector: {matchLabels: {app: agent}}\n  policyTypes: [Ingress, Egress]"},
			[2]string{"shop/out", "  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: agent}}}]}]"})
		s.expect(`
			outside    node     tcp/80 yes
			node       outside  tcp/80 yes
			shop/other node     tcp/80 yes
			shop/other outside  tcp/80 yes
			shop/web   outside  tcp/80 no`)
	})
}

func TestNetworkPolicy13AnEndedPodsAddressIsNotItsOwn(t *testing.T) {
	remote := func(phase string) *scenePod {
		p := pod("shop/job", "app=job", "")
		p.spec = "  nodeName: elsewhere\n"
		p.status = fmt.Sprintf(`{phase: %s, podIPs: [{ip: %s}, {ip: %q}]}`, phase, testnode.Outside4, testnode.Outside6)
		return p
	}
	eachScene(t, "", shop, func(s *scene) {
		p := remote("Running")
		s.writePod(p)
		s.apply([2]string{"shop/p", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: job}}}]}]"})
		s.expect("outside shop/db tcp/80 yes")
		for _, phase := range []string{"Succeeded", "Failed"} {
			s.writePod(remote(phase))
			s.Settle(t)
			s.expect("outside shop/db tcp/80 no")
		}
		// The address has a new owner, with other labels; the ended pod is listed beside him.
		heir := remote("Running")
		heir.name, heir.labels["app"] = "shop/heir", "heir"
		s.writePod(heir)
		s.Settle(s.t)
		s.expect("outside shop/db tcp/80 no")
		s.apply([2]string{"shop/p", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: heir}}}]}]"})
		s.expect("outside shop/db tcp/80 yes")
		// A terminating pod still has its address, here and elsewhere.
		heir.meta = ", deletionTimestamp: \"2024-01-01T00:00:00Z\", deletionGracePeriodSeconds: 30"
		s.writePod(heir)
		db := s.pods["shop/db"]
		db.meta = heir.meta
		s.writePod(db)
		s.Settle(s.t)
		s.expect(`
			outside  shop/db tcp/80 yes
			shop/web shop/db tcp/80 no`)
	})
}

func TestNetworkPolicy14ServicesAreJudgedByThePodsBehindThem(t *testing.T) {
	mapped := func() []*scenePod {
		pods := shop()
		pods[1].host = []attachment.PortMapping{{HostPort: 9432, ContainerPort: 5432, Protocol: "tcp"},
			{HostPort: 9053, ContainerPort: 53, Protocol: "udp"}, {HostPort: 9080, ContainerPort: 80, Protocol: "tcp"}}
		return pods
	}
	eachScene(t, "", mapped, func(s *scene) {
		for _, at := range []netip.Addr{netip.MustParseAddr("10.96.0.9"), netip.MustParseAddr("fd00:96::9"),
			testnode.Node4, testnode.Node6} {
			port := uint16(80)
			if at == testnode.Node4 || at == testnode.Node6 {
				port = 8080 // as a NodePort is
			}
			s.redirect(netip.AddrPortFrom(at, port), netip.AddrPortFrom(s.address("shop/db", at.Is4()), 5432))
		}
		s.apply(
			[2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}, {ipBlock: {cidr: 198.51.100.1/32}}], ports: [{port: 5432}]}]"},
			[2]string{"shop/web", "  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 5432}]}]"})
		s.expect(`
			shop/web    10.96.0.9  tcp/80 yes
			shop/web    fd00:96::9 tcp/80 yes
			shop/other  10.96.0.9  tcp/80 no
			shop/other  fd00:96::9 tcp/80 no
			shop/web    node       tcp/8080 yes
			shop/other  node       tcp/8080 no
			outside     node       tcp/8080 yes v4
			outside     node       tcp/8080 no  v6
			shop/web    node       tcp/9432 yes # a hostPort
			shop/web    node       tcp/9080 no
			shop/other  node       tcp/9432 no
			bank/web    node       tcp/9432 no
			outside     node       tcp/9432 yes v4
			outside     node       tcp/9432 no  v6
			outside     node       tcp/9080 no
			outside     node       udp/9053 no
			node        node       tcp/9080 yes # its own pod`)
		s.apply([2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{ipBlock: {cidr: \"2001:db8::1/128\"}}], ports: [{port: 53, protocol: UDP}]}]"})
		s.expect(`
			outside     node       udp/9053 yes v6
			outside     node       udp/9053 no  v4
			outside     node       tcp/9432 no`)
	})
}

func TestNetworkPolicy15ChangesTakeEffectAndTakeAway(t *testing.T) {
	eachScene(t, namespace("bank", "tenant=manning"), shop, func(s *scene) {
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}, {namespaceSelector: {matchLabels: {tenant: manning}}}]`})
		s.expect(`
			shop/web   shop/db tcp/80 yes
			bank/web   shop/db tcp/80 yes
			shop/other shop/db tcp/80 no`)
		s.relabel("shop/other", "app=web")
		s.expect("shop/other shop/db tcp/80 yes")
		s.relabel("shop/other", "app=other")
		s.expect("shop/other shop/db tcp/80 no")

		fromPod, err := s.open("shop/web", "shop/db", 80, true)
		if err != nil {
			t.Fatal(err)
		}
		fromNamespace, err := s.open("bank/web", "shop/db", 80, false)
		if err != nil {
			t.Fatal(err)
		}
		s.Write(t, "manifests.yaml", namespace("bank", "tenant=other"))
		s.Settle(t)
		s.expect("bank/web shop/db tcp/80 no")
		nettest.Eventually(t, 5*time.Second, "the end of a flow whose namespace lost its label", func() error {
			if fromNamespace.alive(noWait) == nil {
				return fmt.Errorf("it still carries data")
			}
			return nil
		})
		if err := fromPod.alive(yesWait); err != nil {
			t.Errorf("a flow that is still allowed has ended: %v", err)
		}
		s.relabel("shop/web", "app=none")
		nettest.Eventually(t, 5*time.Second, "the end of a flow whose pod lost its label", func() error {
			if fromPod.alive(noWait) == nil {
				return fmt.Errorf("it still carries data")
			}
			return nil
		})
		s.withdraw("shop/db")
		s.expect(`
			bank/web   shop/db tcp/80 yes
			shop/web   shop/db tcp/80 yes`)
		// A pod that starts again has another address: that one counts now, and the old one no more.
		s.relabel("shop/web", "app=web")
		s.apply(
			[2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]"},
			[2]string{"shop/out", "  podSelector: {matchLabels: {app: other}}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: web}}}]}]"})
		for range 2 {
			before := s.address("shop/web", true)
			s.restart("shop/web")
			s.restart("shop/db")
			if s.address("shop/web", true) == before {
				t.Fatalf("shop/web has the address %s again", before)
			}
			s.expect(`
				shop/web   shop/db  tcp/80 yes
				shop/other shop/db  tcp/80 no
				shop/other shop/web tcp/80 yes
				shop/other bank/web tcp/80 no`)
		}
		// Namespaces come and go, their policies and labels with them.
		s.apply([2]string{"shop/db", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: late}}}]}]"})
		s.expect("bank/web shop/db tcp/80 no")
		s.Write(t, "late.yaml", namespace("bank", "tenant=late"))
		s.Remove(t, "manifests.yaml")
		s.Settle(t)
		s.expect("bank/web shop/db tcp/80 yes")
		s.Remove(t, "late.yaml")
		s.Settle(t)
		s.expect("bank/web shop/db tcp/80 no")
	})
}

func TestNetworkPolicy16OneFamilyNeverLoosensTheOther(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		// The client's IPv6 address, written as a block, opens IPv6 alone; a pod selector opens both.
		s.apply([2]string{"shop/db", fmt.Sprintf(`
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{ipBlock: {cidr: %q}}]
  - from: [{podSelector: {matchLabels: {app: other}}}]`, s.address("shop/web", false).String()+"/128")})
		s.expect(`
			shop/web   shop/db tcp/80 no  v4
			shop/web   shop/db tcp/80 yes v6
			shop/other shop/db tcp/80 yes
			bank/web   shop/db tcp/80 no`)
		// And with blocks of both families in one rule: each admits in its own, and an exception takes from its own.
		s.apply([2]string{"shop/db", `
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.0.0/16]}}, {ipBlock: {cidr: "fd00:10:244:1::/64"}}], ports: [{port: 80}]}]
  egress: [{to: [{ipBlock: {cidr: 198.51.100.0/24}}]}, {to: [{podSelector: {matchLabels: {app: other}}}]}]`})
		s.expect(`
			shop/web   shop/db    tcp/80 no  v4
			shop/web   shop/db    tcp/80 yes v6
			outside    shop/db    tcp/80 yes v4
			outside    shop/db    tcp/80 no  v6
			shop/db    outside    tcp/80 yes v4
			shop/db    outside    tcp/80 no  v6
			shop/db    outside    icmp   no  v6
			shop/db    shop/other tcp/80 yes`)
	})
}

func TestNetworkPolicy17AnUnusablePolicyClosesItsPodsAndNoOthers(t *testing.T) {
	eachScene(t, "", shop, func(s *scene) {
		s.apply(
			[2]string{"shop/cidr", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}, {}]"},
			[2]string{"shop/range", "  podSelector: {matchLabels: {app: other}}\n  policyTypes: [Egress]\n  egress: [{ports: [{port: 80, endPort: 79}]}]"},
			[2]string{"bank/good", "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}}]}]"})
		s.expect(`
			shop/web   shop/db    tcp/80 no
			outside    shop/db    tcp/80 no
			shop/db    outside    tcp/80 yes
			shop/other outside    tcp/80 no
			outside    shop/other tcp/80 yes
			shop/web   bank/web   tcp/80 yes
			outside    bank/web   tcp/80 no`)
		status := s.NS.Run(t, nettest.Build(t, "policyd"), "status", "--state-dir", s.StateDir)
		for _, want := range []string{"shop/cidr", "10.0.0.0/33", "shop/range", "endPort"} {
			if !strings.Contains(status, want) {
				t.Errorf("status does not say %q:\n%s", want, status)
			}
		}
		if got := s.figures()["postern_policies_unusable"]; got != 2 {
			t.Errorf("postern_policies_unusable is %v, want 2", got)
		}
		for _, want := range []string{"shop/cidr", "shop/range"} {
			if !strings.Contains(s.daemon.Log(), want) {
				t.Errorf("the log does not name %s", want)
			}
		}
		// Another policy admits to the same pod what it admits.
		s.apply([2]string{"shop/also", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]"})
		s.expect(`
			shop/web   shop/db    tcp/80 yes
			shop/other shop/db    tcp/80 no`)
		s.withdraw("shop/also", "shop/range")
		for _, c := range []struct{ what, rule, reason string }{
			{"a peer with no field", "{from: [{}]}", "from[0]"},
			{"a block beside a selector", "{from: [{ipBlock: {cidr: 0.0.0.0/0}, podSelector: {}}]}", "ipBlock"},
			{"an exception outside of its block", "{from: [{ipBlock: {cidr: 198.51.100.0/24, except: [10.0.0.0/8]}}]}", "10.0.0.0/8"},
			{"an exception that does not parse", "{from: [{ipBlock: {cidr: 198.51.100.0/24, except: [nowhere]}}]}", "nowhere"},
			{"an endPort beside a name", "{ports: [{port: sql, endPort: 90}]}", "endPort"},
			{"an endPort without a port", "{ports: [{endPort: 90}]}", "endPort"},
			{"a port beyond 65535", "{ports: [{port: 70000}]}", "70000"},
			{"an unknown protocol", "{ports: [{port: 80, protocol: ICMP}]}", "ICMP"},
			{"an unknown operator", "{from: [{podSelector: {matchExpressions: [{key: app, operator: Like, values: [web]}]}}]}", "Like"},
		} {
			s.apply([2]string{"shop/cidr", "  podSelector: {matchLabels: {app: db}}\n  ingress: [" + c.rule + ", {}]"})
			s.expect(`
				shop/web   shop/db    tcp/80 no
				outside    shop/db    icmp   no
				shop/db    outside    tcp/80 yes
				shop/web   shop/other tcp/80 yes
				shop/web   bank/web   tcp/80 yes
				outside    bank/web   tcp/80 no`)
			status := s.NS.Run(t, nettest.Build(t, "policyd"), "status", "--state-dir", s.StateDir)
			if !strings.Contains(status, "shop/cidr") || !strings.Contains(status, c.reason) {
				t.Errorf("%s: status does not say %q of shop/cidr:\n%s", c.what, c.reason, status)
			}
		}
		// Mended, it is a policy like the others.
		s.apply([2]string{"shop/cidr", "  podSelector: {matchLabels: {app: db}}\n  ingress: [{from: [{ipBlock: {cidr: 198.51.100.0/24}}]}]"})
		s.expect(`
			outside    shop/db    tcp/80 yes v4
			outside    shop/db    tcp/80 no  v6
			shop/web   shop/db    tcp/80 no`)
		if got := s.figures()["postern_policies_unusable"]; got != 0 {
			t.Errorf("postern_policies_unusable is %v, want 0", got)
		}
	})
}
