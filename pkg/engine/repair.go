package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/postern-cni/postern/pkg/attach"
	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/hostport"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/podlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// damage is where somebody else may have changed our part of the kernel.
type damage struct {
	links  map[string]bool
	parts  map[dataplane.Part]bool
	counts bool // of the entries of all sets
	ports  bool
	// What is looked at without a reason: all links, and parts, of which sets come first.
	allLinks bool
	unasked  []dataplane.Part
}

// some reports whether there is a reason to look at something besides hostPorts, rest whether something is looked at without.
func (d *damage) some() bool { return d.counts || len(d.links)+len(d.parts) > 0 }
func (d *damage) rest() bool { return d.allLinks || len(d.unasked) > 0 }

// watchers notice what others change, as far as the kernel tells.
type watchers struct {
	tables *iptables.Watcher
	links  *podlink.Watcher
}

// watch begins to watch. Where that is not possible, the comparison of every [Config.RepairInterval] finds what others did.
func (e *Engine) watch(ctx context.Context, wg *sync.WaitGroup) (w watchers) {
	failed := func(err error) {
		if err != nil && ctx.Err() == nil {
			e.unwatched.Store(true)
			e.fail("watch", "what others change is found by comparison alone, every "+e.RepairInterval.String(), err)
		}
	}
	var err error
	if w.tables, err = iptables.NewWatcher(e.Backend); err == nil {
		e.plane.Watched(w.tables)
		e.ports.Watched(w.tables)
		wg.Go(func() { defer w.tables.Close(); failed(w.tables.Run(ctx)) })
	}
	failed(err)
	if w.links, err = podlink.NewWatcher(); err == nil {
		wg.Go(func() { defer w.links.Close(); failed(w.links.Run(ctx)) })
	}
	failed(err)
	return w
}

func (w watchers) tableChanges() <-chan []iptables.Notice {
	if w.tables == nil {
		return nil
	}
	return w.tables.Changes()
}

func (w watchers) linkChanges() <-chan []string {
	if w.links == nil {
		return nil
	}
	return w.links.Changes()
}

// thorough is how many comparisons there are to one that is made of everything.
const thorough = 10

// compare adds what is looked at without a reason.
func (e *Engine) compare(d *damage) {
	e.compared++
	announced := e.Backend == iptables.NFT && !e.unwatched.Load()
	if !announced || e.RepairInterval < time.Minute || e.compared%thorough == 0 {
		e.relist = true
		if len(d.unasked) == 0 { // or the last comparison is not at its end
			for _, table := range append([]rule.Table{""}, dataplane.Policies.Tables...) {
				for _, f := range rule.Families {
					d.unasked = append(d.unasked, dataplane.Part{Family: f, Table: table})
				}
			}
		}
	}
	d.allLinks, d.counts, d.ports = true, true, true
}

func (d *damage) part(p dataplane.Part) {
	if d.parts == nil {
		d.parts = map[dataplane.Part]bool{}
	}
	d.parts[p] = true
}

// tables notes the tables in which others were at work. Who flushes tables may have gone on to the sets.
func (d *damage) tables(notices []iptables.Notice) {
	for _, n := range notices {
		d.part(dataplane.Part{Family: n.Family, Table: n.Table})
		d.ports = d.ports || slices.Contains(dataplane.HostPorts.Tables, n.Table)
	}
	d.counts = true
}

func (d *damage) linksOf(names []string) {
	if d.links == nil {
		d.links = map[string]bool{}
	}
	for _, name := range names {
		d.links[name] = true
	}
}

// glance has sets read, those that say who is here or all, whose numbers of entries are not right: nobody announces what is done
// to them.
func (e *Engine) glance(d *damage, peers bool) {
	if !e.started() {
		return
	}
	parts, err := e.plane.Glance(peers)
	if err != nil && !e.blind {
		e.fail("read", "cannot count the entries of our sets", err)
	}
	e.blind = err != nil
	for _, p := range parts {
		d.part(p)
	}
}

// repair looks where there is a reason to. It puts right what it finds; for policies, the next pass does that.
func (e *Engine) repair(ctx context.Context, d *damage) {
	if !e.started() {
		*d = damage{ports: d.ports} // everything is about to be read
		return
	}
	if d.counts {
		e.glance(d, true)
	}
	if len(d.parts) > 0 {
		e.reread(ctx, slices.Collect(maps.Keys(d.parts))...)
	}
	if len(d.links) > 0 {
		e.repairLinks(ctx, e.holders(func(link string) bool { return d.links[link] }))
	}
	d.counts, d.parts, d.links = false, nil, nil
}

// repairRest does the same with one piece of what is looked at without a reason, so that what happens meanwhile need not wait for
// all of it.
func (e *Engine) repairRest(ctx context.Context, d *damage) {
	switch {
	case !e.started():
		*d = damage{ports: d.ports}
	case d.allLinks:
		d.allLinks = false
		list := e.holders(func(string) bool { return true })
		if faulty, err := podlink.Faulty(list); err != nil {
			e.fail("link", "cannot look at all links at once; looking at each", err)
		} else {
			list = faulty
		}
		e.repairLinks(ctx, list)
	case d.unasked[0].Table == "":
		n := len(rule.Families) // the sets of all families are read together
		e.reread(ctx, d.unasked[:n]...)
		d.unasked = d.unasked[n:]
	default:
		e.reread(ctx, d.unasked[0])
		d.unasked = d.unasked[1:]
	}
}

// reread compares parts of the kernel with what is wanted there.
func (e *Engine) reread(ctx context.Context, parts ...dataplane.Part) {
	found, err := e.plane.Refresh(ctx, parts...)
	if err != nil {
		e.fail("read", "cannot read our rules and sets", err)
	}
	var what []string
	for _, d := range found {
		if d.Set == "" || !e.detaching(d) {
			what = append(what, d.What)
		}
	}
	e.repaired("policies", what)
	if len(what) > 0 {
		e.suspects.due, e.suspects.all = true, true
		clear(e.clean)
	}
}

// holders are the attachments at some links, in the order of these.
func (e *Engine) holders(which func(link string) bool) (list []*attachment.Attachment) {
	for _, link := range slices.Sorted(maps.Keys(e.attached)) {
		if which(link) {
			list = append(list, e.holder(link))
		}
	}
	return list
}

// repairLinks puts back what somebody took from the links of attached pods.
func (e *Engine) repairLinks(ctx context.Context, list []*attachment.Attachment) {
	for _, a := range list {
		found, err := e.restoreLink(a)
		if err != nil && ctx.Err() == nil {
			e.fail("link", "cannot repair the link of a pod", err)
		}
		e.repaired("links", found)
	}
}

// tryLock takes a lock, or returns an error at once if the plugin has it: policies wait for nobody.
func (e *Engine) tryLock(what attachment.Lockable) (*attachment.Lock, error) {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	return e.store.Lock(now, what)
}

// restoreLink leaves a link alone at which the plugin is at work.
func (e *Engine) restoreLink(a *attachment.Attachment) ([]string, error) {
	lock, err := e.tryLock(attachment.Interface(a.HostInterface))
	if err != nil {
		return nil, nil
	}
	defer lock.Release()
	if a, err = e.store.Get(a.Key()); err != nil {
		return nil, nil // its DEL was faster; what is wrong with a record, the reading of all says
	}
	return podlink.Restore(a)
}

// detaching reports whether all entries that a set lacks are those of pods that the plugin is taking away: it takes them out of
// the ready and open sets by itself.
func (e *Engine) detaching(d dataplane.Difference) bool {
	for _, entry := range d.Missing {
		key, known := e.guarded[pair{entry.Prefix.Addr(), entry.Iface}]
		if !known || entry.Iface == "" {
			return false
		}
		lock, err := e.tryLock(attachment.Interface(entry.Iface))
		if err != nil {
			continue // the plugin is at work on this link
		}
		lock.Release()
		if _, err := e.store.Get(key); !errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

func (e *Engine) repaired(scope string, found []string) {
	for _, what := range found {
		e.Metrics.Repairs.WithLabelValues(scope).Inc()
		e.Log.Warn("somebody else changed our part of the kernel; putting it right", "scope", scope, "found", what)
	}
}

func (e *Engine) fail(kind, message string, err error) {
	e.Metrics.Failures.WithLabelValues(kind).Inc()
	e.Log.Error(message, "error", err)
}

// repairPorts brings hostPort's rules to what the records of living attachments say. The plugin writes them too, under the same
// lock: while it is at work, again asks for another try.
func (e *Engine) repairPorts(ctx context.Context) (again bool, err error) {
	list, errs := e.store.WithPorts()
	for _, err := range errs {
		e.Log.Error("a record cannot be read", "error", err)
	}
	if len(list) == 0 && !e.portsSeen {
		return false, nil // no pod has ports: not even a look
	}
	lock, err := e.tryLock(attachment.HostPorts)
	if err != nil {
		return true, nil
	}
	defer lock.Release()
	e.ports.Inherit(lock.File())
	defer e.ports.Inherit(nil)
	alive, err := e.alive()
	if err != nil {
		return false, err
	}
	for _, f := range rule.Families {
		e.ports.Want(hostport.State(f, alive))
	}
	for _, a := range alive {
		if set, err := hostport.RouteLocalnet(rule.IPv4, a); err != nil {
			e.fail("hostports", "cannot repair a hostPort from 127.0.0.1", err)
		} else if set {
			e.repaired("hostports", []string{"route_localnet was off at link " + a.HostInterface})
		}
	}
	result, err := e.ports.Apply(ctx, nil)
	if err == nil && result.Wrote() {
		e.repaired("hostports", []string{"rules that are not what the records of attached pods say"})
	}
	e.portsSeen = len(alive) > 0 || err != nil
	return false, err
}

// alive are the attachments with ports whose link is there; read again under the lock.
func (e *Engine) alive() ([]*attachment.Attachment, error) {
	list, _ := e.store.WithPorts() // what cannot be read was reported
	owners, err := podlink.Owners()
	if err != nil {
		return nil, err
	}
	var alive []*attachment.Attachment
	for _, a := range list {
		if owners[a.HostInterface] == a.Key().String() {
			alive = append(alive, a)
		}
	}
	return alive, nil
}

// allHere reports whether the namespace of every record that is known is there: then no record needs to be read.
func (e *Engine) allHere() bool {
	e.mu.Lock()
	paths := slices.Collect(maps.Values(e.namespaces))
	e.mu.Unlock()
	for _, path := range paths {
		if _, err := os.Stat(path); err != nil {
			return false
		}
	}
	return true
}

// collect removes attachments whose container is gone, now and then: containerd never calls GC.
func (e *Engine) collect(ctx context.Context) {
	ticker := time.NewTicker(collectEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if e.allHere() {
			continue
		}
		within, cancel := context.WithTimeout(ctx, collectEvery)
		n, err := attach.Collect(within, e.StateDir)
		cancel()
		if err != nil && ctx.Err() == nil {
			e.fail("collect", "cannot collect attachments whose container is gone", err)
		}
		if n > 0 {
			e.Metrics.Collected.Add(float64(n))
			e.Log.Info(fmt.Sprintf("collected %d attachments whose container is gone", n))
		}
	}
}
