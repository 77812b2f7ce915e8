// Package ipset keeps sets in the kernel through netlink (NFNL_SUBSYS_IPSET), over a socket that stays open. One add costs 2 µs;
// many go in one message (IPSET_ATTR_ADT), as `ipset restore` sends them, at 0.2 µs each. Reading half a million entries back takes
// 0.3 s, half of it for sorting them.
//
// Three facts of the kernel shape it. A prefix of length 0 is stored as a host address without a word, so it is refused here
// (write two halves). The default limit of 65,536 entries is never grown by the kernel, so each set is created with room for
// twice its content. A set in use can be swapped with another one of the same type and family, but not destroyed.
//
// Changes of sets are announced nowhere. That somebody else emptied one shows in the number of its entries, which costs little to
// ask for ([Sets.Counts]).
package ipset

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
	"github.com/postern-cni/postern/pkg/rule"
)

// Errors that callers decide on.
var (
	ErrNotExist = errors.New("the set does not exist")
	ErrInUse    = errors.New("the set is in use by a rule or another set")
	ErrFull     = errors.New("the set is full")
)

// MinRoom is the smallest number of entries a set is created for.
const MinRoom = 65536

// Sets is a handle on the kernel's sets in the network namespace in which it was opened. It is not safe for concurrent use.
type Sets struct {
	socket *nfnetlink.Socket
	sent   int
}

// Open opens a netlink socket.
func Open() (*Sets, error) {
	socket, err := nfnetlink.Open()
	if err != nil {
		return nil, fmt.Errorf("open ipset: %w", err)
	}
	return &Sets{socket: socket}, nil
}

// Close closes the socket.
func (s *Sets) Close() { s.socket.Close() }

// Sent returns how many messages that change something were sent.
func (s *Sets) Sent() int { return s.sent }

func (s *Sets) begin(command, flags int) []byte {
	if flags&unix.NLM_F_DUMP == 0 {
		s.sent++
	}
	b := s.socket.Begin(unix.NFNL_SUBSYS_IPSET, command, flags, unix.AF_UNSPEC, nl.NFNETLINK_V0)
	return nfnetlink.Attribute(b, nl.IPSET_ATTR_PROTOCOL, nl.IPSET_PROTOCOL)
}

// revisions of the types are old ones, as nothing newer is asked of them: any kernel has them, and any ipset program lists them.
var revisions = map[rule.SetType]byte{rule.HashIP: 1, rule.HashNet: 0, rule.HashIPPort: 1, rule.HashNetIface: 0}

// Create makes an empty set with room for twice a number of entries, and [MinRoom] at least.
func (s *Sets) Create(set rule.Set, entries int) error {
	family := byte(unix.AF_INET)
	if set.Family == rule.IPv6 {
		family = unix.AF_INET6
	}
	request := s.begin(nl.IPSET_CMD_CREATE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	request = nfnetlink.Text(request, nl.IPSET_ATTR_SETNAME, set.Name)
	request = nfnetlink.Text(request, nl.IPSET_ATTR_TYPENAME, string(set.Type))
	request = nfnetlink.Attribute(request, nl.IPSET_ATTR_REVISION, revisions[set.Type])
	request = nfnetlink.Attribute(request, nl.IPSET_ATTR_FAMILY, family)
	request = nfnetlink.Nested(request, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
		return nfnetlink.Uint32(b, nl.IPSET_ATTR_MAXELEM|unix.NLA_F_NET_BYTEORDER, uint32(max(MinRoom, 2*entries)))
	})
	return wrap("create", set.Name, s.socket.Ask(request, nil))
}

// Swap exchanges the contents of two sets of one type and family, at once.
func (s *Sets) Swap(a, b string) error {
	request := nfnetlink.Text(s.begin(nl.IPSET_CMD_SWAP, 0), nl.IPSET_ATTR_SETNAME, a)
	return wrap("swap", a+" "+b, s.socket.Ask(nfnetlink.Text(request, nl.IPSET_ATTR_SETNAME2, b), nil))
}

// Flush empties a set.
func (s *Sets) Flush(name string) error { return s.whole("flush", nl.IPSET_CMD_FLUSH, name) }

// Destroy removes a set. That it is not there is no error.
func (s *Sets) Destroy(name string) error {
	err := s.whole("destroy", nl.IPSET_CMD_DESTROY, name)
	if errors.Is(err, ErrNotExist) {
		return nil
	}
	return err
}

func (s *Sets) whole(verb string, command int, name string) error {
	request := nfnetlink.Text(s.begin(command, 0), nl.IPSET_ATTR_SETNAME, name)
	return wrap(verb, name, s.socket.Ask(request, nil))
}

// wrap turns the kernel's numbers (linux/netfilter/ipset/ip_set.h) into this package's errors.
func wrap(verb, object string, err error) error {
	if err == nil {
		return nil
	}
	var code unix.Errno
	if errors.As(err, &code) && code >= nl.IPSET_ERR_PRIVATE {
		err = nl.IPSetError(code) // the same in words
		switch code {
		case nl.IPSET_ERR_TYPE_SPECIFIC:
			return fmt.Errorf("ipset %s %s: %w (%v)", verb, object, ErrFull, err)
		case nl.IPSET_ERR_BUSY, nl.IPSET_ERR_REFERENCED:
			return fmt.Errorf("ipset %s %s: %w", verb, object, ErrInUse)
		case nl.IPSET_ERR_EXIST_SETNAME2: // of a swap: there is no second one
			return fmt.Errorf("ipset %s %s: %w", verb, object, ErrNotExist)
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("ipset %s %s: %w", verb, object, ErrNotExist)
	}
	return fmt.Errorf("ipset %s %s: %w", verb, object, err)
}
