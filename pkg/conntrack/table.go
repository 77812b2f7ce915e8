package conntrack

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
)

// table is a way to the kernel's table, for one operation.
type table struct{ *nfnetlink.Socket }

func open() (table, error) {
	s, err := nfnetlink.Open()
	if err != nil {
		return table{}, fmt.Errorf("open conntrack: %w", err)
	}
	return table{s}, nil
}

func (t table) begin(command int, family uint8, flags int) []byte {
	const subsystem, version = 1, 1 // NFNL_SUBSYS_CTNETLINK; doc.go says why not version 0
	return t.Begin(subsystem, command, flags, family, version)
}

// errNoFilter means that the kernel cannot do a filtered deletion, or not as it should.
var errNoFilter = errors.New("no filtered deletion")

// dump returns the flows of a family, or of both with AF_UNSPEC, that match. A dump that the kernel marks as interrupted has
// missed nothing that was there from its start to its end: the mark speaks of a table that was resized, and the dump is repeated
// then.
func (t table) dump(family uint8, match func(Flow) bool) ([]Flow, error) {
	const tries = 5
	var err error
	for range tries {
		var flows []Flow
		var bad error
		err = t.Ask(t.begin(nl.IPCTNL_MSG_CT_GET, family, unix.NLM_F_DUMP), func(attributes []byte) {
			f, tuple, err := parseFlow(attributes)
			if err != nil {
				bad = err
			} else if match(f) {
				f.tuple = string(tuple) // a copy, for few as a rule
				flows = append(flows, f)
			}
		})
		if err = errors.Join(err, bad); err == nil {
			return flows, nil
		}
		if !errors.Is(err, nfnetlink.ErrInterrupted) {
			break
		}
	}
	return nil, fmt.Errorf("list flows: %w", err)
}

func (t table) deleteFiltered(f filter) error {
	if f.broken {
		return errNoFilter
	}
	err := t.Ask(f.append(t.begin(nl.IPCTNL_MSG_CT_DELETE, f.family, 0)), nil)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return errNoFilter
	}
	return err
}

// append adds to a request what makes it one for the flows that the filter finds.
func (f filter) append(request []byte) []byte {
	return nfnetlink.Nested(append(request, f.tuple...), ctaFilter, func(b []byte) []byte {
		return nfnetlink.Attribute(b, ctaFilterOrigFlags, nl.Uint32Attr(f.flags)...)
	})
}

// tupleOf encodes parts of a tuple: an address, if it is valid, at one end (CTA_IP_V4_SRC and the like), and a destination port of
// UDP, if there is one.
func tupleOf(typ, end uint16, addr netip.Addr, port *uint16) []byte {
	return nfnetlink.Nested(nil, typ, func(b []byte) []byte {
		if addr.IsValid() {
			b = nfnetlink.Nested(b, nl.CTA_TUPLE_IP, func(b []byte) []byte {
				return nfnetlink.Attribute(b, end, addr.AsSlice()...)
			})
		}
		if port == nil {
			return b
		}
		return nfnetlink.Nested(b, nl.CTA_TUPLE_PROTO, func(b []byte) []byte {
			b = nfnetlink.Attribute(b, nl.CTA_PROTO_NUM, unix.IPPROTO_UDP)
			return nfnetlink.Uint16(b, nl.CTA_PROTO_DST_PORT, *port)
		})
	})
}

// delete deletes a flow if it is the one with this ID.
func (t table) delete(f Flow) error {
	request := t.begin(nl.IPCTNL_MSG_CT_DELETE, family(f.Orig.Src.Addr()), 0)
	request = nfnetlink.Attribute(request, nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, []byte(f.tuple)...)
	request = nfnetlink.Uint32(request, nl.CTA_ID, f.ID)
	if f.Zone != 0 {
		request = nfnetlink.Uint16(request, nl.CTA_ZONE, f.Zone)
	}
	if err := t.Ask(request, nil); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete flow %v: %w", f, err)
	}
	return nil
}
