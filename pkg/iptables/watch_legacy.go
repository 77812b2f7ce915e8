package iptables

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-cni/postern/pkg/rule"
)

// PollInterval is how often the figures of legacy tables are looked at: a few µs of work each time.
const PollInterval = 100 * time.Millisecond

// legacyWatch compares the figures of tables (see [figures]) with the last known ones.
//
// A restore of ours changes them too, and the kernel says nothing of who did it; somebody who waited for the xtables lock may
// even commit between our commit and our next look. So while a restore of ours runs nobody else looks, and after it the number
// of rules in each chain must be the one that its text makes of the number before: what differs is somebody else's work.
type legacyWatch struct {
	report func(...Notice)
	kernel map[rule.Family]*legacyFamily
}

type legacyFamily struct {
	family rule.Family
	report func(...Notice)

	mu    sync.Mutex // held during a restore of ours
	x     *xtables   // nil once closed
	known map[rule.Table]figures
	// rules are by chain what the last look into a table found, as long as its figures stay: to read a large one takes
	// milliseconds.
	rules map[rule.Table]map[string]int
}

func watchLegacy(report func(...Notice)) (source, error) {
	l := &legacyWatch{report: report, kernel: map[rule.Family]*legacyFamily{}}
	for _, f := range rule.Families {
		x, err := openXtables(f)
		if err != nil {
			l.close()
			return nil, err
		}
		l.kernel[f] = &legacyFamily{family: f, report: report, x: x, known: map[rule.Table]figures{},
			rules: map[rule.Table]map[string]int{}}
		if err := l.kernel[f].poll(); err != nil {
			l.close()
			return nil, err
		}
	}
	return l, nil
}

func (l *legacyWatch) close() {
	for _, f := range l.kernel {
		f.mu.Lock()
		f.x.close()
		f.x = nil
		f.mu.Unlock()
	}
}

func (l *legacyWatch) run(ctx context.Context) error {
	ticker := time.NewTicker(PollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for _, f := range rule.Families {
			if err := l.kernel[f].lookAgain(); err != nil {
				return err
			}
		}
	}
}

// lookAgain polls, but does not wait for a restore of ours, which looks before and after itself.
func (f *legacyFamily) lookAgain() error {
	if !f.mu.TryLock() {
		return nil
	}
	defer f.mu.Unlock()
	if f.x == nil {
		return nil
	}
	return f.poll()
}

// poll reports the tables whose figures are others than the known ones. A table that was not there held nothing of ours.
func (f *legacyFamily) poll() error {
	now, err := f.x.all()
	if err != nil {
		return err
	}
	for _, table := range watched {
		before, was := f.known[table]
		after, is := now[table]
		switch {
		case was && !is:
			f.changed(table, "is gone")
		case was && before != after:
			f.changed(table, fmt.Sprintf("was changed: it has %d entries of %d bytes, not %d of %d",
				after.entries(), after.size(), before.entries(), before.size()))
		}
	}
	f.known = now
	return nil
}

func (f *legacyFamily) changed(table rule.Table, what string) {
	delete(f.rules, table)
	f.report(Notice{f.family, table, fmt.Sprintf("table %s (%s) %s", table, f.family, what)})
}

func (l *legacyWatch) begin(family rule.Family, text string) write {
	f := l.kernel[family]
	f.mu.Lock()
	w := &legacyWrite{f: f, text: text, before: map[rule.Table]map[string]int{}}
	if f.x == nil || f.poll() != nil {
		return w // it ends with a look at what differs, whoever did it
	}
	for table := range sections(text) {
		if chains, err := f.count(table); err == nil {
			w.before[table] = chains
		}
	}
	return w
}

// count returns how many rules each chain has, none for a table that is not there: the restore makes it.
func (f *legacyFamily) count(table rule.Table) (map[string]int, error) {
	if _, there := f.known[table]; !there {
		return map[string]int{}, nil
	}
	if rules, fresh := f.rules[table]; fresh {
		return rules, nil
	}
	return f.x.chains(table)
}

// legacyWrite is a restore of ours; it holds the family's lock.
type legacyWrite struct {
	f      *legacyFamily
	text   string
	before map[rule.Table]map[string]int // the number of rules by chain
}

func (w *legacyWrite) started(int) {}

func (w *legacyWrite) ended(ok bool) {
	f := w.f
	defer f.mu.Unlock()
	if f.x == nil {
		return
	}
	if ok {
		for table, lines := range sections(w.text) {
			w.verify(table, lines)
		}
	}
	_ = f.poll() // an error stays, for run to return
}

// verify takes a table's new figures as known if its chains have as many rules as they must.
func (w *legacyWrite) verify(table rule.Table, lines []string) {
	f, before := w.f, w.before[table]
	if before == nil {
		return
	}
	figures, err := f.x.figures(table)
	if err != nil {
		return
	}
	after, err := f.x.chains(table)
	if err != nil {
		return
	}
	f.known[table], f.rules[table] = figures, after
	if differ := differing(expected(before, lines), after); len(differ) > 0 {
		f.changed(table, "was changed while we wrote to it: "+strings.Join(differ, ", "))
	}
}

// sections returns the lines of each table of a restore's text.
func sections(text string) map[rule.Table][]string {
	out := map[rule.Table][]string{}
	var table rule.Table
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, is := strings.CutPrefix(line, "*"); is {
			table = rule.Table(name)
			continue
		}
		out[table] = append(out[table], line)
	}
	return out
}

// expected returns how many rules chains have after a restore, as [Render] writes it; before is how many they had.
func expected(before map[string]int, lines []string) map[string]int {
	after := maps.Clone(before)
	for _, line := range lines {
		verb, rest, _ := strings.Cut(line, " ")
		chain, _, _ := strings.Cut(rest, " ")
		switch {
		case strings.HasPrefix(verb, ":"):
			after[verb[1:]] = 0
		case verb == "-A" || verb == "-I":
			after[chain]++
		case verb == "-D":
			after[chain]--
		case verb == "-X":
			delete(after, chain)
		}
	}
	return after
}

// differing names the chains that are not as expected; a chain that is not there counts as one without rules where the other
// has none either, for the restore may have made the table.
func differing(want, got map[string]int) (differ []string) {
	names := maps.Clone(want)
	maps.Copy(names, got)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if want[name] != got[name] {
			differ = append(differ, fmt.Sprintf("chain %s has %d rules, not %d", name, got[name], want[name]))
		}
	}
	return differ
}
