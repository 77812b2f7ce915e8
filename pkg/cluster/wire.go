package cluster

import (
	"encoding/json"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"

	"github.com/postern-cni/postern/pkg/object"
)

// codecs reads what an API server answers: Namespaces, NetworkPolicies and Nodes into the API's types, and Pods, which are large
// and many, into what is kept of them alone.
func codecs() runtime.NegotiatedSerializer {
	s := runtime.NewScheme()
	s.AddKnownTypeWithName(corev1.SchemeGroupVersion.WithKind("Pod"), &wirePod{})
	s.AddKnownTypeWithName(corev1.SchemeGroupVersion.WithKind("PodList"), &wirePodList{})
	s.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Namespace{}, &corev1.NamespaceList{}, &corev1.Node{}, &corev1.NodeList{})
	s.AddKnownTypes(networkingv1.SchemeGroupVersion, &networkingv1.NetworkPolicy{}, &networkingv1.NetworkPolicyList{})
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	metav1.AddToGroupVersion(s, networkingv1.SchemeGroupVersion)
	return serializer.NewCodecFactory(s).WithoutConversion()
}

// wirePod is a Pod as it comes from an API server: of its protobuf (k8s.io/api/core/v1/generated.proto) it reads the fields that
// [toPod] looks at, and skips the others as they are.
type wirePod struct {
	arrival[*object.Pod]
	// last is true for the bookmark that ends the objects of a streamed list.
	last bool
}

// GetObjectKind implements runtime.Object; a pod's kind is known.
func (*wirePod) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object. What there is of a pod is not changed any more.
func (w *wirePod) DeepCopyObject() runtime.Object { c := *w; return &c }

// GetAnnotations implements metav1.Object, for the one annotation that reflectors ask for.
func (w *wirePod) GetAnnotations() map[string]string {
	if w.last {
		return map[string]string{metav1.InitialEventsAnnotationKey: "true"}
	}
	return nil
}

// Reset is called before Unmarshal.
func (w *wirePod) Reset() { *w = wirePod{} }

// UnmarshalJSON reads the JSON of a Pod.
func (w *wirePod) UnmarshalJSON(text []byte) error {
	var p corev1.Pod
	if err := json.Unmarshal(text, &p); err != nil {
		return err
	}
	*w = wirePod{arrival[*object.Pod]{namespace: p.Namespace, name: p.Name, version: p.ResourceVersion, object: toPod(&p)},
		p.Annotations[metav1.InitialEventsAnnotationKey] == "true"}
	return nil
}

// Unmarshal reads the protobuf of a Pod.
func (w *wirePod) Unmarshal(message []byte) error {
	r := podReader{wirePod: w, pod: &object.Pod{}}
	err := fields(message, func(number protowire.Number, f field) error {
		switch number {
		case 1:
			return f.message(r.metadata)
		case 2:
			return f.message(r.spec)
		case 3:
			return f.message(r.status)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read a Pod (%q in namespace %q): %w", r.pod.Name, r.pod.Namespace, err)
	}
	w.namespace, w.name, w.object = r.pod.Namespace, r.pod.Name, r.whole()
	return nil
}

// podReader gathers the fields of a Pod that are something only together with others.
type podReader struct {
	*wirePod
	pod               *object.Pod
	labels            []object.Label
	phase, podIP      string
	podIPs            []string
	containers, inits []container
}

// metadata takes in a field of ObjectMeta.
func (r *podReader) metadata(number protowire.Number, f field) error {
	switch number {
	case 1:
		return f.text(&r.pod.Name)
	case 3:
		return f.text(&r.pod.Namespace)
	case 5:
		return f.text(&r.pod.UID)
	case 6:
		return f.text(&r.version)
	case 9:
		r.pod.Terminating = true
		return f.message(nothing)
	case 11:
		l, err := f.entry()
		r.labels = append(r.labels, l)
		return err
	case 12:
		a, err := f.entry()
		switch a.Key {
		case corev1.MirrorPodAnnotationKey:
			r.pod.Mirror = a.Value
		case metav1.InitialEventsAnnotationKey:
			r.last = a.Value == "true"
		}
		return err
	}
	return nil
}

// spec takes in a field of PodSpec.
func (r *podReader) spec(number protowire.Number, f field) error {
	switch number {
	case 2:
		return f.container(&r.containers)
	case 10:
		return f.text(&r.pod.Node)
	case 11:
		var on uint64
		err := f.number(&on)
		r.pod.HostNetwork = on != 0
		return err
	case 20:
		return f.container(&r.inits)
	}
	return nil
}

// status takes in a field of PodStatus.
func (r *podReader) status(number protowire.Number, f field) error {
	switch number {
	case 1:
		return f.text(&r.phase)
	case 6:
		return f.text(&r.podIP)
	case 12:
		var ip string
		err := f.message(func(number protowire.Number, f field) error {
			if number == 1 {
				return f.text(&ip)
			}
			return nil
		})
		r.podIPs = append(r.podIPs, ip)
		return err
	}
	return nil
}

// whole is the pod, when all fields are there.
func (r *podReader) whole() *object.Pod {
	p := r.pod
	p.Labels = object.LabelsFrom(r.labels)
	p.IPs = addresses(r.podIPs, r.podIP)
	p.Ended = ended(corev1.PodPhase(r.phase))
	sidecars := slices.DeleteFunc(r.inits, func(c container) bool {
		return c.restart != string(corev1.ContainerRestartPolicyAlways)
	})
	for _, c := range append(r.containers, sidecars...) {
		p.Ports = append(p.Ports, c.ports...)
	}
	return p
}

// container is what matters of one.
type container struct {
	restart string
	ports   []object.Port
}

// container reads one into a list.
func (f field) container(list *[]container) error {
	var c container
	err := f.message(func(number protowire.Number, f field) error {
		switch number {
		case 6:
			var name, protocol string
			var port uint64
			err := f.message(func(number protowire.Number, f field) error {
				switch number {
				case 1:
					return f.text(&name)
				case 3:
					return f.number(&port)
				case 4:
					return f.text(&protocol)
				}
				return nil
			})
			c.ports = withPort(c.ports, name, corev1.Protocol(protocol), int32(port))
			return err
		case 24:
			return f.text(&c.restart)
		}
		return nil
	})
	*list = append(*list, c)
	return err
}

// wirePodList is a PodList in the same way.
type wirePodList struct {
	metav1.TypeMeta
	metav1.ListMeta `json:"metadata"`
	Items           []*wirePod `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *wirePodList) DeepCopyObject() runtime.Object {
	c := *l
	c.Items = slices.Clone(l.Items)
	return &c
}

// Reset is called before Unmarshal.
func (l *wirePodList) Reset() { *l = wirePodList{} }

// Unmarshal reads the protobuf of a PodList.
func (l *wirePodList) Unmarshal(message []byte) error {
	return fields(message, func(number protowire.Number, f field) error {
		switch number {
		case 1:
			return f.message(func(number protowire.Number, f field) error {
				switch number {
				case 2:
					return f.text(&l.ResourceVersion)
				case 3:
					return f.text(&l.Continue)
				}
				return nil
			})
		case 2:
			if f.kind != protowire.BytesType {
				return f.other(protowire.BytesType)
			}
			p := &wirePod{}
			l.Items = append(l.Items, p)
			return p.Unmarshal(f.body)
		}
		return nil
	})
}

// field is one of a protobuf message: a number, or what has a length, or of a kind that nothing of interest has.
type field struct {
	kind  protowire.Type
	value uint64
	body  []byte
}

// fields calls each for the fields of a message, in their order.
func fields(message []byte, each func(protowire.Number, field) error) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		f := field{kind: kind}
		switch kind {
		case protowire.VarintType:
			f.value, n = protowire.ConsumeVarint(message)
		case protowire.BytesType:
			f.body, n = protowire.ConsumeBytes(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return fmt.Errorf("field %d: %w", number, protowire.ParseError(n))
		}
		message = message[n:]
		if err := each(number, f); err != nil {
			return fmt.Errorf("field %d: %w", number, err)
		}
	}
	return nil
}

func nothing(protowire.Number, field) error { return nil }

func (f field) other(want protowire.Type) error {
	return fmt.Errorf("has the wire type %d in place of %d", f.kind, want)
}

// text copies a string: what was read can go.
func (f field) text(to *string) error {
	if f.kind != protowire.BytesType {
		return f.other(protowire.BytesType)
	}
	*to = string(f.body)
	return nil
}

func (f field) number(to *uint64) error {
	if f.kind != protowire.VarintType {
		return f.other(protowire.VarintType)
	}
	*to = f.value
	return nil
}

func (f field) message(each func(protowire.Number, field) error) error {
	if f.kind != protowire.BytesType {
		return f.other(protowire.BytesType)
	}
	return fields(f.body, each)
}

// entry reads an entry of a map of strings.
func (f field) entry() (l object.Label, err error) {
	err = f.message(func(number protowire.Number, f field) error {
		switch number {
		case 1:
			return f.text(&l.Key)
		case 2:
			return f.text(&l.Value)
		}
		return nil
	})
	return l, err
}
