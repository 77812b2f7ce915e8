package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/fsnotify/fsnotify"

	"github.com/postern-cni/postern/pkg/attachment"
)

// recordEvent reads the record that an event is about. If that is known already, as that of a pod that was asked about, nothing
// is moved by it.
func (e *Engine) recordEvent(event fsnotify.Event) {
	key, err := attachment.KeyOf(filepath.Base(event.Name))
	if err != nil {
		return // a file that is still being written, under a name of its own
	}
	a, err := e.store.Get(key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.setRecord(key, nil)
	case err != nil:
		e.relist = true // which reports what is wrong
	default:
		e.setRecord(key, a)
	}
}

// setRecord notes what is attached under a key; nil for nothing any more.
func (e *Engine) setRecord(key attachment.Key, a *attachment.Attachment) {
	was := e.records[key]
	if was == nil && a == nil || was != nil && a != nil && reflect.DeepEqual(was, a) {
		return
	}
	if was != nil {
		e.enlist(was, false)
		delete(e.records, key)
	}
	if a != nil {
		e.enlist(a, true)
		e.records[key] = a
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if delete(e.namespaces, key); a != nil {
		e.namespaces[key] = a.NetNS
	}
}

// enlist enters a record in the lists that are kept of them, or strikes it off.
func (e *Engine) enlist(a *attachment.Attachment, in bool) {
	if a.Policy != attachment.PolicyEnforce {
		e.ranged = e.ranged || len(a.Addresses) > 0
		return
	}
	e.moved[a.HostInterface] = true
	listed(e.attached, a.HostInterface, a, in)
	listed(e.named, podName(a), a, in)
	// As long as all records of a network have the same ranges, it does not matter which is the newest.
	counts, ranges := e.networks[a.Network], fmt.Sprint(a.Ranges)
	if counts == nil {
		counts = map[string]int{}
		e.networks[a.Network] = counts
	}
	before := len(counts)
	if in {
		counts[ranges]++
	} else if counts[ranges]--; counts[ranges] == 0 {
		delete(counts, ranges)
	}
	e.ranged = e.ranged || before != 1 || len(counts) != 1
	if len(counts) == 0 {
		delete(e.networks, a.Network)
	}
}

// listed puts a value into the list of a name, or takes it out.
func listed[V comparable](lists map[string][]V, name string, v V, in bool) {
	if in {
		lists[name] = append(lists[name], v)
		return
	}
	lists[name] = slices.DeleteFunc(lists[name], func(o V) bool { return o == v })
	if len(lists[name]) == 0 {
		delete(lists, name)
	}
}

// readRecords reads all records afresh. A record that cannot be read is what it last was; so are all if the folder cannot be
// read, which is then tried again.
func (e *Engine) readRecords() []error {
	list, errs := e.store.List()
	now := make(map[attachment.Key]*attachment.Attachment, len(list))
	for _, err := range errs {
		var broken *attachment.BrokenError
		if !errors.As(err, &broken) {
			e.relist = true
			return errs
		}
		if key, err := attachment.KeyOf(filepath.Base(broken.Path)); err == nil && e.records[key] != nil {
			now[key] = e.records[key]
		}
	}
	for _, a := range list {
		now[a.Key()] = a
	}
	for key := range e.records {
		if now[key] == nil {
			e.setRecord(key, nil)
		}
	}
	for key, a := range now {
		e.setRecord(key, a)
	}
	e.relist = false
	return errs
}

// ranges lists the prefixes whose addresses only this node's pods have: those of each network's newest record, for a
// configuration may have changed. One that has an address of a pod that is not ours to guard is left out.
func (e *Engine) ranges() (list []netip.Prefix) {
	newest := map[string]*attachment.Attachment{}
	var others []netip.Addr
	for _, a := range e.records {
		if a.Policy != attachment.PolicyEnforce {
			others = append(others, a.Addresses...)
			continue
		}
		if other := newest[a.Network]; other == nil || attachment.Older(other, a) < 0 {
			newest[a.Network] = a
		}
	}
	for _, a := range newest {
		for _, p := range a.Ranges {
			if !slices.ContainsFunc(others, p.Contains) {
				list = append(list, p)
			}
		}
	}
	return list
}

// holder is the attachment at a link that policies speak of: of two, the newer sandbox's, for the older's DEL is still to come.
// Nil if nobody is attached there.
func (e *Engine) holder(link string) *attachment.Attachment {
	if len(e.attached[link]) == 0 {
		return nil
	}
	return slices.MaxFunc(e.attached[link], attachment.Older)
}
