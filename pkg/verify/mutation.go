package verify

import (
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// mutation breaks one line of the semantics on the way from the objects to the rules, as a mistake in the compiler would: it
// changes what the compiler is given for one family, or what it has made. The words keep the true objects.
type mutation struct {
	line  int // of the semantics of NetworkPolicy; 0 for what no line speaks of: how rules and sets hang together
	name  string
	input func(*policy.Input, rule.Family)
	state func(dice, *rule.State)
	// kernel asks for the mutation to be found by real packets too.
	kernel bool
}

// compile returns the broken state of a world whose true model is given.
func (m *mutation) compile(w *World, model *policy.Model, f rule.Family, d dice) *rule.State {
	if m.input != nil {
		in := copyInput(w)
		m.input(&in, f)
		model = policy.Resolve(in)
	}
	s := compile.State(model, f)
	if m.state != nil {
		s = copyState(s)
		m.state(d, s)
	}
	return s
}

// copyInput copies all that mutations change.
func copyInput(w *World) policy.Input {
	in := policy.Input{Cluster: object.Cluster{Namespaces: w.Cluster.Namespaces}, Local: slices.Clone(w.Local)}
	copies := map[*object.Pod]*object.Pod{}
	for _, p := range w.Cluster.Pods {
		copied := *p
		copied.Ports = slices.Clone(p.Ports)
		copies[p] = &copied
		in.Cluster.Pods = append(in.Cluster.Pods, &copied)
	}
	for i := range in.Local {
		in.Local[i].Pod = copies[in.Local[i].Pod]
	}
	for _, np := range w.Cluster.Policies {
		in.Cluster.Policies = append(in.Cluster.Policies, np.DeepCopy())
	}
	return in
}

func copyState(s *rule.State) *rule.State {
	out := *s
	out.Chains = map[rule.Table][]rule.Chain{}
	for table, chains := range s.Chains {
		for _, c := range chains {
			c.Rules = slices.Clone(c.Rules)
			for i := range c.Rules {
				c.Rules[i].Matches = slices.Clone(c.Rules[i].Matches)
			}
			out.Chains[table] = append(out.Chains[table], c)
		}
	}
	out.Sets = slices.Clone(s.Sets)
	for i := range out.Sets {
		out.Sets[i].Entries = slices.Clone(out.Sets[i].Entries)
	}
	return &out
}

// What follows lets a mutation say what it changes, and nothing else.

func eachPod(change func(*object.Pod)) func(*policy.Input, rule.Family) {
	return func(in *policy.Input, _ rule.Family) {
		for _, p := range in.Cluster.Pods {
			change(p)
		}
	}
}

// eachPolicy leaves alone the policies that cannot be used as written: a change might make them usable.
func eachPolicy(change func(*networkingv1.NetworkPolicy)) func(*policy.Input, rule.Family) {
	return func(in *policy.Input, _ rule.Family) {
		bad := unusable(in)
		for _, np := range in.Cluster.Policies {
			if !bad[np.Namespace+"/"+np.Name] {
				change(np)
			}
		}
	}
}

// unusable are the policies that cannot be used as written.
func unusable(in *policy.Input) map[string]bool {
	bad := map[string]bool{}
	for _, p := range policy.Resolve(*in).Problems {
		bad[p.Policy] = true
	}
	return bad
}

// ruleOf is an ingress or egress rule.
type ruleOf struct {
	egress bool
	peers  []networkingv1.NetworkPolicyPeer
	ports  []networkingv1.NetworkPolicyPort
}

// eachRule changes every rule; a change that says no takes the rule away.
func eachRule(change func(*ruleOf) bool) func(*networkingv1.NetworkPolicy) {
	return func(np *networkingv1.NetworkPolicy) {
		// A policy without policyTypes has the direction of its egress rules, which must not be lost with them.
		if len(np.Spec.PolicyTypes) == 0 && len(np.Spec.Egress) > 0 {
			np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
		}
		var in []networkingv1.NetworkPolicyIngressRule
		for _, r := range np.Spec.Ingress {
			if of := (&ruleOf{false, r.From, r.Ports}); change(of) {
				in = append(in, networkingv1.NetworkPolicyIngressRule{From: of.peers, Ports: of.ports})
			}
		}
		var out []networkingv1.NetworkPolicyEgressRule
		for _, r := range np.Spec.Egress {
			if of := (&ruleOf{true, r.To, r.Ports}); change(of) {
				out = append(out, networkingv1.NetworkPolicyEgressRule{To: of.peers, Ports: of.ports})
			}
		}
		np.Spec.Ingress, np.Spec.Egress = in, out
	}
}

// eachPeer replaces every peer by others.
func eachPeer(change func(networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer) func(*policy.Input, rule.Family) {
	return eachPolicy(eachRule(func(r *ruleOf) bool {
		var list []networkingv1.NetworkPolicyPeer
		for _, p := range r.peers {
			list = append(list, change(p)...)
		}
		had := len(r.peers) > 0
		r.peers = list
		return !had || len(list) > 0 // none left is nobody, not everybody
	}))
}

// eachPort replaces every port by others.
func eachPort(change func(networkingv1.NetworkPolicyPort) []networkingv1.NetworkPolicyPort) func(*policy.Input, rule.Family) {
	return eachPolicy(eachRule(func(r *ruleOf) bool {
		var list []networkingv1.NetworkPolicyPort
		for _, p := range r.ports {
			list = append(list, change(p)...)
		}
		had := len(r.ports) > 0
		r.ports = list
		return !had || len(list) > 0
	}))
}

// eachBlock changes every block; a change that says no takes the peer away.
func eachBlock(change func(*networkingv1.IPBlock) bool) func(*policy.Input, rule.Family) {
	return eachPeer(func(p networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		if p.IPBlock != nil && !change(p.IPBlock) {
			return nil
		}
		return []networkingv1.NetworkPolicyPeer{p}
	})
}

// eachSelector changes the selectors of every peer and policy.
func eachSelector(change func(*metav1.LabelSelector)) func(*policy.Input, rule.Family) {
	return eachPolicy(func(np *networkingv1.NetworkPolicy) {
		change(&np.Spec.PodSelector)
		peerSelectors(change)(np)
	})
}

func peerSelectors(change func(*metav1.LabelSelector)) func(*networkingv1.NetworkPolicy) {
	return eachRule(func(r *ruleOf) bool {
		for _, p := range r.peers {
			for _, s := range []*metav1.LabelSelector{p.PodSelector, p.NamespaceSelector} {
				if s != nil {
					change(s)
				}
			}
		}
		return true
	})
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
			spoil(d, &s.Sets[one(d, which...)])
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

// eachChain spoils every chain whose name begins so.
func eachChain(prefix string, spoil func(*rule.State, *rule.Chain)) func(dice, *rule.State) {
	return func(_ dice, s *rule.State) {
		for i := range s.Chains[rule.Mangle] {
			if c := &s.Chains[rule.Mangle][i]; strings.HasPrefix(c.Name, prefix) {
				spoil(s, c)
			}
		}
	}
}

// withoutRules takes rules out of a chain.
func withoutRules(which func(rule.Rule) bool) func(*rule.State, *rule.Chain) {
	return func(_ *rule.State, c *rule.Chain) { c.Rules = slices.DeleteFunc(c.Rules, which) }
}

// has reports whether a rule has a match of which something is true.
func has[M rule.Match](r rule.Rule, is func(M) bool) bool {
	return slices.ContainsFunc(r.Matches, func(m rule.Match) bool {
		of, ok := m.(M)
		return ok && is(of)
	})
}
