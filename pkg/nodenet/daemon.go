package nodenet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/nodefiles"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/podlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// Source is where nodes come from; package cluster has two.
type Source interface {
	Nodes() (nodes []*object.Node, synced bool)
	NodeChanges() <-chan struct{}
}

// Config is what a daemon works with.
type Config struct {
	Source  Source
	Node    string // this node's name
	Options Options
	Runtime Runtime
	// Conflist is the path of the runtime's configuration; empty: none is written.
	Conflist string
	// Plugin is the program to install in BinDir; empty: none is.
	Plugin, BinDir string
	// AllowIPVS lets the node become ready beside kube-proxy in IPVS mode.
	AllowIPVS bool
	// Guarded returns nil once policies are enforced: before that, no conflist is written.
	Guarded func() error
	// RepairInterval is how often the kernel is compared with the plan.
	RepairInterval time.Duration
	Metrics        *metrics.Metrics
	Log            *slog.Logger
	// Teller is told of findings; nil for none.
	Teller Teller
}

func (c *Config) reporter() reporter {
	return reporter{metrics: c.Metrics, log: c.Log, teller: c.Teller, allowIPVS: c.AllowIPVS}
}

// Times of the daemon's own.
const (
	// eventPause is between two looks that the kernel's announcements ask for: many come together.
	eventPause = time.Second
	// unreadyPause is how often a node that is not ready is looked at again, and what failed is tried again.
	unreadyPause = time.Second
	// surroundEvery is how often the rest of the machine is looked at.
	surroundEvery = 30 * time.Second
	applyLimit    = 45 * time.Second
)

// Daemon keeps a node's network as the plan says.
type Daemon struct {
	Config
	reporter
	plane *dataplane.Plane

	// Used by the goroutine of Run alone.
	plan       *Plan
	states     map[rule.Family]*rule.State
	surround   []Finding
	surrounded time.Time
	forwards   bool // forwarding was switched on once
	installed  bool
	failing    string

	state sync.Mutex
	links map[int]bool // whose changes matter
	ready error
}

// NewDaemon prepares a daemon; nothing is written yet.
func NewDaemon(c Config) (*Daemon, error) {
	d := &Daemon{Config: c, states: map[rule.Family]*rule.State{}, reporter: c.reporter(),
		ready: errors.New("the node's network has not been looked at yet")}
	var err error
	d.plane, err = dataplane.Open(c.Runtime.Backend, dataplane.Nodes)
	return d, err
}

// Ready returns nil once the node's network stands, and else why not.
func (d *Daemon) Ready() error {
	d.state.Lock()
	defer d.state.Unlock()
	return d.ready
}

// Run works until the context ends; everything stays in force then. It returns an error only where it cannot work at all.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.plane.Close()
	events, err := d.watch(ctx)
	if err != nil {
		return err
	}
	compare := time.NewTicker(d.RepairInterval)
	defer compare.Stop()
	var again, look <-chan time.Time
	last := time.Time{}
	reread := false
	for {
		err := d.pass(ctx, reread)
		d.settle(err)
		reread, last, again, look = false, time.Now(), nil, nil
		if err != nil {
			again = time.After(unreadyPause)
		}
		for wait := true; wait; {
			select {
			case <-ctx.Done():
				return nil
			case <-d.Source.NodeChanges():
				wait = false
			case <-again: // what could not be written is read again by itself
				wait = false
			case <-look:
				wait = false
			case <-compare.C:
				wait, reread = false, true
			case <-events:
				if look == nil {
					look = time.After(time.Until(last.Add(eventPause)))
				}
			}
		}
	}
}

// settle notes how a pass has ended.
func (d *Daemon) settle(err error) {
	d.state.Lock()
	d.ready = err
	d.state.Unlock()
	switch text := fmt.Sprint(err); {
	case err != nil && text != d.failing:
		d.failing = text
		d.Log.Warn("the node's network is not ready", "reason", text)
	case err == nil && d.failing != "":
		d.failing = ""
		d.Log.Info("the node's network stands")
	}
}

// pass brings the node to what the nodes say now. The error says why it is not ready.
func (d *Daemon) pass(ctx context.Context, reread bool) error {
	ctx, cancel := context.WithTimeout(ctx, applyLimit)
	defer cancel()
	nodes, synced := d.Source.Nodes()
	if !synced {
		return errors.New("not all nodes have been read yet")
	}
	at := slices.IndexFunc(nodes, func(n *object.Node) bool { return n.Name == d.Node })
	if at < 0 {
		return d.report(finding(UnknownNode, "there is no node %s: --node must be the name that kubelet has registered", d.Node))
	}
	others := slices.Delete(slices.Clone(nodes), at, at+1)
	facts, err := Look(others, d.Options)
	if err != nil {
		return d.failed("look", err)
	}
	plan := NewPlan(nodes[at], others, facts, d.Options)
	if len(plan.Node.PodCIDRs) == 0 {
		return d.report(plan.Findings) // what stands stays: nothing better is known
	}
	d.plan = plan
	d.watchLinks(facts)
	if err := d.apply(ctx, reread); err != nil {
		return err
	}
	if time.Since(d.surrounded) > surroundEvery {
		d.surrounded = time.Now()
		if d.surround, err = Surroundings(ctx, plan, d.Conflist); err != nil {
			d.Log.Error("cannot look at all of the machine", "error", d.failed("surroundings", err))
		}
	}
	if err := d.report(slices.Concat(plan.Findings, d.surround)); err != nil {
		return err
	}
	return d.runtime()
}

func (d *Daemon) failed(kind string, err error) error {
	d.Metrics.Failures.WithLabelValues("nodenet-" + kind).Inc()
	return err
}

// apply writes rules, then links and routes: what a new tunnel delivers is judged from its first packet, and what an old one does
// to its last.
func (d *Daemon) apply(ctx context.Context, reread bool) error {
	if !d.forwards {
		var pods []netip.Addr
		for _, cidr := range d.plan.Node.PodCIDRs {
			pods = append(pods, cidr.Addr())
		}
		if err := podlink.Forward(pods, d.plan.Addresses); err != nil {
			return d.failed("forwarding", err)
		}
		d.forwards = true
	}
	if reread {
		differences, err := d.plane.Refresh(ctx)
		if err != nil {
			return d.failed("read", err)
		}
		for _, difference := range differences {
			d.Metrics.Repairs.WithLabelValues("nodes").Inc()
			d.Log.Warn("somebody else has changed our rules; putting them right", "what", difference.What)
		}
	}
	for _, f := range rule.Families {
		switch s := State(d.plan, f); {
		case d.states[f] == nil:
			d.plane.Want(s)
			d.states[f] = s
		case !reflect.DeepEqual(s, d.states[f]):
			d.plane.Change(Patch(d.states[f], s))
			d.states[f] = s
		}
	}
	if err := d.told(Unplug(d.plan)); err != nil {
		return err
	}
	if _, err := d.plane.Apply(ctx, nil); err != nil {
		return d.failed("apply", err)
	}
	return d.told(Wire(d.plan))
}

// told logs what was changed.
func (d *Daemon) told(changes []string, err error) error {
	for _, c := range changes {
		d.Log.Info("node network", "change", c)
	}
	if err != nil {
		return d.failed("wire", err)
	}
	return nil
}

// runtime tells the container runtime that the node can take pods: the plugin first, then its configuration.
func (d *Daemon) runtime() error {
	if err := d.Guarded(); err != nil {
		return fmt.Errorf("policies are not enforced yet: %w", err)
	}
	if d.Plugin != "" && !d.installed {
		installed, err := nodefiles.InstallPlugin(d.Plugin, d.BinDir)
		if err != nil {
			return d.failed("install", fmt.Errorf("install the plugin: %w", err))
		}
		d.installed = true
		if installed {
			d.Log.Info("installed the plugin", "from", d.Plugin, "folder", d.BinDir)
		}
	}
	if d.Conflist == "" {
		return nil
	}
	text, err := Conflist(d.plan, d.Runtime)
	if err != nil {
		return err
	}
	written, err := nodefiles.Write(d.Conflist, text)
	if err != nil {
		return d.failed("conflist", fmt.Errorf("write the CNI configuration: %w", err))
	}
	if written {
		d.Log.Info("wrote the CNI configuration", "file", d.Conflist)
	}
	return nil
}

// watchLinks notes whose changes matter: uplinks and the links of other nodes, not those of pods.
func (d *Daemon) watchLinks(facts Facts) {
	links := map[int]bool{}
	for _, u := range facts.Uplinks {
		links[u.Index] = true
	}
	for _, index := range facts.Shared {
		links[index] = true
	}
	d.state.Lock()
	defer d.state.Unlock()
	d.links = links
}

// watch returns a channel that receives a value, of one at most, after the kernel has announced something that matters.
func (d *Daemon) watch(ctx context.Context) (<-chan struct{}, error) {
	socket, err := nlevents.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch the node's links: %w", err)
	}
	events := make(chan struct{}, 1)
	read := func() error {
		matters := false
		lost, err := socket.Read(func(m nlevents.Message) { matters = matters || d.matters(m) })
		if matters || lost {
			select {
			case events <- struct{}{}:
			default:
			}
		}
		return err
	}
	go func() {
		defer socket.Close()
		if err := socket.Run(ctx, read); err != nil {
			d.Log.Error("what others change of the node's links is found by comparison alone", "error", d.failed("watch", err))
		}
	}()
	return events, nil
}

// matters tells what the node's network depends on from what comes with every pod. The offsets are those of linux/rtnetlink.h,
// if_addr.h and if_link.h.
func (d *Daemon) matters(m nlevents.Message) bool {
	switch m.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(m.Data) > 5 && m.Data[5] == Protocol
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return len(m.Data) > 3 && m.Data[3] == unix.RT_SCOPE_UNIVERSE
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) < 8 {
			return false
		}
		d.state.Lock()
		defer d.state.Unlock()
		return d.links[int(binary.NativeEndian.Uint32(m.Data[4:]))]
	}
	return false
}
