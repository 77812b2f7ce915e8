package verify

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// held is a state as maps: a kernel without anything of a kernel's but what it holds.
type held struct {
	chains map[rule.Table]map[string][]rule.Rule
	sets   map[string]heldSet
}

type heldSet struct {
	typ     rule.SetType
	entries map[rule.Entry]bool
}

func hold(s *rule.State) *held {
	h := &held{chains: map[rule.Table]map[string][]rule.Rule{}, sets: map[string]heldSet{}}
	for table, chains := range s.Chains {
		h.chains[table] = map[string][]rule.Rule{}
		for _, c := range chains {
			h.chains[table][c.Name] = c.Rules
		}
	}
	for _, set := range s.Sets {
		h.sets[set.Name] = holdSet(set)
	}
	return h
}

func holdSet(set rule.Set) heldSet {
	entries := map[rule.Entry]bool{}
	for _, e := range set.Entries {
		entries[e] = true
	}
	return heldSet{set.Type, entries}
}

// apply changes what is held. It tells what of the patch cannot be done: entries of a set that is not there.
func (h *held) apply(p *rule.Patch) string {
	for table, chains := range p.Chains {
		for name, rules := range chains {
			if h.chains[table][name] = rules; rules == nil {
				delete(h.chains[table], name)
			}
		}
	}
	for name, set := range p.Sets {
		if delete(h.sets, name); set != nil {
			h.sets[name] = holdSet(*set)
		}
	}
	for _, part := range []struct {
		entries map[string][]rule.Entry
		join    bool
	}{{p.Leave, false}, {p.Join, true}} {
		for name, entries := range part.entries {
			set, there := h.sets[name]
			if !there && len(entries) > 0 {
				return fmt.Sprintf("entries of set %s, which is not there", name)
			}
			for _, e := range entries {
				if set.entries[e] = part.join; !part.join {
					delete(set.entries, e)
				}
			}
		}
	}
	return ""
}

// differs tells in words what is held otherwise than wanted; empty if nothing.
func (h *held) differs(want *held) string {
	var list []string
	for table := range want.chains {
		differences(&list, fmt.Sprintf("%s chain", table), h.chains[table], want.chains[table], func(a, b []rule.Rule) bool {
			return slices.EqualFunc(a, b, func(a, b rule.Rule) bool { return reflect.DeepEqual(a, b) })
		})
	}
	differences(&list, "set", h.sets, want.sets, heldSet.equal)
	slices.Sort(list)
	return strings.Join(list, "\n")
}

func differences[V any](list *[]string, kind string, is, want map[string]V, equal func(a, b V) bool) {
	for name, v := range want {
		if got, there := is[name]; !there {
			*list = append(*list, fmt.Sprintf("%s %s is missing: %v", kind, name, v))
		} else if !equal(got, v) {
			*list = append(*list, fmt.Sprintf("%s %s is\n  %v, want\n  %v", kind, name, got, v))
		}
	}
	for name := range is {
		if _, wanted := want[name]; !wanted {
			*list = append(*list, fmt.Sprintf("%s %s is left over", kind, name))
		}
	}
}

func (s heldSet) equal(o heldSet) bool { return s.typ == o.typ && maps.Equal(s.entries, o.entries) }

func (s heldSet) String() string {
	var list []string
	for e := range s.entries {
		list = append(list, e.String())
	}
	slices.Sort(list)
	return fmt.Sprintf("%s {%s}", s.typ, strings.Join(list, " "))
}

// spoiler breaks the incremental way, as a mistake in it would: what the index is told, or what follows for a family.
type spoiler struct {
	name    string
	changes func(dice, *policy.Changes)
	patch   func(dice, *rule.Patch)
}

// patched takes the steps one by one with patches, and compares with what comes of the same objects at once. It returns the
// number of steps taken, and in words the first difference; empty for none.
func patched(steps []step, broken *spoiler) (int, string) {
	index := policy.NewIndex()
	states := map[rule.Family]*held{}
	for _, f := range rule.Families {
		states[f] = hold(compile.State(index.Model(), f))
	}
	now := moment{}
	for i, s := range steps {
		d := throw(s.chance, 0, forSteps)
		was := now
		now = now.after(s)
		c := policy.Changes{Changes: s.Changes}
		c.Locals = moved(was.locals(), now.locals(), d)
		if ranges := now.ranges(); d.chance(3) || !slices.Equal(was.ranges(), ranges) {
			c.Ranges, c.NewRanges = ranges, true
		}
		if broken != nil && broken.changes != nil {
			broken.changes(d, &c)
		}
		delta := index.Update(c)
		model := policy.Resolve(now.input())
		for _, f := range rule.Families {
			p := compile.Patch(index, delta, f)
			if broken != nil && broken.patch != nil {
				broken.patch(d, p)
			}
			text := states[f].apply(p)
			if text == "" {
				text = states[f].differs(hold(compile.State(model, f)))
			}
			if text != "" {
				return i + 1, fmt.Sprintf("%s: %s", f, text)
			}
		}
		if text := sameAnswers(index, model, now, d); text != "" {
			return i + 1, text
		}
	}
	return len(steps), ""
}

// moved are the interfaces that differ, and some that do not.
func moved(was, now []policy.Local, d dice) map[string]*policy.Local {
	before, list := map[string]policy.Local{}, map[string]*policy.Local{}
	for _, l := range was {
		before[l.Interface], list[l.Interface] = l, nil
	}
	for _, l := range now {
		if list[l.Interface] = &l; sameLocal(before[l.Interface], l) && !d.chance(3) {
			delete(list, l.Interface)
		}
	}
	return list
}

// sameLocal reports whether an interface is for the index what it was: what has changed of its pod, the index learns as a change
// of that.
func sameLocal(a, b policy.Local) bool {
	key := func(l policy.Local) string {
		if l.Pod == nil {
			return ""
		}
		return l.Pod.Key()
	}
	return a.Interface == b.Interface && a.Ready == b.Ready && key(a) == key(b) && slices.Equal(a.Addresses, b.Addresses)
}

// sameAnswers compares what the index and the fresh model say when they are asked.
func sameAnswers(x *policy.Index, m *policy.Model, now moment, d dice) string {
	if got, want := x.Problems(), m.Problems; !slices.Equal(got, want) {
		return fmt.Sprintf("problems %v, want %v", got, want)
	}
	if got, want := x.Policies(), len(now.policies); got != want {
		return fmt.Sprintf("%d policies, want %d", got, want)
	}
	var all []netip.Addr
	for n := range movingAddresses {
		all = append(all, addressPair(n)...)
	}
	for _, a := range all {
		got, want := x.At(a), m.At(a)
		if (got == nil) != (want == nil) || got != nil && got.Interface != want.Interface {
			return fmt.Sprintf("%s is at %v, want %v", a, got, want)
		}
	}
	nobodys := func(netip.Addr) bool { return false }
	for range 10 {
		p := (&World{addresses: all}).anyPacket(d)
		got := x.Allowed(p.From, p.To, p.named(), p.Port, nobodys)
		if want := m.Allowed(p.From, p.To, p.named(), p.Port, nobodys); got != want {
			return fmt.Sprintf("%s: the index says %s, want %s", p, pass(got), pass(want))
		}
	}
	return ""
}

// anyPacket draws a first packet between any two addresses of a family.
func (w *World) anyPacket(d dice) Packet {
	p := Packet{From: one(d, w.addresses...), Protocol: one(d, rule.TCP, rule.TCP, rule.UDP, rule.SCTP),
		Port: one(d, numbers...), State: stateNew}
	for p.To = one(d, w.addresses...); p.To.Is4() != p.From.Is4(); {
		p.To = one(d, w.addresses...)
	}
	return p
}

// shortened leaves out steps, and parts of steps, while the walk still fails.
func shortened(steps []step, fails func([]step) bool) []step {
	for size := max(len(steps)/2, 1); ; size /= 2 {
		for i := 0; i+size <= len(steps); {
			if less := slices.Delete(slices.Clone(steps), i, i+size); fails(less) {
				steps = less
			} else {
				i += size
			}
		}
		if size == 1 {
			break
		}
	}
	for i := range steps {
		for _, cut := range stepCuts(steps[i]) {
			less := slices.Clone(steps)
			if less[i] = cut(steps[i]); fails(less) {
				steps = less
			}
		}
	}
	return steps
}

// stepCuts are the ways to leave one thing out of a step.
func stepCuts(s step) []func(step) step {
	var list []func(step) step
	for key := range s.Pods {
		list = append(list, func(s step) step { s.Pods = leaving(s.Pods, key); return s })
	}
	for key := range s.Namespaces {
		list = append(list, func(s step) step { s.Namespaces = leaving(s.Namespaces, key); return s })
	}
	for key := range s.Policies {
		list = append(list, func(s step) step { s.Policies = leaving(s.Policies, key); return s })
	}
	for key := range s.records {
		list = append(list, func(s step) step { s.records = leaving(s.records, key); return s })
	}
	for key, np := range s.Policies {
		if np == nil {
			continue
		}
		for _, cut := range policyCuts(np) {
			list = append(list, func(s step) step {
				is := s.Policies[key]
				if is != np {
					return s // cut already: what this one speaks of may be gone
				}
				less := is.DeepCopy()
				cut(&less.Spec)
				s.Policies = maps.Clone(s.Policies)
				s.Policies[key] = less
				return s
			})
		}
	}
	return list
}

func leaving[K comparable, V any](all map[K]V, key K) map[K]V {
	less := maps.Clone(all)
	delete(less, key)
	return less
}

// inWords writes an object on one line.
func inWords(v any) string {
	if np, is := v.(*networkingv1.NetworkPolicy); is {
		v = np.Spec
	}
	text, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// patchWalk takes one walk through the index and the patches. What it returns of a difference is all that one needs to see it
// again.
func (o options) patchWalk(n uint64, broken *spoiler) (taken int, found string) {
	steps := walk(throw(o.seed, n, forSteps), stepsOfAWalk)
	taken, text := patched(steps, broken)
	if text == "" {
		return taken, ""
	}
	steps = shortened(steps[:taken], func(less []step) bool {
		_, text := patched(less, broken)
		return text != ""
	})
	_, text = patched(steps, broken)
	return taken, foundWalk(fmt.Sprintf("Walk %d of SEED=%d, by patches", n, o.seed), steps, text)
}

// foundWalk writes what was found on a walk: the steps, and the world in which it ends as manifests.
func foundWalk(which string, steps []step, text string) string {
	var b strings.Builder
	now := moment{}
	fmt.Fprintf(&b, "%s:\n%s\nThe steps:\n", which, text)
	for i, s := range steps {
		now = now.after(s)
		fmt.Fprintf(&b, "%3d %s\n", i+1, s)
	}
	b.WriteString("The objects in the end:")
	return file(now.world(), b.String())
}

const stepsOfAWalk = 30

// patchWalks are so many: they are fast.
func (o options) patchWalks() int { return 10 * o.walks }
