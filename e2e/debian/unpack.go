package debian

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// merged are the top folders that are links into /usr since Debian 12.
var merged = []string{"bin", "lib", "lib64", "sbin"}

// Lean are patterns for Unpack: what programs in a container do not read. Licences stay. Of tc's plug-ins one links a library of
// a package that iproute2 only recommends.
var Lean = []string{
	"etc/cron*", "etc/init.d", "etc/default", "etc/update-motd.d", "etc/logrotate.d",
	"usr/lib/*/gconv", "usr/lib/*/audit", "usr/lib/locale", "usr/lib/mime", "usr/lib/systemd", "usr/lib/tmpfiles.d",
	"usr/lib/*/tc",
	"usr/share/base-files", "usr/share/bash-completion", "usr/share/bug", "usr/share/doc-base", "usr/share/gcc*", "usr/share/gdb",
	"usr/share/i18n", "usr/share/info", "usr/share/lintian", "usr/share/locale", "usr/share/man", "usr/share/menu",
	"usr/share/perl5", "usr/share/zsh", "usr/share/doc/*/*", "!usr/share/doc/*/copyright", "var/cache/*", "var/lib/*",
}

// Root fetches packages with what they depend on (see Fetch) and unpacks them into a folder (see Unpack), which is then complete.
func Root(ctx context.Context, cache, root string, packages, without, omit []string) error {
	files, err := Fetch(ctx, cache, packages, without)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := Unpack(ctx, file, root, omit); err != nil {
			return err
		}
	}
	return Complete(root)
}

// Unpack unpacks a package file into a folder, without what matches one of the patterns (path.Match, against a path from the
// root without a leading slash; a folder that matches goes with all that is in it). What matches a pattern after an exclamation
// mark stays in any case. The package's own description is written to
// var/lib/dpkg/status.d, where scanners look for what an image without dpkg is made of.
//
// Modes are kept; owners are not, for everything belongs to whoever unpacks.
func Unpack(ctx context.Context, file, root string, omit []string) error {
	for _, name := range merged {
		if err := mergedLink(root, name); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", file, err)
	}
	readErr := extract(stdout, root, omit)
	_, _ = io.Copy(io.Discard, stdout) // or dpkg-deb complains about the pipe, and hides the reason
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", file, err, strings.TrimSpace(stderr.String()))
	}
	return describe(ctx, file, root)
}

// describe writes a package's control file to where scanners look for it.
func describe(ctx context.Context, file, root string) error {
	control, err := exec.CommandContext(ctx, "dpkg-deb", "--field", file).Output()
	if err != nil {
		return fmt.Errorf("read the description in %s: %w", file, err)
	}
	dir := filepath.Join(root, "var", "lib", "dpkg", "status.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name, _, _ := strings.Cut(filepath.Base(file), "_")
	return os.WriteFile(filepath.Join(dir, name), control, 0o644)
}

func mergedLink(root, name string) error {
	if err := os.MkdirAll(filepath.Join(root, "usr", name), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("usr/"+name, filepath.Join(root, name)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// extract writes what a package's tar holds.
func extract(from io.Reader, root string, omit []string) error {
	files := tar.NewReader(from)
	for {
		header, err := files.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name, err := place(header.Name)
		if err != nil {
			return err
		}
		if name == "." || omitted(name, omit) || header.Typeflag == tar.TypeSymlink && isMerged(name) {
			continue
		}
		if err := write(files, header, root, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

// place is where a package's file goes, as a path from the root: /usr/lib/x for /lib/x.
func place(name string) (string, error) {
	name = path.Clean(name)
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("%q leads out of the root", name)
	}
	if first, _, deeper := strings.Cut(name, "/"); deeper && isMerged(first) {
		return "usr/" + name, nil
	}
	return name, nil
}

func isMerged(name string) bool { return slices.Contains(merged, name) }

// omitted reports whether Unpack's patterns leave a path out.
func omitted(name string, patterns []string) bool {
	matches := func(name, before string) bool {
		return slices.ContainsFunc(patterns, func(pattern string) bool {
			pattern, is := strings.CutPrefix(pattern, before)
			match, _ := path.Match(pattern, name)
			return is && match
		})
	}
	if matches(name, "!") {
		return false
	}
	for ; name != "."; name = path.Dir(name) {
		if matches(name, "") {
			return true
		}
	}
	return false
}

func write(from io.Reader, header *tar.Header, root, name string) error {
	file := filepath.Join(root, name)
	mode := header.FileInfo().Mode()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeDir:
		if isMerged(name) {
			return nil
		}
		if err := os.MkdirAll(file, 0o755); err != nil {
			return err
		}
		return os.Chmod(file, mode)
	case tar.TypeReg:
		return writeFile(from, file, mode)
	case tar.TypeSymlink:
		return replace(file, func() error { return os.Symlink(header.Linkname, file) })
	case tar.TypeLink:
		target, err := place(header.Linkname)
		if err != nil {
			return err
		}
		return replace(file, func() error { return os.Link(filepath.Join(root, target), file) })
	}
	return fmt.Errorf("a file of type %q is not expected in a package", header.Typeflag)
}

func writeFile(from io.Reader, file string, mode fs.FileMode) error {
	var to *os.File
	err := replace(file, func() (err error) {
		to, err = os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Chmod(mode), to.Close())
}

// replace creates a file in the place of one that another package may have put there.
func replace(file string, create func() error) error {
	err := create()
	if errors.Is(err, fs.ErrExist) {
		if err := os.Remove(file); err != nil {
			return err
		}
		return create()
	}
	return err
}
