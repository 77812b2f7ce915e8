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
	if err := writeAll(own, mount, s); err != nil {
		return false, err
	}
	return true, nil
}

// Write writes settings of one folder, whatever is in force. The folder is opened once: to look up the first name below
// [own] takes the longer the more network namespaces there are (0.13 ms with 1,000), for the kernel keeps what it has found in
// every one of them under the same name (proc_sys_compare, fs/proc/proc_sysctl.c).
func Write(settings ...Setting) error { return writeAll(own, Mount, settings...) }

func writeAll(own, mount string, settings ...Setting) error {
	if len(settings) == 0 {
		return nil
	}
	folder := filepath.Dir(settings[0].Path)
	dir, err := unix.Open(filepath.Join(own, folder), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set %s to %s: open its folder: %w", settings[0], settings[0].Value, err)
	}
	defer unix.Close(dir)
	var errs []error
	for _, s := range settings {
		if in := filepath.Dir(s.Path); in != folder {
			return fmt.Errorf("set %s to %s: it is in the folder %s, not %s", s, s.Value, in, folder)
		}
		err := write(dir, filepath.Base(s.Path), s.Value)
		if errors.Is(err, unix.EROFS) {
			err = s.writeBy(own, mount)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("set %s to %s: %w", s, s.Value, err))
		}
	}
	return errors.Join(errs...)
}

// writeBy writes the value by the other mount.
func (s Setting) writeBy(own, mount string) error {
	if _, missing := os.Stat(mount); missing != nil {
		return fmt.Errorf("%s is read-only, as it is in containers, and the node's is not mounted at %s", own, mount)
	}
	return write(unix.AT_FDCWD, filepath.Join(mount, s.Path), s.Value)
}

// write does not make a file.
func write(dir int, path, value string) error {
	fd, err := unix.Openat(dir, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(value))
	return errors.Join(err, unix.Close(fd))
}
