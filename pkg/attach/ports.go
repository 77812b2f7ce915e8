package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/hostport"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// portEnv gives package hostport its way to the tables. The restore inherits the lock: killed with this process or not, it
// cannot commit after somebody else has taken it.
func portEnv(cfg *cniconf.Config, l *attachment.Lock) hostport.Env {
	return hostport.Env{
		IgnoreProcesses: cfg.HostPortConflict == cniconf.ConflictIgnore,
		Tables: func(f rule.Family) (hostport.Tables, error) {
			backend, err := Backend(context.Background(), cfg)
			if err != nil {
				return nil, err
			}
			t, err := iptables.New(backend, f)
			if err != nil {
				return nil, err
			}
			t.Inherit = []*os.File{l.File()}
			return &portTables{t}, nil
		},
	}
}

func withPorts(store *attachment.Store) hostport.Records {
	return func() ([]*attachment.Attachment, error) {
		list, errs := store.WithPorts()
		return list, errors.Join(errs...)
	}
}

// Backend is the configured iptables backend, else the one that policyd notes it uses, else the one that the node's other
// software uses.
func Backend(ctx context.Context, cfg *cniconf.Config) (iptables.Backend, error) {
	if cfg.IPTablesBackend != cniconf.BackendAuto {
		return iptables.Backend(cfg.IPTablesBackend), nil
	}
	note, err := os.ReadFile(gate.BackendFile(cfg.StateDir))
	if b := iptables.Backend(strings.TrimSpace(string(note))); err == nil && (b == iptables.NFT || b == iptables.Legacy) {
		return b, nil
	}
	return iptables.Detect(ctx)
}

// portTables writes hostPort's rules with one restore a call.
type portTables struct{ t *iptables.Tables }

func (p *portTables) Append(ctx context.Context, chains map[rule.Table][]rule.Chain) error {
	var changes []iptables.Change
	for table, list := range chains {
		changes = append(changes, iptables.Change{Table: table, Append: list})
	}
	return p.t.Restore(ctx, iptables.Render(changes...))
}

func (p *portTables) Write(ctx context.Context, want *rule.State) error {
	return dataplane.WriteRules(ctx, p.t, dataplane.HostPorts, want)
}

// mapped reports which of an attachment's rules are missing.
func mapped(ctx context.Context, cfg *cniconf.Config, a *attachment.Attachment) error {
	backend, err := Backend(ctx, cfg)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range rule.Families {
		t, err := iptables.New(backend, f)
		if err != nil {
			return err
		}
		actual, err := t.Save(ctx, rule.NAT)
		if err != nil {
			return err
		}
		for _, chain := range hostport.State(f, []*attachment.Attachment{a}).Chains[rule.NAT] {
			for _, want := range chain.Rules {
				if !contains(actual.Chains[chain.Name], want) {
					errs = append(errs, fmt.Errorf("%s: chain %s of table nat lacks the rule%s", f, chain.Name, iptables.Args(want)))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func contains(rules []rule.Rule, want rule.Rule) bool {
	for _, r := range rules {
		if iptables.Equal(r, want) {
			return true
		}
	}
	return false
}
