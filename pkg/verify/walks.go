package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/iptables"
)

// checkWalks takes the walks by patches, then those through the engine.
func checkWalks(o options, p *printer) ([]walked, error) {
	if o.walks == 0 {
		return nil, nil
	}
	patches := checkPatches(o, p)
	p.line("walks by patches: %v (%.0f s)", patches, time.Since(p.begin).Seconds())
	engines, err := checkEngines(o, p)
	for i, w := range engines {
		p.line("walks through the engine, %s: %v (%.0f s)", o.backends[i], w, time.Since(p.begin).Seconds())
	}
	return append(engines, patches), err
}

func sumOf(list []walked) (total walked) {
	for _, w := range list {
		total.add(w)
	}
	return total
}

// checkPatches takes the walks by patches, on every CPU.
func checkPatches(o options, p *printer) walked {
	var total walked
	var next atomic.Uint64
	var lock sync.Mutex
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			var own walked
			for own.Found == "" {
				n := next.Add(1) - 1
				if n >= uint64(o.patchWalks()) {
					break
				}
				steps, found := o.patchWalk(n, nil)
				own.add(walked{Walks: 1, Steps: steps, Found: found})
				p.progress("walks by patches: %d of %d", n, o.patchWalks())
			}
			lock.Lock()
			defer lock.Unlock()
			total.add(own)
		})
	}
	group.Wait()
	return total
}

// checkEngines takes the walks through the engine with each backend, all at once: each in a process of its own, for an engine has
// the network namespace of its whole process.
func checkEngines(o options, p *printer) ([]walked, error) {
	list, errs := make([]walked, len(o.backends)), make([]error, len(o.backends))
	var group sync.WaitGroup
	for i, backend := range o.backends {
		group.Go(func() {
			errs[i] = o.walkElsewhere(backend, func(w walked) {
				list[i].add(w)
				p.progress("walks through the engine, %s: %d of %d", backend, list[i].Walks, o.walks)
			})
			if errs[i] != nil {
				errs[i] = fmt.Errorf("walks through the engine, %s: %w", backend, errs[i])
			}
		})
	}
	group.Wait()
	return list, errors.Join(errs...)
}

// walkElsewhere has a process in a new network namespace take the walks of one backend.
func (o options) walkElsewhere(backend iptables.Backend, each func(walked)) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the kernel sends Pdeathsig when the thread that forked ends
	defer runtime.UnlockOSThread()
	cmd := exec.Command(exe, "-walk-here", "-backend", string(backend), "-walks", fmt.Sprint(o.walks), "-seed", fmt.Sprint(o.seed))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for answers := json.NewDecoder(out); ; {
		var w walked
		if err = answers.Decode(&w); err != nil {
			break
		}
		each(w)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, cmd.Wait())
}

// walkHere takes walks in this process's network namespace and writes what came of each, until something is found.
func walkHere(o options, out io.Writer) error {
	answers := json.NewEncoder(out)
	for n := range uint64(o.walks) {
		w, err := o.engineWalk(o.backends[0], n)
		if err != nil {
			return fmt.Errorf("walk %d of SEED=%d: %w", n, o.seed, err)
		}
		if err := answers.Encode(w); err != nil || w.Found != "" {
			return err
		}
	}
	return nil
}

// shrinkFor is how long a walk through the engine that has found something is cut down.
const shrinkFor = 2 * time.Minute

// engineWalk takes one walk through the engine. What it returns of a difference is all that one needs to see it again.
func (o options) engineWalk(backend iptables.Backend, n uint64) (walked, error) {
	steps := walk(throw(o.seed, n, forWalks), stepsOfAWalk)
	w, err := takeWalk(backend, steps, nil)
	if err != nil || w.Found == "" {
		return w, err
	}
	found := w.Found
	until := time.Now().Add(shrinkFor)
	steps = shortened(steps[:min(w.Steps+1, len(steps))], func(less []step) bool {
		if time.Now().After(until) {
			return false
		}
		again, err := takeWalk(backend, less, nil)
		if err != nil || again.Found == "" {
			return false
		}
		found = again.Found
		return true
	})
	w.Found = foundWalk(fmt.Sprintf("Walk %d of SEED=%d, through the engine with iptables-%s", n, o.seed, backend), steps, found)
	return w, nil
}

func (w walked) String() string {
	text := fmt.Sprintf("%d walks of %d steps", w.Walks, w.Steps)
	if w.Looks > 0 {
		text += fmt.Sprintf(" (%d restarts, %d crashes, %d faults, %d foreign edits; %d packets asked about in %d moments of a pass)",
			w.Restarts, w.Crashes, w.Faults, w.Edits, w.Packets, w.Looks)
	}
	return text
}
