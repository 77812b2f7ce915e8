package control

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/rule"
)

// whole is everything of ours in the kernel.
type whole struct {
	tables  saved
	sets    []rule.Set
	version [2]uint64
}

func (c *cluster) whole(ctx context.Context) (w whole, err error) {
	kernel, err := openTables(c.backend)
	if err != nil {
		return w, err
	}
	defer kernel.close()
	list, err := ipset.Open()
	if err != nil {
		return w, err
	}
	defer list.Close()
	if w.tables, err = saveTables(ctx, c.backend); err != nil {
		return w, err
	}
	if w.sets, err = list.List(rule.SetPrefix); err != nil {
		return w, err
	}
	w.version, err = kernel.version()
	return w, err
}

// starts is row 8: policyd's start with nothing in the kernel, and what it leaves there restored by itself.
func (c *cluster) starts(ctx context.Context, e effort) error {
	if err := c.quiet(ctx); err != nil {
		return err
	}
	result, err := c.whole(ctx)
	if err != nil {
		return err
	}
	var ours, theirs, reading []float64
	var entries int
	for _, s := range result.sets {
		entries += len(s.Entries)
	}
	for range e.starts {
		if err := c.empty(ctx); err != nil {
			return err
		}
		took, err := c.start(ctx)
		if err != nil {
			return err
		}
		if err := c.likeBefore(ctx, result); err != nil {
			return err
		}
		if err := c.empty(ctx); err != nil {
			return err
		}
		bare, err := c.writeAlone(ctx, result)
		if err != nil {
			return err
		}
		read, err := c.readAlone(ctx)
		if err != nil {
			return err
		}
		ours, theirs = append(ours, milliseconds(took)), append(theirs, milliseconds(bare))
		reading = append(reading, milliseconds(read))
	}
	rules := strings.Count(result.tables[0]+result.tables[1], "\n-A ")
	c.line(e, table.Line{Row: 8, What: "start of policyd, cold kernel, until everything is enforced", Unit: "ms", Ours: ours,
		Theirs: theirs, Beside: "one restore of the whole result plus the set fills", Mark: table.AtMost(3),
		Explain: fmt.Sprintf("From the start of the process to /readyz saying so, reading everything from the API server included, "+
			"beside %d sets made and filled with %d entries over one netlink socket (many entries a message) and %d rules restored, "+
			"one program for each family.", len(result.sets), entries, rules)})
	c.line(e, table.Line{Row: 8, Part: "reading", What: "of that: the objects by themselves", Unit: "ms", Ours: reading,
		Explain: "The same lists, all at once, by client-go in protobuf, from the API server's cache, until the last is decoded."})
	const plot = "Start of policyd with a cold kernel"
	c.point(e, plot, "policyd, "+c.backend, "ms", table.Quantile(ours, 0.5))
	c.point(e, plot, "restore and set fills, "+c.backend, "ms", table.Quantile(theirs, 0.5))
	c.point(e, plot, "reading the objects by itself", "ms", table.Quantile(reading, 0.5))
	if err := c.empty(ctx); err != nil {
		return err
	}
	if c.short(8) {
		if err := c.profileStart(ctx); err != nil {
			return err
		}
		return nil
	}
	_, err = c.start(ctx)
	return err
}

// likeBefore returns an error unless the kernel holds what it held: a start that left something out would be no measure.
func (c *cluster) likeBefore(ctx context.Context, want whole) error {
	is, err := c.whole(ctx)
	if err != nil {
		return err
	}
	if n := difference(want, is); n > 0 {
		return fmt.Errorf("after a start with a cold kernel, %d lines and entries differ from what was there before", n)
	}
	return nil
}

// writeAlone writes the whole result into an empty kernel.
func (c *cluster) writeAlone(ctx context.Context, result whole) (time.Duration, error) {
	list, err := ipset.Open()
	if err != nil {
		return 0, err
	}
	defer list.Close()
	begin := time.Now()
	for _, s := range result.sets {
		if err := list.Create(s, len(s.Entries)); err != nil {
			return 0, err
		}
		if err := list.Add(s.Name, s.Entries...); err != nil {
			return 0, err
		}
	}
	err = restoreTables(ctx, c.backend, result.tables)
	return time.Since(begin), err
}

// readAlone lists what policyd lists.
func (c *cluster) readAlone(ctx context.Context) (time.Duration, error) {
	cached := metav1.ListOptions{ResourceVersion: "0"}
	client := c.server.Client
	lists := []func() error{
		func() error { _, err := client.CoreV1().Pods("").List(ctx, cached); return err },
		func() error { _, err := client.CoreV1().Namespaces().List(ctx, cached); return err },
		func() error { _, err := client.CoreV1().Nodes().List(ctx, cached); return err },
		func() error { _, err := client.NetworkingV1().NetworkPolicies("").List(ctx, cached); return err },
	}
	begin := time.Now()
	err := apiserver.Each(ctx, 0, len(lists), len(lists), func(_ context.Context, i int) error { return lists[i]() })
	return time.Since(begin), err
}

// restarts is row 9: policyd ends and starts again while nothing has changed.
func (c *cluster) restarts(ctx context.Context, e effort) error {
	if !e.marked {
		return nil
	}
	var writes []float64
	for range e.restarts {
		if err := c.quiet(ctx); err != nil {
			return err
		}
		before, err := c.whole(ctx)
		if err != nil {
			return err
		}
		if err := c.stop(); err != nil {
			return err
		}
		if _, err := c.start(ctx); err != nil {
			return err
		}
		if err := c.policyd.Settle(ctx); err != nil {
			return err
		}
		after, err := c.whole(ctx)
		if err != nil {
			return err
		}
		own, err := c.written(ctx)
		if err != nil {
			return err
		}
		commits := after.version[0] - before.version[0]
		if c.backend != "nft" && after.version != before.version {
			commits = 1
		}
		writes = append(writes, own+float64(commits)+float64(difference(before, after)))
	}
	c.line(e, table.Line{Row: 9, What: "kernel writes of a restart with a correct kernel", Unit: "writes", Ours: writes,
		Mark: table.NoMoreThan(0), Explain: "Restores and set messages that policyd counts itself, commits that the kernel counts " +
			"(nft's generation), and lines and entries that differ from before."})
	return nil
}

// written is the number of writes that policyd counts.
func (c *cluster) written(ctx context.Context) (float64, error) {
	page, err := c.get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	var sum float64
	for _, name := range []string{"postern_iptables_restores_total", "postern_ipset_messages_total"} {
		value := math.NaN()
		for line := range strings.Lines(string(page)) {
			if text, is := strings.CutPrefix(line, name+" "); is {
				if value, err = strconv.ParseFloat(strings.TrimSpace(text), 64); err != nil {
					return 0, err
				}
			}
		}
		if math.IsNaN(value) {
			return 0, errors.New("policyd has no metric " + name)
		}
		sum += value
	}
	return sum, nil
}

// difference is the number of rules, chains and entries that only one of two states has.
func difference(a, b whole) (n int) {
	lines := func(w whole) map[string]int {
		found := map[string]int{}
		for i, text := range w.tables {
			for line := range strings.Lines(text) {
				if chain, _, is := strings.Cut(line, " ["); is && strings.HasPrefix(line, ":") {
					line = chain // without its counters
				}
				if !strings.HasPrefix(line, "#") { // when it was saved
					found[families[i]+line]++
				}
			}
		}
		for _, s := range w.sets {
			found["set "+s.Name] = 1
			for _, e := range s.Entries {
				found[s.Name+" "+e.String()] = 1
			}
		}
		return found
	}
	x, y := lines(a), lines(b)
	for line, count := range x {
		if y[line] != count {
			n++
		}
		delete(y, line)
	}
	return n + len(y)
}

// short reports whether a line of a row misses its mark.
func (c *cluster) short(row int) bool {
	return slices.ContainsFunc(c.report.Lines, func(l table.Line) bool { return l.Row == row && l.Verdict() == table.Short })
}
