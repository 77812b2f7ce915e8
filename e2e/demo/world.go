package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/postern-cni/postern/e2e/isolate"
)

// Where the demo keeps its files, all on the private tmpfs.
const (
	stateDir     = "/run/postern"
	manifestsDir = "/run/manifests"
	cacheDir     = "/run/cni-cache"
	nodeNS       = "/proc/1/ns/net" // the demo's process is init, and its namespace the node
)

const (
	settleLimit = 20 * time.Second // for policyd to enforce an edited folder
	stopLimit   = 5 * time.Second  // for a process to end after SIGTERM
)

// laptop is the name of the machine outside whose networks the policies speak of.
const laptop = "laptop (outside)"

// The ports on which everybody listens, in the order of the two signs in a cell.
var ports = []uint16{80, 5432}

// party is somebody who connects or is connected to: a pod, a machine outside, or the node.
type party struct {
	Letter    string
	Name      string // a pod's namespace/name, else what it is
	NS        string // path of the network namespace
	Addresses []netip.Addr
	Listens   bool
	pod       *pod // nil but for pods
}

// world is the demo's node, its pods, and the machines around it.
type world struct {
	bin       string
	cluster   *cluster
	parties   []*party
	policyd   *exec.Cmd
	log       bytes.Buffer // policyd's; read once it has ended
	ended     chan struct{}
	listeners listeners
	list      *libcni.NetworkConfigList
	cni       *libcni.CNIConfig
}

// plan builds everything around the node, in the words of ip(8). The demo's own namespace is the node.
//
//	laptop 198.51.100.10 ─┐
//	                      router ── uplink 192.0.2.2 node ── pods 10.244.1.0/24
//	office 203.0.113.10 ──┘
const plan = `
ip link set lo up
ip link add uplink type veth peer name node netns router
ip addr add 192.0.2.2/24 dev uplink
ip addr add 2001:db8:2::2/64 dev uplink nodad
ip link set uplink up
ip -n router link set lo up
ip -n router addr add 192.0.2.1/24 dev node
ip -n router addr add 2001:db8:2::1/64 dev node nodad
ip -n router link set node up
ip route add default via 192.0.2.1
ip route add default via 2001:db8:2::1
ip -n router route add 10.244.1.0/24 via 192.0.2.2
ip -n router route add fd00:10:244:1::/64 via 2001:db8:2::2
ip -n router link add laptop type veth peer name eth0 netns laptop
ip -n router addr add 198.51.100.1/24 dev laptop
ip -n router addr add 2001:db8:a::1/64 dev laptop nodad
ip -n router link set laptop up
ip -n laptop link set lo up
ip -n laptop addr add 198.51.100.10/24 dev eth0
ip -n laptop addr add 2001:db8:a::10/64 dev eth0 nodad
ip -n laptop link set eth0 up
ip -n laptop route add default via 198.51.100.1
ip -n laptop route add default via 2001:db8:a::1
ip -n router link add office type veth peer name eth0 netns office
ip -n router addr add 203.0.113.1/24 dev office
ip -n router addr add 2001:db8:b::1/64 dev office nodad
ip -n router link set office up
ip -n office link set lo up
ip -n office addr add 203.0.113.10/24 dev eth0
ip -n office addr add 2001:db8:b::10/64 dev eth0 nodad
ip -n office link set eth0 up
ip -n office route add default via 203.0.113.1
ip -n office route add default via 2001:db8:b::1
`

// conflist is the network configuration that a cluster builder puts into /etc/cni/net.d.
const conflist = `{
  "cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "pods",
  "plugins": [{
    "type": "postern",
    "capabilities": {"portMappings": true},
    "stateDir": "` + stateDir + `",
    "iptablesBackend": "BACKEND",
    "ipam": {"ranges": [{"subnet": "10.244.1.0/24"}, {"subnet": "fd00:10:244:1::/64"}]}
  }]
}`

// addresses parses addresses that are known to be right.
func addresses(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

// buildWorld makes the node and its surroundings and starts policyd.
func buildWorld(ctx context.Context, bin, backend string) (*world, error) {
	if err := isolate.Enter(); err != nil {
		return nil, err
	}
	if err := nodad(); err != nil {
		return nil, err
	}
	for _, machine := range []string{"router", "laptop", "office"} {
		if out, err := exec.CommandContext(ctx, "ip", "netns", "add", machine).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip netns add %s: %w: %s", machine, err, out)
		}
		if err := in("/run/netns/"+machine, nodad); err != nil {
			return nil, err
		}
	}
	for line := range strings.Lines(plan) {
		if words := strings.Fields(line); len(words) > 0 {
			if out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("%s: %w: %s", strings.TrimSpace(line), err, out)
			}
		}
	}
	if err := in("/run/netns/router", forward); err != nil {
		return nil, fmt.Errorf("make the router forward: %w", err)
	}
	list, err := libcni.NetworkConfFromBytes([]byte(strings.Replace(conflist, "BACKEND", backend, 1)))
	if err != nil {
		return nil, fmt.Errorf("read the network configuration: %w", err)
	}
	w := &world{
		bin: bin, list: list, cluster: newCluster(), ended: make(chan struct{}),
		cni: libcni.NewCNIConfigWithCacheDir([]string{bin}, cacheDir, nil),
	}
	for i, p := range pods {
		w.parties = append(w.parties, &party{Letter: letter(i), Name: p.key(), NS: "/run/netns/" + p.Name, Listens: true, pod: p})
	}
	w.parties = append(w.parties,
		&party{Letter: letter(len(pods)), Name: laptop, NS: "/run/netns/laptop", Listens: true,
			Addresses: addresses("198.51.100.10", "2001:db8:a::10")},
		&party{Letter: letter(len(pods) + 1), Name: "office (outside)", NS: "/run/netns/office", Listens: true,
			Addresses: addresses("203.0.113.10", "2001:db8:b::10")},
		&party{Letter: "-", Name: "the node", NS: nodeNS, Addresses: addresses("192.0.2.2", "2001:db8:2::2")})
	if err := w.cluster.write(manifestsDir); err != nil {
		return nil, err
	}
	return w, w.startPolicyd(backend)
}

// nodad makes links that come up in the network namespace of the calling thread good for IPv6 at once. A link's own link-local
// address, from which neighbours are asked for, is of no use for its first two seconds otherwise (RFC 4862, 5.4).
func nodad() error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644)
}

// forward makes the network namespace of the calling thread a router: that is the one whose sysctls /proc/sys/net shows.
func forward() error {
	for _, sysctl := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+sysctl, []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func letter(i int) string { return string(rune('a' + i)) }

func (w *world) startPolicyd(backend string) error {
	w.policyd = exec.Command(filepath.Join(w.bin, "policyd"), "run", "--from", manifestsDir, "--state-dir", stateDir,
		"--iptables-backend", backend, "--listen", "127.0.0.1:0")
	w.policyd.Stdout, w.policyd.Stderr = &w.log, &w.log
	if err := w.policyd.Start(); err != nil {
		return fmt.Errorf("start policyd: %w", err)
	}
	go func() {
		defer close(w.ended)
		_ = w.policyd.Wait() // whoever misses it says so, with its log
	}()
	return nil
}

// close ends policyd; what it wrote to the kernel goes with the namespace.
func (w *world) close() {
	w.listeners.close()
	if w.policyd == nil || w.policyd.Process.Signal(syscall.SIGTERM) != nil {
		return
	}
	select {
	case <-w.ended:
	case <-time.After(stopLimit):
		_ = w.policyd.Process.Kill() // the end of the demo, its init, ends it in any case
	}
}

// attachAll makes a sandbox for each pod, attaches it as a container runtime does, and lets everybody listen.
func (w *world) attachAll(ctx context.Context) error {
	if err := w.settle(ctx); err != nil {
		return err
	}
	for _, p := range w.parties {
		if p.pod == nil {
			continue
		}
		for _, args := range [][]string{{"netns", "add", p.pod.Name}, {"-n", p.pod.Name, "link", "set", "lo", "up"}} {
			if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("make a sandbox for %s: %w: %s", p.Name, err, out)
			}
		}
		result, err := w.attach(ctx, p)
		if err != nil {
			return fmt.Errorf("attach %s: %w", p.Name, err)
		}
		for _, ip := range result.IPs {
			addr, _ := netip.AddrFromSlice(ip.Address.IP)
			p.Addresses = append(p.Addresses, addr.Unmap())
		}
		p.pod.addresses = p.Addresses // as kubelet writes them into the pod's status
	}
	for _, p := range w.parties {
		if p.Listens {
			if err := w.listeners.open(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// attach is the runtime's ADD.
func (w *world) attach(ctx context.Context, p *party) (*types100.Result, error) {
	rt := &libcni.RuntimeConf{ContainerID: "sandbox-" + p.pod.Name, NetNS: p.NS, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.pod.Namespace}, {"K8S_POD_NAME", p.pod.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", "sandbox-" + p.pod.Name}, {"K8S_POD_UID", p.pod.uid()},
	}}
	if p.pod.HostPort != 0 {
		rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{
			{"hostPort": p.pod.HostPort, "containerPort": ports[0], "protocol": "tcp"},
		}}
	}
	result, err := w.cni.AddNetworkList(ctx, w.list, rt)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(result)
}

// enforce writes the manifests and waits until policyd enforces them.
func (w *world) enforce(ctx context.Context) error {
	if err := w.cluster.write(manifestsDir); err != nil {
		return err
	}
	return w.settle(ctx)
}

// settle waits until what the folder holds is in force.
func (w *world) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		status := exec.CommandContext(ctx, filepath.Join(w.bin, "policyd"), "status", "--wait", "--state-dir", stateDir)
		out, err := status.CombinedOutput()
		if err == nil {
			return nil
		}
		select {
		case <-w.ended:
			return fmt.Errorf("policyd has ended: %s", w.log.String())
		case <-ctx.Done():
			return fmt.Errorf("wait for policyd: %w: %s", err, out)
		case <-time.After(20 * time.Millisecond): // it has only just been started: no socket yet
		}
	}
}

// in runs fn in a network namespace.
func in(path string, fn func() error) error {
	return ns.WithNetNSPath(path, func(ns.NetNS) error { return fn() })
}
