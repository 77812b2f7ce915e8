package latency

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
)

// Names of the two sides, as benchmarks.
const (
	largeName = "latency-large"
	emptyName = "latency-empty"
)

// The cluster: of its local pods two are those that are looked at.
const (
	pods       = 5000
	quickPods  = 1000
	policies   = 500
	local      = 20
	namespaces = 500
)

// Large is the side with a large cluster, which [Bench] starts; no row asks for it.
func Large() table.Bench {
	return table.Bench{Name: largeName, Run: func(ctx context.Context, env table.Env) (table.Report, error) {
		plan := apiserver.Plan{Seed: 1, Node: world.NodeName,
			Local: local - 2, Pods: pods - 2, Namespaces: namespaces, Policies: policies}
		if env.Quick {
			plan.Pods = quickPods - 2
		}
		return table.Report{}, serve(ctx, env, plan)
	}}
}

// Empty is the side whose cluster has nothing but the two pods and their policy.
func Empty() table.Bench {
	return table.Bench{Name: emptyName, Run: func(ctx context.Context, env table.Env) (table.Report, error) {
		return table.Report{}, serve(ctx, env, apiserver.Plan{Seed: 1, Node: world.NodeName})
	}}
}

// The objects that are looked at.
const (
	namespace = "latency"
	pollerPod = "poller"
	targetPod = "target"
	guest     = "guest" // a label; pods that have it are let in to the target
	admit     = "admit-poller"
)

// side is one cluster, with one node.
type side struct {
	api     *apiserver.Server
	policyd *world.Policyd
	prober  *prober
	pauses  *rand.Rand
}

// serve makes the cluster, says that it is there, and then does what it is told until there are no more orders.
func serve(ctx context.Context, env table.Env, plan apiserver.Plan) error {
	s, err := newSide(ctx, env, plan)
	if err != nil {
		return err
	}
	defer s.api.Stop()
	out, in := json.NewEncoder(os.Stdin), json.NewDecoder(os.Stdin) // a socket
	size := fmt.Sprintf("%d pods, %d policies, %d pods on the node", plan.Pods+2, plan.Policies+1, plan.Local+2)
	if err := out.Encode(news{Size: size}); err != nil {
		return err
	}
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return s.prober.close()
		} else if err != nil {
			return err
		}
		seen, err := s.measure(ctx, o.Part)
		if err != nil {
			return err
		}
		if err := out.Encode(news{Seen: seen}); err != nil {
			return err
		}
	}
}

// newSide makes the node, the API server and what is in it, starts policyd, and attaches the local pods.
func newSide(ctx context.Context, env table.Env, plan apiserver.Plan) (s *side, err error) {
	node, err := world.New(ctx, env, env.Backends[0])
	if err != nil {
		return nil, err
	}
	s = &side{pauses: rand.New(rand.NewPCG(1, uint64(plan.Pods)))}
	if s.api, err = apiserver.Start(ctx, filepath.Join(filepath.Dir(env.Bin), "e2e"), "/run/apiserver"); err != nil {
		return nil, err
	}
	start := time.Now()
	pods, err := s.seed(ctx, plan)
	if err != nil {
		return nil, fmt.Errorf("fill the cluster: %w", err)
	}
	env.Say("%d pods and %d policies made in %.1f s", plan.Pods, plan.Policies, time.Since(start).Seconds())
	if s.policyd, err = node.StartPolicyd(ctx, "--kubeconfig", s.api.Kubeconfig); err != nil {
		return nil, err
	}
	if err := s.policyd.Settle(ctx); err != nil {
		return nil, err
	}
	at := map[string]netip.Addr{}
	for _, pod := range pods {
		addrs, err := node.Attach(ctx, onNode(pod))
		if err != nil {
			return nil, err
		}
		if err := s.api.SetAddresses(ctx, pod, addrs...); err != nil {
			return nil, err
		}
		at[pod.Namespace+"/"+pod.Name] = addrs[0]
	}
	if err := s.policyd.Settle(ctx); err != nil {
		return nil, err
	}
	poller := onNode(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: pollerPod}})
	s.prober, err = newProber(poller.Path(), at[namespace+"/"+pollerPod], at[namespace+"/"+targetPod])
	return s, err
}

func onNode(pod *corev1.Pod) world.Pod {
	return world.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Labels: pod.Labels}
}

// seed makes the plan's objects and those that are looked at, and returns the local pods.
func (s *side) seed(ctx context.Context, plan apiserver.Plan) ([]*corev1.Pod, error) {
	pods, err := s.api.Seed(ctx, plan)
	if err != nil {
		return nil, err
	}
	if _, err := s.api.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}},
		metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	for _, name := range []string{pollerPod, targetPod} {
		pod, err := s.api.Client.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
			Spec: corev1.PodSpec{NodeName: world.NodeName, Containers: []corev1.Container{{Name: "main", Image: "bench",
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m")}}}}},
		}, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		pods = append(pods, pod)
	}
	everywhere := &metav1.LabelSelector{}
	return pods, s.make(ctx, policy("guests", networkingv1.NetworkPolicyPeer{
		NamespaceSelector: everywhere, PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{guest: "yes"}}}))
}

// policy lets peers in to the target.
func policy(name string, from networkingv1.NetworkPolicyPeer) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": targetPod}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{from}}},
		},
	}
}

func (s *side) make(ctx context.Context, p *networkingv1.NetworkPolicy) error {
	_, err := s.api.Client.NetworkingV1().NetworkPolicies(namespace).Create(ctx, p, metav1.CreateOptions{})
	return err
}

// change makes the change of a part, in one call.
func (s *side) change(ctx context.Context, part int) error {
	switch part {
	case 0:
		return s.label(ctx, `"yes"`)
	case 1:
		return s.label(ctx, `null`)
	case 2:
		return s.make(ctx, policy(admit, networkingv1.NetworkPolicyPeer{
			PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": pollerPod}}}))
	case 3:
		return s.api.Client.NetworkingV1().NetworkPolicies(namespace).Delete(ctx, admit, metav1.DeleteOptions{})
	}
	return fmt.Errorf("there is no part %d", part)
}

// label puts the guests' label onto the poller, or takes it off.
func (s *side) label(ctx context.Context, value string) error {
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, guest, value)
	_, err := s.api.Client.CoreV1().Pods(namespace).Patch(ctx, pollerPod, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// measure makes the change of a part and sees when it shows. Then it waits until nothing more follows from it: policyd judges
// flows once more 100 ms after a change. The rest of the pause is by chance, lest it fits some period of anybody's.
func (s *side) measure(ctx context.Context, part int) (Seen, error) {
	seen, err := s.prober.see(ctx, parts[part].open, func(ctx context.Context) error { return s.change(ctx, part) })
	if err != nil {
		return seen, err
	}
	if err := s.policyd.Settle(ctx); err != nil {
		return seen, err
	}
	const least, more = 110 * time.Millisecond, 50 * time.Millisecond
	select {
	case <-time.After(least + time.Duration(s.pauses.Int64N(int64(more)))):
		return seen, nil
	case <-ctx.Done():
		return seen, ctx.Err()
	}
}
