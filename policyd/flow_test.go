package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
)

// A flow is an open exchange whose two ends the test holds: a TCP connection, or two UDP sockets that know each other. Each end
// sends a counter when it speaks, and the other sees that nothing is missing.
type flow struct {
	name             string
	client, server   net.Conn
	toServer, toBack direction
	datagrams        bool
}

// direction is one of a flow's two.
type direction struct {
	mu      sync.Mutex
	speaks  bool
	sent    uint64
	got     uint64
	last    time.Time     // when something arrived
	pause   time.Duration // the longest between two arrivals
	trouble error
}

// speakEvery is the time between two numbers: the ends of flows are known to that.
const speakEvery = 10 * time.Millisecond

// carry starts both directions of a flow; it ends with the test.
func (f *flow) carry(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		f.client.Close()
		f.server.Close()
		wg.Wait()
	})
	wg.Go(func() { f.toServer.send(ctx, f.client) })
	wg.Go(func() { f.toBack.send(ctx, f.server) })
	wg.Go(func() { f.toServer.receive(f.server, f.datagrams) })
	wg.Go(func() { f.toBack.receive(f.client, f.datagrams) })
}

func (d *direction) send(ctx context.Context, c net.Conn) {
	tick := time.NewTicker(speakEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		d.mu.Lock()
		speaks, n := d.speaks, d.sent
		d.mu.Unlock()
		if !speaks {
			continue
		}
		if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
			continue // an ICMP error of an earlier datagram, or the end of the stream
		}
		d.mu.Lock()
		d.sent++
		d.mu.Unlock()
	}
}

func (d *direction) receive(c net.Conn, datagrams bool) {
	buf := make([]byte, 8)
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			if datagrams && !errors.Is(err, net.ErrClosed) {
				continue
			}
			return
		}
		n, now := binary.BigEndian.Uint64(buf), time.Now()
		d.mu.Lock()
		if n != d.got && d.trouble == nil {
			d.trouble = fmt.Errorf("number %d came after %d others", n, d.got)
		}
		if !d.last.IsZero() {
			d.pause = max(d.pause, now.Sub(d.last))
		}
		d.got, d.last = d.got+1, now
		d.mu.Unlock()
	}
}

func (d *direction) speak(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.speaks = on
}

func (d *direction) heard() (got, sent uint64, last time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.got, d.sent, d.last
}

// whole says whether everything that was sent has arrived, once and in order.
func (d *direction) whole() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.trouble != nil {
		return d.trouble
	}
	if d.got != d.sent {
		return fmt.Errorf("%d of %d numbers have arrived", d.got, d.sent)
	}
	return nil
}

func (d *direction) longest() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.pause
}

// lastHeard is when something last arrived at either end.
func (f *flow) lastHeard() time.Time {
	_, _, a := f.toServer.heard()
	_, _, b := f.toBack.heard()
	if a.After(b) {
		return a
	}
	return b
}

// established lets both ends of flows speak until both have been heard, and then fall silent with nothing on the way.
func established(t *testing.T, flows []*spoken) {
	t.Helper()
	sides := []func(*flow) *direction{func(f *flow) *direction { return &f.toServer }, func(f *flow) *direction { return &f.toBack }}
	for _, side := range sides { // the client first: a flow is his
		for _, f := range flows {
			side(f.flow).speak(true)
		}
		for _, f := range flows {
			nettest.Eventually(t, 10*time.Second, "something over the flow "+f.name, func() error {
				if got, _, _ := side(f.flow).heard(); got == 0 {
					return errors.New("nothing has arrived")
				}
				return nil
			})
			side(f.flow).speak(false)
		}
		for _, f := range flows {
			nettest.Eventually(t, 10*time.Second, "everything over the flow "+f.name, side(f.flow).whole)
		}
	}
}

// openFlow connects from a namespace to an address that leads, translated or not, to a server's own address. port is the
// client's with UDP, one that no flow had before: the kernel keeps those for minutes, and where two ways lead to one server it
// gives a port that both have another number.
func openFlow(t *testing.T, name, proto string, port int, from, server *nettest.NS, to, at netip.AddrPort) *flow {
	t.Helper()
	f := &flow{name: name, datagrams: proto == "udp"}
	var err error
	if f.datagrams {
		err = f.openUDP(port, from, server, to, at)
	} else {
		err = f.openTCP(from, server, to, at)
	}
	if err != nil {
		t.Fatalf("open the flow %s: %v", name, err)
	}
	f.carry(t)
	return f
}

func (f *flow) openTCP(from, server *nettest.NS, to, at netip.AddrPort) error {
	var l net.Listener
	var err error
	if enter := nettest.Enter(server, func() { l, err = net.Listen("tcp", at.String()) }); enter != nil || err != nil {
		return errors.Join(enter, err)
	}
	defer l.Close()
	dialer := net.Dialer{Timeout: yesWait}
	enter := nettest.Enter(from, func() { f.client, err = dialer.DialContext(context.Background(), "tcp", to.String()) })
	if enter != nil || err != nil {
		return errors.Join(enter, err)
	}
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(yesWait)); err != nil {
		return err
	}
	f.server, err = l.Accept()
	return err
}

// openUDP makes two connected sockets. Many of a server's share its port, and each gets its own client's packets.
func (f *flow) openUDP(port int, from, server *nettest.NS, to, at netip.AddrPort) error {
	shared := func(_, _ string, c syscall.RawConn) (err error) {
		if ctl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); ctl != nil {
			return ctl
		}
		return err
	}
	var err error
	enter := nettest.Enter(from, func() {
		f.client, err = (&net.Dialer{LocalAddr: &net.UDPAddr{Port: port}}).DialContext(context.Background(), "udp", to.String())
	})
	if enter != nil || err != nil {
		return errors.Join(enter, err)
	}
	dialer := net.Dialer{Control: shared, LocalAddr: net.UDPAddrFromAddrPort(at)}
	enter = nettest.Enter(server, func() {
		f.server, err = dialer.DialContext(context.Background(), "udp", f.client.LocalAddr().String())
	})
	return errors.Join(enter, err)
}
