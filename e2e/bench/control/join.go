package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// joinPause is between two changes. It is a time, and not a wait until policyd has nothing to do: a change that comes while
// policyd compares the kernel with what it should hold counts as well.
const joinPause = 40 * time.Millisecond

// joins is row 6: remote pods get, one after the other, the label by which a policy lets them in.
func (c *cluster) joins(ctx context.Context, e effort) error {
	questions, err := nfnetlink.Open()
	if err != nil {
		return err
	}
	defer questions.Close()
	own, err := openOwn()
	if err != nil {
		return err
	}
	defer own.close()
	set, err := c.guestSet(ctx, own.Sets)
	if err != nil {
		return err
	}
	var ours, theirs []float64
	for i := range e.warmJoins + e.joins {
		took, err := c.join(ctx, sets{questions}, set)
		if err != nil {
			return err
		}
		bare, err := own.add()
		if err != nil {
			return err
		}
		if i >= e.warmJoins {
			ours, theirs = append(ours, milliseconds(took)), append(theirs, milliseconds(bare))
		}
		if err := wait(ctx, joinPause); err != nil {
			return err
		}
	}
	const explain = "A remote pod gets the label that a policy's peers have. From the packet with the event reaching policyd's " +
		"socket (kernel's clock) to the address being in the set, asked every 20 µs; the bare add is one netlink message."
	for _, p := range []struct {
		part     string
		quantile float64
		most     float64
	}{{"p50", 0.5, 1}, {"p99", 0.99, 5}} {
		c.line(e, table.Line{Row: 6, Part: p.part, What: "a remote pod joins a peer list, event to kernel",
			Beside: "one ipset add by itself", Unit: "ms", Ours: ours, Theirs: theirs, Quantile: p.quantile,
			Mark: table.NoMoreThan(p.most), Explain: explain})
		c.point(e, "A remote pod joins a peer list", p.part, "ms", table.Quantile(ours, p.quantile))
	}
	c.point(e, "A remote pod joins a peer list", "one ipset add by itself", "ms", table.Quantile(theirs, 0.5))
	again := func(ctx context.Context) error {
		_, err := c.join(ctx, sets{questions}, set)
		return errors.Join(err, wait(ctx, joinPause))
	}
	if err := c.explain(ctx, "join", busySeconds, again); err != nil || !c.short(6) {
		return err
	}
	return c.during(ctx, fmt.Sprintf("join-%d.trace", c.plan.Pods), "/debug/pprof/trace?seconds=1", again) // who waits for whom
}

// join lets the next remote pod in, and returns how long policyd took from the event.
func (c *cluster) join(ctx context.Context, kernel sets, set string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	i := c.nextGuest()
	address := c.plan.RemoteAddress(i)
	if err := c.wire.forget(); err != nil {
		return 0, err
	}
	type seen struct {
		at  time.Time
		err error
	}
	result := make(chan seen, 1)
	go func() {
		at, err := kernel.until(ctx, set, address)
		result <- seen{at, err}
	}()
	err := c.label(ctx, i, `"yes"`)
	if err != nil {
		cancel()
	}
	r := <-result
	if err := errors.Join(err, r.err); err != nil {
		return 0, err
	}
	c.guests = append(c.guests, address)
	event, err := c.wire.first()
	return r.at.Sub(event), err
}

func (c *cluster) nextGuest() int {
	c.next++
	return c.next - 1
}

// label sets the label by which the first policy lets pods in, or removes it with the value null.
func (c *cluster) label(ctx context.Context, pod int, value string) error {
	namespace, name := c.plan.PodName(pod)
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%s}}}`, apiserver.Guest, value)
	_, err := c.server.Client.CoreV1().Pods(namespace).Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// guestSet finds the set of the first policy's peers: the one that holds the guests and nobody else.
func (c *cluster) guestSet(ctx context.Context, list *ipset.Sets) (string, error) {
	if len(c.guests) == 0 {
		i := c.nextGuest()
		if err := c.label(ctx, i, `"yes"`); err != nil {
			return "", err
		}
		c.guests = append(c.guests, c.plan.RemoteAddress(i))
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	for {
		all, err := list.List(rule.SetPrefix)
		if err != nil {
			return "", err
		}
		for _, s := range all {
			if s.Type == rule.HashIP && len(s.Entries) == len(c.guests) && !slices.ContainsFunc(s.Entries, c.notGuest) {
				return s.Name, nil
			}
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("find the set with the %d guests among %d sets: %w", len(c.guests), len(all), ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *cluster) notGuest(e rule.Entry) bool { return !slices.Contains(c.guests, e.Prefix.Addr()) }

// own is a set of the benchmark's own, for the bare call.
type own struct {
	*ipset.Sets
	next netip.Addr
}

const ownSet = "bench"

func openOwn() (*own, error) {
	list, err := ipset.Open()
	if err != nil {
		return nil, err
	}
	if err := list.Create(rule.Set{Name: ownSet, Type: rule.HashIP, Family: rule.IPv4}, 0); err != nil {
		list.Close()
		return nil, err
	}
	return &own{list, netip.MustParseAddr("198.18.0.1")}, nil
}

// add is the bare call.
func (o *own) add() (time.Duration, error) {
	o.next = o.next.Next()
	begin := time.Now()
	err := o.Add(ownSet, rule.Entry{Prefix: netip.PrefixFrom(o.next, 32)})
	return time.Since(begin), err
}

func (o *own) close() {
	_ = o.Destroy(ownSet) // it goes with the namespace in any case
	o.Close()
}
