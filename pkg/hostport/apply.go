package hostport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/rule"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// Tables writes one family's rules. Each call is one iptables-restore, whose process holds the lock attachment.HostPorts
// too, so that it cannot commit after another has taken it.
type Tables interface {
	// Append adds rules at the end of chains, and fails with nothing changed where one of the chains is missing. It removes
	// nothing, which on nft makes it several times faster than Write.
	Append(ctx context.Context, chains map[rule.Table][]rule.Chain) error
	// Write makes the chains of the state what it says, whatever they were, and puts the hooks in their places.
	Write(ctx context.Context, want *rule.State) error
}

// Env is what Apply and Remove work with.
type Env struct {
	// Tables returns the way to a family's rules. It is called only for families in which something is mapped.
	Tables func(rule.Family) (Tables, error)
	// IgnoreProcesses lets a pod take a port that a process of the host listens on.
	IgnoreProcesses bool
}

// Records returns the attachments with port mappings, the one in question among them or not. It is called at most once.
type Records func() ([]*attachment.Attachment, error)

// Apply puts an attachment's port mappings into force, in the network namespace of the calling thread. Nothing is done
// for one without mappings. A *[ConflictError] says who has a port already; then, as with other errors, [Remove] undoes.
func Apply(ctx context.Context, env Env, a *attachment.Attachment, records Records) error {
	if len(a.PortMappings) == 0 {
		return nil
	}
	if err := check(a); err != nil {
		return fmt.Errorf("map host ports of %s: %w", owner(a), err)
	}
	known, err := records()
	if err != nil {
		return fmt.Errorf("map host ports of %s: %w", owner(a), err)
	}
	others := Alive(without(known, a))
	if err := Conflicts(a, others, !env.IgnoreProcesses); err != nil {
		return fmt.Errorf("map host ports of %s: %w", owner(a), err)
	}
	for _, family := range rule.Families {
		// Rules of the dead are still in the chains and would come first: only a whole writing takes them out.
		mayAppend := len(others) == len(without(known, a)) && mayAppend(family, a, others)
		if err := applyFamily(ctx, env, family, a, others, mayAppend); err != nil {
			return fmt.Errorf("map host ports of %s, %s: %w", owner(a), family, err)
		}
	}
	return flush(a, nil)
}

func applyFamily(
	ctx context.Context, env Env, family rule.Family, a *attachment.Attachment, others []*attachment.Attachment, add bool,
) error {
	dnat, snat := rules(family, a)
	if len(dnat) == 0 {
		return nil
	}
	tables, err := env.Tables(family)
	if err != nil {
		return err
	}
	done := false
	if add {
		done = tables.Append(ctx, map[rule.Table][]rule.Chain{
			rule.NAT: {{Name: ChainDNAT, Rules: dnat}, {Name: ChainSNAT, Rules: snat}},
		}) == nil // else the chains are missing, or Write meets the same error and reports it
	}
	if !done {
		if err := tables.Write(ctx, State(family, append(slices.Clone(others), a))); err != nil {
			return err
		}
	}
	_, err = RouteLocalnet(family, a)
	return err
}

// mayAppend reports whether the family's chains can be there already, and hold nothing that the attachment replaces. The
// raw drop is then there as well, for they are written together.
func mayAppend(family rule.Family, a *attachment.Attachment, others []*attachment.Attachment) bool {
	present := false
	for _, o := range others {
		if o.HostInterface == a.HostInterface {
			return false
		}
		dnat, _ := rules(family, o)
		present = present || len(dnat) > 0
	}
	return present
}

// Remove takes an attachment's port mappings out of force: the chains become what the other records say. It succeeds
// where nothing is left to remove. Where the host interface has a newer attachment, that one's mappings stay.
func Remove(ctx context.Context, env Env, a *attachment.Attachment, records Records) error {
	if len(a.PortMappings) == 0 {
		return nil
	}
	known, err := records()
	if err != nil {
		return fmt.Errorf("remove host ports of %s: %w", owner(a), err)
	}
	others := Alive(without(known, a))
	var errs []error
	for _, family := range rule.Families {
		if dnat, _ := rules(family, a); len(dnat) == 0 {
			continue
		}
		tables, err := env.Tables(family)
		if err == nil {
			err = tables.Write(ctx, State(family, others))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove host ports of %s, %s: %w", owner(a), family, err))
		}
	}
	return errors.Join(append(errs, flush(a, others))...)
}

func without(all []*attachment.Attachment, a *attachment.Attachment) []*attachment.Attachment {
	var others []*attachment.Attachment
	for _, o := range all {
		if o.Key() != a.Key() {
			others = append(others, o)
		}
	}
	return others
}

// Alive returns the attachments whose network namespace is still there. One without is dead and has only not been
// collected yet: it keeps no port from anybody. A [State] is made of living attachments.
func Alive(all []*attachment.Attachment) []*attachment.Attachment {
	var alive []*attachment.Attachment
	for _, a := range all {
		if _, err := os.Stat(a.NetNS); a.NetNS == "" || !errors.Is(err, fs.ErrNotExist) {
			alive = append(alive, a)
		}
	}
	return alive
}

// check refuses what no rule can do.
func check(a *attachment.Attachment) error {
	for _, m := range a.PortMappings {
		if !m.HostIP.IsValid() {
			continue
		}
		if family := rule.FamilyOf(m.HostIP); !hasFamily(a, family) {
			return fmt.Errorf("hostIP %s: the pod has no %s address; leave hostIP out or name one of the other family",
				m.HostIP, family)
		}
	}
	return nil
}

func hasFamily(a *attachment.Attachment, family rule.Family) bool {
	_, ok := addressOf(family, a.Addresses)
	return ok
}

// RouteLocalnet lets packets from 127.0.0.0/8 leave by the link of an attachment that has a mapping of IPv4. The setting goes with
// the link. It reports whether it was not set.
func RouteLocalnet(family rule.Family, a *attachment.Attachment) (set bool, err error) {
	if dnat, _ := rules(family, a); family != rule.IPv4 || len(dnat) == 0 {
		return false, nil
	}
	set, err = sysctl.Of("ipv4/conf/"+a.HostInterface+"/route_localnet", "1").Set()
	if err != nil {
		return false, fmt.Errorf("open the way from the node's loopback: %w; is the link %s still there?", err, a.HostInterface)
	}
	return set, nil
}

// flush ends UDP flows to the host ports: a flow keeps the destination that its first packet got, from before the mapping
// came or went. TCP clients open new flows by themselves. Ports that one of the others has are left alone: an ADD that
// was refused for a conflict, and the DEL of an older sandbox, cut nobody's flows.
func flush(a *attachment.Attachment, others []*attachment.Attachment) error {
	var errs []error
	for _, m := range a.PortMappings {
		if m.Protocol != string(rule.UDP) || held(m, a, others) {
			continue
		}
		for _, at := range flushed(m, a) {
			errs = append(errs, conntrack.DeleteUDPPort(m.HostPort, at))
		}
	}
	return errors.Join(errs...)
}

// flushed are the addresses of the node at which a mapping can have had flows: that of the mapping, or all of the families that
// the pod has, for each takes a walk through the whole table. Of a pod whose addresses nobody knows any more it is both.
func flushed(m attachment.PortMapping, a *attachment.Attachment) (at []netip.Addr) {
	if m.HostIP.IsValid() {
		return []netip.Addr{m.HostIP}
	}
	for f, all := range map[rule.Family]netip.Addr{rule.IPv4: netip.IPv4Unspecified(), rule.IPv6: netip.IPv6Unspecified()} {
		if len(a.Addresses) == 0 || hasFamily(a, f) {
			at = append(at, all)
		}
	}
	return at
}

func held(m attachment.PortMapping, a *attachment.Attachment, others []*attachment.Attachment) bool {
	for _, o := range current(others) {
		if slices.ContainsFunc(o.PortMappings, func(n attachment.PortMapping) bool { return overlap(m, a, n, o) }) {
			return true
		}
	}
	return false
}
