// Package build makes what a cluster of package cluster is made of, in one folder, and makes it again only where something has
// changed: Kubernetes' programs, the upstream suites, and helpers from Go modules, whose versions e2e/kubernetes and e2e/coredns
// pin; a container runtime and etcd from Debian packages, unpacked and not installed; and images, for there is no registry.
package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
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
	{"agnhost", "e2e/kubernetes", "k8s.io/kubernetes/test/images/agnhost", false},
	{"ginkgo", "e2e/kubernetes", "github.com/onsi/ginkgo/v2/ginkgo", false},
	{"e2e.test", "e2e/kubernetes", "k8s.io/kubernetes/test/e2e", true},
	{"coredns", "e2e/coredns", "github.com/coredns/coredns", false},
	{"pause", "e2e", "./pause", false},
}

// Tree is where things are built from, and to.
type Tree struct {
	Source string // the source tree
	Dir    string // what is built: bin, debian, images
	Say    func(format string, args ...any)
}

// Programs builds everything that comes from Go modules, into bin. Go's own cache makes a second time quick.
func (t Tree) Programs(ctx context.Context) error {
	version, err := t.output(ctx, "e2e/kubernetes", "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	for _, p := range programs {
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
