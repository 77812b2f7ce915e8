package engine

import (
	"errors"
	"io/fs"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/fsnotify/fsnotify"

	"github.com/postern-cni/postern/pkg/attachment"
)

// recordEvent reads the record that an event is about, and reports whether it was about one.
func (e *Engine) recordEvent(event fsnotify.Event) bool {
	key, err := attachment.KeyOf(filepath.Base(event.Name))
	if err != nil {
		return false // a file that is still being written, under a name of its own
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
	return true
}

// setRecord notes what is attached under a key; nil for nothing any more.
func (e *Engine) setRecord(key attachment.Key, a *attachment.Attachment) {
	if was := e.records[key]; was != nil && a != nil && reflect.DeepEqual(was, a) {
		return
	}
	e.moved = true
	if e.records[key] = a; a == nil {
		delete(e.records, key)
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
	e.records, e.moved, e.relist = now, true, false
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
		if other := newest[a.Network]; other == nil || other.Created.Before(a.Created) {
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

// attached returns the attachments that policies speak of, one for each link: of two, the newer sandbox's, for the older's DEL is
// still to come.
func (e *Engine) attached() []*attachment.Attachment {
	newest := map[string]*attachment.Attachment{}
	for _, a := range e.records {
		if a.Policy != attachment.PolicyEnforce {
			continue
		}
		if other := newest[a.HostInterface]; other == nil || other.Created.Before(a.Created) {
			newest[a.HostInterface] = a
		}
	}
	list := make([]*attachment.Attachment, 0, len(newest))
	for _, a := range newest {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b *attachment.Attachment) int { return strings.Compare(a.HostInterface, b.HostInterface) })
	return list
}
