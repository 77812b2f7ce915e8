package nettest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TCPServer listens in a namespace until the test ends, and returns where: port 0 means any. It tells each client the
// address that it sees him under, then sends back what he sends.
func TCPServer(t testing.TB, ns *NS, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	var listener *net.TCPListener
	err := ns.do(func() (err error) {
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatalf("listen on tcp %s in %s: %v", at, ns.Name, err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.AcceptTCP()
			if err != nil {
				return
			}
			go echo(conn)
		}
	}()
	return plain(listener.Addr().(*net.TCPAddr).AddrPort())
}

func echo(conn *net.TCPConn) {
	defer conn.Close()
	if _, err := fmt.Fprintln(conn, plain(conn.RemoteAddr().(*net.TCPAddr).AddrPort())); err == nil {
		_, _ = io.Copy(conn, conn) // the client's end of the connection ends it, in whatever way
	}
}

// UDPServer listens in a namespace until the test ends, and returns where: port 0 means any. It answers each datagram with
// the address that it sees its sender under. Give it an exact address where the node has several: a reply of a socket
// bound to the unspecified address leaves from the address that the route prefers.
func UDPServer(t testing.TB, ns *NS, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	var conn *net.UDPConn
	err := ns.do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatalf("listen on udp %s in %s: %v", at, ns.Name, err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil { // else an ICMP error of an earlier answer
				_, _ = conn.WriteToUDPAddrPort(fmt.Appendln(nil, plain(from)), from)
			}
		}
	}()
	return plain(conn.LocalAddr().(*net.UDPAddr).AddrPort())
}

// Dial tries whether a client in a namespace reaches a [TCPServer] or [UDPServer]: see [Peer].
func Dial(ns *NS, proto string, from, to netip.AddrPort, timeout time.Duration) error {
	_, err := Peer(ns, proto, from, to, timeout)
	return err
}

// Peer connects from a namespace to a [TCPServer] or [UDPServer] (proto "tcp" or "udp") and returns the address under which
// that sees the client. from is the client's own address and port; the zero value, or port 0, leaves the choice to the
// kernel. An answer within the timeout is a success, anything else an error.
func Peer(ns *NS, proto string, from, to netip.AddrPort, timeout time.Duration) (netip.AddrPort, error) {
	seen, err := peer(ns, proto, from, to, timeout)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("from %s to %s %s: %w", ns.Name, proto, to, err)
	}
	return seen, nil
}

func peer(ns *NS, proto string, from, to netip.AddrPort, timeout time.Duration) (netip.AddrPort, error) {
	dialer := net.Dialer{Timeout: timeout}
	switch {
	case proto != "tcp" && proto != "udp":
		return netip.AddrPort{}, fmt.Errorf("protocol %q: tcp and udp are known", proto)
	case from.IsValid() && proto == "tcp":
		dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
	case from.IsValid():
		dialer.LocalAddr = net.UDPAddrFromAddrPort(from)
	}
	var conn net.Conn
	err := ns.do(func() (err error) {
		conn, err = dialer.DialContext(context.Background(), proto, to.String())
		return err
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return netip.AddrPort{}, err
	}
	if proto == "udp" {
		if _, err := fmt.Fprintln(conn, "?"); err != nil {
			return netip.AddrPort{}, err
		}
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("no answer: %w", err)
	}
	return netip.ParseAddrPort(strings.TrimSpace(line))
}

// plain writes an IPv4 address that a dual-stack socket shows as ::ffff:a.b.c.d the usual way.
func plain(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// Blocked reports whether an error of [Dial] is what a dropped packet looks like (no answer in time), and not a refusal by
// the other end, an unreachable host or a mistake of the test.
func Blocked(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, unix.ETIMEDOUT)
}

// Eventually waits until cond returns nil, asking every few milliseconds, and ends the test with cond's last error when
// the limit is over. what names the condition.
func Eventually(t testing.TB, limit time.Duration, what string, cond func() error) {
	t.Helper()
	const pause = 5 * time.Millisecond
	for deadline := time.Now().Add(limit); ; {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(pause)
	}
}
