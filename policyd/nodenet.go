package main

import (
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
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nodenet"
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

// prefixes reads a list with commas.
func prefixes(text string) (list []netip.Prefix, err error) {
	var errs []error
	for word := range strings.SplitSeq(text, ",") {
		if word = strings.TrimSpace(word); word == "" {
			continue
		}
		p, err := netip.ParsePrefix(word)
		if err != nil || p.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("%q: prefixes such as 192.0.2.0/24 are allowed, with commas between", word))
		}
		list = append(list, p.Masked())
	}
	return list, errors.Join(errs...)
}

// daemon returns what keeps the node's network; nil where that is somebody else's.
func (o *options) daemon(
	source cluster.Source, backend iptables.Backend, guarded func() error, m *metrics.Metrics, log *slog.Logger,
) (*nodenet.Daemon, error) {
	if !o.nodes.on {
		return nil, nil
	}
	keep, err := prefixes(o.nodes.keep)
	if err != nil {
		return nil, err
	}
	return nodenet.NewDaemon(nodenet.Config{
		Source: source, Node: o.node,
		Options: nodenet.Options{Tunnel: nodenet.Tunnel(o.nodes.tunnel), Port: uint16(o.nodes.port), VNI: int(o.nodes.vni),
			KeepSource: keep},
		Runtime:  nodenet.Runtime{Network: o.nodes.network, StateDir: o.stateDir, Backend: backend},
		Conflist: o.nodes.conf, Plugin: o.nodes.plugin, BinDir: o.nodes.binDir, AllowIPVS: o.nodes.allowIPVS,
		Guarded: guarded, RepairInterval: o.repair, Metrics: m, Log: log,
	})
}

// both is ready when all are; a nil daemon always is.
func both(guarded func() error, d *nodenet.Daemon) func() error {
	if d == nil {
		return guarded
	}
	return func() error { return errors.Join(guarded(), d.Ready()) }
}
