package iptables

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/rule"
)

// Change is what one restore does to one table. Empty fields change nothing.
type Change struct {
	Table rule.Table
	// Replace declares these chains, new or existing, and gives them exactly these rules.
	Replace []rule.Chain
	// Append adds rules to chains that exist: a commit that only adds.
	Append []rule.Chain
	// Unhook deletes exactly these rules from built-in chains; a rule that is not there fails the restore.
	Unhook []rule.Hook
	// Hook inserts these rules into built-in chains, at the place that they ask for.
	Hook []rule.Hook
	// Delete removes these chains, emptied first so that chains which jump to each other go together.
	Delete []string
}

func (c Change) empty() bool {
	return len(c.Replace)+len(c.Append)+len(c.Unhook)+len(c.Hook)+len(c.Delete) == 0
}

// Render returns the text for iptables-restore --noflush; empty if the changes change nothing. Its parts come in the order in
// which they must happen inside of a table: chains, rules, hooks out and in, deletions.
func Render(changes ...Change) string {
	var b strings.Builder
	for _, c := range changes {
		if c.empty() {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", c.Table)
		for _, chain := range c.Replace {
			fmt.Fprintf(&b, ":%s - [0:0]\n", chain.Name)
		}
		for _, name := range c.Delete {
			fmt.Fprintf(&b, ":%s - [0:0]\n", name)
		}
		for _, chain := range slices.Concat(c.Replace, c.Append) {
			for _, r := range chain.Rules {
				fmt.Fprintf(&b, "-A %s%s\n", chain.Name, Args(r))
			}
		}
		for _, h := range c.Unhook {
			if f, foreign := h.Rule.Action.(Foreign); foreign {
				fmt.Fprintf(&b, "-D %s\n", strings.TrimPrefix(f.Line, "-A "))
				continue
			}
			fmt.Fprintf(&b, "-D %s%s\n", h.Chain, Args(h.Rule))
		}
		for _, h := range c.Hook {
			verb := "-I"
			if h.Last {
				verb = "-A"
			}
			fmt.Fprintf(&b, "%s %s%s\n", verb, h.Chain, Args(h.Rule))
		}
		for _, name := range c.Delete {
			fmt.Fprintf(&b, "-X %s\n", name)
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}

// Args renders a rule's matches, comment and action as iptables writes them, with a leading space.
func Args(r rule.Rule) string {
	var b strings.Builder
	for _, m := range r.Matches {
		b.WriteString(match(m))
	}
	if r.Comment != "" {
		fmt.Fprintf(&b, " -m comment --comment %s", quote(comment(r.Comment)))
	}
	b.WriteString(action(r.Action))
	return b.String()
}

// maxComment is the kernel's limit (XT_MAX_COMMENT_LEN 256, with the final NUL).
const maxComment = 255

// comment is what of a comment reaches the kernel: no control characters, and cut at the limit.
func comment(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxComment {
		return s
	}
	return strings.ToValidUTF8(s[:maxComment-3], "") + "..."
}

func quote(s string) string { return `"` + s + `"` }

func not(b bool) string {
	if b {
		return " !"
	}
	return ""
}

func match(m rule.Match) string {
	switch m := m.(type) {
	case rule.In:
		return not(m.Not) + " -i " + m.Name
	case rule.Out:
		return not(m.Not) + " -o " + m.Name
	case rule.Protocol:
		return " -p " + string(m.Proto)
	case rule.DestPorts:
		ports := fmt.Sprint(m.From)
		if m.From != m.To {
			ports = fmt.Sprintf("%d:%d", m.From, m.To)
		}
		return fmt.Sprintf(" -m %s --dport %s", m.Proto, ports)
	case rule.Source:
		return not(m.Not) + " -s " + m.Prefix.String()
	case rule.Dest:
		return not(m.Not) + " -d " + m.Prefix.String()
	case rule.InSet:
		return " -m set" + not(m.Not) + " --match-set " + m.Name + " " + m.Dirs
	case rule.SourceMAC:
		return " -m mac --mac-source " + net.HardwareAddr(m.MAC[:]).String()
	case rule.CTState:
		return " -m conntrack" + not(m.Not) + " --ctstate " + m.States
	case rule.Syn:
		return " -m tcp" + not(m.Not) + " --syn"
	case rule.AddrType:
		s := " -m addrtype"
		if m.SrcType != "" {
			s += " --src-type " + m.SrcType
		}
		if m.DstType != "" {
			s += " --dst-type " + m.DstType
		}
		return s
	case rule.ICMPType:
		if m.Proto == rule.ICMPv6 {
			return fmt.Sprintf(" -m icmp6 --icmpv6-type %d", m.Type)
		}
		return fmt.Sprintf(" -m icmp --icmp-type %d", m.Type)
	}
	panic(fmt.Sprintf("iptables: no rendering for match %T", m)) // a new type in package rule without its case here
}

func action(a rule.Action) string {
	switch a := a.(type) {
	case rule.Drop:
		return " -j DROP"
	case rule.Accept:
		return " -j ACCEPT"
	case rule.Return:
		return " -j RETURN"
	case rule.Jump:
		return " -j " + a.Chain
	case rule.Goto:
		return " -g " + a.Chain
	case rule.DNAT:
		return " -j DNAT --to-destination " + a.To.String()
	case rule.SNAT:
		return " -j SNAT --to-source " + a.To.String()
	case rule.Masquerade:
		if a.RandomPorts {
			return " -j MASQUERADE --random-fully"
		}
		return " -j MASQUERADE"
	}
	panic(fmt.Sprintf("iptables: no rendering for action %T", a))
}
