package main

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

var (
	stressLocal    = flag.Int("stress-local", 20, "pods attached to the node; the full test has 100")
	stressPods     = flag.Int("stress-pods", 300, "changes of pods; the full test has 2000")
	stressPolicies = flag.Int("stress-policies", 75, "changes of policies; the full test has 500")
	stressTime     = flag.Duration("stress-time", 10*time.Second, "the time over which the changes are spread; the full test takes 1m")
	stressSeed     = flag.Uint64("stress-seed", 0, "seed of the changes; 0 takes one by chance and prints it")
)

// stress changes a folder of manifests by chance.
type stress struct {
	*testnode.Node
	t      *testing.T
	chance *rand.Rand
	locals []*testnode.Pod
}

var stressNamespaces = []string{"red", "green", "blue"}

// Many pods and policies change in a short time. What is in the kernel in the end is to the byte what a policyd writes that
// starts then, on the same manifests and records, with nothing of ours in the kernel.
func TestAfterManyChangesTheKernelIsAsAFreshStartMakesIt(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		s, daemon := newStress(t, backend)
		before := figures(t, s.NS, daemon)
		took := s.run()
		begin := time.Now()
		s.Settle(t)
		settled := time.Since(begin)
		after := figures(t, s.NS, daemon)
		figure := func(name string) float64 { return after[name] - before[name] }
		t.Logf("%s: %d changes of pods and %d of policies in %v at %d local pods, in force %v after the last: %.0f iptables-restore calls, "+
			"%.0f chains written, %.0f set messages, in %.0f writes of %.1f s together; %.0f s of processor time", backend,
			*stressPods, *stressPolicies, took.Round(time.Second), len(s.locals), settled.Round(time.Millisecond),
			figure("postern_iptables_restores_total"), figure("postern_chains_written_total"), figure("postern_ipset_messages_total"),
			figure("postern_apply_seconds_count"), figure("postern_apply_seconds_sum"), figure("process_cpu_seconds_total"))
		if failing := s.failures(after); failing != "" {
			t.Errorf("policyd counts failures: %s", failing)
		}
		got := kernelState(t, s.NS, backend)
		daemon.Stop(t, syscall.SIGTERM)
		s.NS.Run(t, nettest.Build(t, "policyd"), "cleanup", "--state-dir", s.StateDir)
		if left := kernelState(t, s.NS, backend); left != "" {
			t.Errorf("cleanup leaves:\n%s", left)
		}
		s.Policyd(t)
		// The hostPorts' rules come from the records, apart from what Settle waits for.
		nettest.Eventually(t, 15*time.Second, "the state of a fresh start", func() error {
			if diff := difference(got, kernelState(t, s.NS, backend)); diff != "" {
				return fmt.Errorf("after the changes the kernel holds\n%s", diff)
			}
			return nil
		})
		if lines := strings.Count(got, "\n"); lines < *stressLocal {
			t.Errorf("only %d lines are in the kernel: nothing was compared", lines)
		}
	})
}

func newStress(t *testing.T, backend string) (*stress, *testnode.Policyd) {
	t.Helper()
	seed := *stressSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-stress-seed %d", seed)
	s := &stress{Node: testnode.New(t, testnode.Options{Backend: backend}), t: t, chance: rand.New(rand.NewPCG(seed, 0))}
	for i := range *stressLocal {
		p := &testnode.Pod{Namespace: s.any(stressNamespaces), Name: fmt.Sprintf("local-%d", i), UID: fmt.Sprintf("uid-local-%d", i)}
		if i%10 == 0 {
			p.Ports = []attachment.PortMapping{{HostPort: uint16(20000 + i), ContainerPort: 80, Protocol: "tcp"}}
		}
		s.locals = append(s.locals, p)
		s.local(p)
	}
	daemon := s.Policyd(t)
	for _, p := range s.locals {
		s.Attach(t, p)
	}
	s.Settle(t)
	return s, daemon
}

func (s *stress) any(list []string) string { return list[s.chance.IntN(len(list))] }

// run makes the changes, evenly spread, and returns how long it took.
func (s *stress) run() time.Duration {
	begin := time.Now()
	total := *stressPods + *stressPolicies
	tick := time.NewTicker(max(*stressTime/time.Duration(total), time.Microsecond))
	defer tick.Stop()
	for i := range total {
		// As many of each as are to be, mixed.
		if i**stressPolicies/total != (i+1)**stressPolicies/total {
			s.changePolicy()
		} else {
			s.changePod()
		}
		<-tick.C
	}
	return time.Since(begin)
}

func (s *stress) changePod() {
	switch n := s.chance.IntN(20); {
	case n < 3:
		s.local(s.locals[s.chance.IntN(len(s.locals))])
	case n < 4: // one that is to come to this node
		s.put(fmt.Sprintf("placed-%d", s.chance.IntN(10)), func(name string) string {
			return s.pod("red", name, "", "{phase: Pending}")
		})
	case n < 5:
		name := s.any(stressNamespaces)
		s.Write(s.t, "namespace-"+name+".yaml", namespace(name, "tier="+s.any([]string{"a", "b", "c"})))
	default:
		s.put(fmt.Sprintf("remote-%d", s.chance.IntN(60)), s.remote)
	}
}

// put writes a file of an object anew, or takes it away.
func (s *stress) put(name string, text func(name string) string) {
	if s.chance.IntN(4) > 0 {
		s.Write(s.t, name+".yaml", text(name))
	} else if err := os.Remove(filepath.Join(s.Manifests, name+".yaml")); err != nil && !os.IsNotExist(err) {
		s.t.Error(err)
	}
}

// local writes a local pod's manifest, with labels by chance.
func (s *stress) local(p *testnode.Pod) {
	text := s.pod(p.Namespace, p.Name, "", "{phase: Running}")
	s.Write(s.t, p.Name+".yaml", text)
}

// remote is a pod of another node. Some have ended, and some have an address that another one has too.
func (s *stress) remote(name string) string {
	a := 2 + s.chance.IntN(50)
	status := fmt.Sprintf(`{phase: %s, podIPs: [{ip: 10.244.9.%d}, {ip: "fd00:10:244:9::%x"}]}`,
		s.any([]string{"Running", "Running", "Running", "Running", "Succeeded", "Failed"}), a, a)
	return s.pod(s.any(stressNamespaces), name, "elsewhere", status)
}

func (s *stress) pod(namespace, name, node, status string) string {
	ports := fmt.Sprintf("http:%d/TCP,dns:%d/UDP", 80+s.chance.IntN(3), 53+s.chance.IntN(2))
	p := pod(namespace+"/"+name, "app="+s.any([]string{"web", "db", "cache", "job"})+",tier="+s.any([]string{"a", "b"}), ports)
	p.uid = "uid-" + name
	if node != "" {
		p.spec = "  nodeName: " + node + "\n"
	}
	p.status = status
	return p.manifest()
}

func (s *stress) changePolicy() {
	s.put(fmt.Sprintf("policy-%d", s.chance.IntN(30)), func(name string) string {
		spec := "  podSelector: {" + s.any([]string{"", "matchLabels: {app: web}", "matchLabels: {app: db}", "matchLabels: {app: cache, tier: a}",
			"matchExpressions: [{key: app, operator: NotIn, values: [web, db]}]"}) + "}\n"
		types := s.any([]string{"Ingress", "Egress", "Ingress, Egress"})
		spec += "  policyTypes: [" + types + "]\n"
		for _, side := range []struct{ kind, rules, peers string }{{"Ingress", "ingress", "from"}, {"Egress", "egress", "to"}} {
			if strings.Contains(types, side.kind) {
				spec += "  " + side.rules + ":\n"
				for range 1 + s.chance.IntN(3) {
					spec += "  - " + side.peers + ": [" + s.some(s.peer) + "]\n    ports: [" + s.some(s.portOfRule) + "]\n"
				}
			}
		}
		return networkPolicy(s.any(stressNamespaces)+"/"+name, spec)
	})
}

// some returns none to two of what a function makes.
func (s *stress) some(one func() string) string {
	var list []string
	for range s.chance.IntN(3) {
		list = append(list, one())
	}
	return strings.Join(list, ", ")
}

func (s *stress) peer() string {
	return s.any([]string{
		"{podSelector: {matchLabels: {app: web}}}", "{podSelector: {matchLabels: {app: job, tier: b}}}", "{podSelector: {}}",
		"{namespaceSelector: {matchLabels: {tier: a}}}", "{namespaceSelector: {matchLabels: {tier: b}}, podSelector: {matchLabels: {app: db}}}",
		"{namespaceSelector: {}}", "{ipBlock: {cidr: 10.0.0.0/8, except: [10.244.9.0/27]}}", `{ipBlock: {cidr: "fd00::/16", except: ["fd00:10:244:9::/124"]}}`,
		"{ipBlock: {cidr: 198.51.100.0/24}}", "{ipBlock: {cidr: 0.0.0.0/0, except: [198.51.100.0/25]}}", `{ipBlock: {cidr: "::/0"}}`,
	})
}

func (s *stress) portOfRule() string {
	return s.any([]string{"{port: 80}", "{port: 53, protocol: UDP}", "{port: http}", "{port: dns, protocol: UDP}", "{port: 8000, endPort: 8100}",
		"{protocol: SCTP}", "{protocol: TCP}"})
}

func (s *stress) failures(figures map[string]float64) string {
	var list []string
	for name, value := range figures {
		if strings.HasPrefix(name, "postern_failures_total") && value > 0 {
			list = append(list, fmt.Sprintf("%s %v", name, value))
		}
	}
	return strings.Join(list, ", ")
}
