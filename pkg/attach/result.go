package attach

import (
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/podlink"
)

// result tells the runtime what the container has now: what was there before this plugin, and then what it made.
func (add *adding) result() *types100.Result {
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	if prev := add.cfg.PrevResult; prev != nil {
		*result = *prev
	}
	sandbox := len(result.Interfaces) + 1
	result.Interfaces = append(result.Interfaces, interfaces(add.a)...)
	for _, a := range add.a.Addresses {
		result.IPs = append(result.IPs, &types100.IPConfig{
			Interface: types100.Int(sandbox),
			Address:   network(netip.PrefixFrom(a, a.BitLen())),
			Gateway:   podlink.Gateway(a).AsSlice(),
		})
	}
	for _, dst := range add.routes {
		result.Routes = append(result.Routes, &types.Route{Dst: network(dst), GW: podlink.Gateway(dst.Addr()).AsSlice()})
	}
	switch {
	case !add.cfg.DNS.IsEmpty():
		result.DNS = add.cfg.DNS
	case add.ipam != nil && !add.ipam.DNS.IsEmpty():
		result.DNS = add.ipam.DNS
	}
	return result
}

func interfaces(a *attachment.Attachment) []*types100.Interface {
	return []*types100.Interface{
		{Name: a.HostInterface, Mac: a.HostMAC, Mtu: a.MTU},
		{Name: a.IfName, Mac: a.PodMAC, Mtu: a.MTU, Sandbox: a.NetNS},
	}
}

func network(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
