package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Package is one version of a Debian package.
type Package struct {
	Name    string
	Version string
	File    string // the name that apt gives the file: name_version_architecture.deb, with %3a for the version's colon
}

// ErrNoLists is the error where apt knows none of the packages, or they are no longer where it would look.
var ErrNoLists = errors.New("apt's lists of packages are missing or out of date: run `apt-get update` as root")

// Closure returns the packages and all that they depend on, by name, without recommendations. The packages in without are left
// out, but not what they depend on.
func Closure(ctx context.Context, packages, without []string) ([]Package, error) {
	archives, err := os.MkdirTemp("", "apt-*") // apt lists only what it would fetch, and in here is nothing yet
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(archives)
	args := []string{
		"-qq", "-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache::archives=" + archives, "-o", "Debug::NoLocking=1",
		"--no-install-recommends", "--print-uris", "--yes", "install",
	}
	out, err := apt(ctx, "", append(args, packages...)...)
	if err != nil {
		return nil, fmt.Errorf("find what %s depend on: %w", strings.Join(packages, " "), err)
	}
	all, err := parseURIs(out)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p Package) bool { return slices.Contains(without, p.Name) }), nil
}

// uri is a line of `apt-get --print-uris`: 'address' file size checksum, the last of which may be missing.
var uri = regexp.MustCompile(`^'[^']+' (\S+_\S+_\S+\.deb) \d+`)

// parseURIs reads what `apt-get --print-uris` prints.
func parseURIs(out string) ([]Package, error) {
	var all []Package
	for line := range strings.Lines(out) {
		match := uri.FindStringSubmatch(line)
		if match == nil {
			return nil, fmt.Errorf("understand apt-get --print-uris: no package file in %q", strings.TrimSpace(line))
		}
		parts := strings.Split(match[1], "_")
		version, err := url.PathUnescape(parts[1])
		if err != nil || len(parts) != 3 {
			return nil, fmt.Errorf("understand apt-get --print-uris: %q is no name of a package file", match[1])
		}
		all = append(all, Package{Name: parts[0], Version: version, File: match[1]})
	}
	slices.SortFunc(all, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Fetch returns the files of the packages and of all that they depend on, in the order of their names, as apt knows them today.
// They are kept in the cache folder. Where apt's lists do not do and this process is root, it updates them.
func Fetch(ctx context.Context, cache string, packages, without []string) ([]string, error) {
	files, err := fetch(ctx, cache, packages, without)
	if err == nil || !errors.Is(err, ErrNoLists) || os.Geteuid() != 0 {
		return files, err
	}
	if _, updateErr := apt(ctx, "", "-qq", "update"); updateErr != nil {
		return nil, fmt.Errorf("%w; apt-get update did not work: %w", err, updateErr)
	}
	return fetch(ctx, cache, packages, without)
}

func fetch(ctx context.Context, cache string, packages, without []string) ([]string, error) {
	all, err := Closure(ctx, packages, without)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	var files []string
	var missing []Package
	for _, p := range all {
		file := filepath.Join(cache, p.File)
		if _, err := os.Stat(file); err != nil {
			missing = append(missing, p)
		}
		files = append(files, file)
	}
	return files, download(ctx, cache, missing)
}

// download brings packages into the cache. apt checks what it fetched against the signed lists; a file gets its place in the
// cache only after that.
func download(ctx context.Context, cache string, packages []Package) error {
	if len(packages) == 0 {
		return nil
	}
	dir, err := os.MkdirTemp(cache, ".download-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	args := []string{"-qq", "-o", "APT::Sandbox::User=root", "download"} // apt's own user could not write here
	for _, p := range packages {
		args = append(args, p.Name+"="+p.Version)
	}
	if _, err := apt(ctx, dir, args...); err != nil {
		return fmt.Errorf("fetch Debian packages: %w", err)
	}
	for _, p := range packages {
		if err := os.Rename(filepath.Join(dir, p.File), filepath.Join(cache, p.File)); err != nil {
			return fmt.Errorf("fetch Debian package %s: %w", p.Name, err)
		}
	}
	return nil
}

// unknown are apt's words for what newer lists may help.
var unknown = []string{"Unable to locate package", "has no installation candidate", "was not found", "404 "}

func apt(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%w: the packages come from Debian or a relative of it, through apt", err)
	}
	if err == nil {
		return stdout.String(), nil
	}
	said := strings.TrimSpace(stderr.String())
	if slices.ContainsFunc(unknown, func(words string) bool { return strings.Contains(said, words) }) {
		return "", fmt.Errorf("%w: %s", ErrNoLists, said)
	}
	return "", fmt.Errorf("apt-get: %w: %s", err, said)
}
