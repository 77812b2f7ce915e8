package cni

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// Marks of the rows.
const (
	addBesidePeer       = 0.6
	addBesideFloor      = 2.0
	addPortsBesidePeer  = 0.35
	delBesidePeer       = 0.95
	delPortsBesidePeer  = 0.6
	lastAddBesideFirst  = 1.2
	milliseconds        = "ms"
	mebibyte            = 1 << 20
	chain               = "ptp + host-local v1.9.1"
	chainPorts          = "ptp + host-local + portmap v1.9.1"
	growthPlot          = "ADD, by the number of pods on the node"
	podsLabel, timeAxis = "pods on the node", "ADD, ms"
)

// rows1to4 measures on a node that has all its pods but one.
func (b *bench) rows1to4(ctx context.Context) error {
	if err := b.theirs.fill(ctx, b.size.pods-1); err != nil {
		return err
	}
	// What pods without ports do to iptables is nothing: where only the rows are wanted that have both backends, nft's child has it.
	if b.wants(1, 2) || b.wants(4) && b.node.Backend == "nft" {
		if err := b.withoutPorts(ctx); err != nil {
			return err
		}
	}
	if b.wants(3, 4) {
		return b.withPorts(ctx)
	}
	return nil
}

func (b *bench) withoutPorts(ctx context.Context) error {
	found, err := turns(ctx, b.size.rounds, false, b.ours, b.theirs, b.floor)
	if err != nil {
		return err
	}
	ours, theirs, floor := found[0], found[1], found[2]
	if b.env.Rows[1] {
		b.line(table.Line{Row: 1, What: "ADD of a pod without ports", Beside: chain, Unit: milliseconds,
			Ours: ours.add, Theirs: theirs.add, Mark: table.AtMost(addBesidePeer),
			Explain: fmt.Sprintf("Through libcni, %s, policyd answering, the pod selected by two policies; theirs guards nothing. "+
				"The time that a container runtime waits.", b.onNode())})
	}
	if b.env.Rows[2] {
		b.line(table.Line{Row: 2, What: "ADD of a pod without ports", Beside: "the bare kernel work", Unit: milliseconds,
			Ours: ours.add, Theirs: floor.add, Mark: table.AtMost(addBesideFloor),
			Explain: "The same calls beside one small Go program that makes the same link, addresses, routes, neighbours and " +
				"settings, and one entry in a set, and does nothing else. It is called through libcni too."})
	}
	if b.env.Rows[4] {
		b.line(table.Line{Row: 4, Part: "without ports", What: "DEL of a pod", Beside: chain, Unit: milliseconds,
			Ours: ours.del, Theirs: theirs.del, Mark: table.AtMost(delBesidePeer),
			Explain: fmt.Sprintf("Of the pods of row 1, %s, their sandboxes still there. Most of it the kernel waits until nobody can "+
				"still be using the link.", b.onNode())})
	}
	return nil
}

func (b *bench) withPorts(ctx context.Context) error {
	found, err := turns(ctx, b.size.rounds, true, b.ours, b.theirsPorts)
	if err != nil {
		return err
	}
	ours, theirs := found[0], found[1]
	if b.env.Rows[3] {
		b.line(table.Line{Row: 3, What: "ADD of a pod with two hostPorts", Beside: chainPorts, Unit: milliseconds,
			Ours: ours.add, Theirs: theirs.add, Mark: table.AtMost(addPortsBesidePeer),
			Explain: fmt.Sprintf("As row 1, with a TCP and a UDP port of the node that lead to the pod; %s, none of them with a port. "+
				"Both sides use the iptables of the backend.", b.onNode())})
	}
	if b.env.Rows[4] {
		b.line(table.Line{Row: 4, Part: "with two hostPorts", What: "DEL of a pod", Beside: chainPorts, Unit: milliseconds,
			Ours: ours.del, Theirs: theirs.del, Mark: table.AtMost(delPortsBesidePeer),
			Explain: "Of the pods of row 3. Besides the link, rules go, and the kernel waits for that too."})
	}
	return nil
}

// growth is what ADD takes with more and more pods on the node.
type growth struct {
	levels           []int
	ours, few, floor [][]float64 // a list of values for each level
}

// grown measures ADD for a pod that makes the node have so many.
func (b *bench) grown(ctx context.Context, g *growth, pods int) error {
	found, err := turns(ctx, b.size.adds, false, b.ours, b.few, b.floor)
	if err != nil {
		return err
	}
	ours, few, floor := found[0].add, found[1].add, found[2].add
	g.levels, g.ours, g.few, g.floor = append(g.levels, pods), append(g.ours, ours), append(g.few, few), append(g.floor, floor)
	b.env.Say("ADD number %d: %.2f ms, number %d meanwhile: %.2f ms, the floor %.2f ms", pods,
		table.Quantile(ours, 0.5), b.size.levels[0], table.Quantile(few, 0.5), table.Quantile(floor, 0.5))
	return nil
}

func (b *bench) row5(g *growth) {
	first, last := 0, len(g.levels)-1
	b.line(table.Line{Row: 5, What: fmt.Sprintf("ADD number %d on a node", g.levels[last]),
		Beside: fmt.Sprintf("ADD number %d", g.levels[first]), Unit: milliseconds,
		Ours: g.ours[last], Theirs: g.few[last], Mark: table.AtMost(lastAddBesideFirst),
		Explain: fmt.Sprintf("As row 1; %d pods by turns are that number, added and deleted again. All pods of the node are selected "+
			"by policies. Number %d is measured meanwhile, on another node: the machine itself changes more from one minute to the "+
			"next. The plot has that node, and the floor on a node with nothing else, at each number.", spares, g.levels[first])})
	b.report.Curves = append(b.report.Curves, curve("postern", g.levels, g.ours),
		curve(fmt.Sprintf("postern, number %d meanwhile", g.levels[first]), g.levels, g.few),
		curve("the bare kernel work", g.levels, g.floor))
}

func curve(name string, levels []int, values [][]float64) table.Curve {
	c := table.Curve{Plot: growthPlot, Name: name, XLabel: podsLabel, YLabel: timeAxis}
	for i, level := range levels {
		c.Points = append(c.Points, table.Point{X: float64(level), Y: table.Quantile(values[i], 0.5)})
	}
	return c
}

// starts is row 17.
func (b *bench) starts(ctx context.Context) error {
	var took, size [2][]float64
	programs := [2]string{filepath.Join(b.env.Bin, "postern"), filepath.Join(b.env.Bin, "nothing")}
	for i, program := range programs {
		info, err := os.Stat(program)
		if err != nil {
			return err
		}
		size[i] = []float64{float64(info.Size()) / mebibyte}
	}
	for range warmUp + b.size.starts {
		for i, program := range programs {
			cmd := exec.CommandContext(ctx, program)
			cmd.Env = append(os.Environ(), "CNI_COMMAND=VERSION")
			begin := time.Now()
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("start %s: %w", program, err)
			}
			took[i] = append(took[i], float64(time.Since(begin))/float64(time.Millisecond))
		}
	}
	const nothing = "a Go program that does nothing"
	b.line(table.Line{Row: 17, Part: "start", What: "start of the plugin", Beside: nothing, Unit: milliseconds,
		Ours: took[0][warmUp:], Theirs: took[1][warmUp:],
		Explain: "From the fork to the end of the process: the plugin only says which versions of the specification it knows."})
	b.line(table.Line{Row: 17, Part: "size", What: "the plugin's file", Beside: nothing, Unit: "MiB", Ours: size[0], Theirs: size[1],
		Explain: "Static binaries without symbols, built with the same flags."})
	return nil
}
