package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

func renderCommand(_ context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error {
	manifests := flags.String("manifests", "", "`folder` of manifests; pods count as attached with the addresses of their status")
	node := flags.String("node", "", "only pods of this `node` are local ones; default: all")
	check := func() []string {
		if *manifests == "" {
			return []string{"--manifests FOLDER: missing"}
		}
		return nil
	}
	if err := parse(flags, args, check); err != nil {
		return err
	}
	c, err := cluster.ReadFolder(*manifests)
	if err != nil {
		return err
	}
	m := policy.Resolve(policy.Input{Cluster: c, Local: attachedByStatus(c, *node)})
	for _, p := range m.Problems {
		fmt.Fprintf(flags.Output(), "policy %s cannot be used as written and closes the pods it selects: %s\n", p.Policy, p.Reason)
	}
	for _, f := range rule.Families {
		render(stdout, compile.State(m, f))
	}
	if len(m.Problems) > 0 {
		return errors.New("some policies cannot be used as written")
	}
	return nil
}

// attachedByStatus makes local pods of those that the manifests show on a node, "" for every node.
func attachedByStatus(c object.Cluster, node string) []policy.Local {
	var locals []policy.Local
	for _, p := range c.Pods {
		if p.HostNetwork || p.Ended || node != "" && p.Node != node {
			continue
		}
		link := attachment.HostInterface(attachment.GuardedPrefix, p.Identity(), "eth0")
		locals = append(locals, policy.Local{Pod: p, Interface: link, Addresses: slices.Clone(p.IPs), Ready: len(p.IPs) > 0})
	}
	return locals
}

// render prints a state as `ipset restore` and `iptables-restore --noflush` read it.
func render(w io.Writer, s *rule.State) {
	fmt.Fprintf(w, "# %s: ipset restore\n", s.Family)
	family := map[rule.Family]string{rule.IPv4: "inet", rule.IPv6: "inet6"}[s.Family]
	for _, set := range s.Sets {
		fmt.Fprintf(w, "# %s\ncreate %s %s family %s\n", oneLine(set.Definition), set.Name, set.Type, family)
		for _, e := range set.Entries {
			fmt.Fprintf(w, "add %s %s\n", set.Name, e)
		}
	}
	program := map[rule.Family]string{rule.IPv4: "iptables-restore", rule.IPv6: "ip6tables-restore"}[s.Family]
	fmt.Fprintf(w, "# %s: %s --noflush\n", s.Family, program)
	for _, table := range []rule.Table{rule.Mangle, rule.Filter} {
		c := iptables.Change{Table: table, Replace: s.Chains[table]}
		for _, h := range s.Hooks {
			if h.Table == table {
				c.Hook = append(c.Hook, h)
			}
		}
		fmt.Fprint(w, iptables.Render(c))
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
