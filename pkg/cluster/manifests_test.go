package cluster_test

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/object"
)

// contents names what a cluster holds: "pod shop/web", "namespace shop", "policy shop/db".
func contents(c object.Cluster) []string {
	names := []string{}
	for _, p := range c.Pods {
		names = append(names, "pod "+p.Key())
	}
	for _, n := range c.Namespaces {
		names = append(names, "namespace "+n.Name)
	}
	for _, p := range c.Policies {
		names = append(names, "policy "+p.Namespace+"/"+p.Name)
	}
	for _, n := range c.Nodes {
		names = append(names, "node "+n.Name)
	}
	return names
}

func manifestOf(kind, namespace, name string) string {
	version := map[string]string{"NetworkPolicy": "networking.k8s.io/v1"}[kind]
	if version == "" {
		version = "v1"
	}
	if namespace != "" {
		namespace = ", namespace: " + namespace
	}
	return fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s%s}\n", version, kind, name, namespace)
}

func TestManifestsAreReadAsTheAPIServerWouldTakeThem(t *testing.T) {
	pod, policy := manifestOf("Pod", "shop", "web"), manifestOf("NetworkPolicy", "shop", "db")
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"nothing", "", []string{}},
		{"only comments, and documents of nothing else", "# a\n---\n# b\n---\nnull\n---\n", []string{}},
		{"a pod", pod, []string{"pod shop/web", "namespace shop"}},
		{"a namespace", manifestOf("Namespace", "", "lab"), []string{"namespace lab"}},
		{"a node", manifestOf("Node", "", "n1"), []string{"node n1"}},
		{"a policy", policy, []string{"namespace shop", "policy shop/db"}},
		{"no namespace is default", manifestOf("Pod", "", "web") + "---\n" + manifestOf("NetworkPolicy", "", "db"),
			[]string{"pod default/web", "namespace default", "policy default/db"}},
		{"several documents, sorted", "---\n" + policy + "---\n# c\n---\n" + pod + "---\n" + manifestOf("Pod", "a", "z"),
			[]string{"pod a/z", "pod shop/web", "namespace a", "namespace shop", "policy shop/db"}},
		{"other kinds are passed over", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {y: z}\n---\n" + pod +
			"---\napiVersion: v1\nkind: Service\nmetadata: {}\n", []string{"pod shop/web", "namespace shop"}},
		{"a List", "apiVersion: v1\nkind: List\nitems:\n" + item(pod) + item(policy),
			[]string{"pod shop/web", "namespace shop", "policy shop/db"}},
		{"a List in a List", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: List\n  items:\n  - apiVersion: v1\n" +
			"    kind: Namespace\n    metadata: {name: lab}\n", []string{"namespace lab"}},
		{"typed lists, whose items name no kind", "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a}\n---\n" +
			"apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: b}\n---\n" +
			"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems:\n- metadata: {name: c, namespace: b}\n",
			[]string{"pod default/a", "namespace b", "namespace default", "policy b/c"}},
		{"typed lists, whose items do", "apiVersion: v1\nkind: PodList\nitems:\n" + item(pod), []string{"pod shop/web", "namespace shop"}},
		{"an empty list", "apiVersion: v1\nkind: List\nitems: []\n", []string{}},
		{"JSON", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`, []string{"pod default/a", "namespace default"}},
		{"JSON, one after another", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}
			{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b"}}`, []string{"pod default/a", "pod default/b", "namespace default"}},
		{"JSON documents apart as YAML's are", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}` + "\n---\n" +
			`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b"}}`, []string{"pod default/a", "pod default/b", "namespace default"}},
		{"YAML that begins like JSON", "{apiVersion: v1, kind: Pod, metadata: {name: a}}", []string{"pod default/a", "namespace default"}},
		{"Windows' line ends", strings.ReplaceAll(pod+"---\n"+policy, "\n", "\r\n"),
			[]string{"pod shop/web", "namespace shop", "policy shop/db"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := cluster.ParseManifests([]byte(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if got := contents(c); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// item makes a manifest an item of a list.
func item(manifest string) string {
	return "- " + strings.ReplaceAll(strings.TrimSpace(manifest), "\n", "\n  ") + "\n"
}

func TestAManifestThatIsWrongIsAnErrorWithItsDocument(t *testing.T) {
	good := manifestOf("Pod", "", "web")
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"a field that does not exist", good + "---\n" + good + "spec: {containerz: []}\n", []string{"document 2: ", `"spec.containerz"`}},
		{"a field of a policy that does not exist", manifestOf("NetworkPolicy", "", "p") + "spec: {ingres: []}\n",
			[]string{"document 1: ", `"spec.ingres"`}},
		{"a field of a namespace that does not exist", "---\n" + manifestOf("Namespace", "", "lab") + "specs: {}\n",
			[]string{"document 1: ", `"specs"`}},
		{"a wrong type", good + "spec: 3\n", []string{"document 1: ", "spec"}},
		{"a key given twice", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, name: b}\n", []string{"document 1: ", `"name"`}},
		{"no name", good + "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: shop}\n", []string{"document 2: metadata.name: missing"}},
		{"no name in a List", "apiVersion: v1\nkind: List\nitems:\n" + item(good) + "- {apiVersion: v1, kind: Pod}\n",
			[]string{"document 1: items[1]: metadata.name: missing"}},
		{"no name in a typed list", "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a}\n- metadata: {}\n",
			[]string{"document 1: items[1]: metadata.name: missing"}},
		{"no apiVersion", "kind: Pod\nmetadata: {name: a}\n", []string{`document 1: apiVersion "", kind "Pod"`}},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", []string{`document 1: apiVersion "v1", kind ""`}},
		{"neither, in a List", "apiVersion: v1\nkind: List\nitems: [{}]\n", []string{"document 1: items[0]: ", "both are needed"}},
		{"another version of a kind of ours", "apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\nmetadata: {name: a}\n",
			[]string{"document 1: ", "v1beta1", "networking.k8s.io/v1 NetworkPolicy"}},
		{"a kind of ours in other letters", "apiVersion: v1\nkind: pod\nmetadata: {name: a}\n", []string{"document 1: ", `"pod"`, "v1 Pod"}},
		{"no YAML", good + "---\na: [\n", []string{"document 2: "}},
		{"no object", good + "---\n- a\n- b\n", []string{"document 2: "}},
		{"items that are no list", "apiVersion: v1\nkind: List\nitems: 3\n", []string{"document 1: ", "items"}},
		{"all that is wrong", "kind: x\n---\n" + good + "---\n" + good + "spec: 3\n", []string{"document 1: ", "document 3: "}},
		{"JSON, the second of two", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}{"apiVersion":"v1","kind":"Pod","metadata":{}}`,
			[]string{"document 2: metadata.name: missing"}},
		{"the same pod twice", good + "---\n" + good, []string{"Pod default/web"}},
		{"the same namespace twice", manifestOf("Namespace", "", "lab") + "---\n" + manifestOf("Namespace", "", "lab"),
			[]string{"Namespace lab"}},
		{"the same policy twice, once with the default spelled out", manifestOf("NetworkPolicy", "", "p") + "---\n" +
			manifestOf("NetworkPolicy", "default", "p"), []string{"NetworkPolicy default/p"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := cluster.ParseManifests([]byte(tt.text))
			if err == nil {
				t.Fatalf("accepted: %q", contents(c))
			}
			if got := contents(c); len(got) > 0 {
				t.Errorf("with the error come %q", got)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\ndoes not say %q", err, want)
				}
			}
		})
	}
}

func TestWhatFollowsAnObjectInItsDocumentIsNotDropped(t *testing.T) {
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`
	for _, text := range []string{pod + " trailing", pod + "\n" + pod[:len(pod)-5], "{apiVersion: v1, kind: Pod, metadata: {name: a}} trailing"} {
		if c, err := cluster.ParseManifests([]byte(text)); err == nil {
			t.Errorf("%s\nis read as %q, without an error", text, contents(c))
		}
	}
}

func TestWhatIsNoTextIsNotTakenForOne(t *testing.T) {
	for _, text := range []string{
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: yes}}\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {version: 1.10}}\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {Name: a}\n",
		"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec: {podselector: {matchLabels: {a: b}}}\n",
	} {
		if _, err := cluster.ParseManifests([]byte(text)); err == nil {
			t.Errorf("accepted:\n%s", text)
		}
	}
}

func TestAPodIsStrippedToWhatMatters(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       object.Pod
	}{
		{"everything", `{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, uid: u-1, labels: {app: web},
			annotations: {kubernetes.io/config.mirror: m-1, other: x}, deletionTimestamp: "2026-01-02T03:04:05Z"},
			spec: {nodeName: n1, hostNetwork: true, containers: [{name: c, image: i, ports: [{name: http, containerPort: 80}]}]},
			status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}}`,
			object.Pod{Namespace: "shop", Name: "web", UID: "u-1", Mirror: "m-1", Node: "n1", Labels: object.LabelsOf(map[string]string{"app": "web"}),
				IPs:         []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
				Ports:       []object.Port{{Name: "http", Protocol: corev1.ProtocolTCP, Number: 80}},
				HostNetwork: true, Terminating: true}},
		{"podIP stands in for podIPs", `{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: 10.0.0.1}}`,
			object.Pod{Namespace: "default", Name: "a", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}},
		{"an address twice, one in IPv6 form, one that is none", `{apiVersion: v1, kind: Pod, metadata: {name: a},
			status: {podIPs: [{ip: 10.0.0.1}, {ip: "::ffff:10.0.0.1"}, {ip: x}]}}`,
			object.Pod{Namespace: "default", Name: "a", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}},
		{"one that has succeeded", `{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {phase: Succeeded}}`,
			object.Pod{Namespace: "default", Name: "a", Ended: true}},
		{"one that has failed", `{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {phase: Failed}}`,
			object.Pod{Namespace: "default", Name: "a", Ended: true}},
		{"one that is pending", `{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {phase: Pending}}`,
			object.Pod{Namespace: "default", Name: "a"}},
		{"named ports of containers and sidecars, not of other init containers", `{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {
			initContainers: [{name: i, ports: [{name: init, containerPort: 1}]},
				{name: s, restartPolicy: Always, ports: [{name: side, containerPort: 2, protocol: UDP}]}],
			containers: [{name: c, ports: [{name: dns, containerPort: 53, protocol: UDP}, {name: dns, containerPort: 53},
				{containerPort: 7}, {name: bad, containerPort: 70000}, {name: sig, containerPort: 9, protocol: SCTP}]}]}}`,
			object.Pod{Namespace: "default", Name: "a", Ports: []object.Port{{Name: "dns", Protocol: corev1.ProtocolUDP, Number: 53},
				{Name: "dns", Protocol: corev1.ProtocolTCP, Number: 53}, {Name: "sig", Protocol: corev1.ProtocolSCTP, Number: 9},
				{Name: "side", Protocol: corev1.ProtocolUDP, Number: 2}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := cluster.ParseManifests([]byte(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if len(c.Pods) != 1 || !reflect.DeepEqual(*c.Pods[0], tt.want) {
				t.Errorf("got  %+v\nwant %+v", c.Pods[0], tt.want)
			}
		})
	}
}

func TestEveryNamespaceHasTheLabelOfItsName(t *testing.T) {
	c, err := cluster.ParseManifests([]byte("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: lab\n  labels: {tenant: a, " +
		corev1.LabelMetadataName + ": forged}\n---\n" + manifestOf("Pod", "shop", "web")))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]map[string]string{
		"lab":  {"tenant": "a", corev1.LabelMetadataName: "lab"},
		"shop": {corev1.LabelMetadataName: "shop"},
	}
	for _, n := range c.Namespaces {
		if !maps.Equal(n.Labels, want[n.Name]) {
			t.Errorf("namespace %s has %v, want %v", n.Name, n.Labels, want[n.Name])
		}
	}
	if len(c.Namespaces) != len(want) {
		t.Errorf("namespaces %q", contents(c))
	}
}

func TestAPolicyKeepsNameAndSpecAlone(t *testing.T) {
	c, err := cluster.ParseManifests([]byte(`{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: shop,
		uid: u, generation: 3, annotations: {a: b}, labels: {c: d}}, spec: {podSelector: {matchLabels: {app: db}},
		policyTypes: [Ingress], ingress: [{ports: [{port: http}], from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	p := c.Policies[0]
	if len(p.Annotations)+len(p.Labels)+len(p.ManagedFields) > 0 {
		t.Errorf("annotations and labels are kept: %+v", p.ObjectMeta)
	}
	in := p.Spec.Ingress
	if p.UID != "u" || p.Generation != 3 || p.Spec.PodSelector.MatchLabels["app"] != "db" || len(in) != 1 ||
		in[0].Ports[0].Port.StrVal != "http" || in[0].From[0].IPBlock.Except[0] != "10.1.0.0/16" {
		t.Errorf("lost: %+v", p)
	}
}
