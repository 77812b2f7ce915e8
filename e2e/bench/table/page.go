package table

import (
	"errors"
	"fmt"
	"strings"
)

// What stands between these lines of a page is a run's, and all else is written by hand.
const (
	begins = "<!-- The last run begins: `make bench RECORD=1` writes what is below. -->"
	ends   = "<!-- The last run ends. -->"
)

// Section is the run as Markdown: what ran where, the plots (files beside the page), the table, and how each line was measured.
func Section(r Result, plots ...string) string {
	var b strings.Builder
	for _, fact := range r.Facts.words() {
		fmt.Fprintf(&b, "- %s\n", markdown(fact))
	}
	fmt.Fprintf(&b, "- %s\n", r.Summary())
	for _, name := range r.Short() {
		fmt.Fprintf(&b, "- **%s**: %s\n", Short, markdown(name))
	}
	for _, plot := range plots {
		fmt.Fprintf(&b, "\n![plot](%s)\n", plot)
	}
	fmt.Fprintf(&b, "\n| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat(" --- |", len(heads)))
	for _, j := range r.Lines {
		cells := j.cells(markdown(j.Line.name()))
		if j.Verdict == Short {
			cells[len(cells)-1] = "**" + string(Short) + "**"
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
	}
	b.WriteString("\nHow each line was measured:\n\n")
	for _, j := range r.Lines {
		if about := j.Line.about(); about != "" {
			fmt.Fprintf(&b, "- %d, %s. %s\n", j.Line.Row, markdown(j.Line.name()), markdown(about))
		}
	}
	return b.String()
}

// Replace puts a section into a page, in place of the one that is there.
func Replace(page, section string) (string, error) {
	before, rest, begun := strings.Cut(page, begins)
	_, after, ended := strings.Cut(rest, ends)
	if !begun || !ended {
		return "", errors.New("the page has no place for a run: it needs the lines\n" + begins + "\n" + ends)
	}
	return before + begins + "\n\n" + section + "\n" + ends + after, nil
}

// markdown takes from the text what would mean something in a table of Markdown.
func markdown(text string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "*", `\*`, "_", `\_`).Replace(text)
}
