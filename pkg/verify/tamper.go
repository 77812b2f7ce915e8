package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/rule"
)

// tamper is somebody else at work on our rules and sets. It tells what was done.
func (k *kernel) tamper(ctx context.Context, d dice) (string, error) {
	f := one(d, rule.Families[:]...)
	if d.chance(2) {
		return k.tamperWithSets(f, d)
	}
	table := one(d, rule.Mangle, rule.Mangle, rule.Mangle, rule.Filter)
	a, err := k.tables[f].Save(ctx, table)
	if err != nil {
		return "", err
	}
	var chains []string
	for name := range a.Chains {
		chains = append(chains, name)
	}
	if len(chains) == 0 {
		return "nothing: there are no chains", nil
	}
	slices.Sort(chains)
	chain, builtIn := one(d, chains...), "FORWARD"
	if table == rule.Mangle && d.chance(4) {
		builtIn = "INPUT"
	}
	nobody := map[rule.Family]string{rule.IPv4: "203.0.113.99", rule.IPv6: "2001:db8::99"}[f]
	lines := one(d,
		"-F",
		"-F "+builtIn,
		"-F "+chain,
		"-F "+chain,
		"-A "+chain+" -s "+nobody+" -j RETURN",
		"-D "+chain+" 1\n-I "+chain+" 1 -s "+nobody+" -j RETURN",
		":PST-I-0123456789ab - [0:0]\n-A PST-I-0123456789ab -j ACCEPT",
	)
	if table == rule.Mangle && d.chance(5) {
		lines = "-I FORWARD 1 -s " + nobody + " -j RETURN" // before our hook, which is to be the first
	}
	what := fmt.Sprintf("%s, table %s: %q", f, table, lines)
	if err := k.tables[f].Restore(ctx, fmt.Sprintf("*%s\n%s\nCOMMIT\n", table, lines)); err != nil {
		what += ", refused" // the chain is gone or empty by now
	}
	return what, nil
}

func (k *kernel) tamperWithSets(f rule.Family, d dice) (string, error) {
	all, err := k.sets.List(rule.SetPrefix)
	if err != nil {
		return "", err
	}
	var sets []rule.Set
	for _, s := range all {
		if s.Family == f {
			sets = append(sets, s)
		}
	}
	if len(sets) == 0 {
		return "nothing: there are no sets", nil
	}
	s := one(d, sets...)
	address := addressPair(movingAddresses)[0]
	if f == rule.IPv6 {
		address = addressPair(movingAddresses)[1]
	}
	foreign := rule.Entry{Prefix: single(address)}
	switch s.Type {
	case rule.HashNetIface:
		foreign.Iface = "pst0123456789ab"
	case rule.HashIPPort:
		foreign.Proto, foreign.Port = rule.TCP, 7
	}
	switch d.IntN(6) {
	case 0:
		stray := rule.Set{Name: rule.SetPrefix + "stray-" + fmt.Sprint(uint8(f)), Type: rule.HashIP, Family: f}
		if err := k.sets.Destroy(stray.Name); err != nil {
			return "", err
		}
		return "a stray set " + stray.Name, k.sets.Create(stray, 0)
	case 1:
		return fmt.Sprintf("set %s gets %s", s.Name, foreign), gone(k.sets.Add(s.Name, foreign))
	case 2:
		if len(s.Entries) > 0 {
			e := one(d, s.Entries...)
			return fmt.Sprintf("set %s has %s exchanged for %s", s.Name, e, foreign),
				gone(errors.Join(k.sets.Del(s.Name, e), k.sets.Add(s.Name, foreign)))
		}
	case 3, 4:
		if len(s.Entries) > 0 {
			e := one(d, s.Entries...)
			return fmt.Sprintf("set %s loses %s", s.Name, e), gone(k.sets.Del(s.Name, e))
		}
	}
	return "set " + s.Name + " is emptied", gone(k.sets.Flush(s.Name))
}

// gone passes over that the engine was faster: the set is not there any more.
func gone(err error) error {
	if errors.Is(err, ipset.ErrNotExist) {
		return nil
	}
	return err
}
