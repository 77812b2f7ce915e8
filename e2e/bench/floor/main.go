// Command floor is the bare kernel work of a pod's ADD, as a CNI plugin: it ends with the same link, addresses, routes,
// neighbours and settings as postern's pod of one IPv4 address has, and with its address in one set. No address is looked for,
// nothing is recorded or checked, nothing is taken back after a failure, and nobody guards the pod. It is there to be measured,
// not used.
//
// CNI_ARGS says what postern has to find out: ADDRESS is the pod's, NODE_ADDRESS the node's, SET an ipset of the type
// hash:net,iface. DEL takes away what ADD made.
package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/rule"
)

const mtu = 1500

// gateway is the pod's, as postern has it.
var gateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

// result is what the specification asks of ADD (result types, "Success").
const result = `{"cniVersion":"1.0.0","interfaces":[{"name":%q,"mac":%q},{"name":%q,"mac":%q,"sandbox":%q}],` +
	`"ips":[{"interface":1,"address":"%s/32","gateway":%q}],"routes":[{"dst":"0.0.0.0/0","gw":%q}],"dns":{}}` + "\n"

func main() {
	if err := run(os.Getenv("CNI_COMMAND"), os.Stdout); err != nil {
		fmt.Printf(`{"cniVersion":"1.0.0","code":999,"msg":%q}`+"\n", err)
		os.Exit(1)
	}
}

// pod is what the floor is told about one.
type pod struct {
	sandbox, ifName, hostName, set string
	address, node                  netip.Addr
	hostMAC, podMAC                net.HardwareAddr
}

// read takes a pod from the environment; its link and MACs are named after its address.
func read() (p pod, err error) {
	args := map[string]string{}
	for pair := range strings.SplitSeq(os.Getenv("CNI_ARGS"), ";") {
		key, value, _ := strings.Cut(pair, "=")
		args[key] = value
	}
	p = pod{sandbox: os.Getenv("CNI_NETNS"), ifName: os.Getenv("CNI_IFNAME"), set: args["SET"]}
	if p.node, err = netip.ParseAddr(args["NODE_ADDRESS"]); err != nil {
		return p, err
	}
	if p.address, err = netip.ParseAddr(args["ADDRESS"]); err != nil {
		return p, err
	}
	p.hostName = fmt.Sprintf("flr%x", p.address.AsSlice())
	p.hostMAC = append(net.HardwareAddr{0x02, 0}, p.address.AsSlice()...)
	p.podMAC = append(net.HardwareAddr{0x06, 0}, p.address.AsSlice()...)
	return p, nil
}

func run(command string, stdout io.Writer) error {
	runtime.LockOSThread() // it goes to the pod's namespace and back
	p, err := read()
	if err != nil {
		return err
	}
	switch command {
	case "ADD":
		if err := p.add(); err != nil {
			return err
		}
		_, err := fmt.Fprintf(stdout, result, p.hostName, p.hostMAC, p.ifName, p.podMAC, p.sandbox, p.address, gateway, gateway)
		return err
	case "DEL":
		return p.del()
	}
	return fmt.Errorf("%s: ADD and DEL are all there is", command)
}

func (p pod) add() error {
	node, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	sandbox, err := unix.Open(p.sandbox, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = p.hostName, mtu, p.hostMAC
	err = kernel.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: p.ifName, PeerHardwareAddr: p.podMAC, PeerMTU: mtu,
		PeerNamespace: netlink.NsFd(sandbox)})
	if err != nil {
		return fmt.Errorf("make the link: %w", err)
	}
	host, err := kernel.LinkByName(p.hostName)
	if err != nil {
		return err
	}
	if err := harden(host.Attrs().Index); err != nil {
		return fmt.Errorf("set the settings of the node's end: %w", err)
	}
	if err := without6(p.hostName); err != nil {
		return err
	}
	if err := kernel.LinkSetUp(host); err != nil {
		return fmt.Errorf("set the node's end up: %w", err)
	}
	if err := unix.Setns(sandbox, unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := p.inside(); err != nil {
		return fmt.Errorf("in the pod: %w", err)
	}
	if err := unix.Setns(node, unix.CLONE_NEWNET); err != nil {
		return err
	}
	if _, err := kernel.LinkByName(p.hostName); err != nil { // newer kernels let the node's end send from here on
		return err
	}
	if err := kernel.NeighSet(neighbour(host, p.address, p.podMAC)); err != nil {
		return err
	}
	if err := kernel.RouteAdd(&netlink.Route{LinkIndex: host.Attrs().Index, Dst: single(p.address), Scope: netlink.SCOPE_LINK,
		Src: p.node.AsSlice()}); err != nil {
		return fmt.Errorf("add the node's route: %w", err)
	}
	return p.join()
}

// inside is what is done in the pod's namespace.
func (p pod) inside() error {
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	link, err := kernel.LinkByName(p.ifName)
	if err != nil {
		return err
	}
	if err := kernel.LinkSetUp(link); err != nil {
		return fmt.Errorf("set the link up: %w", err)
	}
	if err := kernel.AddrAdd(link, &netlink.Addr{IPNet: single(p.address)}); err != nil {
		return fmt.Errorf("add the address: %w", err)
	}
	if err := kernel.NeighSet(neighbour(link, gateway, p.hostMAC)); err != nil {
		return err
	}
	index, src := link.Attrs().Index, p.address.AsSlice()
	for _, route := range []*netlink.Route{
		{LinkIndex: index, Dst: single(gateway), Scope: netlink.SCOPE_LINK, Src: src},
		{LinkIndex: index, Gw: gateway.AsSlice(), Src: src, Flags: int(netlink.FLAG_ONLINK)},
	} {
		if err := kernel.RouteAdd(route); err != nil {
			return fmt.Errorf("add the route %s: %w", route, err)
		}
	}
	return nil
}

// member is the pod's in the set.
func (p pod) member() rule.Entry {
	return rule.Entry{Prefix: netip.PrefixFrom(p.address, p.address.BitLen()), Iface: p.hostName}
}

func (p pod) join() error {
	sets, err := ipset.Open()
	if err != nil {
		return err
	}
	return sets.Add(p.set, p.member())
}

func (p pod) del() error {
	sets, err := ipset.Open()
	if err != nil {
		return err
	}
	if err := sets.Del(p.set, p.member()); err != nil {
		return err
	}
	link, err := netlink.LinkByName(p.hostName)
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

// Places of IPv4's settings (IPV4_DEVCONF_*, linux/ip.h) in the attribute that netlink has them in (linux/if_link.h).
const (
	inetConf        = 1 // IFLA_INET_CONF
	acceptRedirects = 4
	sendRedirects   = 6
	rpFilter        = 8
)

// harden has a link trust nothing over IPv4 that a pod sends, by one message.
func harden(index int) error {
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(index)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil)
	conf.AddRtAttr(rpFilter, nl.Uint32Attr(1))
	conf.AddRtAttr(acceptRedirects, nl.Uint32Attr(0))
	conf.AddRtAttr(sendRedirects, nl.Uint32Attr(0))
	request := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	request.AddData(message)
	request.AddData(spec)
	_, err := request.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// without6 takes IPv6 from a link: netlink has no way to.
func without6(link string) error {
	path := "/proc/sys/net/ipv6/conf/" + link + "/disable_ipv6"
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	if _, err := unix.Write(fd, []byte("1")); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return unix.Close(fd)
}

func neighbour(link netlink.Link, a netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: a.AsSlice(),
		HardwareAddr: mac}
}

func single(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }
