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
	// StateDir is the plugin's and policyd's; Manifests the folder that policyd reads unless it is told otherwise.
	StateDir  = "/run/postern"
	Manifests = "/run/manifests"

	programsDir = "/run/iptables" // iptables and its kin, of one backend
	cacheDir    = "/run/cni-cache"
)

// Node is this process's network namespace, as a node of a cluster.
type Node struct {
	Backend string // of iptables
	Bin     string // the folder of all programs
	Dir     string // the folder of logs
	Postern *Network

	started int // policyds
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
	n := &Node{Backend: backend, Bin: env.Bin, Dir: env.Dir}
	for _, dir := range []string{Manifests, StateDir, programsDir, env.Dir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make the node: %w", err)
		}
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
