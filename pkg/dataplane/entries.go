package dataplane

import (
	"iter"

	"github.com/postern-cni/postern/pkg/addrmap"
	"github.com/postern-cni/postern/pkg/rule"
)

// entries are what a set is to hold. Nearly all are plain addresses, and these take little room.
type entries struct {
	hosts  addrmap.Map[struct{}]
	others map[rule.Entry]struct{}
}

func host(e rule.Entry) bool {
	return e.Prefix.IsSingleIP() && e.Iface == "" && e.Proto == "" && e.Port == 0 && e.Prefix.Addr().Zone() == ""
}

func (s *entries) holds(e rule.Entry) bool {
	if host(e) {
		return s.hosts.Has(e.Prefix.Addr())
	}
	_, ok := s.others[e]
	return ok
}

func (s *entries) put(e rule.Entry) {
	if host(e) {
		s.hosts.Put(e.Prefix.Addr(), struct{}{})
		return
	}
	if s.others == nil {
		s.others = map[rule.Entry]struct{}{}
	}
	s.others[e] = struct{}{}
}

func (s *entries) drop(e rule.Entry) {
	if host(e) {
		s.hosts.Delete(e.Prefix.Addr())
	} else {
		delete(s.others, e)
	}
}

func (s *entries) len() int { return s.hosts.Len() + len(s.others) }

func (s *entries) all() iter.Seq[rule.Entry] {
	return func(yield func(rule.Entry) bool) {
		for a := range s.hosts.All() {
			if !yield(rule.Host(a)) {
				return
			}
		}
		for e := range s.others {
			if !yield(e) {
				return
			}
		}
	}
}
