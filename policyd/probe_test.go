package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
)

// A probe opens a connection every few milliseconds and sees which of them come about. One attempt sends one SYN that counts:
// the kernel repeats a lost one after a second, which tells that the first was lost.
type probe struct {
	name    string
	from    *nettest.NS
	to      netip.AddrPort
	allowed bool

	mu       sync.Mutex
	tried    int
	opened   int
	slowest  time.Duration // from the SYN to the server's greeting
	passed   []time.Time   // beginnings of attempts that came about
	lost     []time.Time   // beginnings of attempts whose first SYN was lost
	trouble  error         // of the test's own
	lastGood time.Time
}

const (
	probePause = 6 * time.Millisecond
	// A SYN is repeated after a second (RFC 6298, 2.1): who has no answer by now has lost the first.
	probePatience = 1500 * time.Millisecond
	// A denied attempt ends before its SYN is repeated, so that each counts once.
	deniedPatience = 900 * time.Millisecond
)

// attempt is one connection on its way.
type attempt struct {
	fd        int
	start     time.Time
	connected bool
}

// probing runs probes until stop is called.
func probing(t *testing.T, probes []*probe) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, p := range probes {
		wg.Go(func() {
			if err := nettest.Enter(p.from, func() { p.run(ctx) }); err != nil {
				p.fail(err)
			}
		})
	}
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

func (p *probe) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trouble == nil {
		p.trouble = err
	}
}

// run probes until the context ends, then sees the attempts that are on their way to their end.
func (p *probe) run(ctx context.Context) {
	var open []attempt
	next := time.Now()
	for ctx.Err() == nil || len(open) > 0 {
		if now := time.Now(); ctx.Err() == nil && !now.Before(next) {
			next = now.Add(probePause)
			if a, ok := p.begin(); ok {
				open = append(open, a)
			}
		}
		open = p.look(open, max(time.Until(next), time.Millisecond))
	}
}

// begin sends a SYN.
func (p *probe) begin() (attempt, bool) {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(p.to.Port()), Addr: p.to.Addr().As16()})
	if p.to.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(p.to.Port()), Addr: p.to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		p.fail(os.NewSyscallError("socket", err))
		return attempt{}, false
	}
	// The end is a reset: no socket waits in the kernel, and no flow is kept for minutes.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	a := attempt{fd: fd, start: time.Now()}
	p.count(func() { p.tried++ })
	switch err := unix.Connect(fd, to); err {
	case nil, unix.EINPROGRESS:
		return a, true
	default: // unreachable at once: somebody took a route away
		p.end(a, true)
		return a, false
	}
}

// look waits a little for something to happen to the attempts, and returns those that are still on their way.
func (p *probe) look(open []attempt, wait time.Duration) []attempt {
	fds := make([]unix.PollFd, len(open))
	for i, a := range open {
		fds[i] = unix.PollFd{Fd: int32(a.fd), Events: unix.POLLOUT}
		if a.connected {
			fds[i].Events = unix.POLLIN
		}
	}
	looked := time.Now()
	if _, err := unix.Poll(fds, int(wait.Milliseconds())); err != nil && err != unix.EINTR {
		p.fail(os.NewSyscallError("poll", err))
	}
	var still []attempt
	for i, a := range open {
		if p.goesOn(&a, fds[i].Revents != 0, looked) {
			still = append(still, a)
		}
	}
	return still
}

// goesOn reports whether an attempt is still on its way, and counts one that has ended.
func (p *probe) goesOn(a *attempt, happened bool, now time.Time) bool {
	patience := probePatience
	if !p.allowed {
		patience = deniedPatience
	}
	switch {
	case !happened && now.Sub(a.start) < patience:
		return true
	case !happened:
		p.end(*a, true)
		return false
	case a.connected: // the greeting, or a reset
		n, err := unix.Read(a.fd, make([]byte, 64))
		p.end(*a, n <= 0 || err != nil)
		return false
	}
	problem, err := unix.GetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch failed := unix.Errno(problem); {
	case err != nil:
		p.fail(os.NewSyscallError("getsockopt", err))
	case failed == unix.EHOSTUNREACH || failed == unix.ENETUNREACH:
		p.end(*a, true)
		return false
	case failed == 0 && p.allowed:
		a.connected = true
		return true
	}
	// A connection or a refusal: the packet has arrived, of an allowed one at somebody else.
	p.end(*a, p.allowed)
	return false
}

// end counts and closes an attempt.
func (p *probe) end(a attempt, unanswered bool) {
	repeated := false
	if info, err := unix.GetsockoptTCPInfo(a.fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		repeated = info.Total_retrans > 0
	}
	p.count(func() {
		took := time.Since(a.start)
		if unanswered || repeated {
			p.lost = append(p.lost, a.start)
		}
		if unanswered {
			return
		}
		p.opened++
		p.slowest = max(p.slowest, took)
		p.lastGood = time.Now()
		if !p.allowed {
			p.passed = append(p.passed, a.start)
		}
	})
	unix.Close(a.fd)
}

func (p *probe) count(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
}

// since returns the beginnings of denied attempts that passed, and of allowed ones that were lost, from a time on.
func (p *probe) since(from time.Time) (passed, lost []time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	after := func(list []time.Time) []time.Time {
		list = slices.DeleteFunc(slices.Clone(list), func(t time.Time) bool { return t.Before(from) })
		slices.SortFunc(list, time.Time.Compare)
		return list
	}
	if p.allowed {
		return nil, after(p.lost)
	}
	return after(p.passed), nil
}

// noGap says what went wrong, and logs what was tried.
func noGap(t *testing.T, probes []*probe) {
	t.Helper()
	var allowed, denied int
	for _, p := range probes {
		p.mu.Lock()
		if p.trouble != nil {
			t.Errorf("%s: %v", p.name, p.trouble)
		}
		if p.allowed {
			allowed += p.tried
		} else {
			denied += p.tried
		}
		if p.allowed && (len(p.lost) > 0 || p.opened == 0) {
			t.Errorf("%s: %d of %d allowed connections lost a packet or did not come about: %s", p.name, len(p.lost), p.tried, times(p.lost))
		}
		if !p.allowed && len(p.passed) > 0 {
			t.Errorf("%s: %d of %d denied connections passed: %s", p.name, len(p.passed), p.tried, times(p.passed))
		}
		t.Logf("%-40s tried %5d, opened %5d, slowest %v", p.name, p.tried, p.opened, p.slowest.Round(time.Millisecond))
		p.mu.Unlock()
	}
	t.Logf("tried %d denied and %d allowed connections", denied, allowed)
}

func times(list []time.Time) string {
	var out []string
	for _, t := range list[:min(len(list), 5)] {
		out = append(out, t.UTC().Format("15:04:05.000"))
	}
	if len(list) > 5 {
		out = append(out, "…", list[len(list)-1].UTC().Format("15:04:05.000"))
	}
	return strings.Join(out, " ")
}

// A counter reads how many SYNs for a port have arrived in a namespace, whether or not their sender saw an answer.
type counter struct {
	ns   *nettest.NS
	port uint16
}

func (c counter) start(t *testing.T) {
	t.Helper()
	for _, tables := range []string{"iptables-nft", "ip6tables-nft"} {
		c.ns.Run(t, tables, "-t", "raw", "-I", "PREROUTING", "-p", "tcp", "--syn", "--dport", fmt.Sprint(c.port))
	}
}

func (c counter) read(t *testing.T) (n uint64) {
	t.Helper()
	for _, tables := range []string{"iptables-nft", "ip6tables-nft"} {
		for line := range strings.Lines(c.ns.Run(t, tables, "-t", "raw", "-nvxL", "PREROUTING")) {
			var packets uint64
			if _, err := fmt.Sscan(line, &packets); err == nil && strings.Contains(line, fmt.Sprintf("dpt:%d ", c.port)) {
				n += packets
			}
		}
	}
	return n
}
