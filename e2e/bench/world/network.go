package world

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/postern-cni/postern/pkg/attach"
	"github.com/postern-cni/postern/pkg/cniconf"
)

// Network is a network configuration list, and the libcni that calls its plugins for pods.
type Network struct {
	list *libcni.NetworkConfigList
	cni  *libcni.CNIConfig
	node string // path of the network namespace in which plugins run; empty: the process's own
}

// Config is postern's network configuration list, as a cluster builder writes it. Keys of more are merged into the plugin's own.
func (n *Node) Config(more map[string]any) map[string]any {
	postern := map[string]any{
		"type":            "postern",
		"capabilities":    map[string]any{"portMappings": true},
		"stateDir":        n.stateDir,
		"iptablesBackend": n.Backend,
		"ipam":            map[string]any{"ranges": []map[string]any{{"subnet": PodRange.String()}}},
	}
	maps.Copy(postern, more)
	return List("pods", postern)
}

// List is a network configuration list of some plugins.
func List(name string, plugins ...map[string]any) map[string]any {
	return map[string]any{"cniVersion": "1.0.0", "name": name, "plugins": plugins}
}

// Network reads a network configuration list. Its plugins run in the network namespace at a path, or in the process's own if that
// is empty.
func (n *Node) Network(node string, list map[string]any) (*Network, error) {
	text, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	parsed, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return nil, fmt.Errorf("read the network configuration list %s: %w", text, err)
	}
	run := programs{&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}}
	return &Network{list: parsed, node: node, cni: n.libcni(parsed.Name, run)}, nil
}

func (n *Node) libcni(network string, run invoke.Exec) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir([]string{n.Bin}, filepath.Join(cacheDir, network), run)
}

// Standing is postern's network with ADD done in this process, which does the same to the node in less time: for many pods whose
// attachment nobody measures.
func (n *Node) Standing() *Network {
	w := *n.Postern
	w.cni = n.libcni(w.list.Name, new(standing))
	return &w
}

// standing is the plugin without a process of its own.
type standing struct{ invoke.DefaultExec }

func (*standing) ExecPlugin(ctx context.Context, _ string, stdin []byte, environ []string) ([]byte, error) {
	vars := map[string]string{}
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	if command := vars["CNI_COMMAND"]; command != "ADD" {
		return nil, fmt.Errorf("%s of a standing pod: only ADD is done in this process", command)
	}
	cfg, err := cniconf.Parse(stdin, cniconf.Environment{Command: "ADD", ContainerID: vars["CNI_CONTAINERID"],
		NetNS: vars["CNI_NETNS"], IfName: vars["CNI_IFNAME"], Args: vars["CNI_ARGS"]})
	if err != nil {
		return nil, err
	}
	result, err := new(attach.Plugin).Add(ctx, cfg)
	if err != nil {
		return nil, err
	}
	said, err := result.GetAsVersion(cfg.CNIVersion)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = said.PrintTo(&out)
	return out.Bytes(), err
}

// programs runs plugins with the node's iptables first in their PATH.
type programs struct{ *invoke.DefaultExec }

func (p programs) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	environ = append(environ, "PATH="+programsDir+":"+os.Getenv("PATH"))
	return p.DefaultExec.ExecPlugin(ctx, path, stdin, environ)
}

// Add is the runtime's ADD for a pod whose sandbox is there, and the addresses that the pod has got. Args are further CNI_ARGS.
func (w *Network) Add(ctx context.Context, p Pod, args ...[2]string) (addrs []netip.Addr, err error) {
	var result types.Result
	err = w.do(func() (err error) {
		result, err = w.cni.AddNetworkList(ctx, w.list, p.runtimeConf(args))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ADD of pod %s in network %s: %w", p.Key(), w.list.Name, err)
	}
	parsed, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("read the result of ADD of pod %s: %w", p.Key(), err)
	}
	for _, ip := range parsed.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return addrs, nil
}

// Del is the runtime's DEL. The sandbox stays.
func (w *Network) Del(ctx context.Context, p Pod, args ...[2]string) error {
	err := w.do(func() error { return w.cni.DelNetworkList(ctx, w.list, p.runtimeConf(args)) })
	if err != nil {
		return fmt.Errorf("DEL of pod %s in network %s: %w", p.Key(), w.list.Name, err)
	}
	return nil
}

// do runs fn where the plugins are to run: a child process has the network namespace of the thread that starts it.
func (w *Network) do(fn func() error) error {
	if w.node == "" {
		return fn()
	}
	return In(w.node, fn)
}

// In runs fn, and the processes that it starts, in the network namespace at a path.
func In(path string, fn func() error) error {
	return ns.WithNetNSPath(path, func(ns.NetNS) error { return fn() })
}
