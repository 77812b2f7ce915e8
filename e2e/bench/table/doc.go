// Package table is what the benchmarks say: lines that set what was measured beside a peer or a floor, what must hold of the ratio,
// how far chance reaches (statistics), and the ways to tell it: a table in the terminal, JSON, plots as SVG, and a page.
//
// It measures nothing itself. Whoever measures takes turns between the two sides, so that what else the machine does falls on
// both; a round is one value of each, taken next to each other.
package table
