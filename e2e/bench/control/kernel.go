package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nfnetlink"
)

// pauses between two questions to the kernel.
const (
	setPause   = 20 * time.Microsecond
	tablePause = 50 * time.Microsecond
)

// asker runs fn in a thread whose pauses are as short as they are meant: the kernel makes them 50 µs longer otherwise
// (PR_SET_TIMERSLACK in prctl(2)).
func asker(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}

func pause(d time.Duration) {
	t := unix.NsecToTimespec(d.Nanoseconds())
	_ = unix.Nanosleep(&t, nil) // a signal makes it shorter
}

// sets asks the kernel whether addresses are in sets.
type sets struct{ socket *nfnetlink.Socket }

func (s sets) has(name string, a netip.Addr) (bool, error) {
	b := s.socket.Begin(unix.NFNL_SUBSYS_IPSET, nl.IPSET_CMD_TEST, 0, unix.AF_UNSPEC, nl.NFNETLINK_V0)
	b = nfnetlink.Attribute(b, nl.IPSET_ATTR_PROTOCOL, nl.IPSET_PROTOCOL)
	b = nfnetlink.Text(b, nl.IPSET_ATTR_SETNAME, name)
	b = nfnetlink.Nested(b, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
		return nfnetlink.Nested(b, nl.IPSET_ATTR_IP, func(b []byte) []byte {
			return nfnetlink.Attribute(b, nl.IPSET_ATTR_IPADDR_IPV4|unix.NLA_F_NET_BYTEORDER, a.AsSlice()...)
		})
	})
	err := s.socket.Ask(b, nil)
	if errors.Is(err, unix.Errno(nl.IPSET_ERR_EXIST)) {
		return false, nil
	}
	return err == nil, err
}

// until asks until the address is in the set, and returns when it was seen there.
func (s sets) until(ctx context.Context, name string, a netip.Addr) (at time.Time, err error) {
	err = asker(func() error {
		for ctx.Err() == nil {
			in, err := s.has(name, a)
			if in || err != nil {
				at = time.Now()
				return err
			}
			pause(setPause)
		}
		return fmt.Errorf("wait for %s in set %s: %w", a, name, ctx.Err())
	})
	return at, err
}

// tables asks which version the kernel's rules are of.
type tables struct {
	backend string
	socket  *nfnetlink.Socket // nft
	raw     [2]int            // legacy: sockets of both families
}

func openTables(backend string) (*tables, error) {
	t := &tables{backend: backend}
	var err error
	if backend == "nft" {
		t.socket, err = nfnetlink.Open()
		return t, err
	}
	for i, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		if t.raw[i], err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return nil, fmt.Errorf("open a raw socket: %w", err)
		}
	}
	return t, nil
}

// version changes with each commit: nft's generation, which the kernel counts; of legacy, the number of entries in table mangle
// and their size, in either family.
func (t *tables) version() (v [2]uint64, err error) {
	if t.backend == "nft" {
		const genID = 1 // NFTA_GEN_ID
		request := t.socket.Begin(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC, 0)
		err = t.socket.Ask(request, func(attributes []byte) {
			if len(attributes) >= 8 && binary.NativeEndian.Uint16(attributes[2:]) == genID {
				v[0] = uint64(binary.BigEndian.Uint32(attributes[4:]))
			}
		})
		return v, err
	}
	const info, entries, size = 64, 76, 80 // IPT_SO_GET_INFO, and offsets in struct ipt_getinfo
	for i, level := range []int{unix.IPPROTO_IP, unix.IPPROTO_IPV6} {
		var b [84]byte
		copy(b[:], "mangle")
		length := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(t.raw[i]), uintptr(level), info,
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&length)), 0)
		if errno != 0 {
			return v, fmt.Errorf("ask for the figures of table mangle: %w", errno)
		}
		v[i] = uint64(binary.NativeEndian.Uint32(b[entries:]))<<32 | uint64(binary.NativeEndian.Uint32(b[size:]))
	}
	return v, nil
}

func (t *tables) close() {
	if t.socket != nil {
		t.socket.Close()
		return
	}
	unix.Close(t.raw[0])
	unix.Close(t.raw[1])
}

// commits notes when the kernel's rules change, until they are told to stop.
type commits struct {
	mu    sync.Mutex
	times []time.Time
	stop  chan struct{}
	ended chan error
}

// watch begins to note.
func (t *tables) watch() (*commits, error) {
	last, err := t.version()
	if err != nil {
		return nil, err
	}
	c := &commits{stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() { c.ended <- asker(func() error { return c.note(t, last) }) }()
	return c, nil
}

func (c *commits) note(t *tables, last [2]uint64) error {
	for {
		select {
		case <-c.stop:
			return nil
		default:
		}
		now, err := t.version()
		if err != nil {
			return err
		}
		if now != last {
			c.mu.Lock()
			c.times = append(c.times, time.Now())
			c.mu.Unlock()
			last = now
		}
		pause(tablePause)
	}
}

func (c *commits) seen() []time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.times)
}

// end stops noting and returns what was noted.
func (c *commits) end() ([]time.Time, error) {
	close(c.stop)
	err := <-c.ended
	return c.times, err
}

// silence is how long after a commit no other must have come for it to be the last of a change.
const silence = 150 * time.Millisecond

// settle waits until there were as many commits, and then silence.
func (c *commits) settle(ctx context.Context, least int) error {
	for {
		times := c.seen()
		if n := len(times); n >= least && time.Since(times[n-1]) > silence {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %d commits of iptables: %d came: %w", least, len(times), ctx.Err())
		case err := <-c.ended:
			return errors.Join(errors.New("the kernel does not tell of commits any more"), err)
		case <-time.After(silence / 10):
		}
	}
}
