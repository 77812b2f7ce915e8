package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/podlink"
)

// GC removes the network's attachments that the runtime does not list as valid, whatever is left of them: a record, an address,
// a link. No ADD or DEL is under way meanwhile. A configuration without the list is refused: it does not mean that none is
// valid.
func (p *Plugin) GC(ctx context.Context, cfg *cniconf.Config) error {
	if cfg.ValidAttachments == nil {
		return &types.Error{Code: types.ErrInvalidNetworkConfig, Msg: "cni.dev/valid-attachments: missing: GC needs the list of " +
			"attachments to keep; an empty list keeps none"}
	}
	store := attachment.Open(cfg.StateDir)
	unlock, err := lock(ctx, store, attachment.NodeExclusive)
	if err != nil {
		return coded(types.ErrTryAgainLater, err)
	}
	defer unlock()
	dead, err := stale(store, cfg)
	if err != nil {
		return coded(types.ErrIOFailure, err)
	}
	var errs []error
	for _, a := range dead {
		if err := collect(ctx, cfg, store, a); err != nil {
			errs = append(errs, fmt.Errorf("collect %s: %w", a.Key(), err))
		}
	}
	errs = append(errs, strays(store, cfg), store.Sweep())
	if !cfg.IPAM.Own() {
		errs = append(errs, delegateGC(ctx, cfg))
	}
	return coded(types.ErrInternal, errors.Join(errs...))
}

// stale lists what tells of an attachment of this network that is not valid.
func stale(store *attachment.Store, cfg *cniconf.Config) ([]*attachment.Attachment, error) {
	keys, err := store.Keys()
	if err != nil {
		return nil, err
	}
	if cfg.IPAM.Own() {
		owners, err := pool(cfg).Owners()
		if err != nil {
			return nil, err
		}
		keys = append(keys, owners...)
	}
	var dead []*attachment.Attachment
	seen := map[attachment.Key]bool{}
	for _, key := range keys {
		if seen[key] || slices.Contains(cfg.ValidAttachments, key) {
			continue
		}
		seen[key] = true
		of := *cfg
		of.ContainerID, of.IfName = key.ContainerID, key.IfName
		a, err := known(store, &of)
		if err != nil {
			return nil, err
		}
		if a.Network == cfg.Name {
			dead = append(dead, a)
		}
	}
	return dead, nil
}

// collect is DEL without a DEL's environment. The ipam plugin that gave the addresses gets a DEL too: few do anything at GC.
func collect(ctx context.Context, cfg *cniconf.Config, store *attachment.Store, a *attachment.Attachment) error {
	own := *cfg
	own.ContainerID, own.IfName, own.NetNS = a.ContainerID, a.IfName, a.NetNS
	own.IPAM.Type = cniconf.OwnIPAM
	if a.IPAM != "" {
		own.IPAM.Type = a.IPAM
	}
	return detach(ctx, &own, store, a)
}

// strays removes links whose attachment has no record: they are nobody's.
func strays(store *attachment.Store, cfg *cniconf.Config) error {
	owners, err := podlink.Owners()
	if err != nil {
		return err
	}
	keys, err := store.Keys()
	if err != nil {
		return err
	}
	var errs []error
	for link, owner := range owners {
		known := slices.ContainsFunc(slices.Concat(keys, cfg.ValidAttachments), func(k attachment.Key) bool { return k.String() == owner })
		if !known {
			errs = append(errs, podlink.DeleteAny(link))
		}
	}
	return errors.Join(errs...)
}

// Collect removes attachments of every network whose container is gone, for runtimes that never call GC: the network
// namespace's path is not there any more, and nor is the link, which goes with the namespace. Both must hold, so that a caller
// who cannot see the runtime's folder takes nothing from the living. Attachments with another ipam plugin are left to the
// runtime, for nobody else can run it. It returns how many it removed.
func Collect(ctx context.Context, stateDir string) (int, error) {
	store := attachment.Open(stateDir)
	dead, err := gone(store)
	if err != nil || len(dead) == 0 {
		return 0, err
	}
	unlock, err := lock(ctx, store, attachment.NodeExclusive)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if dead, err = gone(store); err != nil { // an ADD may have been under way
		return 0, err
	}
	var errs []error
	n := 0
	for _, a := range dead {
		cfg := &cniconf.Config{Name: a.Network, StateDir: stateDir, ContainerID: a.ContainerID, IfName: a.IfName,
			IPTablesBackend: cniconf.BackendAuto, IPAM: cniconf.IPAM{Type: cniconf.OwnIPAM, ReuseAfter: cniconf.DefaultReuseAfter}}
		if err := detach(ctx, cfg, store, a); err != nil {
			errs = append(errs, fmt.Errorf("collect %s: %w", a.Key(), err))
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

func gone(store *attachment.Store) (dead []*attachment.Attachment, err error) {
	list, errs := store.List()
	if len(list) == 0 {
		return nil, errors.Join(errs...)
	}
	owners, err := podlink.Owners()
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		_, err := os.Stat(a.NetNS)
		if a.IPAM == "" && errors.Is(err, fs.ErrNotExist) && owners[a.HostInterface] != a.Key().String() {
			dead = append(dead, a)
		}
	}
	return dead, nil
}
