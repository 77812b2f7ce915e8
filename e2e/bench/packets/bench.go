package packets

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
)

// The marks, all of rates.
const (
	connectMark = 0.93
	growthMark  = 0.97
	streamMark  = 0.98
)

// Bench measures rows 13 to 15.
func Bench() table.Bench {
	measure := func(ctx context.Context, env table.Env) (table.Report, error) {
		return run(ctx, env, sizeOf(env.Quick))
	}
	return table.Bench{Name: "packets", Rows: []int{13, 14, 15}, Run: measure}
}

// size of a run.
type size struct {
	few, pods, many int // on the guarded nodes; pods are on the bare one too
	rounds          int
	load            load
}

func sizeOf(quick bool) size {
	if quick {
		return size{few: 10, pods: 250, many: 250, rounds: 40, load: fullLoad}
	}
	return size{few: 10, pods: 250, many: 1000, rounds: 100, load: fullLoad}
}

// bench is a run under way.
type bench struct {
	env    table.Env
	size   size
	sides  []*side
	report table.Report
}

func run(ctx context.Context, env table.Env, s size) (table.Report, error) {
	b := &bench{env: env, size: s}
	err := b.build(ctx)
	if err == nil {
		err = b.turns(ctx)
	}
	if err == nil {
		b.lines()
	}
	return b.report, errors.Join(err, b.end(ctx))
}

// side with so many pods that are guarded or not; nil if no row that is wanted has one.
func (b *bench) side(pods int, guarded bool) *side {
	for _, s := range b.sides {
		if s.pods == pods && s.guarded == guarded {
			return s
		}
	}
	return nil
}

// build makes the sides that are wanted, each with the loads that are measured there.
func (b *bench) build(ctx context.Context) error {
	node, err := world.New(ctx, b.env, b.env.Backends[0])
	if err != nil {
		return err
	}
	for _, want := range []struct {
		row, pods int
		guarded   bool
		kinds     []string
	}{
		{13, b.size.pods, true, []string{connections}}, {13, b.size.pods, false, []string{connections}},
		{14, b.size.many, true, []string{connections}}, {14, b.size.few, true, []string{connections}},
		{15, b.size.pods, true, []string{large, small}}, {15, b.size.pods, false, []string{large, small}},
	} {
		if !b.env.Rows[want.row] {
			continue
		}
		s := b.side(want.pods, want.guarded)
		if s == nil {
			b.env.Say("%d pods, guarded: %t", want.pods, want.guarded)
			if s, err = newSide(ctx, node, want.pods, want.guarded); err != nil {
				return err
			}
			b.sides = append(b.sides, s)
		}
		for _, kind := range want.kinds {
			s.rates[kind] = []float64{}
		}
	}
	return nil
}

// turns measures round after round: a load on one side after the other, and then the next load.
func (b *bench) turns(ctx context.Context) error {
	sides := slices.Clone(b.sides)
	for round := range warmUp + b.size.rounds {
		if round%100 == 0 {
			b.env.Say("round %d of %d", round, warmUp+b.size.rounds)
		}
		for _, kind := range []string{connections, large, small} {
			for _, s := range sides {
				if s.rates[kind] == nil {
					continue
				}
				rate, err := s.measure(kind, s.pairs[round%len(s.pairs)], b.size.load)
				if err != nil {
					return fmt.Errorf("%s, %d pods, guarded %t: %w", kind, s.pods, s.guarded, err)
				}
				if round >= warmUp {
					s.rates[kind] = append(s.rates[kind], rate)
				}
			}
		}
		slices.Reverse(sides) // who is first is last the next time
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// warmUp is how many rounds come before those that count.
const warmUp = 3

func (b *bench) lines() {
	const bare = "the same pods with no rules at all (conntrack on)"
	guarded, unguarded := b.side(b.size.pods, true), b.side(b.size.pods, false)
	if b.env.Rows[13] {
		b.line(table.Line{Row: 13, What: "new TCP connections between two pods", Beside: bare, Unit: "a second",
			Ours: guarded.rates[connections], Theirs: unguarded.rates[connections], Mark: table.AtLeast(connectMark),
			Explain: fmt.Sprintf("%d pods on either node. On ours all are isolated, with %d rules each for ingress and for egress, of "+
				"which the last one lets the connection pass. Opened, accepted and aborted one after the other, by one thread on one "+
				"processor. A round is %d of them on each side.", b.size.pods, rules, b.size.load.connections)})
	}
	if b.env.Rows[14] {
		many, few := b.side(b.size.many, true), b.side(b.size.few, true)
		what := fmt.Sprintf("the same with %d pods on the node", b.size.many)
		explain := "As row 13, on nodes with so many pods, all of them isolated with as many rules."
		if b.size.many < 1000 {
			explain += " A full run has 1,000."
		}
		b.line(table.Line{Row: 14, What: what, Beside: fmt.Sprintf("row 13 with %d pods", b.size.few), Unit: "a second",
			Ours: many.rates[connections], Theirs: few.rates[connections], Mark: table.AtLeast(growthMark), Explain: explain})
	}
	if b.env.Rows[15] {
		for _, part := range []struct{ kind, unit, explain string }{
			{large, "GB/s", fmt.Sprintf("TCP, %d MiB a round in bursts of %d KiB, which the kernel carries in packets as large as they "+
				"may be.", b.size.load.bursts*burst>>20, burst>>10)},
			{small, "packets/s", fmt.Sprintf("UDP with %d bytes in each packet, one way, %d packets a round: the whole way from one "+
				"socket to the other.", smallPacket, b.size.load.packets)},
		} {
			b.line(table.Line{Row: 15, Part: part.kind, What: "one established stream", Beside: bare, Unit: part.unit,
				Ours: guarded.rates[part.kind], Theirs: unguarded.rates[part.kind], Mark: table.AtLeast(streamMark),
				Explain: part.explain + " Of the nodes of row 13, both ends on one thread."})
		}
	}
}

func (b *bench) line(l table.Line) {
	if l.Row != 15 {
		l.Backend = b.env.Backends[0]
	}
	b.report.Lines = append(b.report.Lines, l)
	low, high := l.Interval()
	b.env.Say("row %d %s: %.6g %s beside %.6g: %.4f (%.4f to %.4f)", l.Row, l.Part, table.Quantile(l.Ours, 0.5), l.Unit,
		table.Quantile(l.Theirs, 0.5), l.Value(), low, high)
}

// end takes all sides away, and waits until the kernel has done so: it takes its time for many links, and that must not fall on
// what is measured next.
func (b *bench) end(ctx context.Context) (err error) {
	for _, s := range b.sides {
		err = errors.Join(err, s.end(ctx))
	}
	return err
}
