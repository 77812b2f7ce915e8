package suite

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Tally is what became of the attempts at one address and port.
type Tally struct {
	Tried     int
	Connected int
	Refused   int       // by the pod: the packet and its answer passed, though nobody listened
	First     time.Time // of those that passed, connected or refused
	Last      time.Time
	Gap       time.Duration // the longest time between two attempts that passed
}

// Passed is how many attempts got an answer from the pod.
func (t Tally) Passed() int { return t.Connected + t.Refused }

func (t Tally) String() string {
	return fmt.Sprintf("%d tried, %d connected, %d refused", t.Tried, t.Connected, t.Refused)
}

// Prober tries to open TCP connections again and again, from one network namespace to any number of places. An attempt is one
// SYN: it is given up before the kernel sends a second one, and a new one is made at each step whatever became of those before.
type Prober struct {
	every, wait time.Duration
	mu          sync.Mutex
	tallies     map[netip.AddrPort]*Tally
	active      map[netip.AddrPort]bool
	stop        chan struct{}
	done        chan error
}

// attempt is a connection that is being opened.
type attempt struct {
	to    netip.AddrPort
	until time.Time
}

// Probe starts to connect from a pod's network namespace to places, at each of them once every so often.
func (t *T) Probe(pod *Pod, every time.Duration, places ...netip.AddrPort) *Prober {
	handle, err := t.namespaceOf(pod)
	if err != nil {
		t.Fatalf("probe from %s: %v", pod, err)
	}
	return t.probe(handle, every, places...)
}

// probe closes the handle in the end.
func (t *T) probe(handle netns.NsHandle, every time.Duration, places ...netip.AddrPort) *Prober {
	p := &Prober{every: every, wait: 500 * time.Millisecond, tallies: map[netip.AddrPort]*Tally{}, active: map[netip.AddrPort]bool{},
		stop: make(chan struct{}), done: make(chan error, 1)}
	for _, place := range places {
		p.Add(place)
	}
	go func() {
		defer handle.Close()
		p.done <- cluster.InNamespace(handle, p.loop)
	}()
	t.Cleanup(func(context.Context) {
		if err := p.end(); err != nil { // it tried nothing after that, whatever its tallies say
			t.Errorf("probe: %v", err)
		}
	})
	return p
}

// Add begins to try a place.
func (p *Prober) Add(place netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active[place] = true
	if p.tallies[place] == nil {
		p.tallies[place] = &Tally{}
	}
}

// Remove tries a place no longer; its tally stays.
func (p *Prober) Remove(place netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.active, place)
}

// Tallies are those of now.
func (p *Prober) Tallies() map[netip.AddrPort]Tally {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := map[netip.AddrPort]Tally{}
	for place, tally := range p.tallies {
		all[place] = *tally
	}
	return all
}

// Sum is that of all places, for those who probe one, or expect nothing of all of them.
func (p *Prober) Sum() Tally {
	var sum Tally
	for _, t := range p.Tallies() {
		sum.Tried += t.Tried
		sum.Connected += t.Connected
		sum.Refused += t.Refused
		if sum.First.IsZero() || !t.First.IsZero() && t.First.Before(sum.First) {
			sum.First = t.First
		}
		if t.Last.After(sum.Last) {
			sum.Last = t.Last
		}
		sum.Gap = max(sum.Gap, t.Gap)
	}
	return sum
}

// Stop ends the probing and returns the sum of what became of it.
func (p *Prober) Stop(t *T) Tally {
	if err := p.end(); err != nil {
		t.Fatalf("probe: %v", err)
	}
	return p.Sum()
}

func (p *Prober) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		return nil
	}
	close(p.stop)
	p.stop = nil
	p.mu.Unlock()
	err := <-p.done
	p.mu.Lock()
	return err
}

// loop runs in the namespace that it connects from.
func (p *Prober) loop() error {
	open := map[int]attempt{}
	defer func() {
		for fd := range open {
			unix.Close(fd)
		}
	}()
	stop := p.stopped()
	for next := time.Now(); ; next = next.Add(p.every) {
		if late := time.Since(next); late > 10*p.every {
			next = time.Now() // a busy machine: do not make up for what was missed
		}
		p.mu.Lock()
		places := slices.Collect(maps.Keys(p.active))
		p.mu.Unlock()
		for _, place := range places {
			if err := p.begin(place, open); err != nil {
				return err
			}
		}
		for first := true; first || time.Now().Before(next.Add(p.every)); first = false {
			select {
			case <-stop:
				return nil
			default:
			}
			if err := p.collect(open, time.Until(next.Add(p.every))); err != nil {
				return err
			}
		}
	}
}

func (p *Prober) stopped() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil { // ended before it began
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	return p.stop
}

// begin sends a SYN.
func (p *Prober) begin(place netip.AddrPort, open map[int]attempt) error {
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(place.Port()), Addr: as4(place.Addr())})
	if place.Addr().Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(place.Port()), Addr: place.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	// Closed with a reset: what was opened and closed often must not fill the tables of connections that are at their end.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	err = unix.Connect(fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		open[fd] = attempt{place, time.Now().Add(p.wait)}
		p.count(place, func(t *Tally) { t.Tried++ })
		return nil
	}
	unix.Close(fd)
	p.count(place, func(t *Tally) { t.Tried++ })
	p.result(place, err)
	return nil
}

func as4(a netip.Addr) (bytes [4]byte) {
	if a.Is4() {
		bytes = a.As4()
	}
	return bytes
}

// collect waits for answers, for a time at most, and gives up what is too old.
func (p *Prober) collect(open map[int]attempt, limit time.Duration) error {
	fds := make([]unix.PollFd, 0, len(open))
	now := time.Now()
	for fd, a := range open {
		if now.After(a.until) {
			unix.Close(fd)
			delete(open, fd)
			continue
		}
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT})
	}
	if _, err := unix.Poll(fds, int(max(limit, time.Millisecond)/time.Millisecond)); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for answers: %w", err)
	}
	for _, f := range fds {
		if f.Revents == 0 {
			continue
		}
		code, err := unix.GetsockoptInt(int(f.Fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		p.result(open[int(f.Fd)].to, err)
		unix.Close(int(f.Fd))
		delete(open, int(f.Fd))
	}
	return nil
}

// result counts an answer. Other errors than a refusal come from routers, or from this side.
func (p *Prober) result(place netip.AddrPort, err error) {
	if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		return
	}
	p.count(place, func(t *Tally) {
		if err == nil {
			t.Connected++
		} else {
			t.Refused++
		}
		now := time.Now()
		if t.First.IsZero() {
			t.First = now
		} else {
			t.Gap = max(t.Gap, now.Sub(t.Last))
		}
		t.Last = now
	})
}

func (p *Prober) count(place netip.AddrPort, change func(*Tally)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p.tallies[place])
}

// namespaceOf finds a pod's network namespace: the one on its node with its address.
func (t *T) namespaceOf(pod *Pod) (netns.NsHandle, error) {
	node, err := t.Cluster.Node(pod.Node)
	if err != nil {
		return netns.None(), err
	}
	folder, err := node.Path("/run/netns")
	if err != nil {
		return netns.None(), err
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return netns.None(), fmt.Errorf("list the network namespaces of %s: %w", node.Name, err)
	}
	for _, e := range entries {
		handle, err := netns.GetFromPath(filepath.Join(folder, e.Name()))
		if err != nil {
			continue // it may have gone
		}
		if holds(handle, pod.Addresses[0]) {
			return handle, nil
		}
		handle.Close()
	}
	return netns.None(), fmt.Errorf("no network namespace on %s has the address %v", node.Name, pod.Addresses[0])
}

func holds(handle netns.NsHandle, address netip.Addr) bool {
	links, err := netlink.NewHandleAt(handle)
	if err != nil {
		return false
	}
	defer links.Close()
	addresses, err := links.AddrList(nil, netlink.FAMILY_ALL)
	return err == nil && slices.ContainsFunc(addresses, func(a netlink.Addr) bool {
		found, _ := netip.AddrFromSlice(a.IP)
		return found.Unmap() == address
	})
}

// places are an address's ports, each in every family of a pod.
func places(pod *Pod, port uint16) []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range pod.Addresses {
		all = append(all, netip.AddrPortFrom(a, port))
	}
	return all
}

// listed are tallies of some passing, for a message.
func listed(tallies map[netip.AddrPort]Tally) string {
	var all []string
	for place, tally := range tallies {
		if tally.Passed() > 0 {
			all = append(all, fmt.Sprintf("%s: %s", place, tally))
		}
	}
	slices.Sort(all)
	return strings.Join(all, "; ")
}
