package world

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"
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
	return &Network{list: parsed, node: node,
		cni: libcni.NewCNIConfigWithCacheDir([]string{n.Bin}, filepath.Join(cacheDir, parsed.Name), run)}, nil
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
