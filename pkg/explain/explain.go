package explain

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/object"
)

// Query is the first packet of a connection, as it arrives at its real destination (after a Service's or hostPort's translation).
type Query struct {
	From, To Endpoint
	Protocol corev1.Protocol // "" for one that policies cannot name, such as ICMP
	Port     uint16
}

// Answer says whether the packet passes.
type Answer struct {
	Query   Query
	Allowed bool
	// Always says why no policy was asked; empty where policies decide.
	Always string
	// Sides are the source's egress and the destination's ingress, for each pod at that end. All must allow.
	Sides []Side
}

// Side is what the policies say of one pod in one direction.
type Side struct {
	Pod       string // namespace/name
	Direction networkingv1.PolicyType
	Allowed   bool
	// Policies are those that select the pod in this direction. None: the pod is open.
	Policies []Looked
}

// Looked is a policy that was looked at.
type Looked struct {
	Policy string // namespace/name
	Admits bool
	// Reasons has a line for each rule until one admits, or says what makes the policy unusable.
	Reasons []string
}

// Explain answers a query.
func Explain(c object.Cluster, q Query) Answer {
	a := Answer{Query: q, Allowed: true}
	switch {
	case len(q.From.Pods) == 0 && len(q.To.Pods) == 0:
		a.Always = "neither end is a pod that policies can select"
	case q.From.Address.IsValid() && q.From.Address == q.To.Address, !q.From.Address.IsValid() && same(q.From.Pods, q.To.Pods):
		a.Always = "a pod always reaches itself"
	case q.From.Node:
		a.Always = "a node always reaches its own pods"
	case q.To.Node:
		a.Always = "a pod always reaches its own node"
	}
	if a.Always != "" {
		return a
	}
	e := explainer{cluster: c, query: q}
	for _, pod := range q.From.Pods {
		a.add(e.side(pod, networkingv1.PolicyTypeEgress))
	}
	for _, pod := range q.To.Pods {
		a.add(e.side(pod, networkingv1.PolicyTypeIngress))
	}
	return a
}

func same(a, b []*object.Pod) bool { return len(a) > 0 && len(b) > 0 && a[0] == b[0] }

func (a *Answer) add(s Side) {
	a.Sides = append(a.Sides, s)
	a.Allowed = a.Allowed && s.Allowed
}

type explainer struct {
	cluster object.Cluster
	query   Query
}

// side asks every policy that selects the pod in this direction; policies only add, so one that admits is enough.
func (e *explainer) side(pod *object.Pod, d networkingv1.PolicyType) Side {
	s := Side{Pod: pod.Key(), Direction: d, Allowed: true}
	if pod.HostNetwork {
		return s
	}
	for _, np := range e.cluster.Policies {
		if !selects(np, pod) || !speaksOf(np, d) {
			continue
		}
		looked := e.look(np, d)
		s.Policies = append(s.Policies, looked)
	}
	if len(s.Policies) == 0 {
		return s
	}
	s.Allowed = false
	for _, l := range s.Policies {
		s.Allowed = s.Allowed || l.Admits
	}
	return s
}

// selects reports whether a policy applies to a pod. One whose selector cannot be read applies to its whole namespace.
func selects(np *networkingv1.NetworkPolicy, pod *object.Pod) bool {
	if np.Namespace != pod.Namespace {
		return false
	}
	selector, err := metav1.LabelSelectorAsSelector(&np.Spec.PodSelector)
	return err != nil || selector.Matches(&pod.Labels)
}

// speaksOf reports whether a policy has a direction. policyTypes left out means ingress, and egress where there are such rules.
func speaksOf(np *networkingv1.NetworkPolicy, d networkingv1.PolicyType) bool {
	if len(np.Spec.PolicyTypes) == 0 {
		return d == networkingv1.PolicyTypeIngress || len(np.Spec.Egress) > 0
	}
	for _, t := range np.Spec.PolicyTypes {
		if t == d || t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			return true
		}
	}
	return false
}

// look asks one policy.
func (e *explainer) look(np *networkingv1.NetworkPolicy, d networkingv1.PolicyType) Looked {
	l := Looked{Policy: np.Namespace + "/" + np.Name}
	if problems := unusable(np); len(problems) > 0 {
		l.Reasons = append(l.Reasons, "cannot be used as written, so it admits nothing: "+strings.Join(problems, "; "))
		return l
	}
	var rules []rule
	if d == networkingv1.PolicyTypeIngress {
		for i, r := range np.Spec.Ingress {
			rules = append(rules, rule{fmt.Sprintf("ingress[%d]", i), "from", r.From, r.Ports})
		}
	} else {
		for i, r := range np.Spec.Egress {
			rules = append(rules, rule{fmt.Sprintf("egress[%d]", i), "to", r.To, r.Ports})
		}
	}
	if len(rules) == 0 {
		l.Reasons = append(l.Reasons, fmt.Sprintf("has no %s rule: it admits nothing", strings.ToLower(string(d))))
	}
	for _, r := range rules {
		ok, why := e.admits(np, r, d)
		l.Reasons = append(l.Reasons, r.name+" "+why)
		if ok {
			l.Admits = true
			break
		}
	}
	return l
}

// rule is an ingress or egress rule.
type rule struct {
	name, field string
	peers       []networkingv1.NetworkPolicyPeer
	ports       []networkingv1.NetworkPolicyPort
}

// admits asks one rule: the port and the peer must both match. Where several pods have the other end's address, the rule must
// admit each.
func (e *explainer) admits(np *networkingv1.NetworkPolicy, r rule, d networkingv1.PolicyType) (ok bool, why string) {
	if len(r.peers) == 0 {
		if ok, why = e.anyPort(r.ports, d, false); ok {
			return true, "admits: everyone, " + why
		}
		return false, "does not: " + why
	}
	owners := e.query.From.Pods
	if d == networkingv1.PolicyTypeEgress {
		owners = e.query.To.Pods
	}
	if len(owners) == 0 {
		owners = []*object.Pod{nil}
	}
	for _, owner := range owners {
		if ok, why = e.admitsOne(np, r, d, owner); !ok {
			return false, why
		}
	}
	return true, why
}

// admitsOne asks for one owner of the other end's address; nil stands for none.
func (e *explainer) admitsOne(np *networkingv1.NetworkPolicy, r rule, d networkingv1.PolicyType, owner *object.Pod) (bool, string) {
	var missing []string
	for i := range r.peers {
		at := fmt.Sprintf("%s[%d]", r.field, i)
		ok, why := e.peer(np, &r.peers[i], d, owner)
		if !ok {
			missing = append(missing, at+" "+why)
			continue
		}
		ok, port := e.anyPort(r.ports, d, r.peers[i].IPBlock != nil)
		if ok {
			return true, fmt.Sprintf("admits: %s %s, %s", at, why, port)
		}
		missing = append(missing, at+" "+why+", but "+port)
	}
	return false, "does not: " + strings.Join(missing, "; ")
}
