package suite

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Outside is a machine outside of the cluster: a network namespace on a link of its own, whose router is where the end-to-end
// program runs. The nodes reach everything by that router, and it knows the way to pods for what comes from such a machine, as
// the router of a network does that was told of the pods' ranges: machine and pod speak to each other with nobody translating
// addresses in between.
type Outside struct {
	Addresses []netip.Addr
	name      string
	ns        netns.NsHandle
}

func (o *Outside) String() string { return o.name }

// Outside makes a machine with the given addresses, which have the length of their networks, and removes it when the case has
// ended. The router's address is the network's first.
func (t *T) Outside(name string, prefixes ...netip.Prefix) *Outside {
	o := &Outside{name: fmt.Sprintf("%s outside", name)}
	for _, p := range prefixes {
		o.Addresses = append(o.Addresses, p.Addr())
	}
	var err error
	if o.ns, err = newNamespace(); err != nil {
		t.Fatalf("make %s: %v", o, err)
	}
	// With the namespace's last file its link goes, and the router's end with it.
	t.Cleanup(func(context.Context) { o.ns.Close() })
	if err := o.connect(name, prefixes); err != nil {
		t.Fatalf("make %s: %v", o, err)
	}
	for _, p := range prefixes {
		rule := wayToPods(name, p)
		if err := netlink.RuleAdd(rule); err != nil {
			t.Fatalf("make the router of %s know the way to pods: %v", o, err)
		}
		t.Cleanup(func(context.Context) {
			if err := netlink.RuleDel(rule); err != nil {
				t.Errorf("remove the rule %v: %v", rule, err)
			}
		})
	}
	t.Logf("%s has %v", o, prefixes)
	return o
}

// linkName is that of the router's end of a machine's link.
func linkName(name string) string { return "x-" + name }

// wayToPods is the router's rule for what a machine sends in the family of a prefix.
func wayToPods(name string, prefix netip.Prefix) *netlink.Rule {
	rule := netlink.NewRule()
	rule.IifName, rule.Table, rule.Priority, rule.Family = linkName(name), cluster.PodsTable, 101, netlink.FAMILY_V4
	if prefix.Addr().Is6() {
		rule.Family = netlink.FAMILY_V6
	}
	return rule
}

// newNamespace makes a network namespace that lasts as long as its handle.
func newNamespace() (netns.NsHandle, error) {
	type made struct {
		ns  netns.NsHandle
		err error
	}
	result := make(chan made)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		ns, err := netns.New()
		result <- made{ns, err}
	}()
	m := <-result
	if m.err != nil {
		return netns.None(), fmt.Errorf("make a network namespace: %w", m.err)
	}
	return m.ns, nil
}

// inside runs fn with its thread in the machine's namespace.
func (o *Outside) inside(fn func() error) error { return cluster.InNamespace(o.ns, fn) }

// connect makes the link to the router, and addresses and routes at both ends.
func (o *Outside) connect(name string, prefixes []netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(name)
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(o.ns)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make link %s: %w", attrs.Name, err)
	}
	var gateways []netip.Prefix
	for _, p := range prefixes {
		gateways = append(gateways, netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits()))
	}
	if err := configure(attrs.Name, gateways); err != nil {
		return err
	}
	return o.inside(func() error {
		if err := configure("lo", nil); err != nil {
			return err
		}
		if err := configure("eth0", prefixes); err != nil {
			return err
		}
		for _, g := range gateways {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.Addr().AsSlice()}); err != nil {
				return fmt.Errorf("default route by %s: %w", g.Addr(), err)
			}
		}
		return nil
	})
}

// configure sets a link up and gives it addresses that it may use at once.
func configure(name string, prefixes []netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for _, p := range prefixes {
		network := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: network, Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("give %s the address %s: %w", name, p, err)
		}
	}
	return nil
}

// Dial connects from the machine.
func (o *Outside) Dial(_ context.Context, to netip.AddrPort) (Outcome, error) {
	var got Outcome
	err := o.inside(func() error {
		// A literal address is dialled by this goroutine itself, and so from this thread's namespace.
		conn, err := net.DialTimeout("tcp", to.String(), connectTimeout)
		if err == nil {
			conn.Close()
		}
		got, err = outcome(err)
		return err
	})
	if got == "" {
		got = Fails
	}
	return got, err
}

// Listen makes the machine accept connections on a port of all its addresses, until the case has ended.
func (o *Outside) Listen(t *T, port uint16) {
	var listener net.Listener
	err := o.inside(func() error {
		var err error
		listener, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatalf("listen on port %d of %s: %v", port, o, err)
	}
	t.Cleanup(func(context.Context) { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
}

// prefixes are the given ones of the families that the cluster has.
func (t *T) prefixes(v4, v6 string) []netip.Prefix {
	texts := map[string][]string{"ipv4": {v4}, "ipv6": {v6}, "dual": {v4, v6}}[t.Cluster.Family]
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}
