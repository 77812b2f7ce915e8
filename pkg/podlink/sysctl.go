package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
)

// setting is one sysctl: a path below /proc/sys/net and its value. The kernel resolves /proc/sys/net in the network
// namespace of the thread that opens it.
type setting struct{ path, value string }

func (s setting) String() string { return "sysctl net." + strings.ReplaceAll(s.path, "/", ".") }

func (s setting) read() (string, error) {
	now, err := os.ReadFile("/proc/sys/net/" + s.path)
	return strings.TrimSpace(string(now)), err
}

// set writes what is not so already: in a container /proc/sys may be read-only and right.
func set(settings ...setting) error {
	var errs []error
	for _, s := range settings {
		now, err := s.read()
		if err == nil && now != s.value {
			err = os.WriteFile("/proc/sys/net/"+s.path, []byte(s.value), 0)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("set %s to %s: %w", s, s.value, err))
		}
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
func hostSettings(l Link) []setting {
	v4, v6 := "ipv4/conf/"+l.HostInterface+"/", "ipv6/conf/"+l.HostInterface+"/"
	settings := []setting{{v4 + "rp_filter", "1"}, {v4 + "accept_redirects", "0"}, {v4 + "send_redirects", "0"}}
	if without6() {
		return settings
	}
	settings = append(settings, setting{v6 + "accept_ra", "0"}, setting{v6 + "accept_redirects", "0"},
		setting{v6 + "accept_dad", "0"}, setting{v6 + "addr_gen_mode", "1"})
	if has6(l) {
		settings = append(settings, setting{v6 + "disable_ipv6", "0"})
	}
	return settings
}

// podSysctls spare the pod the delay of duplicate-address detection, on an address that nobody else can have, and advice
// about routes.
func podSysctls(l Link) error {
	if without6() {
		return nil
	}
	v6 := "ipv6/conf/" + l.IfName + "/"
	settings := []setting{{v6 + "accept_ra", "0"}, {v6 + "accept_dad", "0"}}
	if has6(l) {
		settings = append(settings, setting{v6 + "disable_ipv6", "0"})
	}
	return set(settings...)
}

// without6 reports a kernel that was started without IPv6.
func without6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return errors.Is(err, fs.ErrNotExist)
}

// Without these a node does not route, in either family.
var (
	forwarding4 = setting{"ipv4/ip_forward", "1"}
	forwarding6 = setting{"ipv6/conf/all/forwarding", "1"}
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
		if now, err := forwarding6.read(); err == nil && now == forwarding6.value {
			continue
		}
		uplink, err := Uplink(l.NodeAddresses, a.Is4())
		if err != nil {
			return err
		}
		if uplink != nil {
			listen := setting{"ipv6/conf/" + uplink.Attrs().Name + "/accept_ra", "2"}
			if now, err := listen.read(); err == nil && now == "1" {
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
