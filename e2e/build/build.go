// Package build makes what a cluster of package cluster is made of, in one folder, and makes it again only where something has
// changed: Kubernetes' programs, the upstream suites, and helpers from Go modules, whose versions e2e/kubernetes, e2e/coredns and
// e2e/etcd pin; a container runtime and etcd from Debian packages, unpacked and not installed; and images, for there is no
// registry.
package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/postern-cni/postern/e2e/debian"
	"github.com/postern-cni/postern/e2e/images"
)

// program is one that Go builds.
type program struct {
	name   string
	module string // folder of the module that pins it, in the source tree
	pkg    string
	test   bool // the program is the package's tests
}

var programs = []program{
	{"kube-apiserver", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver", false},
	{"kube-controller-manager", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager", false},
	{"kube-scheduler", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler", false},
	{"kubelet", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kubelet", false},
	{"kube-proxy", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kube-proxy", false},
	{"kubectl", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kubectl", false},
	{"kubeadm", "e2e/kubernetes", "k8s.io/kubernetes/cmd/kubeadm", false}, // checks the documentation's commands
	{"agnhost", "e2e/kubernetes", "k8s.io/kubernetes/test/images/agnhost", false},
	{"ginkgo", "e2e/kubernetes", "github.com/onsi/ginkgo/v2/ginkgo", false},
	{"e2e.test", "e2e/kubernetes", "k8s.io/kubernetes/test/e2e", true},
	{"coredns", "e2e/coredns", "github.com/coredns/coredns", false},
	{"etcd", "e2e/etcd", "go.etcd.io/etcd/server/v3", false}, // the benchmarks' own; the cluster's is Debian's
	{"pause", "e2e", "./pause", false},
}

// Tree is where things are built from, and to.
type Tree struct {
	Source string // the source tree
	Dir    string // what is built: bin, debian, images
	Say    func(format string, args ...any)
}

// Programs builds everything that comes from Go modules, into bin. Go's own cache makes a second time quick.
func (t Tree) Programs(ctx context.Context) error { return t.programs(ctx, programs) }

func (t Tree) programs(ctx context.Context, wanted []program) error {
	version, err := t.output(ctx, "e2e/kubernetes", "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	for _, p := range wanted {
		start := time.Now()
		args := []string{"build"}
		if p.test {
			args = []string{"test", "-c"}
		}
		args = append(args, "-trimpath", "-buildvcs=false", "-ldflags", "-s -w "+versionFlags(version),
			"-o", filepath.Join(t.Dir, "bin", p.name), p.pkg)
		if _, err := t.output(ctx, p.module, "go", args...); err != nil {
			return err
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Say("built %s in %.0f s", p.name, took.Seconds())
		}
	}
	return nil
}

// versionFlags make Kubernetes' programs say which release they are. They compare that with each other's.
func versionFlags(version string) string {
	numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, set := range [][2]string{
			{"gitVersion", version}, {"gitMajor", numbers[0]}, {"gitMinor", numbers[1]}, {"gitTreeState", "clean"},
		} {
			flags = append(flags, fmt.Sprintf("-X %s.%s=%s", pkg, set[0], set[1]))
		}
	}
	return strings.Join(flags, " ")
}

// output runs a command in a folder of the source tree and returns what it printed on stdout.
func (t Tree) output(ctx context.Context, folder, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = filepath.Join(t.Source, folder)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return "", fmt.Errorf("in %s: %s: %w: %s", folder, strings.Join(cmd.Args, " "), err, exit.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("in %s: %s: %w", folder, strings.Join(cmd.Args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// runtime are the Debian packages of what runs beside Kubernetes' programs. nftables is for kube-proxy in that mode.
var runtime = []string{"containerd", "runc", "etcd-server", "nftables"}

// machine are packages whose libraries are the machine's own, for programs of the machine run beside these.
var machine = []string{"libc6", "libc-bin", "libgcc-s1", "libcrypt1"}

// Runtime unpacks them and the libraries that they need into debian.
func (t Tree) Runtime(ctx context.Context) error {
	folder := filepath.Join(t.Dir, "debian")
	done := filepath.Join(folder, "complete")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	t.Say("unpacking %s", strings.Join(runtime, ", "))
	files, err := debian.Fetch(ctx, filepath.Join(t.Source, "bin/debian"), runtime, machine)
	if err != nil {
		return err
	}
	for _, file := range files {
		name, _, _ := strings.Cut(filepath.Base(file), "_")
		if !slices.Contains(runtime, name) && (!strings.HasPrefix(name, "lib") || strings.Contains(name, "perl")) {
			continue // what installing them takes, such as perl
		}
		if err := debian.Unpack(ctx, file, folder, debian.Lean); err != nil {
			return err
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

// Images makes postern's own image as `make image` does, and those of the cluster and the suites, into images.
func (t Tree) Images(ctx context.Context) error {
	if _, err := t.output(ctx, ".", "make", "--no-print-directory", "image"); err != nil {
		return err
	}
	folder := filepath.Join(t.Dir, "images")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	own := filepath.Join(folder, "postern.tar")
	_ = os.Remove(own)
	if err := os.Link(filepath.Join(t.Source, "bin/postern-image.tar"), own); err != nil {
		return fmt.Errorf("take postern's image: %w", err)
	}
	kubernetes, err := t.output(ctx, "e2e/kubernetes", "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	_, err = images.Build(ctx, images.Config{
		Binaries: filepath.Join(t.Dir, "bin"), Kubernetes: kubernetes, Out: folder, Cache: filepath.Join(t.Source, "bin/debian"),
	})
	if err != nil {
		return err
	}
	return t.names(kubernetes)
}

// Names are those of the images that the cluster itself runs.
type Names struct{ Pause, CoreDNS string }

// names are written beside the images, for the cluster.
func (t Tree) names(kubernetes string) error {
	pause, err := images.Name(kubernetes, "Pause")
	if err != nil {
		return err
	}
	dns, err := images.CoreDNSName(filepath.Join(t.Dir, "bin", "coredns"))
	if err != nil {
		return err
	}
	data, err := json.Marshal(Names{pause, dns})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(t.Dir, "images", "names.json"), data, 0o644)
}

// ReadNames reads what Images wrote.
func ReadNames(dir string) (Names, error) {
	var names Names
	data, err := os.ReadFile(filepath.Join(dir, "images", "names.json"))
	if err != nil {
		return names, fmt.Errorf("find what `e2e build` makes: %w", err)
	}
	return names, json.Unmarshal(data, &names)
}

// APIServer makes kube-apiserver and etcd alone: the benchmarks need nothing else of a cluster.
func (t Tree) APIServer(ctx context.Context) error {
	t.Say("building kube-apiserver and etcd: some minutes the first time, seconds when Go's cache has them")
	return t.programs(ctx, slices.DeleteFunc(slices.Clone(programs), func(p program) bool {
		return p.name != "kube-apiserver" && p.name != "etcd"
	}))
}

// All makes everything.
func (t Tree) All(ctx context.Context) error {
	t.Say("building what the cluster needs: a quarter of an hour the first time, seconds when Go's cache has it")
	for _, step := range []func(context.Context) error{t.Programs, t.Runtime, t.Images} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}
