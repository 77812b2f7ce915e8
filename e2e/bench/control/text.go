package control

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
)

// families are the prefixes of iptables' programs.
var families = []string{"iptables", "ip6tables"}

// saved is what iptables-save prints of both families.
type saved [2]string

// saveTables reads tables; without a name, those that postern writes to.
func saveTables(ctx context.Context, backend string, names ...string) (s saved, err error) {
	if names == nil {
		names = []string{"raw", "mangle", "filter"}
	}
	for i, family := range families {
		for _, table := range names {
			out, err := exec.CommandContext(ctx, family+"-"+backend+"-save", "-t", table).Output()
			if err != nil {
				return s, fmt.Errorf("%s-%s-save -t %s: %w", family, backend, table, err)
			}
			s[i] += string(out)
		}
	}
	return s, nil
}

// restoreTables writes text with one program for each family that has some, one after the other.
func restoreTables(ctx context.Context, backend string, text saved) error {
	for i, family := range families {
		if text[i] == "" {
			continue
		}
		args := []string{"--noflush"}
		if backend == "legacy" {
			args = append(args, "-w", "5")
		}
		cmd := exec.CommandContext(ctx, family+"-"+backend+"-restore", args...)
		cmd.Stdin = strings.NewReader(text[i])
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w: %s", cmd.Args[0], err, stderr.String())
		}
	}
	return nil
}

// chainsOf are the rules by chain in what iptables-save printed of one table, in the words of iptables-restore.
func chainsOf(text string) map[string][]string {
	chains := map[string][]string{}
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		switch {
		case len(words) < 2:
		case strings.HasPrefix(line, ":"):
			chains[words[0][1:]] = []string{}
		case words[0] == "-A":
			chains[words[1]] = append(chains[words[1]], strings.TrimSuffix(line, "\n"))
		}
	}
	return chains
}

// rename gives chains other names, which begin with these letters in place of PST.
const rename = "BEN"

// rewrite returns what iptables-restore needs to give chains of table mangle, under other names, the content that they have in
// one saved text: those that differ between it and another one.
func rewrite(content, other saved) (text saved, lines int) {
	for i := range families {
		is, was := chainsOf(content[i]), chainsOf(other[i])
		var declared, rules []string
		for _, name := range slices.Sorted(maps.Keys(is)) {
			to, ours := strings.CutPrefix(name, "PST")
			if !ours || slices.Equal(is[name], was[name]) {
				continue
			}
			declared = append(declared, ":"+rename+to+" - [0:0]")
			for _, r := range is[name] {
				rules = append(rules, strings.Replace(r, "-A "+name, "-A "+rename+to, 1))
			}
		}
		if len(declared) > 0 {
			text[i] = "*mangle\n" + strings.Join(slices.Concat(declared, rules), "\n") + "\nCOMMIT\n"
			lines += len(declared) + len(rules)
		}
	}
	return text, lines
}

// without returns what iptables-restore needs to remove the chains that a text writes.
func without(text saved) (gone saved) {
	for i := range families {
		declared, removed := "", ""
		for _, name := range slices.Sorted(maps.Keys(chainsOf(text[i]))) {
			declared, removed = declared+":"+name+" - [0:0]\n", removed+"-X "+name+"\n"
		}
		if declared != "" {
			gone[i] = "*mangle\n" + declared + removed + "COMMIT\n"
		}
	}
	return gone
}
