package podlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Check compares the kernel with what Create made. The error joins everything that is missing or different.
func Check(l Link) error {
	pod, err := ns.GetNS(l.NetNS)
	if err != nil {
		return fmt.Errorf("check link %s: %w", l.HostInterface, err)
	}
	defer pod.Close()
	errs := []error{checkHost(l)}
	errs = append(errs, pod.Do(func(ns.NetNS) error { return checkPod(l) }))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("check link %s: %w", l.HostInterface, err)
	}
	return nil
}

func checkHost(l Link) error {
	host, err := ask(l)
	if err != nil {
		return err
	}
	if host == nil {
		return fmt.Errorf("the node's end: there is no link %s", l.HostInterface)
	}
	var errs []error
	if host.alias != l.Key().String() {
		errs = append(errs, fmt.Errorf("the node's end belongs to %q", host.alias))
	}
	faults, err := hostFaults(l, host)
	for _, f := range faults {
		errs = append(errs, errors.New(f.what))
	}
	return errors.Join(append(errs, err)...)
}

func checkPod(l Link) error {
	link, err := netlink.LinkByName(l.IfName)
	if err != nil {
		return fmt.Errorf("the pod's end: %w", err)
	}
	// Plugins that follow in the list (tuning) may give the pod's end another MAC or MTU: those are theirs.
	var errs []error
	if link.Attrs().Flags&net.FlagUp == 0 {
		errs = append(errs, errors.New("the pod's end is down"))
	}
	addrs, err := netlink.AddrList(link, unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, want := range l.Addresses {
		found := false
		for _, a := range addrs {
			got, ok := netip.AddrFromSlice(a.IP)
			found = found || ok && got.Unmap() == want
		}
		if !found {
			errs = append(errs, fmt.Errorf("the pod's end does not have the address %s", want))
		}
		for _, dst := range destinations(l, want) {
			if !hasRoute(link.Attrs().Index, dst) && !(dst.Bits() > 0 && anyRoute(dst)) {
				errs = append(errs, fmt.Errorf("the pod has no route to %s over the link", dst))
			}
		}
	}
	return errors.Join(errs...)
}

// hasRoute looks for a route over a link in any table: the default route of a further interface is in one of its own.
func hasRoute(link int, dst netip.Prefix) bool {
	return routeTo(&netlink.Route{LinkIndex: link, Dst: ipNet(dst)}, netlink.RT_FILTER_OIF)
}

// anyRoute looks for a route over any link: where two interfaces are configured with one destination, the first has it.
func anyRoute(dst netip.Prefix) bool { return routeTo(&netlink.Route{Dst: ipNet(dst)}, 0) }

func routeTo(want *netlink.Route, filter uint64) bool {
	family := unix.AF_INET6
	if want.Dst.IP.To4() != nil {
		family = unix.AF_INET
	}
	found, err := netlink.RouteListFiltered(family, want, filter|netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	return err == nil && len(found) > 0
}
