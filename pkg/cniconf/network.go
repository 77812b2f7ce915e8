package cniconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/ipam"
)

// Bounds of an MTU: what IPv4 (RFC 791) and IPv6 (RFC 8200, section 5) need, and what a veth carries.
const (
	minMTU4 = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

const (
	addressAllowed = "an IPv4 or IPv6 address without zone is allowed"
	prefixAllowed  = "an IPv4 or IPv6 prefix such as 10.244.1.0/24 is allowed"
)

// readNetwork reads the whole configuration on stdin into c.
func readNetwork(c *Config, p *problems) {
	o := object{p: p}
	if err := json.Unmarshal(c.Stdin, &o.fields); err != nil || o.fields == nil {
		p.add(types.ErrDecodingFailure, "stdin", show(json.RawMessage(c.Stdin)),
			fmt.Sprintf("a JSON object is expected (%v)", err))
		return
	}
	readVersion(c, o)
	_, present := o.value("name")
	if name, ok := get[string](o, "name", nameAllowed); ok || !present {
		if len(name) > maxNameLen || utils.ValidateNetworkName(name) != nil {
			o.bad("name", name, nameAllowed)
		} else {
			c.Name = name
		}
	}
	c.Type, _ = get[string](o, "type", "the name of a plugin is allowed")
	readPolicy(c, o)
	readNode(c, o)
	readIPAM(c, o)
	readMTU(c, o)
	if dns, ok := get[types.DNS](o, "dns", "an object with nameservers, domain, search, options is allowed"); ok {
		c.DNS = dns
	}
	c.PortMappings = readPortMappings(o.child("runtimeConfig"))
	readPrevResult(c, o)
	readValidAttachments(c, o)
}

const (
	maxNameLen  = 200
	nameAllowed = "1 to 200 letters, digits, '_', '.' or '-' are allowed, the first a letter or a digit"
)

func readVersion(c *Config, o object) {
	supported := SupportedVersions()
	allowed := "one of " + strings.Join(supported, ", ") + " is allowed"
	v, ok := get[string](o, "cniVersion", allowed)
	if _, present := o.value("cniVersion"); present && !ok {
		return // get has noted it
	}
	if !slices.Contains(supported, v) {
		o.p.add(types.ErrIncompatibleCNIVersion, "cniVersion", show(v), allowed)
		return
	}
	c.CNIVersion = v
}

func readPolicy(c *Config, o object) {
	choose(o, "policy", &c.Policy, attachment.PolicyEnforce, attachment.PolicyNone)
	choose(o, "iptablesBackend", &c.IPTablesBackend, BackendAuto, BackendNFT, BackendLegacy)
	choose(o, "hostPortConflict", &c.HostPortConflict, ConflictRefuse, ConflictIgnore)
	duration(o, "gateTimeout", &c.GateTimeout, time.Millisecond)
	duration(o, "statusGrace", &c.StatusGrace, 0)
}

// choose reads a word out of a few.
func choose[T ~string](o object, key string, to *T, words ...T) {
	allowed := "one of"
	for i, w := range words {
		if i > 0 {
			allowed += ","
		}
		allowed += fmt.Sprintf(" %q", string(w))
	}
	allowed += " is allowed"
	v, ok := get[T](o, key, allowed)
	switch {
	case !ok:
	case !slices.Contains(words, v):
		o.bad(key, string(v), allowed)
	default:
		*to = v
	}
}

// duration reads a duration as time.ParseDuration has it, between least and a day.
func duration(o object, key string, to *time.Duration, least time.Duration) {
	const most = 24 * time.Hour
	allowed := fmt.Sprintf(`a duration such as "10s", from %s to %s, is allowed`, least, most)
	text, ok := get[string](o, key, allowed)
	if !ok {
		return
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		o.bad(key, text, allowed)
		return
	}
	*to = d
}

// readNode reads what is about the node.
func readNode(c *Config, o object) {
	const dirAllowed = "an absolute path without '..' is allowed"
	if dir, ok := get[string](o, "stateDir", dirAllowed); ok {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != strings.TrimRight(dir, "/") || strings.ContainsRune(dir, 0) {
			o.bad("stateDir", dir, dirAllowed)
		} else {
			c.StateDir = filepath.Clean(dir)
		}
	}
	const allowed = "a list with at most one address of each family is allowed"
	list, _ := get[[]string](o, "nodeAddresses", allowed)
	for i, text := range list {
		key := fmt.Sprintf("nodeAddresses[%d]", i)
		a, ok := parseAddr(text)
		switch {
		case !ok || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast():
			o.bad(key, text, "an address that other machines reach the node by is allowed")
		case slices.ContainsFunc(c.NodeAddresses, func(b netip.Addr) bool { return a.BitLen() == b.BitLen() }):
			o.bad(key, text, "at most one address of each family is allowed")
		default:
			c.NodeAddresses = append(c.NodeAddresses, a)
		}
	}
}

func readMTU(c *Config, o object) {
	least := minMTU4
	if slices.ContainsFunc(c.IPAM.Ranges, func(r ipam.Range) bool { return r.Subnet.Addr().Is6() }) {
		least = minMTU6
	}
	allowed := fmt.Sprintf("0 (that of the interface with the node's address) or %d to %d is allowed", least, maxMTU)
	mtu, ok := get[int](o, "mtu", allowed)
	if ok && mtu != 0 && (mtu < least || mtu > maxMTU) {
		o.bad("mtu", mtu, allowed)
		return
	}
	c.MTU = mtu
}

// readIPAM reads the ipam object. One of another type is that plugin's to check.
func readIPAM(c *Config, o object) {
	own := o.child("ipam")
	const typeAllowed = "the name of a plugin, without '/', is allowed; without one, or \"postern\", addresses come from ranges"
	if t, ok := get[string](own, "type", typeAllowed); ok && t != "" {
		if strings.ContainsAny(t, "/\x00") || t == "." || t == ".." {
			own.bad("type", t, typeAllowed)
			return
		}
		c.IPAM.Type = t
	}
	if !c.IPAM.Own() {
		return
	}
	own.onlyKeys("type", "ranges", "reuseAfter", "routes")
	duration(own, "reuseAfter", &c.IPAM.ReuseAfter, 0)
	for _, route := range own.children("routes") {
		route.onlyKeys("dst")
		if dst, ok := prefix(route, "dst"); ok {
			c.IPAM.Routes = append(c.IPAM.Routes, dst.Masked())
		} else if _, present := route.value("dst"); !present {
			route.bad("dst", nil, prefixAllowed)
		}
	}
	readRanges(c, own)
}

func readRanges(c *Config, own object) {
	list := own.children("ranges")
	if raw, ok := own.value("ranges"); !ok || string(raw) == "[]" {
		own.bad("ranges", nil, `a list of at least one range, such as [{"subnet": "10.244.1.0/24"}], is allowed`)
	}
	for _, item := range list {
		r, ok := readRange(item)
		if !ok {
			continue
		}
		if i := slices.IndexFunc(c.IPAM.Ranges, r.Overlaps); i >= 0 {
			item.bad("subnet", item.fields["subnet"], fmt.Sprintf("a range that does not overlap %s is allowed", c.IPAM.Ranges[i]))
			continue
		}
		c.IPAM.Ranges = append(c.IPAM.Ranges, r)
	}
}

// readRange reads one range; ok is false where anything of it is wrong.
func readRange(o object) (r ipam.Range, ok bool) {
	before := len(o.p.list)
	o.onlyKeys("subnet", "rangeStart", "rangeEnd", "gateway", "exclude")
	subnet, found := prefix(o, "subnet")
	if _, present := o.value("subnet"); !present {
		o.bad("subnet", nil, prefixAllowed)
	}
	r.Subnet = subnet.Masked()
	for _, part := range []struct {
		key string
		to  *netip.Addr
	}{{"rangeStart", &r.Start}, {"rangeEnd", &r.End}, {"gateway", &r.Gateway}} {
		a, given := address(o, part.key)
		if given && found && !r.Subnet.Contains(a) {
			o.bad(part.key, a.String(), fmt.Sprintf("an address of %s is allowed", r.Subnet))
		}
		*part.to = a
	}
	const excludeAllowed = "a list of addresses and prefixes of the subnet is allowed"
	texts, _ := get[[]string](o, "exclude", excludeAllowed)
	for i, text := range texts {
		p, valid := parsePrefix(text)
		if a, isAddr := parseAddr(text); isAddr {
			p, valid = netip.PrefixFrom(a, a.BitLen()), true
		}
		if !valid || found && !p.Overlaps(r.Subnet) {
			o.bad(fmt.Sprintf("exclude[%d]", i), text, "an address or a prefix of the subnet is allowed")
			continue
		}
		r.Exclude = append(r.Exclude, p)
	}
	if len(o.p.list) > before {
		return r, false
	}
	if err := r.Check(); err != nil {
		o.bad("subnet", o.fields["subnet"], err.Error()+"; a subnet with room between rangeStart and rangeEnd is allowed")
		return r, false
	}
	return r, true
}

// onlyKeys notes every other key.
func (o object) onlyKeys(keys ...string) {
	var unknown []string
	for key := range o.fields {
		if !slices.Contains(keys, key) {
			unknown = append(unknown, key)
		}
	}
	sort.Strings(unknown)
	for _, key := range unknown {
		o.bad(key, o.fields[key], "unknown; the keys "+strings.Join(keys, ", ")+" are allowed")
	}
}

func address(o object, key string) (netip.Addr, bool) {
	text, ok := get[string](o, key, addressAllowed)
	if !ok || text == "" {
		return netip.Addr{}, false
	}
	a, ok := parseAddr(text)
	if !ok {
		o.bad(key, text, addressAllowed)
	}
	return a, ok
}

func prefix(o object, key string) (netip.Prefix, bool) {
	text, ok := get[string](o, key, prefixAllowed)
	if !ok {
		return netip.Prefix{}, false
	}
	p, ok := parsePrefix(text)
	if !ok {
		o.bad(key, text, prefixAllowed)
	}
	return p, ok
}

// parseAddr takes an IPv4 address in IPv6 form for what it is.
func parseAddr(text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

func parsePrefix(text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	return p, err == nil && !p.Addr().Is4In6()
}

// readPortMappings reads the capability portMappings. A mapping given twice counts once.
func readPortMappings(o object) []attachment.PortMapping {
	type port struct {
		protocol string
		hostIP   netip.Addr
		hostPort uint16
	}
	seen := map[port]uint16{}
	var all []attachment.PortMapping
	for _, item := range o.children("portMappings") {
		m, ok := readPortMapping(item)
		if !ok {
			continue
		}
		at := port{m.Protocol, m.HostIP, m.HostPort}
		container, twice := seen[at]
		switch {
		case !twice:
			seen[at] = m.ContainerPort
			all = append(all, m)
		case container != m.ContainerPort:
			item.bad("hostPort", int(m.HostPort),
				fmt.Sprintf("a port is allowed that is not mapped to containerPort %d already", container))
		}
	}
	return all
}

// readPortMapping takes the keys in any case: containerd writes HostPort, ContainerPort, Protocol and HostIP.
func readPortMapping(o object) (m attachment.PortMapping, ok bool) {
	before := len(o.p.list)
	o = o.inAnyCase("hostPort", "containerPort", "protocol", "hostIP")
	m.HostPort = portNumber(o, "hostPort")
	m.ContainerPort = portNumber(o, "containerPort")
	const protocolAllowed = "tcp, udp or sctp is allowed"
	protocol, given := get[string](o, "protocol", protocolAllowed)
	switch m.Protocol = strings.ToLower(protocol); {
	case given && m.Protocol != "tcp" && m.Protocol != "udp" && m.Protocol != "sctp":
		o.bad("protocol", protocol, protocolAllowed)
	case !given:
		m.Protocol = "tcp" // the default of the Kubernetes API
	}
	m.HostIP, _ = address(o, "hostIP")
	return m, len(o.p.list) == before
}

// portNumber reads a port that must be there.
func portNumber(o object, key string) uint16 {
	const allowed = "1 to 65535 is allowed"
	n, ok := get[int](o, key, allowed)
	if _, present := o.value(key); !present {
		o.bad(key, nil, allowed)
	} else if ok && (n < 1 || n > 65535) {
		o.bad(key, n, allowed)
	}
	return uint16(n)
}

func readPrevResult(c *Config, o object) {
	raw, ok := o.value("prevResult")
	if !ok || c.CNIVersion == "" {
		return // without a version, which is noted, nobody knows its form
	}
	result, err := create.Create(c.CNIVersion, raw)
	if err == nil {
		c.PrevResult, err = types100.NewResultFromResult(result)
	}
	if err != nil {
		o.bad("prevResult", raw, fmt.Sprintf("a result of CNI version %s is allowed (%v)", c.CNIVersion, err))
	}
}

// readValidAttachments reads GC's list. "cni.dev/attachments" is what libcni wrote before the specification had settled.
func readValidAttachments(c *Config, o object) {
	key := "cni.dev/valid-attachments"
	if _, ok := o.value(key); !ok {
		key = "cni.dev/attachments"
	}
	if _, ok := o.value(key); !ok {
		return
	}
	list := o.children(key)
	c.ValidAttachments = make([]attachment.Key, 0, len(list))
	for _, item := range list {
		const allowed = "a container ID and an interface name as the CNI specification has them are allowed"
		id, ok1 := get[string](item, "containerID", allowed)
		ifName, ok2 := get[string](item, "ifname", allowed)
		k := attachment.Key{ContainerID: id, IfName: ifName}
		if ok1 && ok2 && k.Check() == nil {
			c.ValidAttachments = append(c.ValidAttachments, k)
			continue
		}
		text, _ := json.Marshal(item.fields)
		o.bad(strings.TrimSuffix(item.path, "."), json.RawMessage(text), allowed)
	}
}
