package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// errNothing is a saboteur's that found nothing to break on this walk.
var errNothing = errors.New("nothing to break")

// saboteurs are the mistakes in the engine that walks must find.
func saboteurs() []saboteur { return append(inTheEnd(), onTheWay()...) }

// inTheEnd are mistakes in what the kernel holds in the end.
func inTheEnd() []saboteur {
	restore := func(lines func(d dice, chains []string) string) func(context.Context, *kernel, dice) error {
		return func(ctx context.Context, k *kernel, d dice) error {
			f := one(d, rule.Families[:]...)
			a, err := k.tables[f].Save(ctx, rule.Mangle)
			if err != nil {
				return err
			}
			var pods []string
			for name := range a.Chains {
				if strings.HasPrefix(name, "PST-") {
					pods = append(pods, name)
				}
			}
			if slices.Sort(pods); len(pods) == 0 {
				return errNothing
			}
			return k.tables[f].Restore(ctx, "*mangle\n"+lines(d, pods)+"\nCOMMIT\n")
		}
	}
	peers := func(do func(*kernel, rule.Set) error) func(context.Context, *kernel, dice) error {
		return func(_ context.Context, k *kernel, _ dice) error {
			all, err := k.sets.List(rule.SetPrefix + "p")
			for _, s := range all {
				if len(s.Entries) > 0 {
					return do(k, s)
				}
			}
			return errors.Join(err, errNothing)
		}
	}
	return []saboteur{
		{name: "an address is missing in a peer set", end: peers(func(k *kernel, s rule.Set) error {
			return k.sets.Del(s.Name, s.Entries[0])
		})},
		{name: "a peer set is left that nobody uses", end: peers(func(k *kernel, s rule.Set) error {
			s.Name = rule.SetPrefix + "p4-0123456789abcdef"
			return k.sets.Create(s, 0)
		})},
		{name: "a rule is missing in a pod's chain", end: restore(func(d dice, pods []string) string {
			return "-D " + one(d, pods...) + " 1"
		})},
		{name: "a chain is left of a pod that has gone", end: restore(func(dice, []string) string {
			return ":PST-E-0123456789ab - [0:0]"
		})},
		{name: "our rule is not the first of FORWARD", end: restore(func(dice, []string) string {
			return "-I FORWARD 1 -p tcp -j RETURN"
		})},
	}
}

// onTheWay are mistakes in what the kernel lets pass in the middle of a pass.
func onTheWay() []saboteur {
	return []saboteur{
		{name: "a pod is ready before its object is known", step: atRestore(func(w *walker, f rule.Family) error {
			for _, a := range w.now.records {
				for _, address := range a.Addresses {
					e := rule.Entry{Prefix: single(address), Iface: a.HostInterface}
					for _, set := range []string{rule.ReadySet(f), rule.OpenSet(f, rule.Ingress), rule.OpenSet(f, rule.Egress)} {
						if rule.FamilyOf(address) == f {
							if err := gone(w.sets.Add(set, e)); err != nil {
								return err
							}
						}
					}
				}
			}
			return nil
		})},
		{name: "the dispatch tree is emptied before it is written anew", step: atRestore(func(w *walker, f rule.Family) error {
			text := fmt.Sprintf("*mangle\n-F %s\n-F %s\nCOMMIT\n", compile.ChainFrom, compile.ChainTo)
			return w.tables[f].Restore(context.Background(), text)
		})},
		{name: "who joins sets is let in before the rules", step: atRestore(func(w *walker, f rule.Family) error {
			for _, set := range compile.State(policy.Resolve(w.now.input()), f).Sets {
				if err := gone(w.sets.Add(set.Name, set.Entries...)); err != nil {
					return err
				}
			}
			return nil
		})},
	}
}

// atRestore breaks both families before a restore of a kernel that is in force, and has a look taken at once.
func atRestore(spoil func(*walker, rule.Family) error) func(*walker, string) error {
	return func(w *walker, step string) error {
		if step != "restore" || !w.inForce {
			return nil
		}
		w.last, w.lookIn = "", 1
		return errors.Join(spoil(w, rule.IPv4), spoil(w, rule.IPv6))
	}
}

// search takes walks until one finds what is broken: the first, for most of it, but of some only a rare coincidence is a hole.
func (b *saboteur) search(o options, backend iptables.Backend) (string, bool, error) {
	taken := 0
	for n := range uint64(32 * o.walks) {
		w, err := takeWalk(backend, walk(throw(o.seed, n, forWalks), sabotaged), b)
		if taken += w.Steps; err != nil {
			return "", false, err
		}
		if w.Found != "" {
			return "found after " + plural(taken, "step"), true, nil
		}
	}
	return notFound + " in " + plural(taken, "step"), false, nil
}

// sabotaged is the length of walks through a broken engine.
const sabotaged = 12
