package cni

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/e2e/bench/world"
)

const (
	// pause between two calls.
	pause = 20 * time.Millisecond
	// warmUp is how many rounds come before those that count.
	warmUp = 3
	// goneLimit is for the kernel to take away the links of removed sandboxes.
	goneLimit = 5 * time.Minute
)

// side is one way to attach pods.
type side struct {
	name    string
	node    *world.Node // which makes sandboxes for all sides
	network *world.Network
	args    func(number int) [][2]string // further CNI_ARGS of a spare pod, or nil
	guarded bool                         // policyd is to know its pods

	pods []world.Pod // attached and never measured
}

// boxed is a pod with a sandbox of this side.
func (s *side) boxed(p world.Pod) world.Pod {
	p.Box = s.name + "-" + p.Sandbox()
	return p
}

// measured is what turns found out of one side: milliseconds, one value a round.
type measured struct{ add, del []float64 }

// turns lets each side add a spare pod, and then each delete it, round after round.
func turns(ctx context.Context, rounds int, ports bool, sides ...*side) ([]measured, error) {
	found := make([]measured, len(sides))
	for _, s := range sides {
		for i := range spares {
			if _, err := s.node.Sandbox(s.boxed(spare(i, ports)).Sandbox()); err != nil {
				return nil, err
			}
		}
	}
	for round := range warmUp + rounds {
		number := round % spares
		for i, s := range sides {
			took, err := s.timed(number, ports, func(p world.Pod, args ...[2]string) error {
				_, err := s.network.Add(ctx, p, args...)
				return err
			})
			if err != nil {
				return nil, err
			}
			found[i].add = append(found[i].add, took)
		}
		for i, s := range sides {
			took, err := s.timed(number, ports, func(p world.Pod, args ...[2]string) error {
				return s.network.Del(ctx, p, args...)
			})
			if err != nil {
				return nil, err
			}
			found[i].del = append(found[i].del, took)
		}
	}
	for i := range found {
		found[i] = measured{add: found[i].add[warmUp:], del: found[i].del[warmUp:]}
	}
	return found, nil
}

// timed calls for a spare pod, after a pause, and returns the milliseconds that the call took.
func (s *side) timed(number int, ports bool, call func(p world.Pod, args ...[2]string) error) (float64, error) {
	p := s.boxed(spare(number, ports))
	var args [][2]string
	if s.args != nil {
		args = s.args(number)
	}
	time.Sleep(pause)
	begin := time.Now()
	err := call(p, args...)
	return float64(time.Since(begin)) / float64(time.Millisecond), err
}

// fill attaches pods until the side has so many, some at a time: nothing is measured.
func (s *side) fill(ctx context.Context, pods int) error {
	from := len(s.pods)
	if pods <= from {
		return nil
	}
	list := make([]world.Pod, pods-from)
	for i := range list {
		list[i] = s.boxed(pod("pod", from+i))
	}
	if s.guarded {
		if err := s.announce(fmt.Sprintf("pods-%d", from), list); err != nil {
			return err
		}
	}
	err := world.Each(len(list), func(i int) error {
		_, err := s.attach(ctx, list[i])
		return err
	})
	if err != nil {
		return err
	}
	s.pods = append(s.pods, list...)
	return nil
}

func (s *side) attach(ctx context.Context, p world.Pod) ([]netip.Addr, error) {
	if _, err := s.node.Sandbox(p.Sandbox()); err != nil {
		return nil, err
	}
	return s.network.Add(ctx, p)
}

// announce puts pods into the API as the scheduler does it, before they are attached.
func (s *side) announce(file string, pods []world.Pod) error {
	list := struct {
		metav1.TypeMeta `json:",inline"`
		Items           []*corev1.Pod `json:"items"`
	}{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "List"}}
	for _, p := range pods {
		list.Items = append(list.Items, p.Object())
	}
	return s.node.Write(file, list)
}

// empty takes the sandboxes of the pods that were never measured away, and waits until the kernel has done so: it takes its time
// for many, and that must not fall on what is measured next.
func (s *side) empty(ctx context.Context) error {
	for _, p := range s.pods {
		if err := s.node.RemoveSandbox(p.Sandbox()); err != nil {
			return err
		}
	}
	s.pods = nil
	return s.node.Quiet(ctx, goneLimit)
}
