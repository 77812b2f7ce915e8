package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/hostport"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/podlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// Del detaches the container. Calling it again, or for what was never attached, succeeds. An error says what could not be
// taken away; everything else is gone then, and the address stays reserved.
func (p *Plugin) Del(ctx context.Context, cfg *cniconf.Config) error {
	store := attachment.Open(cfg.StateDir)
	a, err := known(store, cfg)
	if err != nil {
		return coded(types.ErrIOFailure, err)
	}
	unlock, err := lock(ctx, store, attachment.NodeShared, attachment.Interface(a.HostInterface))
	if err != nil {
		return coded(types.ErrTryAgainLater, err)
	}
	defer unlock()
	if err := detach(ctx, cfg, store, a); err != nil {
		return coded(types.ErrInternal, fmt.Errorf("delete %s: %w", describe(cfg), err))
	}
	return nil
}

// known is the attachment's record or, where that is missing or cannot be read, what else tells of it: the configuration,
// the addresses that the owner holds, and a link with its name on it.
func known(store *attachment.Store, cfg *cniconf.Config) (*attachment.Attachment, error) {
	a, err := store.Get(cfg.Key())
	if err == nil {
		return a, nil
	}
	var broken *attachment.BrokenError
	if !errors.Is(err, fs.ErrNotExist) && !errors.As(err, &broken) {
		return nil, err
	}
	a = &attachment.Attachment{
		ContainerID:   cfg.ContainerID,
		IfName:        cfg.IfName,
		Network:       cfg.Name,
		HostInterface: cfg.HostInterface(),
		PortMappings:  cfg.PortMappings,
	}
	if links, err := podlink.Owned(cfg.Key()); err == nil && len(links) > 0 {
		a.HostInterface = links[0]
	}
	if cfg.IPAM.Own() {
		a.Addresses, err = pool(cfg).Held(cfg.Key())
		return a, err
	}
	if cfg.PrevResult != nil {
		a.Addresses, _ = addressesOf(cfg.PrevResult) // without them there is less to flush
	}
	return a, nil
}

// detach takes an attachment apart in the order of the package's comment. It goes on after an error, but for the address:
// what still leads to it must not lead to a new owner.
func detach(ctx context.Context, cfg *cniconf.Config, store *attachment.Store, a *attachment.Attachment) error {
	errs := []error{unready(a.HostInterface, a.Addresses)}
	deleted := podlink.StartDelete(a.HostInterface, a.Key())
	if len(a.PortMappings) > 0 { // the kernel waits for both, for a grace period of RCU each: let that be the same one
		errs = append(errs, unmap(ctx, cfg, store, a))
	}
	errs = append(errs, deleted())
	if !sweptByPolicyd(a) {
		errs = append(errs, conntrack.DeleteAddresses(a.Addresses...))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := store.Delete(a.Key()); err != nil {
		return err
	}
	if cfg.IPAM.Own() && a.IPAM == "" {
		return pool(cfg).Release(a.Key())
	}
	return delegateDel(ctx, cfg)
}

// sweptByPolicyd reports whether policyd ends the flows of the addresses: it does that for all of the ranges that it knows of,
// now, or when it comes back, and always before an address is ready again.
func sweptByPolicyd(a *attachment.Attachment) bool {
	known := func(addr netip.Addr) bool {
		return slices.ContainsFunc(a.Ranges, func(p netip.Prefix) bool { return p.Contains(addr) })
	}
	return a.Policy == attachment.PolicyEnforce && !slices.ContainsFunc(a.Addresses, func(addr netip.Addr) bool { return !known(addr) })
}

func unmap(ctx context.Context, cfg *cniconf.Config, store *attachment.Store, a *attachment.Attachment) error {
	l, err := store.Lock(ctx, attachment.HostPorts)
	if err != nil {
		return err
	}
	defer l.Release()
	return hostport.Remove(ctx, portEnv(cfg, l), a, withPorts(store))
}

// unready takes a pod out of the ready and open sets itself, so that it does not depend on policyd. That a set is not there is
// no error: nothing is ready then.
func unready(link string, addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	sets, err := ipset.Open()
	if err != nil {
		return err
	}
	defer sets.Close()
	var errs []error
	for _, a := range addrs {
		family := rule.FamilyOf(a)
		entry := rule.Entry{Prefix: netip.PrefixFrom(a, a.BitLen()), Iface: link}
		for _, set := range []string{rule.ReadySet(family), rule.OpenSet(family, rule.Ingress), rule.OpenSet(family, rule.Egress)} {
			if err := sets.Del(set, entry); err != nil && !errors.Is(err, ipset.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
