package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Mark says what tests do with a block.
type Mark int

const (
	Run Mark = iota
	Checked
	NotRun
)

// marks are the beginnings of a block's first line.
var marks = map[Mark]string{
	Checked: "# Checked but not run by our tests: ",
	NotRun:  "# Not run by our tests: ",
}

// Block is a fenced block of a page.
type Block struct {
	Page    string // the file's name
	Line    int    // of the fence that opens it
	Heading string // under which it stands
	Kind    string // sh, console, yaml, or whatever the page says
	Mark    Mark   // of a block of kind sh
	Reason  string // why it is not run
	Text    string // without the line that says so
}

// String names the block for an error.
func (b Block) String() string { return fmt.Sprintf("%s:%d", b.Page, b.Line) }

// Step is a command and what it prints.
type Step struct {
	Command string
	// Prints are parts of what the command prints, in this order; it may print other things too. Where there are none, the command
	// must succeed.
	Prints []string
}

// Read reads the blocks of a page.
func Read(file string) ([]Block, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read a page: %w", err)
	}
	return parse(filepath.Base(file), string(data))
}

func parse(page, text string) ([]Block, error) {
	var blocks []Block
	var open *Block
	heading, number := "", 0
	for line := range strings.Lines(text) {
		number++
		fence, isFence := strings.CutPrefix(strings.TrimRight(line, "\n"), "```")
		switch {
		case open == nil && isFence:
			open = &Block{Page: page, Line: number, Heading: heading, Kind: fence}
		case open == nil && strings.HasPrefix(line, "#"):
			heading = strings.TrimSpace(strings.TrimLeft(line, "#"))
		case open != nil && isFence:
			open.takeMark()
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.Text += line
		}
	}
	if open != nil {
		return nil, fmt.Errorf("%s: the block is not closed", open)
	}
	return blocks, nil
}

// takeMark moves the first line's mark out of the text.
func (b *Block) takeMark() {
	first, rest, _ := strings.Cut(b.Text, "\n")
	for mark, words := range marks {
		if reason, marked := strings.CutPrefix(first, words); marked && b.Kind == "sh" {
			b.Mark, b.Reason, b.Text = mark, strings.TrimSuffix(reason, "."), rest
		}
	}
}

// Steps are the block's commands.
func (b Block) Steps() []Step {
	switch b.Kind {
	case "sh":
		return commands(b.Text)
	case "console":
		return Transcript(b.Text)
	}
	return nil
}

// commands are the lines of a shell's text; one that ends in a backslash or a pipe, or begins a here-document, goes on.
func commands(text string) []Step {
	var steps []Step
	more, until := false, ""
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch {
		case more || until != "":
			steps[len(steps)-1].Command += "\n" + line
		case strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#"):
			continue
		default:
			steps = append(steps, Step{Command: line})
		}
		if until != "" {
			if line == until {
				until = ""
			}
			continue
		}
		if _, word, here := strings.Cut(line, "<<"); here {
			until = strings.Trim(word, `'"`)
		}
		more = strings.HasSuffix(line, `\`) || strings.HasSuffix(line, "|")
	}
	return steps
}

// Transcript reads commands, each after "$ ", and below them what they print. A command's line that ends in a backslash goes on
// in the next.
func Transcript(text string) []Step {
	var steps []Step
	more := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch command, begins := strings.CutPrefix(line, "$ "); {
		case begins:
			steps = append(steps, Step{Command: command})
			more = strings.HasSuffix(line, `\`)
		case more:
			steps[len(steps)-1].Command += "\n" + line
			more = strings.HasSuffix(line, `\`)
		case len(steps) > 0 && strings.TrimSpace(line) != "":
			last := &steps[len(steps)-1]
			last.Prints = append(last.Prints, strings.TrimSpace(line))
		}
	}
	return steps
}

// HeadComment is the text of a manifest's head comment that is indented by three spaces behind the "#": where the commands are.
func HeadComment(manifest string) string {
	var text strings.Builder
	for line := range strings.Lines(manifest) {
		comment, is := strings.CutPrefix(line, "#")
		if !is {
			break
		}
		if indented, is := strings.CutPrefix(comment, "   "); is {
			text.WriteString(indented)
		} else {
			text.WriteByte('\n')
		}
	}
	return text.String()
}
