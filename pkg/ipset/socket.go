package ipset

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socket asks the kernel's ipset in the namespace in which it was opened. The kernel answers while it is asked, so the next
// question meets an empty socket; what a failed one left unread is told by its sequence number and passed over.
type socket struct {
	fd       int
	sequence uint32
	request  []byte // kept for its room, as is the answer
	answer   []byte
}

// mostAnswered is the longest datagram of the kernel (netlink_dump gives at most 32 KiB); the echo of a request in a refusal of
// it is longer by a header.
const mostAnswered = mostRequested + 4096

func openSocket() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink for ipset: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind netlink for ipset: %w", err)
	}
	return &socket{fd: fd, answer: make([]byte, mostAnswered)}, nil
}

// begin starts a request; attributes are appended to what it returns, and go out with [socket.ask].
func (s *socket) begin(command, flags int) []byte {
	b := append(s.request[:0], make([]byte, unix.NLMSG_HDRLEN)...)
	binary.NativeEndian.PutUint16(b[4:], uint16(unix.NFNL_SUBSYS_IPSET<<8|command))
	binary.NativeEndian.PutUint16(b[6:], uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	b = append(b, unix.AF_UNSPEC, nl.NFNETLINK_V0, 0, 0) // struct nfgenmsg
	return attribute(b, nl.IPSET_ATTR_PROTOCOL, nl.IPSET_PROTOCOL)
}

// ask sends a request and hands over what follows the header of each message of the answer, until the last.
func (s *socket) ask(request []byte, each func(message []byte)) error {
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
		done, err := split(s.answer[:n], s.sequence, &interrupted, each)
		if err == nil && done && interrupted {
			err = nl.ErrDumpInterrupted
		}
		if err != nil || done {
			return err
		}
	}
}

// split hands over the messages of one datagram; done and err are what the one that ends the answer says.
func split(b []byte, sequence uint32, interrupted *bool, each func([]byte)) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return true, fmt.Errorf("a message of %d bytes in %d", length, len(b))
		}
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		ours, data := binary.NativeEndian.Uint32(b[8:]) == sequence, b[unix.NLMSG_HDRLEN:length]
		b = b[min((length+3)&^3, len(b)):]
		if !ours {
			continue
		}
		*interrupted = *interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch typ {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			return true, refusal(data)
		default:
			if each != nil {
				each(data)
			}
		}
	}
	return false, nil
}

// refusal is the error that the end of an answer tells, nil where all went well.
func refusal(data []byte) error {
	if len(data) < 4 {
		return nil
	}
	switch code := -int32(binary.NativeEndian.Uint32(data)); {
	case code == 0:
		return nil
	case code >= nl.IPSET_ERR_PRIVATE:
		return nl.IPSetError(uintptr(code))
	default:
		return unix.Errno(code)
	}
}

// attribute appends a struct nlattr.
func attribute(b []byte, typ uint16, value ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	return pad(append(b, value...))
}

// text appends an attribute that is a string, as the kernel wants them: with a zero at its end.
func text(b []byte, typ uint16, value string) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(value)+1))
	b = binary.NativeEndian.AppendUint16(b, typ)
	return pad(append(append(b, value...), 0))
}

// number appends an attribute that is a 32-bit number in network order.
func number(b []byte, typ uint16, value uint32) []byte {
	b = binary.NativeEndian.AppendUint16(b, unix.SizeofNlAttr+4)
	b = binary.NativeEndian.AppendUint16(b, typ|unix.NLA_F_NET_BYTEORDER)
	return binary.BigEndian.AppendUint32(b, value)
}

// nested appends an attribute that holds what inside appends.
func nested(b []byte, typ uint16, inside func([]byte) []byte) []byte {
	at := len(b)
	b = inside(attribute(b, typ|unix.NLA_F_NESTED))
	binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at))
	return b
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}
