package hostport

import (
	"fmt"
	"net/netip"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// ConflictError says that a host port is taken.
type ConflictError struct {
	Mapping attachment.PortMapping // the one that was asked for
	Owner   string                 // for people: "pod ns/name", "process nginx (pid 17)"
	Process bool                   // the owner is a process of the host
}

func (e *ConflictError) Error() string {
	host := "every address"
	if e.Mapping.HostIP.IsValid() {
		host = e.Mapping.HostIP.String()
	}
	advice := "delete that pod or choose another hostPort"
	if e.Process {
		advice = `stop it, choose another hostPort, or set "hostPortConflict": "ignore"`
	}
	return fmt.Sprintf("host port %d/%s on %s is in use by %s; %s",
		e.Mapping.HostPort, e.Mapping.Protocol, host, e.Owner, advice)
}

// Conflicts returns a *[ConflictError] if another attachment, or with processes set a process of the node, has one of the
// attachment's ports. An older sandbox of the same pod (on the same host interface) is no conflict. Sockets are looked for
// in the network namespace of the calling thread.
func Conflicts(a *attachment.Attachment, others []*attachment.Attachment, processes bool) error {
	for i, m := range a.PortMappings {
		for _, before := range a.PortMappings[:i] {
			if overlap(m, a, before, a) {
				return &ConflictError{Mapping: m, Owner: "the same pod, which maps it twice"}
			}
		}
		for _, o := range current(others) {
			if o.Key() == a.Key() || o.HostInterface == a.HostInterface {
				continue
			}
			for _, theirs := range o.PortMappings {
				if overlap(m, a, theirs, o) {
					return &ConflictError{Mapping: m, Owner: owner(o)}
				}
			}
		}
	}
	if !processes {
		return nil
	}
	return processConflict(a)
}

// overlap reports whether a packet exists that both mappings want, in a family that both pods have.
func overlap(m attachment.PortMapping, a *attachment.Attachment, n attachment.PortMapping, b *attachment.Attachment) bool {
	if m.Protocol != n.Protocol || m.HostPort != n.HostPort {
		return false
	}
	for _, family := range rule.Families {
		if covers(m, a, family) && covers(n, b, family) && sameAddress(m.HostIP, n.HostIP) {
			return true
		}
	}
	return false
}

// covers reports whether a mapping has a rule in the family.
func covers(m attachment.PortMapping, a *attachment.Attachment, family rule.Family) bool {
	return hasFamily(a, family) && (!m.HostIP.IsValid() || rule.FamilyOf(m.HostIP) == family)
}

func sameAddress(a, b netip.Addr) bool {
	wild := func(x netip.Addr) bool { return !x.IsValid() || x.IsUnspecified() }
	return wild(a) || wild(b) || a == b
}

// processConflict looks for a listening socket on one of the attachment's ports.
func processConflict(a *attachment.Attachment) error {
	listening := map[string][]socket{}
	for _, m := range a.PortMappings {
		if _, read := listening[m.Protocol]; !read {
			found, err := listeners(m.Protocol)
			if err != nil {
				return fmt.Errorf(`look for listeners: %w; "hostPortConflict": "ignore" does without`, err)
			}
			listening[m.Protocol] = found
		}
		for _, s := range listening[m.Protocol] {
			if s.port == m.HostPort && takes(s, m, a) {
				return &ConflictError{Mapping: m, Owner: processOf(s.inode), Process: true}
			}
		}
	}
	return nil
}

// takes reports whether the socket receives packets that the mapping would take from it. A mapping of every address leaves
// a listener on a loopback address alone in this sense: who wants that address names it.
func takes(s socket, m attachment.PortMapping, a *attachment.Attachment) bool {
	for _, family := range rule.Families {
		if !covers(m, a, family) || !s.in(family) {
			continue
		}
		everywhere := !m.HostIP.IsValid() || m.HostIP.IsUnspecified()
		switch {
		case s.addr.IsLoopback() && everywhere:
		case s.addr.IsUnspecified() || everywhere || s.addr == m.HostIP:
			return true
		}
	}
	return false
}
