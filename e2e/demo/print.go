package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// style is how the demo speaks: with colour on a terminal that wants it (no-color.org), with signs and words alone
// elsewhere. The signs are the same, so nothing is said by colour only.
type style struct{ colour bool }

func styleFor(out *os.File) style {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return style{colour: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s style) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) bold(text string) string { return s.paint("1", text) }
func (s style) good(text string) string { return s.paint("32", text) }
func (s style) bad(text string) string  { return s.paint("1;37;41", text) }
func (s style) dim(text string) string  { return s.paint("2", text) }

// The signs of a cell: one for each port, in the order of ports.
const (
	signOpen   = "O" // both families
	signClosed = "."
	signOnly4  = "4"
	signOnly6  = "6"
)

const nameWidth = 18

// welcome says what the demo shows and how to read it.
func (s style) welcome(out io.Writer, w *world) {
	fmt.Fprintf(out, "\n%s\n", s.bold("postern: who reaches whom"))
	fmt.Fprint(out, `
  laptop 198.51.100.10 --+                                  +-- shop:    web-1 web-2 db cart
                         +-- router -- 192.0.2.2 the node --+-- tenants: app-1 app-2
  office 203.0.113.10  --+                                  +-- lab:     tools site
`)
	fmt.Fprintf(out, "\n  Each row is a client, each column (by its letter) somebody who listens on ports %d and %d.\n",
		ports[0], ports[1])
	fmt.Fprintf(out, "  A cell has one sign for each port:  %s connected   %s not   %s, %s only by IPv4, only by IPv6\n",
		s.sign(signOpen), s.sign(signClosed), s.sign(signOnly4), s.sign(signOnly6))
	fmt.Fprintf(out, "  Left: real connections, just now. Right: what the policies say. %s after a row: they differ.\n\n",
		s.bad("!"))
}

// sign paints a sign of a cell.
func (s style) sign(text string) string {
	switch text {
	case signOpen:
		return s.good(text)
	case signOnly4, signOnly6:
		return s.paint("33", text)
	}
	return s.dim(text)
}

// step prints one step: what changed, both matrices, and the host port's connections.
func (s style) step(out io.Writer, number int, st step, w *world, all []*try) {
	fmt.Fprintf(out, "%s\n  %s\n\n", s.bold(fmt.Sprintf("%d. %s", number, st.Title)), st.Says)
	for _, name := range slices.Sorted(maps.Keys(st.Files)) {
		for line := range strings.Lines(st.Files[name]) {
			fmt.Fprintf(out, "    %s\n", s.dim(strings.TrimSuffix(line, "\n")))
		}
		fmt.Fprintln(out)
	}
	pairs := slices.DeleteFunc(slices.Clone(all), func(t *try) bool { return t.HostPort })
	s.matrices(out, w, pairs)
	if st.HostPort {
		s.hostPorts(out, all)
	}
	if n := len(differing(number, all)); n > 0 {
		fmt.Fprintf(out, "  %s\n\n", s.bad(fmt.Sprintf("%d of %d connections differ", n, len(all))))
		return
	}
	fmt.Fprintf(out, "  %s %d connections, as the policies say\n\n", s.good("ok"), len(all))
}

func (s style) matrices(out io.Writer, w *world, all []*try) {
	type cell struct{ from, to *party }
	cells := map[cell][]*try{}
	head := ""
	for _, t := range all {
		cells[cell{t.From, t.To}] = append(cells[cell{t.From, t.To}], t)
	}
	for _, to := range w.parties {
		if to.Listens {
			head += to.Letter + "  "
		}
	}
	fmt.Fprintf(out, "    %-*s %-*s   %s\n", nameWidth, "", len(head), "connected", "the policies say")
	fmt.Fprintf(out, "    %-*s %s   %s\n", nameWidth, "", s.bold(head), s.bold(head))
	for _, from := range w.parties {
		var measured, expected string
		differs := ""
		for _, to := range w.parties {
			if !to.Listens {
				continue
			}
			tries := cells[cell{from, to}]
			measured += s.cell(tries, func(t *try) bool { return t.Opened })
			expected += s.cell(tries, func(t *try) bool { return t.Expected })
			if slices.ContainsFunc(tries, func(t *try) bool { return t.Opened != t.Expected }) {
				differs = s.bad("!")
			}
		}
		fmt.Fprintf(out, "  %s %-*s %s   %s %s\n", s.bold(from.Letter), nameWidth, from.Name, measured, expected, differs)
	}
	fmt.Fprintln(out)
}

// cell is three columns wide: a sign for each port and a space.
func (s style) cell(tries []*try, open func(*try) bool) string {
	var b strings.Builder
	for _, port := range ports {
		var four, six, any bool
		for _, t := range tries {
			if t.Port == port {
				any = true
				four = four || t.Address.Is4() && open(t)
				six = six || t.Address.Is6() && open(t)
			}
		}
		switch {
		case !any:
			b.WriteString(" ") // not tried: nothing of postern's is on the way
		case four && six:
			b.WriteString(s.sign(signOpen))
		case four:
			b.WriteString(s.sign(signOnly4))
		case six:
			b.WriteString(s.sign(signOnly6))
		default:
			b.WriteString(s.sign(signClosed))
		}
	}
	return b.String() + " "
}

// hostPorts prints the connections to host ports, one a line.
func (s style) hostPorts(out io.Writer, all []*try) {
	fmt.Fprintf(out, "    %-*s %-28s %-14s %s\n", nameWidth, "host port: from", "to", "connected", "policies say")
	word := func(open bool) string {
		if open {
			return s.good(fmt.Sprintf("%-14s", "yes"))
		}
		return s.dim(fmt.Sprintf("%-14s", "no"))
	}
	for _, t := range all {
		if !t.HostPort {
			continue
		}
		differs := ""
		if t.Opened != t.Expected {
			differs = s.bad("!")
		}
		fmt.Fprintf(out, "    %-*s %-28s %s %s %s\n", nameWidth, t.From.Name, fmt.Sprintf("%s port %d", t.Address, t.Port),
			word(t.Opened), word(t.Expected), differs)
	}
	fmt.Fprintln(out)
}
