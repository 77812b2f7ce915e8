package table

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
)

// Line is one line of the table.
type Line struct {
	// Row is the row's number, and Part says which part of it this is ("two hostPorts"), if it has several; Backend is the iptables
	// backend where that matters: nft, legacy, or empty.
	Row     int    `json:"row"`
	Part    string `json:"part,omitempty"`
	Backend string `json:"backend,omitempty"`
	// What is measured, and what it is measured beside; Beside is empty for a figure that stands by itself.
	What   string `json:"what"`
	Beside string `json:"beside,omitempty"`
	// Ours and Theirs are in Unit, one value a round; of the same round they were measured next to each other. Theirs is empty
	// where nothing is beside it.
	Unit   string    `json:"unit"`
	Ours   []float64 `json:"ours"`
	Theirs []float64 `json:"theirs,omitempty"`
	// Quantile of Ours and of Theirs that is compared, 0.5 if it is not set.
	Quantile float64 `json:"quantile,omitempty"`
	Mark     Mark    `json:"mark"`
	// Explain says in a sentence how it was measured and what the figure means.
	Explain string `json:"explain"`
}

// Mark is what must hold of a line's value. The zero value asks for nothing: the line is printed.
type Mark struct {
	AtMost  *float64 `json:"atMost,omitempty"`
	AtLeast *float64 `json:"atLeast,omitempty"`
	// Absolute says that the mark is one for Ours, in Unit, and not for the ratio of Ours to Theirs.
	Absolute bool `json:"absolute,omitempty"`
}

// AtMost and AtLeast are marks for the ratio.
func AtMost(v float64) Mark  { return Mark{AtMost: &v} }
func AtLeast(v float64) Mark { return Mark{AtLeast: &v} }

// NoMoreThan is a mark for the figure itself, in the line's unit.
func NoMoreThan(v float64) Mark { return Mark{AtMost: &v, Absolute: true} }

// Curve is one line of a plot.
type Curve struct {
	// Plot is the title of the plot that it belongs to; curves with the same title share one.
	Plot   string  `json:"plot"`
	Name   string  `json:"name"`
	XLabel string  `json:"xLabel"`
	YLabel string  `json:"yLabel"`
	Points []Point `json:"points"`
}

// Point of a [Curve].
type Point struct{ X, Y float64 }

// Env is what a benchmark works with.
type Env struct {
	// Quick asks for few rounds and small clusters: all rows together have three minutes.
	Quick    bool
	Rows     map[int]bool // the rows that are wanted
	Backends []string     // of iptables
	// Bin is the folder of postern and policyd; Dir the one that a benchmark may build and write in.
	Bin, Dir string
	Say      func(format string, args ...any) // a progress line
}

// Report is what a benchmark returns.
type Report struct {
	Lines  []Line  `json:"lines"`
	Curves []Curve `json:"curves,omitempty"`
}

// Bench measures some of the rows.
type Bench struct {
	Name string
	Rows []int
	Run  func(ctx context.Context, env Env) (Report, error)
}

// Value is what the mark is held against: the ratio of ours to theirs, or ours where nothing is beside it or the mark is
// absolute.
func (l Line) Value() float64 { return l.value(l.Ours, l.Theirs) }

func (l Line) value(ours, theirs []float64) float64 {
	q := l.quantile()
	if len(theirs) == 0 || l.Mark.Absolute {
		return Quantile(ours, q)
	}
	return Quantile(ours, q) / Quantile(theirs, q)
}

func (l Line) quantile() float64 {
	if l.Quantile == 0 {
		return 0.5
	}
	return l.Quantile
}

// Interval is where the value lies with a probability of 95 %: a bootstrap over the rounds, with a fixed seed, so that the same
// figures give the same interval.
func (l Line) Interval() (low, high float64) {
	const draws = 2000
	r := rand.New(rand.NewPCG(1, uint64(l.Row)))
	values := make([]float64, draws)
	ours, theirs := make([]float64, len(l.Ours)), make([]float64, len(l.Theirs))
	for i := range values {
		for j := range ours {
			k := r.IntN(len(l.Ours))
			ours[j] = l.Ours[k]
			if len(l.Theirs) == len(l.Ours) {
				theirs[j] = l.Theirs[k] // the same round: what disturbed both stays together
			}
		}
		if len(l.Theirs) != len(l.Ours) {
			for j := range theirs {
				theirs[j] = l.Theirs[r.IntN(len(l.Theirs))]
			}
		}
		values[i] = l.value(ours, theirs)
	}
	return Quantile(values, 0.025), Quantile(values, 0.975)
}

// Verdict of a line.
type Verdict string

// Verdicts: a line without a mark is Printed; one whose value misses the mark while its interval reaches it is Within noise.
const (
	Holds  Verdict = "holds"
	Within Verdict = "within noise"
	Short  Verdict = "FALLS SHORT"
	Print  Verdict = "printed"
)

// Verdict says whether the mark is met.
func (l Line) Verdict() Verdict {
	low, high := l.Interval()
	return l.verdict(l.Value(), low, high)
}

func (l Line) verdict(v, low, high float64) Verdict {
	switch {
	case l.Mark.AtMost == nil && l.Mark.AtLeast == nil:
		return Print
	case math.IsNaN(v):
		return Short
	case (l.Mark.AtMost == nil || v <= *l.Mark.AtMost) && (l.Mark.AtLeast == nil || v >= *l.Mark.AtLeast):
		return Holds
	case (l.Mark.AtMost == nil || low <= *l.Mark.AtMost) && (l.Mark.AtLeast == nil || high >= *l.Mark.AtLeast):
		return Within
	}
	return Short
}

// Quantile of values, between the two nearest; NaN of none.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}
