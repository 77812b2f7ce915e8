package images

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// licenceWords begin the names of the files that hold a module's licence, in small letters.
var licenceWords = []string{"licen", "copying", "notice", "copyright", "patents"}

// licences returns the licence texts of all modules that Go programs are made of, as files of an image, and Go's own. A program
// built with the go command says itself what is in it.
func licences(ctx context.Context, programs ...string) ([]file, error) {
	modules := map[string]bool{}
	for _, program := range programs {
		released, err := modulesOf(program)
		if err != nil {
			return nil, err
		}
		for path, version := range released {
			modules[path+"@"+version] = true
		}
	}
	goroot, err := run(ctx, "go", "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	found := []file{{Path: docs + "golang/copyright", Mode: 0o644, From: filepath.Join(strings.TrimSpace(goroot), "LICENSE")}}
	dirs, err := moduleFolders(ctx, slices.Sorted(maps.Keys(modules)))
	if err != nil {
		return nil, err
	}
	for _, module := range slices.Sorted(maps.Keys(dirs)) {
		texts, err := licenceFiles(dirs[module])
		if err != nil {
			return nil, fmt.Errorf("find the licence of %s: %w", module, err)
		}
		for _, text := range texts {
			to := filepath.Join(docs, "postern", "modules", module, filepath.Base(text))
			found = append(found, file{Path: to, Mode: 0o644, From: text})
		}
	}
	return found, nil
}

// modulesOf returns the version of each module that is in a program, without those that are no release: a source tree's own.
func modulesOf(program string) (map[string]string, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("read which modules %s is made of: %w", program, err)
	}
	modules := map[string]string{}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Replace != nil {
			m = m.Replace
		}
		if strings.HasPrefix(m.Version, "v") {
			modules[m.Path] = m.Version
		}
	}
	return modules, nil
}

// moduleFolders returns where the go command keeps modules, by path@version. It fetches those that it does not have.
func moduleFolders(ctx context.Context, modules []string) (map[string]string, error) {
	if len(modules) == 0 { // without names, the command takes every module of the folder that it runs in
		return nil, nil
	}
	out, err := run(ctx, "go", append([]string{"mod", "download", "-json"}, modules...)...)
	if err != nil {
		return nil, err
	}
	dirs := map[string]string{}
	for list := json.NewDecoder(strings.NewReader(out)); ; {
		var module struct{ Path, Version, Dir string }
		if err := list.Decode(&module); errors.Is(err, io.EOF) {
			return dirs, nil
		} else if err != nil {
			return nil, fmt.Errorf("read what go mod download says: %w", err)
		}
		dirs[module.Path+"@"+module.Version] = module.Dir
	}
}

// licenceFiles returns the files in a folder that hold a licence. There must be one.
func licenceFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, entry := range entries {
		name := strings.ToLower(entry.Name())
		begins := func(word string) bool { return strings.HasPrefix(name, word) }
		if entry.Type().IsRegular() && slices.ContainsFunc(licenceWords, begins) && filepath.Ext(name) != ".go" {
			found = append(found, filepath.Join(dir, entry.Name()))
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s: %w", dir, fs.ErrNotExist)
	}
	return found, nil
}

func run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, args[0], err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
