// Command postern is the CNI plugin: a container runtime calls it for each pod (CNI specification 0.3.1 to 1.1.0).
package main

import (
	"context"
	"runtime"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/postern-cni/postern/pkg/attach"
	"github.com/postern-cni/postern/pkg/cniconf"
)

// version is set by the linker.
var version = "devel"

func main() {
	runtime.LockOSThread() // network namespaces belong to threads
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    add,
		Del:    func(args *skel.CmdArgs) error { return del(args, new(attach.Plugin)) },
		Check:  func(args *skel.CmdArgs) error { return with(args, "CHECK", new(attach.Plugin).Check) },
		Status: func(args *skel.CmdArgs) error { return node(args, new(attach.Plugin).Status) },
		GC:     func(args *skel.CmdArgs) error { return node(args, new(attach.Plugin).GC) },
	}, cniversion.PluginSupports(cniconf.SupportedVersions()...), "CNI plugin postern "+version)
}

func add(args *skel.CmdArgs) error {
	return with(args, "ADD", func(ctx context.Context, cfg *cniconf.Config) error {
		result, err := new(attach.Plugin).Add(ctx, cfg)
		if err != nil {
			return err
		}
		return types.PrintResult(result, cfg.CNIVersion)
	})
}

func environment(args *skel.CmdArgs, command string) cniconf.Environment {
	return cniconf.Environment{Command: command, ContainerID: args.ContainerID, NetNS: args.Netns, IfName: args.IfName, Args: args.Args}
}

func with(args *skel.CmdArgs, command string, do func(context.Context, *cniconf.Config) error) error {
	cfg, err := cniconf.Parse(args.StdinData, environment(args, command))
	if err != nil {
		return err
	}
	return do(context.Background(), cfg)
}

// del goes on with what of the configuration is usable: what was attached must go.
func del(args *skel.CmdArgs, p *attach.Plugin) error {
	cfg, err := cniconf.Parse(args.StdinData, environment(args, "DEL"))
	if err != nil && (cfg.Key().Check() != nil || cfg.Name == "") {
		return err
	}
	return p.Del(context.Background(), cfg)
}

func node(args *skel.CmdArgs, do func(context.Context, *cniconf.Config) error) error {
	cfg, err := cniconf.ParseNetwork(args.StdinData)
	if err != nil {
		return err
	}
	return do(context.Background(), cfg)
}
