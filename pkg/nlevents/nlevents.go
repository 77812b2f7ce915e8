// Package nlevents listens to what the kernel announces on netlink: to the groups of one protocol, in the network namespace of
// the thread that opens the socket, whichever thread reads it later.
//
// Facts of netlink(7) that shape it. Messages wait in the order in which the kernel sent them, so who has read until nothing
// waits has seen all that was announced before. A reader that is too slow loses messages, and is told so once (ENOBUFS); what
// it lost nobody knows, so it has to look for itself. Reading never blocks here: waiting is left to the runtime's poller.
package nlevents

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// room is what may wait unread, in the kernel's own reckoning: some ten thousand rules. Without the right to go beyond
// net.core.rmem_max, that limit is taken.
const room = 16 << 20

// most is the longest datagram that is taken in; the kernel's announcements have at most 8 KiB each.
const most = 64 << 10

// Message is one netlink message; Data is what follows the header, and is valid only during the call that hands it over.
type Message struct {
	Type  uint16
	Flags uint16
	// Sender is the port of the socket whose request caused the announcement, zero for the kernel itself.
	Sender uint32
	Data   []byte
}

// Socket receives announcements. Its methods may be called from any goroutine.
type Socket struct {
	file *os.File

	mu     sync.Mutex
	fd     int // -1 once closed
	buffer []byte
}

// Open subscribes to groups (their numbers, from 1) of a protocol such as unix.NETLINK_ROUTE.
func Open(protocol int, groups ...int) (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	if err := subscribe(fd, groups); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Socket{file: os.NewFile(uintptr(fd), "netlink"), fd: fd, buffer: make([]byte, most)}, nil
}

func subscribe(fd int, groups []int) error {
	if err := setRoom(fd, room); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind a netlink socket: %w", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return fmt.Errorf("subscribe to netlink group %d: %w", g, err)
		}
	}
	return nil
}

func setRoom(fd, bytes int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bytes) == nil {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bytes); err != nil {
		return fmt.Errorf("make room for announcements: %w", err)
	}
	return nil
}

// SetRoom changes how much may wait unread; the kernel has a least and doubles what it is told (socket(7), SO_RCVBUF).
func (s *Socket) SetRoom(bytes int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return setRoom(s.fd, bytes)
}

// Read hands over every message that waits, and returns when none does. lost says that the kernel had to drop some. Of several
// calls at a time, each message goes to one, and none returns while another is at work.
func (s *Socket) Read(each func(Message)) (lost bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.fd >= 0 {
		n, from, err := unix.Recvfrom(s.fd, s.buffer, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return lost, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			lost = true
			continue
		case err != nil:
			return lost, fmt.Errorf("read from netlink: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // another process may write to our port; only the kernel is believed
		}
		split(s.buffer[:n], each)
	}
	return lost, nil
}

// split hands over the messages of one datagram.
func split(b []byte, each func(Message)) {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return
		}
		each(Message{Type: binary.NativeEndian.Uint16(b[4:]), Flags: binary.NativeEndian.Uint16(b[6:]),
			Sender: binary.NativeEndian.Uint32(b[12:]), Data: b[unix.NLMSG_HDRLEN:length]})
		b = b[min(align(length), len(b)):]
	}
}

// Attributes hands over the attributes (struct nlattr) of a message's data after its own header; the flags of their types
// (nested, byte order) are taken off.
func Attributes(b []byte, each func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:length])
		b = b[min(align(length), len(b)):]
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// Run calls read whenever something waits, until the context ends, the socket is closed, or read fails.
func (s *Socket) Run(ctx context.Context, read func() error) error {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for netlink: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { s.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var failed error
	err = conn.Read(func(uintptr) bool {
		failed = read()
		return failed != nil || ctx.Err() != nil
	})
	if failed != nil || ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
		return failed
	}
	if err != nil {
		return fmt.Errorf("wait for netlink: %w", err)
	}
	return nil
}

// Close ends the subscription; what waits is forgotten.
func (s *Socket) Close() {
	s.mu.Lock()
	s.fd = -1
	s.mu.Unlock()
	s.file.Close()
}
