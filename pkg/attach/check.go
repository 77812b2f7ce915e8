package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/podlink"
)

// Check compares what ADD made with what is there. The error names everything that is missing or different.
func (p *Plugin) Check(ctx context.Context, cfg *cniconf.Config) error {
	if err := check(ctx, cfg); err != nil {
		return coded(types.ErrInternal, fmt.Errorf("check %s: %w", describe(cfg), err))
	}
	return nil
}

func check(ctx context.Context, cfg *cniconf.Config) error {
	store := attachment.Open(cfg.StateDir)
	a, err := store.Get(cfg.Key())
	if err != nil {
		return fmt.Errorf("its record: %w", err)
	}
	errs := []error{podlink.Check(podlink.Link{Attachment: a, Routes: cfg.IPAM.Routes})}
	if cfg.PrevResult != nil {
		listed, err := addressesOf(cfg.PrevResult)
		errs = append(errs, err)
		for _, addr := range a.Addresses {
			if err == nil && !slices.Contains(listed, addr) {
				errs = append(errs, fmt.Errorf("its address %s is not in prevResult", addr))
			}
		}
	}
	if cfg.IPAM.Own() {
		held, err := pool(cfg).Held(cfg.Key())
		errs = append(errs, err)
		for _, addr := range a.Addresses {
			if err == nil && !slices.Contains(held, addr) {
				errs = append(errs, fmt.Errorf("its address %s is not reserved for it", addr))
			}
		}
	} else {
		errs = append(errs, delegateCheck(ctx, cfg))
	}
	if len(a.PortMappings) > 0 {
		errs = append(errs, mapped(ctx, cfg, a))
	}
	return errors.Join(errs...)
}

// notAvailable is the code of STATUS for a plugin that cannot serve ADD (CNI specification 1.1, "Error").
const notAvailable = 50

// Status tells whether an ADD could succeed now. It answers 50 once policyd has been away for longer than the grace time, or
// when a range has no address left; not at once, for kubelet takes the node down with it at every restart of policyd.
func (p *Plugin) Status(ctx context.Context, cfg *cniconf.Config) error {
	errs := []error{present(ctx, cfg)}
	if cfg.IPAM.Own() {
		errs = append(errs, room(cfg))
	} else {
		errs = append(errs, delegateStatus(ctx, cfg))
	}
	if err := errors.Join(errs...); err != nil {
		return &types.Error{Code: notAvailable, Msg: fmt.Sprintf("network %s cannot take pods: %v", cfg.Name, err)}
	}
	return nil
}

// present asks for policyd.
func present(ctx context.Context, cfg *cniconf.Config) error {
	if cfg.Policy == attachment.PolicyNone {
		return nil
	}
	conn, err := gate.DialOnce(ctx, cfg.StateDir)
	if err == nil {
		return conn.Close()
	}
	if !errors.Is(err, gate.ErrAway) {
		return err
	}
	info, errBeat := os.Stat(gate.Heartbeat(cfg.StateDir))
	if errBeat != nil {
		return fmt.Errorf("%w, and it has not run since the node started; see the log of the node's policyd pod", err)
	}
	if away := time.Since(info.ModTime()); away > cfg.StatusGrace {
		return fmt.Errorf("%w: it has been away for %s; see the log of the node's policyd pod", err, away.Round(time.Second))
	}
	return nil
}

// room looks for a family all of whose ranges are full.
func room(cfg *cniconf.Config) error {
	usage, err := pool(cfg).Usage()
	if err != nil {
		return err
	}
	var errs []error
	for _, v4 := range []bool{true, false} {
		var ranges, full []string
		for _, u := range usage {
			if u.Range.Subnet.Addr().Is4() == v4 {
				ranges = append(ranges, u.String())
				if u.Full() {
					full = append(full, u.String())
				}
			}
		}
		if len(ranges) > 0 && len(full) == len(ranges) {
			errs = append(errs, fmt.Errorf("no address is free: %v", full))
		}
	}
	return errors.Join(errs...)
}
