// Package sysctl reads and writes the settings of the network, below /proc/sys/net.
//
// The kernel resolves that folder in the network namespace of the thread that opens a file in it, wherever it is mounted. In a
// container that is not privileged the runtime makes /proc/sys read-only (OCI runtime specification, readonlyPaths) and lets
// nothing be mounted there, so whoever writes needs another mount of the folder: at [Mount].
package sysctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	own = "/proc/sys/net"
	// Mount is where a container of ours has the node's /proc/sys/net.
	Mount = "/host/proc/sys/net"
)

// Setting is one sysctl: a path below /proc/sys/net, and its value.
type Setting struct{ Path, Value string }

// Of returns a setting.
func Of(path, value string) Setting { return Setting{path, value} }

func (s Setting) String() string { return "sysctl net." + strings.ReplaceAll(s.Path, "/", ".") }

// Read returns the value that is in force, which may be another one; an error that is fs.ErrNotExist where the kernel has no such
// setting.
func (s Setting) Read() (string, error) {
	now, err := os.ReadFile(filepath.Join(own, s.Path))
	return strings.TrimSpace(string(now)), err
}

// Set writes the value if it is not in force already, and reports whether it was not.
func (s Setting) Set() (changed bool, err error) { return s.set(own, Mount) }

func (s Setting) set(own, mount string) (changed bool, err error) {
	now, err := s.Read()
	if err == nil && now == s.Value {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("set %s to %s: %w", s, s.Value, err)
	}
	if err := s.write(own, mount); err != nil {
		return false, err
	}
	return true, nil
}

// Write writes the value, whatever is in force.
func (s Setting) Write() error { return s.write(own, Mount) }

func (s Setting) write(own, mount string) error {
	err := write(filepath.Join(own, s.Path), s.Value)
	if errors.Is(err, unix.EROFS) {
		if _, missing := os.Stat(mount); missing != nil {
			err = fmt.Errorf("%s is read-only, as it is in containers, and the node's is not mounted at %s", own, mount)
		} else {
			err = write(filepath.Join(mount, s.Path), s.Value)
		}
	}
	if err != nil {
		return fmt.Errorf("set %s to %s: %w", s, s.Value, err)
	}
	return nil
}

// write does not make a file.
func write(path, value string) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(value)
	return errors.Join(err, file.Close())
}
