package attachment

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// interfaceLocks is how many files the locks of pod interfaces share; two interfaces in one file only wait for each other.
const interfaceLocks = 64

// Lockable is something that a [Lock] is about.
type Lockable struct {
	file      string
	exclusive bool
}

// The locks of a node. They are taken in this order, so that nobody waits in a circle.
var (
	// NodeShared is held by ADD and DEL: any number of them at a time.
	NodeShared = Lockable{file: "node"}
	// NodeExclusive is held by GC: no ADD or DEL is under way.
	NodeExclusive = Lockable{file: "node", exclusive: true}
	// HostPorts is held while the hostPort chains are looked at and written.
	HostPorts = Lockable{file: "hostports", exclusive: true}
)

// Interface is held, between the node's lock and [HostPorts], by whoever makes or removes the pod link of that host
// interface name: an ADD for a new sandbox and a late DEL for the old one exclude each other.
func Interface(hostInterface string) Lockable {
	h := fnv.New32a()
	h.Write([]byte(hostInterface))
	return Lockable{file: fmt.Sprintf("interface-%02d", h.Sum32()%interfaceLocks), exclusive: true}
}

// Lock is a held lock: flock(2) on an open file. It belongs to the open file, not to the process: it ends when the last
// process that has the file closes it or dies. A child that inherits [Lock.File] therefore keeps the lock when its parent is
// killed.
type Lock struct{ file *os.File }

// Lock waits for a lock until ctx ends. The error then says which lock, and wraps ctx's.
func (s *Store) Lock(ctx context.Context, what Lockable) (*Lock, error) {
	return LockFile(ctx, filepath.Join(s.stateDir, "locks", what.file), what.exclusive)
}

// LockFile waits for a lock on a file until ctx ends; file and folder are made where they are missing. Only an uninstall removes
// the file, and it holds the lock: who has waited for that locks the file that is there then, as everybody who comes after it.
func LockFile(ctx context.Context, path string, exclusive bool) (*Lock, error) {
	for {
		l, err := lockOnce(ctx, path, exclusive)
		if err != nil || l.isAt(path) {
			return l, err
		}
		l.Release()
	}
}

// isAt reports whether the locked file still has its name.
func (l *Lock) isAt(path string) bool {
	locked, err := l.file.Stat()
	if err != nil {
		return true // nothing better is known
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(locked, there) || err != nil && !errors.Is(err, fs.ErrNotExist)
}

func lockOnce(ctx context.Context, path string, exclusive bool) (*Lock, error) {
	f, err := openLock(path)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	err = flock(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return wait(ctx, f, how)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f}, nil
}

// wait blocks in the kernel, which wakes waiters in order and costs nothing while nothing happens. flock cannot be
// called off: when ctx ends first, the goroutine closes the file, and with it the lock, as soon as it gets it.
func wait(ctx context.Context, f *os.File, how int) (*Lock, error) {
	locked := make(chan error, 1)
	given := make(chan bool, 1)
	go func() {
		locked <- flock(f, how)
		if !<-given {
			f.Close()
		}
	}()
	select {
	case err := <-locked:
		given <- err == nil
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		return &Lock{f}, nil
	case <-ctx.Done():
		given <- false
		return nil, fmt.Errorf("lock %s: another process holds it (see fuser %s): %w", f.Name(), f.Name(), ctx.Err())
	}
}

// File is the locked file, for a child process to inherit.
func (l *Lock) File() *os.File { return l.file }

// Release ends the lock, unless a child that inherited the file still lives.
func (l *Lock) Release() { l.file.Close() }

func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
