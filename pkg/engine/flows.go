package engine

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/conntrack"
)

// judge ends the live flows of this node's pods that the model does not allow. A flow is judged by its source before any
// translation and its real destination, which is the source of its replies.
func (e *Engine) judge(when string) error {
	if e.model == nil {
		return nil
	}
	var addrs []netip.Addr
	for i := range e.model.Pods {
		addrs = append(addrs, e.model.Pods[i].Addresses...)
	}
	if len(addrs) == 0 {
		return nil
	}
	err := e.judgeFlows(addrs)
	if err != nil {
		e.Metrics.Failures.WithLabelValues("conntrack").Inc()
		e.Log.Error("cannot judge live flows", "when", when, "error", err)
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
		if e.model.Allowed(src, dst.Addr(), protocols[f.Proto], dst.Port(), isOwn) {
			continue
		}
		if err := conntrack.Delete(f); err != nil {
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
