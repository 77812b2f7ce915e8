package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// setting is one sysctl: a path below /proc/sys/net and its value. The kernel resolves /proc/sys/net in the network
// namespace of the thread that opens it.
type setting struct{ path, value string }

// set writes what is not so already: in a container /proc/sys may be read-only and right.
func set(settings ...setting) error {
	var errs []error
	for _, s := range settings {
		file := "/proc/sys/net/" + s.path
		now, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(now)) != s.value {
			err = os.WriteFile(file, []byte(s.value), 0)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("set sysctl net.%s to %s: %w", strings.ReplaceAll(s.path, "/", "."), s.value, err))
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

// hostSysctls makes the node's end trust nothing that a pod sends; the link is still down.
func hostSysctls(l Link) error {
	v4, v6 := "ipv4/conf/"+l.HostInterface+"/", "ipv6/conf/"+l.HostInterface+"/"
	err := set(setting{v4 + "rp_filter", "1"}, setting{v4 + "accept_redirects", "0"}, setting{v4 + "send_redirects", "0"})
	if without6() {
		return err
	}
	six := []setting{{v6 + "accept_ra", "0"}, {v6 + "accept_redirects", "0"}, {v6 + "accept_dad", "0"}, {v6 + "addr_gen_mode", "1"}}
	if has6(l) {
		six = append(six, setting{v6 + "disable_ipv6", "0"})
	}
	return errors.Join(err, set(six...))
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

// forwarding lets the node route, in the families that the pod has. Forwarding makes an interface with accept_ra=1 deaf to
// router advertisements (Documentation/networking/ip-sysctl), so the uplink, if it listens to them, is told to go on first.
func forwarding(l Link) error {
	for _, a := range l.Addresses {
		if a.Is4() {
			if err := set(setting{"ipv4/ip_forward", "1"}); err != nil {
				return err
			}
			continue
		}
		const all = "ipv6/conf/all/forwarding"
		if now, err := os.ReadFile("/proc/sys/net/" + all); err == nil && strings.TrimSpace(string(now)) == "1" {
			continue
		}
		uplink, err := Uplink(l.NodeAddresses, a.Is4())
		if err != nil {
			return err
		}
		if uplink != nil {
			name := "ipv6/conf/" + uplink.Attrs().Name + "/accept_ra"
			if now, err := os.ReadFile("/proc/sys/net/" + name); err == nil && strings.TrimSpace(string(now)) == "1" {
				if err := set(setting{name, "2"}); err != nil {
					return err
				}
			}
		}
		if err := set(setting{all, "1"}); err != nil {
			return err
		}
	}
	return nil
}
