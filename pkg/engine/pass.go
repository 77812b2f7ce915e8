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
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// pass brings the kernel to what objects and records say now, and answers those who wait for it.
func (e *Engine) pass(ctx context.Context) error {
	waiting := e.waitingNow()
	forAll := slices.ContainsFunc(waiting, func(w *waiter) bool { return w.a == nil })
	if !e.Source.Synced() {
		return nil
	}
	e.Metrics.Synced.Set(1)
	begin := time.Now()
	var broken []error
	if e.relist || forAll {
		if broken = e.readRecords(); e.relist && !e.started() {
			err := errors.Join(broken...)
			e.fail("records", "who is attached is not known; what is in the kernel stays as it is", err)
			return err
		}
	}
	for _, w := range waiting {
		if w.a != nil { // its record's event may still be on the way
			e.setRecord(w.a.Key(), w.a)
		}
	}
	delta := e.learn(e.Source.Take())
	result, err := e.apply(ctx, forAll)
	e.account(delta, begin, result, err, broken)
	e.answer(waiting, err)
	return errors.Join(append(result.Refused, err)...)
}

// learn takes in what has changed, and changes what is wanted in the kernel accordingly.
func (e *Engine) learn(changes object.Changes) policy.Delta {
	for key, p := range changes.Pods {
		for _, a := range e.named[key] {
			e.moved[a.HostInterface] = true
		}
		was, here := e.placed[key]
		if here {
			e.expect(key, was.link, false)
			delete(e.placed, key)
		}
		if p == nil || p.HostNetwork || p.Ended || p.Node != e.Node && !(e.Unplaced && p.Node == "") {
			continue
		}
		if !here || was.pod.Identity() != p.Identity() {
			was.link = attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), firstInterface)
		}
		e.placed[key] = placed{p, was.link}
		e.expect(key, was.link, true)
	}
	update := policy.Changes{Changes: changes, Locals: e.locals(func(key string) *object.Pod {
		if p, changed := changes.Pods[key]; changed {
			return p
		}
		return e.index.Pod(key)
	})}
	if e.ranged {
		update.Ranges, update.NewRanges, e.ranged = e.ranges(), true, false
	}
	delta := e.index.Update(update)
	for _, f := range rule.Families {
		if e.wanted {
			e.plane.Change(compile.Patch(e.index, delta, f))
		} else {
			e.plane.Want(compile.State(e.index.Model(), f))
		}
	}
	e.wanted = true
	e.suspect(delta)
	return delta
}

// placed is a pod that the scheduler has placed on this node, with the interface that it will have.
type placed struct {
	pod  *object.Pod
	link string
}

// firstInterface is what runtimes call a pod's interface on the cluster's network.
const firstInterface = "eth0"

// expect notes that a placed pod will have a link, or will not.
func (e *Engine) expect(key, link string, will bool) {
	e.moved[link] = true
	listed(e.expected, link, key, will)
}

// locals are the pod interfaces of this node that may be others than the index knows: those attached, and those that the
// scheduler has placed here; nil for one that is not there any more. What is to be ready follows them.
func (e *Engine) locals(known func(key string) *object.Pod) map[string]*policy.Local {
	now := make(map[string]*policy.Local, len(e.moved))
	for link := range e.moved {
		if was := e.index.Local(link); was != nil {
			for _, addr := range was.Addresses {
				e.becomes(pair{addr, link}, nil)
			}
		}
		a := e.holder(link)
		switch names := e.expected[link]; {
		case a != nil:
			pod, _ := match(known, a)
			now[link] = &policy.Local{Pod: pod, Interface: link, Addresses: a.Addresses, Ready: pod != nil}
			for _, addr := range a.Addresses {
				if pod != nil {
					e.becomes(pair{addr, link}, a)
				}
			}
		case len(names) > 0:
			now[link] = &policy.Local{Pod: e.placed[slices.Min(names)].pod, Interface: link}
		default:
			now[link] = nil
		}
	}
	clear(e.moved)
	return now
}

// becomes notes for which attachment an address is to be ready; nil for none.
func (e *Engine) becomes(p pair, a *attachment.Attachment) {
	e.unsettled[p] = true
	if delete(e.ready, p); a != nil {
		e.ready[p] = a.Key()
	}
}

func podName(a *attachment.Attachment) string { return a.Pod.Namespace + "/" + a.Pod.Name }

// match finds the pod of an attachment. A pod that was made again under the same name is another pod: the reason says so.
func match(known func(key string) *object.Pod, a *attachment.Attachment) (*object.Pod, string) {
	name := podName(a)
	p := known(name)
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

// apply writes into the kernel what is wanted and not there. Now says that somebody waits until flows are judged, too.
func (e *Engine) apply(ctx context.Context, now bool) (dataplane.Result, error) {
	e.plane.Idle = map[netip.Addr]bool{}
	e.parted()
	fresh := e.fresh()
	// What has begun is brought to its end, also when policyd is told to stop.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), applyLimit)
	defer cancel()
	result, err := e.plane.Apply(ctx, func(so dataplane.Result) error {
		if err := e.tightened(so, now); err != nil {
			return err
		}
		return e.inheritNothing(fresh)
	})
	for p := range e.unsettled {
		if e.guarded[p] != e.ready[p] {
			delete(e.guarded, p)
		}
	}
	for _, p := range fresh {
		if f := rule.FamilyOf(p.address); e.plane.Holds(f, rule.ReadySet(f), p.entry()) {
			e.guarded[p] = e.ready[p]
		}
	}
	maps.DeleteFunc(e.unsettled, func(p pair, _ bool) bool { return e.guarded[p] == e.ready[p] })
	for _, f := range rule.Families {
		e.untouched[f] = e.untouched[f] && !e.plane.Known(f)
	}
	if err == nil {
		e.suspects = newSuspects()
	}
	return result, err
}

// fresh are those who are to become ready. They have no flows to lose, and whatever is known of their entries, they are written:
// the plugin takes a pod out of these sets by itself, so what was written for a former sandbox may be gone.
func (e *Engine) fresh() (fresh []pair) {
	for p := range e.unsettled {
		if key, ready := e.ready[p]; !ready || e.guarded[p] == key {
			continue
		}
		fresh = append(fresh, p)
		e.plane.Idle[p.address] = true
		f, entry := rule.FamilyOf(p.address), p.entry()
		for _, set := range []string{rule.ReadySet(f), rule.OpenSet(f, rule.Ingress), rule.OpenSet(f, rule.Egress)} {
			if !e.untouched[f] {
				e.plane.Doubt(f, set, entry)
			}
		}
	}
	return fresh
}

func (p pair) entry() rule.Entry {
	return rule.Entry{Prefix: netip.PrefixFrom(p.address, p.address.BitLen()), Iface: p.link}
}
