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
		was, here := e.placed[key]
		e.moved = e.moved || here || e.recorded[key]
		delete(e.placed, key)
		if p == nil || p.HostNetwork || p.Ended || p.Node != e.Node && !(e.Unplaced && p.Node == "") {
			continue
		}
		if !here || was.pod.Identity() != p.Identity() {
			was.link = attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), firstInterface)
		}
		e.placed[key], e.moved = placed{p, was.link}, true
	}
	update := policy.Changes{Changes: changes}
	if e.moved {
		update.Ranges, update.NewLocals = e.ranges(), true
		update.Locals = e.locals(func(key string) *object.Pod {
			if p, changed := changes.Pods[key]; changed {
				return p
			}
			return e.index.Pod(key)
		})
		e.moved = false
		paths := make([]string, 0, len(e.records))
		for _, a := range e.records {
			paths = append(paths, a.NetNS)
		}
		e.mu.Lock()
		e.namespaces = paths
		e.mu.Unlock()
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

// locals lists the pod interfaces of this node: those attached, and those that the scheduler has placed here.
func (e *Engine) locals(known func(key string) *object.Pod) []policy.Local {
	attached := e.attached()
	n := len(attached)
	e.recorded, e.ready, e.settled = make(map[string]bool, n), make(map[pair]attachment.Key, n), false
	list, taken := make([]policy.Local, 0, n+len(e.placed)), make(map[string]bool, n)
	for _, a := range attached {
		pod, _ := match(known, a)
		l := policy.Local{Pod: pod, Interface: a.HostInterface, Addresses: a.Addresses, Ready: pod != nil}
		list = append(list, l)
		taken[l.Interface] = true
		e.recorded[podName(a)] = true
		for _, addr := range l.Addresses {
			if l.Ready {
				e.ready[pair{addr, l.Interface}] = a.Key()
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(e.placed)) {
		p := e.placed[key]
		if !taken[p.link] {
			list = append(list, policy.Local{Pod: p.pod, Interface: p.link})
			taken[p.link] = true
		}
	}
	return list
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
	var fresh []pair
	if !e.settled {
		e.parted()
		fresh = e.fresh()
	}
	// What has begun is brought to its end, also when policyd is told to stop.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), applyLimit)
	defer cancel()
	result, err := e.plane.Apply(ctx, func(so dataplane.Result) error {
		if err := e.tightened(so, now); err != nil {
			return err
		}
		return e.inheritNothing(fresh)
	})
	if !e.settled {
		maps.DeleteFunc(e.guarded, func(p pair, key attachment.Key) bool { return e.ready[p] != key })
		for _, p := range fresh {
			if f := rule.FamilyOf(p.address); e.plane.Holds(f, rule.ReadySet(f), p.entry()) {
				e.guarded[p] = e.ready[p]
			}
		}
		e.settled = maps.Equal(e.guarded, e.ready)
	}
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
	for p, key := range e.ready {
		if e.guarded[p] == key {
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
