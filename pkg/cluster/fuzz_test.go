package cluster_test

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// mostObjects keeps one input from taking a second: what is looked for shows with a few objects.
const mostObjects = 30

// FuzzManifests reads any text. What can be read must go through everything that policyd does with it, without a panic, and what
// the policies' words say must be what the model says.
func FuzzManifests(f *testing.F) {
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := cluster.ParseManifests(text)
		if err != nil {
			if len(contents(c)) > 0 {
				t.Errorf("with the error %v come %q", err, contents(c))
			}
			return
		}
		again, err := cluster.ParseManifests(text)
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Errorf("read again: %v, %q; at first %q", err, contents(again), contents(c))
		}
		if len(c.Pods)+len(c.Policies)+len(c.Namespaces) > mostObjects || len(text) > 100000 {
			return
		}
		wellFormed(t, c)
		m := policy.Resolve(policy.Input{Cluster: c, Local: attached(c)})
		for _, family := range rule.Families {
			compiled(t, compile.State(m, family))
		}
		agree(t, c, m)
	})
}

// wellFormed sees that a cluster is what package object promises.
func wellFormed(t *testing.T, c object.Cluster) {
	t.Helper()
	known := map[string]bool{}
	for _, n := range c.Namespaces {
		if n.Name == "" || known[n.Name] || n.Labels[corev1.LabelMetadataName] != n.Name {
			t.Errorf("namespace %q: no name, there twice, or without its label", n.Name)
		}
		known[n.Name] = true
	}
	for _, p := range c.Pods {
		if p.Name == "" || !known[p.Namespace] || p.Identity() == "" {
			t.Errorf("pod %q: no name, or no namespace", p.Key())
		}
		for _, a := range p.IPs {
			if !a.IsValid() || a.Is4In6() {
				t.Errorf("pod %q: address %v", p.Key(), a)
			}
		}
	}
	for _, p := range c.Policies {
		if p.Name == "" || !known[p.Namespace] {
			t.Errorf("policy %q in %q: no name, or no namespace", p.Name, p.Namespace)
		}
	}
}

// attached makes local pods of all that could be.
func attached(c object.Cluster) []policy.Local {
	var locals []policy.Local
	for _, p := range c.Pods {
		if !p.HostNetwork && !p.Ended {
			link := attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), "eth0")
			locals = append(locals, policy.Local{Pod: p, Interface: link, Addresses: slices.Clone(p.IPs), Ready: len(p.IPs) > 0})
		}
	}
	return locals
}

// compiled sees what the kernel would refuse or misunderstand: long names, /0, two sets or chains of one name, a rule that names
// a chain or set that is not there.
func compiled(t *testing.T, s *rule.State) {
	t.Helper()
	sets := map[string]bool{}
	for _, set := range s.Sets {
		if sets[set.Name] || len(set.Name) > 31 {
			t.Errorf("set %s: twice, or its name is too long", set.Name)
		}
		sets[set.Name] = true
		for _, e := range set.Entries {
			if e.Prefix.Bits() < 1 || e.Prefix != e.Prefix.Masked() || rule.FamilyOf(e.Prefix.Addr()) != s.Family {
				t.Errorf("set %s: entry %s", set.Name, e)
			}
		}
		if !slices.IsSortedFunc(set.Entries, rule.Entry.Compare) {
			t.Errorf("set %s is not sorted", set.Name)
		}
	}
	for table, chains := range s.Chains {
		names := map[string]bool{}
		for _, c := range chains {
			if names[c.Name] || len(c.Name) > 28 || strings.ContainsAny(c.Name, " \n\"") {
				t.Errorf("%s: chain %q: twice, or its name is impossible", table, c.Name)
			}
			names[c.Name] = true
		}
		for _, c := range chains {
			for _, r := range c.Rules {
				closed(t, c.Name, r, names, sets)
			}
		}
	}
}

func closed(t *testing.T, chain string, r rule.Rule, chains, sets map[string]bool) {
	t.Helper()
	switch a := r.Action.(type) {
	case rule.Jump:
		if !chains[a.Chain] {
			t.Errorf("%s jumps to %s, which is not there", chain, a.Chain)
		}
	case rule.Goto:
		if !chains[a.Chain] {
			t.Errorf("%s goes to %s, which is not there", chain, a.Chain)
		}
	}
	for _, m := range r.Matches {
		if in, ok := m.(rule.InSet); ok && !sets[in.Name] {
			t.Errorf("%s looks into set %s, which is not there", chain, in.Name)
		}
	}
}

// agree asks the model and the policies' words about some packets. Addresses that two pods claim are left out: which of them
// has the address is another question.
func agree(t *testing.T, c object.Cluster, m *policy.Model) {
	t.Helper()
	owners := map[netip.Addr]int{}
	for _, p := range c.Pods {
		for _, a := range p.IPs {
			owners[a]++
		}
	}
	var ends []netip.Addr
	for _, text := range []string{"192.0.2.1", "10.1.2.3", "2001:db8::1", "fd00::1:2:3"} {
		if a := netip.MustParseAddr(text); owners[a] == 0 {
			ends = append(ends, a)
		}
	}
	for _, p := range c.Pods {
		for _, a := range p.IPs {
			if owners[a] == 1 && !a.IsLoopback() && a.Zone() == "" && len(ends) < 12 {
				ends = append(ends, a)
			}
		}
	}
	nobody := func(netip.Addr) bool { return false }
	for _, from := range ends {
		for _, to := range ends {
			if from.Is4() != to.Is4() || ended(c, from) || ended(c, to) {
				continue
			}
			for _, p := range packets(c) {
				q := explain.Query{From: explain.At(c, from, nil), To: explain.At(c, to, nil), Protocol: p.Protocol, Port: p.Number}
				answer := explain.Explain(c, q)
				if got := m.Allowed(from, to, p.Protocol, p.Number, nobody); got != answer.Allowed {
					t.Errorf("the model says %v, the policies' words say:\n%s", got, answer)
				}
				if answer.String() == "" {
					t.Error("an answer without words")
				}
			}
		}
	}
}

func ended(c object.Cluster, a netip.Addr) bool {
	return slices.ContainsFunc(c.Pods, func(p *object.Pod) bool { return p.Ended && slices.Contains(p.IPs, a) })
}

// packets are a few protocols and ports, among them some that policies and pods name.
func packets(c object.Cluster) []object.Port {
	list := []object.Port{{}, {Protocol: corev1.ProtocolTCP, Number: 80}, {Protocol: corev1.ProtocolUDP, Number: 53}}
	for _, p := range c.Pods {
		list = append(list, p.Ports...)
	}
	for _, np := range c.Policies {
		for _, r := range np.Spec.Ingress {
			for _, p := range r.Ports {
				if p.Port != nil && p.Port.IntVal > 0 && p.Port.IntVal < 65535 {
					list = append(list, object.Port{Protocol: corev1.ProtocolTCP, Number: uint16(p.Port.IntVal)})
				}
			}
		}
	}
	return list[:min(len(list), 8)]
}
