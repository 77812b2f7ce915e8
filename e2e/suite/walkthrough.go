package suite

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/e2e/docs"
)

// Walkthrough is every example of manifests/examples: its head comment followed as a reader would, and then what it allows and
// what it refuses, from every node and in every family that the cluster has.
func Walkthrough() []Case {
	return []Case{
		{Name: "a pod on the host network is its node, and no policy touches it", Run: hostNetwork},
		{Name: "a host port leads to its pod, on that pod's node alone", Run: hostPort},
		{Name: "a NodePort Service and a host port stand side by side", Run: nodePort},
		{Name: "pods with the same host port go to different nodes", Run: hostPortSpread},
		{Name: "a pod in the host's PID and IPC namespaces is guarded like others", Run: hostNamespaces},
		{Name: "pods have their network whatever their users, groups and rights", Run: securityContext},
		{Name: "default deny: no client reaches a pod of the namespace", Run: defaultDeny},
		{Name: "a database admits web servers on its port, also through a Service", Run: fromPods},
		{Name: "a shopping cart admits namespaces by label, put on and taken off", Run: fromNamespaces},
		{Name: "a shopping cart admits a block of addresses", Run: fromAddresses},
		{Name: "a web server may only reach the database", Run: toPods},
	}
}

// examplesFolder is where the examples are in the source tree.
const examplesFolder = "manifests/examples"

// example applies an example and waits until its pods are ready, in all the namespaces given. The head comment is followed in
// between, and what it changed is put right by applying the file again.
func (t *T) example(ctx context.Context, file string, namespaces ...string) {
	path := filepath.Join(examplesFolder, file)
	text, err := os.ReadFile(filepath.Join(t.Cluster.Source, path))
	if err != nil {
		t.Fatalf("read the example: %v", err)
	}
	t.Apply(ctx, path)
	for _, namespace := range namespaces {
		t.Ready(ctx, namespace)
	}
	t.Enforced(ctx)
	t.Follow(ctx, t.Cluster.Source, docs.Transcript(docs.HeadComment(string(text))))
	t.Kubectl(ctx, "apply", "-f", filepath.Join(t.Cluster.Source, path))
	t.Enforced(ctx)
}

// nodes are the places of all nodes but one.
func (t *T) nodesBut(name string) []Client {
	var all []Client
	for _, n := range t.Cluster.Nodes {
		if n.Name != name {
			all = append(all, OnNode{n})
		}
	}
	return all
}

// node is the place of a node.
func (t *T) node(name string) OnNode {
	n, err := t.Cluster.Node(name)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return OnNode{n}
}

// elsewhere is a namespace that no policy speaks of, with a client on each node.
func (t *T) elsewhere(ctx context.Context) []Client {
	return clients(t.ClientOnEachNode(ctx, t.Namespace(ctx, nil), "client", nil)...)
}

func hostNetwork(ctx context.Context, t *T) {
	const namespace = "example-host-network"
	t.example(ctx, "host-network.yaml", namespace)
	onHost, onPods := t.Pod(ctx, namespace, "on-host"), t.Pod(ctx, namespace, "on-pods")
	node := t.node(onHost.Node)
	if !slices.Equal(onHost.Addresses, node.Addresses) {
		t.Errorf("the pod on the host network has the addresses %v, its node has %v", onHost.Addresses, node.Addresses)
	}
	const interfaces = "ls /sys/class/net"
	inNode, err := node.Run(ctx, "sh", "-c", interfaces)
	if err != nil {
		t.Fatalf("list the links of %s: %v", node, err)
	}
	if inPod := onHost.Exec(ctx, "sh", "-c", interfaces); !slices.Equal(strings.Fields(inPod), strings.Fields(inNode)) {
		t.Errorf("the pod on the host network has the links %q, its node has %q", inPod, inNode)
	}
	// The plugin's records name the pods that it was called for.
	asked := map[string]bool{}
	for _, pod := range []*Pod{onHost, onPods} {
		out, err := t.node(pod.Node).Run(ctx, "sh", "-c", `grep -rlF "$0" /run/postern | wc -l`, `"`+pod.Name+`"`)
		if err != nil {
			t.Fatalf("search the records of %s: %v", pod.Node, err)
		}
		asked[pod.Name] = strings.TrimSpace(out) != "0"
	}
	if asked["on-host"] || !asked["on-pods"] {
		t.Errorf("whether there are records of the pods: %v; there must be one of on-pods alone", asked)
	}
	from := append(t.elsewhere(ctx), Beside{})
	t.Expect(ctx,
		onHost.To(Connects, 8980, slices.Concat(from, t.nodesBut(""))...),
		onPods.To(TimesOut, 8980, slices.Concat(from, t.nodesBut(onPods.Node))...),
		onPods.To(Connects, 8980, t.node(onPods.Node)))
}

func hostPort(ctx context.Context, t *T) {
	const namespace = "example-host-port"
	t.example(ctx, "host-port.yaml", namespace)
	site := t.Pod(ctx, namespace, "site")
	from := slices.Concat(t.elsewhere(ctx), t.nodesBut(""), []Client{Beside{}, t.Pod(ctx, namespace, "client")})
	for _, n := range t.Cluster.Nodes {
		if n.Name != site.Node {
			t.Expect(ctx, Tries(Refused, "port 9000 of "+n.Name, n.Addresses, 9000, from...))
			continue
		}
		t.Expect(ctx, Tries(Connects, "port 9000 of "+n.Name, n.Addresses, 9000, slices.Concat(from, clients(site))...))
		for _, address := range n.Addresses {
			t.answers(ctx, netip.AddrPortFrom(address, 9000), "site")
		}
	}
}

// answers sees that a server says that it is the pod of the given name.
func (t *T) answers(ctx context.Context, server netip.AddrPort, pod string) {
	t.Eventually(ctx, settleLimit, fmt.Sprintf("%s is answered by %s", server, pod), func(ctx context.Context) error {
		name, err := t.Get(ctx, server, "/hostname")
		if err == nil && name != pod {
			t.Fatalf("%s is answered by %s, and must be by %s", server, name, pod)
		}
		return err
	})
}

func nodePort(ctx context.Context, t *T) {
	const namespace = "example-node-port"
	t.example(ctx, "node-port.yaml", namespace)
	pods := t.Pods(ctx, namespace, "app=site")
	front := t.Pod(ctx, namespace, "front")
	for _, n := range t.Cluster.Nodes {
		for _, address := range n.Addresses {
			t.everyPodAnswers(ctx, netip.AddrPortFrom(address, 30900), pods)
			if n.Name == front.Node {
				t.answers(ctx, netip.AddrPortFrom(address, 9000), "front")
			}
		}
		if n.Name != front.Node {
			t.Expect(ctx, Tries(Refused, "port 9000 of "+n.Name, n.Addresses, 9000, append(t.nodesBut(""), Beside{})...))
		}
	}
}

// everyPodAnswers asks a Service again and again until each of its pods has answered. Chance decides between four pods: that one
// of them is not among 500 answers happens less than once in 10^60 times.
func (t *T) everyPodAnswers(ctx context.Context, server netip.AddrPort, pods []*Pod) {
	missing := map[string]bool{}
	for _, p := range pods {
		missing[p.Name] = true
	}
	asked := 0
	t.Eventually(ctx, settleLimit, fmt.Sprintf("every pod has answered at %s", server), func(ctx context.Context) error {
		for range 100 {
			name, err := t.Get(ctx, server, "/hostname")
			if err != nil {
				return err
			}
			asked++
			if delete(missing, name); len(missing) == 0 {
				return nil
			}
		}
		return fmt.Errorf("of %d, these did not answer once at %d tries: %v", len(pods), asked, missing)
	})
	t.Logf("%s: all %d pods answered within %d tries", server, len(pods), asked)
}

func hostPortSpread(ctx context.Context, t *T) {
	const namespace = "example-host-port-spread"
	if len(t.Cluster.Nodes) < 2 {
		t.Skipf("needs two nodes, and this cluster has one")
	}
	t.example(ctx, "host-port-spread.yaml", namespace)
	// Applied again, the file says two replicas, whatever the comment's commands made of it. With one for each node:
	all := len(t.Cluster.Nodes)
	t.Kubectl(ctx, "scale", "-n", namespace, "deployment/site", fmt.Sprintf("--replicas=%d", all))
	t.Ready(ctx, namespace)
	nodes := map[string]string{}
	for _, pod := range t.Pods(ctx, namespace, "app=site") {
		if other, taken := nodes[pod.Node]; taken {
			t.Errorf("%s and %s have the same host port and are both on %s", pod.Name, other, pod.Node)
		}
		nodes[pod.Node] = pod.Name
	}
	for _, n := range t.Cluster.Nodes {
		for _, address := range n.Addresses {
			t.answers(ctx, netip.AddrPortFrom(address, 9000), nodes[n.Name])
		}
	}
	t.Kubectl(ctx, "scale", "-n", namespace, "deployment/site", fmt.Sprintf("--replicas=%d", all+1))
	t.Eventually(ctx, settleLimit, "one pod is refused by the scheduler for its host port", func(ctx context.Context) error {
		pods, err := t.Cluster.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.Spec.NodeName == "" && strings.Contains(describePod(&p), "free ports") {
				t.Logf("%s: %s", p.Name, describePod(&p))
				return nil
			}
		}
		return fmt.Errorf("none of the %d pods is", len(pods.Items))
	})
}

func hostNamespaces(ctx context.Context, t *T) {
	const namespace = "example-host-namespaces"
	t.example(ctx, "host-namespaces.yaml", namespace)
	watcher := t.Pod(ctx, namespace, "watcher")
	node := t.node(watcher.Node)
	for kind, shared := range map[string]bool{"pid": true, "ipc": true, "net": false} {
		file := "/proc/self/ns/" + kind
		ofNode, err := node.Run(ctx, "readlink", file)
		if err != nil {
			t.Fatalf("ask %s for its namespaces: %v", node, err)
		}
		ofPod := watcher.Exec(ctx, "readlink", file)
		if same := strings.TrimSpace(ofPod) == strings.TrimSpace(ofNode); same != shared {
			t.Errorf("the %s namespace of the pod is %s and that of its node %s; whether they must be the same: %v",
				kind, ofPod, ofNode, shared)
		}
	}
	readers := t.ClientOnEachNode(ctx, namespace, "reader", map[string]string{"app": "reader"})
	strangers := t.ClientOnEachNode(ctx, namespace, "stranger", map[string]string{"app": "stranger"})
	t.Expect(ctx,
		watcher.To(Connects, 8080, append(clients(readers...), node)...),
		watcher.To(TimesOut, 8080, slices.Concat(clients(strangers...), t.nodesBut(watcher.Node), []Client{Beside{}})...))
}

func securityContext(ctx context.Context, t *T) {
	const namespace = "example-security-context"
	t.example(ctx, "security-context.yaml", namespace)
	pods := t.Pods(ctx, namespace, "")
	for _, to := range pods {
		t.Expect(ctx, to.To(Connects, 8080, append(clients(pods...), Beside{})...))
	}
	least := t.Pod(ctx, namespace, "least")
	if status := least.Exec(ctx, "grep", "Cap", "/proc/self/status"); strings.Count(status, "0000000000000000") != 5 {
		t.Errorf("the pod with the least rights must have no capability, and has:\n%s", status)
	}
	// In a namespace that is closed, their rights help nobody in: they have another network than the policies' rules.
	closed := t.Namespace(ctx, nil)
	t.apply(ctx, closed, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody-connects}
spec: {podSelector: {}, policyTypes: [Ingress]}
`)
	for _, server := range t.ServerOnEachNode(ctx, closed, "server", nil, 8080) {
		t.Expect(ctx, server.To(TimesOut, 8080, clients(pods...)...), server.To(Connects, 8080, t.node(server.Node)))
	}
}

func defaultDeny(ctx context.Context, t *T) {
	const namespace = "example-default-deny"
	t.example(ctx, "default-deny.yaml", namespace)
	server := t.Pod(ctx, namespace, "server")
	inside := t.ClientOnEachNode(ctx, namespace, "client", nil)
	pods := slices.Concat(clients(inside...), t.elsewhere(ctx))
	everybody := slices.Concat(pods, t.nodesBut(server.Node), []Client{Beside{}})
	service := t.ServiceAddresses(ctx, namespace, "server")
	t.Expect(ctx,
		server.To(TimesOut, 80, everybody...),
		Tries(TimesOut, "service server", service, 80, pods...),
		server.To(Connects, 80, server, t.node(server.Node)))
	// What the namespace's pods open themselves is not refused.
	for _, open := range t.ServerOnEachNode(ctx, t.Namespace(ctx, nil), "open", nil, 80) {
		t.Expect(ctx, open.To(Connects, 80, clients(append(inside, server)...)...))
	}
	t.Kubectl(ctx, "delete", "networkpolicy", "-n", namespace, "nobody-connects")
	t.Enforced(ctx)
	t.Expect(ctx,
		server.To(Connects, 80, everybody...),
		Tries(Connects, "service server", service, 80, pods...))
}

func fromPods(ctx context.Context, t *T) {
	const namespace = "example-database"
	t.example(ctx, "from-pods.yaml", namespace)
	database := t.Pod(ctx, namespace, "database")
	service := t.ServiceAddresses(ctx, namespace, "database")
	webservers := clients(t.ClientOnEachNode(ctx, namespace, "webserver", map[string]string{"app": "webserver"})...)
	reports := clients(t.ClientOnEachNode(ctx, namespace, "report", map[string]string{"app": "report"})...)
	// A web server of another namespace is not one of this namespace.
	strangers := clients(t.ClientOnEachNode(ctx, t.Namespace(ctx, nil), "webserver", map[string]string{"app": "webserver"})...)
	pods := slices.Concat(reports, strangers)
	others := slices.Concat(pods, t.nodesBut(database.Node), []Client{Beside{}})
	t.Expect(ctx,
		database.To(Connects, 5432, webservers...),
		database.To(TimesOut, 9187, webservers...),
		database.To(TimesOut, 5432, others...),
		Tries(Connects, "service database", service, 5432, webservers...),
		Tries(TimesOut, "service database", service, 9187, webservers...),
		Tries(TimesOut, "service database", service, 5432, pods...),
		// Both ports are listened on: it is the policy that refuses.
		database.To(Connects, 5432, t.node(database.Node)),
		database.To(Connects, 9187, t.node(database.Node)))
}

func fromNamespaces(ctx context.Context, t *T) {
	const namespace, gold, other = "example-cart", "example-cart-gold", "example-cart-other"
	t.example(ctx, "from-namespaces.yaml", namespace, gold, other)
	cart := t.Pod(ctx, namespace, "shopping-cart")
	service := t.ServiceAddresses(ctx, namespace, "shopping-cart")
	admitted := clients(t.ClientOnEachNode(ctx, gold, "client", nil)...)
	changing := clients(t.ClientOnEachNode(ctx, other, "client", nil)...)
	own := clients(t.ClientOnEachNode(ctx, namespace, "client", nil)...)
	pods := slices.Concat(changing, own)
	t.Expect(ctx,
		cart.To(Connects, 80, slices.Concat(admitted, []Client{t.node(cart.Node)})...),
		cart.To(TimesOut, 8081, admitted...),
		cart.To(Connects, 8081, t.node(cart.Node)),
		cart.To(TimesOut, 80, slices.Concat(pods, t.nodesBut(cart.Node), []Client{Beside{}})...),
		Tries(Connects, "service shopping-cart", service, 80, admitted...),
		Tries(TimesOut, "service shopping-cart", service, 80, pods...))
	for _, change := range []struct {
		label string
		want  Outcome
	}{
		{"tenant=gold", Connects}, {"tenant-", TimesOut}, {"tenant=silver", TimesOut}, {"tenant=gold", Connects}, {"tenant-", TimesOut},
	} {
		t.Kubectl(ctx, "label", "namespace", other, change.label, "--overwrite")
		began := time.Now()
		t.Until(ctx, cart.To(change.want, 80, changing[0])[0])
		t.Logf("%s on the namespace: its pods' way to the cart %s, seen after %v, with the time of kubectl exec and, "+
			"where nothing answers, %v of waiting", change.label, change.want, time.Since(began).Round(time.Millisecond), connectTimeout)
		t.Enforced(ctx)
		t.Expect(ctx,
			cart.To(change.want, 80, changing...),
			Tries(change.want, "service shopping-cart", service, 80, changing...),
			cart.To(Connects, 80, admitted...))
	}
}

func fromAddresses(ctx context.Context, t *T) {
	const namespace = "example-addresses"
	t.example(ctx, "from-addresses.yaml", namespace)
	cart := t.Pod(ctx, namespace, "shopping-cart")
	admitted := t.Outside("shop", t.prefixes("192.168.1.10/24", "2001:db8:168:1::10/64")...)
	refused := t.Outside("office", t.prefixes("192.168.2.10/24", "2001:db8:168:2::10/64")...)
	others := slices.Concat(t.elsewhere(ctx), t.nodesBut(cart.Node), []Client{Beside{}, refused, t.Pod(ctx, namespace, "client")})
	node := t.node(cart.Node)
	t.Expect(ctx,
		cart.To(Connects, 80, admitted, node),
		cart.To(TimesOut, 80, others...),
		Tries(Connects, "port 30980 of "+node.Name, node.Addresses, 30980, admitted),
		Tries(TimesOut, "port 30980 of "+node.Name, node.Addresses, 30980, refused, Beside{}))
}

func toPods(ctx context.Context, t *T) {
	const namespace = "example-egress"
	t.example(ctx, "to-pods.yaml", namespace)
	database, other := t.Pod(ctx, namespace, "database"), t.Pod(ctx, namespace, "other")
	service := t.ServiceAddresses(ctx, namespace, "database")
	webservers := clients(t.ClientOnEachNode(ctx, namespace, "webserver", map[string]string{"app": "webserver"})...)
	webservers = append(webservers, t.Pod(ctx, namespace, "webserver"))
	free := clients(t.ClientOnEachNode(ctx, namespace, "free", nil)...)
	// A machine that is no node: neither pods nor nodes have its address.
	machine := t.Outside("archive", t.prefixes("203.0.113.10/24", "2001:db8:113::10/64")...)
	machine.Listen(t, 5432)
	strangers := t.ServerOnEachNode(ctx, t.Namespace(ctx, nil), "database", map[string]string{"app": "database"}, 5432)
	t.Expect(ctx,
		database.To(Connects, 5432, webservers...),
		database.To(TimesOut, 9187, webservers...),
		other.To(TimesOut, 5432, webservers...),
		Tries(Connects, "service database", service, 5432, webservers...),
		Tries(TimesOut, "service database", service, 9187, webservers...),
		Tries(TimesOut, machine.String(), machine.Addresses, 5432, webservers...),
		// Others of the namespace reach all of that: it is the policy that refuses.
		database.To(Connects, 9187, free...),
		other.To(Connects, 5432, free...),
		Tries(Connects, machine.String(), machine.Addresses, 5432, free...),
		// The policy speaks of what web servers open, not of who reaches them.
		t.Pod(ctx, namespace, "webserver").To(Connects, 80, free...))
	for _, stranger := range strangers {
		t.Expect(ctx, stranger.To(TimesOut, 5432, webservers...), stranger.To(Connects, 5432, free...))
	}
}
