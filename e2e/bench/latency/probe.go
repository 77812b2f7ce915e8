package latency

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	interval = 200 * time.Microsecond // between two tries
	before   = 50                     // tries that must all show the state before the change
	settled  = before - 5             // of them: the last may have their answers still under way
	quiet    = 100                    // tries without an answer, one after the other, after which none is expected any more
	late     = 5 * time.Millisecond   // how long an answer may be on its way, once the change seems to have shown
	seeLimit = 10 * time.Second       // for a change to show

	priority = 1    // among SCHED_FIFO's, for the thread that tries; it takes a twentieth of a processor
	slack    = 1000 // ns that the kernel may wake it late

	socketFD  = 3
	port      = 7 // at which nobody listens
	firstPort = 1024
	sources   = 64000 // source ports, of which each try takes the next; conntrack has forgotten one when its turn comes again
)

// probe is what a prober does: it answers requests, one after the other.
func probe(requests io.Reader, replies io.Writer) error {
	in, out := json.NewDecoder(requests), json.NewEncoder(replies)
	var next uint32
	for {
		var r request
		if err := in.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		w := &watch{request: r, first: next, ready: func() error { return out.Encode(reply{Ready: true}) }}
		err := w.run()
		next += uint32(len(w.sent))
		last := w.result()
		if err != nil {
			last = reply{Error: fmt.Sprintf("watch %s from %s: %v", r.To, r.From, err)}
		}
		if err := out.Encode(last); err != nil {
			return err
		}
	}
}

// onTime makes the calling thread wake when it should, whatever else runs.
func onTime() error {
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, slack, 0, 0, 0); err != nil {
		return fmt.Errorf("set the timer slack: %w", err)
	}
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: priority}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		return fmt.Errorf("make the thread one of real time: %w", err)
	}
	return nil
}

// watch is a row of tries around a change.
type watch struct {
	request
	first    uint32 // the number of the first try
	ready    func() error
	sent     []int64 // when each try was begun: ns of CLOCK_MONOTONIC
	answered []bool
}

// run tries until the change has shown. That it has not been made yet is seen to first. The loop enters the kernel only behind
// the Go runtime's back (RawSyscall), so that the thread keeps its turn.
func (w *watch) run() error {
	if err := onTime(); err != nil {
		return err
	}
	most := int(w.Limit/interval) + before
	w.sent, w.answered = make([]int64, 0, most), make([]bool, 0, most)
	next, end := monotonic(), monotonic()+w.Limit.Nanoseconds()
	for ; ; next += interval.Nanoseconds() {
		now := monotonic()
		if now > end || len(w.sent) == most {
			return fmt.Errorf("no connection shows the change within %s", w.Limit)
		}
		if now < next {
			sleep(next - now)
		} else {
			next = now // late: tries are not made up for
		}
		if err := w.try(); err != nil {
			return err
		}
		switch n := len(w.sent); {
		case n == before:
			if err := w.checkBefore(); err != nil {
				return err
			}
			if err := w.ready(); err != nil {
				return err
			}
		case n > before && w.shown():
			sleep(late.Nanoseconds())
			if err := w.hear(); err != nil || w.shown() {
				return err
			}
		}
	}
}

// checkBefore sees that the tries so far show the state before the change.
func (w *watch) checkBefore() error {
	for i, answered := range w.answered[:settled] {
		if answered == w.Open {
			return fmt.Errorf("before the change, try %d of %d is answered: %t, want %t", i+1, before, answered, !w.Open)
		}
	}
	return nil
}

// shown says that the change has shown: by an answer, or by none for long.
func (w *watch) shown() bool {
	if w.Open {
		return w.since() < len(w.answered)
	}
	return len(w.answered)-w.since() >= quiet
}

// since is the number of the try that shows the change: the first that is answered, or the first behind the last answer.
func (w *watch) since() int {
	n := len(w.answered)
	if !w.Open {
		for n > 0 && !w.answered[n-1] {
			n--
		}
		return n
	}
	for i := max(before, n-quiet); i < n; i++ {
		if w.answered[i] {
			return i
		}
	}
	return n
}

// result is computed when everything has been heard.
func (w *watch) result() reply {
	i := w.since()
	if i == 0 || i == len(w.sent) {
		return reply{Error: "nothing was seen"}
	}
	r := reply{At: w.sent[i]}
	for k := 1; k <= i; k++ {
		r.Gap = max(r.Gap, time.Duration(w.sent[k]-w.sent[k-1]))
	}
	return r
}

// try sends a SYN and hears what has come back so far: the answer to this one, most often, for on one machine the whole way there
// and back is part of sending.
func (w *watch) try() error {
	number := w.first + uint32(len(w.sent))
	w.sent, w.answered = append(w.sent, monotonic()), append(w.answered, false)
	packet := syn(w.From, w.To, firstPort+uint16(number%sources), number)
	if _, err := raw(unix.SYS_WRITE, packet); err != 0 && err != unix.EPERM { // EPERM: a drop on the pod's own way out
		return fmt.Errorf("try to connect: %w", err)
	}
	return w.hear()
}

func (w *watch) hear() error {
	var buffer [128]byte
	for {
		n, err := raw(unix.SYS_READ, buffer[:])
		switch {
		case err == unix.EAGAIN:
			return nil
		case err != 0 && err != unix.EINTR:
			return fmt.Errorf("hear answers: %w", err)
		}
		if number, ok := answer(buffer[:n]); ok && number-w.first < uint32(len(w.answered)) {
			w.answered[number-w.first] = true
		}
	}
}

// raw reads or writes the socket.
func raw(call uintptr, b []byte) (int, unix.Errno) {
	n, _, err := unix.RawSyscall(call, socketFD, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if err != 0 {
		return 0, err
	}
	return int(n), 0
}

// sleep sleeps for some ns. That a signal ends it early does no harm.
func sleep(ns int64) {
	t := unix.NsecToTimespec(ns)
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&t)), 0, 0)
}

const (
	flagSYN = 1 << 1
	flagRST = 1 << 2
	flagACK = 1 << 4
)

// syn is a TCP header that asks for a connection; the kernel puts the IP header before it.
func syn(from, to netip.Addr, source uint16, number uint32) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h[0:], source)
	binary.BigEndian.PutUint16(h[2:], port)
	binary.BigEndian.PutUint32(h[4:], number)
	h[12] = 5 << 4 // words of the header
	h[13] = flagSYN
	binary.BigEndian.PutUint16(h[14:], 65535) // window
	binary.BigEndian.PutUint16(h[16:], checksum(from, to, h))
	return h
}

// checksum of a TCP segment whose own checksum is zero: RFC 9293, 3.1.
func checksum(from, to netip.Addr, segment []byte) uint16 {
	a, b := from.As4(), to.As4()
	pseudo := append(a[:], b[:]...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(segment)))
	var sum uint32
	for _, part := range [][]byte{pseudo, segment} {
		for ; len(part) > 1; part = part[2:] {
			sum += uint32(binary.BigEndian.Uint16(part))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// answer reads an IP packet: the number of the try that it answers, be it accepted or refused.
func answer(packet []byte) (number uint32, ok bool) {
	if len(packet) < 40 {
		return 0, false
	}
	tcp := packet[min(len(packet), int(packet[0]&15)*4):]
	if len(tcp) < 20 || binary.BigEndian.Uint16(tcp[0:]) != port {
		return 0, false
	}
	if flags := tcp[13]; flags&flagACK == 0 || flags&(flagRST|flagSYN) == 0 {
		return 0, false
	}
	return binary.BigEndian.Uint32(tcp[8:]) - 1, true
}
