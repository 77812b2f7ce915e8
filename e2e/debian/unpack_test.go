package debian

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestPatternsLeaveOutWhatProgramsDoNotRead(t *testing.T) {
	for name, want := range map[string]bool{
		"usr/share/doc/libc6/changelog.gz":    true,
		"usr/share/doc/libc6/examples/a/b":    true,
		"usr/share/doc/libc6/copyright":       false,
		"usr/share/doc/libstdc++6":            false, // a link to the folder of another package
		"usr/share/common-licenses/GPL-3":     false,
		"usr/share/man":                       true,
		"usr/share/man/man8/iptables.8.gz":    true,
		"usr/lib/x86_64-linux-gnu/gconv/a.so": true,
		"usr/lib/x86_64-linux-gnu/libc.so.6":  false,
		"usr/sbin/iptables":                   false,
		"var/cache/apt/a":                     true,
		"var/cache":                           false,
		"tmp":                                 false,
	} {
		if got := omitted(name, Lean); got != want {
			t.Errorf("%s: left out is %t, not %t", name, got, want)
		}
	}
}

func TestUnpackedFilesAreWhereLinksIntoUsrLead(t *testing.T) {
	needTools(t)
	const control = "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: of a test\n"
	file := makePackage(t, t.TempDir(), control, func(root string) {
		for name, mode := range map[string]fs.FileMode{
			"lib/x86_64-linux-gnu/liba.so.1": 0o644, "sbin/a": 0o755, "usr/bin/su": 0o755 | fs.ModeSetuid,
			"usr/share/doc/a/changelog.gz": 0o644, "usr/share/doc/a/copyright": 0o644,
		} {
			must(t, os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755))
			must(t, os.WriteFile(filepath.Join(root, name), []byte("this is "+name), 0o644))
			must(t, os.Chmod(filepath.Join(root, name), mode))
		}
		must(t, os.Symlink("liba.so.1", filepath.Join(root, "lib/x86_64-linux-gnu/liba.so")))
		must(t, os.Link(filepath.Join(root, "sbin/a"), filepath.Join(root, "sbin/b")))
		must(t, os.Mkdir(filepath.Join(root, "tmp"), 0o755))
		must(t, os.Chmod(filepath.Join(root, "tmp"), 0o777|fs.ModeSticky))
	})
	root := t.TempDir()
	for range 2 { // over itself: as two packages with the same file
		must(t, Unpack(t.Context(), file, root, Lean))
	}
	for name, want := range map[string]fs.FileMode{
		"usr/lib/x86_64-linux-gnu/liba.so.1": 0o644, "usr/sbin/a": 0o755, "usr/sbin/b": 0o755,
		"usr/bin/su": 0o755 | fs.ModeSetuid, "tmp": 0o777 | fs.ModeSticky | fs.ModeDir, "usr/share/doc/a/copyright": 0o644,
		"var/lib/dpkg/status.d/a": 0o644, "sbin": fs.ModeSymlink | 0o777, "lib64": fs.ModeSymlink | 0o777,
		"usr/lib/x86_64-linux-gnu/liba.so": fs.ModeSymlink | 0o777,
	} {
		info, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
		} else if info.Mode() != want {
			t.Errorf("%s: mode %v, not %v", name, info.Mode(), want)
		}
	}
	if content, err := os.ReadFile(filepath.Join(root, "sbin/b")); !strings.HasPrefix(string(content), "this is sbin/") {
		t.Errorf("the second name of sbin/a holds %q (%v)", content, err)
	}
	if _, err := os.Stat(filepath.Join(root, "usr/share/doc/a/changelog.gz")); err == nil {
		t.Error("the changelog was unpacked")
	}
	description, err := os.ReadFile(filepath.Join(root, "var/lib/dpkg/status.d/a"))
	if !strings.Contains(string(description), "Package: a\n") {
		t.Errorf("the description is %q (%v)", description, err)
	}
}

func TestAFileThatIsNoPackageIsAnError(t *testing.T) {
	needTools(t)
	file := filepath.Join(t.TempDir(), "a_1_all.deb")
	must(t, os.WriteFile(file, []byte("no package"), 0o644))
	if err := Unpack(t.Context(), file, t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "a_1_all.deb") {
		t.Errorf("the error must name the file: %v", err)
	}
}

func TestNothingIsWrittenOutsideOfTheRoot(t *testing.T) {
	for _, header := range []tar.Header{
		{Typeflag: tar.TypeReg, Name: "../a"},
		{Typeflag: tar.TypeReg, Name: "./usr/../../a"},
		{Typeflag: tar.TypeLink, Name: "./a", Linkname: "../../etc/passwd"},
		{Typeflag: tar.TypeChar, Name: "./dev/null"},
	} {
		var content bytes.Buffer
		to := tar.NewWriter(&content)
		must(t, to.WriteHeader(&header))
		must(t, to.Close())
		if err := extract(&content, t.TempDir(), nil); err == nil {
			t.Errorf("%c %s was written", header.Typeflag, header.Name)
		}
	}
}

// shell is a program that links libraries, and those.
func shell(t *testing.T) (string, []string) {
	t.Helper()
	out, err := exec.Command("ldd", "/bin/sh").Output()
	if err != nil {
		t.Skipf("/bin/sh links no library here, or there is no ldd: %v", err)
	}
	var libraries []string
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			libraries = append(libraries, word)
		}
	}
	return "/bin/sh", libraries
}

func TestARootWithoutALibraryIsNotComplete(t *testing.T) {
	program, libraries := shell(t)
	root := t.TempDir()
	put := func(file, folder string) {
		content, err := os.ReadFile(file)
		must(t, err)
		must(t, os.MkdirAll(filepath.Join(root, folder), 0o755))
		must(t, os.WriteFile(filepath.Join(root, folder, filepath.Base(file)), content, 0o755))
	}
	put(program, "usr/bin")
	must(t, os.WriteFile(filepath.Join(root, "usr/bin/script"), []byte("#!"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "usr/bin/empty"), nil, 0o755))
	if err := Complete(root); err == nil || !strings.Contains(err.Error(), "usr/bin/sh needs libc.so.6") {
		t.Errorf("without libc: %v", err)
	}
	for _, library := range libraries {
		put(library, "opt/lib")
	}
	if err := Complete(root); err == nil {
		t.Error("libraries in a folder where the dynamic linker does not look do not help")
	}
	for _, library := range libraries {
		put(library, "usr/lib/x86_64-linux-gnu")
	}
	must(t, Complete(root))
}
