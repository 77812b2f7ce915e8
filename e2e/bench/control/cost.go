package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// costs is rows 10 to 12, of a policyd that has only just been started.
func (c *cluster) costs(ctx context.Context, e effort) error {
	if err := c.stop(); err != nil {
		return err
	}
	if _, err := c.start(ctx); err != nil {
		return err
	}
	if err := wait(ctx, e.settling); err != nil {
		return err
	}
	if c.env.Rows[10] {
		if err := c.memory(ctx, e); err != nil {
			return err
		}
	}
	if c.env.Rows[11] {
		cost, children, err := c.cpuDuring(ctx, e.idle, func(ctx context.Context) error { return wait(ctx, e.idle) })
		if err != nil {
			return err
		}
		c.line(e, table.Line{Row: 11, What: "idle CPU", Unit: "% of a core", Ours: []float64{cost}, Mark: table.NoMoreThan(0.1),
			Explain: fmt.Sprintf("CPU time of policyd, and of the programs it ran (%.2g), over %v without any change in the cluster.",
				children, e.idle)})
		c.point(e, "CPU of policyd", "idle", "% of a core", cost)
		if err := c.explain(ctx, "idle", idleSeconds, func(ctx context.Context) error { return wait(ctx, time.Second) }); err != nil {
			return err
		}
	}
	if c.env.Rows[12] {
		return c.load(ctx, e)
	}
	return nil
}

// memory is row 10.
func (c *cluster) memory(ctx context.Context, e effort) error {
	now, err := c.resident("VmRSS")
	if err != nil {
		return err
	}
	peak, err := c.resident("VmHWM")
	if err != nil {
		return err
	}
	part := fmt.Sprintf("%d pods", e.pods)
	c.line(e, table.Line{Row: 10, Part: part, What: "resident memory", Unit: "MiB", Ours: []float64{now},
		Mark:    table.NoMoreThan(e.mebibytes),
		Explain: fmt.Sprintf("VmRSS of policyd %v after it has read everything, in its second start with this cluster.", e.settling)})
	c.line(e, table.Line{Row: 10, Part: part + ", at most", What: "the most so far", Unit: "MiB", Ours: []float64{peak},
		Explain: "VmHWM of the same process: most is needed while everything is read."})
	c.point(e, "Memory of policyd", "resident", "MiB", now)
	c.point(e, "Memory of policyd", "at most", "MiB", peak)
	if e.mebibytes > 0 && now > e.mebibytes {
		return c.save(ctx, fmt.Sprintf("memory-%d.heap", e.pods), "/debug/pprof/heap")
	}
	return nil
}

// resident reads a line of /proc/PID/status, in MiB.
func (c *cluster) resident(name string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.policyd.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if words := strings.Fields(line); len(words) == 3 && words[0] == name+":" {
			kib, err := strconv.ParseFloat(words[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("policyd has no %s in its /proc/PID/status", name)
}

// load is row 12.
func (c *cluster) load(ctx context.Context, e effort) error {
	cost, children, err := c.cpuDuring(ctx, e.busy, func(ctx context.Context) error { return c.changes(ctx, e.rate, e.busy) })
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d changes of remote pods a second", e.rate)
	c.line(e, table.Line{Row: 12, What: what, Unit: "% of a core", Ours: []float64{cost}, Mark: table.NoMoreThan(5),
		Explain: fmt.Sprintf("CPU time of policyd, and of the programs it ran (%.2g), over %v. Each change matters: the label of a "+
			"remote pod comes or goes by which a policy of this node lets it in.", children, e.busy)})
	c.point(e, "CPU of policyd", what, "% of a core", cost)
	return c.explain(ctx, "changes", busySeconds, func(ctx context.Context) error { return c.changes(ctx, e.rate, time.Second) })
}

// changes makes changes at a rate for a time: a pod becomes a guest, and no guest again.
func (c *cluster) changes(ctx context.Context, rate int, d time.Duration) error {
	const atOnce = 8
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type change struct {
		pod   int
		value string
	}
	var group sync.WaitGroup
	var workers []chan change // each for pods of its own: their changes stay in order
	for range atOnce {
		work := make(chan change, rate)
		workers = append(workers, work)
		group.Go(func() {
			for w := range work {
				if err := c.label(ctx, w.pod, w.value); err != nil {
					cancel(err)
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(seed, uint64(c.next)))
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	guests := map[int]bool{}
	for i := 0; i < int(d.Seconds()*float64(rate)) && ctx.Err() == nil; i++ {
		<-tick.C
		pod := c.plan.Pods - 1 - r.IntN((c.plan.Pods-c.plan.Local)/2) // not those that row 6 takes
		guests[pod] = !guests[pod]
		select {
		case workers[pod%atOnce] <- change{pod, map[bool]string{true: `"yes"`, false: "null"}[guests[pod]]}:
		default:
			cancel(fmt.Errorf("the API server does not take %d changes a second", rate))
		}
	}
	for pod, in := range guests {
		if in && ctx.Err() == nil {
			workers[pod%atOnce] <- change{pod, "null"}
		}
	}
	for _, work := range workers {
		close(work)
	}
	group.Wait()
	return context.Cause(ctx)
}

// cpuDuring is the CPU time that policyd and its children take while something goes on, and that of the children alone, as parts
// of the given time.
func (c *cluster) cpuDuring(ctx context.Context, d time.Duration, do func(context.Context) error) (all, children float64, err error) {
	before, childrenBefore, err := c.cpu()
	if err != nil {
		return 0, 0, err
	}
	if err := do(ctx); err != nil {
		return 0, 0, err
	}
	after, childrenAfter, err := c.cpu()
	children = 100 * float64(childrenAfter-childrenBefore) / float64(d)
	return 100*float64(after-before)/float64(d) + children, children, err
}

// cpu is the time that policyd has had, to the nanosecond (clock_getcpuclockid(3)), and the children that it has waited for, in
// ticks of 10 ms (cutime and cstime of proc(5)).
func (c *cluster) cpu() (own, children time.Duration, err error) {
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^c.policyd.Pid<<3|2), &t); err != nil {
		return 0, 0, fmt.Errorf("ask for policyd's CPU time: %w", err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.policyd.Pid))
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 15 {
		return 0, 0, errors.New("policyd's /proc/PID/stat is short")
	}
	const tick = 10 * time.Millisecond
	for _, field := range fields[13:15] {
		n, err := strconv.Atoi(field)
		if err != nil {
			return 0, 0, err
		}
		children += time.Duration(n) * tick
	}
	return time.Duration(t.Nano()), children, nil
}

// quiet waits until policyd has nothing to do: less than a fiftieth of a core for a while.
func (c *cluster) quiet(ctx context.Context) error {
	const look = 20 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	last, _, err := c.cpu()
	for calm := 0; err == nil && calm < 2; {
		if err := wait(ctx, look); err != nil {
			return fmt.Errorf("wait until policyd has nothing to do: %w", err)
		}
		var now time.Duration
		now, _, err = c.cpu()
		if calm++; now-last > look/50 {
			calm = 0
		}
		last = now
	}
	return err
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
