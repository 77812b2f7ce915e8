package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/postern-cni/postern/pkg/attach"
	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/hostport"
	"github.com/postern-cni/postern/pkg/podlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// repair compares the kernel with what was written, and reports whether a pass is needed to put it right. Records are read
// afresh too. HostPort's rules it puts right itself.
func (e *Engine) repair(ctx context.Context) bool {
	e.relist = true
	if e.first {
		return true
	}
	if err := e.repairPorts(ctx); err != nil {
		e.fail("hostports", "cannot repair hostPort rules", err)
	}
	found, err := e.plane.Refresh(ctx)
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
	}
	return true
}

// detaching reports whether all entries that a set lacks are those of pods that the plugin is taking away: it takes them out of
// the ready and open sets by itself.
func (e *Engine) detaching(d dataplane.Difference) bool {
	for _, entry := range d.Missing {
		key, known := e.guarded[pair{entry.Prefix.Addr(), entry.Iface}]
		if !known || entry.Iface == "" {
			return false
		}
		now, cancel := context.WithCancel(context.Background())
		cancel()
		lock, err := e.store.Lock(now, attachment.Interface(entry.Iface))
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
// lock.
func (e *Engine) repairPorts(ctx context.Context) error {
	list, errs := e.store.WithPorts()
	for _, err := range errs {
		e.Log.Error("a record cannot be read", "error", err)
	}
	if len(list) == 0 && !e.portsSeen {
		return nil // no pod has ports: not even a look
	}
	lock, err := e.store.Lock(ctx, attachment.HostPorts)
	if err != nil {
		return err
	}
	defer lock.Release()
	e.ports.Inherit(lock.File())
	defer e.ports.Inherit(nil)
	alive, err := e.alive()
	if err != nil {
		return err
	}
	for _, f := range rule.Families {
		e.ports.Want(hostport.State(f, alive))
	}
	result, err := e.ports.Apply(ctx, nil)
	if err == nil && result.Wrote() {
		e.repaired("hostports", []string{"rules that are not what the records of attached pods say"})
	}
	e.portsSeen = len(alive) > 0 || err != nil
	return err
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
