package images

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, file, content string, mode fs.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(file), 0o755))
	must(t, os.WriteFile(file, []byte(content), 0o644))
	must(t, os.Chmod(file, mode))
}

// inode says whether a file is still the one that it was.
func inode(t *testing.T, file string) uint64 {
	t.Helper()
	info, err := os.Stat(file)
	must(t, err)
	return info.Sys().(*syscall.Stat_t).Ino
}

func TestAnImageIsMadeAgainOnlyWhenItsPartsHaveChanged(t *testing.T) {
	dir := t.TempDir()
	out, program := filepath.Join(dir, "out", "image.tar"), filepath.Join(dir, "program")
	put(t, program, "one", 0o755)
	r := recipe{
		Names: []string{"registry.example/a:v1"}, Links: map[string]string{"bin/link": "program"}, Entrypoint: []string{"/bin/program"},
		Files: []file{{Path: "bin/program", Mode: 0o755, From: program}, {Path: "etc/passwd", Mode: 0o644, Content: "root"}},
	}
	build := func() {
		t.Helper()
		must(t, r.build(t.Context(), out, filepath.Join(dir, "cache")))
	}
	build()
	last := inode(t, out)
	for _, step := range []struct {
		what   string
		change func()
		again  bool
	}{
		{"nothing", func() {}, false},
		{"the folder that a part comes from", func() {
			moved := filepath.Join(dir, "elsewhere")
			must(t, os.Rename(program, moved))
			program, r.Files[0].From = moved, moved
		}, false},
		{"what is in a file", func() { put(t, program, "two", 0o755) }, true},
		{"a label", func() { r.Labels = map[string]string{"a": "b"} }, true},
		{"a name", func() { r.Names = []string{"registry.example/a:v2"} }, true},
		{"a link", func() { r.Links["bin/link"] = "/bin/program" }, true},
		{"that the image is gone", func() { must(t, os.Rename(out, out+".old")) }, true},
	} {
		step.change()
		build()
		if now := inode(t, out); (now != last) != step.again {
			t.Errorf("%s changed: the image was made again: %t", step.what, now != last)
		}
		last = inode(t, out)
	}
	left, err := filepath.Glob(filepath.Join(dir, "out", ".*"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("%q is left", left)
	}
}

func TestFilesAndLinksReplaceWhatIsThere(t *testing.T) {
	root, outside := t.TempDir(), filepath.Join(t.TempDir(), "passwd")
	put(t, outside, "the machine's", 0o644)
	must(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
	must(t, os.Symlink(outside, filepath.Join(root, "etc/passwd")))
	put(t, filepath.Join(root, "bin/sh"), "busybox", 0o755)
	r := recipe{
		Files: []file{{Path: "etc/passwd", Mode: 0o600, Content: "root"}}, Links: map[string]string{"bin/sh": "dash"},
		Folders: map[string]fs.FileMode{"uploads": 0o777},
	}
	must(t, r.assemble(t.Context(), nil, root))
	if content, _ := os.ReadFile(outside); string(content) != "the machine's" {
		t.Errorf("a file outside of the root now holds %q", content)
	}
	if content, _ := os.ReadFile(filepath.Join(root, "etc/passwd")); string(content) != "root" {
		t.Errorf("etc/passwd holds %q", content)
	}
	if target, _ := os.Readlink(filepath.Join(root, "bin/sh")); target != "dash" {
		t.Errorf("bin/sh leads to %q", target)
	}
	if info, err := os.Stat(filepath.Join(root, "uploads")); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("uploads: %v, %v", info, err)
	}
}

func TestBusyboxStandsInForProgramsThatAreMissing(t *testing.T) {
	root := t.TempDir()
	put(t, filepath.Join(root, "usr/bin/busybox"), "#!/bin/sh\nprintf '%s\\n' busybox ls nc ip\n", 0o755)
	put(t, filepath.Join(root, "usr/bin/nc"), "real", 0o755)
	must(t, os.MkdirAll(filepath.Join(root, "usr/sbin"), 0o755))
	must(t, os.Symlink("nowhere/ip", filepath.Join(root, "usr/sbin/ip")))
	must(t, applets(t.Context(), root))
	entries, err := os.ReadDir(filepath.Join(root, "usr/bin"))
	must(t, err)
	var links []string
	for _, entry := range entries {
		if target, err := os.Readlink(filepath.Join(root, "usr/bin", entry.Name())); err == nil {
			links = append(links, entry.Name()+"->"+target)
		}
	}
	if want := []string{"ls->busybox"}; !slices.Equal(links, want) {
		t.Errorf("the links are %q, not %q", links, want)
	}
}

// manifest is a list of images in upstream's form.
const manifest = `package image

func init() {
	initRegistry = RegistryList{
		PromoterE2eRegistry: "registry.example/tests",
		GcRegistry:          "registry.example",
	}
	configs[Agnhost] = Config{list.PromoterE2eRegistry, "agnhost", "2.66.1"}
	configs[BusyBox] = Config{list.PromoterE2eRegistry, "busybox", "1.37.0-2"}
	// Pause - a comment
	configs[Pause] = Config{list.GcRegistry, "pause", "3.10.2"}
	configs[Nowhere] = Config{list.OtherRegistry, "nowhere", "1"}
}
`

func TestImagesAreNamedAsTheSuitesNameThem(t *testing.T) {
	kubernetes := t.TempDir()
	put(t, filepath.Join(kubernetes, "test/utils/image/manifest.go"), manifest, 0o644)
	for constant, want := range map[string]string{
		Pause: "registry.example/pause:3.10.2", Busybox: "registry.example/tests/busybox:1.37.0-2",
		Agnhost: "registry.example/tests/agnhost:2.66.1",
	} {
		if got, err := Name(kubernetes, constant); got != want {
			t.Errorf("%s is %q, not %q (%v)", constant, got, want, err)
		}
	}
	for _, constant := range []string{"Nowhere", "Missing"} {
		if got, err := Name(kubernetes, constant); err == nil || !strings.Contains(err.Error(), constant) {
			t.Errorf("%s is %q: the error must name the image: %v", constant, got, err)
		}
	}
}

func TestTheSuitesOfOurReleaseNameEveryImage(t *testing.T) {
	out, err := exec.Command("go", "-C", "../kubernetes", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes").Output()
	kubernetes := strings.TrimSpace(string(out))
	if err != nil || kubernetes == "" {
		t.Skipf("the module k8s.io/kubernetes was not downloaded (%v)", err)
	}
	for _, constant := range []string{Pause, Agnhost, Busybox, GlibcDNS} {
		if name, err := Name(kubernetes, constant); err != nil {
			t.Error(err)
		} else {
			t.Logf("%s is %s", constant, name)
		}
	}
}

// goProgram builds a program that links modules: this package's own. A test binary does not say which it links.
func goProgram(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "images")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./cmd").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return program
}

func TestAProgramComesWithTheLicencesOfItsModules(t *testing.T) {
	program := goProgram(t)
	files, err := licences(t.Context(), program)
	must(t, err)
	found := map[string]bool{}
	for _, f := range files {
		if content, err := os.ReadFile(f.From); err != nil || len(content) == 0 {
			t.Errorf("%s: nothing in %s (%v)", f.Path, f.From, err)
		}
		found[f.Path] = true
	}
	modules, err := modulesOf(program)
	must(t, err)
	const specification = "github.com/opencontainers/image-spec"
	for _, want := range []string{
		"usr/share/doc/golang/copyright", "usr/share/doc/postern/modules/" + specification + "@" + modules[specification] + "/LICENSE",
	} {
		if !found[want] {
			t.Errorf("%s is missing: %q", want, slices.Sorted(maps.Keys(found)))
		}
	}
}

func TestAModuleWithoutALicenceIsAnError(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "license.go"), "package license", 0o644)
	if files, err := licenceFiles(dir); err == nil {
		t.Errorf("%q were taken for licences", files)
	}
	put(t, filepath.Join(dir, "LICENCE.md"), "words", 0o644)
	put(t, filepath.Join(dir, "NOTICE"), "words", 0o644)
	if files, err := licenceFiles(dir); len(files) != 2 {
		t.Errorf("the licences are %q (%v)", files, err)
	}
}
