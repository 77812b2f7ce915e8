package main

import (
	"bufio"
	"context"
	"debug/buildinfo"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// version is the revision of everything that is measured here; the linker sets it.
var version = "unknown"

// facts are those of this machine and of the programs in the folder. What cannot be learned is left empty: figures without it
// are better than none.
func (o options) facts(ctx context.Context, start time.Time) table.Facts {
	return table.Facts{
		Date:     start.UTC().Format(time.RFC3339),
		Revision: version,
		Kernel:   kernel(),
		CPU:      cpu(),
		CPUs:     runtime.NumCPU(),
		Go:       runtime.Version(),
		Iptables: iptables(ctx),
		Programs: programs(o.bin),
		Quick:    o.quick,
		Took:     time.Since(start).Round(time.Second).String(),
	}
}

func kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// cpu is the model's name.
func cpu() string {
	file, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if key, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// iptables is the version that both backends have: they come from one source.
func iptables(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "iptables-nft", "--version").Output()
	if err != nil {
		return ""
	}
	name, _, _ := strings.Cut(string(out), " (")
	return strings.TrimSpace(name)
}

// programs are those that others wrote, and their modules' versions: Go writes them into what it builds.
func programs(folder string) map[string]string {
	found := map[string]string{}
	files, _ := os.ReadDir(folder)
	for _, file := range files {
		info, err := buildinfo.ReadFile(filepath.Join(folder, file.Name()))
		if err != nil || strings.HasPrefix(info.Main.Path, "github.com/postern-cni/") {
			continue
		}
		found[file.Name()] = info.Main.Version
	}
	return found
}
