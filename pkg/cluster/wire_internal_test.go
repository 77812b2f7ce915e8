package cluster

import (
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/randfill"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/pkg/object"
)

// maker fills objects of the API by chance: every field, and those that matter with values that do.
func maker(seed int64) *randfill.Filler {
	one := func(c randfill.Continue, of ...string) string { return of[c.Intn(len(of))] }
	return randfill.NewWithSeed(seed).NilChance(0.3).NumElements(0, 3).Funcs(
		func(q *resource.Quantity, c randfill.Continue) {
			*q = *resource.NewQuantity(c.Int63n(1000), resource.DecimalSI)
		},
		func(t *metav1.Time, c randfill.Continue) { *t = metav1.Unix(c.Int63n(2e9), 0) },
		func(t *metav1.MicroTime, c randfill.Continue) { *t = metav1.NewMicroTime(time.Unix(c.Int63n(2e9), 0)) },
		func(p *corev1.ContainerPort, c randfill.Continue) {
			c.FillNoCustom(p)
			p.Name, p.Protocol = one(c, "", "http", "dns"), corev1.Protocol(one(c, "", "TCP", "UDP"))
			p.ContainerPort = []int32{0, 1, 80, 65535, 65536, -1}[c.Intn(6)]
		},
		func(p *corev1.ContainerRestartPolicy, c randfill.Continue) {
			*p = corev1.ContainerRestartPolicy(one(c, "Always", "Never", ""))
		},
		func(p *corev1.PodPhase, c randfill.Continue) {
			*p = corev1.PodPhase(one(c, "", "Pending", "Running", "Succeeded", "Failed", "Unknown"))
		},
		func(p *corev1.PodIP, c randfill.Continue) {
			p.IP = one(c, "", "10.0.0.1", "fd00::1", "::ffff:10.0.0.1", "x")
		},
		func(s *corev1.PodStatus, c randfill.Continue) {
			c.FillNoCustom(s)
			s.PodIP = one(c, "", "10.0.0.2", "fd00::2", "x")
		},
		func(m *metav1.ObjectMeta, c randfill.Continue) {
			c.FillNoCustom(m)
			m.Annotations = map[string]string{"other": one(c, "a", "b")}
			if c.Bool() {
				m.Annotations[corev1.MirrorPodAnnotationKey] = one(c, "", "mirror")
			}
			if c.Bool() {
				m.Annotations[metav1.InitialEventsAnnotationKey] = one(c, "true", "false")
			}
		},
	)
}

// like is what a wirePod must be, by the API's own decoder.
func like(p *corev1.Pod) *wirePod {
	return &wirePod{arrival[*object.Pod]{namespace: p.Namespace, name: p.Name, version: p.ResourceVersion, object: toPod(p)},
		p.Annotations[metav1.InitialEventsAnnotationKey] == "true"}
}

// What is read of a pod's protobuf is what there is after all of it was read.
func TestOfAPodInProtobufIsReadWhatMatters(t *testing.T) {
	fill := maker(1)
	seen := map[string]int{}
	for i := range 3000 {
		var p corev1.Pod
		fill.Fill(&p)
		message, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		want := like(&p)
		var got wirePod
		if err := got.Unmarshal(message); err != nil || !reflect.DeepEqual(&got, want) {
			t.Fatalf("pod %d: %v\ngot  %+v of %+v\nwant %+v of %+v", i, err, got, got.object, want, want.object)
		}
		o := want.object
		for what, is := range map[string]bool{"labels": o.Labels.Map() != nil, "ports": len(o.Ports) > 1, "addresses": len(o.IPs) > 1,
			"mirror": o.Mirror != "", "host network": o.HostNetwork, "ended": o.Ended, "terminating": o.Terminating, "last": want.last,
			"node": o.Node != "", "an address of podIP alone": len(p.Status.PodIPs) == 0 && len(o.IPs) > 0} {
			if is {
				seen[what]++
			}
		}
	}
	if len(seen) < 10 {
		t.Errorf("of 3000 pods none had something: %v", seen)
	}
}

func TestAListOfPodsInProtobuf(t *testing.T) {
	fill := maker(2)
	left := int64(7)
	list := corev1.PodList{ListMeta: metav1.ListMeta{ResourceVersion: "12", Continue: "there", RemainingItemCount: &left}}
	for range 5 {
		var p corev1.Pod
		fill.Fill(&p)
		list.Items = append(list.Items, p)
	}
	message, err := list.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var got wirePodList
	if err := got.Unmarshal(message); err != nil {
		t.Fatal(err)
	}
	if got.ResourceVersion != "12" || got.Continue != "there" || len(got.Items) != len(list.Items) {
		t.Fatalf("got %+v", got)
	}
	for i := range list.Items {
		if want := like(&list.Items[i]); !reflect.DeepEqual(got.Items[i], want) {
			t.Errorf("pod %d: got %+v, want %+v", i, got.Items[i], want)
		}
	}
}

func TestAPodThatIsCutIsAnError(t *testing.T) {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: types.UID(strings.Repeat("u", 200))}}
	message, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for end := 1; end < 200; end++ {
		if err := new(wirePod).Unmarshal(message[:end]); err == nil || !strings.Contains(err.Error(), "read a Pod") {
			t.Fatalf("%d of %d bytes: %v", end, len(message), err)
		}
	}
}

// FuzzPod reads anything as a Pod's protobuf: without a panic, and where the API's own decoder takes it too, with its result.
func FuzzPod(f *testing.F) {
	fill := maker(3).NilChance(0.95).NumElements(0, 1) // small ones, for speed
	for range 20 {
		var p corev1.Pod
		fill.Fill(&p)
		message, err := p.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(message)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		var got wirePod
		var p corev1.Pod
		if got.Unmarshal(message) != nil || p.Unmarshal(message) != nil {
			return
		}
		if want := like(&p); !reflect.DeepEqual(&got, want) {
			t.Errorf("got  %+v of %+v\nwant %+v of %+v", got, got.object, want, want.object)
		}
	})
}

// BenchmarkPod reads a pod as a Deployment makes them, and beside that all of it by the API's own decoder.
func BenchmarkPod(b *testing.B) {
	text, err := os.ReadFile("testdata/pod.yaml")
	if err != nil {
		b.Fatal(err)
	}
	var p corev1.Pod
	if err := yaml.UnmarshalStrict(text, &p); err != nil {
		b.Fatal(err)
	}
	message, err := p.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	for name, read := range map[string]func() error{
		"what matters": func() error { return new(wirePod).Unmarshal(message) },
		"all of it": func() error {
			var p corev1.Pod
			err := p.Unmarshal(message)
			toPod(&p)
			return err
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(message)))
			b.ReportAllocs()
			for b.Loop() {
				if err := read(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
