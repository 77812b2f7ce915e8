package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// hierarchy is one of the machine's trees of control groups: one for each controller with version 1, a single one with version 2
// (cgroups(7)).
type hierarchy struct {
	Options string // of mount(2): "cpu", "none,name=systemd"; empty for version 2
	Name    string // of its folder in /sys/fs/cgroup; empty for version 2, which is mounted on that
	Mount   string // where the machine has it
	Own     string // this program's group in it
}

// hierarchies are those that this program is in. Where both versions are mounted, those of version 1 have the controllers, and
// that of version 2 is left alone.
func hierarchies() ([]hierarchy, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("list control groups: %w", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var first, second []hierarchy
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // number, controllers, group
		if len(parts) != 3 {
			continue
		}
		mount := mountOf(string(mounts), parts[1])
		if mount == "" {
			continue
		}
		switch name, named := strings.CutPrefix(parts[1], "name="); {
		case parts[1] == "":
			// The root's own group: others than the root's may not hold both processes and groups with controllers.
			second = append(second, hierarchy{Mount: mount, Own: mount})
		case named:
			first = append(first, hierarchy{"none," + parts[1], name, mount, filepath.Join(mount, parts[2])})
		default:
			first = append(first, hierarchy{parts[1], parts[1], mount, filepath.Join(mount, parts[2])})
		}
	}
	if len(first) > 1 { // version 1 for more than systemd's bookkeeping
		return first, nil
	}
	if len(second) == 0 {
		return nil, errors.New("list control groups: none are mounted in /sys/fs/cgroup")
	}
	return second, nil
}

// mountOf finds where the hierarchy with these controllers is mounted; "" for version 2.
func mountOf(mounts, controllers string) string {
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		switch {
		case len(f) < 4:
		case controllers == "" && f[2] == "cgroup2":
			return f[1]
		case controllers != "" && f[2] == "cgroup" && holdsAll(strings.Split(f[3], ","), strings.Split(controllers, ",")):
			return f[1]
		}
	}
	return ""
}

func holdsAll(options, wanted []string) bool {
	has := make(map[string]bool)
	for _, o := range options {
		has[o] = true
	}
	for _, w := range wanted {
		if !has[w] {
			return false
		}
	}
	return true
}

// makeCgroups makes a group for a node in each hierarchy, and returns their folders.
func makeCgroups(name string) ([]string, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var made []string
	for _, h := range all {
		group := filepath.Join(h.Own, name)
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return made, fmt.Errorf("make a control group for %s: %w", name, err)
		}
		made = append(made, group)
		if h.Options == "cpuset" { // a new group has no processors and no memory, and takes no process
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := copyFile(filepath.Join(group, file), filepath.Join(h.Own, file), 0); err != nil {
					return made, fmt.Errorf("make a control group for %s: %w", name, err)
				}
			}
		}
	}
	return made, nil
}

// joinCgroups moves this program into groups.
func joinCgroups(groups []string) error {
	for _, group := range groups {
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter control group %s: %w", group, err)
		}
	}
	return nil
}

// removeCgroups removes groups and those under them. The kernel takes some time to empty a group after its last process has
// ended.
func removeCgroups(groups []string) error {
	var errs []error
	for _, group := range groups {
		var err error
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if err = removeCgroup(group); err == nil {
				break
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func removeCgroup(group string) error {
	entries, err := os.ReadDir(group)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(group, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(group)
}

func copyFile(to, from string, mode fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, mode)
}
