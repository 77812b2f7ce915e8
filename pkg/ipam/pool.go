package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
)

// lockLimit is how long an operation waits for the others; each takes well under a millisecond.
const lockLimit = 10 * time.Second

// Folders of the state; see the package comment.
const (
	ownersDir    = "owners"
	usedDir      = "used"
	releasingDir = "releasing"
	restingDir   = "resting"
	rangesDir    = "ranges"

	straysFile = "strays" // in rangesDir
)

// Pool gives out the addresses of one network on this node. Any number of processes may use one at the same time.
type Pool struct {
	disk       *disk
	spans      []span
	reuseAfter time.Duration
	now        func() (time.Duration, error)
}

// Usage is how far a range is used.
type Usage struct {
	Range      Range
	Size       uint64 // addresses it gives out; math.MaxUint64 stands for that many or more
	Used       uint64
	Resting    uint64 // released less than ReuseAfter ago
	ReuseAfter time.Duration
}

// Full reports whether the range has no address to give out now.
func (u Usage) Full() bool { return u.Used+u.Resting >= u.Size }

func (u Usage) String() string {
	return fmt.Sprintf("%s: %d addresses, %d in use, %d released less than %s ago", u.Range, u.Size, u.Used, u.Resting,
		u.ReuseAfter)
}

// FullError says that no range of a family has room.
type FullError struct{ Ranges []Usage }

func (e *FullError) Error() string {
	var parts []string
	for _, u := range e.Ranges {
		parts = append(parts, u.String())
	}
	return "no free address in " + strings.Join(parts, "; ") + "; delete pods, or give the network a larger range"
}

// Open returns the pool of a network. The ranges must pass [Range.Check] and not overlap; without any, addresses can
// still be released and looked at. An address is given out again no sooner than reuseAfter after its release. Nothing is
// touched yet.
func Open(stateDir, network string, ranges []Range, reuseAfter time.Duration) *Pool {
	p := &Pool{disk: &disk{dir: filepath.Join(stateDir, "ipam", network)}, reuseAfter: reuseAfter, now: sinceBoot}
	for _, r := range ranges {
		p.spans = append(p.spans, newSpan(r))
	}
	return p
}

func sinceBoot() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}

// Reserve gives the owner one address of each family that has ranges, in the order in which the families first appear; of a
// family's ranges the first with room. An owner that holds addresses of the ranges keeps these. The error is a *[FullError]
// when a family has no room; nothing is taken then. After any other error, Release frees what was taken.
func (p *Pool) Reserve(owner attachment.Key) ([]netip.Addr, error) {
	var got []netip.Addr
	err := p.locked(func(s *state) error {
		if err := s.adopt(); err != nil {
			return err
		}
		var err error
		got, err = s.reserve(owner)
		return err
	}, owner)
	if err != nil {
		return nil, fmt.Errorf("reserve addresses for %s: %w", owner, err)
	}
	return got, nil
}

// Release frees what the owner holds. It succeeds where that is nothing.
func (p *Pool) Release(owner attachment.Key) error {
	if err := p.locked(func(s *state) error { return s.release(owner) }, owner); err != nil {
		return fmt.Errorf("release addresses of %s: %w", owner, err)
	}
	return nil
}

// Held returns the addresses that the owner holds, also those outside the ranges.
func (p *Pool) Held(owner attachment.Key) ([]netip.Addr, error) {
	var held []netip.Addr
	err := p.locked(func(s *state) (err error) {
		held, err = s.held(owner)
		return err
	}, owner)
	if err != nil {
		return nil, fmt.Errorf("look up addresses of %s: %w", owner, err)
	}
	return held, nil
}

// Owners returns every owner there is, also one whose Reserve was killed before it held anything. Release makes an owner
// disappear.
func (p *Pool) Owners() ([]attachment.Key, error) {
	names, err := p.disk.names(p.disk.path(ownersDir))
	if err != nil {
		return nil, fmt.Errorf("list owners of addresses: %w", err)
	}
	var keys []attachment.Key
	for _, name := range names {
		id, ifName, _ := strings.Cut(name, "@")
		keys = append(keys, attachment.Key{ContainerID: id, IfName: ifName})
	}
	return keys, nil
}

// Usage returns how far each range is used. Its cost grows with the pods.
func (p *Pool) Usage() ([]Usage, error) {
	var usage []Usage
	err := p.locked(func(s *state) (err error) {
		usage, err = s.usage(p.spans)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look up usage of addresses: %w", err)
	}
	return usage, nil
}

// locked runs do on the state, under the flock and after what a killed process left has been finished.
func (p *Pool) locked(do func(*state) error, owners ...attachment.Key) error {
	for _, owner := range owners {
		if err := owner.Check(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockLimit)
	defer cancel()
	lock, err := attachment.LockFile(ctx, p.disk.path("lock"), true)
	if err != nil {
		return err
	}
	defer lock.Release()
	s := &state{Pool: p, queues: map[string]*queue{}}
	defer s.close()
	if err := s.open(); err != nil {
		return err
	}
	return do(s)
}

// state is a pool while its lock is held.
type state struct {
	*Pool
	time   time.Duration
	queues map[string]*queue // by file name
}

func (s *state) close() {
	for _, q := range s.queues {
		q.close()
	}
}

func (s *state) open() (err error) {
	if s.time, err = s.now(); err != nil {
		return err
	}
	for _, dir := range []string{ownersDir, usedDir, releasingDir, restingDir, rangesDir} {
		if err := os.Mkdir(s.disk.path(dir), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := s.openQueues(); err != nil {
		return err
	}
	return s.recover()
}

func (s *state) openQueues() error {
	names, err := s.disk.names(s.disk.path(rangesDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		q, err := openQueue(s.disk, s.disk.path(rangesDir, name))
		if err != nil {
			return err
		}
		s.queues[name] = q
	}
	return nil
}

// recover finishes what a killed process left.
func (s *state) recover() error {
	for _, q := range s.queues {
		e, ok, err := q.first()
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		// Taken from the queue, killed before the queue moved on.
		used, err := s.disk.exists(s.used(e.addr))
		if err != nil {
			return err
		}
		if !used {
			continue
		}
		if err := s.drop(q, e); err != nil {
			return err
		}
	}
	names, err := s.disk.names(s.disk.path(releasingDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil {
			return err
		}
		if err := s.rest(a); err != nil {
			return err
		}
	}
	return nil
}

func (s *state) used(a netip.Addr) string      { return s.disk.path(usedDir, a.String()) }
func (s *state) resting(a netip.Addr) string   { return s.disk.path(restingDir, a.String()) }
func (s *state) releasing(a netip.Addr) string { return s.disk.path(releasingDir, a.String()) }

// drop takes the queue's first entry out.
func (s *state) drop(q *queue, e entry) error {
	if err := s.disk.remove(s.resting(e.addr)); err != nil {
		return err
	}
	return q.move(q.head+e.size, q.next)
}

// rest puts an address that is in releasing/ at the end of a queue, unless a killed process has done so.
func (s *state) rest(a netip.Addr) error {
	q, err := s.queueOf(a)
	if err != nil {
		return err
	}
	queued, err := q.endsWith(a)
	if err != nil {
		return err
	}
	if !queued {
		if err := q.push(a, s.time); err != nil {
			return err
		}
	}
	return s.disk.rename(s.releasing(a), s.resting(a))
}

// queueOf returns the queue that an address goes to when it is released: that of the configured range that gives it out,
// else the strays': the configuration has changed, or cannot be used while a pod goes.
func (s *state) queueOf(a netip.Addr) (*queue, error) {
	for i := range s.spans {
		if q := s.queues[s.spans[i].file()]; q != nil && s.spans[i].contains(a) {
			return q, nil
		}
	}
	if s.queues[straysFile] == nil {
		path := s.disk.path(rangesDir, straysFile)
		if err := s.disk.write(path, header(headerLen, netip.Addr{})); err != nil {
			return nil, err
		}
		q, err := openQueue(s.disk, path)
		if err != nil {
			return nil, err
		}
		s.queues[straysFile] = q
	}
	return s.queues[straysFile], nil
}

// adopt makes the files on disk those of the configured ranges. They take over what rests in files that go, and strays that
// are theirs; strays that are nobody's stay until they have rested. Killed in between, it does the same again.
func (s *state) adopt() error {
	configured := map[string]bool{}
	if len(s.spans) == 0 {
		return errors.New("the network has no ranges; give it ipam.ranges")
	}
	same := len(s.queues) == len(s.spans)
	for i := range s.spans {
		name := s.spans[i].file()
		configured[name] = true
		same = same && s.queues[name] != nil
	}
	if same {
		return nil
	}
	all, err := s.allResting()
	if err != nil {
		return err
	}
	for i := range s.spans {
		if err := s.rewrite(&s.spans[i], all); err != nil {
			return err
		}
	}
	strays, err := s.writeStrays(all)
	if err != nil {
		return err
	}
	configured[straysFile] = strays
	for name := range s.queues {
		if !configured[name] {
			if err := s.disk.remove(s.disk.path(rangesDir, name)); err != nil {
				return err
			}
		}
	}
	s.close()
	clear(s.queues)
	return s.openQueues()
}

// writeStrays writes the file of addresses that still rest and are of no configured range, and forgets those that have
// rested. It reports whether there are any.
func (s *state) writeStrays(all []entry) (bool, error) {
	data := header(headerLen, netip.Addr{})
	for _, e := range all {
		switch {
		case slices.ContainsFunc(s.spans, func(sp span) bool { return sp.contains(e.addr) }):
		case s.rests(e):
			data = appendEntry(data, e.addr, e.released)
		default:
			if err := s.disk.remove(s.resting(e.addr)); err != nil {
				return false, err
			}
		}
	}
	if len(data) == headerLen {
		return false, nil
	}
	return true, s.disk.write(s.disk.path(rangesDir, straysFile), data)
}

// allResting returns the entries of every queue on disk, each address once, oldest first. An address that rests in no queue,
// because somebody deleted a file, counts as released now.
func (s *state) allResting() ([]entry, error) {
	latest := map[netip.Addr]entry{}
	for _, q := range s.queues {
		entries, err := q.entries()
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			resting, err := s.disk.exists(s.resting(e.addr))
			if err != nil {
				return nil, err
			}
			if resting && e.released >= latest[e.addr].released {
				latest[e.addr] = e
			}
		}
	}
	names, err := s.disk.names(s.disk.path(restingDir))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil {
			return nil, err
		}
		if _, queued := latest[a]; !queued {
			latest[a] = entry{addr: a, released: s.time}
		}
	}
	var all []entry
	for _, e := range latest {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b entry) int {
		if a.released != b.released {
			return int(min(1, max(-1, a.released-b.released)))
		}
		return a.addr.Compare(b.addr)
	})
	return all, nil
}

// rewrite writes a range's file with those of the entries that are the range's, and keeps its next never used address.
func (s *state) rewrite(sp *span, entries []entry) error {
	next := sp.first
	if q := s.queues[sp.file()]; q != nil {
		next = q.next
	}
	data := header(headerLen, next)
	for _, e := range entries {
		if sp.contains(e.addr) {
			data = appendEntry(data, e.addr, e.released)
		}
	}
	return s.disk.write(s.disk.path(rangesDir, sp.file()), data)
}
