package apiserver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// atOnce is how many requests are under way at the same time, each connection carrying its part of them.
const (
	atOnce      = 64
	connections = 4
)

// Seed makes what the plan says. It returns the local pods as the API server has them.
func (s *Server) Seed(ctx context.Context, p Plan) ([]*corev1.Pod, error) {
	err := each(ctx, 0, p.Namespaces, func(ctx context.Context, c *kubernetes.Clientset, i int) error {
		_, err := c.CoreV1().Namespaces().Create(ctx, p.Namespace(i), metav1.CreateOptions{})
		return err
	})
	if err == nil {
		err = each(ctx, 0, p.Policies, func(ctx context.Context, c *kubernetes.Clientset, i int) error {
			policy := p.PolicyObject(i)
			_, err := c.NetworkingV1().NetworkPolicies(policy.Namespace).Create(ctx, policy, metav1.CreateOptions{})
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	return s.Grow(ctx, Plan{Seed: p.Seed, Node: p.Node, Local: p.Local, Namespaces: p.Namespaces, Policies: p.Policies}, p)
}

// Grow makes the pods, and the nodes for them, that a plan has and a smaller one with the same local pods has not. It returns
// those that are local.
func (s *Server) Grow(ctx context.Context, from, to Plan) ([]*corev1.Pod, error) {
	first := 0
	if from.Pods > 0 {
		first = from.Nodes()
	}
	if err := each(ctx, first, to.Nodes(), func(ctx context.Context, c *kubernetes.Clientset, i int) error {
		node, err := c.CoreV1().Nodes().Create(ctx, to.NodeObject(i), metav1.CreateOptions{})
		if err != nil {
			return err
		}
		node.Status = to.NodeObject(i).Status
		_, err = c.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{})
		return err
	}); err != nil {
		return nil, err
	}
	local := make([]*corev1.Pod, max(0, to.Local-from.Pods))
	err := each(ctx, from.Pods, to.Pods, func(ctx context.Context, c *kubernetes.Clientset, i int) error {
		pod, err := create(ctx, c, to.Pod(i))
		if err == nil && i < to.Local {
			local[i-from.Pods] = pod
		}
		return err
	})
	return local, err
}

// create makes a pod, and gives it its status, which the API server takes from nobody who makes one.
func create(ctx context.Context, c *kubernetes.Clientset, want *corev1.Pod) (*corev1.Pod, error) {
	pod, err := c.CoreV1().Pods(want.Namespace).Create(ctx, want, metav1.CreateOptions{})
	if err != nil || want.Status.Phase == "" {
		return pod, err
	}
	pod.Status = want.Status
	return c.CoreV1().Pods(want.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
}

// SetAddresses writes the status that kubelet writes once a pod of the plan's node runs.
func (s *Server) SetAddresses(ctx context.Context, pod *corev1.Pod, addresses ...netip.Addr) error {
	var texts []string
	for _, a := range addresses {
		texts = append(texts, a.String())
	}
	pod = pod.DeepCopy()
	pod.Status = Running(pod, nodeAddress(0), texts...)
	_, err := s.Client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	return err
}

// each calls do for the numbers from first up to and without end, many at a time, over several connections, until one fails.
func each(ctx context.Context, first, end int, do func(context.Context, *kubernetes.Clientset, int) error) error {
	clients, err := separate(connections)
	if err != nil {
		return err
	}
	return Each(ctx, first, end, atOnce, func(ctx context.Context, i int) error { return do(ctx, clients[i%connections], i) })
}

// Each calls do for the numbers from first up to and without end, so many at a time, until one fails.
func Each(ctx context.Context, first, end, atOnce int, do func(context.Context, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	numbers := make(chan int)
	var group sync.WaitGroup
	for range atOnce {
		group.Go(func() {
			for i := range numbers {
				if err := do(ctx, i); err != nil {
					cancel(fmt.Errorf("number %d of %d: %w", i, end, err))
				}
			}
		})
	}
	for i := first; i < end && ctx.Err() == nil; i++ {
		numbers <- i
	}
	close(numbers)
	group.Wait()
	return context.Cause(ctx)
}

// separate returns clients with a connection each: those of the same configuration would share one.
func separate(n int) (list []*kubernetes.Clientset, err error) {
	for range n {
		config := Config()
		config.Dial = (&net.Dialer{}).DialContext
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return nil, err
		}
		list = append(list, client)
	}
	return list, nil
}
