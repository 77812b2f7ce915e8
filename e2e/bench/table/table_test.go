package table

import (
	"math"
	"testing"
)

func TestAQuantileLiesBetweenTheTwoNearestValues(t *testing.T) {
	for _, test := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 3, 2}, 0.5, 2.5},
		{[]float64{4, 1, 3, 2}, 0, 1},
		{[]float64{4, 1, 3, 2}, 1, 4},
		{[]float64{10, 20}, 0.99, 19.9},
		{[]float64{7}, 0.99, 7},
	} {
		if got := Quantile(test.values, test.q); math.Abs(got-test.want) > 1e-9 {
			t.Errorf("quantile %g of %v is %g, want %g", test.q, test.values, got, test.want)
		}
	}
	if got := Quantile(nil, 0.5); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %g", got)
	}
}

func TestAQuantileLeavesTheValuesInTheirOrder(t *testing.T) {
	values := []float64{3, 1, 2}
	Quantile(values, 0.5)
	if values[0] != 3 || values[1] != 1 || values[2] != 2 {
		t.Errorf("the values are now %v", values)
	}
}

func TestTheValueIsARatioOnlyWhereSomethingIsBesideAndTheMarkIsNotAbsolute(t *testing.T) {
	ours, theirs := []float64{2, 4, 6}, []float64{8, 8, 8}
	for _, test := range []struct {
		name string
		line Line
		want float64
	}{
		{"ratio of medians", Line{Ours: ours, Theirs: theirs}, 0.5},
		{"ratio of another quantile", Line{Ours: ours, Theirs: theirs, Quantile: 1}, 0.75},
		{"absolute mark", Line{Ours: ours, Theirs: theirs, Mark: NoMoreThan(1)}, 4},
		{"nothing beside", Line{Ours: ours}, 4},
	} {
		if got := test.line.Value(); got != test.want {
			t.Errorf("%s: %g, want %g", test.name, got, test.want)
		}
	}
}

// rounds are n pairs in which both sides suffer from the same disturbance, and ours takes ratio times theirs.
func rounds(n int, ratio float64) (ours, theirs []float64) {
	for i := range n {
		disturbed := 10 + 5*float64(i%7)
		ours, theirs = append(ours, ratio*disturbed), append(theirs, disturbed)
	}
	return ours, theirs
}

func TestTheIntervalHoldsTheValueAndIsTheSameEachTime(t *testing.T) {
	ours, theirs := rounds(40, 0.5)
	for i := range ours {
		ours[i] += float64(i%3) - 1
	}
	line := Line{Row: 1, Ours: ours, Theirs: theirs}
	low, high := line.Interval()
	if value := line.Value(); !(low <= value && value <= high && low < high) {
		t.Errorf("interval %g to %g around %g", low, high, value)
	}
	if again, _ := line.Interval(); again != low {
		t.Errorf("the lower end was %g and is now %g", low, again)
	}
}

func TestWhatDisturbsBothOfARoundDoesNotWidenTheInterval(t *testing.T) {
	ours, theirs := rounds(41, 0.5)
	if low, high := (Line{Ours: ours, Theirs: theirs}).Interval(); math.Abs(low-0.5) > 1e-9 || math.Abs(high-0.5) > 1e-9 {
		t.Errorf("the interval is %g to %g, though every round's ratio is 0.5", low, high)
	}
	if low, high := (Line{Ours: ours, Theirs: theirs[:40]}).Interval(); high-low < 0.05 {
		t.Errorf("of rounds that do not belong together the interval is %g to %g: too narrow", low, high)
	}
}

func TestMoreRoundsMakeTheIntervalNarrower(t *testing.T) {
	width := func(n int) float64 {
		ours, _ := rounds(n, 1)
		low, high := (Line{Ours: ours}).Interval()
		return high - low
	}
	if few, many := width(14), width(1400); many >= few {
		t.Errorf("14 rounds: %g wide, 1400 rounds: %g wide", few, many)
	}
}

func TestTheVerdict(t *testing.T) {
	steady := func(v float64) []float64 { return []float64{v, v, v, v, v} }
	one := steady(1)
	wide := []float64{0.5, 0.55, 0.65, 0.7, 0.7}
	for _, test := range []struct {
		name string
		line Line
		want Verdict
	}{
		{"no mark", Line{Ours: steady(9)}, Print},
		{"below at most", Line{Ours: steady(0.5), Theirs: one, Mark: AtMost(0.6)}, Holds},
		{"at at most", Line{Ours: steady(0.6), Theirs: one, Mark: AtMost(0.6)}, Holds},
		{"above at most", Line{Ours: steady(0.7), Theirs: one, Mark: AtMost(0.6)}, Short},
		{"above at most, and the interval reaches it", Line{Ours: wide, Theirs: one, Mark: AtMost(0.6)}, Within},
		{"above at least", Line{Ours: steady(0.98), Theirs: one, Mark: AtLeast(0.93)}, Holds},
		{"below at least", Line{Ours: steady(0.9), Theirs: one, Mark: AtLeast(0.93)}, Short},
		{"below at least, and the interval reaches it", Line{Ours: wide, Theirs: one, Mark: AtLeast(0.68)}, Within},
		{"absolute", Line{Ours: steady(4), Theirs: one, Mark: NoMoreThan(5)}, Holds},
		{"absolute, above", Line{Ours: steady(6), Theirs: steady(100), Mark: NoMoreThan(5)}, Short},
		{"no kernel write where none is allowed", Line{Ours: steady(0), Mark: NoMoreThan(0)}, Holds},
		{"a mark and no samples", Line{Mark: AtMost(1)}, Short},
		{"no samples beside, and a ratio is asked for", Line{Theirs: one, Mark: AtMost(1)}, Short},
	} {
		if got := test.line.Verdict(); got != test.want {
			low, high := test.line.Interval()
			t.Errorf("%s: %s, want %s (%g, %g to %g)", test.name, got, test.want, test.line.Value(), low, high)
		}
	}
}
