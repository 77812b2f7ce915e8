// Package nfnetlink asks the kernel's netfilter subsystems (ipset, conntrack) over netlink, in the network namespace of the thread
// that opens the socket.
//
// The kernel answers while it is asked, within sendto(2) or, for a dump, within recvfrom(2), so the sockets block and nobody waits.
// Each request asks for an answer that ends: NLM_F_ACK, or NLM_F_DUMP with its own end. A message has the header of netlink(7), a
// struct nfgenmsg, and attributes (struct nlattr), whose lengths of 16 bits are of the machine's byte order and whose numbers are
// mostly of the network's. A dump that was interrupted (NLM_F_DUMP_INTR) is an error, for it may lack something.
package nfnetlink

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrInterrupted says that what was dumped changed under the dump's hands.
var ErrInterrupted = errors.New("the dump was interrupted by a change")

// MostRequested is the room for a request with its attributes.
const MostRequested = 32 << 10

// mostAnswered is the longest datagram of the kernel: netlink_dump gives at most 32 KiB, and a refusal repeats the request.
const mostAnswered = MostRequested + 4096

// Socket is not safe for concurrent use.
type Socket struct {
	fd       int
	sequence uint32
	request  []byte // kept for its room, as is the answer
	answer   []byte
}

// Open opens a socket.
func Open() (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind a netlink socket: %w", err)
	}
	return &Socket{fd: fd, answer: make([]byte, mostAnswered)}, nil
}

// Close closes the socket. It may be called again.
func (s *Socket) Close() {
	unix.Close(s.fd)
	s.fd = -1 // the number may soon be another file's
}

// Begin starts a request to a subsystem; attributes are appended to what it returns, and go out with [Socket.Ask]. Version is that
// of the struct nfgenmsg.
func (s *Socket) Begin(subsystem, command, flags int, family, version uint8) []byte {
	b := append(s.request[:0], make([]byte, unix.NLMSG_HDRLEN)...)
	binary.NativeEndian.PutUint16(b[4:], uint16(subsystem<<8|command))
	binary.NativeEndian.PutUint16(b[6:], uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	return append(b, family, version, 0, 0)
}

// Ask sends a request and hands over the attributes of each message of the answer; they are valid only during the call. What the
// kernel refuses is a [unix.Errno], also where the number is one of the subsystem's own.
func (s *Socket) Ask(request []byte, each func(attributes []byte)) error {
	s.request = request
	s.sequence++
	binary.NativeEndian.PutUint32(request, uint32(len(request)))
	binary.NativeEndian.PutUint32(request[8:], s.sequence)
	if err := unix.Sendto(s.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	interrupted := false
	for {
		n, from, err := unix.Recvfrom(s.fd, s.answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // another process may write to our port; only the kernel is believed
		}
		done, intr, err := Split(s.answer[:n], s.sequence, each)
		interrupted = interrupted || intr
		if err == nil && done && interrupted {
			err = ErrInterrupted
		}
		if err != nil || done {
			return err
		}
	}
}

// Split hands over the attributes of the messages of one datagram that answer a request; done and err are what the message says
// that ends the answer, if that is among them. Messages of another sequence are what an earlier request, that failed, left unread.
func Split(b []byte, sequence uint32, each func(attributes []byte)) (done, interrupted bool, err error) {
	const nfgenmsg = 4
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return true, interrupted, fmt.Errorf("a netlink message of %d bytes in %d", length, len(b))
		}
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		ours, data := binary.NativeEndian.Uint32(b[8:]) == sequence, b[unix.NLMSG_HDRLEN:length]
		b = b[min((length+3)&^3, len(b)):]
		if !ours {
			continue
		}
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch {
		case typ == unix.NLMSG_DONE || typ == unix.NLMSG_ERROR:
			return true, interrupted, refusal(data)
		case len(data) >= nfgenmsg && each != nil:
			each(data[nfgenmsg:])
		}
	}
	return false, interrupted, nil
}

// refusal is the error that the end of an answer tells, nil where all went well.
func refusal(data []byte) error {
	if len(data) < 4 {
		return nil
	}
	if code := -int32(binary.NativeEndian.Uint32(data)); code != 0 {
		return unix.Errno(code)
	}
	return nil
}

// Attribute appends an attribute.
func Attribute(b []byte, typ uint16, value ...byte) []byte {
	return pad(append(head(b, typ, len(value)), value...))
}

// Text appends a string, with the zero at its end that the kernel wants.
func Text(b []byte, typ uint16, value string) []byte {
	return pad(append(append(head(b, typ, len(value)+1), value...), 0))
}

// Uint16 appends a number in network order. Its type is not marked so: where the kernel wants NLA_F_NET_BYTEORDER, typ has it.
func Uint16(b []byte, typ uint16, value uint16) []byte {
	return pad(binary.BigEndian.AppendUint16(head(b, typ, 2), value))
}

// Uint32 appends a number in network order, as [Uint16] does.
func Uint32(b []byte, typ uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(head(b, typ, 4), value)
}

// Nested appends an attribute that holds what inside appends.
func Nested(b []byte, typ uint16, inside func([]byte) []byte) []byte {
	at := len(b)
	b = inside(head(b, typ|unix.NLA_F_NESTED, 0))
	binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at))
	return b
}

func head(b []byte, typ uint16, length int) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+length))
	return binary.NativeEndian.AppendUint16(b, typ)
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}
