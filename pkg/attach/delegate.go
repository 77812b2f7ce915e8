package attach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/cniconf"
)

// Another ipam.type is run as a plugin (CNI specification, section 4): found in CNI_PATH, with this plugin's own
// configuration and environment.

func (add *adding) delegateAdd(ctx context.Context) ([]netip.Addr, error) {
	name := add.cfg.IPAM.Type
	raw, err := invoke.DelegateAdd(ctx, name, add.cfg.Stdin, nil)
	if err != nil {
		return nil, fmt.Errorf("ADD of the ipam plugin %s: %w", name, err)
	}
	if add.ipam, err = types100.NewResultFromResult(raw); err != nil {
		return nil, fmt.Errorf("result of the ipam plugin %s: %w", name, err)
	}
	addrs, err := addressesOf(add.ipam)
	if err != nil {
		return nil, fmt.Errorf("result of the ipam plugin %s: %w", name, err)
	}
	for _, r := range add.ipam.Routes {
		if dst, ok := netip.AddrFromSlice(r.Dst.IP); ok {
			ones, _ := r.Dst.Mask.Size()
			if ones > 0 { // the default route is there in any case
				add.cfg.IPAM.Routes = append(add.cfg.IPAM.Routes, netip.PrefixFrom(dst.Unmap(), ones))
			}
		}
	}
	return addrs, nil
}

// addressesOf takes the addresses of a result: at least one, and at most one of each family, for a pod has no more.
func addressesOf(result *types100.Result) (addrs []netip.Addr, err error) {
	seen := map[bool]bool{}
	for _, ip := range result.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, fmt.Errorf("%v is no address", ip.Address.IP)
		}
		if a = a.Unmap(); seen[a.Is4()] {
			return nil, fmt.Errorf("%s is a second address of its family; a pod has one of each", a)
		}
		seen[a.Is4()] = true
		addrs = append(addrs, a)
	}
	if len(addrs) == 0 {
		return nil, errors.New("it has no address")
	}
	return addrs, nil
}

// delegateDel says which container is meant by itself, for it is called from GC too, whose environment names none.
func delegateDel(ctx context.Context, cfg *cniconf.Config) error {
	args := &invoke.Args{Command: "DEL", ContainerID: cfg.ContainerID, NetNS: cfg.NetNS, IfName: cfg.IfName,
		PluginArgsStr: os.Getenv("CNI_ARGS"), Path: os.Getenv("CNI_PATH")}
	path, err := invoke.FindInPath(cfg.IPAM.Type, filepath.SplitList(args.Path))
	if err == nil {
		err = invoke.ExecPluginWithoutResult(ctx, path, cfg.Stdin, args, nil)
	}
	return named(cfg, "DEL", err)
}

func delegateCheck(ctx context.Context, cfg *cniconf.Config) error {
	return named(cfg, "CHECK", invoke.DelegateCheck(ctx, cfg.IPAM.Type, cfg.Stdin, nil))
}

func delegateStatus(ctx context.Context, cfg *cniconf.Config) error {
	return named(cfg, "STATUS", invoke.DelegateStatus(ctx, cfg.IPAM.Type, cfg.Stdin, nil))
}

func delegateGC(ctx context.Context, cfg *cniconf.Config) error {
	return named(cfg, "GC", invoke.DelegateGC(ctx, cfg.IPAM.Type, cfg.Stdin, nil))
}

func named(cfg *cniconf.Config, verb string, err error) error {
	if err != nil {
		return fmt.Errorf("%s of the ipam plugin %s: %w", verb, cfg.IPAM.Type, err)
	}
	return nil
}
