package main

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
)

var (
	gapRestarts = flag.Int("gap-restarts", 12, "how often policyd is restarted under traffic, for each backend; the full test has 50")
	gapSeed     = flag.Uint64("gap-seed", 0, "seed of the edits and the instants of the restarts; 0 takes one by chance and prints it")
)

// gapScene is a scene whose traffic is probed all the time.
type gapScene struct {
	*scene
	probes   []*probe
	streams  []*spoken // open from before the first event to after the last
	counters []counter // of ports for which nothing may arrive
	chance   *rand.Rand
	edits    map[string][]string // by file: what it may hold; empty text for no file
}

// gapStreamPort is a port of streams that stay open; the policies allow it wherever they allow a probe.
const gapStreamPort = 7000

const gapDB = `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 5432}, {port: 7000}]
  - from: [{ipBlock: {cidr: 198.51.100.1/32}}, {ipBlock: {cidr: "2001:db8::1/128"}}]
    ports: [{port: 80}, {port: 5432}, {port: 7000}]`

// The same in other words: nothing that is probed may notice.
const gapDBAgain = `
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{ipBlock: {cidr: 198.51.100.0/24}}, {ipBlock: {cidr: "2001:db8::/64"}}]
    ports: [{port: 5432}, {port: 80, endPort: 81}, {port: 7000}]
  - from:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}
      podSelector: {matchExpressions: [{key: app, operator: In, values: [web, front]}]}
    ports: [{port: 5432}, {port: 82}, {port: 6999, endPort: 7001}]`

const gapWeb = `
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: db}}}]
  - to: [{ipBlock: {cidr: 198.51.100.0/24}}, {ipBlock: {cidr: "2001:db8::/64"}}]
    ports: [{port: 80}, {port: 7000}]`

func newGapScene(t *testing.T, backend string) *gapScene {
	t.Helper()
	seed := *gapSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-gap-seed %d", seed)
	pods := shop()
	pods[1].host = []attachment.PortMapping{{HostPort: 9432, ContainerPort: 5432, Protocol: "tcp"}}
	s := &gapScene{scene: newScene(t, backend, "", pods...), chance: rand.New(rand.NewPCG(seed, 0))}
	s.apply([2]string{"shop/db", gapDB}, [2]string{"shop/web", gapWeb})
	for _, w := range []struct {
		from, to string
		port     uint16
		allowed  bool
	}{
		{"shop/web", "shop/db", 5432, true},
		{"outside", "shop/db", 80, true},
		{"outside", "node", 9432, true}, // the hostPort
		{"shop/web", "outside", 80, true},
		{"shop/other", "bank/web", 80, true}, // no policy on either side
		{"shop/other", "shop/db", 6001, false},
		{"outside", "shop/db", 6002, false},
		{"shop/web", "outside", 6003, false},
		{"shop/web", "shop/other", 6004, false},
		{"bank/web", "shop/db", 5432, false},
	} {
		for _, v4 := range []bool{true, false} {
			to := netip.AddrPortFrom(s.address(w.to, v4), w.port)
			name := fmt.Sprintf("%s to %s (%s)", w.from, w.to, to)
			s.probes = append(s.probes, &probe{name: name, from: s.where[w.from], to: to, allowed: w.allowed})
		}
		if w.port > 6000 && !w.allowed {
			for _, v4 := range []bool{true, false} {
				nettest.TCPServer(t, s.where[w.to], netip.AddrPortFrom(s.address(w.to, v4), w.port))
			}
			c := counter{s.where[w.to], w.port}
			c.start(t)
			s.counters = append(s.counters, c)
		}
	}
	s.edits = gapEdits()
	return s
}

// openStreams opens streams over the allowed ways, which go on for as long as the test.
func (s *gapScene) openStreams() {
	for i, w := range []struct{ from, to string }{{"shop/web", "shop/db"}, {"outside", "shop/db"}, {"shop/other", "bank/web"},
		{"shop/web", "outside"}} {
		for _, v4 := range []bool{true, false} {
			at := netip.AddrPortFrom(s.address(w.to, v4), gapStreamPort)
			f := openFlow(s.t, fmt.Sprintf("%s to %s (%s)", w.from, w.to, at), "tcp", 0, s.where[w.from], s.where[w.to], at, at)
			s.streams = append(s.streams, &spoken{f, w.from, w.to, fmt.Sprint("stream ", i)})
		}
	}
	established(s.t, s.streams)
	for _, f := range s.streams {
		f.toServer.speak(true)
		f.toBack.speak(true)
	}
}

// endStreams sees that the streams have lost nothing.
func (s *gapScene) endStreams() {
	s.t.Helper()
	for _, f := range s.streams {
		f.toServer.speak(false)
		f.toBack.speak(false)
	}
	limit := time.Now().Add(10 * time.Second) // for all of them together
	for _, f := range s.streams {
		got, _, last := f.toServer.heard()
		if err := errors.Join(wholeBy(limit, &f.toServer), wholeBy(limit, &f.toBack)); err != nil {
			s.t.Errorf("stream %s: ended after %d numbers, at %s: %v", f.name, got, times([]time.Time{last}), err)
		}
		s.t.Logf("stream %-40s %d numbers, longest pause %v", f.name, got, f.toServer.longest().Round(time.Millisecond))
	}
}

// gapEdits are changes of the manifests that change nothing for what is probed, and much in the kernel.
func gapEdits() map[string][]string {
	var extra strings.Builder
	for i := range 10 { // with ten more isolated pods, the dispatch tree branches
		extra.WriteString(pod(fmt.Sprintf("shop/extra-%d", i), "app=extra", "").manifest() + "---\n")
	}
	remote := pod("shop/far", "app=web", "")
	remote.spec, remote.status = "  nodeName: elsewhere\n", `{phase: Running, podIPs: [{ip: 10.244.9.9}, {ip: "fd00:10:244:9::9"}]}`
	return map[string][]string{
		"policy-shop-db.yaml": {networkPolicy("shop/db", gapDB), networkPolicy("shop/db", gapDBAgain)},
		"policy-shop-web.yaml": {networkPolicy("shop/web", gapWeb),
			networkPolicy("shop/web", strings.Replace(gapWeb, "port: 80", "port: 80, endPort: 90", 1))},
		// One more policy for the same pods.
		"edit-more.yaml": {"", networkPolicy("shop/more", `
  podSelector: {matchExpressions: [{key: app, operator: In, values: [web, db, extra]}]}
  ingress: [{from: [{namespaceSelector: {matchLabels: {is: nowhere}}}]}, {ports: [{port: nobody}]}]`),
			networkPolicy("shop/more", `
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: 90, endPort: 99}]}]`)},
		// From no policy to one that allows everything, and back.
		"edit-bank.yaml": {"", networkPolicy("bank/all", "  podSelector: {}\n  policyTypes: [Ingress, Egress]\n  ingress: [{}]\n  egress: [{}]")},
		"edit-pods.yaml": {"", extra.String()},
		"edit-extra.yaml": {"",
			networkPolicy("shop/extra", "  podSelector: {matchLabels: {app: extra}}\n  policyTypes: [Ingress, Egress]")},
		"edit-far.yaml": {"", remote.manifest()},
	}
}

// edit changes one file.
func (s *gapScene) edit() {
	files := slices.Sorted(maps.Keys(s.edits))
	name := files[s.chance.IntN(len(files))]
	s.put(name, s.edits[name][s.chance.IntN(len(s.edits[name]))])
}

func (s *gapScene) put(name, text string) {
	if text != "" {
		s.Write(s.t, name, text)
	} else if err := os.Remove(filepath.Join(s.Manifests, name)); err != nil && !os.IsNotExist(err) {
		s.t.Error(err)
	}
}

// byChance waits for up to so long: the instant, not the wait, is what counts.
func (s *gapScene) byChance(most time.Duration) {
	time.Sleep(time.Duration(s.chance.Int64N(int64(most))))
}

func TestNoGapThroughRestartsEditsAndAnUpgrade(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newGapScene(t, backend)
		newer := nettest.BuildVersion(t, "policyd", "newer")
		program := nettest.Build(t, "policyd")
		s.openStreams()
		stop := probing(t, s.probes)
		for i := range *gapRestarts {
			for range s.chance.IntN(3) {
				s.edit()
			}
			s.byChance(150 * time.Millisecond) // a sync takes some tens of them: many end in its midst
			s.daemon.Stop(t, []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[s.chance.IntN(2)])
			s.edit()
			s.daemon = s.StartProgram(t, program)
			if i%4 == 3 { // the others may be killed before they have read anything
				s.Settle(t)
			}
			s.byChance(200 * time.Millisecond)
		}
		s.Settle(t)
		s.upgrade(newer)
		for _, name := range slices.Sorted(maps.Keys(s.edits)) { // each edit at least once, by the newer build
			for i := range s.edits[name] {
				s.put(name, s.edits[name][(i+1)%len(s.edits[name])])
				s.Settle(t)
			}
		}
		stop()
		s.endStreams()
		noGap(t, s.probes)
		for _, c := range s.counters {
			if n := c.read(t); n > 0 {
				t.Errorf("%d denied SYNs for port %d arrived in %s", n, c.port, c.ns.Name)
			}
		}
		s.checkTheProbesSee()
	})
}

// upgrade ends the daemon, makes what it wrote look as if an older one had written it, and starts a newer build.
func (s *gapScene) upgrade(newer string) {
	t := s.t
	for name, texts := range s.edits {
		s.put(name, texts[0])
	}
	s.Settle(t)
	want := kernelState(t, s.NS, s.Backend())
	s.daemon.Stop(t, syscall.SIGKILL)
	s.olderLayout()
	old := kernelState(t, s.NS, s.Backend())
	if old == want {
		t.Errorf("the older layout is the present one")
	}
	s.daemon = s.StartProgram(t, newer)
	s.Settle(t)
	if status := s.NS.Run(t, newer, "status", "--state-dir", s.StateDir); !strings.Contains(status, "policyd newer") {
		t.Errorf("the newer build does not run: %s", status)
	}
	if diff := difference(kernelState(t, s.NS, s.Backend()), want); diff != "" {
		t.Errorf("after the upgrade from an older layout the kernel is not as it was:\n%s", diff)
	}
}

// olderLayout changes our own part of the kernel without opening or closing anything: sets of peers get another type under their
// names, chains and sets are there that nobody leads to, a hook is there twice, behind a foreign rule, and forged sources are
// dropped in raw, which nothing of ours is in any more.
func (s *gapScene) olderLayout() {
	for family, v := range map[string]string{"iptables-" + s.Backend(): "4", "ip6tables-" + s.Backend(): "6"} {
		inet := map[string]string{"4": "inet", "6": "inet6"}[v]
		for _, set := range regexp.MustCompile(`(?m)^pst-p`+v+`\S+`).FindAllString(s.NS.Run(s.t, "ipset", "list", "-n"), -1) {
			s.retype(family, set, inet)
		}
		s.NS.Run(s.t, "ipset", "create", "pst-x"+v+"-unused", "hash:ip,port", "family", inet)
		s.restore(family, `*mangle
:POSTERN-OLDER - [0:0]
:PST-OLDER - [0:0]
-A POSTERN-OLDER -m set --match-set pst-x`+v+`-unused src,src -j PST-OLDER
-A PST-OLDER -j DROP
-A FORWARD -j POSTERN-FORWARD
COMMIT
*filter
:POSTERN-OLDER - [0:0]
-A POSTERN-OLDER -j ACCEPT
-I FORWARD 1 -j POSTERN-ACCEPT
COMMIT
*raw
:PST-OLDER - [0:0]
:POSTERN-PREROUTING - [0:0]
-A POSTERN-PREROUTING -i pst+ -m rpfilter --invert -j DROP
-A OUTPUT -j PST-OLDER
-I PREROUTING 1 -j POSTERN-PREROUTING
COMMIT
`)
	}
}

// retype gives a set in use another type: its chains lead to a copy for as long as it takes.
func (s *gapScene) retype(tables, set, inet string) {
	const copied = "pst-copied"
	var chains, members strings.Builder
	for line := range strings.Lines(s.NS.Run(s.t, "ipset", "save", set)) {
		if f := strings.Fields(line); f[0] == "add" {
			members.WriteString("add SET " + f[2] + "\n")
		}
	}
	fill := func(name string) {
		script := "create SET hash:net family " + inet + "\n" + members.String()
		s.pipe(strings.ReplaceAll(script, "SET", name), "ipset", "restore")
	}
	rules := strings.Split(s.NS.Run(s.t, tables+"-save", "-t", "mangle"), "\n")
	using := map[string]bool{}
	for _, line := range rules {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "-A" && strings.Contains(line, " "+set+" ") {
			using[f[1]] = true
		}
	}
	chains.WriteString("*mangle\n")
	for name := range using {
		chains.WriteString(":" + name + " - [0:0]\n")
	}
	for _, line := range rules {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "-A" && using[f[1]] {
			chains.WriteString(line + "\n")
		}
	}
	chains.WriteString("COMMIT\n")
	fill(copied)
	s.restore(tables, strings.ReplaceAll(chains.String(), " "+set+" ", " "+copied+" "))
	s.NS.Run(s.t, "ipset", "destroy", set)
	fill(set)
	s.restore(tables, chains.String())
	s.NS.Run(s.t, "ipset", "destroy", copied)
}

func (s *gapScene) restore(tables, text string) {
	s.pipe(text, tables+"-restore", "--noflush", "-w", "10")
}

func (s *gapScene) pipe(stdin, name string, args ...string) {
	s.t.Helper()
	if err := pipe(s.NS, stdin, name, args...); err != nil {
		s.t.Fatal(err)
	}
}

// checkTheProbesSee lifts all policies: now what was denied must come about, or the silence before proves nothing.
func (s *gapScene) checkTheProbesSee() {
	for name := range s.edits {
		s.put(name, "")
	}
	s.Settle(s.t)
	var denied []*probe
	for _, p := range s.probes {
		if !p.allowed {
			denied = append(denied, &probe{name: p.name, from: p.from, to: p.to})
		}
	}
	stop := probing(s.t, denied)
	for _, p := range denied {
		nettest.Eventually(s.t, 10*time.Second, p.name+" without policies", func() error {
			if passed, _ := p.since(time.Time{}); len(passed) == 0 {
				return fmt.Errorf("none of %d came about", p.tried)
			}
			return nil
		})
	}
	stop()
	for _, c := range s.counters {
		if c.read(s.t) == 0 {
			s.t.Errorf("nothing for port %d was counted in %s", c.port, c.ns.Name)
		}
	}
}

// The first look at the kernel fails, as it does when the lock is held for long or the daemon is told to end while it looks:
// what it does not know it must not take for a reason to end anybody's flow.
func TestADaemonThatCannotLookAtTheKernelEndsNoFlow(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newGapScene(t, backend)
		s.openStreams()
		s.daemon.Stop(t, syscall.SIGTERM)
		dir := t.TempDir()
		for _, family := range []string{"iptables", "ip6tables"} {
			name := family + "-" + backend + map[string]string{"legacy": "-save"}[backend] // what lists a table
			real, err := exec.LookPath(name)
			if err != nil {
				t.Fatal(err)
			}
			script := fmt.Sprintf("#!/bin/sh\nif mkdir %s/once-%s 2>/dev/null; then echo no look yet >&2; exit 4; fi\nexec %s \"$@\"\n",
				dir, family, real)
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		s.daemon = s.StartPolicyd(t)
		s.Settle(t)
		for _, family := range []string{"iptables", "ip6tables"} {
			if _, err := os.Stat(filepath.Join(dir, "once-"+family)); err != nil {
				t.Errorf("the first look did not fail, so the test proves nothing: %v", err)
			}
		}
		s.endStreams()
	})
}

// openAtMost is the time for which a kernel may be open after somebody else took everything away; a test checks five times that.
const openAtMost = time.Second

func TestWhatSomebodyElseFlushesIsBackWithinASecond(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s := newGapScene(t, backend)
		stop := probing(t, s.probes)
		want := kernelState(t, s.NS, backend)
		var routes, routesBack string
		for _, v4 := range []bool{true, false} {
			a := s.address("shop/db", v4)
			family := map[bool]string{true: "-4", false: "-6"}[v4]
			route, _, _ := strings.Cut(s.NS.Run(t, "ip", family, "route", "show", a.String()), "\n")
			routes += fmt.Sprintf("ip %s route del %s\n", family, a)
			routesBack += fmt.Sprintf("ip %s route replace %s\n", family, route)
		}
		both := func(args string) string {
			return fmt.Sprintf("iptables-%s -w %s\nip6tables-%s -w %s\n", backend, args, backend, args)
		}
		// A set that policyd's rules look into again by then stays; whatever else keeps one is a mistake.
		ipset := `for s in $(ipset list -n); do
  out=$(ipset destroy $s 2>&1) || case $out in *"in use"*) ;; *) echo "$out"; exit 1;; esac
done
`
		var flush, empty string
		for _, family := range []string{"iptables-" + backend, "ip6tables-" + backend} {
			for _, table := range []string{"raw", "mangle", "filter", "nat"} {
				// Between the two, policyd may have put a rule back that holds a chain: then that chain stays.
				flush += fmt.Sprintf("%s -w -t %s -F; %s -w -t %s -X 2>&1 || true\n", family, table, family, table)
				empty += fmt.Sprintf("*%s\nCOMMIT\n", table)
			}
		}
		empty = fmt.Sprintf("iptables-%s-restore -w <<end\n%send\nip6tables-%s-restore -w <<end\n%send\n", backend, empty, backend, empty)
		for _, c := range []struct {
			name, script string
			closed       bool // nothing denied may pass
		}{
			{"every table flushed, every chain deleted", flush, false},
			{"an empty ruleset restored", empty, false},
			{"all tables flushed, all sets destroyed", flush + ipset, false},
			{"all sets flushed", "ipset flush", true},
			{"one chain of ours flushed", both("-t mangle -F POSTERN-FORWARD"), false},
			{"the hook deleted", both("-t mangle -D FORWARD -j POSTERN-FORWARD"), false},
			{"the routes of a pod deleted", routes, true},
			{"all flushed, the routes deleted", flush + routes, false},
		} {
			begin := time.Now()
			s.NS.Run(t, "sh", "-c", c.script)
			err := s.quiet(begin)
			s.measured(c.name, begin, c.closed)
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
				s.NS.Run(t, "sh", "-c", routesBack) // for the next case
			}
			nettest.Eventually(t, 10*time.Second, "the same rules and sets again after: "+c.name, func() error {
				if diff := difference(kernelState(t, s.NS, backend), want); diff != "" {
					return fmt.Errorf("%s", diff)
				}
				return nil
			})
		}
		stop()
		if n := s.repairs(); n == 0 {
			t.Errorf("postern_repairs_total counts nothing")
		}
	})
}

// quiet waits until every probe has done what it should for a while, and returns what is wrong if that does not come.
func (s *gapScene) quiet(begin time.Time) error {
	const calm = 700 * time.Millisecond
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for limit := begin.Add(20 * time.Second); ; <-tick.C {
		from := time.Now().Add(-calm - probePatience) // an attempt's fate is known after its patience alone
		if from.Before(begin) {
			continue
		}
		var wrong []string
		for _, p := range s.probes {
			if passed, lost := p.since(from); len(passed)+len(lost) > 0 {
				wrong = append(wrong, fmt.Sprintf("%s: %d passed, %d lost", p.name, len(passed), len(lost)))
			}
		}
		if wrong == nil {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("not in order after %v:\n%s", time.Since(begin).Round(time.Second), strings.Join(wrong, "\n"))
		}
	}
}

// measured prints for how long something was open or closed that should not be, and holds it against the limit.
func (s *gapScene) measured(what string, begin time.Time, closed bool) {
	var open, away span
	var hostPort span
	for _, p := range s.probes {
		passed, lost := p.since(begin)
		open.add(begin, passed)
		away.add(begin, lost)
		if p.to.Port() == 9432 {
			hostPort.add(begin, lost)
		}
	}
	s.t.Logf("%s (%s): denied connections passed for %s; allowed ones were lost for %s, the hostPort's for %s",
		what, s.Backend(), open, away, hostPort)
	if closed && open.n > 0 {
		s.t.Errorf("%s: %d denied connections passed", what, open.n)
	}
	for _, x := range []span{open, away} {
		if x.n > 0 && x.last > 5*openAtMost {
			s.t.Errorf("%s: not in order before %v, want at most %v", what, x.last.Round(time.Millisecond), openAtMost)
		}
	}
}

// span is the time from the first to the last of some events, since something began.
type span struct {
	n           int
	first, last time.Duration
}

func (x *span) add(begin time.Time, events []time.Time) {
	for _, e := range events {
		at := e.Sub(begin)
		if x.n == 0 || at < x.first {
			x.first = at
		}
		x.last = max(x.last, at)
		x.n++
	}
}

func (x span) String() string {
	if x.n == 0 {
		return "0 s (none)"
	}
	return fmt.Sprintf("%v (%d, until %v after the beginning)", (x.last - x.first).Round(time.Millisecond), x.n, x.last.Round(time.Millisecond))
}

func (s *gapScene) repairs() (n float64) {
	for name, value := range s.figures() {
		if strings.HasPrefix(name, "postern_repairs_total") {
			n += value
		}
	}
	return n
}
