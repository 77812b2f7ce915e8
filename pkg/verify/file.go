package verify

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
)

// A file is a world as manifests, which any cluster would take. What no manifest can say stands in comments, one JSON value each:
//
//	# local {…}    a record of the node: a link, its pod, its addresses
//	# absent "b"   a namespace that has pods and is not known itself (yet)
//	# packet {…}   a packet to ask about, with what is expected of it
const (
	localMark  = "# local "
	absentMark = "# absent "
	packetMark = "# packet "
)

// localLine is a [policy.Local] in a file.
type localLine struct {
	Interface string       `json:"interface"`
	Pod       string       `json:"pod,omitempty"` // namespace/name; empty where no object is known
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Ready     bool         `json:"ready"`
}

// expected is a packet in a file.
type expected struct {
	Packet
	Passes bool `json:"passes"`
}

// file writes a world and packets of it, below a comment for people.
func file(w *World, comment string, packets ...expected) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(comment, "\n") + "\n") {
		b.WriteString(strings.TrimRight("# "+line, " \n") + "\n")
	}
	mark := func(mark string, v any) {
		text, err := json.Marshal(v)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&b, "%s%s\n", mark, text)
	}
	for _, p := range packets {
		mark(packetMark, p)
	}
	for _, l := range w.Local {
		line := localLine{Interface: l.Interface, Addresses: l.Addresses, Ready: l.Ready}
		if l.Pod != nil {
			line.Pod = l.Pod.Key()
		}
		mark(localMark, line)
	}
	for _, name := range absent(w) {
		mark(absentMark, name)
	}
	for _, o := range objects(w) {
		text, err := yaml.Marshal(o)
		if err != nil {
			text = []byte(err.Error() + "\n")
		}
		fmt.Fprintf(&b, "---\n%s", text)
	}
	return b.String()
}

// absent lists the namespaces of pods and policies that are not objects of the world.
func absent(w *World) []string {
	var names []string
	note := func(name string) {
		is := func(n *object.Namespace) bool { return n.Name == name }
		if !slices.ContainsFunc(w.Cluster.Namespaces, is) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, p := range w.Cluster.Pods {
		note(p.Namespace)
	}
	for _, np := range w.Cluster.Policies {
		note(np.Namespace)
	}
	return names
}

// objects are the world's objects in the API's own types.
func objects(w *World) []any {
	var list []any
	for _, n := range w.Cluster.Namespaces {
		list = append(list, &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels}})
	}
	for i, p := range w.Cluster.Pods {
		list = append(list, podObject(p, i))
	}
	for _, np := range w.Cluster.Policies {
		out := np.DeepCopy()
		out.TypeMeta = metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}
		list = append(list, out)
	}
	return list
}

// podObject writes a pod. The second half of its ports are a sidecar's; an init container that ends has ports that count for
// nothing. Every other pod that has ended has failed.
func podObject(p *object.Pod, i int) *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	port := func(p object.Port) corev1.ContainerPort {
		return corev1.ContainerPort{Name: p.Name, Protocol: p.Protocol, ContainerPort: int32(p.Number)}
	}
	main, sidecar := corev1.Container{Name: "main"}, corev1.Container{Name: "sidecar", RestartPolicy: &always}
	for n, of := range p.Ports {
		if n < (len(p.Ports)+1)/2 {
			main.Ports = append(main.Ports, port(of))
		} else {
			sidecar.Ports = append(sidecar.Ports, port(of))
		}
	}
	out := &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels.Map()},
		Spec:       corev1.PodSpec{NodeName: p.Node, HostNetwork: p.HostNetwork, Containers: []corev1.Container{main}}}
	if len(sidecar.Ports) > 0 {
		ends := corev1.Container{Name: "ends", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 7}}}
		out.Spec.InitContainers = []corev1.Container{ends, sidecar}
	}
	if p.Terminating {
		at := metav1.NewTime(time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC))
		out.DeletionTimestamp = &at
	}
	for _, ip := range p.IPs {
		out.Status.PodIPs = append(out.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	switch {
	case p.Ended && i%2 == 0:
		out.Status.Phase = corev1.PodSucceeded
	case p.Ended:
		out.Status.Phase = corev1.PodFailed
	}
	return out
}

// parse reads what file writes.
func parse(text string) (*World, []expected, error) {
	c, err := cluster.ParseManifests([]byte(text))
	if err != nil {
		return nil, nil, err
	}
	w := &World{Cluster: c}
	var packets []expected
	for line := range strings.Lines(text) {
		if err := w.comment(line, &packets); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", strings.TrimSpace(line), err)
		}
	}
	return w, packets, nil
}

// comment takes in a line of a file that no manifest can say.
func (w *World) comment(line string, packets *[]expected) error {
	if text, is := strings.CutPrefix(line, packetMark); is {
		var p expected
		err := json.Unmarshal([]byte(text), &p)
		*packets = append(*packets, p)
		return err
	}
	if text, is := strings.CutPrefix(line, absentMark); is {
		var name string
		err := json.Unmarshal([]byte(text), &name)
		w.Cluster.Namespaces = slices.DeleteFunc(w.Cluster.Namespaces, func(n *object.Namespace) bool { return n.Name == name })
		return err
	}
	text, is := strings.CutPrefix(line, localMark)
	if !is {
		return nil
	}
	var l localLine
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return err
	}
	local := policy.Local{Interface: l.Interface, Addresses: l.Addresses, Ready: l.Ready}
	if l.Pod != "" {
		i := slices.IndexFunc(w.Cluster.Pods, func(p *object.Pod) bool { return p.Key() == l.Pod })
		if i < 0 {
			return fmt.Errorf("no manifest of pod %s", l.Pod)
		}
		local.Pod = w.Cluster.Pods[i]
	}
	w.Local = append(w.Local, local)
	return nil
}
