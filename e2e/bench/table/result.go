package table

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Facts are those of the machine and of the programs, without which figures say little.
type Facts struct {
	Date     string `json:"date"` // RFC 3339
	Revision string `json:"revision"`
	Kernel   string `json:"kernel"`
	CPU      string `json:"cpu"`
	CPUs     int    `json:"cpus"`
	Go       string `json:"go"`
	Iptables string `json:"iptables"`
	// Programs are those that were run, by name, with the version of the module that each is from.
	Programs map[string]string `json:"programs"`
	Quick    bool              `json:"quick"`
	Took     string            `json:"took"`
}

// Result is a whole run.
type Result struct {
	Facts  Facts    `json:"facts"`
	Lines  []Judged `json:"lines"`
	Curves []Curve  `json:"curves,omitempty"`
	Failed []string `json:"failed,omitempty"` // benchmarks that broke, and how
}

// Judged is a line with what follows from its samples.
type Judged struct {
	Line      Line
	Value     float64
	Low, High float64
	Verdict   Verdict
}

// Judge sorts the lines by row and computes each one's value, interval and verdict, once.
func Judge(facts Facts, report Report, failed []string) Result {
	r := Result{Facts: facts, Curves: report.Curves, Failed: failed}
	for _, line := range report.Lines {
		j := Judged{Line: line, Value: line.Value()}
		j.Low, j.High = line.Interval()
		j.Verdict = line.verdict(j.Value, j.Low, j.High)
		r.Lines = append(r.Lines, j)
	}
	slices.SortStableFunc(r.Lines, func(a, b Judged) int { return cmp.Compare(a.Line.Row, b.Line.Row) })
	return r
}

// MarshalJSON writes the line's own fields and the computed ones side by side; what no samples give is null.
func (j Judged) MarshalJSON() ([]byte, error) {
	finite := func(v float64) *float64 {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil
		}
		return &v
	}
	return json.Marshal(struct {
		Line
		Value   *float64 `json:"value"`
		Low     *float64 `json:"low"`
		High    *float64 `json:"high"`
		Verdict Verdict  `json:"verdict"`
	}{j.Line, finite(j.Value), finite(j.Low), finite(j.High), j.Verdict})
}

// Short are the names of the lines that fall short.
func (r Result) Short() []string {
	var names []string
	for _, j := range r.Lines {
		if j.Verdict == Short {
			names = append(names, fmt.Sprintf("row %d, %s", j.Line.Row, j.Line.name()))
		}
	}
	return names
}

// Summary counts the verdicts, in words.
func (r Result) Summary() string {
	count := map[Verdict]int{}
	for _, j := range r.Lines {
		count[j.Verdict]++
	}
	return fmt.Sprintf("%d lines: %d hold, %d within noise, %d fall short, %d printed",
		len(r.Lines), count[Holds], count[Within], count[Short], count[Print])
}

// name is what is measured, with the part, the quantile and the backend, where they matter.
func (l Line) name() string { return l.subject() + l.suffix() }

// subject is the name without the backend.
func (l Line) subject() string {
	name := l.What
	if l.Part != "" {
		name += ": " + l.Part
	}
	quantile := fmt.Sprintf("p%g", math.Round(l.quantile()*1000)/10)
	if l.quantile() != 0.5 && !strings.HasSuffix(name, quantile) {
		name += ", " + quantile
	}
	return name
}

func (l Line) suffix() string {
	if l.Backend == "" {
		return ""
	}
	return " (" + l.Backend + ")"
}

// isRatio says that the line's value is a ratio, which has no unit.
func (l Line) isRatio() bool { return len(l.Theirs) > 0 && !l.Mark.Absolute }

// side is the compared quantile of one side's samples, with its unit.
func (l Line) side(samples []float64) string {
	if len(samples) == 0 {
		return ""
	}
	return number(Quantile(samples, l.quantile())) + unit(l.Unit)
}

// figure is a value of the line, with the unit if it has one.
func (l Line) figure(v float64) string {
	if l.isRatio() || math.IsNaN(v) {
		return number(v)
	}
	return number(v) + unit(l.Unit)
}

// interval is where the value lies, in words.
func (j Judged) interval() string {
	if math.IsNaN(j.Low) {
		return ""
	}
	if low, high := number(j.Low), number(j.High); low != high {
		return low + " to " + high
	}
	return number(j.Low)
}

// words say what the mark asks of a line.
func (l Line) words() string {
	say := func(word string, v *float64) string {
		if v == nil {
			return ""
		}
		text := word + " " + strconv.FormatFloat(*v, 'g', -1, 64)
		if !l.isRatio() {
			text += unit(l.Unit)
		}
		return text
	}
	most, least := say("at most", l.Mark.AtMost), say("at least", l.Mark.AtLeast)
	if most != "" && least != "" {
		return least + ", " + most
	}
	return most + least
}

func unit(u string) string {
	if u == "" {
		return ""
	}
	return " " + u
}

// number has three digits that matter, commas between thousands, and says millions where there are many.
func number(v float64) string {
	size := math.Abs(v)
	switch {
	case math.IsNaN(v):
		return "-"
	case math.IsInf(v, 0):
		return "infinite"
	case v == 0:
		return "0"
	case size >= 1e7:
		return number(v/1e6) + " million"
	case size >= 999.5:
		return thousands(fmt.Sprintf("%.0f", v))
	case size >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case size >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case size >= 0.9995:
		return fmt.Sprintf("%.2f", v)
	case size >= 0.09995:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func thousands(digits string) string {
	sign := ""
	if strings.HasPrefix(digits, "-") {
		sign, digits = "-", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}
