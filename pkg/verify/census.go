package verify

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// count is how many packets of a kind passed and were dropped.
type count struct{ passed, dropped int }

// census counts the kinds of packets there were. Where chance makes nothing of a kind, agreement says nothing about it.
type census map[string]count

func (c census) note(kind string, passes bool) {
	n := c[kind]
	if passes {
		n.passed++
	} else {
		n.dropped++
	}
	c[kind] = n
}

func (c census) merge(other census) {
	for kind, n := range other {
		sum := c[kind]
		c[kind] = count{sum.passed + n.passed, sum.dropped + n.dropped}
	}
}

// Kinds that only ever pass, or are only ever dropped.
var (
	alwaysPass = []string{established, icmpError, "itself", "open"}
	alwaysDrop = []string{forged, notReady, middle, "policy that cannot be used", "rules: none", "ports: a name that nobody has"}
)

// kinds that must occur, besides those.
var kinds = []string{
	"IPv4", "IPv6", "tcp", "udp", "sctp", "icmp", "ipv6-icmp",
	"isolated", "isolated at both ends",
	"peer: pod of this node", "peer: pod of another node", "peer: address of nobody", "peer: hostNetwork pod's address",
	"peer: ended pod's address, reused", "peer: ended pod's address", "peer: terminating pod", "peer: address of two pods",
	"second interface", "selected by several policies", "RELATED that is no ICMP",
	"policyTypes: absent", "policyTypes: Ingress", "policyTypes: Egress", "policyTypes: Ingress,Egress",
	"peers: everyone", "peers: podSelector", "peers: namespaceSelector", "peers: both selectors", "peers: ipBlock",
	"selector: empty", "selector: matchLabels", "selector: In", "selector: NotIn", "selector: Exists", "selector: DoesNotExist",
	"blocks: /0", "blocks: a single address", "blocks: exceptions", "blocks: several, overlapping, with exceptions",
	"blocks: host bits",
	"ports: every one", "ports: a number", "ports: a range", "ports: a name", "ports: whole protocol",
	"ports: protocol absent", "ports: TCP", "ports: UDP", "ports: SCTP",
}

// missing lists the kinds that did not occur, or did not come out both ways.
func (c census) missing() []string {
	var list []string
	for _, kind := range slices.Concat(alwaysPass, kinds) {
		if c[kind].passed == 0 {
			list = append(list, kind+", passed")
		}
	}
	for _, kind := range slices.Concat(alwaysDrop, kinds) {
		if c[kind].dropped == 0 {
			list = append(list, kind+", dropped")
		}
	}
	return list
}

// print writes the counts, sorted by kind.
func (c census) print(out io.Writer) {
	for _, kind := range slices.Sorted(maps.Keys(c)) {
		name, _, _ := strings.Cut(kind, ": denied")
		name, _, _ = strings.Cut(name, ": passes")
		fmt.Fprintf(out, "  %-62s %9d passed %9d dropped\n", name, c[kind].passed, c[kind].dropped)
	}
}

// take counts a packet.
func (c census) take(j *judges, p Packet, o opinion) {
	c.note(rule.FamilyOf(p.From).String(), o.passes)
	c.note(string(p.Protocol), o.passes)
	if o.why != "" {
		c.note(o.why, o.passes)
		return
	}
	if p.State == stateRelated {
		c.note("RELATED that is no ICMP", o.passes)
	}
	if p.From == p.To {
		c.note("itself", o.passes)
		return
	}
	for _, a := range []netip.Addr{p.From, p.To} {
		for _, kind := range j.world.kinds(a) {
			c.note(kind, o.passes)
		}
	}
	isolated := 0
	for _, s := range o.sides {
		if len(s.Policies) > 0 {
			isolated++
		}
		if len(s.Policies) > 1 {
			c.note("selected by several policies", o.passes)
		}
		for _, l := range s.Policies {
			if l.Admits == o.passes { // for a packet that passes, those that admit it
				c.policy(j.world, l.Policy, string(s.Direction), o.passes)
			}
		}
	}
	c.note([]string{"open", "isolated", "isolated at both ends"}[isolated], o.passes)
}

// kinds says what an end of a packet is.
func (w *World) kinds(a netip.Addr) []string {
	owners, ended, terminating, host := 0, false, false, false
	for _, p := range w.Cluster.Pods {
		if !slices.Contains(p.IPs, a) {
			continue
		}
		host, ended = host || p.HostNetwork, ended || p.Ended
		if !p.HostNetwork && !p.Ended {
			owners++
			terminating = terminating || p.Terminating
		}
	}
	at := slices.IndexFunc(w.Local, func(l policy.Local) bool { return slices.Contains(l.Addresses, a) })
	var list []string
	switch {
	case at >= 0:
		list = append(list, "peer: pod of this node")
		second := func(l policy.Local) bool { return l.Pod == w.Local[at].Pod && l.Interface != w.Local[at].Interface }
		if slices.ContainsFunc(w.Local, second) {
			list = append(list, "second interface")
		}
	case owners > 1:
		list = append(list, "peer: address of two pods")
	case owners == 1:
		list = append(list, "peer: pod of another node")
	case host:
		list = append(list, "peer: hostNetwork pod's address")
	case ended:
		list = append(list, "peer: ended pod's address")
	default:
		list = append(list, "peer: address of nobody")
	}
	if ended && (owners > 0 || at >= 0) {
		list = append(list, "peer: ended pod's address, reused")
	}
	if terminating {
		list = append(list, "peer: terminating pod")
	}
	return list
}

// policy counts the fields of a policy that was decisive.
func (c census) policy(w *World, key, direction string, passes bool) {
	i := slices.IndexFunc(w.Cluster.Policies, func(np *networkingv1.NetworkPolicy) bool { return np.Namespace+"/"+np.Name == key })
	np := w.Cluster.Policies[i]
	if w.cannotBeUsed()[key] {
		c.note("policy that cannot be used", passes)
		return
	}
	types := make([]string, 0, 2)
	for _, t := range np.Spec.PolicyTypes {
		types = append(types, string(t))
	}
	c.note("policyTypes: "+cmp.Or(strings.Join(types, ","), "absent"), passes)
	rules := 0
	one := func(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
		rules++
		c.peers(peers, passes)
		c.ports(w, ports, passes)
	}
	if direction == string(networkingv1.PolicyTypeIngress) {
		for _, r := range np.Spec.Ingress {
			one(r.From, r.Ports)
		}
	} else {
		for _, r := range np.Spec.Egress {
			one(r.To, r.Ports)
		}
	}
	if rules == 0 {
		c.note("rules: none", passes)
	}
}

func (w *World) cannotBeUsed() map[string]bool {
	if w.bad == nil {
		w.bad = unusable(&policy.Input{Cluster: object.Cluster{Policies: w.Cluster.Policies}})
	}
	return w.bad
}

func (c census) peers(peers []networkingv1.NetworkPolicyPeer, passes bool) {
	if len(peers) == 0 {
		c.note("peers: everyone", passes)
	}
	var blocks []netip.Prefix
	exceptions := false
	for _, p := range peers {
		switch {
		case p.IPBlock != nil:
			c.note("peers: ipBlock", passes)
			cidr := netip.MustParsePrefix(p.IPBlock.CIDR)
			blocks, exceptions = append(blocks, cidr), exceptions || len(p.IPBlock.Except) > 0
			c.block(cidr, len(p.IPBlock.Except) > 0, passes)
		case p.NamespaceSelector == nil:
			c.note("peers: podSelector", passes)
		case p.PodSelector == nil:
			c.note("peers: namespaceSelector", passes)
		default:
			c.note("peers: both selectors", passes)
		}
		for _, s := range []*metav1.LabelSelector{p.PodSelector, p.NamespaceSelector} {
			c.selector(s, passes)
		}
	}
	for i := range blocks {
		for k := range i {
			if exceptions && blocks[i].Overlaps(blocks[k]) {
				c.note("blocks: several, overlapping, with exceptions", passes)
			}
		}
	}
}

func (c census) block(cidr netip.Prefix, exceptions, passes bool) {
	if exceptions {
		c.note("blocks: exceptions", passes)
	}
	if cidr.Masked() != cidr {
		c.note("blocks: host bits", passes)
	}
	switch {
	case cidr.Bits() == 0:
		c.note("blocks: /0", passes)
	case cidr.IsSingleIP():
		c.note("blocks: a single address", passes)
	}
}

func (c census) selector(s *metav1.LabelSelector, passes bool) {
	if s == nil {
		return
	}
	if len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		c.note("selector: empty", passes)
	}
	if len(s.MatchLabels) > 0 {
		c.note("selector: matchLabels", passes)
	}
	for _, e := range s.MatchExpressions {
		c.note("selector: "+string(e.Operator), passes)
	}
}

func (c census) ports(w *World, ports []networkingv1.NetworkPolicyPort, passes bool) {
	if len(ports) == 0 {
		c.note("ports: every one", passes)
	}
	for _, p := range ports {
		switch {
		case p.Port == nil:
			c.note("ports: whole protocol", passes)
		case p.Port.Type == intstr.String:
			c.note("ports: a name", passes)
		case p.EndPort != nil:
			c.note("ports: a range", passes)
		default:
			c.note("ports: a number", passes)
		}
		// Only where nothing else in the rule could have admitted.
		if len(ports) == 1 && p.Port != nil && p.Port.Type == intstr.String && !anybodyHas(w.Cluster.Pods, p.Port.StrVal) {
			c.note("ports: a name that nobody has", passes)
		}
		if p.Protocol == nil {
			c.note("ports: protocol absent", passes)
		} else {
			c.note("ports: "+string(*p.Protocol), passes)
		}
	}
}
