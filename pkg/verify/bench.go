package verify

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// bench is a node made of network namespaces, on which a kernel is asked. One namespace is the node: it routes, and has a link
// for each pod interface under that interface's name, and an uplink. Their other ends are in a second one without addresses,
// where one packet socket writes and reads frames: that is all the pods and other machines there are.
//
// Everything happens on one thread, which is in the node's namespace and stays on one CPU. There the kernel handles packets in
// the order in which they are sent (a CPU's backlog is a queue), so when a marker that no rule stops comes out of the uplink,
// whatever was sent before it has come out too, or was dropped. No time is waited for.
type bench struct {
	tables map[rule.Family]*iptables.Tables
	sets   *ipset.Sets
	socket int             // in the pods' namespace
	pods   *netlink.Handle // the same
	podsNS *os.File
	links  map[string]linkEnds // by the name on the node
	names  map[int]string      // by the index of the other end
	routes []*netlink.Route
	chains map[rule.Family]map[rule.Table][]string // what is loaded
	loaded map[rule.Family]map[string]bool         // sets
	id     uint32
}

// linkEnds are what frames for a link need to know.
type linkEnds struct {
	node, other int // indexes
	mac         net.HardwareAddr
}

// onBench builds a bench for one backend, lets do use it, and takes it away with its thread. CPUs are dealt out by number.
func onBench(backend iptables.Backend, number int, do func(*bench) error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespaces with it
		b, err := newBench(backend, number)
		if err == nil {
			err = errors.Join(do(b), b.close())
		}
		done <- err
	}()
	return <-done
}

func newBench(backend iptables.Backend, number int) (*bench, error) {
	b := &bench{tables: map[rule.Family]*iptables.Tables{}, links: map[string]linkEnds{}, names: map[int]string{},
		chains: map[rule.Family]map[rule.Table][]string{}, loaded: map[rule.Family]map[string]bool{}}
	for _, f := range rule.Families {
		var err error
		if b.tables[f], err = iptables.New(backend, f); err != nil {
			return nil, err
		}
		b.loaded[f] = map[string]bool{}
	}
	if err := stay(number); err != nil {
		return nil, err
	}
	if err := b.makePods(); err != nil {
		return nil, fmt.Errorf("make the pods' namespace: %w", err)
	}
	if err := b.makeNode(); err != nil {
		return nil, fmt.Errorf("make the node's namespace: %w", err)
	}
	return b, nil
}

// stay keeps the thread, and what it starts, on one of the CPUs that it may use.
func stay(number int) error {
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("ask for the thread's CPUs: %w", err)
	}
	left := number % may.Count()
	for cpu := 0; ; cpu++ {
		if may.IsSet(cpu) {
			if left == 0 {
				one.Set(cpu)
				break
			}
			left--
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("keep the thread on one CPU: %w", err)
	}
	return nil
}

// limit is how long a packet may take, on a machine under load.
const limit = 30 * time.Second

func (b *bench) makePods() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if b.podsNS, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	if err := sysctl("ipv6/conf/all/disable_ipv6", "1", "ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return err
	}
	if b.pods, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
	if b.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	timeout := unix.NsecToTimeval(limit.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(b.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		// The pods' end of a fresh link, which went up before the node's, gets its queue only when a worker of the kernel has seen
		// the carrier, up to a second later; until then it swallows what is sent through the queue.
		unix.SetsockoptInt(b.socket, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1),
		unix.SetsockoptInt(b.socket, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
}

// makeNode makes the node's namespace, in which the thread stays, as a node is: it routes, and pods' links trust nothing.
func (b *bench) makeNode() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := sysctl("ipv4/ip_forward", "1", "ipv6/conf/all/forwarding", "1", "ipv4/conf/all/rp_filter", "0",
		"ipv4/conf/default/rp_filter", "0", "ipv4/conf/all/send_redirects", "0", "ipv4/conf/default/send_redirects", "0",
		"ipv6/conf/default/accept_dad", "0", "ipv6/conf/default/addr_gen_mode", "1"); err != nil {
		return err
	}
	if b.sets, err = ipset.Open(); err != nil {
		return err
	}
	if err := errors.Join(b.link(uplink), b.closeForward()); err != nil {
		return err
	}
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		_, dst, err := net.ParseCIDR(all)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: b.links[uplink].node, Dst: dst}); err != nil {
			return fmt.Errorf("route %s: %w", all, err)
		}
	}
	return nil
}

// closeForward makes the node one whose FORWARD policy is DROP, as Docker leaves it: there pod traffic needs to be accepted. What
// is no pod's (the marker) this node accepts itself.
func (b *bench) closeForward() error {
	for _, t := range b.tables {
		text := "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -i " + uplink + " -o " + uplink + " -j ACCEPT\nCOMMIT\n"
		if err := t.Restore(context.Background(), text); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) close() error {
	b.sets.Close()
	b.pods.Close()
	return errors.Join(unix.Close(b.socket), b.podsNS.Close())
}

// sysctl sets pairs of a path below /proc/sys/net and a value, in the thread's namespace.
func sysctl(pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := os.WriteFile("/proc/sys/net/"+pairs[i], []byte(pairs[i+1]), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

// link makes a link of the node, if it is not there. It asks for no neighbours: the other end hears every frame.
func (b *bench) link(name string) error {
	if _, made := b.links[name]; made {
		return nil
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	other := fmt.Sprintf("other%d", len(b.links))
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: other, PeerNamespace: netlink.NsFd(int(b.podsNS.Fd()))}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("create link %s: %w", name, err)
	}
	node, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	end, err := b.pods.LinkByName(other)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetARPOff(node), b.pods.LinkSetUp(end), netlink.LinkSetUp(node)); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	b.links[name] = linkEnds{node.Attrs().Index, end.Attrs().Index, node.Attrs().HardwareAddr}
	b.names[end.Attrs().Index] = name
	if name == uplink {
		return nil
	}
	return sysctl("ipv4/conf/"+name+"/rp_filter", "1")
}

// load brings the node to a world: links, routes, sets and rules. No flow of a former one is left.
func (b *bench) load(w *World, states map[rule.Family]*rule.State) error {
	for _, r := range b.routes {
		if err := netlink.RouteDel(r); err != nil {
			return fmt.Errorf("remove route %s: %w", r.Dst, err)
		}
	}
	b.routes = nil
	for _, l := range w.Local {
		if err := b.link(l.Interface); err != nil {
			return err
		}
		for _, a := range l.Addresses {
			r := &netlink.Route{LinkIndex: b.links[l.Interface].node, Dst: whole(a)}
			if err := netlink.RouteAdd(r); err != nil {
				return fmt.Errorf("route %s: %w", a, err)
			}
			b.routes = append(b.routes, r)
		}
	}
	for _, f := range rule.Families {
		if err := b.write(f, states[f]); err != nil {
			return fmt.Errorf("load the rules of %s: %w", f, err)
		}
	}
	return b.forget()
}

func whole(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// write puts a family's sets and chains in the place of those before. It is no engine: it fills sets in plain sight.
func (b *bench) write(f rule.Family, s *rule.State) error {
	wanted := map[string]bool{}
	for _, set := range s.Sets {
		wanted[set.Name] = true
		if b.loaded[f][set.Name] {
			if err := b.sets.Flush(set.Name); err != nil {
				return err
			}
		} else if err := b.sets.Create(set, len(set.Entries)); err != nil {
			return err
		}
		b.loaded[f][set.Name] = true
		if err := b.sets.Add(set.Name, set.Entries...); err != nil {
			return err
		}
	}
	if err := b.tables[f].Restore(context.Background(), iptables.Render(b.changes(f, s)...)); err != nil {
		return err
	}
	for name := range b.loaded[f] {
		if !wanted[name] {
			if err := b.sets.Destroy(name); err != nil {
				return err
			}
			delete(b.loaded[f], name)
		}
	}
	return nil
}

// changes are the restore that leads from the chains that are loaded to others. The hooks are the same in every state.
func (b *bench) changes(f rule.Family, s *rule.State) []iptables.Change {
	var list []iptables.Change
	now := map[rule.Table][]string{}
	for _, table := range []rule.Table{rule.Mangle, rule.Filter} {
		c := iptables.Change{Table: table, Replace: s.Chains[table]}
		wanted := map[string]bool{}
		for _, chain := range s.Chains[table] {
			wanted[chain.Name] = true
			now[table] = append(now[table], chain.Name)
		}
		for _, name := range b.chains[f][table] {
			if !wanted[name] {
				c.Delete = append(c.Delete, name)
			}
		}
		for _, h := range s.Hooks {
			if h.Table == table && b.chains[f] == nil {
				c.Hook = append(c.Hook, h)
			}
		}
		list = append(list, c)
	}
	b.chains[f] = now
	return list
}

// forget ends every flow.
func (b *bench) forget() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("flush conntrack: %w", err)
	}
	return nil
}

// sent is a datagram and the link on which it comes to the node.
type sent struct {
	datagram
	in string
}

// exchange sends datagrams and returns the links on which they left the node, by id.
func (b *bench) exchange(list []sent) (map[uint32]string, error) {
	b.id++
	marker := sent{datagram{from: netip.MustParseAddr("198.51.100.1"), to: netip.MustParseAddr("198.51.100.2"), protocol: rule.UDP,
		sport: 9, dport: 9, id: b.id}, uplink}
	for _, s := range append(list, marker) {
		at := b.links[s.in]
		if err := unix.Sendto(b.socket, s.frame(at.mac), 0, &unix.SockaddrLinklayer{Ifindex: at.other}); err != nil {
			return nil, fmt.Errorf("send %s to %s over %s: %w", s.protocol, s.to, s.in, err)
		}
	}
	left := map[uint32]string{}
	frame := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(b.socket, frame, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("the marker sent after %d packets did not come back within %v: %w", len(list), limit, err)
		}
		id, ours := idOf(frame[:n])
		if !ours {
			continue
		}
		if id == marker.id {
			return left, nil
		}
		left[id] = b.names[from.(*unix.SockaddrLinklayer).Ifindex]
	}
}
