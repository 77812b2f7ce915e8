package verify

import (
	"fmt"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// judges are three ways to know whether a packet of a world passes: the words, the rules and the model.
type judges struct {
	world  *World
	states map[rule.Family]*rule.State
	tables map[rule.Family]*tables
	model  *policy.Model
	seen   object.Cluster // with the addresses that the node's records give
	local  map[netip.Addr]policy.Local
}

// judge compiles a world, with one mutation or, with nil, as it is. Words and model always speak of the world as it is.
func judge(w *World, m *mutation, d dice) *judges {
	j := &judges{world: w, states: map[rule.Family]*rule.State{}, tables: map[rule.Family]*tables{},
		model: policy.Resolve(policy.Input{Cluster: w.Cluster, Local: w.Local}), local: map[netip.Addr]policy.Local{}}
	for _, f := range rule.Families {
		if m == nil {
			j.states[f] = compile.State(j.model, f)
		} else {
			j.states[f] = m.compile(w, j.model, f, d)
		}
		j.tables[f] = load(j.states[f])
	}
	j.look()
	return j
}

// look gives pods the addresses of their records: a record of this node beats any status.
func (j *judges) look() {
	recorded := map[*object.Pod][]netip.Addr{}
	for _, l := range j.world.Local {
		for _, a := range l.Addresses {
			j.local[a] = l
		}
		if l.Pod != nil {
			recorded[l.Pod] = append(recorded[l.Pod], l.Addresses...)
		}
	}
	j.seen = j.world.Cluster
	j.seen.Pods = nil
	for _, p := range j.world.Cluster.Pods {
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
}

// opinion is what the words say of a packet.
type opinion struct {
	passes bool
	why    string           // where no policy was asked
	sides  []explain.Side   // of this node's pods
	asked  []explain.Answer // the whole of what was asked, for people
}

func (o opinion) String() string {
	if o.why != "" {
		return o.why + "\n"
	}
	_, text := explain.All(o.asked)
	return text
}

// Why no policy is asked.
const (
	forged      = "comes from a link that does not lead to its source: denied"
	notReady    = "one end is a pod of this node that is not ready: denied"
	transit     = "neither end is a pod of this node: passes"
	established = "belongs to a flow that was let in: passes"
	icmpError   = "an ICMP error of a flow: passes"
	middle      = "TCP in the middle of no known flow: denied"
)

// words asks the policies' words about the ends that are pods of this node; another node judges its own.
func (j *judges) words(p Packet) opinion {
	from, fromHere := j.local[p.From]
	to, toHere := j.local[p.To]
	switch {
	case p.Via != "":
		return opinion{why: forged}
	case fromHere && !from.Ready, toHere && !to.Ready:
		return opinion{why: notReady}
	case !fromHere && !toHere:
		return opinion{passes: true, why: transit}
	case p.State == stateEstablished:
		return opinion{passes: true, why: established}
	case p.State == stateRelated && p.icmp():
		return opinion{passes: true, why: icmpError}
	case p.Middle:
		return opinion{why: middle}
	}
	o := opinion{passes: true}
	if fromHere {
		j.ask(&o, p, networkingv1.PolicyTypeEgress, from)
	}
	if toHere {
		j.ask(&o, p, networkingv1.PolicyTypeIngress, to)
	}
	return o
}

// ask asks about one direction of one pod of this node. An ended pod is nobody's peer; while it is attached, it is judged itself.
func (j *judges) ask(o *opinion, p Packet, d networkingv1.PolicyType, own policy.Local) {
	q := explain.Query{From: explain.At(j.seen, p.From, nil), To: explain.At(j.seen, p.To, nil), Protocol: p.named(), Port: p.Port}
	if d == networkingv1.PolicyTypeEgress {
		q.From.Pods = []*object.Pod{own.Pod}
	} else {
		q.To.Pods = []*object.Pod{own.Pod}
	}
	answer := explain.Explain(j.seen, q)
	o.asked = append(o.asked, answer)
	for _, s := range answer.Sides {
		if s.Direction == d {
			o.sides = append(o.sides, s)
			o.passes = o.passes && s.Allowed
		}
	}
}

// rules walks the packet through the compiled chains.
func (j *judges) rules(p Packet) (bool, error) {
	return j.tables[rule.FamilyOf(p.From)].passes(flight{p, j.world.in(p), j.world.linkOf(p.To)})
}

// modelled asks the model, which knows first packets alone.
func (j *judges) modelled(p Packet) bool {
	return j.model.Allowed(p.From, p.To, p.named(), p.Port, func(netip.Addr) bool { return false })
}

// differs tells in words how the answers differ; empty if they are one.
func (j *judges) differs(p Packet, words opinion) string {
	rules, err := j.rules(p)
	switch {
	case err != nil:
		return "the rules are none: " + err.Error()
	case rules != words.passes:
		return fmt.Sprintf("words say %s, rules %s", pass(words.passes), pass(rules))
	case p.first() && p.State == stateNew && j.modelled(p) != words.passes:
		return fmt.Sprintf("words say %s, the model %s", pass(words.passes), pass(!words.passes))
	}
	return ""
}

func pass(yes bool) string {
	if yes {
		return "pass"
	}
	return "drop"
}
