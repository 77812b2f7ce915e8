package latency

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/world"
)

// proberEnv tells a process that it is a prober.
const proberEnv = "POSTERN_BENCH_PROBER"

// Prober says whether this process is one, and if so, is it until its standard input ends. What calls this first in main, or in
// TestMain, can start one.
func Prober() (ended bool, err error) {
	if os.Getenv(proberEnv) == "" {
		return false, nil
	}
	return true, probe(os.Stdin, os.Stdout)
}

// prober tries to connect from one pod to another. It is a process of its own, for it must be on time, and a thread of a larger
// Go program is not: every 10 ms the runtime may give another goroutine its turn, and then it waits for one of the others'
// threads.
type prober struct {
	from, to netip.Addr
	cmd      *exec.Cmd
	requests io.WriteCloser
	out      *json.Decoder
	errors   bytes.Buffer // what it says when it breaks; read once it has ended
}

// request asks for one watch; answers are a reply when the change may be made, and another one when it has shown.
type request struct {
	From, To netip.Addr
	Open     bool
	Limit    time.Duration
}

type reply struct {
	Ready bool
	At    int64 // when the try that showed it was begun: ns of CLOCK_MONOTONIC
	Gap   time.Duration
	Error string
}

// newProber starts one, whose socket is opened in the network namespace at path, and stays there.
func newProber(path string, from, to netip.Addr) (*prober, error) {
	fd := -1
	err := world.In(path, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()}) // it hears nobody else
	})
	if err != nil {
		return nil, fmt.Errorf("open a raw socket from %s to %s: %w", from, to, err)
	}
	socket := os.NewFile(uintptr(fd), "prober")
	defer socket.Close()
	p := &prober{from: from, to: to, cmd: exec.Command("/proc/self/exe")}
	p.cmd.Env = append(os.Environ(), proberEnv+"=1", "GOMAXPROCS=1", "GOGC=off")
	p.cmd.ExtraFiles, p.cmd.Stderr = []*os.File{socket}, &p.errors
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	requests, err1 := p.cmd.StdinPipe()
	out, err2 := p.cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	p.requests, p.out = requests, json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a prober: %w", err)
	}
	return p, nil
}

// close ends it.
func (p *prober) close() error {
	if err := errors.Join(p.requests.Close(), p.cmd.Wait()); err != nil {
		return fmt.Errorf("the prober from %s to %s: %w: %s", p.from, p.to, err, p.errors.String())
	}
	return nil
}

// Seen is when a change showed.
type Seen struct {
	After time.Duration // from before the change until the try that showed it was begun
	Gap   time.Duration // the longest time between two tries meanwhile: the change may have been there earlier by that
	Call  time.Duration // how long the change itself took
}

// see makes a change and says when tries begin to be answered, if open, or not to be.
func (p *prober) see(ctx context.Context, open bool, change func(context.Context) error) (Seen, error) {
	if err := json.NewEncoder(p.requests).Encode(request{From: p.from, To: p.to, Open: open, Limit: seeLimit}); err != nil {
		return Seen{}, err
	}
	if _, err := p.hear(); err != nil {
		return Seen{}, err
	}
	start := monotonic()
	changed, call := change(ctx), monotonic()-start
	seen, err := p.hear()
	if err := errors.Join(changed, err); err != nil {
		return Seen{}, err
	}
	return Seen{After: time.Duration(seen.At - start), Gap: seen.Gap, Call: time.Duration(call)}, nil
}

func (p *prober) hear() (reply, error) {
	var r reply
	if err := p.out.Decode(&r); err != nil {
		return r, fmt.Errorf("hear the prober from %s to %s: %w", p.from, p.to, err)
	}
	if r.Error != "" {
		return r, errors.New(r.Error)
	}
	return r, nil
}

// monotonic is a time that processes share.
func monotonic() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // clock_gettime(2): only of a clock that there is not
	}
	return t.Nano()
}
