package compile_test

import (
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

var (
	seed     = flag.Uint64("agree.seed", 1, "where the worlds of the agreement test begin")
	clusters = flag.Uint64("agree.clusters", 1500, "how many worlds the agreement test makes")
)

const packets = 40 // of each world

// judges are three ways to know whether a packet passes: the rules and sets, the model that live flows are judged by, and the
// policies' words.
type judges struct {
	w       *world
	kernels map[rule.Family]*kernel
	model   *policy.Model
	seen    object.Cluster // with the addresses that the node's records give
	local   map[netip.Addr]policy.Local
}

func judge(t *testing.T, w *world, sabotage func(*rule.State)) *judges {
	j := &judges{w: w, kernels: map[rule.Family]*kernel{}, model: policy.Resolve(policy.Input{Cluster: w.cluster, Local: w.local}),
		local: map[netip.Addr]policy.Local{}}
	for _, f := range rule.Families {
		s := compile.State(j.model, f)
		sabotage(s)
		j.kernels[f] = load(t, s)
	}
	recorded := map[*object.Pod][]netip.Addr{}
	for _, l := range w.local {
		for _, a := range l.Addresses {
			j.local[a] = l
		}
		if l.Pod != nil {
			recorded[l.Pod] = append(recorded[l.Pod], l.Addresses...)
		}
	}
	j.seen = w.cluster
	j.seen.Pods = nil
	for _, p := range w.cluster.Pods {
		copied := *p
		copied.IPs = recorded[p]
		if len(copied.IPs) == 0 {
			copied.IPs = slices.DeleteFunc(slices.Clone(p.IPs), func(a netip.Addr) bool {
				_, here := j.local[a]
				return here
			})
		}
		j.seen.Pods = append(j.seen.Pods, &copied)
	}
	return j
}

// words asks the policies' words about the ends that are pods of this node; another node judges its own.
func (j *judges) words(p packet) (allowed bool, text string) {
	ends := map[networkingv1.PolicyType]netip.Addr{networkingv1.PolicyTypeEgress: p.src, networkingv1.PolicyTypeIngress: p.dst}
	allowed = true
	for direction, a := range ends {
		own, here := j.local[a]
		if !here {
			continue
		}
		if !own.Ready {
			return false, text + a.String() + " is not ready\n"
		}
		// An ended pod is nobody's peer; while it is attached, it is judged itself.
		q := explain.Query{From: explain.At(j.seen, p.src, nil), To: explain.At(j.seen, p.dst, nil), Protocol: protocol(p), Port: p.port}
		if end := (explain.Endpoint{Pods: []*object.Pod{own.Pod}, Address: a}); direction == networkingv1.PolicyTypeEgress {
			q.From = end
		} else {
			q.To = end
		}
		answer := explain.Explain(j.seen, q)
		text += answer.String()
		for _, s := range answer.Sides {
			allowed = allowed && (s.Direction != direction || s.Allowed)
		}
	}
	return allowed, text
}

func protocol(p packet) corev1.Protocol {
	if p.proto == rule.ICMP || p.proto == rule.ICMPv6 {
		return ""
	}
	return corev1.Protocol(strings.ToUpper(string(p.proto)))
}

// answers say whether a packet passes.
type answers struct{ rules, model, words bool }

func (a answers) agree() bool { return a.rules == a.model && a.model == a.words }

// ask returns what each judge says of a packet, and the reasons.
func (j *judges) ask(p packet) (answers, string) {
	own := func(netip.Addr) bool { return false }
	words, text := j.words(p)
	a := answers{j.kernels[rule.FamilyOf(p.src)].passes(p), j.model.Allowed(p.src, p.dst, protocol(p), p.port, own), words}
	return a, fmt.Sprintf("%s\n%+v\n%s", p, a, text)
}

// fewest takes away what policies it can while a packet is still judged differently.
func fewest(t *testing.T, w *world, p packet) *world {
	for i := 0; i < len(w.cluster.Policies); {
		less := *w
		less.cluster.Policies = slices.Delete(slices.Clone(w.cluster.Policies), i, i+1)
		if a, _ := judge(t, &less, nothing).ask(p); !a.agree() {
			w = &less
		} else {
			i++
		}
	}
	return w
}

func nothing(*rule.State) {}

// What the compiled rules and sets let pass, what the model allows, and what the API's words mean are one.
func TestRulesModelAndWordsAgree(t *testing.T) {
	kinds := map[string]int{}
	for n := range *clusters {
		w := newWorld(*seed, n)
		j := judge(t, w, nothing)
		for range packets {
			p := w.packet()
			a, _ := j.ask(p)
			if !a.agree() {
				w = fewest(t, w, p)
				_, text := judge(t, w, nothing).ask(p)
				t.Fatalf("world %d of -agree.seed %d:\n%s\n%s", n, *seed, w, text)
			}
			kinds[j.kind(p, a.rules)]++
		}
	}
	t.Log(kinds)
	// Where chance makes nothing of a kind, agreement says nothing about it.
	all := int(*clusters * packets)
	for _, kind := range []string{"open", "isolated, passes", "isolated, dropped", "not ready, dropped"} {
		if kinds[kind] < all/50 {
			t.Errorf("of %d packets, %d are of the kind %q", all, kinds[kind], kind)
		}
	}
}

func (j *judges) kind(p packet, passes bool) string {
	kind := "open"
	from, to := j.model.At(p.src), j.model.At(p.dst)
	if from != nil && from.Egress.Isolated || to != nil && to.Ingress.Isolated {
		kind = "isolated"
	}
	if from != nil && !from.Ready || to != nil && !to.Ready {
		kind = "not ready"
	}
	switch {
	case !passes:
		kind += ", dropped"
	case kind != "open":
		kind += ", passes"
	}
	return kind
}

// Each way in which a state can be wrong is found within the worlds that the agreement test makes.
func TestDisagreementIsFound(t *testing.T) {
	for name, sabotage := range sabotages {
		t.Run(name, func(t *testing.T) {
			for n := range *clusters {
				w := newWorld(*seed, n)
				j := judge(t, w, func(s *rule.State) { sabotage(w.dice, s) })
				for range packets {
					if a, _ := j.ask(w.packet()); a.model == a.words && a.rules != a.model {
						return
					}
				}
			}
			t.Errorf("%d worlds found nothing", *clusters)
		})
	}
}

// sabotages spoil a state in one place.
var sabotages = map[string]func(dice, *rule.State){
	"a set of pods is empty":    inSet("pst-p", func(_ dice, s *rule.Set) { s.Entries = nil }),
	"a set of blocks loses one": inSet("pst-n", func(d dice, s *rule.Set) { s.Entries = s.Entries[:len(s.Entries)-1] }),
	"a block is wider than it should be": inSet("pst-n", func(d dice, s *rule.Set) {
		e := &s.Entries[d.IntN(len(s.Entries))]
		e.Prefix = netip.PrefixFrom(e.Prefix.Addr(), max(1, e.Prefix.Bits()-1)).Masked()
	}),
	"a named port has another number": inSet("pst-t", func(d dice, s *rule.Set) { s.Entries[d.IntN(len(s.Entries))].Port++ }),
	"a named port has another protocol": inSet("pst-t", func(d dice, s *rule.Set) {
		s.Entries[d.IntN(len(s.Entries))].Proto = rule.SCTP
	}),
	"a pod is not ready":     inSet("pst-ready", func(_ dice, s *rule.Set) { s.Entries = s.Entries[1:] }),
	"a pod is not open":      inSet("pst-open-ingress", func(_ dice, s *rule.Set) { s.Entries = s.Entries[1:] }),
	"a pod has another link": inSet("pst-open-egress", func(_ dice, s *rule.Set) { s.Entries[0].Iface = "pst0" }),
	"every pod is open": func(_ dice, s *rule.State) {
		at := func(name string) *rule.Set {
			return &s.Sets[slices.IndexFunc(s.Sets, func(set rule.Set) bool { return set.Name == name })]
		}
		at(rule.OpenSet(s.Family, rule.Egress)).Entries = at(rule.ReadySet(s.Family)).Entries
	},
	"a pod's drop is a return": inChain("PST-", func(_ dice, c *rule.Chain) { c.Rules[len(c.Rules)-1].Action = rule.Return{} }),
	"a pod's return is a drop": inChain("PST-", func(d dice, c *rule.Chain) {
		c.Rules[d.IntN(len(c.Rules))].Action = rule.Drop{}
	}),
	"a pod's chain lost a rule": inChain("PST-", func(d dice, c *rule.Chain) {
		i := d.IntN(len(c.Rules))
		c.Rules = slices.Delete(slices.Clone(c.Rules), i, i+1)
	}),
	"a rule lost its last match": inChain("PST-", func(d dice, c *rule.Chain) {
		if r := &c.Rules[d.IntN(len(c.Rules))]; len(r.Matches) > 0 {
			r.Matches = r.Matches[:len(r.Matches)-1]
		}
	}),
	"a range of ports is one too long": inChain("PST-", func(_ dice, c *rule.Chain) {
		for _, r := range c.Rules {
			for i, m := range r.Matches {
				if p, ok := m.(rule.DestPorts); ok {
					p.To++
					r.Matches[i] = p
				}
			}
		}
	}),
	"peers are looked up at the wrong end": inChain("PST-I-", func(_ dice, c *rule.Chain) {
		for _, r := range c.Rules {
			for i, m := range r.Matches {
				if in, ok := m.(rule.InSet); ok {
					in.Dirs = "dst"
					r.Matches[i] = in
				}
			}
		}
	}),
	"a pod is led to another's chain": inChain(compile.ChainTo, func(_ dice, c *rule.Chain) {
		if len(c.Rules) > 3 {
			c.Rules[1].Action = c.Rules[2].Action
		}
	}),
	"the tree is entered with jump": inChain(compile.ChainFrom, func(_ dice, c *rule.Chain) {
		for i, r := range c.Rules {
			if to, ok := r.Action.(rule.Goto); ok {
				c.Rules[i].Action = rule.Jump(to)
			}
		}
	}),
	"the tree does not drop": inChain(compile.ChainTo, func(_ dice, c *rule.Chain) {
		c.Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r rule.Rule) bool { return len(r.Matches) > 0 && r.Action != rule.Return{} })
		c.Rules[len(c.Rules)-1].Action = rule.Return{}
	}),
	"egress alone counts":  inChain(compile.ChainForward, func(_ dice, c *rule.Chain) { c.Rules = c.Rules[:len(c.Rules)-1] }),
	"ingress alone counts": inChain(compile.ChainForward, func(_ dice, c *rule.Chain) { c.Rules[len(c.Rules)-2].Action = rule.Accept{} }),
	"who is not ready passes": inChain(compile.ChainForward, func(_ dice, c *rule.Chain) {
		c.Rules[0].Action, c.Rules[1].Action = rule.Return{}, rule.Return{}
	}),
}

// inSet spoils one of the sets whose names begin so and that have entries, if there is one.
func inSet(prefix string, spoil func(dice, *rule.Set)) func(dice, *rule.State) {
	return func(d dice, s *rule.State) {
		var which []int
		for i, set := range s.Sets {
			if strings.HasPrefix(set.Name, prefix) && len(set.Entries) > 0 {
				which = append(which, i)
			}
		}
		if len(which) > 0 {
			set := &s.Sets[one(d, which...)]
			set.Entries = slices.Clone(set.Entries)
			spoil(d, set)
		}
	}
}

// inChain spoils one of the chains whose names begin so, if there is one.
func inChain(prefix string, spoil func(dice, *rule.Chain)) func(dice, *rule.State) {
	return func(d dice, s *rule.State) {
		var which []int
		for i, c := range s.Chains[rule.Mangle] {
			if strings.HasPrefix(c.Name, prefix) {
				which = append(which, i)
			}
		}
		if len(which) > 0 {
			spoil(d, &s.Chains[rule.Mangle][one(d, which...)])
		}
	}
}
