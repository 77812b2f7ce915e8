package verify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/engine"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// walked counts what happened on walks through the engine.
type walked struct {
	Walks, Steps, Restarts, Crashes, Faults, Edits, Looks, Packets int
	Found                                                          string // the first difference, in full; empty for none
}

func (a *walked) add(b walked) {
	a.Walks, a.Steps, a.Restarts, a.Crashes = a.Walks+b.Walks, a.Steps+b.Steps, a.Restarts+b.Restarts, a.Crashes+b.Crashes
	a.Faults, a.Edits, a.Looks, a.Packets = a.Faults+b.Faults, a.Edits+b.Edits, a.Looks+b.Looks, a.Packets+b.Packets
	if a.Found == "" {
		a.Found = b.Found
	}
}

// saboteur breaks the kernel as a mistake in the engine would: at the end of a walk, or before a step of a pass, by its name.
type saboteur struct {
	name string
	end  func(context.Context, *kernel, dice) error
	step func(w *walker, step string) error
}

// walker takes an engine for a walk, in the network namespace of this process.
type walker struct {
	*stage
	*kernel
	walked
	backend iptables.Backend
	dir     string // the state folder
	broken  *saboteur
	log     *tail

	engine *engine.Engine
	feed   *feed
	stop   context.CancelFunc
	ended  chan error

	// Guarded by the stage's lock, for the engine's goroutine uses them too.
	dice     dice
	crashed  bool
	crash    context.CancelFunc // of what waits for the engine
	inForce  bool               // the kernel was brought up to date once
	tampered bool               // somebody else changed the kernel, and it was not seen to be repaired
	// In so many askings of the hook there will be a failure, a crash, and, of those that begin another kind of steps, a look at the
	// kernel; 0 is never.
	lookIn, faultIn, crashIn int
	last                     string // what the hook was asked about last
	found                    string
}

// walkLimit is how long the engine may take to bring the kernel up to date, on a machine under load.
const walkLimit = 60 * time.Second

// takeWalk takes a walk and returns what was counted, and in words what was found.
func takeWalk(backend iptables.Backend, steps []step, broken *saboteur) (walked, error) {
	dir, err := os.MkdirTemp("", "postern-walk")
	if err != nil {
		return walked{}, err
	}
	defer os.RemoveAll(dir)
	k, err := openKernel(backend)
	if err != nil {
		return walked{}, err
	}
	defer k.sets.Close()
	w := &walker{stage: &stage{}, kernel: k, backend: backend, dir: dir, broken: broken, log: &tail{}, dice: throw(0, 0, forSteps)}
	w.Walks = 1
	ctx := context.Background()
	if err := w.clean(ctx); err != nil {
		return w.walked, err
	}
	err = w.walk(ctx, steps)
	if w.Found = w.found; w.Found != "" {
		w.Found += "\nThe engine's log ended:\n" + w.log.String()
	}
	return w.walked, err
}

// walk takes the steps. Whatever is found ends it.
func (w *walker) walk(ctx context.Context, steps []step) error {
	if err := w.start(); err != nil {
		return err
	}
	defer func() { _ = w.halt() }()
	for _, s := range steps {
		if err := w.step(ctx, s); err != nil || w.outcome() != "" {
			return err
		}
		w.Steps++
	}
	w.mu.Lock()
	w.lookIn, w.faultIn, w.crashIn = 0, 0, 0
	w.mu.Unlock()
	if err := w.settle(ctx); err != nil || w.outcome() != "" {
		return err
	}
	if err := w.repaired(ctx); err != nil || w.outcome() != "" {
		return err
	}
	return w.compareWithFresh(ctx)
}

// find notes a difference; the first one counts.
func (w *walker) find(text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.found == "" {
		w.found = text
	}
}

func (w *walker) outcome() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.found
}

// compareWithFresh holds the kernel against what an engine makes of it that begins with the same objects and records, and
// nothing in the kernel.
func (w *walker) compareWithFresh(ctx context.Context) error {
	if err := w.halt(); err != nil {
		return err
	}
	if w.broken != nil && w.broken.end != nil {
		if err := w.broken.end(ctx, w.kernel, w.dice); err != nil && !errors.Is(err, errNothing) {
			return err
		}
	}
	after, err := w.text(ctx)
	if err != nil {
		return err
	}
	if err := dataplane.Cleanup(ctx); err != nil { // what is not ours stays, for both
		return err
	}
	w.mu.Lock()
	w.broken, w.inForce, w.lookIn = nil, false, 0 // there are no rules yet to look at
	w.mu.Unlock()
	if err := w.start(); err != nil {
		return err
	}
	if err := w.settle(ctx); err != nil {
		return err
	}
	fresh, err := w.text(ctx)
	if err == nil && fresh != after {
		w.find("the kernel is not what a fresh start makes of the same objects:\n" + lineDifference(after, fresh))
	}
	return err
}

// start lets an engine begin on the kernel as it is.
func (w *walker) start() error {
	w.feed = newFeed(w.stage)
	c := engine.Config{Source: w.feed, StateDir: w.dir, Node: thisNode, Backend: w.backend, RepairInterval: 2 * time.Second,
		Metrics: metrics.New("walk"), Log: slog.New(slog.NewTextHandler(w.log, nil)), Version: "walk", Fail: w.hook}
	e, err := engine.New(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.engine, w.stop, w.ended = e, cancel, make(chan error, 1)
	go func(ended chan error) { ended <- e.Run(ctx) }(w.ended)
	return nil
}

// halt ends the engine. Halted already, it is none.
func (w *walker) halt() error {
	if w.stop == nil {
		return nil
	}
	w.stop()
	err := <-w.ended
	w.stop = nil
	return err
}

func (w *walker) restart() error {
	if err := w.halt(); err != nil {
		return fmt.Errorf("the engine ended: %w", err)
	}
	w.mu.Lock()
	w.crashed = false
	w.mu.Unlock()
	return w.start()
}

// The errors of the hook.
var (
	errFault   = errors.New("a fault that the walk makes")
	errCrashed = errors.New("the walk has the engine crash here")
)

// hook is asked before each step of the engine that reads or writes the kernel.
func (w *walker) hook(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.crashed {
		return errCrashed
	}
	if w.broken != nil && w.broken.step != nil {
		if err := w.broken.step(w, name); err != nil {
			return err
		}
	}
	other := w.last != name
	if w.last = name; (other || w.dice.chance(15)) && due(&w.lookIn) && w.inForce && !w.tampered && w.found == "" {
		w.lookIn = 1 + w.dice.IntN(8)
		if err := w.look(name); err != nil {
			return err
		}
	}
	if due(&w.crashIn) {
		w.Crashes++
		w.crashed = true
		if w.crash != nil {
			w.crash()
		}
		return errCrashed
	}
	if due(&w.faultIn) {
		w.Faults++
		w.feed.signal() // it is tried again at once
		return errFault
	}
	return nil
}

func due(in *int) bool {
	if *in > 0 {
		*in--
		return *in == 0
	}
	return false
}

// look holds the kernel, as it is before a step of the engine, against what may be let pass.
func (w *walker) look(step string) error {
	w.Looks++
	moments := w.moments()
	for _, f := range rule.Families {
		is, err := w.read(context.Background(), f, rule.Mangle)
		if err != nil {
			return err
		}
		asked, text := leak(is, moments, w.dice)
		if w.Packets += asked; text != "" && w.found == "" {
			w.found = fmt.Sprintf("%s, before step %q: %s\nThe kernel's rules and sets then:\n%s", f, step, text, inFull(is))
		}
	}
	return nil
}

// inFull writes rules of table mangle and sets.
func inFull(s *rule.State) string {
	var b strings.Builder
	c := iptables.Change{Table: rule.Mangle, Replace: slices.SortedFunc(slices.Values(s.Chains[rule.Mangle]),
		func(a, b rule.Chain) int { return strings.Compare(a.Name, b.Name) })}
	b.WriteString(iptables.Render(c))
	for _, set := range s.Sets {
		fmt.Fprintf(&b, "%s %s\n", set.Name, holdSet(set))
	}
	return b.String()
}

// step lets one step happen, with whatever goes wrong besides.
func (w *walker) step(ctx context.Context, s step) error {
	d := throw(s.chance, 0, forSteps)
	if d.chance(25) {
		if err := w.edit(ctx, d); err != nil {
			return err
		}
	}
	restart := d.chance(15)
	if restart && d.chance(2) {
		w.Restarts++
		if err := w.restart(); err != nil {
			return err
		}
		restart = false
	}
	w.mu.Lock()
	w.dice = throw(s.chance, 1, forSteps)
	w.lookIn = 1 + d.IntN(6)
	if d.chance(6) {
		w.faultIn = 1 + d.IntN(12)
	}
	if d.chance(20) {
		w.crashIn = 1 + d.IntN(20)
	}
	w.feed.split = nil
	if d.chance(6) {
		split := throw(s.chance, 2, forSteps)
		w.feed.split = &split
	}
	w.mu.Unlock()
	parts := []func() error{
		func() error { w.announce(s.Changes); return nil },
		func() error { return w.attached(ctx, s.records, d) },
	}
	if d.chance(2) {
		slices.Reverse(parts)
	}
	for _, part := range parts {
		if err := part(); err != nil {
			return err
		}
		if !d.chance(3) {
			if err := w.settle(ctx); err != nil || w.outcome() != "" {
				return err
			}
		}
	}
	if restart { // at any moment of what the step began
		w.Restarts++
		return w.restart()
	}
	return nil
}

// announce has the objects change.
func (w *walker) announce(c object.Changes) {
	w.mu.Lock()
	w.now = w.now.after(step{Changes: c})
	w.mu.Unlock()
	w.feed.signal()
}

// attached writes and removes records, one after the other.
func (w *walker) attached(ctx context.Context, records map[attachment.Key]*attachment.Attachment, d dice) error {
	store := attachment.Open(w.dir)
	for _, key := range sortedKeys(records) {
		a := records[key]
		w.mu.Lock()
		was, alone := w.now.records[key], len(w.stage.records) == 1
		w.now = w.now.after(step{records: map[attachment.Key]*attachment.Attachment{key: a}})
		w.stage.records = append(w.stage.records, w.now.records)
		w.mu.Unlock()
		var err error
		switch {
		case a != nil:
			// Who asks is seen before records that were written before his, of which the stage would have to know.
			if err = store.Put(a); err == nil && alone && d.chance(2) {
				err = w.guard(ctx, a)
			}
		case was != nil:
			err = w.detach(ctx, store, was, d.chance(2))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// guard asks as the plugin's ADD does, if the engine can say yes: whoever is told to be guarded is ready in the kernel.
func (w *walker) guard(ctx context.Context, a *attachment.Attachment) error {
	lawful := slices.ContainsFunc(w.now.locals(), func(l policy.Local) bool {
		return l.Interface == a.HostInterface && l.Ready && slices.Equal(l.Addresses, a.Addresses)
	})
	if !lawful {
		return nil
	}
	within, done := w.patience(ctx)
	defer done()
	if err := w.engine.Guard(within, a); err != nil {
		if !w.hasCrashed() {
			w.find(fmt.Sprintf("record %s: %v", a.Key(), err))
		}
		return nil
	}
	all, err := w.sets.List(rule.SetPrefix)
	for _, address := range a.Addresses {
		entry := rule.Entry{Prefix: single(address), Iface: a.HostInterface}
		ready := slices.ContainsFunc(all, func(s rule.Set) bool {
			return s.Name == rule.ReadySet(rule.FamilyOf(address)) && slices.Contains(s.Entries, entry)
		})
		if !ready && err == nil && !w.suspicious() {
			w.find(fmt.Sprintf("record %s is said to be guarded, and %s is not ready", a.Key(), entry))
		}
	}
	return err
}

// patience ends after a long time, or when the engine crashes.
func (w *walker) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	within, cancel := context.WithTimeout(ctx, walkLimit)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.crash = cancel; w.crashed {
		cancel()
	}
	return within, cancel
}

func (w *walker) hasCrashed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.crashed
}

// suspicious reports whether somebody else may have changed what the kernel holds.
func (w *walker) suspicious() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tampered
}

// detach does what the plugin's DEL does here: it takes the pod out of ready and open sets itself, mostly.
func (w *walker) detach(ctx context.Context, store *attachment.Store, a *attachment.Attachment, unready bool) error {
	lock, err := store.Lock(ctx, attachment.Interface(a.HostInterface))
	if err != nil {
		return err
	}
	defer lock.Release()
	for _, other := range w.now.records {
		unready = unready && other.HostInterface != a.HostInterface // whose sandbox has the link now
	}
	if !unready {
		return store.Delete(a.Key())
	}
	for _, address := range a.Addresses {
		f, e := rule.FamilyOf(address), rule.Entry{Prefix: single(address), Iface: a.HostInterface}
		for _, set := range []string{rule.ReadySet(f), rule.OpenSet(f, rule.Ingress), rule.OpenSet(f, rule.Egress)} {
			if err := gone(w.sets.Del(set, e)); err != nil {
				return err
			}
		}
	}
	return store.Delete(a.Key())
}

// settle waits until what is now is enforced, through crashes.
func (w *walker) settle(ctx context.Context) error {
	for {
		within, done := w.patience(ctx)
		err := w.engine.Settle(within)
		done()
		w.mu.Lock()
		crashed := w.crashed
		if w.crash = nil; err == nil && !crashed {
			w.settled()
			w.inForce = true
		}
		if err != nil && !crashed && w.found == "" {
			w.found = fmt.Sprintf("the engine has not brought the kernel up to date within %v: %v", walkLimit, err)
		}
		w.mu.Unlock()
		if !crashed {
			return w.glance(ctx)
		}
		if err := w.restart(); err != nil {
			return err
		}
	}
}

// wrong tells in words how the kernel differs from what objects and records ask for.
func (w *walker) wrong(ctx context.Context) (string, error) {
	model := policy.Resolve(w.now.input())
	for _, f := range rule.Families {
		if text, err := w.differs(ctx, compile.State(model, f)); err != nil || text != "" {
			return fmt.Sprintf("%s: %s", f, text), err
		}
	}
	return "", nil
}

// glance sees whether what somebody else did has been repaired.
func (w *walker) glance(ctx context.Context) error {
	if !w.suspicious() {
		return nil
	}
	text, err := w.wrong(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tampered = text != ""
	return err
}

// repaired waits until the kernel holds what it should: at once if nobody else was at work on it.
func (w *walker) repaired(ctx context.Context) error {
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		text, err := w.wrong(ctx)
		if err != nil {
			return err
		}
		w.mu.Lock()
		late := !w.tampered || time.Since(begin) > walkLimit
		w.tampered = w.tampered && text != ""
		if text != "" && late && w.found == "" {
			w.found = "the kernel is not what the objects ask for: " + text
		}
		w.mu.Unlock()
		if text == "" || late {
			return nil
		}
	}
}

// edit has somebody else change our part of the kernel.
func (w *walker) edit(ctx context.Context, d dice) error {
	w.mu.Lock()
	w.tampered = true
	w.Edits++
	w.mu.Unlock()
	what, err := w.tamper(ctx, d)
	if err != nil {
		return fmt.Errorf("edit the kernel's state: %s: %w", what, err)
	}
	fmt.Fprintf(w.log, "edit: %s\n", what)
	return nil
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// tail keeps the end of what is written.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const most = 8 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if len(t.text) > 2*most {
		t.text = slices.Clone(t.text[len(t.text)-most:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
