package table

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// drawing is an SVG picture, of what these plots need and no more.
type drawing struct {
	width, height float64
	body          strings.Builder
}

// The colours of words, lines and verdicts.
const (
	ink   = "#1f2328"
	faint = "#656d76"
	grid  = "#d8dee4"
	blue  = "#0969da"
)

// palette is that of curves.
var palette = []string{blue, "#cf222e", "#1a7f37", "#8250df", "#bc4c00", "#57606a"}

func (v Verdict) colour() string {
	switch v {
	case Holds:
		return "#1a7f37"
	case Within:
		return "#bf8700"
	case Short:
		return "#cf222e"
	}
	return blue
}

// Anchors of text: what lies at the given place.
const (
	left   = "start"
	middle = "middle"
	right  = "end"
)

// put adds an element.
func (d *drawing) put(format string, args ...any) { fmt.Fprintf(&d.body, format+"\n", args...) }

func (d *drawing) text(x, y, size float64, anchor, colour, text string) {
	d.put(`<text x="%.1f" y="%.1f" font-size="%g" text-anchor="%s" fill="%s">%s</text>`, x, y, size, anchor, colour, escape(text))
}

func (d *drawing) bold(x, y, size float64, text string) {
	d.put(`<text x="%.1f" y="%.1f" font-size="%g" font-weight="600" fill="%s">%s</text>`, x, y, size, ink, escape(text))
}

// upward is text that reads from below.
func (d *drawing) upward(x, y, size float64, text string) {
	d.put(`<text transform="translate(%.1f %.1f) rotate(-90)" font-size="%g" text-anchor="middle" fill="%s">%s</text>`,
		x, y, size, ink, escape(text))
}

func (d *drawing) line(x1, y1, x2, y2, width float64, colour string) {
	d.put(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%g"/>`, x1, y1, x2, y2, colour, width)
}

func (d *drawing) rect(x, y, w, h float64, colour string, opacity float64) {
	d.put(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s" fill-opacity="%g"/>`, x, y, w, h, colour, opacity)
}

func (d *drawing) dot(x, y, r float64, colour string) {
	d.put(`<circle cx="%.1f" cy="%.1f" r="%g" fill="%s"/>`, x, y, r, colour)
}

func (d *drawing) path(points [][2]float64, colour string) {
	var at []string
	for _, p := range points {
		at = append(at, fmt.Sprintf("%.1f,%.1f", p[0], p[1]))
	}
	d.put(`<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`, strings.Join(at, " "), colour)
}

// svg is the whole file.
func (d *drawing) svg() []byte {
	return fmt.Appendf(nil,
		`<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" viewBox="0 0 %.0f %.0f" font-family="sans-serif">
<rect width="100%%" height="100%%" fill="#ffffff"/>
%s</svg>
`, d.width, d.height, d.width, d.height, d.body.String())
}

func escape(text string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(text)) // a buffer takes everything
	return b.String()
}

// scale maps values to places.
type scale struct {
	low, high float64 // values
	from, to  float64 // places
	log       bool
}

func (s scale) at(v float64) float64 {
	low, high := s.low, s.high
	if s.log {
		v, low, high = math.Log10(v), math.Log10(low), math.Log10(high)
	}
	return s.from + (v-low)/(high-low)*(s.to-s.from)
}

// logarithmic is a scale around values; where they span little, around twice as much as they do.
func logarithmic(values []float64, from, to float64) scale {
	low, high := math.Inf(1), math.Inf(-1)
	for _, v := range values {
		if v > 0 && !math.IsInf(v, 0) {
			low, high = min(low, v), max(high, v)
		}
	}
	if low > high {
		low, high = 1, 1
	}
	return scale{low: low / 1.3, high: high * 1.3, from: from, to: to, log: true}
}

// fit is logarithmic for positive values that span more than a factor of eight, else linear and begins at zero.
func fit(values []float64, from, to float64) scale {
	low, high := math.Inf(1), math.Inf(-1)
	for _, v := range values {
		low, high = min(low, v), max(high, v)
	}
	if low > 0 && high >= 8*low {
		return logarithmic(values, from, to)
	}
	if high <= 0 || low > high {
		high = 1
	}
	return scale{low: min(0, low), high: high * 1.15, from: from, to: to}
}

// ticks are round values within the scale.
func (s scale) ticks() []float64 {
	if !s.log {
		step := math.Pow(10, math.Floor(math.Log10(s.high-s.low)))
		for _, finer := range []float64{2, 2.5, 2} {
			if (s.high-s.low)/step < 4 {
				step /= finer
			}
		}
		var out []float64
		for i := math.Ceil(s.low / step); i*step <= s.high; i++ {
			out = append(out, i*step)
		}
		return out
	}
	digits := []float64{1, 2, 5}
	if s.high/s.low > 3000 {
		digits = digits[:1]
	}
	var out []float64
	for decade := math.Floor(math.Log10(s.low)); decade <= math.Log10(s.high); decade++ {
		for _, digit := range digits {
			if v := digit * math.Pow(10, decade); v >= s.low && v <= s.high {
				out = append(out, v)
			}
		}
	}
	return out
}

// tickLabel needs no digits that say nothing: ticks are round.
func tickLabel(v float64) string {
	if v >= 1000 {
		return number(v)
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}
