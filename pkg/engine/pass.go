package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// pass brings the kernel to what objects and records say now, and answers those who wait for it.
func (e *Engine) pass(ctx context.Context) (tightened bool, err error) {
	waiting := e.waitingNow()
	if !e.Source.Synced() {
		return false, nil
	}
	e.Metrics.Synced.Set(1)
	begin := time.Now()
	var broken []error
	if e.relist || slices.ContainsFunc(waiting, func(w *waiter) bool { return w.a == nil }) {
		broken = e.readRecords()
	}
	for _, w := range waiting {
		if w.a != nil { // its record's event may still be on the way
			e.records[w.a.Key()] = w.a
		}
	}
	cluster := e.Source.Snapshot()
	attached := e.attached()
	locals := e.locals(cluster, attached)
	e.model = policy.Resolve(policy.Input{Cluster: cluster, Local: locals})
	result, err := e.apply(ctx, attached)
	if err == nil {
		e.first = false
	}
	e.account(cluster, begin, result, err, broken)
	e.answer(waiting, err)
	return result.Tightened, err
}

// locals lists the pod interfaces of this node: those attached, and those that the scheduler has placed here.
func (e *Engine) locals(c object.Cluster, attached []*attachment.Attachment) []policy.Local {
	byName := make(map[string]*object.Pod, len(c.Pods))
	for _, p := range c.Pods {
		byName[p.Key()] = p
	}
	var list []policy.Local
	taken := map[string]bool{}
	for _, a := range attached {
		pod, _ := match(byName, a)
		list = append(list, policy.Local{Pod: pod, Interface: a.HostInterface, Addresses: a.Addresses, Ready: pod != nil})
		taken[a.HostInterface] = true
	}
	for _, p := range c.Pods {
		if p.HostNetwork || p.Ended || p.Node != e.Node && !(e.Unplaced && p.Node == "") {
			continue
		}
		link := attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), firstInterface)
		if !taken[link] {
			list = append(list, policy.Local{Pod: p, Interface: link})
		}
	}
	return list
}

// firstInterface is what runtimes call a pod's interface on the cluster's network.
const firstInterface = "eth0"

// match finds the pod of an attachment. A pod that was made again under the same name is another pod: the reason says so.
func match(byName map[string]*object.Pod, a *attachment.Attachment) (*object.Pod, string) {
	name := a.Pod.Namespace + "/" + a.Pod.Name
	p := byName[name]
	switch {
	case p == nil:
		return nil, fmt.Sprintf("pod %s is not known", name)
	case p.HostNetwork:
		return nil, fmt.Sprintf("pod %s is on the host network: it has no interface of its own", name)
	case a.Pod.UID == "" || p.UID == "" && p.Mirror == "" || a.Pod.UID == p.UID || a.Pod.UID == p.Mirror:
		return p, ""
	}
	return nil, fmt.Sprintf("pod %s is known with the UID %s, and the attached one has the UID %s: it is the former or next pod "+
		"of that name", name, p.UID, a.Pod.UID)
}

// apply writes the model into the kernel.
func (e *Engine) apply(ctx context.Context, attached []*attachment.Attachment) (dataplane.Result, error) {
	ready := e.readyPairs(attached)
	var fresh []pair
	for p, key := range ready {
		if e.guarded[p] == key {
			continue
		}
		fresh = append(fresh, p)
		if e.first {
			continue
		}
		// The plugin takes a pod out of these by itself, so what was written for a former sandbox may be gone.
		f, entry := rule.FamilyOf(p.address), p.entry()
		for _, set := range []string{rule.ReadySet(f), rule.OpenSet(f, rule.Ingress), rule.OpenSet(f, rule.Egress)} {
			e.plane.Doubt(f, set, entry)
		}
	}
	var states []*rule.State
	for _, f := range rule.Families {
		states = append(states, compile.State(e.model, f))
	}
	judge := func(so dataplane.Result) error {
		if so.Tightened && e.judge("now") != nil {
			return errors.New("live flows could not be judged")
		}
		return e.inheritNothing(fresh)
	}
	result, err := e.plane.Apply(ctx, states, judge)
	if err == nil {
		e.guarded = ready
		return result, nil
	}
	maps.DeleteFunc(e.guarded, func(p pair, key attachment.Key) bool { return ready[p] != key })
	return result, err
}

func (p pair) entry() rule.Entry {
	return rule.Entry{Prefix: netip.PrefixFrom(p.address, p.address.BitLen()), Iface: p.link}
}

// readyPairs are the addresses that are to be ready, with the attachment whose they are.
func (e *Engine) readyPairs(attached []*attachment.Attachment) map[pair]attachment.Key {
	keys := map[string]attachment.Key{}
	for _, a := range attached {
		keys[a.HostInterface] = a.Key()
	}
	pairs := map[pair]attachment.Key{}
	for i := range e.model.Pods {
		g := &e.model.Pods[i]
		for _, a := range g.Addresses {
			if g.Ready {
				pairs[pair{a, g.Interface}] = keys[g.Interface]
			}
		}
	}
	return pairs
}

// inheritNothing ends the flows of addresses that are about to become ready: they are a former owner's. What the kernel holds
// as ready when policyd starts was guarded by its predecessor, and keeps its flows.
func (e *Engine) inheritNothing(fresh []pair) error {
	var errs []error
	for _, p := range fresh {
		f := rule.FamilyOf(p.address)
		if e.first && e.plane.Holds(f, rule.ReadySet(f), p.entry()) {
			continue
		}
		errs = append(errs, conntrack.DeleteAddress(p.address))
	}
	return errors.Join(errs...)
}
