package engine

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/policy"
)

// The flows that policies do not allow any more are found by reading the whole conntrack table, which takes milliseconds however
// few they are. So they are judged together (judge): of a change after a quiet time at once, in its pass, and of what follows
// within a pause when that is over: half a second at most, and a second where changes come all the time. At once, too, where a pass
// promises that what it wrote is in force, and where our rules themselves may have been away. Who was judged is judged once more by
// the next reading, for packets that were on their way while the rules changed.

// suspects are addresses whose live flows may have to end. Those of a change are gathered with it (suspect) and kept until a pass
// has succeeded. They become unjudged with whatever is taken away in the kernel, also by a write that failed and may have been
// done all the same, or that put right what may have been open (due); without it nothing was lost, and they are let go.
type suspects struct {
	due       bool // something was taken away in the kernel
	all       bool // any address of this node's pods
	addresses map[netip.Addr]bool
	gone      map[netip.Addr]bool // those that no pod has any more: all their flows end
}

func newSuspects() suspects {
	return suspects{addresses: map[netip.Addr]bool{}, gone: map[netip.Addr]bool{}}
}

func (s suspects) some() bool { return s.all || len(s.addresses)+len(s.gone) > 0 }

func (s *suspects) add(o suspects) {
	s.all = s.all || o.all
	maps.Copy(s.addresses, o.addresses)
	maps.Copy(s.gone, o.gone)
}

// suspect notes whom a change may have taken something away from.
func (e *Engine) suspect(d policy.Delta) {
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

// tightened has those judged whom something was taken away from by what was written so far. Now says that somebody waits for it.
func (e *Engine) tightened(so dataplane.Result, now bool) error {
	e.suspects.due = e.suspects.due || so.Tightened
	// What is put right after a failure may have been open to anybody, by us or by somebody else.
	if so.Tightened && so.Reread {
		e.suspects.all = true
		clear(e.clean)
	}
	if e.suspects.due {
		e.unjudged.add(e.suspects)
		e.suspects.due = false
	}
	if lost := e.unjudged.all || len(e.unjudged.addresses) > 0; !lost && !e.judgedAt.IsZero() {
		return nil // what is to be judged a second time has time, and so have those that are gone
	}
	return e.judge(now || e.unjudged.all)
}

// judge ends the flows that are to end of those who are to be judged, once the pause since the last reading is over, or now.
func (e *Engine) judge(now bool) error {
	begin := time.Now()
	since := begin.Sub(e.judgedAt)
	pause := since >= e.judgeIn
	if !e.unjudged.some() && !e.judged.some() || !pause && !now {
		return nil
	}
	of := newSuspects()
	of.add(e.unjudged)
	of.add(e.judged)
	if err := e.judgeFlows(of); err != nil {
		e.judgedAt = time.Time{} // the next try waits for nothing
		e.fail("conntrack", "cannot judge live flows", err)
		return fmt.Errorf("judge live flows: %w", err)
	}
	if pause {
		e.judged = newSuspects()
	}
	e.judged.add(e.unjudged)
	e.unjudged, e.judgedAt = newSuspects(), begin
	longest := judgePauseMax
	if e.judgedInRow++; since > 2*e.judgeIn {
		e.judgedInRow = 0
	} else if e.judgedInRow >= judgeOften {
		longest = judgePauseBusy
	}
	e.judgeIn = min(max(judgeRest*time.Since(begin), judgePause), longest)
	return nil
}

// judgeFlows ends flows of suspects. A flow is judged by its source before any translation and its real destination, which is the
// source of its replies.
func (e *Engine) judgeFlows(of suspects) error {
	addrs := slices.Collect(maps.Keys(of.addresses))
	addrs = slices.AppendSeq(addrs, maps.Keys(of.gone))
	if of.all {
		addrs = append(addrs, e.index.Addresses()...)
	}
	if len(addrs) == 0 {
		return nil
	}
	if e.Fail != nil {
		if err := e.Fail("flows"); err != nil {
			return err
		}
	}
	flows, err := conntrack.List(addrs...)
	if err != nil || len(flows) == 0 {
		return err
	}
	own, err := nodeAddresses()
	if err != nil {
		return err
	}
	isOwn := func(a netip.Addr) bool { return own[a] || a.IsLoopback() }
	var errs []error
	for _, f := range flows {
		src, dst := f.Orig.Src.Addr(), f.Reply.Src
		gone := f.Touches(func(a netip.Addr) bool { return of.gone[a] })
		if !gone && e.index.Allowed(src, dst.Addr(), protocols[f.Proto], dst.Port(), isOwn) {
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
		if !gone {
			e.Metrics.FlowsEnded.Inc()
			e.Log.Debug("ended a flow that policies do not allow", "flow", f.String())
		}
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
