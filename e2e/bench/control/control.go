package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
)

// Bench is rows 6 to 12.
func Bench() table.Bench {
	return table.Bench{Name: "control", Rows: []int{6, 7, 8, 9, 10, 11, 12}, Run: run}
}

const (
	dataDir = "/run/apiserver" // a tmpfs
	seed    = 20

	readyLimit = 3 * time.Minute // for policyd to read and write everything
	stepLimit  = time.Minute     // for one change to be in the kernel

	attachAtOnce = 4
)

// effort is how much is measured at one size of the cluster.
type effort struct {
	pods                          int
	joins, policies, starts       int // rounds of rows 6, 7 and 8
	settling, idle, busy          time.Duration
	marked                        bool // the rows are about a cluster of this size
	mebibytes                     float64
	restarts                      int
	curves                        bool
	warmJoins, warmPolicies, rate int
}

// sizes are those of the cluster, one after the other, the same objects and more.
func sizes(env table.Env) []effort {
	if env.Quick {
		return []effort{{pods: 2000, joins: 60, policies: 5, starts: 3, settling: 3 * time.Second, idle: 10 * time.Second,
			busy: 10 * time.Second, marked: true, mebibytes: 64, restarts: 1, warmJoins: 10, warmPolicies: 1, rate: 100}}
	}
	rows := effort{pods: 10_000, joins: 200, policies: 15, starts: 5, settling: 10 * time.Second, idle: time.Minute, busy: time.Minute,
		marked: true, mebibytes: 64, restarts: 3, curves: true, warmJoins: 20, warmPolicies: 2, rate: 100}
	if !env.Rows[10] { // nothing else is about more pods
		return []effort{rows}
	}
	small := effort{pods: 1000, joins: 60, policies: 5, starts: 3, settling: 5 * time.Second, idle: 5 * time.Second,
		busy: 5 * time.Second, curves: true, warmJoins: 20, warmPolicies: 2, rate: 100}
	large := small
	large.pods, large.settling, large.mebibytes = 100_000, 10*time.Second, 256
	return []effort{small, rows, large}
}

// plan is the cluster, without its pods.
func plan(env table.Env) apiserver.Plan {
	p := apiserver.Plan{Seed: seed, Node: world.NodeName, Local: 250, Namespaces: 1000, Policies: 1000}
	if env.Quick {
		p.Local, p.Namespaces, p.Policies = 100, 200, 300
	}
	return p
}

// cluster is what is measured, at one backend of iptables.
type cluster struct {
	env     table.Env
	backend string
	server  *apiserver.Server
	node    *world.Node
	plan    apiserver.Plan // what there is now
	wire    *wire
	policyd *world.Policyd // nil while it is stopped
	guests  []netip.Addr   // remote pods that have been let into the first policy's peer list
	next    int            // the remote pod that is the next guest
	report  table.Report
	curves  map[string]*table.Curve
	order   []string // of curves
}

// run measures with the first backend; whoever wants both calls it for each, in other namespaces.
func run(ctx context.Context, env table.Env) (table.Report, error) {
	c := &cluster{env: env, backend: env.Backends[0], plan: plan(env), curves: map[string]*table.Curve{}}
	return c.run(ctx, sizes(env))
}

func (c *cluster) run(ctx context.Context, all []effort) (table.Report, error) {
	err := c.measure(ctx, all)
	if c.server != nil {
		c.server.Stop()
	}
	for _, name := range c.order {
		c.report.Curves = append(c.report.Curves, *c.curves[name])
	}
	if c.policyd != nil {
		err = errors.Join(err, c.policyd.Kill())
	}
	return c.report, err
}

func (c *cluster) measure(ctx context.Context, all []effort) error {
	if err := c.build(ctx, all[0].pods); err != nil {
		return err
	}
	defer c.wire.close()
	for _, e := range all {
		if err := c.grow(ctx, e.pods); err != nil {
			return err
		}
		if err := c.rows(ctx, e); err != nil {
			return fmt.Errorf("with %d pods: %w", e.pods, err)
		}
	}
	return nil
}

// rows measures what is wanted at one size. The memory of a policyd is that of one that has only just read everything, so that
// comes first.
func (c *cluster) rows(ctx context.Context, e effort) error {
	for _, part := range []struct {
		rows []int
		do   func(context.Context, effort) error
	}{
		{[]int{10, 11, 12}, c.costs}, {[]int{6}, c.joins}, {[]int{7}, c.policies}, {[]int{8}, c.starts}, {[]int{9}, c.restarts},
	} {
		if !slices.ContainsFunc(part.rows, func(row int) bool { return c.env.Rows[row] }) {
			continue
		}
		c.env.Say("%s: %d pods: rows %v", c.backend, e.pods, part.rows)
		if err := part.do(ctx, e); err != nil {
			return fmt.Errorf("rows %v: %w", part.rows, err)
		}
	}
	return nil
}

// build makes the cluster with its node and the node's pods, guarded by policyd.
func (c *cluster) build(ctx context.Context, pods int) error {
	c.plan.Pods = pods
	c.next = c.plan.Local
	var err error
	if c.node, err = world.New(ctx, c.env, c.backend); err != nil {
		return err
	}
	programs, err := apiserver.Programs(c.env.Bin)
	if err != nil {
		return err
	}
	if c.server, err = apiserver.Start(ctx, programs, dataDir); err != nil {
		return err
	}
	c.env.Say("%s: making %d pods, %d namespaces, %d policies", c.backend, pods, c.plan.Namespaces, c.plan.Policies)
	local, err := c.server.Seed(ctx, c.plan)
	if err != nil {
		return err
	}
	if c.wire, err = listenOnWire(); err != nil {
		return err
	}
	if _, err := c.start(ctx); err != nil {
		return err
	}
	c.env.Say("%s: attaching %d pods", c.backend, len(local))
	return apiserver.Each(ctx, 0, len(local), attachAtOnce, func(ctx context.Context, i int) error {
		pod := local[i]
		addresses, err := c.node.Attach(ctx, world.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)})
		if err != nil {
			return err
		}
		return c.server.SetAddresses(ctx, pod, addresses...)
	})
}

// grow makes pods until there are so many.
func (c *cluster) grow(ctx context.Context, pods int) error {
	if pods == c.plan.Pods {
		return nil
	}
	if err := c.stop(); err != nil { // it would only be in the way
		return err
	}
	c.env.Say("%s: making %d pods", c.backend, pods-c.plan.Pods)
	to := c.plan
	to.Pods = pods
	_, err := c.server.Grow(ctx, c.plan, to)
	c.plan = to
	if err != nil {
		return err
	}
	_, err = c.start(ctx)
	return err
}

// start starts policyd and returns how long it took until everything was enforced.
func (c *cluster) start(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	var err error
	if c.policyd, err = c.node.StartPolicyd(ctx, "--kubeconfig", c.server.Kubeconfig, "--pprof"); err != nil {
		return 0, err
	}
	if err := c.ready(ctx); err != nil {
		return 0, fmt.Errorf("wait for policyd, see %s: %w", c.policyd.Log, err)
	}
	return time.Since(begin), nil
}

// ready waits until policyd says that policies are enforced.
func (c *cluster) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	for {
		_, err := c.get(ctx, "/readyz")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Millisecond):
		}
	}
}

// get asks policyd's port.
func (c *cluster) get(ctx context.Context, page string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.policyd.URL+page, nil)
	if err != nil {
		return nil, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("policyd says to %s: %s: %s", page, answer.Status, body)
	}
	return body, err
}

func (c *cluster) stop() error {
	if c.policyd == nil {
		return nil
	}
	err := c.policyd.Stop()
	c.policyd = nil
	return err
}

// empty stops policyd and takes everything of postern out of the kernel; the pods stay attached.
func (c *cluster) empty(ctx context.Context) error {
	if err := c.stop(); err != nil {
		return err
	}
	cleanup := exec.CommandContext(ctx, filepath.Join(c.env.Bin, "policyd"), "cleanup", "--state-dir", world.StateDir)
	if out, err := cleanup.CombinedOutput(); err != nil {
		return fmt.Errorf("policyd cleanup: %w: %s", err, out)
	}
	return nil
}

// line adds a line about a row whose cluster has this size. Lines of other sizes are points of curves alone.
func (c *cluster) line(e effort, l table.Line) table.Line {
	if l.Backend == "" && (l.Row == 7 || l.Row == 8) {
		l.Backend = c.backend
	}
	if e.marked || l.Row == 10 && e.mebibytes > 0 {
		c.report.Lines = append(c.report.Lines, l)
	}
	return l
}

// point adds to a curve the value at this size of the cluster.
func (c *cluster) point(e effort, plot, name, unit string, value float64) {
	if !e.curves {
		return
	}
	key := plot + "\x00" + name
	if c.curves[key] == nil {
		c.curves[key] = &table.Curve{Plot: plot, Name: name, XLabel: "pods in the cluster", YLabel: unit}
		c.order = append(c.order, key)
	}
	c.curves[key].Points = append(c.curves[key].Points, table.Point{X: float64(e.pods), Y: value})
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
