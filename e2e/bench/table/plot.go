package table

import (
	"fmt"
	"slices"
	"unicode/utf8"
)

// Places in the plot of all lines.
const (
	plotWidth  = 1000.0
	plotLeft   = 430.0 // where the axis begins; names are left of it
	plotRight  = 780.0 // where it ends; figures are right of it
	laneHeight = 34.0
	nameRunes  = 56 // of the name of a line, for which there is room
	smallRunes = 66 // of smaller writing
)

// Ratios is a plot of every line: its value with its interval, and the side of its mark on which it must lie. Lines that stand by
// themselves are drawn in parts of their mark, below those that are ratios.
func Ratios(r Result) []byte {
	var ratios, figures []lane
	for _, j := range r.Lines {
		l := lane{Judged: j, value: j.Value, low: j.Low, high: j.High, most: j.Line.Mark.AtMost, least: j.Line.Mark.AtLeast}
		switch {
		case !(j.Value > 0):
			continue // nothing of it can be drawn on a logarithmic axis
		case j.Line.isRatio():
			ratios = append(ratios, l)
		case l.most != nil && *l.most > 0:
			figures = append(figures, l.inPartsOf(*l.most))
		case l.least != nil && *l.least > 0:
			figures = append(figures, l.inPartsOf(*l.least))
		}
	}
	d := &drawing{width: plotWidth, height: 64 + panelHeight(ratios) + panelHeight(figures) + 30}
	d.bold(20, 30, 18, "postern beside its peers and its floors")
	d.text(20, 50, 12, left, faint, "dot: what was measured; bar: its 95 % interval; shaded: where it must lie")
	y := d.panel(64, "ratio of ours to what it is beside", ratios)
	y = d.panel(y, "figures by themselves, in parts of their mark", figures)
	for i, fact := range r.Facts.words()[:2] {
		d.text(20, y+float64(i)*14, 10, left, faint, fact)
	}
	return d.svg()
}

// lane is a line's place in the plot.
type lane struct {
	Judged
	value, low, high float64
	most, least      *float64
}

func (l lane) inPartsOf(mark float64) lane {
	part := func(v *float64) *float64 {
		if v == nil {
			return nil
		}
		p := *v / mark
		return &p
	}
	l.value, l.low, l.high, l.most, l.least = l.value/mark, l.low/mark, l.high/mark, part(l.most), part(l.least)
	return l
}

func panelHeight(lanes []lane) float64 {
	if len(lanes) == 0 {
		return 0
	}
	return 56 + laneHeight*float64(len(lanes))
}

// panel draws lanes below y, with an axis, and returns where the next thing may be drawn.
func (d *drawing) panel(y float64, title string, lanes []lane) float64 {
	if len(lanes) == 0 {
		return y
	}
	values := []float64{1}
	for _, l := range lanes {
		values = append(values, l.value, l.low, l.high)
		for _, mark := range []*float64{l.most, l.least} {
			if mark != nil {
				values = append(values, *mark)
			}
		}
	}
	axis := logarithmic(values, plotLeft, plotRight)
	top, bottom := y+26, y+26+laneHeight*float64(len(lanes))
	d.text((plotLeft+plotRight)/2, y+16, 12, middle, ink, title)
	for _, tick := range axis.ticks() {
		colour := grid
		if tick == 1 {
			colour = faint
		}
		d.line(axis.at(tick), top, axis.at(tick), bottom, 1, colour)
		d.text(axis.at(tick), bottom+14, 11, middle, faint, tickLabel(tick))
	}
	for i, l := range lanes {
		d.lane(top+laneHeight*float64(i), axis, l)
	}
	return y + panelHeight(lanes)
}

func (d *drawing) lane(y float64, axis scale, l lane) {
	centre, colour := y+laneHeight/2, l.Verdict.colour()
	d.text(44, centre-2, 12, right, ink, fmt.Sprint(l.Line.Row))
	suffix := l.Line.suffix() // which tells lines apart
	d.text(54, centre-2, 12, left, ink, shorten(l.Line.subject(), nameRunes-len(suffix))+suffix)
	if l.Line.Beside != "" {
		d.text(54, centre+11, 10, left, faint, shorten("beside "+l.Line.Beside, smallRunes))
	}
	from, to := axis.low, axis.high
	if l.least != nil {
		from = *l.least
	}
	if l.most != nil {
		to = *l.most
	}
	if l.least != nil || l.most != nil {
		d.rect(axis.at(from), centre-9, axis.at(to)-axis.at(from), 18, Holds.colour(), 0.12)
	}
	for _, mark := range []*float64{l.most, l.least} {
		if mark != nil {
			d.line(axis.at(*mark), centre-12, axis.at(*mark), centre+12, 2, ink)
		}
	}
	if l.low > 0 && l.high > 0 {
		d.line(axis.at(l.low), centre, axis.at(l.high), centre, 3, colour)
	}
	d.dot(axis.at(l.value), centre, 5, colour)
	d.text(plotRight+14, centre-2, 12, left, colour, l.Line.figure(l.Judged.Value)+"  "+string(l.Verdict))
	if words := l.Line.words(); words != "" {
		d.text(plotRight+14, centre+11, 10, left, faint, "must be "+words)
	}
}

// shorten cuts what would run into the plot.
func shorten(text string, runes int) string {
	if utf8.RuneCountInString(text) <= runes {
		return text
	}
	return string([]rune(text)[:runes-1]) + "…"
}

// Places in a plot of curves.
const (
	growthWidth  = 500.0
	growthHeight = 340.0
	growthLeft   = 70.0
	growthRight  = 20.0
	growthTop    = 36.0
	growthBottom = 50.0
)

// Growth draws the curves, one plot for each title, two beside each other. It returns nil where there are none.
func Growth(r Result) []byte {
	var titles []string
	for _, c := range r.Curves {
		if len(c.Points) > 0 && !slices.Contains(titles, c.Plot) {
			titles = append(titles, c.Plot)
		}
	}
	if len(titles) == 0 {
		return nil
	}
	rows := (len(titles) + 1) / 2
	d := &drawing{width: growthWidth * float64(min(2, len(titles))), height: growthHeight * float64(rows)}
	for i, title := range titles {
		var curves []Curve
		for _, c := range r.Curves {
			if c.Plot == title && len(c.Points) > 0 {
				curves = append(curves, c)
			}
		}
		d.curves(growthWidth*float64(i%2), growthHeight*float64(i/2), title, curves)
	}
	return d.svg()
}

// curves draws one plot, whose corner is at x and y.
func (d *drawing) curves(x, y float64, title string, curves []Curve) {
	var xs, ys []float64
	for _, c := range curves {
		for _, p := range c.Points {
			xs, ys = append(xs, p.X), append(ys, p.Y)
		}
	}
	legend := 16 * float64(len(curves))
	top, bottom := y+growthTop+legend, y+growthHeight-growthBottom
	across := fit(xs, x+growthLeft, x+growthWidth-growthRight)
	up := fit(ys, bottom, top)
	d.bold(x+20, y+24, 14, title)
	for _, tick := range across.ticks() {
		d.line(across.at(tick), top, across.at(tick), bottom, 1, grid)
		d.text(across.at(tick), bottom+15, 10, middle, faint, tickLabel(tick))
	}
	for _, tick := range up.ticks() {
		d.line(across.from, up.at(tick), across.to, up.at(tick), 1, grid)
		d.text(across.from-6, up.at(tick)+4, 10, right, faint, tickLabel(tick))
	}
	d.text((across.from+across.to)/2, bottom+34, 12, middle, ink, curves[0].XLabel)
	d.upward(x+16, (top+bottom)/2, 12, curves[0].YLabel)
	for i, c := range curves {
		colour := palette[i%len(palette)]
		var points [][2]float64
		for _, p := range c.Points {
			at := [2]float64{across.at(p.X), up.at(p.Y)}
			points = append(points, at)
			d.dot(at[0], at[1], 3.5, colour)
		}
		d.path(points, colour)
		d.dot(x+growthLeft+6, y+growthTop+16*float64(i)-1, 4, colour)
		d.text(x+growthLeft+16, y+growthTop+16*float64(i)+3, 11, left, ink, c.Name)
	}
}
