package control

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
)

// newPolicy selects the pods of the plan that are fellows, which are isolated already, and lets in what no other policy does.
func newPolicy() *networkingv1.NetworkPolicy {
	tcp, http, range0, range1 := corev1.ProtocolTCP, intstr.FromInt32(80), intstr.FromInt32(8000), int32(8010)
	in := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
		{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"app-01", "app-02", "app-03"}}}}
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: apiserver.NamespaceName(0), Name: "bench-new"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{apiserver.Fellow: "yes"}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress: []networkingv1.NetworkPolicyIngressRule{
				{From: []networkingv1.NetworkPolicyPeer{{PodSelector: in}}, Ports: []networkingv1.NetworkPolicyPort{
					{Protocol: &tcp, Port: &http}, {Protocol: &tcp, Port: &range0, EndPort: &range1}}},
				{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "172.31.0.0/16"}}}},
			},
		},
	}
}

// copies are the chains of the selected pods under other names: what to write to make them as they are with the new policy, and
// without it.
type copies struct {
	with, without saved
	lines         int
}

// policies is row 7: a policy comes, the same lines are restored by themselves into chains of other names, and it goes.
func (c *cluster) policies(ctx context.Context, e effort) error {
	kernel, err := openTables(c.backend)
	if err != nil {
		return err
	}
	defer kernel.close()
	if err := c.quiet(ctx); err != nil {
		return err
	}
	before, err := saveTables(ctx, c.backend, "mangle")
	if err != nil {
		return err
	}
	var ours, theirs []float64
	var chains *copies
	for i := range e.warmPolicies + e.policies {
		all, err := c.policyComes(ctx, kernel)
		if err == nil && chains == nil {
			chains, err = c.copy(ctx, before)
		}
		var bare time.Duration
		if err == nil {
			bare, err = c.restoreAlone(ctx, kernel, chains)
		}
		if err == nil {
			err = c.policyGoes(ctx, kernel)
		}
		if err != nil {
			return err
		}
		if i >= e.warmPolicies {
			ours = append(ours, milliseconds(all))
			theirs = append(theirs, milliseconds(bare))
		}
	}
	if err := restoreTables(ctx, c.backend, without(chains.with)); err != nil { // they look into sets, which must be free to go
		return err
	}
	explain := fmt.Sprintf("A policy with two rules for ten pods that others isolate already. From the packet with the event "+
		"reaching policyd's socket to the last commit, beside the same %d lines restored into chains of other "+
		"names, from the program's start to its commit; policyd stands still meanwhile.", chains.lines)
	c.line(e, table.Line{Row: 7, What: "a new policy that selects 10 local pods, event to kernel", Unit: "ms", Ours: ours,
		Theirs: theirs, Beside: "iptables-restore --noflush of the same lines", Mark: table.AtMost(1.5), Explain: explain})
	const plot = "A new policy that selects 10 local pods"
	c.point(e, plot, "policyd, "+c.backend, "ms", table.Quantile(ours, 0.5))
	c.point(e, plot, "iptables-restore, "+c.backend, "ms", table.Quantile(theirs, 0.5))
	return c.explain(ctx, "policy-"+c.backend, busySeconds, func(ctx context.Context) error {
		_, err := c.policyComes(ctx, kernel)
		return errors.Join(err, c.policyGoes(ctx, kernel))
	})
}

// servedFamilies is how many families policyd writes policies of on a node whose pods have IPv4 alone.
const servedFamilies = 1

// policyComes makes the policy, and returns how long it took from the event to the last commit.
func (c *cluster) policyComes(ctx context.Context, kernel *tables) (took time.Duration, err error) {
	if err := c.wire.forget(); err != nil {
		return 0, err
	}
	times, err := c.commitsOf(ctx, kernel, servedFamilies, func(ctx context.Context) error {
		policy := newPolicy()
		_, err := c.server.Client.NetworkingV1().NetworkPolicies(policy.Namespace).Create(ctx, policy, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return 0, err
	}
	event, err := c.wire.first()
	return times[len(times)-1].Sub(event), err
}

func (c *cluster) policyGoes(ctx context.Context, kernel *tables) error {
	_, err := c.commitsOf(ctx, kernel, servedFamilies, func(ctx context.Context) error {
		policy := newPolicy()
		return c.server.Client.NetworkingV1().NetworkPolicies(policy.Namespace).Delete(ctx, policy.Name, metav1.DeleteOptions{})
	})
	if err != nil {
		return err
	}
	return c.quiet(ctx)
}

// commitsOf does something and returns the commits to the kernel's tables that follow, of which there are at least so many.
func (c *cluster) commitsOf(ctx context.Context, kernel *tables, least int, do func(context.Context) error) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	noted, err := kernel.watch()
	if err != nil {
		return nil, err
	}
	err = do(ctx)
	if err == nil {
		err = noted.settle(ctx, least)
	}
	times, err2 := noted.end()
	return times, errors.Join(err, err2)
}

// copy finds the chains that the policy has changed, and makes their copies, without it.
func (c *cluster) copy(ctx context.Context, before saved) (*copies, error) {
	after, err := saveTables(ctx, c.backend, "mangle")
	if err != nil {
		return nil, err
	}
	chains := &copies{}
	chains.with, chains.lines = rewrite(after, before)
	chains.without, _ = rewrite(before, after)
	if chains.lines == 0 {
		return nil, errors.New("the new policy has changed no chain")
	}
	return chains, restoreTables(ctx, c.backend, chains.without)
}

// restoreAlone times what iptables-restore needs for the copies, and makes them as they were.
func (c *cluster) restoreAlone(ctx context.Context, kernel *tables, chains *copies) (took time.Duration, err error) {
	if err := c.quiet(ctx); err != nil {
		return 0, err
	}
	if err := syscall.Kill(c.policyd.Pid, syscall.SIGSTOP); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, syscall.Kill(c.policyd.Pid, syscall.SIGCONT), c.quiet(ctx)) }()
	var begin time.Time
	times, err := c.commitsOf(ctx, kernel, servedFamilies, func(ctx context.Context) error {
		begin = time.Now()
		return restoreTables(ctx, c.backend, chains.with)
	})
	if err != nil {
		return 0, err
	}
	return times[len(times)-1].Sub(begin), restoreTables(ctx, c.backend, chains.without)
}
