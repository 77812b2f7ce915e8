package engine

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/policy"
)

// suspects are the addresses whose live flows may not be allowed any more. They are gathered with the changes (suspect) and kept
// until a pass has succeeded: due is set by whatever is taken away in the kernel, also by a write that failed and may have been
// done all the same, or that put right what may have been open; without it nothing was lost, and they are let go unjudged. What
// was judged is judged once more a little later (again, and next for those who come while its time runs), for packets that were
// on their way while the rules changed.
type suspects struct {
	due       bool // something was taken away in the kernel
	all       bool // any address of this node's pods
	addresses map[netip.Addr]bool
}

func (s suspects) some() bool { return s.all || len(s.addresses) > 0 }

// judgedOnce has those whom something was taken away from judged a second time, a little later; the others have lost nothing.
func (e *Engine) judgedOnce() {
	if e.suspects.due {
		to := &e.again
		if to.some() {
			to = &e.next
		}
		to.all = to.all || e.suspects.all
		if to.addresses == nil {
			to.addresses = map[netip.Addr]bool{}
		}
		maps.Copy(to.addresses, e.suspects.addresses)
	}
	e.suspects = suspects{}
}

// suspect notes whom a change may have taken something away from.
func (e *Engine) suspect(d policy.Delta) {
	if e.suspects.addresses == nil {
		e.suspects.addresses = map[netip.Addr]bool{}
	}
	for _, i := range d.Interfaces {
		for _, g := range []*policy.Guarded{i.Old, i.New} {
			if g == nil {
				continue
			}
			for _, a := range g.Addresses {
				e.suspects.addresses[a] = true
			}
		}
	}
	for _, c := range d.Groups {
		for _, member := range c.Left {
			e.suspects.addresses[member.Addr()] = true
		}
	}
}

// judge ends the live flows of suspects that policies do not allow. A flow is judged by its source before any translation and
// its real destination, which is the source of its replies.
func (e *Engine) judge(of suspects) error {
	addrs := slices.Collect(maps.Keys(of.addresses))
	if of.all {
		addrs = e.index.Addresses()
	}
	if len(addrs) == 0 {
		return nil
	}
	err := e.judgeFlows(addrs)
	if err != nil {
		e.fail("conntrack", "cannot judge live flows", err)
	}
	return err
}

func (e *Engine) judgeFlows(addrs []netip.Addr) error {
	own, err := nodeAddresses()
	if err != nil {
		return err
	}
	flows, err := conntrack.List(addrs...)
	if err != nil {
		return err
	}
	isOwn := func(a netip.Addr) bool { return own[a] || a.IsLoopback() }
	var errs []error
	for _, f := range flows {
		src, dst := f.Orig.Src.Addr(), f.Reply.Src
		if e.index.Allowed(src, dst.Addr(), protocols[f.Proto], dst.Port(), isOwn) {
			continue
		}
		err := conntrack.Delete(f)
		if errors.Is(err, unix.EBUSY) { // the kernel lets nobody delete a flow that is offloaded to a device
			e.fail("conntrack", "a flow that policies do not allow goes on until it leaves the device it is offloaded to", err)
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		e.Metrics.FlowsEnded.Inc()
		e.Log.Debug("ended a flow that policies do not allow", "flow", f.String())
	}
	return errors.Join(errs...)
}

var protocols = map[uint8]corev1.Protocol{
	unix.IPPROTO_TCP: corev1.ProtocolTCP, unix.IPPROTO_UDP: corev1.ProtocolUDP, unix.IPPROTO_SCTP: corev1.ProtocolSCTP,
}

// nodeAddresses are the addresses of the network namespace that policyd runs in.
func nodeAddresses() (map[netip.Addr]bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	own := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			own[ip.Unmap()] = true
		}
	}
	return own, nil
}
