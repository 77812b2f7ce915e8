package verify

import (
	"fmt"

	"github.com/postern-cni/postern/pkg/rule"
)

// difference is a packet that a judge judges otherwise than the words.
type difference struct {
	packet Packet
	text   string
}

// kernelPacket draws a packet that can be sent to a kernel that knows no flow of it.
func (w *World) kernelPacket(d dice) Packet {
	p := w.firstPacket(d)
	switch d.IntN(16) {
	case 0:
		p.Middle = p.Protocol == rule.TCP
	case 1:
		w.forge(d, &p)
	}
	return p
}

// compare loads a world and sends packets, which conntrack must all take for new; then, of each flow that was let in, what comes
// back. asked counts them all.
func (b *bench) compare(j *judges, packets []Packet, c census) (found *difference, asked int, err error) {
	if err := b.load(j.world, j.states); err != nil {
		return nil, 0, err
	}
	passed, err := b.ask(j, packets)
	if err != nil {
		return nil, 0, err
	}
	asked = len(packets)
	var back []sent
	about := map[uint32]Packet{}
	for i, p := range packets {
		words := j.words(p)
		if words.passes && !passed[i].did {
			// Once more, alone: that a busy kernel has lost a packet is no verdict.
			again, err := b.ask(j, []Packet{p})
			if err != nil {
				return nil, asked, err
			}
			passed[i], asked = again[0], asked+1
		}
		if words.passes != passed[i].did {
			return &difference{p, fmt.Sprintf("words say %s, the kernel %s", pass(words.passes), pass(passed[i].did))}, asked, nil
		}
		c.take(j, p, words)
		if passed[i].did {
			r := j.answer(passed[i].sent)
			back, about[r.id] = append(back, r), p
		}
	}
	found, err = b.back(j, back, about)
	return found, asked + len(back), err
}

// outcome is a packet that was sent, and whether it left the node.
type outcome struct {
	sent sent
	did  bool
}

// ask sends the first packets of flows.
func (b *bench) ask(j *judges, packets []Packet) ([]outcome, error) {
	var list []sent
	for _, p := range packets {
		b.id++
		d := datagram{from: p.From, to: p.To, protocol: p.Protocol, sport: uint16(1024 + b.id%60000), dport: p.Port, id: b.id}
		if p.Middle {
			d.kind = carries
		}
		list = append(list, sent{d, j.world.in(p)})
	}
	left, err := b.exchange(list)
	if err != nil {
		return nil, err
	}
	var out []outcome
	for i, s := range list {
		over, did := left[s.id]
		if want := j.world.linkOf(s.to); did && over != want {
			return nil, fmt.Errorf("%s left over %s, want %s", packets[i], over, want)
		}
		out = append(out, outcome{s, did})
	}
	return out, nil
}

// answer is what comes back on a flow: for UDP now and then the ICMP error that nobody listens.
func (j *judges) answer(s sent) sent {
	r := s
	r.from, r.to, r.sport, r.dport, r.kind, r.in = s.to, s.from, s.dport, s.sport, replies, j.world.linkOf(s.to)
	if s.protocol == rule.UDP && s.id%2 == 0 {
		r.kind = fails
	}
	return r
}

// back sends what comes back on flows that were let in: it passes, whatever the policies say of its direction.
func (b *bench) back(j *judges, list []sent, about map[uint32]Packet) (*difference, error) {
	for try := range 2 { // once more, as for first packets
		left, err := b.exchange(list)
		if err != nil {
			return nil, err
		}
		var lost []sent
		for _, s := range list {
			over, did := left[s.id]
			if want := j.world.linkOf(s.to); did && over != want {
				return nil, fmt.Errorf("the reply to %s left over %s, want %s", about[s.id], over, want)
			}
			if !did {
				lost = append(lost, s)
			}
		}
		switch {
		case len(lost) == 0:
			return nil, nil
		case try == 1:
			what := map[kind]string{replies: "reply", fails: "ICMP error"}[lost[0].kind]
			return &difference{about[lost[0].id], "the kernel lets the packet in and drops the " + what}, nil
		}
		list = lost
	}
	return nil, nil
}
