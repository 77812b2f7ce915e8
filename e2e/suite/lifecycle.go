package suite

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Own are the cases of a cluster's life: what goes away, comes back, is replaced or starts by the hundred.
func Own() []Case {
	return []Case{
		{Name: "a restart of policyd, during which no pod goes NotReady", Run: twoNodes(restart)},
		{Name: "an upgrade of the DaemonSet and a rollback, under traffic", Run: twoNodes(upgrade)},
		{Name: "pods that start while policyd is down", Run: twoNodes(policydDown)},
		{Name: "the API server away for a minute, while policies hold", Run: twoNodes(apiServerAway)},
		{Name: "a node that reboots", Run: twoNodes(reboot)},
		{Name: "a static pod on the pod network", Run: twoNodes(staticPod)},
		{Name: "a pod's sandbox made again under the same pod", Run: twoNodes(sandbox)},
		{Name: "a hundred pods on a node at once", Run: twoNodes(hundred)},
		{Name: "no connection to 300 closed pods from their first instant", Run: firstInstant, Limit: 15 * time.Minute},
		// The last: it takes everything away, and installs it again.
		{Name: "uninstall leaves nothing, and the one rendered file installs", Run: twoNodes(uninstall), Limit: 12 * time.Minute},
	}
}

// twoNodes skips a case where there is but one node.
func twoNodes(run func(context.Context, *T)) func(context.Context, *T) {
	return func(ctx context.Context, t *T) {
		if len(t.Cluster.Nodes) < 2 {
			t.Skipf("needs two nodes, and this cluster has one")
		}
		run(ctx, t)
	}
}

// daemonSet is postern's.
const daemonSet = "daemonset/postern"

func (t *T) rollout(ctx context.Context) {
	t.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", daemonSet, "--timeout=3m")
}

// restart deletes the pods of policyd, all at once.
func restart(ctx context.Context, t *T) {
	s := t.Scene(ctx, t.Cluster.Nodes[0], t.Cluster.Nodes[1])
	going := t.Traffic(s)
	before := t.readySince(ctx, s.namespace)
	if wanted := len(t.Cluster.Nodes) + 3; len(before) < wanted {
		t.Fatalf("%d nodes and pods are Ready, want %d at least", len(before), wanted)
	}
	t.Kubectl(ctx, "--namespace=kube-system", "delete", "pod", "--selector=app.kubernetes.io/name=postern")
	t.Eventually(ctx, readyLimit, "policyd runs on every node again", func(ctx context.Context) error {
		ready := 0
		for _, p := range t.policyd(ctx) {
			if podReady(&p) {
				ready++
			}
		}
		if ready < len(t.Cluster.Nodes) {
			return fmt.Errorf("on %d of %d", ready, len(t.Cluster.Nodes))
		}
		return nil
	})
	t.Enforced(ctx)
	time.Sleep(15 * time.Second) // longer than kubelet takes to notice what it would call NotReady: its probes are every 10 s
	after := t.readySince(ctx, s.namespace)
	for what, since := range before {
		if !after[what].Equal(since) {
			t.Errorf("%s was Ready since %v, and is since %v", what, since, after[what])
		}
	}
	if lost := going.Stop(t); lost > 2 {
		t.Errorf("%d allowed connections were not made", lost)
	}
	t.SameAsEver(ctx, s)
}

// readySince says since when nodes, and pods of a namespace, are Ready: the API keeps the time of the last change, so one that was
// NotReady in between has another.
func (t *T) readySince(ctx context.Context, namespace string) map[string]time.Time {
	since := map[string]time.Time{}
	pods, err := t.Cluster.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatalf("list pods: %v", err)
	}
	for _, p := range pods.Items {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil {
				since[fmt.Sprintf("pod %s/%s (%s)", p.Namespace, p.Name, p.UID)] = c.LastTransitionTime.Time
			}
		}
	}
	nodes, err := t.Cluster.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatalf("list nodes: %v", err)
	}
	for _, n := range nodes.Items {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				since["node "+n.Name] = c.LastTransitionTime.Time
			}
		}
	}
	return since
}

// upgrade gives the DaemonSet an image of another name, and takes that back.
func upgrade(ctx context.Context, t *T) {
	current := t.Kubectl(ctx, "--namespace=kube-system", "get", daemonSet,
		"--output=jsonpath={.spec.template.spec.containers[0].image}")
	next := current + "-next"
	for _, n := range t.Cluster.Nodes {
		if _, err := n.Run(ctx, "ctr", "--namespace=k8s.io", "images", "tag", "--force", current, next); err != nil {
			t.Fatalf("name the next image: %v", err)
		}
	}
	s := t.Scene(ctx, t.Cluster.Nodes[0], t.Cluster.Nodes[1])
	going := t.Traffic(s)
	t.Kubectl(ctx, "--namespace=kube-system", "set", "image", daemonSet, "*="+next)
	t.rollout(ctx)
	t.Enforced(ctx)
	if image := t.policyd(ctx)[0].Spec.Containers[0].Image; image != next {
		t.Errorf("after the upgrade, policyd's image is %s", image)
	}
	t.Kubectl(ctx, "--namespace=kube-system", "rollout", "undo", daemonSet)
	t.rollout(ctx)
	t.Enforced(ctx)
	if image := t.policyd(ctx)[0].Spec.Containers[0].Image; image != current {
		t.Errorf("after the rollback, policyd's image is %s", image)
	}
	if lost := going.Stop(t); lost > 2 {
		t.Errorf("%d allowed connections were not made", lost)
	}
	t.SameAsEver(ctx, s)
}

// policydDown takes policyd from one node alone, and starts pods there: they must wait, closed, and start when it is back.
func policydDown(ctx context.Context, t *T) {
	node, other := t.Cluster.Nodes[0], t.Cluster.Nodes[1]
	s := t.Scene(ctx, node, other)
	going := t.Traffic(s)
	t.onlyWhere(ctx, "e2e-policyd", node.Name)
	began := time.Now()
	namespace := t.Namespace(ctx, nil)
	t.Admit(ctx, namespace, "late", "late-friend")
	t.StartPod(ctx, namespace, "late", node, map[string]string{"app": "late"}, server...)
	for time.Since(began) < 30*time.Second {
		time.Sleep(time.Second)
		pod, err := t.Cluster.Client.CoreV1().Pods(namespace).Get(ctx, "late", metav1.GetOptions{})
		if err != nil {
			t.Fatalf("get the pod that waits: %v", err)
		}
		if pod.Status.Phase != corev1.PodPending {
			t.Fatalf("a pod is %s after %v although nobody guards it", pod.Status.Phase, time.Since(began))
		}
	}
	events := t.Kubectl(ctx, "--namespace="+namespace, "get", "events", "--field-selector=reason=FailedCreatePodSandBox")
	if !strings.Contains(events, "policyd") {
		t.Errorf("the pod's events do not say what it waits for: %s", events)
	}
	t.Kubectl(ctx, "label", "node", node.Name, "e2e-policyd=yes", "--overwrite")
	t.Ready(ctx, namespace)
	t.Logf("the pod started %v after policyd was taken away", time.Since(began).Round(time.Second))
	late := t.Pod(ctx, namespace, "late")
	t.Expect(ctx, late.To(TimesOut, serverPort, s.friend, s.stranger))
	if lost := going.Stop(t); lost > 2 {
		t.Errorf("%d allowed connections were not made", lost)
	}
	t.SameAsEver(ctx, s)
}

// onlyWhere makes the DaemonSet run where a label says so, which is everywhere but on one node, until the case has ended.
func (t *T) onlyWhere(ctx context.Context, label, butOn string) {
	t.Cleanup(func(ctx context.Context) {
		t.patchSelector(ctx, label, "null")
		t.Kubectl(ctx, "label", "node", "--all", label+"-")
		t.rollout(ctx)
	})
	t.Kubectl(ctx, "label", "node", "--all", label+"=yes", "--overwrite")
	t.patchSelector(ctx, label, `"yes"`)
	t.rollout(ctx)
	t.Kubectl(ctx, "label", "node", butOn, label+"=no", "--overwrite")
	t.Eventually(ctx, readyLimit, "policyd has gone from "+butOn, func(ctx context.Context) error {
		pods, err := t.Cluster.Client.CoreV1().Pods("kube-system").List(ctx,
			metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=postern", FieldSelector: "spec.nodeName=" + butOn})
		if err == nil && len(pods.Items) > 0 { // also one that is about to end still guards
			err = fmt.Errorf("pod %s is there", pods.Items[0].Name)
		}
		return err
	})
}

func (t *T) patchSelector(ctx context.Context, label, value string) {
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"nodeSelector":{%q:%s}}}}}`, label, value)
	if _, err := t.Cluster.Client.AppsV1().DaemonSets("kube-system").Patch(ctx, "postern", types.StrategicMergePatchType,
		[]byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatalf("choose the nodes of policyd: %v", err)
	}
}

// apiServerAway ends the API server for a minute. In it a pod's container is not restarted, nothing changes, and all must go on.
func apiServerAway(ctx context.Context, t *T) {
	s := t.Scene(ctx, t.Cluster.Nodes[0], t.Cluster.Nodes[1])
	going := t.Traffic(s)
	t.Cleanup(func(ctx context.Context) {
		if _, err := t.Cluster.Kubectl(ctx, "version"); err != nil {
			_ = t.Cluster.StartAPIServer(ctx) // a case that failed in the middle
		}
	})
	if err := t.Cluster.StopAPIServer(); err != nil {
		t.Fatalf("end the API server: %v", err)
	}
	time.Sleep(time.Minute)
	if err := t.Cluster.StartAPIServer(ctx); err != nil {
		t.Fatalf("start the API server again: %v", err)
	}
	t.Enforced(ctx)
	if lost := going.Stop(t); lost > 2 {
		t.Errorf("%d allowed connections were not made", lost)
	}
	// And what changes afterwards is seen.
	began := time.Now()
	t.Kubectl(ctx, "--namespace="+s.namespace, "label", "pod", "friend", "app=enemy", "--overwrite")
	for _, try := range s.server.To(TimesOut, serverPort, s.friend) {
		t.Until(ctx, try)
	}
	t.Logf("a label taken away was in force %v later", time.Since(began).Round(time.Millisecond))
}

// reboot cuts the power of a node. Its pods come back by kubelet, with addresses of their own, and are guarded from the start.
func reboot(ctx context.Context, t *T) {
	node := t.Cluster.Nodes[0]
	s := t.Scene(ctx, node, t.Cluster.Nodes[1])
	strangers, err := t.namespaceOf(s.stranger)
	if err != nil {
		t.Fatalf("%v", err)
	}
	if err := node.Stop(ctx); err != nil {
		t.Fatalf("stop %s: %v", node.Name, err)
	}
	began := time.Now()
	if err := node.Start(ctx); err != nil {
		t.Fatalf("start %s: %v", node.Name, err)
	}
	// The server's next address is not known: all of the node's range are tried until it is there.
	prober := t.probe(strangers, 100*time.Millisecond, t.podRange(ctx, node.Name)...)
	t.Eventually(ctx, readyLimit, "the server runs again", func(ctx context.Context) error {
		pod, err := t.Cluster.Client.CoreV1().Pods(s.namespace).Get(ctx, "server", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(pod.Status.ContainerStatuses) == 0 || pod.Status.ContainerStatuses[0].RestartCount == 0 || !podReady(pod) {
			return fmt.Errorf("the pod is %s", describePod(pod))
		}
		return nil
	})
	t.Logf("the server runs again %v after the power came back", time.Since(began).Round(100*time.Millisecond))
	if err := t.Cluster.NodesReady(ctx, readyLimit); err != nil {
		t.Fatalf("%v", err)
	}
	t.rollout(ctx)
	s.server = t.Pod(ctx, s.namespace, "server")
	t.none(prober, s.server)
	t.SameAsEver(ctx, s)
}

// staticPod is kubelet's own: the API's object is its mirror, with another UID, and policies must find it nonetheless.
func staticPod(ctx context.Context, t *T) {
	node := t.Cluster.Nodes[0]
	s := t.Scene(ctx, t.Cluster.Nodes[1], t.Cluster.Nodes[1])
	file, err := node.Path("/etc/kubernetes/manifests/static.yaml")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func(context.Context) { _ = os.Remove(file) })
	manifest := fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: static, namespace: %s, labels: {app: server}}
spec: {containers: [{name: main, image: %q, args: [%s]}]}
`, s.namespace, image, strings.Join(server, ", "))
	if err := os.WriteFile(file, []byte(manifest), 0o644); err != nil {
		t.Fatalf("write a static pod's manifest: %v", err)
	}
	name := "static-" + node.Name
	t.Eventually(ctx, readyLimit, "the static pod runs", func(ctx context.Context) error {
		pod, err := t.Cluster.Client.CoreV1().Pods(s.namespace).Get(ctx, name, metav1.GetOptions{})
		if err == nil && !podReady(pod) {
			err = fmt.Errorf("it is %s", describePod(pod))
		}
		return err
	})
	static := t.Pod(ctx, s.namespace, name)
	t.Expect(ctx, static.To(Connects, serverPort, s.friend), static.To(TimesOut, serverPort, s.stranger))
	if err := os.Remove(file); err != nil {
		t.Fatalf("remove the static pod: %v", err)
	}
	t.Eventually(ctx, readyLimit, "the static pod is gone", func(ctx context.Context) error {
		_, err := t.Cluster.Client.CoreV1().Pods(s.namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("get it: %w", err)
	})
}

// sandbox ends a pod's sandbox, which kubelet then makes again: the same pod, by name and UID, with another address.
func sandbox(ctx context.Context, t *T) {
	node := t.Cluster.Nodes[0]
	s := t.Scene(ctx, node, t.Cluster.Nodes[1])
	strangers, err := t.namespaceOf(s.stranger)
	if err != nil {
		t.Fatalf("%v", err)
	}
	prober := t.probe(strangers, 50*time.Millisecond, t.podRange(ctx, node.Name)...)
	uid := t.Kubectl(ctx, "--namespace="+s.namespace, "get", "pod", "server", "--output=jsonpath={.metadata.uid}")
	id, err := node.Run(ctx, "ctr", "--namespace=k8s.io", "containers", "list", "--quiet",
		fmt.Sprintf(`labels."io.kubernetes.pod.uid"==%s,labels."io.cri-containerd.kind"==sandbox`, uid))
	if err != nil || id == "" {
		t.Fatalf("find the sandbox of %s: %q, %v", s.server, id, err)
	}
	if _, err := node.Run(ctx, "ctr", "--namespace=k8s.io", "tasks", "kill", "--signal=SIGKILL", id); err != nil {
		t.Fatalf("end the sandbox of %s: %v", s.server, err)
	}
	t.Eventually(ctx, readyLimit, "the pod has another sandbox", func(ctx context.Context) error {
		pod, err := t.Cluster.Client.CoreV1().Pods(s.namespace).Get(ctx, "server", metav1.GetOptions{})
		switch {
		case err != nil:
			return err
		case string(pod.UID) != uid:
			t.Fatalf("the pod is another one: UID %s, was %s", pod.UID, uid)
		case pod.Status.PodIP == "" || pod.Status.PodIP == s.server.Addresses[0].String() || !podReady(pod):
			return fmt.Errorf("address %s, %s", pod.Status.PodIP, describePod(pod))
		}
		return nil
	})
	t.none(prober, s.server)
	s.server = t.Pod(ctx, s.namespace, "server")
	t.none(prober, s.server)
	t.SameAsEver(ctx, s)
}

// none fails unless a prober tried to reach a pod, and never did.
func (t *T) none(prober *Prober, pod *Pod) {
	tallies := prober.Tallies()
	for _, place := range places(pod, serverPort) {
		tally := tallies[place]
		t.Logf("%s: %s", place, tally)
		if tally.Passed() > 0 || tally.Tried == 0 {
			t.Errorf("of connections that no policy allows, to %s of %s: %s", place, pod, tally)
		}
	}
}

// podRange are all addresses that a node may give its pods by IPAM's rule, the lowest first, as places to try; of an IPv6 range,
// the lowest few hundred.
func (t *T) podRange(ctx context.Context, node string) []netip.AddrPort {
	object, err := t.Cluster.Client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get node %s: %v", node, err)
	}
	var all []netip.AddrPort
	for _, cidr := range object.Spec.PodCIDRs {
		prefix := netip.MustParsePrefix(cidr)
		address := prefix.Addr()
		for i := 0; i < 254 && prefix.Contains(address.Next()); i++ {
			address = address.Next()
			all = append(all, netip.AddrPortFrom(address, serverPort))
		}
	}
	return all
}

// readyWithin is what the one rendered file must do; a busy machine gets five times as long.
const readyWithin = time.Minute

// uninstall does what manifests/README.md says, looks for traces, and installs again with the one rendered file.
func uninstall(ctx context.Context, t *T) {
	s := t.Scene(ctx, t.Cluster.Nodes[0], t.Cluster.Nodes[1]) // so that there was something to leave behind
	var present []string
	for _, n := range t.Cluster.Nodes {
		traces, err := n.Traces(ctx)
		if err != nil || len(traces) < 10 {
			t.Fatalf("while postern is installed, %s has %d traces of it: the search is wrong (%v)", n.Name, len(traces), err)
		}
		present = append(present, traces...)
	}
	for _, kind := range cluster.KernelTraces {
		if !slices.ContainsFunc(present, func(trace string) bool { return strings.HasPrefix(trace, kind+": ") }) {
			t.Fatalf("while postern is installed, the search finds no %s of it anywhere: it is wrong", kind)
		}
	}
	// Pods on the pod network go first: the runtime cannot take them off a network that is no longer there.
	t.Kubectl(ctx, "delete", "namespace", s.namespace)
	t.Kubectl(ctx, "--namespace=kube-system", "scale", "deployment/coredns", "--replicas=0")
	t.Cleanup(func(ctx context.Context) {
		t.Kubectl(ctx, "--namespace=kube-system", "scale", "deployment/coredns", "--replicas=1")
		if err := t.Cluster.DNSReady(ctx); err != nil {
			t.Errorf("%v", err)
		}
	})
	t.Eventually(ctx, readyLimit, "no pod is on the pod network", func(ctx context.Context) error {
		pods, err := t.Cluster.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if !p.Spec.HostNetwork {
				return fmt.Errorf("%s/%s is", p.Namespace, p.Name)
			}
		}
		return nil
	})
	if err := t.Cluster.Uninstall(ctx); err != nil {
		t.Errorf("uninstall: %v", err)
	}
	for _, n := range t.Cluster.Nodes {
		traces, err := n.Traces(ctx)
		if err != nil || len(traces) > 0 {
			t.Errorf("left on %s: %s (%v)", n.Name, strings.Join(traces, "\n"), err)
		}
	}
	t.Kubectl(ctx, "wait", "node", "--all", "--for=condition=Ready=false", "--timeout=3m")
	took, err := t.Cluster.InstallRendered(ctx)
	if err != nil {
		t.Fatalf("install again: %v", err)
	}
	t.Logf("kubectl apply -f manifests/postern.yaml: all nodes were Ready after %v", took.Round(100*time.Millisecond))
	if took > 5*readyWithin {
		t.Errorf("all nodes were Ready only after %v", took)
	}
	t.Scene(ctx, t.Cluster.Nodes[0], t.Cluster.Nodes[1])
}
