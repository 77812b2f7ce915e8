package apiserver

import (
	"maps"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

func plan(pods int) Plan {
	return Plan{Seed: 7, Node: "node", Local: 25, Pods: pods, Namespaces: 100, Policies: 100}
}

func TestALargerPlanHasWhatTheSmallerOneHas(t *testing.T) {
	small, large := plan(500), plan(5000)
	for i := range small.Pods {
		if a, b := small.Pod(i), large.Pod(i); !reflect.DeepEqual(a, b) {
			t.Fatalf("pod %d is\n%v\nand in the larger plan\n%v", i, a, b)
		}
	}
	other := large
	other.Seed++
	if reflect.DeepEqual(labelsOf(large, 400), labelsOf(other, 400)) {
		t.Error("the seed changes nothing")
	}
}

func labelsOf(p Plan, pods int) (list []map[string]string) {
	for i := range pods {
		list = append(list, p.Pod(i).Labels)
	}
	return list
}

func TestNamesAndAddressesAreUsedOnce(t *testing.T) {
	p := plan(100_000)
	addresses, names := map[string]int{}, map[string]int{}
	for i := p.Local; i < p.Pods; i++ {
		addresses[p.RemoteAddress(i).String()]++
		namespace, name := p.PodName(i)
		names[namespace+"/"+name]++
	}
	if n := p.Pods - p.Local; len(addresses) != n || len(names) != n {
		t.Errorf("%d pods have %d names and %d addresses", n, len(names), len(addresses))
	}
}

func TestEachLocalPodIsSelectedAndPeersAreOfEveryKind(t *testing.T) {
	p := Plan{Seed: 1, Node: "node", Local: 250, Pods: 10_000, Namespaces: 1000, Policies: 1000}
	selectors := map[string][]labels.Selector{}
	kinds := map[string]int{}
	for i := range p.Policies {
		policy := p.PolicyObject(i)
		s, err := metav1.LabelSelectorAsSelector(&policy.Spec.PodSelector)
		if err != nil {
			t.Fatal(err)
		}
		selectors[policy.Namespace] = append(selectors[policy.Namespace], s)
		for _, peer := range policy.Spec.Ingress[0].From {
			switch {
			case peer.IPBlock != nil:
				kinds["block"]++
			case peer.NamespaceSelector == nil:
				kinds["pods"]++
			case peer.PodSelector == nil:
				kinds["namespaces"]++
			default:
				kinds["both"]++
			}
		}
	}
	fellows, selections := 0, 0
	for i := range p.Local {
		pod, selected := p.Pod(i), 0
		for _, s := range selectors[pod.Namespace] {
			if s.Matches(labels.Set(pod.Labels)) {
				selected++
			}
		}
		if selected == 0 {
			t.Errorf("no policy selects local pod %d", i)
		}
		selections += selected
		if pod.Labels[Fellow] != "" && pod.Namespace == NamespaceName(0) {
			fellows++
		}
	}
	t.Logf("a local pod is selected by %.1f policies; peers: %v", float64(selections)/float64(p.Local), kinds)
	if len(kinds) != 4 || fellows != Fellows {
		t.Errorf("peers are of the kinds %v, %d fellows", kinds, fellows)
	}
}

func TestThatMostPodsAreInOnePeerList(t *testing.T) {
	p := Plan{Seed: 1, Node: "node", Local: 250, Pods: 100_000, Namespaces: 1000, Policies: 1000}
	peer := p.PolicyObject(1).Spec.Ingress[0].From[0]
	s, err := metav1.LabelSelectorAsSelector(peer.PodSelector)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := p.Local; i < p.Pods; i++ {
		if s.Matches(labels.Set(p.Pod(i).Labels)) {
			n++
		}
	}
	if n < 1<<16 {
		t.Errorf("%d pods: ipset's default limit is %d", n, 1<<16)
	}
}

func TestAPodHasTheSizeOfARealOne(t *testing.T) {
	p := plan(100)
	pod := p.Pod(50)
	if n := pod.Size(); n < 1500 || n > 3000 { // the API server adds 2,500 of managed fields
		t.Errorf("%d bytes", n)
	}
	t.Logf("%d bytes without managed fields", pod.Size())
	if other := p.Pod(51); maps.Equal(pod.Labels, other.Labels) && pod.Namespace == other.Namespace {
		t.Error("neighbours are alike")
	}
	if pod.Status.Phase != corev1.PodRunning || p.Pod(3).Status.Phase != "" {
		t.Error("remote pods run, local ones are to be attached")
	}
}
