package verify

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
)

// step is what happens to a world at once: objects and records of this node that are new, other than they were, or gone (nil).
// Each says what is from then on, so a walk without one of its steps is a walk again.
type step struct {
	object.Changes
	records map[attachment.Key]*attachment.Attachment
	// chance is for what goes with the step besides: the same as long as the step is there, whatever others are left out.
	chance uint64
}

// moment is a world between two steps. Nothing in it is ever changed.
type moment struct {
	pods       map[string]*object.Pod
	namespaces map[string]*object.Namespace
	policies   map[string]*networkingv1.NetworkPolicy
	records    map[attachment.Key]*attachment.Attachment
}

func (m moment) after(s step) moment {
	return moment{replaced(m.pods, s.Pods), replaced(m.namespaces, s.Namespaces), replaced(m.policies, s.Policies),
		replaced(m.records, s.records)}
}

func replaced[K comparable, V any](was map[K]*V, changes map[K]*V) map[K]*V {
	if len(changes) == 0 {
		return was
	}
	is := maps.Clone(was)
	if is == nil {
		is = map[K]*V{}
	}
	for key, v := range changes {
		if is[key] = v; v == nil {
			delete(is, key)
		}
	}
	return is
}

func (m moment) cluster() object.Cluster {
	return object.Cluster{Pods: sorted(m.pods), Namespaces: sorted(m.namespaces), Policies: sorted(m.policies)}
}

func sorted[V any](all map[string]*V) []*V {
	list := make([]*V, 0, len(all))
	for _, key := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[key])
	}
	return list
}

const thisNode = "here"

// locals are the interfaces of this node, in the plainest words: the newest record of each link, its pod if that is the one that
// was attached; and pods that were placed here and have no record yet.
func (m moment) locals() []policy.Local {
	links := map[string]*attachment.Attachment{}
	for _, a := range m.records {
		if other := links[a.HostInterface]; other == nil || other.Created.Before(a.Created) {
			links[a.HostInterface] = a
		}
	}
	all := map[string]policy.Local{}
	for link, a := range links {
		pod := m.pods[a.Pod.Namespace+"/"+a.Pod.Name]
		if pod != nil && (pod.HostNetwork || pod.UID != "" && a.Pod.UID != "" && pod.UID != a.Pod.UID) {
			pod = nil
		}
		all[link] = policy.Local{Pod: pod, Interface: link, Addresses: a.Addresses, Ready: pod != nil}
	}
	for _, p := range m.pods {
		link := hostInterface(p.Identity(), "eth0")
		if _, there := all[link]; !there && p.Node == thisNode && !p.HostNetwork && !p.Ended {
			all[link] = policy.Local{Pod: p, Interface: link}
		}
	}
	list := make([]policy.Local, 0, len(all))
	for _, link := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[link])
	}
	return list
}

func hostInterface(identity, ifName string) string {
	return attachment.HostInterface(attachment.GuardedPrefix, identity, ifName)
}

// ranges are those of the newest record: all are of one network.
func (m moment) ranges() []netip.Prefix {
	var newest *attachment.Attachment
	for _, a := range m.records {
		if newest == nil || newest.Created.Before(a.Created) {
			newest = a
		}
	}
	if newest == nil {
		return nil
	}
	return newest.Ranges
}

func (m moment) input() policy.Input {
	return policy.Input{Cluster: m.cluster(), Local: m.locals(), Ranges: m.ranges()}
}

// world is the moment as a picture that stands still, for its manifests.
func (m moment) world() *World {
	in := m.input()
	return &World{Cluster: in.Cluster, Local: in.Local}
}

// mover draws steps.
type mover struct {
	maker
	now     moment
	crowded bool
	count   int // of pods, sandboxes and moments that were ever made
}

// walk draws the steps of a walk; the first one makes a world.
func walk(d dice, length int) []step {
	m := newMover(d)
	var list []step
	for i := range length {
		if i == 0 {
			list = append(list, m.begin())
		} else {
			list = append(list, m.step())
		}
	}
	return list
}

// movingAddresses are so few that they change owners all the time.
const movingAddresses = 12

func newMover(d dice) *mover {
	w := &World{}
	for _, a := range []string{"192.0.2.1", "2001:db8::1", "10.1.0.1", "fd01::7"} {
		w.addresses = append(w.addresses, netip.MustParseAddr(a))
	}
	for n := range movingAddresses {
		w.addresses = append(w.addresses, addressPair(n)...)
	}
	return &mover{maker: maker{dice: d, World: w}, crowded: d.chance(6)}
}

func addressPair(n int) []netip.Addr {
	return []netip.Addr{netip.MustParseAddr(fmt.Sprintf(pods4, 16+n)), netip.MustParseAddr(fmt.Sprintf(pods6, 16+n))}
}

// begin makes a world out of many events at once.
func (m *mover) begin() step {
	s := m.nothing()
	pods := 12
	if m.crowded {
		pods = 30
	}
	for _, name := range namespaces {
		if !m.chance(6) {
			m.do(&s, func(s *step) { m.relabel(s, name) })
		}
	}
	for range pods {
		m.do(&s, m.newPod)
	}
	for range pods / 2 {
		m.do(&s, m.attachPod)
	}
	for range 2 + m.IntN(6) {
		m.do(&s, m.newPolicy)
	}
	return s
}

func (m *mover) nothing() step {
	s := step{chance: m.Uint64(), records: map[attachment.Key]*attachment.Attachment{}}
	s.Pods, s.Namespaces = map[string]*object.Pod{}, map[string]*object.Namespace{}
	s.Policies = map[string]*networkingv1.NetworkPolicy{}
	return s
}

// do lets one event more happen within a step.
func (m *mover) do(s *step, event func(*step)) {
	event(s)
	m.now = m.now.after(*s)
}

// step draws one to four events.
func (m *mover) step() step {
	s := m.nothing()
	for range one(m.dice, 1, 1, 1, 2, 4) {
		switch m.IntN(20) {
		case 0, 1:
			m.do(&s, m.newPod)
		case 2, 3, 4, 5, 6:
			m.do(&s, m.changePod)
		case 7:
			m.do(&s, m.removePod)
		case 8, 9:
			m.do(&s, m.changeNamespace)
		case 10, 11, 12:
			m.do(&s, m.newPolicy)
		case 13:
			m.do(&s, m.removePolicy)
		case 14, 15, 16:
			m.do(&s, m.attachPod)
		case 17, 18:
			m.do(&s, m.detach)
		case 19:
			m.do(&s, m.attachUnknown)
		}
	}
	return s
}

// newPod makes a pod, or makes one again under the same name.
func (m *mover) newPod(s *step) {
	m.count++
	names := 14
	if m.crowded {
		names = 40
	}
	pod := &object.Pod{Namespace: one(m.dice, namespaces...), Name: fmt.Sprintf("p%02d", m.IntN(names)),
		Labels: object.LabelsOf(m.labels()),
		UID:    one(m.dice, "", fmt.Sprintf("uid-%d", m.count), fmt.Sprintf("uid-%d", m.count)),
		Node:   one(m.dice, thisNode, thisNode, thisNode, "other", "other")}
	if m.crowded && !m.chance(3) {
		pod.Node = thisNode
	}
	m.ports(pod)
	if pod.Node != thisNode || m.chance(3) {
		pod.IPs = m.pair()
	}
	pod.HostNetwork, pod.Ended = m.chance(14), m.chance(14)
	s.Pods[pod.Key()] = pod
}

func (m *mover) ports(pod *object.Pod) {
	pod.Ports = some(m.dice, 3, func() object.Port {
		return object.Port{Name: one(m.dice, portNames...), Protocol: m.protocol(), Number: one(m.dice, numbers...)}
	})
}

// pair draws addresses, of both families mostly, which somebody else may have.
func (m *mover) pair() []netip.Addr {
	pair := addressPair(m.IntN(movingAddresses))
	return one(m.dice, pair, pair, pair, pair[:1], pair[1:])
}

// drawn is one of the values, by the order of their keys; nil if there is none.
func drawn[K comparable, V any](d dice, all map[K]*V, name func(K) string) *V {
	if len(all) == 0 {
		return nil
	}
	keys := slices.SortedFunc(maps.Keys(all), func(a, b K) int { return strings.Compare(name(a), name(b)) })
	return all[one(d, keys...)]
}

func same(key string) string { return key }

func (m *mover) changePod(s *step) {
	was := drawn(m.dice, m.now.pods, same)
	if was == nil {
		return
	}
	pod := *was
	m.count++
	switch m.IntN(12) {
	case 0, 1, 2, 3:
		pod.Labels = object.LabelsOf(m.labels())
	case 4, 5:
		pod.IPs = one(m.dice, nil, m.pair(), m.pair())
	case 6:
		pod.Ended = !pod.Ended
	case 7:
		pod.HostNetwork = !pod.HostNetwork
	case 8:
		pod.UID = fmt.Sprintf("uid-%d", m.count)
	case 9:
		m.ports(&pod)
	case 10:
		pod.Node = one(m.dice, thisNode, "other", "")
	case 11:
		pod.Terminating = true
	}
	s.Pods[pod.Key()] = &pod
}

func (m *mover) removePod(s *step) {
	if pod := drawn(m.dice, m.now.pods, same); pod != nil {
		s.Pods[pod.Key()] = nil
	}
}

func (m *mover) changeNamespace(s *step) {
	if name := one(m.dice, namespaces...); m.now.namespaces[name] != nil && m.chance(4) {
		s.Namespaces[name] = nil
	} else {
		m.relabel(s, name)
	}
}

func (m *mover) relabel(s *step, name string) {
	l := m.labels()
	l[corev1.LabelMetadataName] = name
	s.Namespaces[name] = &object.Namespace{Name: name, Labels: l}
}

func (m *mover) newPolicy(s *step) {
	np := m.policy(fmt.Sprintf("policy%d", m.IntN(5)))
	s.Policies[object.PolicyKey(np)] = np
}

func (m *mover) removePolicy(s *step) {
	if np := drawn(m.dice, m.now.policies, same); np != nil {
		s.Policies[object.PolicyKey(np)] = nil
	}
}

// attachPod writes the record of a pod: of one that was placed here, mostly, and mostly with the UID that it has.
func (m *mover) attachPod(s *step) {
	here := maps.Clone(m.now.pods)
	maps.DeleteFunc(here, func(_ string, p *object.Pod) bool { return p.Node != thisNode })
	if m.chance(12) {
		here = m.now.pods
	}
	pod := drawn(m.dice, here, same)
	if pod == nil {
		return
	}
	of := attachment.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
	if m.chance(8) {
		of.UID = one(m.dice, "", "uid-0")
	}
	m.attach(s, of)
}

// attachUnknown writes the record of a pod whose object has not come yet.
func (m *mover) attachUnknown(s *step) {
	m.attach(s, attachment.Pod{Namespace: one(m.dice, namespaces...), Name: fmt.Sprintf("p%02d", m.IntN(14))})
}

// attach writes a record: of a new sandbox, of which the former one's record may still be there.
func (m *mover) attach(s *step, pod attachment.Pod) {
	m.count++
	a := &attachment.Attachment{Version: 1, ContainerID: fmt.Sprintf("sandbox%d", m.count),
		IfName: one(m.dice, "eth0", "eth0", "eth0", "net1"), NetNS: "/proc/self/ns/net", Network: "walk", Pod: pod,
		Policy: attachment.PolicyEnforce, Addresses: m.pair(),
		Created: time.Unix(int64(m.count), 0).UTC()}
	a.HostInterface = hostInterface(a.Identity(), a.IfName)
	for _, address := range addressPair(0)[:m.count%3] { // of no family, of one, of both: half of the addresses that pods have
		half, _ := address.Prefix(address.BitLen() - 3)
		a.Ranges = append(a.Ranges, half)
	}
	s.records[a.Key()] = a
}

func (m *mover) detach(s *step) {
	if a := drawn(m.dice, m.now.records, attachment.Key.String); a != nil {
		s.records[a.Key()] = nil
	}
}

// String tells a step in a few words.
func (s step) String() string {
	var words []string
	note := func(kind, name string, gone bool, what any) {
		if gone {
			words = append(words, fmt.Sprintf("%s %s goes", kind, name))
		} else {
			words = append(words, fmt.Sprintf("%s %s: %s", kind, name, inWords(what)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Namespaces)) {
		note("namespace", name, s.Namespaces[name] == nil, s.Namespaces[name])
	}
	for _, key := range slices.Sorted(maps.Keys(s.Pods)) {
		note("pod", key, s.Pods[key] == nil, s.Pods[key])
	}
	for _, key := range slices.Sorted(maps.Keys(s.Policies)) {
		note("policy", key, s.Policies[key] == nil, s.Policies[key])
	}
	for _, a := range sortedKeys(s.records) {
		note("record", a.String(), s.records[a] == nil, s.records[a])
	}
	return strings.Join(words, "\n    ")
}

func sortedKeys[V any](of map[attachment.Key]V) []attachment.Key {
	return slices.SortedFunc(maps.Keys(of), func(a, b attachment.Key) int { return strings.Compare(a.String(), b.String()) })
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
