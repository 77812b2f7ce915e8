package verify

import (
	"fmt"
	"slices"
	"time"
)

// verifyMutants breaks one line at a time, and reports whether each break is found.
func verifyMutants(o options, p *printer) (bool, error) {
	all := mutations()
	missed := 0
	p.line("%-8s  %-70s  %s", "line", "mutation", "by the rules")
	for i := range all {
		text, found := all[i].search(o, uint64(i))
		if !found {
			missed++
		}
		p.line("%-8s  %-70s  %s", all[i].breaks(), all[i].name, text)
	}
	p.line("\nThe same by packets through the kernel, in clusters where the broken rules differ:")
	kernels := 0
	for i, backend := range o.backends {
		err := onBench(backend, i, func(b *bench) error {
			for i := range all {
				if !all[i].kernel {
					continue
				}
				kernels++
				text, found, err := all[i].searchKernel(o, b, uint64(i))
				if err != nil {
					return fmt.Errorf("%s: %w", all[i].name, err)
				}
				if !found {
					missed++
				}
				p.line("%-8s  %-70s  %s: %s", all[i].breaks(), all[i].name, backend, text)
			}
			return nil
		})
		if err != nil {
			return false, fmt.Errorf("kernel, %s: %w", backend, err)
		}
	}
	p.line("%d mutations by the rules, %d by packets through the kernel: %d not found (%.0f s)", len(all), kernels, missed,
		time.Since(p.begin).Seconds())
	lost, err := walkMutants(o, p)
	return missed+lost == 0, err
}

// walkMutants breaks the way instead of the picture: the incremental one first, then the engine's.
func walkMutants(o options, p *printer) (missed int, err error) {
	p.line("\nMistakes on the way, by walks of patches:")
	patches := spoilers()
	for i := range patches {
		text, found := patches[i].search(o)
		if !found {
			missed++
		}
		p.line("%-8s  %-70s  %s", "line 15", patches[i].name, text)
	}
	p.line("\nMistakes on the way, by walks through the engine:")
	engines := 0
	for _, b := range saboteurs() {
		for _, backend := range o.backends {
			text, found, err := b.search(o, backend)
			if err != nil {
				return 0, fmt.Errorf("%s: %s: %w", b.name, backend, err)
			}
			if engines++; !found {
				missed++
			}
			p.line("%-8s  %-70s  %s: %s", "line 15", b.name, backend, text)
		}
	}
	p.line("%d mistakes by patches, %d through the engine: %d not found (%.0f s)", len(patches), engines, missed,
		time.Since(p.begin).Seconds())
	return missed, nil
}

func mutationNamed(name string) *mutation {
	for _, m := range mutations() {
		if m.name == name {
			return &m
		}
	}
	return nil
}

func (m *mutation) breaks() string {
	if m.line == 0 {
		return "(shape)"
	}
	return fmt.Sprintf("line %d", m.line)
}

const notFound = "NOT FOUND"

// search asks words and broken rules until they differ.
func (m *mutation) search(o options, number uint64) (string, bool) {
	asked := 0
	for n := uint64(0); asked < o.packets; n++ {
		w, d := newWorld(o.seed, n), throw(o.seed, n, forPackets)
		j := judge(w, m, throw(o.seed+number, n, forMutants))
		for range packetsOfAWorld {
			p := w.packet(d)
			asked++
			if rules, err := j.rules(p); err == nil && rules != j.words(p).passes {
				return fmt.Sprintf("found after %d packets in cluster %d", asked, n), true
			}
		}
	}
	return fmt.Sprintf("%s in %d packets", notFound, asked), false
}

// searchKernel sends packets through the broken rules until the kernel differs from the words: those of clusters in which it
// should, for the interpreter of the rules is faster at finding one.
func (m *mutation) searchKernel(o options, b *bench, number uint64) (string, bool, error) {
	asked := 0
	for n := uint64(0); n < uint64(o.packets/packetsOfAWorld) && asked < o.kernelPackets; n++ {
		w, d := newWorld(o.seed, n), throw(o.seed, n, forKernel)
		j := judge(w, m, throw(o.seed+number, n, forMutants))
		var packets []Packet
		for range kernelPacketsOfAWorld {
			packets = append(packets, w.kernelPacket(d))
		}
		if !slices.ContainsFunc(packets, j.promising) {
			continue
		}
		found, sent, err := b.compare(j, packets, census{})
		if err != nil {
			return "", false, err
		}
		if asked += sent; found != nil {
			return fmt.Sprintf("found after %d packets in cluster %d", asked, n), true, nil
		}
	}
	return fmt.Sprintf("%s in %d packets", notFound, asked), false, nil
}

// promising reports whether the broken rules judge a packet, or the reply to it, otherwise than they should.
func (j *judges) promising(p Packet) bool {
	wrong := func(p Packet) bool {
		rules, err := j.rules(p)
		return err == nil && rules != j.words(p).passes
	}
	reply := Packet{From: p.To, To: p.From, Protocol: p.Protocol, State: stateEstablished}
	return wrong(p) || j.words(p).passes && wrong(reply)
}
