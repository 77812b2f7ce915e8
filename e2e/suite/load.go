package suite

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/e2e/cluster"
)

// hundred starts a hundred pods on one node at once, half of them isolated, and then tries each.
func hundred(ctx context.Context, t *T) {
	node, other := t.Cluster.Nodes[0], t.Cluster.Nodes[1]
	namespace := t.Namespace(ctx, nil)
	t.Admit(ctx, namespace, "server", "friend")
	for _, client := range []string{"friend", "stranger"} {
		t.StartPod(ctx, namespace, client, other, map[string]string{"app": client}, "pause")
	}
	t.Ready(ctx, namespace)
	friend, stranger := t.Pod(ctx, namespace, "friend"), t.Pod(ctx, namespace, "stranger")
	began := time.Now()
	t.parallel(100, func(i int) {
		app := "open"
		if i%2 == 0 {
			app = "server"
		}
		t.StartPod(ctx, namespace, fmt.Sprintf("%s-%d", app, i), node, map[string]string{"app": app}, server...)
	})
	t.Ready(ctx, namespace)
	t.Logf("a hundred pods were ready after %v", time.Since(began).Round(100*time.Millisecond))
	var isolated, open []netip.AddrPort
	for _, pod := range t.Pods(ctx, namespace, "app=server") {
		isolated = append(isolated, places(pod, serverPort)...)
	}
	for _, pod := range t.Pods(ctx, namespace, "app=open") {
		open = append(open, places(pod, serverPort)...)
	}
	for _, expect := range []struct {
		from   *Pod
		to     []netip.AddrPort
		passes bool
	}{{friend, isolated, true}, {friend, open, true}, {stranger, open, true}, {stranger, isolated, false}} {
		prober := t.Probe(expect.from, 200*time.Millisecond, expect.to...)
		if expect.passes { // all at once, on a busy machine
			t.Eventually(ctx, settleLimit, fmt.Sprintf("%s reaches all that it may", expect.from), func(context.Context) error {
				return unreached(prober)
			})
		} else {
			time.Sleep(3 * time.Second)
		}
		prober.Stop(t)
		for place, tally := range prober.Tallies() {
			if reached := tally.Connected > 0; reached != expect.passes || tally.Tried == 0 {
				t.Errorf("from %s to %s: %s; must pass: %v", expect.from, place, tally, expect.passes)
			}
		}
	}
}

// unreached names a place that a prober has not connected to yet.
func unreached(prober *Prober) error {
	for place, tally := range prober.Tallies() {
		if tally.Connected == 0 {
			return fmt.Errorf("%s: %s", place, tally)
		}
	}
	return nil
}

// parallel runs fn for 0 to n-1, some at the same time.
func (t *T) parallel(n int, fn func(i int)) {
	var wait sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i := range n {
		slots <- struct{}{}
		wait.Go(func() {
			defer func() { <-slots }()
			fn(i)
		})
	}
	wait.Wait()
	if t.Failed() {
		t.Fatalf("see above")
	}
}

// How a pod is tried from its first instant: every few milliseconds from when its address is taken, which is before its link
// is there, and then less often until the case ends. For 300 pods at once, the first pace would be more than a small machine can
// send, and keep from it what starts the pods: so pods are started in a row, a few a second.
const (
	firstPace  = 5 * time.Millisecond  // from the pod's own node
	otherPace  = 50 * time.Millisecond // from another node, whose table of connections keeps each attempt for two minutes
	firstTime  = 4 * time.Second
	secondPace = time.Second
	startPace  = 200 * time.Millisecond
)

// firstInstant starts a hundred pods on each of three nodes in a namespace that is closed, and tries each from a pod of another
// namespace on its own node, and from one on another node.
func firstInstant(ctx context.Context, t *T) {
	closed, open := t.Namespace(ctx, nil), t.Namespace(ctx, nil)
	t.DenyAll(ctx, closed)
	clients := t.ClientOnEachNode(ctx, open, "client", nil)
	t.Enforced(ctx)
	var first, other, second []*Prober
	for _, client := range clients {
		first, other = append(first, t.Probe(client, firstPace)), append(other, t.Probe(client, otherPace))
		second = append(second, t.Probe(client, secondPace))
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var watchers sync.WaitGroup
	for i, node := range t.Cluster.Nodes {
		watchers.Go(func() {
			here, there, later := first[i], other[(i+1)%len(clients)], second[i]
			err := taken(watching, node, func(address netip.Addr) {
				place := netip.AddrPortFrom(address, serverPort)
				here.Add(place)
				there.Add(place)
				time.AfterFunc(firstTime, func() {
					later.Add(place)
					here.Remove(place)
					there.Remove(place)
				})
			})
			if err != nil {
				t.Errorf("watch the addresses of %s: %v", node.Name, err)
			}
		})
	}
	const each = 100
	began := time.Now()
	for i := range each * len(t.Cluster.Nodes) {
		time.Sleep(time.Until(began.Add(time.Duration(i) * startPace)))
		node := t.Cluster.Nodes[i%len(t.Cluster.Nodes)]
		t.StartPod(ctx, closed, fmt.Sprintf("pod-%d", i), node, map[string]string{"app": "server"}, server...)
	}
	t.Eventually(ctx, 8*time.Minute, "all pods are ready", func(ctx context.Context) error { return t.ready(ctx, closed) })
	t.Logf("%d pods were ready after %v", each*len(t.Cluster.Nodes), time.Since(began).Round(100*time.Millisecond))
	time.Sleep(firstTime + time.Second)
	stop()
	watchers.Wait()
	var sum Tally
	for _, p := range slices.Concat(first, other, second) {
		tally := p.Sum()
		sum.Tried, sum.Connected, sum.Refused = sum.Tried+tally.Tried, sum.Connected+tally.Connected, sum.Refused+tally.Refused
		if tally.Passed() > 0 {
			t.Errorf("connections to pods that admit nobody: %s: %s", tally, listed(p.Tallies()))
		}
	}
	t.Logf("while they started: %s", sum)
	pods := t.Pods(ctx, closed, "")
	if len(pods) != each*len(t.Cluster.Nodes) {
		t.Fatalf("there are %d pods", len(pods))
	}
	for _, pod := range pods {
		for _, place := range places(pod, serverPort) {
			tried := 0
			for _, p := range first {
				tried += p.Tallies()[place].Tried
			}
			if tried < 20 {
				t.Errorf("%s was tried only %d times in its first instants", pod, tried)
			}
		}
	}
	t.opens(ctx, closed, pods, second)
}

// opens shows that the probers would have seen a connection: without the policy, they reach every pod.
func (t *T) opens(ctx context.Context, namespace string, pods []*Pod, probers []*Prober) {
	policies := t.Cluster.Client.NetworkingV1().NetworkPolicies(namespace)
	if err := policies.Delete(ctx, "deny-all", metav1.DeleteOptions{}); err != nil {
		t.Fatalf("delete the policy: %v", err)
	}
	t.Eventually(ctx, time.Minute, "every pod is reached without the policy", func(context.Context) error {
		reached := map[netip.AddrPort]bool{}
		for _, p := range probers {
			for place, tally := range p.Tallies() {
				reached[place] = reached[place] || tally.Connected > 0
			}
		}
		for _, pod := range pods {
			for _, place := range places(pod, serverPort) {
				if !reached[place] {
					return fmt.Errorf("%s is not, of %s", place, pod)
				}
			}
		}
		return nil
	})
}

// taken calls fn with each address that IPAM takes for a pod of a node from now on, at once.
func taken(ctx context.Context, node *cluster.Node, fn func(netip.Addr)) error {
	folder, err := node.Path("/run/postern/ipam")
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for round := 0; ctx.Err() == nil; round++ {
		files, err := filepath.Glob(filepath.Join(folder, "*", "used", "*"))
		if err != nil {
			return err
		}
		for _, file := range files {
			name := filepath.Base(file)
			if seen[name] {
				continue
			}
			seen[name] = true
			if address, err := netip.ParseAddr(name); err == nil && round > 0 {
				fn(address)
			}
		}
		time.Sleep(time.Millisecond)
	}
	if len(seen) == 0 {
		return fmt.Errorf("no address was taken: is %s where IPAM keeps them? %v", folder, exists(folder))
	}
	return nil
}

func exists(file string) error {
	_, err := os.Stat(file)
	return err
}
