package world

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// Addresses of the world, all IPv4.
var (
	NodeAddress    = netip.MustParseAddr("192.0.2.2")
	OutsideAddress = netip.MustParseAddr("192.0.2.1")
	PodRange       = netip.MustParsePrefix("10.244.0.0/20")
)

const (
	// NodeName is the node's name in the API.
	NodeName = "bench"
	// Outside is the sandbox of the machine outside.
	Outside = "outside"
	// StateDir is the plugin's and policyd's on the node that is the process's own network namespace.
	StateDir = "/run/postern"

	manifestsDir = "/run/manifests" // which policyd reads unless it is told otherwise
	programsDir  = "/run/iptables"  // iptables and its kin, of one backend
	cacheDir     = "/run/cni-cache"
)

// Node is a network namespace, as a node of a cluster.
type Node struct {
	Backend string // of iptables
	Bin     string // the folder of all programs
	Dir     string // the folder of logs
	Postern *Network

	netns               string // its path; empty: the process's own
	stateDir, manifests string
	started             int // policyds
}

// plan is the node's way to the world outside, in the words of ip(8).
const plan = `
ip link set lo up
ip link add uplink type veth peer name eth0 netns outside
ip addr add 192.0.2.2/24 dev uplink
ip link set uplink up
ip -n outside addr add 192.0.2.1/24 dev eth0
ip -n outside link set eth0 up
ip -n outside route add 10.244.0.0/20 via 192.0.2.2
ip route add default via 192.0.2.1
`

// New makes a node out of this process's network namespace. It has no pods yet, and no policyd.
func New(ctx context.Context, env table.Env, backend string) (*Node, error) {
	n := &Node{Backend: backend, Bin: env.Bin, Dir: env.Dir, stateDir: StateDir, manifests: manifestsDir}
	if err := makeFolders(n.manifests, n.stateDir, programsDir, env.Dir); err != nil {
		return nil, err
	}
	if err := linkPrograms(backend); err != nil {
		return nil, fmt.Errorf("make the node: %w", err)
	}
	if _, err := n.Sandbox(Outside); err != nil {
		return nil, err
	}
	if err := Run(ctx, plan); err != nil {
		return nil, fmt.Errorf("make the node: %w", err)
	}
	var err error
	n.Postern, err = n.Network("", n.Config(nil))
	return n, err
}

// Beside makes a further node, in a network namespace of its own: it has its address on lo, and no way outside. Sandboxes, and so
// their names, are all nodes'.
func (n *Node) Beside(ctx context.Context, name string) (*Node, error) {
	netns, err := n.Sandbox("node-" + name)
	if err != nil {
		return nil, err
	}
	other := &Node{Backend: n.Backend, Bin: n.Bin, Dir: filepath.Join(n.Dir, name), netns: netns,
		stateDir: StateDir + "-" + name, manifests: manifestsDir + "-" + name}
	if err := makeFolders(other.manifests, other.stateDir, other.Dir); err != nil {
		return nil, err
	}
	address := NodeAddress.String()
	err = other.In(func() error { return Run(ctx, "ip addr add "+address+"/32 dev lo") })
	if err != nil {
		return nil, fmt.Errorf("make the node %s: %w", name, err)
	}
	other.Postern, err = other.Network(netns, other.Config(map[string]any{"nodeAddresses": []string{address}}))
	return other, err
}

// Path of the node's network namespace; empty if it is the process's own.
func (n *Node) Path() string { return n.netns }

// In runs fn, and the processes that it starts, in the node's network namespace.
func (n *Node) In(fn func() error) error {
	if n.netns == "" {
		return fn()
	}
	return In(n.netns, fn)
}

func makeFolders(folders ...string) error {
	for _, dir := range folders {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make the node: %w", err)
		}
	}
	return nil
}

// Run runs commands, one a line, without a shell.
func Run(ctx context.Context, lines string) error {
	for line := range strings.Lines(lines) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.TrimSpace(line), err, out)
		}
	}
	return nil
}

// linkPrograms makes a folder in which iptables is that of a backend: what the peers run has no other way to choose.
func linkPrograms(backend string) error {
	for _, program := range []string{"iptables", "iptables-save", "iptables-restore"} {
		for _, family := range []string{"", "6"} {
			name := strings.Replace(program, "iptables", "ip"+family+"tables", 1)
			real, err := exec.LookPath(strings.Replace(name, "tables", "tables-"+backend, 1))
			if err != nil {
				return err
			}
			if err := os.Symlink(real, filepath.Join(programsDir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}
