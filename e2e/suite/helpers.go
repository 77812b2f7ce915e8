package suite

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	// image is what examples and cases run: test servers and clients, the same that the upstream suite uses.
	image = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"
	// readyLimit is how long pods may take to start on a busy machine.
	readyLimit = 3 * time.Minute
	// settleLimit is how long a change may take until it shows, on a busy machine.
	settleLimit = time.Minute
)

// Kubectl runs kubectl and returns what it printed; the case ends if it fails.
func (t *T) Kubectl(ctx context.Context, args ...string) string {
	t.Logf("$ kubectl %s", strings.Join(args, " "))
	out, err := t.Cluster.Kubectl(ctx, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	t.Logf("%s", out)
	return out
}

// Namespace makes a namespace of a name that no other has, and deletes it when the case has ended.
func (t *T) Namespace(ctx context.Context, labels map[string]string) string {
	t.mu.Lock()
	t.unique++
	name := fmt.Sprintf("case-%d-%d", t.began.UnixMilli(), t.unique)
	t.mu.Unlock()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	if _, err := t.Cluster.Client.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
		t.Fatalf("make namespace %s: %v", name, err)
	}
	t.Logf("namespace %s %v", name, labels)
	t.Cleanup(func(ctx context.Context) {
		t.Kubectl(ctx, "delete", "namespace", name, "--ignore-not-found", "--wait=false")
	})
	// Without it no pod is admitted; the controller manager takes its time after the API server was away.
	t.Eventually(ctx, readyLimit, "namespace "+name+" has its service account", func(ctx context.Context) error {
		_, err := t.Cluster.Client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return name
}

// Apply applies a file of the source tree, and deletes what is in it when the case has ended.
func (t *T) Apply(ctx context.Context, file string) {
	path := filepath.Join(t.Cluster.Source, file)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("apply a manifest: %v", err)
	}
	t.Cleanup(func(ctx context.Context) { t.Kubectl(ctx, "delete", "--ignore-not-found", "--wait=false", "-f", path) })
	t.Kubectl(ctx, "apply", "-f", path)
}

// Ready waits until every pod of a namespace is ready, and all that its Deployments want are there.
func (t *T) Ready(ctx context.Context, namespace string) {
	took := t.Eventually(ctx, readyLimit, "pods of "+namespace+" are ready", func(ctx context.Context) error {
		return t.ready(ctx, namespace)
	})
	t.Logf("the pods of %s are ready after %v", namespace, took.Round(time.Millisecond))
}

func (t *T) ready(ctx context.Context, namespace string) error {
	deployments, err := t.Cluster.Client.AppsV1().Deployments(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, d := range deployments.Items {
		wanted := int32(1)
		if d.Spec.Replicas != nil {
			wanted = *d.Spec.Replicas
		}
		if d.Status.ObservedGeneration < d.Generation || d.Status.ReadyReplicas != wanted || d.Status.Replicas != wanted {
			return fmt.Errorf("deployment %s: %d of %d pods are ready", d.Name, d.Status.ReadyReplicas, wanted)
		}
	}
	pods, err := t.Cluster.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		if !podReady(&p) {
			return fmt.Errorf("pod %s: %s", p.Name, describePod(&p))
		}
	}
	if len(pods.Items) == 0 {
		return errors.New("there are none")
	}
	return nil
}

func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// describePod says why a pod is not ready.
func describePod(p *corev1.Pod) string {
	said := []string{string(p.Status.Phase)}
	for _, c := range p.Status.Conditions {
		if c.Status != corev1.ConditionTrue && c.Message != "" {
			said = append(said, c.Message)
		}
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Waiting != nil {
			said = append(said, c.State.Waiting.Reason+" "+c.State.Waiting.Message)
		}
	}
	return strings.Join(said, ", ")
}

// Pod returns a pod that has its addresses.
func (t *T) Pod(ctx context.Context, namespace, name string) *Pod {
	p, err := t.Cluster.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get pod %s/%s: %v", namespace, name, err)
	}
	return t.pod(p)
}

// Pods returns the pods of a namespace that a label selector selects.
func (t *T) Pods(ctx context.Context, namespace, selector string) []*Pod {
	list, err := t.Cluster.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		t.Fatalf("list pods of %s: %v", namespace, err)
	}
	var pods []*Pod
	for i := range list.Items {
		pods = append(pods, t.pod(&list.Items[i]))
	}
	return pods
}

func (t *T) pod(p *corev1.Pod) *Pod {
	pod := &Pod{Namespace: p.Namespace, Name: p.Name, Container: p.Spec.Containers[0].Name, Node: p.Spec.NodeName, t: t}
	for _, a := range p.Status.PodIPs {
		address, err := netip.ParseAddr(a.IP)
		if err != nil {
			t.Fatalf("pod %s: %v", pod, err)
		}
		pod.Addresses = append(pod.Addresses, address)
	}
	if families := t.families(); len(pod.Addresses) != families {
		t.Fatalf("pod %s has the addresses %v, not one of each of the cluster's families (%s)", pod, pod.Addresses, t.Cluster.Family)
	}
	t.Logf("pod %s on %s has %v", pod, pod.Node, pod.Addresses)
	return pod
}

// families is how many addresses a pod has.
func (t *T) families() int {
	if t.Cluster.Family == "dual" {
		return 2
	}
	return 1
}

// ClientOnEachNode starts a pod on every node, ready to connect from, in the order of the nodes.
func (t *T) ClientOnEachNode(ctx context.Context, namespace, name string, labels map[string]string) []*Pod {
	return t.podOnEachNode(ctx, namespace, name, labels, corev1.Container{Name: "client", Image: image, Args: []string{"pause"}})
}

// ServerOnEachNode starts a pod on every node that listens on a port, and waits until it does.
func (t *T) ServerOnEachNode(ctx context.Context, namespace, name string, labels map[string]string, port uint16) []*Pod {
	return t.podOnEachNode(ctx, namespace, name, labels, corev1.Container{
		Name: "server", Image: image, Args: []string{"netexec", fmt.Sprintf("--http-port=%d", port), "--udp-port=-1"},
		ReadinessProbe: &corev1.Probe{
			ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(int32(port))}}},
	})
}

func (t *T) podOnEachNode(ctx context.Context, namespace, name string, labels map[string]string, runs corev1.Container) []*Pod {
	second := int64(1)
	for _, node := range t.Cluster.Nodes {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name + "-" + node.Name, Labels: labels},
			Spec: corev1.PodSpec{
				NodeName:                      node.Name,
				TerminationGracePeriodSeconds: &second,
				Containers:                    []corev1.Container{runs},
			},
		}
		if _, err := t.Cluster.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			t.Fatalf("start pod %s/%s: %v", namespace, pod.Name, err)
		}
	}
	t.Ready(ctx, namespace)
	var pods []*Pod
	for _, node := range t.Cluster.Nodes {
		pods = append(pods, t.Pod(ctx, namespace, name+"-"+node.Name))
	}
	return pods
}

// apply applies a text to a namespace.
func (t *T) apply(ctx context.Context, namespace, manifest string) {
	if out, err := t.Cluster.KubectlInput(ctx, manifest, "apply", "-n", namespace, "-f", "-"); err != nil {
		t.Fatalf("apply to %s: %v\n%s", namespace, err, out)
	}
	t.Logf("applied to %s:%s", namespace, manifest)
	t.Enforced(ctx)
}

// ServiceAddresses are those of a Service, one of each family.
func (t *T) ServiceAddresses(ctx context.Context, namespace, name string) []netip.Addr {
	service, err := t.Cluster.Client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get service %s/%s: %v", namespace, name, err)
	}
	var addresses []netip.Addr
	for _, ip := range service.Spec.ClusterIPs {
		addresses = append(addresses, netip.MustParseAddr(ip))
	}
	if len(addresses) != t.families() {
		t.Fatalf("service %s/%s has the addresses %v, not one of each of the cluster's families", namespace, name, addresses)
	}
	return addresses
}

// Enforced waits until policyd on every node says that what the API server holds now is enforced.
func (t *T) Enforced(ctx context.Context) {
	began := time.Now()
	for _, pod := range t.policyd(ctx) {
		out, err := t.Cluster.Kubectl(ctx, "exec", "-n", pod.Namespace, pod.Name, "--", "policyd", "status", "--wait", "--timeout=1m")
		if err != nil {
			t.Fatalf("policyd on %s does not say that what the API server holds is enforced: %v\n%s", pod.Spec.NodeName, err, out)
		}
	}
	t.Logf("enforced on all nodes, which took %v to ask", time.Since(began).Round(time.Millisecond))
}

// policyd are the pods of the daemon that run, without those that are about to end.
func (t *T) policyd(ctx context.Context) []corev1.Pod {
	pods, err := t.Cluster.Client.CoreV1().Pods("kube-system").List(ctx,
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=postern"})
	if err != nil {
		t.Fatalf("list the pods of policyd: %v", err)
	}
	return slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool {
		return p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning
	})
}

// Eventually asks again and again until the answer is nil, and returns how long that took. At the limit the case ends with the
// last answer. What is asked about must be allowed to take time; what must hold at once is asked once.
func (t *T) Eventually(ctx context.Context, limit time.Duration, what string, ask func(context.Context) error) time.Duration {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		err := ask(ctx)
		if err == nil {
			return time.Since(began)
		}
		// At the end of the time the answer is that the time has ended: the one before says more.
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			t.Fatalf("wait until %s: not within %v: %v", what, time.Since(began).Round(time.Second), last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// describe writes into the log what the cluster looks like, for whoever reads about a failure.
func (t *T) describe(ctx context.Context) {
	if t.Cluster == nil {
		return
	}
	t.Logf("what the cluster looks like after the failure:")
	for _, args := range [][]string{
		{"get", "nodes,pods,services", "--all-namespaces", "-o", "wide"},
		{"get", "networkpolicies", "--all-namespaces", "-o", "yaml"},
		{"get", "events", "--all-namespaces", "--sort-by=.metadata.creationTimestamp"},
		{"logs", "-n", "kube-system", "-l", "app.kubernetes.io/name=postern", "--all-containers", "--prefix", "--since=10m",
			"--tail=200"},
	} {
		out, err := t.Cluster.Kubectl(ctx, args...)
		t.Logf("$ kubectl %s\n%s", strings.Join(args, " "), out)
		if err != nil {
			t.Logf("%v", err)
		}
	}
}
