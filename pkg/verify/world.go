package verify

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
)

// dice makes a world by chance: the same for the same seed.
type dice struct{ *rand.Rand }

// throw returns the dice of one purpose in one world.
func throw(seed, world, purpose uint64) dice {
	return dice{rand.New(rand.NewPCG(seed, world<<4|purpose))}
}

// Purposes of dice: that one of them is thrown more often changes nothing for the others.
const (
	forWorld = iota
	forPackets
	forKernel
	forMutants
	forSteps
	forWalks
)

func (d dice) chance(n int) bool { return d.IntN(n) == 0 }

func one[T any](d dice, of ...T) T { return of[d.IntN(len(of))] }

func some[T any](d dice, most int, draw func() T) []T {
	var list []T
	for range d.IntN(most + 1) {
		list = append(list, draw())
	}
	return list
}

// World is a cluster, seen from one of its nodes.
type World struct {
	Cluster object.Cluster
	Local   []policy.Local
	// addresses are those worth a packet: of pods, whatever they are, and of nobody.
	addresses []netip.Addr
	// bad are the policies that cannot be used as written, once they have been looked for.
	bad map[string]bool
}

// maker makes a world.
type maker struct {
	dice
	*World
	free []int // the last digits of addresses that no pod has yet
}

var (
	namespaces = []string{"a", "b", "c"}
	numbers    = []uint16{1, 53, 80, 81, 5353, 65535}
	portNames  = []string{"web", "dns"}
	values     = map[string][]string{"app": {"web", "db"}, "tier": {"x", "y"}}
)

const (
	pods4 = "10.0.0.%d"
	pods6 = "fd00::%x"
)

func newWorld(seed, n uint64) *World {
	w := &maker{dice: throw(seed, n, forWorld), World: &World{}}
	for _, a := range []string{"192.0.2.1", "2001:db8::1", "192.0.2.2", "203.0.113.7", "10.1.0.1", "2001:db8::2", "fd01::7"} {
		w.addresses = append(w.addresses, netip.MustParseAddr(a))
	}
	for _, name := range namespaces {
		if w.chance(12) {
			continue // an event that is late: its pods are known already
		}
		l := w.labels()
		l[corev1.LabelMetadataName] = name
		w.Cluster.Namespaces = append(w.Cluster.Namespaces, &object.Namespace{Name: name, Labels: l})
	}
	w.pods()
	for i := range 2 + w.IntN(7) {
		w.Cluster.Policies = append(w.Cluster.Policies, w.policy(fmt.Sprintf("policy%d", i)))
	}
	slices.SortFunc(w.Cluster.Pods, func(a, b *object.Pod) int { return strings.Compare(a.Key(), b.Key()) })
	slices.SortFunc(w.Cluster.Policies, func(a, b *networkingv1.NetworkPolicy) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	return w.World
}

func (w *maker) protocol() corev1.Protocol {
	return one(w.dice, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
}

func (w *maker) labels() map[string]string {
	l := map[string]string{}
	for _, key := range []string{"app", "tier"} {
		if !w.chance(3) {
			l[key] = one(w.dice, values[key]...)
		}
	}
	return l
}

// next gives a pod addresses of its own: of both families, mostly.
func (w *maker) next() []netip.Addr {
	n := 16 + w.free[0]
	w.free = w.free[1:]
	pair := []netip.Addr{netip.MustParseAddr(fmt.Sprintf(pods4, n)), netip.MustParseAddr(fmt.Sprintf(pods6, n))}
	w.addresses = append(w.addresses, pair...)
	return one(w.dice, pair, pair, pair, pair[:1], pair[1:])
}

const (
	localPods  = 6 // of this node, one in every state that a local pod can be in
	crowd      = 8 // more of them, in some worlds: then the dispatch tree has branches
	remotePods = 7
)

// pods makes the pods of this node and of others.
func (w *maker) pods() {
	w.free = w.Perm(48)
	for i := range localPods {
		w.attach(w.pod("here"), i)
	}
	if w.chance(8) {
		for range crowd {
			w.attach(w.pod("here"), 0)
		}
	}
	for i := range remotePods {
		pod := w.pod("other")
		switch known := w.addresses[w.IntN(len(w.addresses))]; {
		case i == 0:
			pod.HostNetwork, pod.IPs = true, w.addresses[:2]
		case i == 1:
			pod.Ended, pod.IPs = true, []netip.Addr{known} // which may be another pod's by now
		case i == 2:
			pod.IPs = []netip.Addr{w.claimed()} // one of the statuses is old
		default:
			pod.IPs, pod.Terminating = w.next(), w.chance(4)
		}
	}
	if w.chance(3) { // attached, and no object is known for it
		w.Local = append(w.Local, policy.Local{Interface: w.link("unknown"), Addresses: w.next()})
	}
}

// pod makes a pod that has no address yet.
func (w *maker) pod(node string) *object.Pod {
	pod := &object.Pod{Namespace: one(w.dice, namespaces...), Name: fmt.Sprintf("p%02d", len(w.Cluster.Pods)), Node: node,
		Labels: object.LabelsOf(w.labels())}
	pod.Ports = some(w.dice, 3, func() object.Port {
		return object.Port{Name: one(w.dice, portNames...), Protocol: w.protocol(), Number: one(w.dice, numbers...)}
	})
	w.Cluster.Pods = append(w.Cluster.Pods, pod)
	return pod
}

// claimed returns an address that a pod of another node will have too, or one of a pod of this node.
func (w *maker) claimed() netip.Addr {
	if w.chance(3) && len(w.Local[0].Addresses) > 0 {
		return w.Local[0].Addresses[0]
	}
	twin := w.pod("third")
	twin.IPs = w.next()
	twin.Ports = w.Cluster.Pods[w.IntN(len(w.Cluster.Pods))].Ports
	return one(w.dice, twin.IPs...)
}

// attach gives a local pod its records.
func (w *maker) attach(pod *object.Pod, i int) {
	l := policy.Local{Pod: pod, Interface: w.link(pod.Name), Addresses: w.next(), Ready: true}
	pod.IPs, pod.Terminating = l.Addresses, w.chance(8)
	switch i {
	case 2:
		pod.IPs = one(w.dice, nil, w.next()) // the status lags behind the record
	case 3:
		w.Local = append(w.Local, policy.Local{Pod: pod, Interface: w.link(pod.Name + " net1"), Addresses: w.next(), Ready: true})
	case 4:
		pod.Ended = w.chance(2)
		l.Ready = pod.Ended
	case 5:
		if w.chance(2) { // placed here, not attached yet: its address is the former sandbox's
			l.Addresses, l.Ready = nil, false
		}
	}
	w.Local = append(w.Local, l)
}

// link names a host interface. The names are the same in every world, so that the kernel's links serve for all of them.
func (w *maker) link(of string) string {
	return attachment.HostInterface(attachment.GuardedPrefix, of, "eth0")
}
