package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
)

// kernelState returns everything of ours that the kernel of a namespace holds, in a form that does not depend on the order in
// which it came there: the chains of each family and table sorted, each with its rules in their order and without counters,
// and the sets sorted, each with its members sorted and without the size of its hash table.
func kernelState(t testing.TB, ns *nettest.NS, backend string) string {
	t.Helper()
	var out []string
	for _, family := range []string{"iptables", "ip6tables"} {
		save := ns.Run(t, family+"-"+backend+"-save")
		for _, table := range strings.Split(save, "\n*")[1:] {
			name, rest, _ := strings.Cut(table, "\n")
			chains := map[string]string{}
			var hooks []string // in built-in chains, among rules of others; two programs of ours set them
			for line := range strings.Lines(rest) {
				f := strings.Fields(line)
				switch {
				case len(f) > 1 && f[0] == "-A" && ours(f[1]):
					chains[f[1]] += family + " " + name + " " + line
				case len(f) > 1 && f[0] == "-A" && ours(f[len(f)-1]):
					hooks = append(hooks, family+" "+name+" "+line)
				case len(f) > 0 && strings.HasPrefix(f[0], ":") && ours(f[0][1:]):
					chains[f[0][1:]] = family + " " + name + " " + f[0] + "\n" + chains[f[0][1:]]
				}
			}
			out = slices.AppendSeq(append(out, hooks...), maps.Values(chains))
		}
	}
	for line := range strings.Lines(ns.Run(t, "ipset", "save")) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], "pst-") {
			out = append(out, hashSize.ReplaceAllString(line, ""))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "")
}

var hashSize = regexp.MustCompile(` (hashsize|initval|bucketsize) \S+`)

func ours(chain string) bool {
	return strings.HasPrefix(chain, "POSTERN-") || strings.HasPrefix(chain, "PST-")
}

// difference lists the lines that only one of two states has, or has more often; empty if they are the same to the byte.
func difference(got, want string) string {
	if got == want {
		return ""
	}
	times := map[string]int{}
	for line := range strings.Lines(got) {
		times[line]++
	}
	for line := range strings.Lines(want) {
		times[line]--
	}
	var out strings.Builder
	for _, line := range slices.Sorted(maps.Keys(times)) {
		switch n := times[line]; {
		case n > 0:
			fmt.Fprintf(&out, "too much: %s", line)
		case n < 0:
			fmt.Fprintf(&out, "missing:  %s", line)
		}
	}
	if out.Len() == 0 {
		return "the same lines in another order:\n" + got + "wanted:\n" + want
	}
	return out.String()
}
