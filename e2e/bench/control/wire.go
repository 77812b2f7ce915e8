package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
)

// wire sees what the API server sends to policyd.
type wire struct{ fd int }

// headers are of IPv4 and TCP, without options.
const headers = 40

// least is the number of bytes from which a packet is taken for an event: answers to pings and bookmarks are shorter.
const least = 200

// listenOnWire opens a packet socket on lo. It takes in the headers alone of packets from the address that policyd is served on.
func listenOnWire() (*wire, error) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return nil, err
	}
	const ip = 0x0008 // ETH_P_IP in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	from := netip.MustParseAddr(apiserver.Watched).As4()
	load := func(offset, size uint32) unix.SockFilter {
		return unix.SockFilter{Code: uint16(unix.BPF_LD | unix.BPF_ABS | size), K: offset}
	}
	unless := func(value uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
	}
	program := []unix.SockFilter{ // offsets are from the IP header
		load(12, unix.BPF_W), unless(binary.BigEndian.Uint32(from[:]), 3),
		load(9, unix.BPF_B), unless(unix.IPPROTO_TCP, 1),
		{Code: unix.BPF_RET | unix.BPF_K, K: headers},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	err = errors.Join(unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &filter),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ip, Ifindex: lo.Index}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen to the API server: %w", err)
	}
	return &wire{fd}, nil
}

func (w *wire) close() { unix.Close(w.fd) }

// forget drops what has come so far, and what comes next has room.
func (w *wire) forget() error {
	return w.each(func(time.Time, int) {})
}

// first returns when the first event since [wire.forget] arrived at policyd.
func (w *wire) first() (found time.Time, err error) {
	err = w.each(func(at time.Time, bytes int) {
		if found.IsZero() && bytes >= least {
			found = at
		}
	})
	if err == nil && found.IsZero() {
		err = errors.New("the kernel has a change of which the API server has not told policyd")
	}
	return found, err
}

// each hands over when a segment came and what it carried, of all that have come.
func (w *wire) each(do func(at time.Time, bytes int)) error {
	header, control := make([]byte, headers), make([]byte, 64)
	for {
		n, oobn, _, _, err := unix.Recvmsg(w.fd, header, control, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("read from the packet socket: %w", err)
		case n == headers:
			do(stamp(control[:oobn]), payload(header))
		}
	}
}

// payload is the length of what a TCP segment carries.
func payload(header []byte) int {
	ip, total := int(header[0]&0x0f)*4, int(binary.BigEndian.Uint16(header[2:]))
	if ip+12 >= len(header) {
		return 0
	}
	return total - ip - int(header[ip+12]>>4)*4
}

// stamp is the time at which the kernel received a packet.
func stamp(control []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return time.Time{}
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Time{}
}
