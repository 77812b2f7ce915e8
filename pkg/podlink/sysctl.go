package podlink

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"sync"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// set writes what is not so already.
func set(settings ...sysctl.Setting) error {
	var errs []error
	for _, s := range settings {
		_, err := s.Set()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func has6(l Link) bool {
	for _, a := range l.Addresses {
		if a.Is6() {
			return true
		}
	}
	return false
}

// hostSettings make the node's end trust nothing that a pod sends; they come before the link is up.
func hostSettings(l Link) []sysctl.Setting {
	v4, v6 := "ipv4/conf/"+l.HostInterface+"/", "ipv6/conf/"+l.HostInterface+"/"
	settings := []sysctl.Setting{sysctl.Of(v4+"rp_filter", "1"), sysctl.Of(v4+"accept_redirects", "0"),
		sysctl.Of(v4+"send_redirects", "0")}
	if without6() {
		return settings
	}
	if !has6(l) { // nobody has anything to say to a pod without IPv6, nor the pod to the node
		return append(settings, sysctl.Of(v6+"disable_ipv6", "1"))
	}
	return append(settings, sysctl.Of(v6+"accept_ra", "0"), sysctl.Of(v6+"accept_redirects", "0"),
		sysctl.Of(v6+"accept_dad", "0"), sysctl.Of(v6+genMode, "1"), sysctl.Of(v6+"disable_ipv6", "0"))
}

// podSettings spare a pod with IPv6 the delay of duplicate-address detection, on an address that nobody else can have, and advice
// about routes. A pod without has nobody at the other end who would speak IPv6.
func podSettings(l Link) []sysctl.Setting {
	if !has6(l) || without6() {
		return nil
	}
	v6 := "ipv6/conf/" + l.IfName + "/"
	return []sysctl.Setting{sysctl.Of(v6+"accept_ra", "0"), sysctl.Of(v6+"accept_dad", "0"), sysctl.Of(v6+"disable_ipv6", "0")}
}

// without6 reports a kernel that was started without IPv6.
var without6 = sync.OnceValue(func() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return errors.Is(err, fs.ErrNotExist)
})

// Without these a node does not route, in either family.
var (
	forwarding4 = sysctl.Of("ipv4/ip_forward", "1")
	forwarding6 = sysctl.Of("ipv6/conf/all/forwarding", "1")
)

// Forward lets the node route, in the families of some pods' addresses.
func Forward(pods, nodeAddresses []netip.Addr) error {
	return forwarding(Link{Attachment: &attachment.Attachment{Addresses: pods, NodeAddresses: nodeAddresses}})
}

// forwarding lets the node route, in the families that the pod has. Forwarding makes an interface with accept_ra=1 deaf to
// router advertisements (Documentation/networking/ip-sysctl), so the uplink, if it listens to them, is told to go on first.
func forwarding(l Link) error {
	for _, a := range l.Addresses {
		if a.Is4() {
			if err := set(forwarding4); err != nil {
				return err
			}
			continue
		}
		if now, err := forwarding6.Read(); err == nil && now == forwarding6.Value {
			continue
		}
		n, err := OpenNode()
		if err != nil {
			return err
		}
		uplink, err := n.Uplink(l.NodeAddresses, a.Is4())
		n.Close()
		if err != nil {
			return err
		}
		if uplink != nil {
			listen := sysctl.Of("ipv6/conf/"+uplink.Attrs().Name+"/accept_ra", "2")
			if now, err := listen.Read(); err == nil && now == "1" {
				if err := set(listen); err != nil {
					return err
				}
			}
		}
		if err := set(forwarding6); err != nil {
			return err
		}
	}
	return nil
}
