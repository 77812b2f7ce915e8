package dataplane

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// Cleanup removes every chain, hook and set of ours, in both families and in every backend that is installed, and touches
// nothing else. Calling it again is no error.
func Cleanup(ctx context.Context) error {
	var errs []error
	for _, backend := range []iptables.Backend{iptables.NFT, iptables.Legacy} {
		for _, v := range rule.Families {
			t, err := iptables.New(backend, v)
			if err != nil {
				continue // a backend that is not installed holds nothing
			}
			if err := cleanTables(ctx, t); err != nil {
				errs = append(errs, fmt.Errorf("clean up %s %s: %w", backend, v, err))
			}
		}
	}
	return errors.Join(append(errs, cleanSets())...)
}

func cleanTables(ctx context.Context, t *iptables.Tables) error {
	var changes []iptables.Change
	for _, table := range tables {
		a, err := t.Save(ctx, table)
		if err != nil {
			return err
		}
		c := iptables.Change{Table: table, Delete: slices.Sorted(maps.Keys(a.Chains))}
		for _, h := range a.Hooks {
			c.Unhook = append(c.Unhook, rule.Hook{Table: table, Chain: h.Chain, Rule: h.Rule})
		}
		changes = append(changes, c)
	}
	return t.Restore(ctx, iptables.Render(changes...))
}

func cleanSets() error {
	sets, err := ipset.Open()
	if err != nil {
		return err
	}
	defer sets.Close()
	var errs []error
	for _, prefix := range []string{rule.SetPrefix, rule.NodeSetPrefix} {
		list, err := sets.List(prefix)
		errs = append(errs, err)
		for _, s := range list {
			errs = append(errs, sets.Destroy(s.Name))
		}
	}
	return errors.Join(errs...)
}
