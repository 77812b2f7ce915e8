package packets

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/world"
)

// Kinds of load, which are parts of rows too.
const (
	connections = "connections"
	large       = "large packets"
	small       = "small packets"
)

const (
	smallPacket = 64       // bytes of data
	chunk       = 64 << 10 // bytes of a write
	burst       = 1 << 20  // bytes that are under way at a time
	priority    = -20      // nice, of the thread that measures
)

// load is what is done in one turn.
type load struct{ connections, bursts, packets int }

var fullLoad = load{connections: 1000, bursts: 64, packets: 10000}

// warm is what comes before it, unmeasured, for the caches.
func (l load) warm() load {
	const part = 10
	return load{max(1, l.connections/part), max(1, l.bursts/part), max(1, l.packets/part)}
}

// measure does a load of a kind between a pair of pods, and returns its rate.
func (s *side) measure(kind string, p pair, l load) (rate float64, err error) {
	if err := s.node.In(forgetFlows); err != nil {
		return 0, err
	}
	err = world.In(p.client.netns, func() error { // on a thread that ends with this, for the client opens sockets there
		if err := alone(); err != nil {
			return err
		}
		var once func(l load) (amount float64, err error)
		var done func()
		switch kind {
		case connections:
			once, done, err = p.connect()
		case large:
			once, done, err = p.stream()
		case small:
			once, done, err = p.datagrams()
		}
		if err != nil {
			return err
		}
		defer done()
		if _, err := once(l.warm()); err != nil {
			return err
		}
		begin := time.Now()
		amount, err := once(l)
		rate = amount / time.Since(begin).Seconds()
		return err
	})
	return rate, err
}

// alone keeps the thread on the last processor, before others.
func alone() error {
	var set unix.CPUSet
	set.Set(runtime.NumCPU() - 1)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("keep to processor %d: %w", runtime.NumCPU()-1, err)
	}
	return unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), priority)
}

// forgetFlows empties the flow table of the network namespace.
func forgetFlows() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("empty the flow table: %w", err)
	}
	return nil
}

// serve opens the server's socket.
func (p pair) serve(kind int) (fd int, err error) {
	err = world.In(p.server.netns, func() (err error) {
		if fd, err = socket(kind); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		if err := unix.Bind(fd, address(p.server.addr)); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		if kind == unix.SOCK_STREAM {
			err = unix.Listen(fd, 1)
		}
		return err
	})
	return fd, err
}

func socket(kind int) (int, error) { return unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0) }

func address(a netip.Addr) *unix.SockaddrInet4 { return &unix.SockaddrInet4{Addr: a.As4(), Port: port} }

// connect opens connections, one after the other, and aborts each, so that no end lingers (TIME_WAIT).
func (p pair) connect() (once func(load) (float64, error), done func(), err error) {
	listener, err := p.serve(unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, err
	}
	to := address(p.server.addr)
	one := func() error {
		client, server, err := dial(listener, to)
		if err != nil {
			return err
		}
		abort := unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		return errors.Join(abort, unix.Close(client), unix.Close(server))
	}
	return func(l load) (float64, error) {
		for range l.connections {
			if err := one(); err != nil {
				return 0, err
			}
		}
		return float64(l.connections), nil
	}, func() { unix.Close(listener) }, nil
}

// dial returns both ends of a new connection.
func dial(listener int, to unix.Sockaddr) (client, server int, err error) {
	if client, err = socket(unix.SOCK_STREAM); err != nil {
		return 0, 0, err
	}
	if err := unix.Connect(client, to); err != nil {
		return 0, 0, errors.Join(fmt.Errorf("connect: %w", err), unix.Close(client))
	}
	if server, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC); err != nil {
		return 0, 0, errors.Join(fmt.Errorf("accept: %w", err), unix.Close(client))
	}
	return client, server, nil
}

// stream writes into a connection until it takes no more or a burst is written, reads that at the other end, and so on: the data
// stay in the processor's caches, and packets are as large as they get.
func (p pair) stream() (once func(load) (float64, error), done func(), err error) {
	listener, err := p.serve(unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(listener)
	client, server, err := dial(listener, address(p.server.addr))
	if err != nil {
		return nil, nil, err
	}
	data := make([]byte, chunk)
	once = func(l load) (float64, error) {
		for range l.bursts {
			for written, read := 0, 0; read < burst; {
				for written < burst {
					n, err := unix.SendmsgN(client, data[:min(chunk, burst-written)], nil, nil, unix.MSG_DONTWAIT)
					if errors.Is(err, unix.EAGAIN) {
						break
					}
					if err != nil {
						return 0, fmt.Errorf("send: %w", err)
					}
					written += n
				}
				for read < written {
					n, err := unix.Read(server, data)
					if err != nil {
						return 0, fmt.Errorf("receive: %w", err)
					}
					read += n
				}
			}
		}
		return float64(l.bursts*burst) / 1e9, nil
	}
	return once, func() { unix.Close(client); unix.Close(server) }, nil
}

// datagrams sends small packets, and receives each before the next.
func (p pair) datagrams() (once func(load) (float64, error), done func(), err error) {
	server, err := p.serve(unix.SOCK_DGRAM)
	if err != nil {
		return nil, nil, err
	}
	client, err := socket(unix.SOCK_DGRAM)
	if err != nil {
		return nil, nil, errors.Join(err, unix.Close(server))
	}
	done = func() { unix.Close(client); unix.Close(server) }
	if err := unix.Connect(client, address(p.server.addr)); err != nil {
		done()
		return nil, nil, err
	}
	var out, in [smallPacket]byte
	if err := answer(client, server, in[:]); err != nil {
		done()
		return nil, nil, err
	}
	return func(l load) (float64, error) {
		for range l.packets {
			if _, err := unix.Write(client, out[:]); err != nil {
				return 0, fmt.Errorf("send: %w", err)
			}
			if _, err := unix.Read(server, in[:]); err != nil {
				return 0, fmt.Errorf("receive: %w", err)
			}
		}
		return float64(l.packets), nil
	}, done, nil
}

// answer sends a packet each way: then the flow is an established one for conntrack.
func answer(client, server int, buffer []byte) error {
	if _, err := unix.Write(client, buffer); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	_, from, err := unix.Recvfrom(server, buffer, 0)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	if err := unix.Sendto(server, buffer, 0, from); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	if _, err := unix.Read(client, buffer); err != nil {
		return fmt.Errorf("receive the answer: %w", err)
	}
	return nil
}
