package latency

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/table"
)

const row = 16

const endLimit = 10 * time.Second // for a side to end by itself

// The marks: of the time itself in ms, and of its ratio to the empty cluster's.
const (
	labelMark  = 15
	policyMark = 40
	ratioMark  = 1.5
)

// part is one kind of change. Those of parts follow each other, and the last leads back to the beginning.
type part struct {
	name string
	mark float64
	open bool // tries are answered once it is in force
}

var parts = []part{
	{"a pod's label joins a peer list", labelMark, true},
	{"a pod's label leaves a peer list", labelMark, false},
	{"a policy is made", policyMark, true},
	{"a policy is deleted", policyMark, false},
}

const explain = "From right before the API call to the first connection that shows it, of a pod that tries every 0.2 ms. " +
	"kube-apiserver, etcd, policyd and the pods share the machine. "

// Start runs another of the program's benchmarks in namespaces of its own, until it ends. Its standard input is given.
type Start func(ctx context.Context, name string, env table.Env, stdin *os.File) error

// Bench takes turns with a large cluster and an empty one, which start runs: they are [Large] and [Empty].
func Bench(start Start) table.Bench {
	return table.Bench{Name: "latency", Rows: []int{row}, Run: func(ctx context.Context, env table.Env) (table.Report, error) {
		return run(ctx, env, start)
	}}
}

func run(ctx context.Context, env table.Env, start Start) (table.Report, error) {
	ctx, cancel := context.WithCancel(ctx)
	var sides []*remote
	defer func() {
		for _, s := range sides {
			s.conn.Close() // it ends when there are no more orders
		}
		defer time.AfterFunc(endLimit, cancel).Stop()
		for _, s := range sides {
			<-s.ended
		}
		cancel()
	}()
	for _, name := range []string{largeName, emptyName} {
		s, err := newRemote(ctx, env, start, name)
		if err != nil {
			return table.Report{}, err
		}
		sides = append(sides, s)
	}
	for _, s := range sides {
		if _, err := s.hear(); err != nil {
			return table.Report{}, err
		}
	}
	large, empty := sides[0], sides[1]
	if err := takeTurns(env, sides); err != nil {
		return table.Report{}, err
	}
	return report(env.Backends[0], large, empty), nil
}

// takeTurns measures round after round.
func takeTurns(env table.Env, sides []*remote) error {
	sides = slices.Clone(sides)
	warm, rounds := 3, 50
	if env.Quick {
		warm, rounds = 1, 7
	}
	for round := range warm + rounds {
		if round%10 == 0 {
			env.Say("round %d of %d", round, warm+rounds)
		}
		for i := range parts {
			for _, s := range sides {
				seen, err := s.measure(i)
				if err != nil {
					return fmt.Errorf("%s: %w", parts[i].name, err)
				}
				if round >= warm {
					s.times[i], s.calls[i] = append(s.times[i], milliseconds(seen.After)), append(s.calls[i], milliseconds(seen.Call))
					s.gap = append(s.gap, milliseconds(seen.Gap))
				}
			}
			slices.Reverse(sides) // who is first is second the next time
		}
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// report has two lines for each part: the time itself, and beside the empty cluster's.
func report(backend string, large, empty *remote) (r table.Report) {
	for i, p := range parts {
		line := table.Line{
			Row: row, Backend: backend, What: "seen from a pod", Part: p.name, Unit: "ms", Ours: large.times[i],
			Mark: table.NoMoreThan(p.mark), Explain: explain + fmt.Sprintf("The API call itself had returned after %.1f ms, the median. "+
				"The longest time between two tries was %.1f ms, the median too. A peer that rewrites its tables takes 1.0 to 2.0 s.",
				table.Quantile(large.calls[i], 0.5), table.Quantile(large.gap, 0.5)),
		}
		beside := line
		beside.Beside, beside.Theirs, beside.Mark = "the same with an empty cluster", empty.times[i], table.AtMost(ratioMark)
		beside.Explain = "The large one has " + large.size + "; the empty cluster has its own of each, and they take turns."
		r.Lines = append(r.Lines, line, beside)
	}
	return r
}

// remote is a side, as the benchmark's own process has it.
type remote struct {
	name  string
	conn  *os.File
	in    *json.Decoder
	ended chan struct{} // closed when its process has ended
	err   error         // why, once it has

	size  string
	times [][]float64 // by part, all in ms
	calls [][]float64
	gap   []float64
}

// order tells a side what to do, and news what came out; the first news is that it is ready.
type (
	order struct{ Part int }
	news  struct {
		Size string // of the cluster
		Seen Seen
	}
)

// newRemote starts a side, in a folder of its own. What is said to it and heard from it goes through its standard input, a
// socket: its standard output is for people.
func newRemote(ctx context.Context, env table.Env, start Start, name string) (*remote, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start side %s: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	r := &remote{name: name, conn: ours, in: json.NewDecoder(ours), ended: make(chan struct{}),
		times: make([][]float64, len(parts)), calls: make([][]float64, len(parts))}
	env.Dir = filepath.Join(env.Dir, name)
	go func() {
		defer close(r.ended)
		r.err = start(ctx, name, env, theirs)
		theirs.Close() // so that who waits for news hears that there are no more
	}()
	return r, nil
}

// hear waits for news. A side that ends without has said why in what its process says.
func (r *remote) hear() (news, error) {
	var n news
	if err := r.in.Decode(&n); err != nil {
		<-r.ended
		return n, fmt.Errorf("hear %s: %w: %v", r.name, err, r.err)
	}
	r.size += n.Size
	return n, nil
}

func (r *remote) measure(part int) (Seen, error) {
	if err := json.NewEncoder(r.conn).Encode(order{part}); err != nil {
		return Seen{}, err
	}
	n, err := r.hear()
	return n.Seen, err
}
