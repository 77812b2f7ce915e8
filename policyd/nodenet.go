package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/utils"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/engine"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nodenet"
	"github.com/postern-cni/postern/pkg/rule"
)

// nodeOptions are the flags of run that are about node networking.
type nodeOptions struct {
	on             bool
	tunnel         string
	port, vni      uint
	keep           string
	conf, network  string
	plugin, binDir string
	allowIPVS      bool
	families       string
}

func (o *nodeOptions) register(flags *flag.FlagSet) {
	flags.BoolVar(&o.on, "node-network", false, "route pods to other nodes, masquerade what leaves the cluster, write\n"+
		"the CNI configuration")
	flags.StringVar(&o.tunnel, "tunnel", string(nodenet.TunnelAuto), "`when` pods reach other nodes through VXLAN: auto (where "+
		"nodes share no link), always, never; the same on every node")
	flags.UintVar(&o.port, "tunnel-port", nodenet.DefaultPort, "UDP `port` of the tunnel, the same on every node")
	flags.UintVar(&o.vni, "tunnel-vni", nodenet.DefaultVNI, "VXLAN network `identifier` of the tunnel, the same on every node")
	flags.StringVar(&o.keep, "no-masquerade", "", "`list` of prefixes outside of the cluster that see pods' own addresses")
	flags.StringVar(&o.conf, "cni-conf", defaultConflist, "`file` to write for the container runtime; empty "+
		"for none")
	flags.StringVar(&o.network, "cni-network", "pods", "`name` of the network in it; addresses are kept by it")
	flags.StringVar(&o.plugin, "cni-plugin", "", "the plugin's program, a `file` to install; empty for none")
	flags.StringVar(&o.binDir, "cni-bin-dir", defaultBinDir, "`folder` to install it in")
	flags.StringVar(&o.families, "families", "", "`list` of the families that pods must have, ipv4, ipv6; the node is not ready "+
		"without.\nDefault: those of its podCIDRs")
	flags.BoolVar(&o.allowIPVS, "allow-ipvs", false, "become ready beside kube-proxy in IPVS mode, which carries traffic to\n"+
		"Services around policies")
}

func (o *nodeOptions) check() (problems []string) {
	switch nodenet.Tunnel(o.tunnel) {
	case nodenet.TunnelAuto, nodenet.TunnelAlways, nodenet.TunnelNever:
	default:
		problems = append(problems, fmt.Sprintf("--tunnel %q: auto, always and never are known", o.tunnel))
	}
	if o.port < 1 || o.port > 65535 {
		problems = append(problems, fmt.Sprintf("--tunnel-port %d: must be between 1 and 65535", o.port))
	}
	if o.vni < 1 || o.vni >= 1<<24 {
		problems = append(problems, fmt.Sprintf("--tunnel-vni %d: must be between 1 and %d", o.vni, 1<<24-1))
	}
	if _, err := prefixes(o.keep); err != nil {
		problems = append(problems, fmt.Sprintf("--no-masquerade: %v", err))
	}
	if _, err := families(o.families); err != nil {
		problems = append(problems, fmt.Sprintf("--families: %v", err))
	}
	for _, f := range [][2]string{{"cni-conf", o.conf}, {"cni-bin-dir", o.binDir}} {
		if f[1] != "" && !filepath.IsAbs(f[1]) {
			problems = append(problems, fmt.Sprintf("--%s %q: must be an absolute path", f[0], f[1]))
		}
	}
	if utils.ValidateNetworkName(o.network) != nil {
		problems = append(problems, fmt.Sprintf("--cni-network %q: letters, digits, '_', '.' and '-' are allowed", o.network))
	}
	if s, err := os.Stat(o.plugin); o.plugin != "" && (err != nil || !s.Mode().IsRegular()) {
		problems = append(problems, fmt.Sprintf("--cni-plugin %q: not a file", o.plugin))
	}
	return problems
}

// words are those of a list with commas.
func words(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
}

func families(text string) (list []rule.Family, err error) {
	known := map[string]rule.Family{"ipv4": rule.IPv4, "ipv6": rule.IPv6}
	var errs []error
	for _, word := range words(text) {
		if _, ok := known[word]; !ok {
			errs = append(errs, fmt.Errorf("%q: ipv4 and ipv6 are known", word))
		}
		list = append(list, known[word])
	}
	return list, errors.Join(errs...)
}

func prefixes(text string) (list []netip.Prefix, err error) {
	var errs []error
	for _, word := range words(text) {
		p, err := netip.ParsePrefix(word)
		if err != nil || p.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("%q: prefixes such as 192.0.2.0/24 are allowed, with commas between", word))
		}
		list = append(list, p.Masked())
	}
	return list, errors.Join(errs...)
}

// nodePart is what of policyd is about the node itself.
type nodePart interface {
	Run(ctx context.Context) error
	Ready() error
	Findings() []nodenet.Finding
}

// node returns what keeps the node's network or, where that is somebody else's, looks out for what would defeat policies.
func (o *options) nodePart(
	source cluster.Source, backend iptables.Backend, guarded func() error, teller nodenet.Teller, m *metrics.Metrics, log *slog.Logger,
) (nodePart, error) {
	c := nodenet.Config{Metrics: m, Log: log, Teller: teller, AllowIPVS: o.nodes.allowIPVS}
	if !o.nodes.on {
		return nodenet.NewLookout(c), nil
	}
	keep, err := prefixes(o.nodes.keep)
	if err != nil {
		return nil, err
	}
	need, err := families(o.nodes.families)
	if err != nil {
		return nil, err
	}
	c.Source, c.Node, c.Guarded, c.RepairInterval = source, o.node, guarded, o.repair
	c.Options = nodenet.Options{Tunnel: nodenet.Tunnel(o.nodes.tunnel), Port: uint16(o.nodes.port), VNI: int(o.nodes.vni),
		KeepSource: keep, Families: need}
	c.Runtime = nodenet.Runtime{Network: o.nodes.network, StateDir: o.stateDir, Backend: backend}
	c.Conflist, c.Plugin, c.BinDir = o.nodes.conf, o.nodes.plugin, o.nodes.binDir
	return nodenet.NewDaemon(c)
}

// nodeStatus is the answer of the running policyd to engine.AskStatus: what the engine says, and what there is to say of the node.
type nodeStatus struct {
	engine.Status
	// NodeNotReady says why the node is not ready to take pods; empty if it is.
	NodeNotReady string            `json:"nodeNotReady,omitempty"`
	Findings     []nodenet.Finding `json:"findings,omitempty"`
}

// answers adds the node's part to the engine's answers.
type answers struct {
	*engine.Engine
	node nodePart
}

// Ask implements gate.Handler.
func (a answers) Ask(ctx context.Context, question string, body json.RawMessage) (any, error) {
	reply, err := a.Engine.Ask(ctx, question, body)
	s, ok := reply.(engine.Status)
	if err != nil || !ok {
		return reply, err
	}
	full := nodeStatus{Status: s, Findings: a.node.Findings()}
	if err := a.node.Ready(); err != nil {
		full.NodeNotReady = err.Error()
	}
	return full, nil
}
