package cluster

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Config is what can be chosen about a cluster. The zero value of a field is its default, which Complete fills in.
type Config struct {
	Nodes   int    // 1 to 9; default 3
	Backend string // of iptables on the nodes: nft (default) or legacy
	Family  string // of nodes, pods and Services: ipv4 (default), ipv6, or dual
	Proxy   string // kube-proxy's mode: iptables (default) or nftables
	Tunnel  string // policyd's --tunnel: auto (default, on nodes that share a link), always (on nodes that do not), never
}

// Complete fills in the defaults, or says everything that is wrong with the values given.
func (c Config) Complete() (Config, error) {
	if c.Nodes == 0 {
		c.Nodes = 3
	}
	var errs []error
	if c.Nodes < 1 || c.Nodes > 9 {
		errs = append(errs, fmt.Errorf("NODES=%d: must be 1 to 9", c.Nodes))
	}
	for _, choice := range []struct {
		name    string
		value   *string
		allowed []string // the first is the default
	}{
		{"BACKEND", &c.Backend, []string{"nft", "legacy"}},
		{"FAMILY", &c.Family, []string{"ipv4", "ipv6", "dual"}},
		{"PROXY", &c.Proxy, []string{"iptables", "nftables"}},
		{"TUNNEL", &c.Tunnel, []string{"auto", "always", "never"}},
	} {
		if *choice.value == "" {
			*choice.value = choice.allowed[0]
		}
		if !slices.Contains(choice.allowed, *choice.value) {
			errs = append(errs, fmt.Errorf("%s=%s: must be one of %s", choice.name, *choice.value, strings.Join(choice.allowed, ", ")))
		}
	}
	return c, errors.Join(errs...)
}

// String names what is not the default, for a heading.
func (c Config) String() string {
	return fmt.Sprintf("%d nodes, BACKEND=%s FAMILY=%s PROXY=%s TUNNEL=%s", c.Nodes, c.Backend, c.Family, c.Proxy, c.Tunnel)
}

// Routed says whether each node is on a link of its own, behind a router.
func (c Config) Routed() bool { return c.Tunnel == "always" }

// families are "4", "6" or both, in the order of Family: the first is the one of the API server's address.
func (c Config) families() []string {
	return map[string][]string{"ipv4": {"4"}, "ipv6": {"6"}, "dual": {"4", "6"}}[c.Family]
}

// The networks of a cluster. All are of ranges for private use, and exist in the cluster's namespaces alone.
var networks = map[string]struct {
	controlPlane string // the API server's address
	pods         string // the range that the controller manager gives nodes their parts of
	nodeMask     string // the length of a node's part
	services     string
	kubernetes   string // the first Service, of the API server
	dns          string
}{
	"4": {"172.30.0.1", "10.244.0.0/16", "24", "10.96.0.0/16", "10.96.0.1", "10.96.0.10"},
	"6": {"fd00:172:30::1", "fd00:10:244::/56", "64", "fd00:10:96::/112", "fd00:10:96::1", "fd00:10:96::a"},
}

// each joins one value for each family with commas, as Kubernetes' programs want them.
func (c Config) each(value func(family string) string) string {
	var all []string
	for _, family := range c.families() {
		all = append(all, value(family))
	}
	return strings.Join(all, ",")
}

// controlPlane is the address of the API server, in the first family.
func (c Config) controlPlane() netip.Addr {
	return netip.MustParseAddr(networks[c.families()[0]].controlPlane)
}

// PodRange is the range of all pods of a family, "4" or "6".
func (c Config) PodRange(family string) string { return networks[family].pods }

// nodeLink is a node's address on its link with the link's length, and the address of the control plane's end of that link, by
// which the node reaches everything else.
func (c Config) nodeLink(node int, family string) (address netip.Prefix, router netip.Prefix) {
	var a, r string
	switch {
	case family == "4" && c.Routed():
		a, r = fmt.Sprintf("172.30.%d.2/24", node), fmt.Sprintf("172.30.%d.1/24", node)
	case family == "4":
		a, r = fmt.Sprintf("172.30.0.%d/24", 10+node), "172.30.0.1/24"
	case c.Routed():
		a, r = fmt.Sprintf("fd00:172:30:%d::2/64", node), fmt.Sprintf("fd00:172:30:%d::1/64", node)
	default:
		a, r = fmt.Sprintf("fd00:172:30::%d/64", 10+node), "fd00:172:30::1/64"
	}
	return netip.MustParsePrefix(a), netip.MustParsePrefix(r)
}

// nodeAddresses are a node's addresses, the first family's first.
func (c Config) nodeAddresses(node int) []netip.Addr {
	var all []netip.Addr
	for _, family := range c.families() {
		address, _ := c.nodeLink(node, family)
		all = append(all, address.Addr())
	}
	return all
}
