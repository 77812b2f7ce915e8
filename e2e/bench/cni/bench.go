package cni

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
)

// Bench measures rows 1 to 5 and 17.
func Bench() table.Bench {
	measure := func(ctx context.Context, env table.Env) (table.Report, error) {
		return run(ctx, env, sizeOf(env.Quick))
	}
	return table.Bench{Name: "cni", Rows: []int{1, 2, 3, 4, 5, 17}, Run: measure}
}

// size of a run.
type size struct {
	pods   int   // on the node, for rows 1 to 4, with the one that is measured
	rounds int   // of rows 1 to 4
	levels []int // the pods on the node, with the one that is measured, for row 5; it compares the last with the first
	adds   int   // at each level
	starts int   // of a program, for row 17
}

func sizeOf(quick bool) size {
	if quick {
		return size{pods: 110, rounds: 12, levels: []int{10, 1000}, adds: 12, starts: 50}
	}
	return size{pods: 110, rounds: 60, levels: []int{10, 110, 250, 500, 1000}, adds: 30, starts: 500}
}

// bench is a run under way.
type bench struct {
	env  table.Env
	size size

	node                *world.Node
	policyds            []*world.Policyd
	ours, theirs, floor *side
	theirsPorts         *side // theirs with a plugin more
	few                 *side // ours with few pods, whatever the other one has
	report              table.Report
}

func run(ctx context.Context, env table.Env, s size) (report table.Report, err error) {
	b := &bench{env: env, size: s}
	if env.Rows[17] {
		if err := b.starts(ctx); err != nil {
			return b.report, err
		}
	}
	if !b.wants(1, 2, 3, 4, 5) {
		return b.report, nil
	}
	if err := b.build(ctx); err != nil {
		return b.report, err
	}
	err = b.climb(ctx)
	for _, d := range b.policyds {
		err = errors.Join(err, d.Stop())
	}
	return b.report, err
}

func (b *bench) wants(rows ...int) bool {
	for _, row := range rows {
		if b.env.Rows[row] {
			return true
		}
	}
	return false
}

// climb lets the node have more and more pods, and measures on the way what is to be measured with as many as there are.
func (b *bench) climb(ctx context.Context) error {
	growth := &growth{}
	for _, level := range b.stops() {
		others := level - 1
		b.env.Say("%d pods on the node", others)
		if err := b.ours.fill(ctx, others); err != nil {
			return err
		}
		if b.few != nil {
			if err := b.few.fill(ctx, b.size.levels[0]-1); err != nil {
				return err
			}
		}
		for _, d := range b.policyds {
			if err := d.Settle(ctx); err != nil {
				return err
			}
		}
		if level == b.size.pods && b.wants(1, 2, 3, 4) {
			if err := b.rows1to4(ctx); err != nil {
				return err
			}
		}
		if b.wants(5) && slices.Contains(b.size.levels, level) {
			if err := b.grown(ctx, growth, level); err != nil {
				return err
			}
		}
	}
	if b.wants(5) {
		b.row5(growth)
	}
	if b.few != nil {
		if err := b.few.empty(ctx); err != nil {
			return err
		}
	}
	return b.ours.empty(ctx)
}

// stops are the numbers of pods at which something is measured, in order.
func (b *bench) stops() (stops []int) {
	if b.wants(1, 2, 3, 4) {
		stops = append(stops, b.size.pods)
	}
	if b.wants(5) {
		stops = append(stops, b.size.levels...)
	}
	slices.Sort(stops)
	return slices.Compact(stops)
}

// line appends a line of the table.
func (b *bench) line(l table.Line) {
	if l.Row == 3 || l.Row == 4 {
		l.Backend = b.node.Backend
	}
	b.report.Lines = append(b.report.Lines, l)
	b.env.Say("row %d %s: %.2f %s, beside %.2f: %.2f", l.Row, l.Part, table.Quantile(l.Ours, 0.5), l.Unit,
		table.Quantile(l.Theirs, 0.5), l.Value())
}

// onNode says how many pods there are.
func (b *bench) onNode() string { return fmt.Sprintf("%d pods on the node", b.size.pods) }
