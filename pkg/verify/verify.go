package verify

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postern-cni/postern/pkg/iptables"
)

// options are the command's flags.
type options struct {
	packets, kernelPackets, walks int
	seed                          uint64
	backends                      []iptables.Backend
	mutants                       bool
	walkHere                      bool
	// broken is a mutation to prove something else under: that the proof fails.
	broken *mutation
}

// judge asks a cluster's judges.
func (o options) judge(w *World, n uint64) *judges {
	return judge(w, o.broken, throw(o.seed, n, forMutants))
}

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1 // a difference, or something that does not work
	exitUsage  = 2
)

// Main is the command behind `make verify` and `make verify-mutants`; nettest has put it into scratch namespaces.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return exitUsage
	}
	if o.walkHere {
		if err := walkHere(o, stdout); err != nil {
			fmt.Fprintln(stderr, "verify:", err)
			return exitFailed
		}
		return exitOK
	}
	p := &printer{out: stdout, begin: time.Now()}
	run := verifyAll
	if o.mutants {
		run = verifyMutants
	}
	ok, err := run(o, p)
	if err != nil {
		fmt.Fprintln(stderr, "verify:", err)
	}
	if !ok || err != nil {
		return exitFailed
	}
	return exitOK
}

func parseFlags(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("verify", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.packets, "packets", 1000000, "`how many` packets to ask rules and words about")
	flags.IntVar(&o.kernelPackets, "kernel-packets", 4000, "`how many` packets to send through the kernel, for each backend")
	flags.IntVar(&o.walks, "walks", 50,
		"`how many` random walks of events through the engine, for each backend; by patches alone there are ten times as many")
	flags.Uint64Var(&o.seed, "seed", 1, "where chance begins: the same `number` makes the same worlds")
	flags.BoolVar(&o.mutants, "mutants", false, "break one line of the semantics at a time, and see that it is found")
	flags.BoolVar(&o.walkHere, "walk-here", false, "take the walks of one backend in this network namespace, and answer in JSON")
	broken := flags.String("break", "", "break the rules by a `mutation` that -mutants names: then the proof must fail")
	backend := flags.String("backend", "both", "iptables `backend` of the kernel's part: nft, legacy or both")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if *broken != "" {
		if o.broken = mutationNamed(*broken); o.broken == nil {
			err := fmt.Errorf("-break %q: no such mutation; -mutants lists them", *broken)
			fmt.Fprintln(stderr, err)
			return o, err
		}
	}
	switch *backend {
	case "both":
		o.backends = []iptables.Backend{iptables.NFT, iptables.Legacy}
	case "nft", "legacy":
		o.backends = []iptables.Backend{iptables.Backend(*backend)}
	default:
		err := fmt.Errorf("-backend %q: nft, legacy and both are known", *backend)
		fmt.Fprintln(stderr, err)
		return o, err
	}
	return o, nil
}

// printer writes lines from several goroutines, and of long work a line every few seconds.
type printer struct {
	sync.Mutex
	out   io.Writer
	begin time.Time
	last  time.Time
}

func (p *printer) line(format string, args ...any) {
	p.Lock()
	defer p.Unlock()
	fmt.Fprintf(p.out, "%s\n", strings.TrimRight(fmt.Sprintf(format, args...), "\n"))
}

func (p *printer) progress(format string, args ...any) {
	p.Lock()
	defer p.Unlock()
	if now := time.Now(); now.Sub(p.last) > 5*time.Second && now.Sub(p.begin) > 5*time.Second {
		p.last = now
		fmt.Fprintf(p.out, "%5.0f s  %s\n", now.Sub(p.begin).Seconds(), fmt.Sprintf(format, args...))
	}
}

// part is what one part of the proof has asked.
type part struct {
	packets, worlds int
	kinds           census
	found           string // a difference, as a file; empty for none
}

// From these numbers of packets on, every kind must have occurred.
const (
	enough       = 100000
	enoughKernel = 400
)

// inKernel are kinds that must come out both ways in the kernel.
var inKernel = []string{"IPv4", "IPv6", "tcp", "udp", "sctp", "icmp", "ipv6-icmp", "isolated", "peer: address of nobody"}

func verifyAll(o options, p *printer) (bool, error) {
	rules := checkRules(o, p)
	p.line("rules, model and words: %d packets in %d clusters (%.0f s)", rules.packets, rules.worlds, time.Since(p.begin).Seconds())
	rules.kinds.print(p.out)
	parts := []part{rules}
	kernel, err := checkKernels(o, p)
	if err != nil {
		return false, err
	}
	for i, k := range kernel {
		passed, dropped := k.kinds["IPv4"].passed+k.kinds["IPv6"].passed, k.kinds["IPv4"].dropped+k.kinds["IPv6"].dropped
		p.line("kernel, %s, and words: %d packets in %d clusters: %d let in, %d dropped, %d coming back (%.0f s)", o.backends[i],
			k.packets, k.worlds, passed, dropped, k.packets-passed-dropped, time.Since(p.begin).Seconds())
	}
	parts = append(parts, kernel...)
	walks, err := checkWalks(o, p)
	if err != nil {
		return false, err
	}
	packets, worlds, differences := 0, 0, 0
	for _, part := range parts {
		packets, worlds = packets+part.packets, max(worlds, part.worlds) // the kernel's worlds are the first of the others
		if part.found != "" {
			differences++
			p.line("\n%s", part.found)
		}
	}
	for _, w := range walks {
		if w.Found != "" {
			differences++
			p.line("\n%s", w.Found)
		}
	}
	if missing := lacking(o, rules, kernel); differences == 0 && len(missing) > 0 {
		return false, fmt.Errorf("these kinds of packets did not occur, so that agreement says nothing of them: %s",
			strings.Join(missing, "; "))
	}
	if o.walks > 0 {
		p.line("walked %v", sumOf(walks))
	}
	p.line("checked %d packets in %d clusters: %d divergences", packets, worlds, differences)
	return differences == 0, nil
}

const (
	packetsOfAWorld       = 40
	kernelPacketsOfAWorld = 20
)

// lacking lists the kinds that should have occurred among so many packets and did not.
func lacking(o options, rules part, kernel []part) (list []string) {
	if o.packets >= enough {
		list = rules.kinds.missing()
	}
	for i, k := range kernel {
		for _, kind := range inKernel {
			if n := k.kinds[kind]; o.kernelPackets >= enoughKernel && (n.passed == 0 || n.dropped == 0) {
				list = append(list, fmt.Sprintf("kernel, %s: %s", o.backends[i], kind))
			}
		}
	}
	return list
}

// checkRules asks rules, model and words, on every CPU.
func checkRules(o options, p *printer) part {
	total := part{kinds: census{}}
	worlds := uint64(o.packets+packetsOfAWorld-1) / packetsOfAWorld
	var next atomic.Uint64
	var stop atomic.Bool
	var lock sync.Mutex
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			own := part{kinds: census{}}
			for !stop.Load() {
				n := next.Add(1) - 1
				if n >= worlds {
					break
				}
				if own.askRules(o, n); own.found != "" {
					stop.Store(true)
				}
				p.progress("rules: cluster %d of %d", n, worlds)
			}
			lock.Lock()
			defer lock.Unlock()
			total.add(own)
		})
	}
	group.Wait()
	return total
}

func (a *part) add(b part) {
	a.packets, a.worlds = a.packets+b.packets, a.worlds+b.worlds
	a.kinds.merge(b.kinds)
	if a.found == "" {
		a.found = b.found
	}
}

// askRules asks about one world's packets, until rules or model differ from the words.
func (a *part) askRules(o options, n uint64) {
	w, d := newWorld(o.seed, n), throw(o.seed, n, forPackets)
	j := o.judge(w, n)
	a.worlds++
	for range packetsOfAWorld {
		p := w.packet(d)
		a.packets++
		words := j.words(p)
		a.kinds.take(j, p, words)
		if j.differs(p, words) != "" {
			w = shrink(w, func(less *World) bool { j := o.judge(less, n); return j.differs(p, j.words(p)) != "" })
			j = o.judge(w, n)
			words = j.words(p)
			a.found = foundFile(o.seed, n, w, p, j.differs(p, words), words)
			return
		}
	}
}

// foundFile writes a difference as a file for testdata/regressions. What is expected are the words, to be read by a person.
func foundFile(seed, n uint64, w *World, p Packet, text string, words opinion) string {
	comment := fmt.Sprintf("Cluster %d of SEED=%d: %s: %s\n%s", n, seed, p, text, words)
	return file(w, comment, expected{p, words.passes})
}

// checkKernels asks each backend's kernel, all at once.
func checkKernels(o options, p *printer) ([]part, error) {
	parts, errs := make([]part, len(o.backends)), make([]error, len(o.backends))
	var group sync.WaitGroup
	for i, backend := range o.backends {
		group.Go(func() {
			parts[i] = part{kinds: census{}}
			errs[i] = onBench(backend, i, func(b *bench) error { return parts[i].askKernel(o, backend, b, p) })
			if errs[i] != nil {
				errs[i] = fmt.Errorf("kernel, %s: %w", backend, errs[i])
			}
		})
	}
	group.Wait()
	return parts, errors.Join(errs...)
}

// askKernel sends packets until there were enough or the kernel differs from the words.
func (a *part) askKernel(o options, backend iptables.Backend, b *bench, p *printer) error {
	for n := uint64(0); a.worlds*kernelPacketsOfAWorld < o.kernelPackets && a.found == ""; n++ {
		w, err := throughManifests(newWorld(o.seed, n))
		if err != nil {
			return fmt.Errorf("cluster %d of SEED=%d: %w", n, o.seed, err)
		}
		d := throw(o.seed, n, forKernel)
		j := o.judge(w, n)
		var packets []Packet
		for range kernelPacketsOfAWorld {
			packets = append(packets, w.kernelPacket(d))
		}
		found, asked, err := b.compare(j, packets, a.kinds)
		if err != nil {
			return fmt.Errorf("cluster %d of SEED=%d: %w", n, o.seed, err)
		}
		a.packets, a.worlds = a.packets+asked, a.worlds+1
		if found != nil {
			a.found = b.shrunk(o, n, w, found, fmt.Sprintf("iptables-%s", backend))
		}
		p.progress("kernel, %s: %d of %d packets", backend, a.worlds*kernelPacketsOfAWorld, o.kernelPackets)
	}
	return nil
}

// shrunk cuts a world down to what makes the kernel differ.
func (b *bench) shrunk(o options, n uint64, w *World, found *difference, who string) string {
	ask := func(w *World) *difference {
		again, _, err := b.compare(o.judge(w, n), []Packet{found.packet}, census{})
		if err != nil {
			return nil
		}
		return again
	}
	w = shrink(w, func(less *World) bool { return ask(less) != nil })
	if last := ask(w); last != nil {
		found = last
	}
	return foundFile(o.seed, n, w, found.packet, who+": "+found.text, o.judge(w, n).words(found.packet))
}

// throughManifests writes a world as manifests and reads it again, which must change nothing: so the kernel's part begins with
// the very text that a person would apply.
func throughManifests(w *World) (*World, error) {
	text := file(w, "")
	read, _, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("read what was written: %w:\n%s", err, text)
	}
	if again := file(read, ""); again != text {
		return nil, fmt.Errorf("manifests do not come back as they were written:\n%s\nbut:\n%s", text, again)
	}
	read.addresses = w.addresses
	return read, nil
}
