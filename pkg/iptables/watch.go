package iptables

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/postern-cni/postern/pkg/rule"
)

// Notice is something that somebody else did to a table: reason to compare our part of it with what was written.
type Notice struct {
	Family rule.Family
	Table  rule.Table
	What   string // for the log: who and what, as far as the kernel tells
}

// watched are the tables that a [Watcher] looks at.
var watched = []rule.Table{rule.Raw, rule.Mangle, rule.Filter, rule.NAT}

// Watcher notices what others change in the tables of one backend, in the network namespace of the thread that made it.
//
// With nft the kernel announces each change with its writer. A change concerns us if it is to a chain of ours, to a built-in
// chain that a rule of ours may stand in, or to a whole table; what others do in their own chains is not reported. With legacy
// nothing is announced: the figures of each table are looked at every [PollInterval], and show any change by anybody that
// moves, adds or removes a rule. A rule replaced by another of the same size shows in none of them.
//
// What [Tables] writes whose Watcher field is set is ours, and not reported.
type Watcher struct {
	backend Backend
	source  source

	mu      sync.Mutex
	changes chan []Notice // holds one value at most
}

// source is the kernel's side of a backend. Its methods may be called from any goroutine.
type source interface {
	run(context.Context) error
	// begin announces a restore of ours.
	begin(f rule.Family, text string) write
	close()
}

// write is a restore of ours from before its program is started until after it has ended.
type write interface {
	// started comes before the program has its input, so before it can change anything.
	started(pid int)
	ended(ok bool)
}

// NewWatcher begins to watch. Legacy needs the kernel's ip_tables and ip6_tables, which the first use of the programs loads.
func NewWatcher(backend Backend) (*Watcher, error) {
	w := &Watcher{backend: backend, changes: make(chan []Notice, 1)}
	var err error
	switch backend {
	case NFT:
		w.source, err = watchNFT(w.report)
	case Legacy:
		w.source, err = watchLegacy(w.report)
	default:
		err = fmt.Errorf("nft and legacy are known")
	}
	if err != nil {
		return nil, fmt.Errorf("watch iptables %s: %w", backend, err)
	}
	return w, nil
}

// Run reports changes until the context ends; an error means that nothing is noticed any more. What happened between
// [NewWatcher] and Run is reported too.
func (w *Watcher) Run(ctx context.Context) error {
	if err := w.source.run(ctx); err != nil {
		return fmt.Errorf("watch iptables %s: %w", w.backend, err)
	}
	return nil
}

// Changes delivers what was noticed since the last value was taken, at most one Notice for each table and family.
func (w *Watcher) Changes() <-chan []Notice { return w.changes }

// Close ends the watch. Tables that still name the watcher work on.
func (w *Watcher) Close() { w.source.close() }

// report adds changes to those that nobody has taken yet. The first one of each table keeps its words.
func (w *Watcher) report(changes ...Notice) {
	if len(changes) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []Notice
	select {
	case all = <-w.changes:
	default:
	}
	for _, c := range changes {
		if !slices.ContainsFunc(all, func(a Notice) bool { return a.Family == c.Family && a.Table == c.Table }) {
			all = append(all, c)
		}
	}
	w.changes <- all // only report sends, so there is room
}

// everything is the report of a watcher that does not know what it missed.
func everything(what string) (all []Notice) {
	for _, f := range rule.Families {
		for _, t := range watched {
			all = append(all, Notice{f, t, what})
		}
	}
	return all
}

// begin is nil's too: without a watcher of its backend a restore is nobody's business.
func (w *Watcher) begin(t *Tables, text string) write {
	if w == nil || w.backend != t.Backend {
		return unwatched{}
	}
	return w.source.begin(t.Family, text)
}

type unwatched struct{}

func (unwatched) started(int) {}
func (unwatched) ended(bool)  {}
