package rule

import (
	"net/netip"
)

// Family is an IP version, 4 or 6. iptables, ip6tables and the families of sets are kept apart everywhere: nothing in one
// ever loosens the other.
type Family uint8

const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both, in the order in which they are worked through.
var Families = [...]Family{IPv4, IPv6}

// FamilyOf returns the family of an address. An IPv4-mapped IPv6 address counts as IPv4.
func FamilyOf(a netip.Addr) Family {
	if a.Unmap().Is4() {
		return IPv4
	}
	return IPv6
}

// String returns "IPv4" or "IPv6".
func (f Family) String() string {
	if f == IPv4 {
		return "IPv4"
	}
	return "IPv6"
}

// Table is one of the kernel's tables that postern writes to.
type Table string

const (
	Raw    Table = "raw"
	Mangle Table = "mangle"
	NAT    Table = "nat"
	Filter Table = "filter"
)

// Rule is one rule of a chain. All matches must hold (logical and); an empty list matches every packet.
type Rule struct {
	Matches []Match
	Action  Action
	// Comment says for people where the rule comes from, such as "team-a/allow-web ingress 0". At most 255 bytes (the
	// kernel cuts what is longer); renderers shorten it.
	Comment string
}

// Chain is a user-defined chain that belongs to postern alone. Names have at most 28 characters (XT_EXTENSION_MAXNAMELEN-1).
type Chain struct {
	Name  string
	Rules []Rule
}

// Hook is the one rule that leads from a built-in chain into a chain of ours.
type Hook struct {
	Table Table
	Chain string // built-in: PREROUTING, FORWARD, OUTPUT, POSTROUTING
	Rule  Rule   // its Action is a Jump
	// Last puts the rule at the end of the built-in chain; otherwise it is kept the first one.
	Last bool
}

// State is everything of ours that one family's tables and sets should hold.
type State struct {
	Family Family
	Sets   []Set             // sorted by name
	Chains map[Table][]Chain // each sorted by name
	Hooks  []Hook
}

// Match is a condition of a rule. The implementations are the types in match.go, all of them comparable.
type Match interface{ isMatch() }

// Action is what happens to a packet that matches. The implementations are the types in action.go, all comparable.
type Action interface{ isAction() }
