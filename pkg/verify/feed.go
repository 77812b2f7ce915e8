package verify

import (
	"context"
	"maps"
	"slices"
	"sync"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/object"
)

// stage is what the walk and the engine both see: the objects and records as they are, and those of which the kernel may hold
// anything yet.
type stage struct {
	mu  sync.Mutex
	now moment
	// given are the objects that the engine was given, from those by which the kernel was last brought up to date to those of now;
	// records are the records that it may have read.
	given   []moment
	records []map[attachment.Key]*attachment.Attachment
}

// known is what the engine was given last.
func (s *stage) known() moment {
	if len(s.given) == 0 {
		return moment{}
	}
	return s.given[len(s.given)-1]
}

// settled notes that the kernel holds what is now, and nothing of what was before.
func (s *stage) settled() {
	s.given = []moment{s.now}
	s.records = []map[attachment.Key]*attachment.Attachment{s.now.records}
}

// moments are all worlds of which the engine may have written something: each step of objects with each of records.
func (s *stage) moments() []moment {
	var list []moment
	for _, m := range s.given {
		for _, records := range s.records {
			m.records = records
			list = append(list, m)
		}
	}
	return list
}

// feed is an engine's source of objects, whose events the walk controls.
type feed struct {
	*stage
	changes chan struct{}
	synced  bool
	begun   bool
	split   *dice // hands on some of the changes at a time, in any order; nil for all at once
}

func newFeed(s *stage) *feed { return &feed{stage: s, changes: make(chan struct{}, 1)} }

func (f *feed) Changes() <-chan struct{} { return f.changes }

// signal says that there are changes, or has the engine look again.
func (f *feed) signal() {
	select {
	case f.changes <- struct{}{}:
	default:
	}
}

// Run has the first look at all objects end after it has begun, as that of any source.
func (f *feed) Run(ctx context.Context) error {
	f.signal()
	f.mu.Lock()
	f.synced = true
	f.mu.Unlock()
	f.signal()
	<-ctx.Done()
	return nil
}

func (f *feed) Synced() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.synced
}

func (f *feed) Snapshot() object.Cluster {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now.cluster()
}

func (f *feed) Problems() []string { return nil }

// Reread lets everything through.
func (f *feed) Reread(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.split = nil
	return nil
}

func (f *feed) Take() object.Changes {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.begun { // what a former engine was given counts for nothing
		f.begun = true
		f.given = append(f.given, f.now)
		return object.Diff(object.Cluster{}, f.now.cluster())
	}
	was := f.known()
	c := object.Diff(was.cluster(), f.now.cluster())
	if f.split != nil {
		d := *f.split
		c = object.Changes{Pods: someOf(d, c.Pods), Namespaces: someOf(d, c.Namespaces), Policies: someOf(d, c.Policies)}
		f.signal()
	}
	if len(c.Pods)+len(c.Namespaces)+len(c.Policies) > 0 {
		f.given = append(f.given, was.after(step{Changes: c}))
	}
	return c
}

// someOf draws some of the changes.
func someOf[V *object.Pod | *object.Namespace | *networkingv1.NetworkPolicy](d dice, all map[string]V) map[string]V {
	some := map[string]V{}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if d.chance(2) {
			some[key] = all[key]
		}
	}
	return some
}
