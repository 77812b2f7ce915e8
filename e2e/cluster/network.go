package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is the name of the network namespace of the control plane, and the beginning of those of the nodes.
const Namespace = "postern-e2e"

// entered tells a program that Enter has replaced that it is where it should be.
const entered = "POSTERN_E2E_ENTERED"

// Enter moves this program into the cluster's network namespace by running it again from its beginning, and makes the namespace
// if it is not there. Where the program is in it already, it returns.
func Enter() error {
	if os.Getenv(entered) != "" {
		return nil
	}
	if err := makeNamespace(Namespace); err != nil {
		return err
	}
	runtime.LockOSThread()
	handle, err := netns.GetFromName(Namespace)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", Namespace, err)
	}
	if err := netns.Set(handle); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", Namespace, err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, os.Args, append(os.Environ(), entered+"=1"))
}

// makeNamespace makes a named network namespace, as ip-netns(8) does, if it is not there.
func makeNamespace(name string) error {
	if _, err := os.Stat(filepath.Join("/run/netns", name)); err == nil {
		return nil
	}
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("make network namespace %s: %w: %s", name, err, out)
	}
	return nil
}

// removeNamespace removes a named network namespace; one that is not there is no error.
func removeNamespace(name string) error {
	if _, err := os.Stat(filepath.Join("/run/netns", name)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
		return fmt.Errorf("remove network namespace %s: %w: %s", name, err, out)
	}
	return nil
}

// Uplink is the name of a node's link to the others.
const Uplink = "eth0"

// bridge is the shared link of nodes that have one.
const bridge = "nodes"

// makeNetwork prepares the control plane's namespace: its addresses, and the bridge that nodes share. It forwards, for it is the
// nodes' router to each other where they share no link, and to everything else.
func (c *Cluster) makeNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	for _, file := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+file, []byte("1"), 0); err != nil {
			return fmt.Errorf("set net/%s to 1: %w", file, err)
		}
	}
	holder := lo
	if !c.Routed() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridge
		holder = &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(holder); err != nil {
			return fmt.Errorf("make bridge %s: %w", bridge, err)
		}
		if err := netlink.LinkSetUp(holder); err != nil {
			return fmt.Errorf("set %s up: %w", bridge, err)
		}
	}
	for _, family := range c.families() {
		address := netip.MustParseAddr(networks[family].controlPlane)
		prefix := netip.PrefixFrom(address, address.BitLen())
		if !c.Routed() {
			_, prefix = c.nodeLink(1, family)
		}
		if err := addAddress(holder, prefix); err != nil {
			return err
		}
		if err := ownTraffic(family); err != nil {
			return err
		}
	}
	return nil
}

// PodsTable is the routing table of the ways to pods. What is routed between nodes never sees it: their router knows no pods.
const PodsTable = 100

// ownTraffic makes what this namespace itself sends, and nothing that it forwards, look at PodsTable first.
func ownTraffic(family string) error {
	rule := netlink.NewRule()
	rule.IifName, rule.Table, rule.Priority = "lo", PodsTable, 100
	rule.Family = map[string]int{"4": netlink.FAMILY_V4, "6": netlink.FAMILY_V6}[family]
	if err := netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("make the rule for routes to pods, IPv%s: %w", family, err)
	}
	return nil
}

// addAddress gives a link an address that can be used at once: with IPv6, without asking the link whether another holds it.
func addAddress(link netlink.Link, prefix netip.Prefix) error {
	address := &netlink.Addr{IPNet: ipNet(prefix), Flags: unix.IFA_F_NODAD}
	if err := netlink.AddrAdd(link, address); err != nil {
		return fmt.Errorf("give %s the address %s: %w", link.Attrs().Name, prefix, err)
	}
	return nil
}

func ipNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}

// makeNetwork makes a node's network namespace, its uplink, and its routes.
func (n *Node) makeNetwork() error {
	if err := makeNamespace(n.namespace()); err != nil {
		return err
	}
	handle, err := netns.GetFromName(n.namespace())
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", n.namespace(), err)
	}
	defer handle.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.Name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: Uplink, PeerNamespace: netlink.NsFd(handle)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make the link of %s: %w", n.Name, err)
	}
	if !n.cluster.Routed() {
		shared, err := netlink.LinkByName(bridge)
		if err != nil {
			return fmt.Errorf("find bridge %s: %w", bridge, err)
		}
		if err := netlink.LinkSetMaster(veth, shared); err != nil {
			return fmt.Errorf("put %s on bridge %s: %w", n.Name, bridge, err)
		}
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return fmt.Errorf("set %s up: %w", n.Name, err)
	}
	for _, family := range n.cluster.families() {
		if _, router := n.cluster.nodeLink(n.number, family); n.cluster.Routed() {
			if err := addAddress(veth, router); err != nil {
				return err
			}
		}
	}
	return InNamespace(handle, n.configureLinks)
}

// configureLinks runs in the node's network namespace.
func (n *Node) configureLinks() error {
	for _, name := range []string{"lo", Uplink} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s of %s: %w", name, n.Name, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s of %s up: %w", name, n.Name, err)
		}
	}
	uplink, err := netlink.LinkByName(Uplink)
	if err != nil {
		return fmt.Errorf("find %s of %s: %w", Uplink, n.Name, err)
	}
	for _, family := range n.cluster.families() {
		address, router := n.cluster.nodeLink(n.number, family)
		if err := addAddress(uplink, address); err != nil {
			return err
		}
		route := &netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: router.Addr().AsSlice()}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("default route of %s by %s: %w", n.Name, router.Addr(), err)
		}
	}
	return nil
}

// routePods makes the control plane's namespace reach the pods of each node by that node, for the API server connects to pods
// when it is asked to be their proxy.
func (c *Cluster) routePods(n *Node, podCIDRs []string) error {
	for _, cidr := range podCIDRs {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return fmt.Errorf("pod range of %s: %w", n.Name, err)
		}
		family := "4"
		if prefix.Addr().Is6() {
			family = "6"
		}
		address, _ := c.nodeLink(n.number, family)
		if err := netlink.RouteReplace(&netlink.Route{Dst: ipNet(prefix), Gw: address.Addr().AsSlice(), Table: PodsTable}); err != nil {
			return fmt.Errorf("route to the pods of %s, %s by %s: %w", n.Name, prefix, address.Addr(), err)
		}
	}
	return nil
}

// InNamespace runs fn with its thread in a network namespace.
func InNamespace(handle netns.NsHandle, fn func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := netns.Set(handle); err != nil {
			result <- fmt.Errorf("enter a network namespace: %w", err)
			return
		}
		result <- fn()
	}()
	return <-result
}

// namespaces lists the named network namespaces of this cluster that are there.
func namespaces() []string {
	entries, _ := os.ReadDir("/run/netns")
	var all []string
	for _, e := range entries {
		if e.Name() == Namespace || strings.HasPrefix(e.Name(), Namespace+"-node") {
			all = append(all, e.Name())
		}
	}
	return all
}
