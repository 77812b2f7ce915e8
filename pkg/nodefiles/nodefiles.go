// Package nodefiles puts files onto a node and takes them away again: the plugin and the CNI project's loopback in the container
// runtime's folder of plugins, the runtime's configuration, and words to the node's own network managers. The node may be
// somewhere else than at "/": a container has its folders mounted.
//
// Files are replaced whole at once, by renaming a new one, which is on the disk by then, to their name.
//
// # Network managers
//
// NetworkManager, systemd-networkd and udev each would like to manage what links appear, and by a configuration that matches
// every name they do: addresses and routes of pods go, links get other names or MACs. Our links, known by their names, are taken
// out of that where the software's own folder is there:
//
//   - udev rules, which udevd reads again by itself when they have changed, so they hold at once: NM_UNMANAGED for
//     NetworkManager, ID_NET_MANAGED_BY for it and for systemd-networkd from version 256 on.
//   - NetworkManager's configuration, which precedes udev's word where an administrator has it manage everything. Read when it
//     starts.
//   - A .network file for systemd-networkd, whatever its version, read when it starts; it precedes others by its name. And a
//     .link file against renaming and MACs of udev's, which reads it by itself (systemd.link(5)).
//   - A file for sysctl.d(5): udev has systemd-sysctl set, for each new link, what patterns there match it, and distributions
//     write such a pattern for rp_filter. The last file's pattern wins.
package nodefiles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Names in the folder of plugins.
const (
	Plugin   = "postern" // the plugin's, and its type in configurations
	loopback = "loopback"
	// ownLoopback is what a loopback of ours leads to. So it is told from one that somebody else has installed.
	ownLoopback = "postern-loopback"
)

// InstallPlugin puts the program from into a folder of plugins, which is made if it is missing, and reports whether it was not
// there already. A plugin that runs goes on with the file that it was started from.
func InstallPlugin(from, dir string) (installed bool, err error) {
	return install(from, filepath.Join(dir, Plugin))
}

// InstallLoopback does the same with the loopback plugin, where there is none but ours: runtimes call it for each pod, and many
// nodes have it already.
func InstallLoopback(from, dir string) (installed bool, err error) {
	link := filepath.Join(dir, loopback)
	to, err := os.Readlink(link)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := install(from, filepath.Join(dir, ownLoopback)); err != nil {
			return false, err
		}
		return true, os.Symlink(ownLoopback, link)
	case err != nil || to != ownLoopback: // a file, or somebody else's link
		return false, nil
	}
	return install(from, filepath.Join(dir, ownLoopback))
}

func install(from, to string) (bool, error) {
	if same, err := sameProgram(from, to); err != nil || same {
		return false, err
	}
	file, err := os.Open(from)
	if err != nil {
		return false, err
	}
	defer file.Close()
	return true, replace(to, file, 0o755)
}

// sameProgram compares a program with what is installed, and whether that can be run.
func sameProgram(from, to string) (bool, error) {
	want, err := os.ReadFile(from)
	if err != nil {
		return false, err
	}
	now, err := os.ReadFile(to)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	info, err := os.Stat(to)
	return err == nil && info.Mode().Perm() == 0o755 && bytes.Equal(want, now), err
}

// Write puts a text into a file, whose folder is made if it is missing, and reports whether it was not there already.
func Write(path string, text []byte) (written bool, err error) {
	now, err := os.ReadFile(path)
	if err == nil && bytes.Equal(now, text) {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, replace(path, bytes.NewReader(text), 0o644)
}

// replace gives a file other content. The new one's own name has an ending that nobody reads; what a killed call left under it
// is written over.
func replace(path string, content io.Reader, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temp := temporary(path)
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}

func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
}

// managed is a file for one of the network managers. It is written where its folder is there.
type managed struct {
	path string
	text func(Links) string
}

// Links are patterns of the names of links of ours: letters, and "*" for the rest.
type Links struct{ Pods, Tunnels []string }

func (l Links) all() []string { return slices.Concat(l.Pods, l.Tunnels) }

var managers = []managed{
	{"etc/udev/rules.d/70-postern.rules", func(l Links) string {
		return fmt.Sprintf("SUBSYSTEM==\"net\", ACTION!=\"remove\", KERNEL==%q, ENV{NM_UNMANAGED}=\"1\", "+
			"ENV{ID_NET_MANAGED_BY}=\"postern\"\n", strings.Join(l.all(), "|"))
	}},
	{"etc/NetworkManager/conf.d/postern.conf", func(l Links) string {
		return fmt.Sprintf("[device-postern]\nmatch-device=interface-name:%s\nmanaged=0\n", strings.Join(l.all(), ",interface-name:"))
	}},
	{"etc/systemd/network/05-postern.network", func(l Links) string {
		return fmt.Sprintf("[Match]\nName=%s\n\n[Link]\nUnmanaged=yes\n", strings.Join(l.all(), " "))
	}},
	{"etc/systemd/network/05-postern.link", func(l Links) string {
		return fmt.Sprintf("[Match]\nOriginalName=%s\n\n[Link]\nNamePolicy=keep\nMACAddressPolicy=none\n", strings.Join(l.all(), " "))
	}},
	{"etc/sysctl.d/99-zz-postern.conf", func(l Links) string {
		var b strings.Builder
		for value, links := range [][]string{l.Tunnels, l.Pods} {
			for _, link := range links { // "-": where no link matches, that is no error
				fmt.Fprintf(&b, "-net.ipv4.conf.%s.rp_filter = %d\n", link, value)
			}
		}
		return b.String()
	}},
}

const managedHead = "# Links of postern's are not yours to manage. " +
	"Written by `policyd install`, removed by `policyd cleanup --all`.\n"

// TellManagers has the network managers of the node at root leave links alone. It returns the files that it wrote. What cannot be
// written stops nothing else.
func TellManagers(root string, links Links) (written []string, err error) {
	var errs []error
	for _, m := range managers {
		path := filepath.Join(root, m.path)
		if info, err := os.Stat(filepath.Dir(path)); err != nil || !info.IsDir() {
			continue
		}
		changed, err := Write(path, []byte(managedHead+m.text(links)))
		if changed && err == nil {
			written = append(written, path)
		}
		errs = append(errs, err)
	}
	return written, errors.Join(errs...)
}

// RemovePrograms takes the plugin and a loopback of ours away, and returns what was there.
func RemovePrograms(dir string) (removed []string, err error) {
	paths := []string{filepath.Join(dir, Plugin), filepath.Join(dir, ownLoopback)}
	link := filepath.Join(dir, loopback)
	if to, err := os.Readlink(link); err == nil && to == ownLoopback {
		paths = append([]string{link}, paths...)
	}
	return Remove(paths...)
}

// ForgetManagers takes away what [TellManagers] wrote.
func ForgetManagers(root string) (removed []string, err error) {
	var paths []string
	for _, m := range managers {
		paths = append(paths, filepath.Join(root, m.path))
	}
	return Remove(paths...)
}

// Remove takes files away, with what a killed call may have left beside them, and returns those that were there.
func Remove(paths ...string) (removed []string, err error) {
	var errs []error
	for _, path := range paths {
		for _, p := range []string{temporary(path), path} {
			err := os.Remove(p)
			if err == nil {
				removed = append(removed, p)
			} else if !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return removed, errors.Join(errs...)
}
