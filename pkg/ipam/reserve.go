package ipam

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
)

// candidate is a free address, and how the queue's header moves once it is taken.
type candidate struct {
	addr netip.Addr
	from *queue
	head int64
	next netip.Addr
}

// listed returns the addresses that an owner's file names.
func (s *state) listed(owner attachment.Key) ([]netip.Addr, error) {
	data, err := s.disk.read(s.disk.path(ownersDir, owner.String()))
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for line := range strings.Lines(string(data)) {
		a, err := netip.ParseAddr(strings.TrimSpace(line))
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// held returns the addresses that an owner's file names and used/ confirms: a killed Reserve may have named others.
func (s *state) held(owner attachment.Key) ([]netip.Addr, error) {
	listed, err := s.listed(owner)
	if err != nil {
		return nil, err
	}
	var held []netip.Addr
	for _, a := range listed {
		user, err := s.disk.read(s.used(a))
		if err != nil {
			return nil, err
		}
		if string(user) == owner.String() {
			held = append(held, a)
		}
	}
	return held, nil
}

func (s *state) reserve(owner attachment.Key) ([]netip.Addr, error) {
	held, err := s.held(owner)
	if err != nil {
		return nil, err
	}
	var got []netip.Addr
	var fresh []candidate
	for _, family := range s.families() {
		i := slices.IndexFunc(held, func(a netip.Addr) bool {
			return slices.ContainsFunc(family, func(sp *span) bool { return sp.contains(a) })
		})
		if i >= 0 {
			got = append(got, held[i])
			continue
		}
		c, err := s.pick(family)
		if err != nil {
			return nil, err
		}
		got = append(got, c.addr)
		fresh = append(fresh, c)
	}
	if len(fresh) == 0 {
		return got, nil
	}
	var lines strings.Builder
	for _, c := range fresh {
		held = append(held, c.addr)
	}
	for _, a := range held {
		lines.WriteString(a.String() + "\n")
	}
	if err := s.disk.write(s.disk.path(ownersDir, owner.String()), []byte(lines.String())); err != nil {
		return nil, err
	}
	for _, c := range fresh {
		if err := s.take(c, owner); err != nil {
			return nil, err
		}
	}
	return got, nil
}

// families groups the ranges by family, in the order in which the families first appear.
func (s *state) families() [][]*span {
	var families [][]*span
	for i := range s.spans {
		sp := &s.spans[i]
		j := slices.IndexFunc(families, func(f []*span) bool { return f[0].first.BitLen() == sp.first.BitLen() })
		if j < 0 {
			families = append(families, []*span{sp})
		} else {
			families[j] = append(families[j], sp)
		}
	}
	return families
}

// pick returns a free address of the first range of a family that has one, or a *FullError.
func (s *state) pick(family []*span) (candidate, error) {
	for _, sp := range family {
		q := s.queues[sp.file()]
		c, err := s.pickUnused(sp, q)
		if err == nil && !c.addr.IsValid() {
			c, err = s.pickRested(q)
		}
		if err != nil || c.addr.IsValid() {
			return c, err
		}
	}
	var spans []span
	for _, sp := range family {
		spans = append(spans, *sp)
	}
	usage, err := s.usage(spans)
	if err != nil {
		return candidate{}, err
	}
	return candidate{}, &FullError{Ranges: usage}
}

// pickUnused returns the range's next address that was never used, or a zero candidate. It passes over addresses that are in
// use or rest nonetheless: one that a killed Reserve took, or, after a change of the ranges, those of the ones before.
func (s *state) pickUnused(sp *span, q *queue) (candidate, error) {
	if !q.next.IsValid() {
		return candidate{}, nil
	}
	for a := sp.from(q.next); a.IsValid(); a = sp.from(a.Next()) {
		used, err := s.disk.exists(s.used(a))
		if err != nil {
			return candidate{}, err
		}
		resting, err := s.disk.exists(s.resting(a))
		if err != nil {
			return candidate{}, err
		}
		if !used && !resting {
			return candidate{addr: a, from: q, head: q.head, next: sp.from(a.Next())}, nil
		}
	}
	return candidate{}, q.move(q.head, netip.Addr{})
}

// pickRested returns the address that has rested longest, if it has rested enough, or a zero candidate. A release in the
// future is one before a reboot that the state outlived.
func (s *state) pickRested(q *queue) (candidate, error) {
	for {
		e, ok, err := q.first()
		if err != nil || !ok {
			return candidate{}, err
		}
		used, err := s.disk.exists(s.used(e.addr))
		if err != nil {
			return candidate{}, err
		}
		if used {
			if err := s.drop(q, e); err != nil {
				return candidate{}, err
			}
			continue
		}
		if s.rests(e) {
			return candidate{}, nil
		}
		return candidate{addr: e.addr, from: q, head: q.head + e.size, next: q.next}, nil
	}
}

func (s *state) rests(e entry) bool { return e.released <= s.time && s.time-e.released < s.reuseAfter }

// take makes the candidate the owner's, whose file names it already.
func (s *state) take(c candidate, owner attachment.Key) error {
	if err := s.disk.write(s.used(c.addr), []byte(owner.String())); err != nil {
		return err
	}
	if c.head != c.from.head {
		if err := s.disk.remove(s.resting(c.addr)); err != nil {
			return err
		}
	}
	if err := c.from.move(c.head, c.next); err != nil {
		return err
	}
	return c.from.compact()
}

func (s *state) release(owner attachment.Key) error {
	held, err := s.held(owner)
	if err != nil {
		return err
	}
	for _, a := range held {
		if err := s.disk.rename(s.used(a), s.releasing(a)); err != nil {
			return err
		}
		if err := s.rest(a); err != nil {
			return err
		}
	}
	return s.disk.remove(s.disk.path(ownersDir, owner.String()))
}

// usage counts by the folders' content, so its cost grows with the pods.
func (s *state) usage(spans []span) ([]Usage, error) {
	var usage []Usage
	for _, sp := range spans {
		usage = append(usage, Usage{Range: sp.Range, Size: sp.size(), ReuseAfter: s.reuseAfter})
	}
	names, err := s.disk.names(s.disk.path(usedDir))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil {
			return nil, err
		}
		for i := range spans {
			if spans[i].contains(a) {
				usage[i].Used++
			}
		}
	}
	entries, err := s.allResting()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		for i := range spans {
			if spans[i].contains(e.addr) && s.rests(e) {
				usage[i].Resting++
			}
		}
	}
	return usage, nil
}
