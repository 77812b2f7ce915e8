package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/object"
)

// servers repeats a test for what API servers speak: JSON and protobuf, and whether a watch can begin with all objects.
func servers(t *testing.T, test func(t *testing.T, a *fakeAPI)) {
	t.Parallel() // they mostly wait
	for _, tt := range []struct {
		name, mediaType string
		watchList       bool
	}{
		{"JSON, lists", runtime.ContentTypeJSON, false},
		{"JSON, streamed lists", runtime.ContentTypeJSON, true},
		{"protobuf, lists", runtime.ContentTypeProtobuf, false},
		{"protobuf, streamed lists", runtime.ContentTypeProtobuf, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			test(t, newFakeAPI(t, tt.mediaType, tt.watchList))
		})
	}
}

// fromAPI runs a source on the server.
func fromAPI(t *testing.T, a *fakeAPI) *cluster.API {
	t.Helper()
	s, err := cluster.FromAPI(a.Config())
	if err != nil {
		t.Fatal(err)
	}
	if s.Synced() {
		t.Error("synced before it runs")
	}
	run(t, s)
	return s
}

func podOf(namespace, name string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels, UID: "uid-1"},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
}

func namespaceOf(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func policyOf(namespace, name string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
}

func synced(t *testing.T, s cluster.Source) {
	t.Helper()
	nettest.Eventually(t, limit, "the source to be synced", func() error {
		if !s.Synced() {
			return fmt.Errorf("problems %q", s.Problems())
		}
		return nil
	})
}

func TestAnAPIServerIsListedAndWatched(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		a.Put(namespaceOf("shop", nil), podOf("shop", "web", nil), policyOf("shop", "p"))
		s := fromAPI(t, a)
		synced(t, s)
		hear(t, s)
		waitFor(t, s, "pod shop/web", "namespace shop", "policy shop/p")

		a.Put(podOf("shop", "db", nil), namespaceOf("lab", map[string]string{"tenant": "a"}), policyOf("lab", "q"))
		hear(t, s)
		waitFor(t, s, "pod shop/db", "pod shop/web", "namespace lab", "namespace shop", "policy lab/q", "policy shop/p")
		if got := s.Snapshot().Namespaces[0].Labels; got["tenant"] != "a" {
			t.Errorf("namespace lab has the labels %v", got)
		}

		a.Put(podOf("shop", "db", map[string]string{"app": "db"}))
		nettest.Eventually(t, limit, "the new label", func() error {
			if got := s.Snapshot().Pods[0].Labels; got.Get("app") != "db" {
				return fmt.Errorf("labels %v", got)
			}
			return nil
		})
		a.Delete(podOf("shop", "web", nil), namespaceOf("lab", nil), policyOf("lab", "q"))
		waitFor(t, s, "pod shop/db", "namespace shop", "policy shop/p")
		if p := s.Problems(); len(p) > 0 {
			t.Errorf("in good times, problems %q", p)
		}
	})
}

func TestAnEmptyAPIServerIsSyncedToo(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		s := fromAPI(t, a)
		synced(t, s)
		if got := contents(s.Snapshot()); len(got) > 0 {
			t.Errorf("holds %q", got)
		}
	})
}

func TestObjectsOfTheAPIAreStripped(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	now := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	full := podOf("shop", "web", map[string]string{"app": "web"})
	full.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "mirror-1", "large": strings.Repeat("x", 1000)}
	full.DeletionTimestamp = &now
	full.Spec.NodeName, full.Spec.HostNetwork = "n1", true
	full.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 80, Protocol: corev1.ProtocolTCP}, {ContainerPort: 9}}
	full.Spec.InitContainers = []corev1.Container{
		{Name: "once", Ports: []corev1.ContainerPort{{Name: "once", ContainerPort: 1, Protocol: corev1.ProtocolTCP}}},
		{Name: "side", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP}}}}
	full.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}}}
	policy := policyOf("shop", "p")
	policy.Annotations = map[string]string{"large": strings.Repeat("x", 1000)}
	policy.Spec.PodSelector.MatchLabels = map[string]string{"app": "web"}

	servers(t, func(t *testing.T, a *fakeAPI) {
		a.Put(namespaceOf("shop", nil), full, policy)
		for _, phase := range []corev1.PodPhase{corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown} {
			p := podOf("shop", "z-"+strings.ToLower(string(phase)), nil)
			p.Status.Phase = phase
			a.Put(p)
		}
		s := fromAPI(t, a)
		synced(t, s)
		c := s.Snapshot()
		if len(c.Pods) != 6 || len(c.Policies) != 1 {
			t.Fatalf("holds %q", contents(c))
		}
		want := &object.Pod{Namespace: "shop", Name: "web", UID: "uid-1", Mirror: "mirror-1", Node: "n1", Labels: object.LabelsOf(map[string]string{"app": "web"}),
			IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
			Ports: []object.Port{{Name: "http", Protocol: corev1.ProtocolTCP, Number: 80},
				{Name: "dns", Protocol: corev1.ProtocolUDP, Number: 53}},
			HostNetwork: true, Terminating: true}
		if !reflect.DeepEqual(c.Pods[0], want) {
			t.Errorf("got  %+v\nwant %+v", c.Pods[0], want)
		}
		for _, p := range c.Pods[1:] {
			if ended := p.Name == "z-succeeded" || p.Name == "z-failed"; p.Ended != ended {
				t.Errorf("pod %s: ended is %v", p.Name, p.Ended)
			}
		}
		if p := c.Policies[0]; len(p.Annotations) > 0 || p.Spec.PodSelector.MatchLabels["app"] != "web" {
			t.Errorf("policy: %+v", p)
		}
	})
}

// Whatever happened while no watch was there must be known afterwards: from the history, or, where that is forgotten, from
// another list.
func TestABrokenWatchLosesNothing(t *testing.T) {
	for _, forget := range []bool{false, true} {
		t.Run(map[bool]string{false: "history there", true: "history forgotten"}[forget], func(t *testing.T) {
			servers(t, func(t *testing.T, a *fakeAPI) {
				a.Put(namespaceOf("shop", nil), podOf("shop", "web", nil), podOf("shop", "db", nil), policyOf("shop", "p"))
				s := fromAPI(t, a)
				synced(t, s)
				waitFor(t, s, "pod shop/db", "pod shop/web", "namespace shop", "policy shop/p")
				a.SetAway(unavailable)
				a.Delete(podOf("shop", "db", nil), policyOf("shop", "p"))
				a.Put(podOf("shop", "cart", nil), policyOf("shop", "q"))
				if forget {
					a.Forget()
				}
				if !s.Synced() || !slices.Equal(contents(s.Snapshot()), []string{"pod shop/db", "pod shop/web", "namespace shop", "policy shop/p"}) {
					t.Errorf("while the server is away: synced %v, %q; want what was known", s.Synced(), contents(s.Snapshot()))
				}
				a.SetAway(here)
				waitFor(t, s, "pod shop/cart", "pod shop/web", "namespace shop", "policy shop/q")
			})
		})
	}
}

// awayLimit is for what waits for a reflector's next try: client-go doubles its pause with each failure, up to a minute.
const awayLimit = 3 * time.Minute

// shown waits until each kind of objects has a problem that names it.
func shown(t *testing.T, s cluster.Source, when string) {
	t.Helper()
	nettest.Eventually(t, awayLimit, "problems "+when, func() error {
		p := strings.Join(s.Problems(), "\n")
		for _, resource := range []string{"pods", "namespaces", "networkpolicies", "nodes"} {
			if !strings.Contains(p, " "+resource+": ") {
				return fmt.Errorf("problems %q do not name %s", p, resource)
			}
		}
		return nil
	})
}

func shownNoMore(t *testing.T, s cluster.Source) {
	t.Helper()
	nettest.Eventually(t, awayLimit, "no problem while the server answers", func() error {
		if p := s.Problems(); len(p) > 0 {
			return fmt.Errorf("problems %q", p)
		}
		return nil
	})
}

func TestAServerThatIsAwayFromTheBeginningIsAProblemUntilItIsThere(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		a.SetAway(unavailable)
		a.Put(namespaceOf("shop", nil))
		s := fromAPI(t, a)
		shown(t, s, "while the server has never answered")
		if s.Synced() {
			t.Error("synced without a server")
		}
		a.SetAway(here)
		synced(t, s)
		waitFor(t, s, "namespace shop")
		shownNoMore(t, s)
	})
}

func TestAServerThatGoesAwayIsAProblemUntilItIsBack(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		s := fromAPI(t, a)
		synced(t, s)
		shownNoMore(t, s)
		a.SetAway(unavailable)
		shown(t, s, "while the server is away")
		if !s.Synced() {
			t.Error("what was known is not synced any more")
		}
		a.SetAway(here)
		shownNoMore(t, s)
	})
}

func TestThatNobodyListensIsAProblem(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		s := fromAPI(t, a)
		synced(t, s)
		a.CutWatches()
		a.CloseClientConnections()
		a.Close()
		shown(t, s, "while nobody listens")
	})
}

func TestAServerThatSaysNothingIsAProblem(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		a.SetAway(mute)
		s := fromAPI(t, a)
		nettest.Eventually(t, limit, "a problem", func() error {
			if p := s.Problems(); len(p) == 0 || s.Synced() {
				return fmt.Errorf("problems %q, synced %v", p, s.Synced())
			}
			return nil
		})
	})
}

func TestRereadWaitsForTheWatch(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		a.Put(namespaceOf("shop", nil), podOf("shop", "web", nil), podOf("shop", "old", nil))
		s := fromAPI(t, a)
		synced(t, s)
		if err := s.Reread(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			name   string
			change func()
			want   []string
		}{
			{"a new pod", func() { a.Put(podOf("shop", "new", nil)) },
				[]string{"pod shop/new", "pod shop/old", "pod shop/web", "namespace shop"}},
			{"a pod that is gone", func() { a.Delete(podOf("shop", "old", nil)) },
				[]string{"pod shop/new", "pod shop/web", "namespace shop"}},
			{"a label", func() { a.Put(podOf("shop", "web", map[string]string{"app": "web"})) },
				[]string{"pod shop/new", "pod shop/web", "namespace shop"}},
			{"a policy", func() { a.Put(policyOf("shop", "p")) },
				[]string{"pod shop/new", "pod shop/web", "namespace shop", "policy shop/p"}},
		} {
			a.Hold(true)
			step.change()
			brief, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			err := s.Reread(brief)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s that the watch has not told: Reread says %v", step.name, err)
			}
			a.Hold(false)
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			err = s.Reread(ctx)
			cancel()
			if err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
			if got := contents(s.Snapshot()); !slices.Equal(got, step.want) {
				t.Errorf("after Reread of %s: %q, want %q", step.name, got, step.want)
			}
		}
		if got := s.Snapshot().Pods[1].Labels; got.Get("app") != "web" {
			t.Errorf("after Reread: labels %v", got)
		}
	})
}

func TestRereadOfAServerThatIsAwayIsAnError(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		s := fromAPI(t, a)
		synced(t, s)
		a.SetAway(unavailable)
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		if err := s.Reread(ctx); err == nil || ctx.Err() != nil {
			t.Errorf("Reread: %v, context %v; want the server's error, and soon", err, ctx.Err())
		}
	})
}

func TestAClientThatCannotBeIsAnErrorAtOnce(t *testing.T) {
	if _, err := cluster.FromAPI(&rest.Config{Host: "https://[::1"}); err == nil {
		t.Error("accepted")
	}
}

// The configuration belongs to the caller.
func TestTheConfigurationStaysAsItIs(t *testing.T) {
	config := &rest.Config{Host: "http://127.0.0.1:1", ContentConfig: rest.ContentConfig{ContentType: runtime.ContentTypeJSON}}
	before := *config
	if _, err := cluster.FromAPI(config); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*config, before) {
		t.Errorf("changed to %+v", config)
	}
}
