package podlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
)

// Restore puts back what somebody took away or changed on the node's side of an attachment: the state and settings of the
// node's end, its addresses, the routes and neighbours of the pod. It returns in words what was wrong; where nothing was,
// nothing is written. A link that is not there, or that belongs to another attachment, is not touched and no error.
//
// The caller holds the lock of the host interface and has found the record under it; or an ADD or DEL at work would look like
// damage.
func Restore(a *attachment.Attachment) (restored []string, err error) {
	// To mend one thing may take away another: a link's MAC its neighbours.
	const rounds = 3
	l := Link{Attachment: a}
	failed := func(err error) error { return fmt.Errorf("restore link %s: %w", l.HostInterface, err) }
	for range rounds {
		host, err := own(l)
		if err != nil {
			return restored, failed(err)
		}
		if host == nil {
			return restored, nil
		}
		faults, err := hostFaults(l, host)
		if err == nil && len(faults) == 0 {
			return restored, nil
		}
		errs := []error{err}
		for _, f := range faults {
			if err := f.mend(); err != nil {
				errs = append(errs, err)
				continue
			}
			restored = append(restored, f.what)
		}
		if err := errors.Join(errs...); err != nil {
			if host, _ := own(l); host == nil {
				return restored, nil // it went meanwhile
			}
			return restored, failed(err)
		}
	}
	host, err := own(l)
	if err != nil || host == nil {
		return restored, err
	}
	if faults, err := hostFaults(l, host); err != nil || len(faults) > 0 {
		if err == nil {
			err = errors.New(faults[0].what)
		}
		return restored, failed(fmt.Errorf("set right %d times, and still: %w; see what else sets it", rounds, err))
	}
	return restored, nil
}

// own is the node's end; nil if it is not there or is not the attachment's.
func own(l Link) (*end, error) {
	host, err := ask(l)
	if err != nil || host == nil || host.alias != l.Key().String() {
		return nil, err
	}
	return host, nil
}

// fault is something that is not as Create made it.
type fault struct {
	what string
	mend func() error
}

// hostFaults compares the node's side with what Create made of it, in the order in which it is to be mended.
func hostFaults(l Link, host *end) ([]fault, error) {
	routes, err := routeFaults(l, host)
	return slices.Concat(settingFaults(l, host), linkFaults(l, host), addressFaults(l, host), neighbourFaults(l, host), routes), err
}

func settingFaults(l Link, host *end) (faults []fault) {
	settings := hostSettings(l)
	for _, a := range l.Addresses {
		if a.Is4() {
			settings = append(settings, forwarding4)
		} else {
			settings = append(settings, forwarding6)
		}
	}
	for _, s := range settings {
		now, err := host.setting(s)
		if err == nil && now == s.Value {
			continue
		}
		mend := func() error { return set(s) }
		if s == forwarding4 || s == forwarding6 {
			mend = func() error { return forwarding(l) }
		}
		if err != nil {
			now = err.Error()
		}
		faults = append(faults, fault{fmt.Sprintf("%s is not %s: %s", s, s.Value, now), mend})
	}
	return faults
}

func linkFaults(l Link, host *end) (faults []fault) {
	if host.mac != l.HostMAC {
		faults = append(faults, fault{fmt.Sprintf("the node's end has the MAC %s, not %s", host.mac, l.HostMAC), func() error {
			mac, err := net.ParseMAC(l.HostMAC)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetHardwareAddr(host.link, mac); err != nil {
				return fmt.Errorf("set the MAC of the node's end: %w", err)
			}
			return nil
		}})
	}
	if host.mtu != l.MTU {
		faults = append(faults, fault{fmt.Sprintf("the node's end has the MTU %d, not %d", host.mtu, l.MTU), func() error {
			if err := netlink.LinkSetMTU(host.link, l.MTU); err != nil {
				return fmt.Errorf("set the MTU of the node's end: %w", err)
			}
			return nil
		}})
	}
	if !host.up {
		faults = append(faults, fault{"the node's end is down", func() error {
			if err := netlink.LinkSetUp(host.link); err != nil {
				return fmt.Errorf("set the node's end up: %w", err)
			}
			return nil
		}})
	}
	return faults
}

func addressFaults(l Link, host *end) []fault {
	if !has6(l) || host.gateway {
		return nil
	}
	what := fmt.Sprintf("the node's end does not have the address %s/64", Gateway6)
	return []fault{{what, func() error { return hostGateway(anyway, host.link) }}}
}

func neighbourFaults(l Link, host *end) (faults []fault) {
	for _, a := range l.Addresses {
		if mac, known := host.neighbours[a]; !known || mac != l.PodMAC {
			faults = append(faults, fault{fmt.Sprintf("the node does not know the MAC %s of %s for good", l.PodMAC, a),
				func() error { return hostNeighbour(anyway, l, host.link, a) }})
		}
	}
	return faults
}

func routeFaults(l Link, host *end) (faults []fault, err error) {
	for _, a := range l.Addresses {
		source := nodeAddressOf(l, a)
		now, there := host.routes[a]
		if there && now == source {
			continue
		}
		// The kernel deletes the routes whose source the node has lost (and refuses new ones): better without than none.
		if source.IsValid() {
			has, err := host.onNode(source)
			if err != nil {
				return faults, err
			}
			if !has {
				source = netip.Addr{}
			}
			if there && now == source {
				continue
			}
		}
		what := fmt.Sprintf("the node has no route to %s over the link", a)
		if there {
			what = fmt.Sprintf("the node's route to %s has the source %s, not %s", a, named(now), named(source))
		}
		faults = append(faults, fault{what, func() error { return hostRoute(anyway, host.link, a, source) }})
	}
	return faults, nil
}

func named(a netip.Addr) string {
	if !a.IsValid() {
		return "that the kernel chooses"
	}
	return a.String()
}

// hostRouteSource finds the route by which packets for an address go, and returns its source. It is not there if they would go
// by another.
func hostRouteSource(host netlink.Link, a netip.Addr) (source netip.Addr, there bool) {
	routes, err := netlink.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) != 1 || routes[0].LinkIndex != host.Attrs().Index || routes[0].Dst == nil {
		return netip.Addr{}, false
	}
	if ones, bits := routes[0].Dst.Mask.Size(); ones != bits {
		return netip.Addr{}, false
	}
	source, _ = netip.AddrFromSlice(routes[0].Src)
	return source.Unmap(), true
}

// onNode reports whether the node has an address that can be a route's source.
func onNode(a netip.Addr) (bool, error) {
	addrs, err := addresses(anyway, a.Is4())
	if err != nil {
		return false, err
	}
	for _, has := range addrs {
		if got, ok := netip.AddrFromSlice(has.IP); ok && got.Unmap() == a && has.Flags&unix.IFA_F_TENTATIVE == 0 {
			return true, nil
		}
	}
	return false, nil
}
