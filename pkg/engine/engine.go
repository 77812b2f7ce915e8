package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// Source is where objects come from; package cluster has two.
type Source interface {
	Run(ctx context.Context) error
	Changes() <-chan struct{}
	Synced() bool
	Snapshot() object.Cluster
	Take() object.Changes
	Problems() []string
	Reread(ctx context.Context) error
}

// Config is what an engine works with.
type Config struct {
	Source   Source
	StateDir string // the node's state folder
	Node     string // this node's name: its pods get their chains before they are attached
	// Unplaced says that pods without a node may come to this one: manifests often name none.
	Unplaced bool
	Backend  iptables.Backend
	// RepairInterval is how often the kernel is compared with what was written: links, hostPorts, the numbers of the sets' entries,
	// and rules where the kernel does not announce who changes them. Every tenth time, and with an interval of less than a minute
	// always, it is all rules and all entries.
	RepairInterval time.Duration
	Metrics        *metrics.Metrics
	Log            *slog.Logger
	Version        string
	// Fail, in tests, is asked before each step that reads or writes the kernel, by its name, and makes it fail.
	Fail func(step string) error
}

// Times of the engine's own.
const (
	// heartbeat is how often the plugin is told that policyd is here, and how often the entries of the sets are counted that say
	// which pods are: to wake up for it costs more than either.
	heartbeat    = time.Second
	collectEvery = 30 * time.Second
	// lookPause and portPause are how long after a look for damage the next one is, at least.
	lookPause = 100 * time.Millisecond
	portPause = 300 * time.Millisecond
	// portDelay keeps policyd out of the way of the plugin, whose own work on hostPort's rules is noticed too.
	portDelay = 150 * time.Millisecond
	// passPause is how long after a pass a change in the cluster waits, for others to come: where pods elsewhere come and go all
	// the time, a pass and what wakes up for it costs more than the change. Records and the plugin wait for nothing.
	passPause = 25 * time.Millisecond
	// A reading of the flows takes as long as the table is large, so the pause after it, where nobody waits for the next, is
	// judgeRest times what it took, and within these: the last where changes come all the time, and judgeOften readings have each
	// followed the one before within two such pauses.
	judgeRest      = 100
	judgePause     = 250 * time.Millisecond
	judgePauseMax  = 500 * time.Millisecond
	judgePauseBusy = time.Second
	judgeOften     = 4
	// applyLimit is how long one pass may write.
	applyLimit = 45 * time.Second
	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second
)

// Engine is the daemon's heart. Its methods may be called from any goroutine once [Engine.Run] runs.
type Engine struct {
	Config
	store *attachment.Store
	plane *dataplane.Plane
	ports *dataplane.Plane
	wake  chan struct{} // holds one value at most

	// Used by the goroutine of Run alone.
	index   *policy.Index
	placed  map[string]placed // by the pod's "namespace/name"
	records map[attachment.Key]*attachment.Attachment
	relist  bool // read all records again
	wanted  bool // the plane was told what is wanted
	// attached and named are the records that are to be guarded, by their links and by their pods; expected are the names of the
	// placed pods by their links. moved are the links at which one of them, or its pod, may be another than the index knows.
	attached, named map[string][]*attachment.Attachment
	expected        map[string][]string
	moved           map[string]bool
	// networks counts the records that are to be guarded by their network and its ranges; ranged says that the node's ranges may
	// be others than the index knows.
	networks map[string]map[string]int
	ranged   bool
	// untouched are the families in which nothing has been applied yet: what the kernel holds there is a predecessor's.
	untouched map[rule.Family]bool
	// ready are the addresses that are to be ready, guarded those that the kernel has as ready; they are the same but for some of
	// the unsettled.
	ready, guarded map[pair]attachment.Key
	unsettled      map[pair]bool
	// clean are the ranges of this node whose free addresses have no flows, but for those that are to be judged as gone.
	clean map[netip.Prefix]bool
	// suspects are to be judged if something is taken away, unjudged those from whom something was, judged those who have been
	// judged once; judgedAt is when they were, zero if it failed, and judgeIn how long after that they are judged again; judgedInRow
	// counts the readings that followed each other.
	suspects, unjudged, judged suspects
	judgedAt                   time.Time
	judgeIn                    time.Duration
	judgedInRow                int
	portsSeen                  bool
	compared                   int         // comparisons so far
	unwatched                  atomic.Bool // the kernel's announcements are not heard
	blind                      bool        // sets could not be counted the last time
	retry                      time.Duration
	reported                   map[string]bool // problems that the log has already

	mu      sync.Mutex
	waiters []*waiter
	status  Status
	pods    map[string]PodStatus // by interface
	// namespaces are the paths of the network namespaces of all records.
	namespaces map[attachment.Key]string
	beat       time.Time
}

// pair is an address on a link.
type pair struct {
	address netip.Addr
	link    string
}

// New prepares an engine; nothing is written yet.
func New(c Config) (*Engine, error) {
	e := &Engine{Config: c, store: attachment.Open(c.StateDir), wake: make(chan struct{}, 1), relist: true,
		untouched: map[rule.Family]bool{rule.IPv4: true, rule.IPv6: true},
		index:     policy.NewIndex(), placed: map[string]placed{}, records: map[attachment.Key]*attachment.Attachment{},
		attached: map[string][]*attachment.Attachment{}, named: map[string][]*attachment.Attachment{},
		expected: map[string][]string{}, moved: map[string]bool{}, networks: map[string]map[string]int{},
		ready: map[pair]attachment.Key{}, guarded: map[pair]attachment.Key{}, unsettled: map[pair]bool{},
		namespaces: map[attachment.Key]string{}, clean: map[netip.Prefix]bool{}, suspects: newSuspects(),
		unjudged: newSuspects(), judged: newSuspects(), reported: map[string]bool{}, pods: map[string]PodStatus{}}
	// A predecessor may have ended before it has judged the flows that its last change took something away from.
	e.suspects.due, e.suspects.all = true, true
	var err, err2 error
	e.plane, err = dataplane.Open(c.Backend, dataplane.Policies)
	e.ports, err2 = dataplane.Open(c.Backend, dataplane.HostPorts)
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	e.plane.Fail, e.plane.Bridge = c.Fail, compile.Bridge
	e.status = Status{Version: c.Version, Node: c.Node, Backend: string(c.Backend), Started: time.Now()}
	return e, nil
}

// kick asks for a pass.
func (e *Engine) kick() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// Run works until the context ends; the rules stay in force then. It returns an error only where it cannot work at all.
func (e *Engine) Run(ctx context.Context) error {
	if err := os.MkdirAll(e.store.Dir(), 0o700); err != nil {
		return fmt.Errorf("make the folder of records: %w", err)
	}
	if err := os.WriteFile(gate.BackendFile(e.StateDir), []byte(e.Backend), 0o600); err != nil {
		return fmt.Errorf("note the iptables backend for the plugin: %w", err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", e.store.Dir(), err)
	}
	defer watcher.Close()
	if err := watcher.Add(e.store.Dir()); err != nil {
		return fmt.Errorf("watch %s: %w", e.store.Dir(), err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil) // before the wait, also in a panic
	defer e.plane.Close()
	wg.Go(func() {
		if err := e.Source.Run(ctx); err != nil {
			cancel(err)
		}
	})
	wg.Go(func() { e.collect(ctx) })
	e.loop(ctx, watcher, e.watch(ctx, &wg))
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// loop waits for a reason to look, and looks.
func (e *Engine) loop(ctx context.Context, records *fsnotify.Watcher, others watchers) {
	beat, compare := time.NewTicker(heartbeat), time.NewTicker(e.RepairInterval)
	defer beat.Stop()
	defer compare.Stop()
	var judge, retry <-chan time.Time
	changes := pacer{pause: passPause}
	found := damage{ports: true} // hostPort rules may be gone since policyd ended
	looks, portLooks := pacer{pause: lookPause}, pacer{pause: portPause, delay: portDelay}
	var rest pacer // without a pause: what has happened meanwhile gets in between all the same
	e.pulse()
	for {
		pass := false
		source := e.Source.Changes()
		if changes.due != nil {
			source = nil // a pass comes in any case
		}
		select {
		case <-ctx.Done():
			_ = e.judge(true) // it has reported its error, and who is next judges all
			return
		case <-source:
			if pass = changes.rested(); !pass {
				changes.ask()
			}
		case <-changes.due:
			pass = true
		case <-e.wake:
			pass = true
		case event := <-records.Events:
			e.recordEvent(event)
			pass = e.relist
		case <-records.Errors:
			e.relist, pass = true, true
		case <-beat.C:
			e.pulse()
			e.glance(&found, false)
			pass = !e.started() && e.Source.Synced()
		case notices := <-others.tableChanges():
			found.tables(notices)
		case links := <-others.linkChanges():
			found.linksOf(links)
		case <-compare.C:
			e.compare(&found)
		case <-looks.due:
			looks.done()
			e.repair(ctx, &found)
			pass = true
		case <-rest.due:
			rest.done()
			e.repairRest(ctx, &found)
			pass = true
		case <-portLooks.due:
			portLooks.done()
			var err error
			if found.ports, err = e.repairPorts(ctx); err != nil {
				e.fail("hostports", "cannot repair hostPort rules", err)
			}
		case <-judge:
			judge = nil
			pass = e.judge(false) != nil // the pass fails too, and is tried again
		case <-retry:
			retry, pass = nil, true
		}
		e.drain(records)
		if pass || len(e.moved) > 0 || e.ranged || e.relist && e.started() {
			retry = e.backoff(e.pass(ctx))
			changes.done()
		}
		if found.some() {
			looks.ask()
		}
		if found.rest() {
			rest.ask()
		}
		if found.ports {
			portLooks.ask()
		}
		if judge == nil && !e.judgedAt.IsZero() && (e.unjudged.some() || e.judged.some()) {
			judge = time.After(e.judgeIn)
		}
	}
}

// started reports whether something has been applied, in one family at least.
func (e *Engine) started() bool { return !e.untouched[rule.IPv4] || !e.untouched[rule.IPv6] }

// pacer lets something be done after a delay, and then with pauses.
type pacer struct {
	pause, delay time.Duration
	last         time.Time
	due          <-chan time.Time // nil: nobody has asked
}

func (p *pacer) rested() bool { return time.Since(p.last) >= p.pause }

func (p *pacer) ask() {
	if p.due == nil {
		p.due = time.After(max(p.delay, time.Until(p.last.Add(p.pause))))
	}
}

func (p *pacer) done() { p.last, p.due = time.Now(), nil }

// drain takes in the record events that are there already, for one pass to handle together.
func (e *Engine) drain(watcher *fsnotify.Watcher) {
	for {
		select {
		case event := <-watcher.Events:
			e.recordEvent(event)
		default:
			return
		}
	}
}

// backoff says when to try again after an error; at once is never.
func (e *Engine) backoff(err error) <-chan time.Time {
	if err == nil {
		e.retry = 0
		return nil
	}
	e.retry = min(max(2*e.retry, retryFirst), retryMost)
	return time.After(e.retry)
}

// pulse touches the file by which the plugin knows how long an absent policyd has been away.
func (e *Engine) pulse() {
	now := time.Now()
	e.mu.Lock()
	e.beat = now
	e.mu.Unlock()
	path := gate.Heartbeat(e.StateDir)
	err := os.Chtimes(path, now, now)
	if errors.Is(err, os.ErrNotExist) {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err != nil {
		e.Log.Warn("cannot touch the heartbeat file; the plugin's STATUS will count policyd as away", "file", path, "error", err)
	}
}
