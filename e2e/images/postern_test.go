package images

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/postern-cni/postern/e2e/debian"
)

// standIns are programs in the place of ours, built faster.
func standIns(t *testing.T) PosternConfig {
	t.Helper()
	program := goProgram(t)
	bin := t.TempDir()
	for _, name := range []string{"policyd", "postern", "loopback"} {
		must(t, os.Symlink(program, filepath.Join(bin, name)))
	}
	return PosternConfig{
		Name: "registry.example/postern:v1", Version: "$VERSION", Revision: "$REVISION",
		Bin: bin, Source: "../..", Cache: "../../bin/debian",
	}
}

func TestTheDockerfileMakesTheSameImage(t *testing.T) {
	content, err := os.ReadFile("../../manifests/Dockerfile")
	must(t, err)
	dockerfile := string(content)
	r, err := postern(t.Context(), standIns(t))
	must(t, err)
	labels := map[string]string{}
	for _, match := range regexp.MustCompile(`(?m)^LABEL ([^= ]+)="([^"]*)"$`).FindAllStringSubmatch(dockerfile, -1) {
		labels[match[1]] = match[2]
	}
	if !maps.Equal(labels, r.Labels) {
		t.Errorf("the Dockerfile's labels are\n%v, not\n%v", labels, r.Labels)
	}
	entrypoint, err := json.Marshal(r.Entrypoint)
	must(t, err)
	for _, line := range []string{
		"ENTRYPOINT " + string(entrypoint),
		`ENV PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"`,
		`RUN make image-root VERSION="$VERSION" REVISION="$REVISION"`,
		"COPY --from=build /src/bin/image-root/ /",
		"FROM golang:" + goRelease(t) + "-bookworm AS build",
	} {
		if !slices.Contains(strings.Split(dockerfile, "\n"), line) {
			t.Errorf("the Dockerfile has no line %s", line)
		}
	}
	if strings.Count(dockerfile, "\nRUN ") != 1 || strings.Count(dockerfile, "\nCOPY ") != 2 {
		t.Error("the Dockerfile puts more into the image than `make image-root` does: nothing holds that against `make image`")
	}
}

// goRelease is the release of Go that the module asks for, without the last number.
func goRelease(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile("../../go.mod")
	must(t, err)
	match := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(string(content))
	if match == nil {
		t.Fatal("go.mod names no release of Go")
	}
	return match[1]
}

func TestMakeReadsTheImagesNameFromTheManifests(t *testing.T) {
	dir := t.TempDir()
	makefile, err := os.ReadFile("../../Makefile")
	must(t, err)
	put(t, filepath.Join(dir, "Makefile"), string(makefile), 0o644)
	put(t, filepath.Join(dir, "manifests/base/kustomization.yaml"),
		"resources:\n  - a.yaml\nimages:\n  - name: registry.example/x/postern\n    newTag: v9.9.9\n", 0o644)
	cmd := exec.Command("make", "-C", dir, "--dry-run", "image")
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKEFLAGS=") || strings.HasPrefix(v, "IMAGE=")
	})
	out, err := cmd.CombinedOutput()
	if want := `-name "registry.example/x/postern:v9.9.9"`; err != nil || !strings.Contains(string(out), want) {
		t.Errorf("make image does not build with %s: %v: %s", want, err, out)
	}
}

// root makes the root file system of postern's image, with stand-ins for our programs.
func root(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	err := PosternRoot(t.Context(), standIns(t), dir)
	unreachable := err != nil && strings.Contains(err.Error(), "Failed to fetch")
	if errors.Is(err, debian.ErrNoLists) || errors.Is(err, exec.ErrNotFound) || unreachable {
		t.Skipf("no Debian packages to be had: %v", err)
	}
	must(t, err)
	return dir
}

func TestPosternsImageHoldsItsProgramsIptablesAndTheirLicences(t *testing.T) {
	dir := root(t)
	for _, name := range []string{
		Policyd, Plugin, Loopback, "usr/sbin/iptables-nft-restore", "usr/sbin/ip6tables-legacy-save", "etc/os-release", "run", "tmp",
		"usr/share/doc/iptables/copyright", "usr/share/doc/libc6/copyright", "usr/share/doc/postern/copyright",
		"usr/share/common-licenses/GPL-2", "var/lib/dpkg/status.d/iptables",
	} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"bin/sh", "usr/bin/perl", "usr/share/man", "usr/share/doc/iptables/changelog.Debian.gz"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s has no use in the image", name)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("running programs in the root file system needs root")
	}
	for program, want := range map[string]string{
		"iptables-nft-restore": "(nf_tables)", "iptables-legacy-restore": "(legacy)", "ip6tables-nft-save": "(nf_tables)",
		"ip6tables-legacy-save": "(legacy)", "iptables": "(nf_tables)", "ip6tables-restore": "(nf_tables)",
	} {
		cmd := exec.Command("/usr/sbin/"+program, "--version")
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir, Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s --version: %v: %q, not %s", program, err, out, want)
		}
	}
}
