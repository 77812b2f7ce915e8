package attach

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/hostport"
	"github.com/postern-cni/postern/pkg/ipam"
	"github.com/postern-cni/postern/pkg/podlink"
)

// lockLimit is how long a call waits for the others on the node.
const lockLimit = 60 * time.Second

// Plugin does the calls of one process. The zero value is ready to use.
type Plugin struct {
	// Fail, in tests, is asked before each step of ADD, by its name, and makes it fail.
	Fail func(step string) error
}

// adding is an ADD under way.
type adding struct {
	cfg   *cniconf.Config
	store *attachment.Store
	gate  *gate.Client
	// patience is when the plugin stops waiting for policyd's word.
	patience time.Time
	ports    *attachment.Lock
	a        *attachment.Attachment
	ipam     *types100.Result // of a delegated plugin
	// routes are the destinations that the container now reaches over the link.
	routes []netip.Prefix
}

// step is a part of ADD and what takes it back. undo is called for a step that failed half way too.
type step struct {
	name string
	do   func(context.Context) error
	undo func(context.Context) error
}

// Add attaches the container and returns the result for the runtime. On failure nothing is left; what cannot be taken back is
// in the error, and DEL or GC finds it. Errors are *types.Error with the codes of the specification.
func (p *Plugin) Add(ctx context.Context, cfg *cniconf.Config) (*types100.Result, error) {
	add := &adding{cfg: cfg, store: attachment.Open(cfg.StateDir)}
	unlock, err := lock(ctx, add.store, attachment.NodeShared, attachment.Interface(cfg.HostInterface()))
	if err != nil {
		return nil, coded(types.ErrTryAgainLater, err)
	}
	defer unlock()
	defer add.close()
	steps := add.steps()
	for i, s := range steps {
		err := p.fail(s.name)
		if err == nil {
			err = s.do(ctx)
		}
		if err == nil {
			continue
		}
		errs := []error{fmt.Errorf("add %s: %w", describe(cfg), err)}
		for j := i; j >= 0; j-- {
			if steps[j].undo == nil {
				continue
			}
			if err := steps[j].undo(context.WithoutCancel(ctx)); err != nil {
				errs = append(errs, fmt.Errorf("undo %s: %w", steps[j].name, err))
			}
		}
		return nil, coded(types.ErrInternal, errors.Join(errs...))
	}
	return add.result(), nil
}

func (p *Plugin) fail(name string) error {
	if p.Fail == nil {
		return nil
	}
	return p.Fail(name)
}

func (add *adding) steps() []step {
	return []step{
		{"reach policyd", add.reach, nil},
		{"reserve addresses", add.reserve, add.release},
		{"host ports: lock", add.lockPorts, nil},
		{"record", add.record, func(context.Context) error { return add.store.Delete(add.cfg.Key()) }},
		{"ask policyd", add.ask, func(context.Context) error { return unready(add.a.HostInterface, add.a.Addresses) }},
		{"link", add.link, func(context.Context) error {
			return podlink.Delete(add.cfg.HostInterface(), add.cfg.Key())
		}},
		{"host ports", add.mapPorts, add.unmapPorts},
		{"guard", add.guard, nil},
	}
}

// reach connects to policyd, within the gate's limit.
func (add *adding) reach(ctx context.Context) (err error) {
	if add.cfg.Policy == attachment.PolicyNone {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, add.cfg.GateTimeout)
	defer cancel()
	add.gate, err = gate.Dial(ctx, add.cfg.StateDir)
	if err != nil {
		return coded(types.ErrTryAgainLater, fmt.Errorf("%w; no pod starts unguarded: see why with `policyd status` on the node, "+
			"or with the log of its policyd pod", err))
	}
	return nil
}

func (add *adding) reserve(ctx context.Context) error {
	addrs, err := add.addresses(ctx)
	if err != nil {
		return err
	}
	node, mtu, err := add.nodeSide(addrs)
	if err != nil {
		return err
	}
	add.a = &attachment.Attachment{
		Version:       1,
		ContainerID:   add.cfg.ContainerID,
		IfName:        add.cfg.IfName,
		NetNS:         add.cfg.NetNS,
		Network:       add.cfg.Name,
		Pod:           add.cfg.Pod,
		Policy:        add.cfg.Policy,
		HostInterface: add.cfg.HostInterface(),
		HostMAC:       mac(add.cfg.Key(), "host"),
		PodMAC:        mac(add.cfg.Key(), "pod"),
		MTU:           mtu,
		Addresses:     addrs,
		NodeAddresses: node,
		PortMappings:  add.cfg.PortMappings,
		Created:       time.Now(),
	}
	if !add.cfg.IPAM.Own() {
		add.a.IPAM = add.cfg.IPAM.Type
		return nil
	}
	for _, r := range add.cfg.IPAM.Ranges {
		add.a.Ranges = append(add.a.Ranges, r.Prefixes()...)
	}
	return nil
}

// nodeSide is what the configuration says of the node's addresses and of the MTU, and what the node says where it is silent.
func (add *adding) nodeSide(pod []netip.Addr) (addrs []netip.Addr, mtu int, err error) {
	addrs, mtu = add.cfg.NodeAddresses, add.cfg.MTU
	n, err := podlink.OpenNode()
	if err != nil {
		return nil, 0, err
	}
	defer n.Close()
	for _, v4 := range []bool{true, false} {
		if family(addrs, v4) != nil {
			continue
		}
		found, err := n.Addresses(family(pod, v4))
		if err != nil {
			return nil, 0, err
		}
		addrs = append(addrs, found...)
	}
	if mtu == 0 {
		mtu, err = n.MTU(addrs)
	}
	return addrs, mtu, err
}

func family(addrs []netip.Addr, v4 bool) (of []netip.Addr) {
	for _, a := range addrs {
		if a.Is4() == v4 {
			of = append(of, a)
		}
	}
	return of
}

func (add *adding) addresses(ctx context.Context) ([]netip.Addr, error) {
	if !add.cfg.IPAM.Own() {
		return add.delegateAdd(ctx)
	}
	addrs, err := pool(add.cfg).Reserve(add.cfg.Key())
	var full *ipam.FullError
	if errors.As(err, &full) {
		err = coded(types.ErrTryAgainLater, err)
	}
	return addrs, err
}

func pool(cfg *cniconf.Config) *ipam.Pool {
	return ipam.Open(cfg.StateDir, cfg.Name, cfg.IPAM.Ranges, cfg.IPAM.ReuseAfter)
}

func (add *adding) release(ctx context.Context) error {
	if !add.cfg.IPAM.Own() {
		return delegateDel(ctx, add.cfg)
	}
	return pool(add.cfg).Release(add.cfg.Key())
}

// lockPorts comes before the record, so that of two pods that want one port the first to come here has it, and the other is
// told its name.
func (add *adding) lockPorts(ctx context.Context) (err error) {
	if len(add.cfg.PortMappings) > 0 {
		add.ports, err = add.store.Lock(ctx, attachment.HostPorts)
	}
	return err
}

func (add *adding) record(context.Context) error { return add.store.Put(add.a) }

// ask has policyd begin while the link is made: it needs the record alone.
func (add *adding) ask(ctx context.Context) error {
	if add.gate == nil {
		return nil
	}
	add.patience = time.Now().Add(add.cfg.GateTimeout)
	ctx, cancel := context.WithDeadline(ctx, add.patience)
	defer cancel()
	return add.refused(add.gate.AskGuard(ctx, add.a))
}

func (add *adding) refused(err error) error {
	if err == nil {
		return nil
	}
	return coded(types.ErrTryAgainLater, fmt.Errorf("policyd has not guarded the pod within %s: %w; see `policyd status`",
		add.cfg.GateTimeout, err))
}

func (add *adding) link(ctx context.Context) (err error) {
	add.routes, err = podlink.Create(ctx, podlink.Link{Attachment: add.a, Routes: add.cfg.IPAM.Routes})
	return err
}

func (add *adding) mapPorts(ctx context.Context) error {
	if add.ports == nil {
		return nil
	}
	err := hostport.Apply(ctx, portEnv(add.cfg, add.ports), add.a, withPorts(add.store))
	if err == nil {
		add.unlockPorts()
	}
	return err
}

func (add *adding) unmapPorts(ctx context.Context) (err error) {
	if len(add.cfg.PortMappings) == 0 {
		return nil
	}
	if add.ports == nil { // a later step failed
		if add.ports, err = add.store.Lock(ctx, attachment.HostPorts); err != nil {
			return err
		}
	}
	defer add.unlockPorts()
	return hostport.Remove(ctx, portEnv(add.cfg, add.ports), add.a, withPorts(add.store))
}

func (add *adding) unlockPorts() {
	if add.ports != nil {
		add.ports.Release()
		add.ports = nil
	}
}

// guard waits for policyd's word.
func (add *adding) guard(ctx context.Context) error {
	if add.gate == nil {
		return nil
	}
	ctx, cancel := context.WithDeadline(ctx, add.patience)
	defer cancel()
	return add.refused(add.gate.Guarded(ctx))
}

func (add *adding) close() {
	add.unlockPorts()
	if add.gate != nil {
		_ = add.gate.Close() // nothing is under way on it
	}
}

// mac makes a locally administered unicast address (IEEE 802, 8.2) that is the same for a repeated ADD.
func mac(k attachment.Key, end string) string {
	sum := sha256.Sum256([]byte(k.String() + "\x00" + end))
	hw := net.HardwareAddr(sum[:6])
	hw[0] = hw[0]&^1 | 2
	return hw.String()
}

func describe(cfg *cniconf.Config) string {
	if cfg.Pod.Name != "" {
		return fmt.Sprintf("pod %s/%s (container %s, %s)", cfg.Pod.Namespace, cfg.Pod.Name, cfg.ContainerID, cfg.IfName)
	}
	return fmt.Sprintf("container %s (%s)", cfg.ContainerID, cfg.IfName)
}

// lock takes locks in order and returns what releases them all.
func lock(ctx context.Context, store *attachment.Store, what ...attachment.Lockable) (func(), error) {
	ctx, cancel := context.WithTimeout(ctx, lockLimit)
	defer cancel()
	var held []*attachment.Lock
	release := func() {
		for i := len(held) - 1; i >= 0; i-- {
			held[i].Release()
		}
	}
	for _, w := range what {
		l, err := store.Lock(ctx, w)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, l)
	}
	return release, nil
}

// coded gives an error one of the specification's codes, unless one within it has a code already.
func coded(code uint, err error) error {
	if err == nil {
		return nil
	}
	var inner *types.Error
	if errors.As(err, &inner) {
		code = inner.Code
	}
	return &types.Error{Code: code, Msg: err.Error()}
}
