package cluster_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/object"
)

func nodeOf(name, cidr string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}}}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

// hearNodes waits for a value of NodeChanges.
func hearNodes(t *testing.T, s cluster.Source) {
	t.Helper()
	select {
	case <-s.NodeChanges():
	case <-time.After(limit):
		t.Fatal("NodeChanges says nothing")
	}
}

// waitForNodes waits until the source has these nodes, each with its CIDRs.
func waitForNodes(t *testing.T, s cluster.Source, want ...string) {
	t.Helper()
	nettest.Eventually(t, limit, fmt.Sprintf("the source to have the nodes %q", want), func() error {
		nodes, synced := s.Nodes()
		var got []string
		for _, n := range nodes {
			got = append(got, fmt.Sprint(n.Name, n.PodCIDRs))
		}
		if !synced || !reflect.DeepEqual(got, want) {
			return fmt.Errorf("synced %v, nodes %q, problems %q", synced, got, s.Problems())
		}
		return nil
	})
}

func TestNodesOfAnAPIServerAreListedAndWatched(t *testing.T) {
	servers(t, func(t *testing.T, a *fakeAPI) {
		a.Put(nodeOf("n2", "10.244.2.0/24"), nodeOf("n1", "10.244.1.0/24"), podOf("shop", "web", nil))
		s := fromAPI(t, a)
		synced(t, s)
		hearNodes(t, s)
		waitForNodes(t, s, "n1[10.244.1.0/24]", "n2[10.244.2.0/24]")
		waitFor(t, s, "pod shop/web", "node n1", "node n2")
		if c := s.Take(); len(c.Nodes) != 2 || c.Nodes["n1"] == nil || c.Nodes["n2"] == nil {
			t.Errorf("Take tells of the nodes %v", c.Nodes)
		}
		for quietNodes(s) != nil { // until what came with the list has been heard
		}

		// What a kubelet reports every few minutes is no change.
		again := nodeOf("n1", "10.244.1.0/24")
		again.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		a.Put(again, podOf("shop", "db", nil))
		waitFor(t, s, "pod shop/db", "pod shop/web", "node n1", "node n2")
		a.Put(nodeOf("n3", "10.244.3.0/24"))
		hearNodes(t, s)
		waitForNodes(t, s, "n1[10.244.1.0/24]", "n2[10.244.2.0/24]", "n3[10.244.3.0/24]")
		if c := s.Take(); len(c.Nodes) != 1 || c.Nodes["n3"] == nil {
			t.Errorf("Take tells of the nodes %v", c.Nodes)
		}
		a.Delete(nodeOf("n2", ""))
		a.Put(nodeOf("n1", "10.244.9.0/24"))
		waitForNodes(t, s, "n1[10.244.9.0/24]", "n3[10.244.3.0/24]")
		if c := s.Take(); len(c.Nodes) != 2 || c.Nodes["n1"] == nil || c.Nodes["n2"] != nil {
			t.Errorf("Take tells of the nodes %v", c.Nodes)
		}
	})
}

// quietNodes returns an error if NodeChanges has a value.
func quietNodes(s cluster.Source) error {
	select {
	case <-s.NodeChanges():
		return fmt.Errorf("nodes have changed")
	default:
		return nil
	}
}

func TestNodesOfAFolderAreWatched(t *testing.T) {
	dir := t.TempDir()
	node := func(name, cidr string) string {
		return manifestOf("Node", "", name) + "spec: {podCIDRs: [" + cidr + "]}\n"
	}
	put(t, dir, "n1.yaml", node("n1", "10.244.1.0/24"))
	f := cluster.FromFolder(dir)
	if _, synced := f.Nodes(); synced {
		t.Error("synced before it has read anything")
	}
	run(t, f)
	hearNodes(t, f)
	waitForNodes(t, f, "n1[10.244.1.0/24]")
	put(t, dir, "web.yaml", manifestOf("Pod", "shop", "web"))
	waitFor(t, f, "pod shop/web", "namespace shop", "node n1")
	if err := quietNodes(f); err != nil {
		t.Errorf("after a pod: %v", err)
	}
	put(t, dir, "n2.yaml", node("n2", "10.244.2.0/24"))
	hearNodes(t, f)
	waitForNodes(t, f, "n1[10.244.1.0/24]", "n2[10.244.2.0/24]")
}

func TestANodeIsStrippedToWhatMatters(t *testing.T) {
	c, err := cluster.ParseManifests([]byte(`{apiVersion: v1, kind: NodeList, items: [
		{metadata: {name: full, labels: {a: b}}, spec: {podCIDR: 10.244.1.7/24, podCIDRs: [10.244.1.7/24, "fd00:1::/64", nonsense, 10.244.1.0/24]},
			status: {addresses: [{type: Hostname, address: full}, {type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "2001:db8::1"},
				{type: ExternalIP, address: 203.0.113.1}, {type: InternalIP, address: x}, {type: InternalIP, address: "::ffff:192.0.2.1"}]}},
		{metadata: {name: old}, spec: {podCIDR: 10.244.2.0/24}},
		{metadata: {name: waits}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []*object.Node{
		{Name: "full", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64")}},
		{Name: "old", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}},
		{Name: "waits"},
	}
	if !reflect.DeepEqual(c.Nodes, want) {
		for _, n := range c.Nodes {
			t.Errorf("got %+v", n)
		}
	}
}
