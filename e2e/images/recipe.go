package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/postern-cni/postern/e2e/debian"
	"github.com/postern-cni/postern/e2e/image"
)

// assembly is raised when the same recipe becomes another image than before.
const assembly = 1

// recipe says what an image is made of. Later parts go over earlier ones.
type recipe struct {
	Names    []string
	Packages []string               // of Debian, with what they depend on
	Without  []string               // packages of those that are left out: what only maintainer scripts need
	Folders  map[string]fs.FileMode // by path in the image, without a leading slash
	Files    []file
	Links    map[string]string // by path in the image, where they lead
	Applets  bool              // a link to busybox for each of its programs that is not there yet

	Entrypoint, Cmd []string
	Labels          map[string]string
}

// file is a file in an image: a copy of one, or the content given.
type file struct {
	Path    string
	Mode    fs.FileMode
	From    string
	Content string
	Digest  string // of what From holds: the place is no input
}

// build makes the image's file, unless it is there and was made of the same.
func (r recipe) build(ctx context.Context, out, cache string) error {
	packages, err := r.fetch(ctx, cache)
	if err != nil {
		return fmt.Errorf("build image %s: %w", out, err)
	}
	inputs, err := r.inputs(packages)
	if err != nil {
		return fmt.Errorf("build image %s: %w", out, err)
	}
	if before, err := os.ReadFile(out + ".inputs"); err == nil && string(before) == inputs {
		if _, err := os.Stat(out); err == nil {
			return nil
		}
	}
	if err := r.write(ctx, packages, out); err != nil {
		return fmt.Errorf("build image %s: %w", out, err)
	}
	return os.WriteFile(out+".inputs", []byte(inputs), 0o644)
}

func (r recipe) fetch(ctx context.Context, cache string) ([]string, error) {
	if len(r.Packages) == 0 {
		return nil, nil
	}
	return debian.Fetch(ctx, cache, r.Packages, r.Without)
}

// inputs describes what an image is made of. Two that are equal make the same image.
func (r recipe) inputs(packages []string) (string, error) {
	described := struct {
		Assembly     int
		Architecture string
		Recipe       recipe
		Debian       []string
		Omit         []string
	}{Assembly: assembly, Architecture: runtime.GOARCH, Recipe: r, Omit: debian.Lean}
	for _, p := range packages {
		described.Debian = append(described.Debian, filepath.Base(p))
	}
	described.Recipe.Files = slices.Clone(r.Files)
	for i, f := range r.Files {
		if f.From == "" {
			continue
		}
		digest, err := sha256Of(f.From)
		if err != nil {
			return "", err
		}
		described.Recipe.Files[i].From, described.Recipe.Files[i].Digest = "", digest
	}
	text, err := json.MarshalIndent(described, "", "  ")
	return string(text) + "\n", err
}

func sha256Of(file string) (string, error) {
	from, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer from.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, from); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func (r recipe) write(ctx context.Context, packages []string, out string) error {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	root, err := os.MkdirTemp(filepath.Dir(out), ".root-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	if err := r.assemble(ctx, packages, root); err != nil {
		return err
	}
	return image.Write(out, image.Image{
		Names: r.Names, Root: root, Entrypoint: r.Entrypoint, Cmd: r.Cmd, Labels: r.Labels,
	})
}

// assemble makes the image's root file system in a folder.
func (r recipe) assemble(ctx context.Context, packages []string, root string) error {
	for _, p := range packages {
		if err := debian.Unpack(ctx, p, root, debian.Lean); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Folders)) {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(root, name), r.Folders[name]); err != nil {
			return err
		}
	}
	for _, f := range r.Files {
		if err := f.put(root); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Links)) {
		if err := link(root, name, r.Links[name]); err != nil {
			return err
		}
	}
	if r.Applets {
		if err := applets(ctx, root); err != nil {
			return err
		}
	}
	return debian.Complete(root)
}

// put writes a file, in place of what a package may have there: a link is not followed out of the root.
func (f file) put(root string) error {
	name := filepath.Join(root, f.Path)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	to, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	var from io.ReadCloser = io.NopCloser(strings.NewReader(f.Content))
	if f.From != "" {
		if from, err = os.Open(f.From); err != nil {
			return errors.Join(err, to.Close())
		}
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, from.Close(), to.Chmod(f.Mode), to.Close())
}

// link makes a link, in place of what a package may have there.
func link(root, name, target string) error {
	place := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		return err
	}
	if err := os.Remove(place); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(target, place)
}

// applets links each of busybox's programs to it that is not there already, in /usr/bin or /usr/sbin.
func applets(ctx context.Context, root string) error {
	busybox := filepath.Join(root, "usr/bin/busybox")
	list, err := exec.CommandContext(ctx, busybox, "--list").Output() // static: it runs outside of its root too
	if err != nil {
		return fmt.Errorf("list busybox's programs: %w", err)
	}
	for _, name := range strings.Fields(string(list)) {
		if there(root, "usr/bin", name) || there(root, "usr/sbin", name) {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(root, "usr/bin", name)); err != nil {
			return err
		}
	}
	return nil
}

func there(root, folder, name string) bool {
	_, err := os.Lstat(filepath.Join(root, folder, name))
	return err == nil
}
