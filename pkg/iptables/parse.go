package iptables

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/postern-cni/postern/pkg/rule"
)

// Actual is what of ours the kernel holds in one table: our chains, and every rule of the built-in chains that leads into
// one of them.
type Actual struct {
	Chains map[string][]rule.Rule
	Hooks  []ActualHook
}

// ActualHook is a rule of a built-in chain that jumps into a chain of ours.
type ActualHook struct {
	Chain string
	Rule  rule.Rule
	First bool // no rule of anybody else's stands before it
}

// Foreign is the action of a rule that this package cannot have written. It equals nothing.
type Foreign struct {
	rule.Action
	Line string
}

// Ours reports whether a chain's name is one of ours.
func Ours(chain string) bool {
	return strings.HasPrefix(chain, "POSTERN-") || strings.HasPrefix(chain, "PST-")
}

// Parse reads the output of iptables-save for one family. Chains may also be as iptables -S has them.
func Parse(text string, family rule.Family) map[rule.Table]*Actual {
	tables := map[rule.Table]*Actual{}
	var now *Actual
	foreign := map[string]bool{} // built-in chains in which a rule of somebody else's has been seen
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			now = &Actual{Chains: map[string][]rule.Rule{}}
			tables[rule.Table(line[1:])] = now
			foreign = map[string]bool{}
		case now == nil:
		case strings.HasPrefix(line, ":"), strings.HasPrefix(line, "-N "):
			name := strings.Fields(strings.TrimPrefix(strings.TrimPrefix(line, ":"), "-N "))
			if len(name) > 0 && Ours(name[0]) {
				now.Chains[name[0]] = nil
			}
		case strings.HasPrefix(line, "-A "):
			now.add(line, family, foreign)
		}
	}
	return tables
}

// add takes in one "-A" line.
func (a *Actual) add(line string, family rule.Family, foreign map[string]bool) {
	words := split(line)
	chain := words[1]
	switch {
	case Ours(chain):
		a.Chains[chain] = append(a.Chains[chain], parseRule(words[2:], family, line))
	case Ours(target(words)):
		a.Hooks = append(a.Hooks, ActualHook{Chain: chain, Rule: parseRule(words[2:], family, line), First: !foreign[chain]})
	default:
		foreign[chain] = true
	}
}

func target(words []string) string {
	for i, w := range words[:max(len(words)-1, 0)] {
		if w == "-j" || w == "-g" {
			return words[i+1]
		}
	}
	return ""
}

// split cuts a line into words; a quoted word may have blanks.
func split(line string) []string {
	var words []string
	var word strings.Builder
	quoted, any := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, any = !quoted, true
		case c == ' ' && !quoted:
			if any || word.Len() > 0 {
				words = append(words, word.String())
			}
			word.Reset()
			any = false
		default:
			word.WriteByte(c)
		}
	}
	if any || word.Len() > 0 {
		words = append(words, word.String())
	}
	return words
}

// parser walks over the words of a rule.
type parser struct {
	words  []string
	family rule.Family
	rule   rule.Rule
	proto  rule.Proto
	failed bool
}

func parseRule(words []string, family rule.Family, line string) rule.Rule {
	p := &parser{words: words, family: family}
	for len(p.words) > 0 && !p.failed {
		p.step()
	}
	if p.failed || p.rule.Action == nil {
		return rule.Rule{Action: Foreign{Line: line}}
	}
	p.rule.Matches = normal(p.rule.Matches)
	return p.rule
}

func (p *parser) next() string {
	if len(p.words) == 0 {
		p.failed = true
		return ""
	}
	w := p.words[0]
	p.words = p.words[1:]
	return w
}

func (p *parser) match(m rule.Match) { p.rule.Matches = append(p.rule.Matches, m) }

// step reads one option with its values.
func (p *parser) step() {
	word, not := p.next(), false
	if word == "!" {
		word, not = p.next(), true
	}
	switch word {
	case "-m":
		p.module(p.next())
		return
	case "-i":
		p.match(rule.In{Name: p.next(), Not: not})
		return
	case "-o":
		p.match(rule.Out{Name: p.next(), Not: not})
		return
	case "-s":
		p.match(rule.Source{Prefix: p.prefix(), Not: not})
		return
	case "-d":
		p.match(rule.Dest{Prefix: p.prefix(), Not: not})
		return
	case "--match-set":
		name := p.next()
		p.match(rule.InSet{Name: name, Dirs: p.next(), Not: not})
		return
	case "--ctstate":
		states := strings.Split(p.next(), ",")
		slices.Sort(states)
		p.match(rule.CTState{States: strings.Join(states, ","), Not: not})
		return
	case "--tcp-flags":
		mask, set := p.next(), p.next()
		p.failed = p.failed || !(mask == "FIN,SYN,RST,ACK" || mask == "SYN,RST,ACK,FIN") || set != "SYN"
		p.match(rule.Syn{Not: not})
		return
	}
	p.failed = p.failed || not
	p.plain(word)
}

// plain reads the options that are never negated in our rules.
func (p *parser) plain(word string) {
	switch word {
	case "-p":
		p.proto = protocol(p.next())
		p.match(rule.Protocol{Proto: p.proto})
	case "--dport":
		p.ports(p.next())
	case "--dst-type":
		p.match(rule.AddrType{DstType: p.next()})
	case "--src-type":
		p.match(rule.AddrType{SrcType: p.next()})
	case "--icmp-type", "--icmpv6-type":
		n, err := strconv.ParseUint(p.next(), 10, 8)
		p.failed = p.failed || err != nil
		p.match(rule.ICMPType{Proto: p.proto, Type: uint8(n)})
	case "--comment":
		p.rule.Comment = p.next()
	case "--mac-source":
		mac, err := net.ParseMAC(p.next()) // either backend may write it in either case
		if p.failed = p.failed || err != nil || len(mac) != 6; !p.failed {
			p.match(rule.SourceMAC{MAC: [6]byte(mac)})
		}
	case "-j":
		p.target(p.next())
	case "-g":
		p.rule.Action = rule.Goto{Chain: p.next()}
	case "--random-fully":
		p.failed = p.failed || p.rule.Action != rule.Action(rule.Masquerade{})
		p.rule.Action = rule.Masquerade{RandomPorts: true}
	case "--to-destination":
		to, err := netip.ParseAddrPort(p.next())
		p.failed = p.failed || err != nil
		p.rule.Action = rule.DNAT{To: to}
	case "--to-source":
		to, err := netip.ParseAddr(p.next())
		p.failed = p.failed || err != nil
		p.rule.Action = rule.SNAT{To: to}
	default:
		p.failed = true
	}
}

// module takes the name of a match's module; all of ours show in their options.
func (p *parser) module(name string) {
	known := []string{"tcp", "udp", "sctp", "icmp", "icmp6", "comment", "set", "conntrack", "addrtype", "mac"}
	p.failed = p.failed || !slices.Contains(known, name)
}

func (p *parser) target(name string) {
	switch name {
	case "DROP":
		p.rule.Action = rule.Drop{}
	case "ACCEPT":
		p.rule.Action = rule.Accept{}
	case "RETURN":
		p.rule.Action = rule.Return{}
	case "MASQUERADE":
		p.rule.Action = rule.Masquerade{}
	case "DNAT", "SNAT": // the option that follows says where to
	default:
		p.rule.Action = rule.Jump{Chain: name}
	}
}

func (p *parser) ports(text string) {
	from, to, ranged := strings.Cut(text, ":")
	if !ranged {
		to = from
	}
	a, errA := strconv.ParseUint(from, 10, 16)
	b, errB := strconv.ParseUint(to, 10, 16)
	p.failed = p.failed || errA != nil || errB != nil
	p.match(rule.DestPorts{Proto: p.proto, From: uint16(a), To: uint16(b)})
}

func (p *parser) prefix() netip.Prefix {
	text := p.next()
	if !strings.Contains(text, "/") {
		a, err := netip.ParseAddr(text)
		p.failed = p.failed || err != nil
		if err != nil {
			return netip.Prefix{}
		}
		return netip.PrefixFrom(a, a.BitLen())
	}
	prefix, err := netip.ParsePrefix(text)
	p.failed = p.failed || err != nil
	return prefix
}

func protocol(name string) rule.Proto {
	switch name {
	case "icmpv6", "58":
		return rule.ICMPv6
	case "132":
		return rule.SCTP
	}
	return rule.Proto(name)
}

// normal brings matches into one order and form, so that rules which mean the same compare as equal.
func normal(matches []rule.Match) []rule.Match {
	matches = slices.Clone(matches)
	for i, m := range matches {
		if both, ok := m.(rule.AddrType); ok && both.SrcType != "" && both.DstType != "" { // read back as two
			matches[i] = rule.AddrType{SrcType: both.SrcType}
			matches = append(matches, rule.AddrType{DstType: both.DstType})
		}
	}
	slices.SortStableFunc(matches, func(a, b rule.Match) int { return strings.Compare(form(a), form(b)) })
	return matches
}

func form(m rule.Match) string { return fmt.Sprintf("%T %+v", m, m) }

// Equal reports whether two rules mean the same to the kernel and to a reader: the order of matches does not count, and a
// comment counts as far as the kernel keeps it.
func Equal(a, b rule.Rule) bool {
	if _, foreign := a.Action.(Foreign); foreign {
		return false
	}
	if _, foreign := b.Action.(Foreign); foreign {
		return false
	}
	return a.Action == b.Action && comment(a.Comment) == comment(b.Comment) &&
		slices.Equal(normal(a.Matches), normal(b.Matches))
}
