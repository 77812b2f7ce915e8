package table

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// Text is how a result is told on a terminal.
type Text struct {
	Colour bool // verdicts are painted as well as written
}

const (
	textWidth = 130 // of the whole table
	nameWidth = 46  // of what is measured; longer ones take more lines
)

var heads = []string{"row", "what", "ours", "beside", "ratio or figure", "95 % interval", "must be", "verdict"}

// Write writes the machine's facts, the table, with an explanation under each line, and a summary.
func (t Text) Write(out io.Writer, r Result) error {
	var b strings.Builder
	for _, fact := range r.Facts.words() {
		fmt.Fprintln(&b, fact)
	}
	fmt.Fprintln(&b)
	widths := t.widths(r)
	t.row(&b, widths, heads, Verdict(""))
	for _, j := range r.Lines {
		fmt.Fprintln(&b)
		name := wrap(j.Line.name(), nameWidth)
		t.row(&b, widths, j.cells(name[0]), j.Verdict)
		for _, more := range name[1:] {
			fmt.Fprintf(&b, "     %s\n", more)
		}
		if about := j.Line.about(); about != "" {
			for _, line := range wrap(about, textWidth-5) {
				fmt.Fprintf(&b, "     %s\n", t.paint("2", line))
			}
		}
	}
	fmt.Fprintf(&b, "\n%s.\n", r.Summary())
	for _, name := range r.Short() {
		fmt.Fprintf(&b, "%s: %s\n", t.paint("1;31", string(Short)), name)
	}
	for _, failed := range r.Failed {
		fmt.Fprintf(&b, "%s: %s\n", t.paint("1;31", "FAILED"), failed)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// cells of the line, in the order of heads.
func (j Judged) cells(name string) []string {
	l := j.Line
	return []string{fmt.Sprint(l.Row), name, l.side(l.Ours), l.side(l.Theirs), l.figure(j.Value), j.interval(), l.words(),
		string(j.Verdict)}
}

// about says what the line is beside, and how it was measured.
func (l Line) about() string {
	if l.Beside == "" {
		return l.Explain
	}
	return strings.TrimSpace("Beside " + l.Beside + ". " + l.Explain)
}

func (t Text) widths(r Result) []int {
	widths := make([]int, len(heads))
	grow := func(cells []string) {
		for i, cell := range cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	grow(heads)
	for _, j := range r.Lines {
		grow(j.cells(wrap(j.Line.name(), nameWidth)[0]))
	}
	return widths
}

// row writes cells: numbers to the right, words to the left.
func (t Text) row(b *strings.Builder, widths []int, cells []string, v Verdict) {
	var line strings.Builder
	for i, cell := range cells {
		pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
		switch {
		case i == len(cells)-1:
			line.WriteString(t.verdict(v, cell))
		case i == 0 || i >= 2 && i <= 5:
			line.WriteString(pad + cell + "  ")
		default:
			line.WriteString(cell + pad + "  ")
		}
	}
	text := strings.TrimRight(line.String(), " ")
	if v == "" {
		text = t.paint("1", text)
	}
	fmt.Fprintln(b, text)
}

func (t Text) verdict(v Verdict, text string) string {
	switch v {
	case Holds:
		return t.paint("32", text)
	case Within:
		return t.paint("33", text)
	case Short:
		return t.paint("1;31", text)
	}
	return text
}

func (t Text) paint(code, text string) string {
	if !t.Colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// words are the facts in a few lines.
func (f Facts) words() []string {
	kind := "full run"
	if f.Quick {
		kind = "quick run"
	}
	byVersion := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(f.Programs)) {
		byVersion[f.Programs[name]] = append(byVersion[f.Programs[name]], name)
	}
	var programs []string
	for _, version := range slices.Sorted(maps.Keys(byVersion)) {
		programs = append(programs, strings.Join(byVersion[version], ", ")+" "+version)
	}
	lines := []string{
		fmt.Sprintf("%s of %s, %s, took %s", kind, f.Revision, f.Date, f.Took),
		fmt.Sprintf("Linux %s, %d x %s, %s, %s", f.Kernel, f.CPUs, f.CPU, f.Go, f.Iptables),
	}
	if len(programs) > 0 {
		lines = append(lines, strings.Join(programs, "; "))
	}
	return lines
}

// wrap breaks text between words into lines of at most width, but for longer words. It returns one line at least.
func wrap(text string, width int) []string {
	lines := []string{""}
	for _, word := range strings.Fields(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case utf8.RuneCountInString(*last)+1+utf8.RuneCountInString(word) <= width:
			*last += " " + word
		default:
			lines = append(lines, word)
		}
	}
	return lines
}
