package debian

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Complete sees that every program and library under a root finds the libraries that it links: a package that was left out, or
// one that is broken, shows here and not in a container. What a program opens while it runs (dlopen) does not show.
func Complete(root string) error {
	needs := map[string]string{} // a library, and a file that needs it
	has := map[string]bool{}
	err := filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			return nil
		}
		if inLibraryFolder(root, file) {
			if _, err := os.Stat(file); err == nil { // a link that leads nowhere gives no library
				has[entry.Name()] = true
			}
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		return addNeeds(needs, root, file)
	})
	if err != nil {
		return fmt.Errorf("look at the libraries of %s: %w", root, err)
	}
	var missing []string
	for library, file := range needs {
		if !has[library] {
			missing = append(missing, fmt.Sprintf("%s needs %s", file, library))
		}
	}
	if missing != nil {
		slices.Sort(missing)
		return fmt.Errorf("the root file system is not complete: %s", strings.Join(missing, "; "))
	}
	return nil
}

// inLibraryFolder reports whether Debian's dynamic linker looks for libraries in the file's folder: /usr/lib, /usr/lib64, and
// /usr/lib/x86_64-linux-gnu or whatever it is called on the machine.
func inLibraryFolder(root, file string) bool {
	dir, err := filepath.Rel(filepath.Join(root, "usr"), filepath.Dir(file))
	if err != nil {
		return false
	}
	parts := strings.Split(dir, string(filepath.Separator))
	return dir == "lib" || dir == "lib64" || len(parts) == 2 && parts[0] == "lib" && strings.HasSuffix(parts[1], "-linux-gnu")
}

// addNeeds adds the libraries that a file links, if it is a program or a library.
func addNeeds(needs map[string]string, root, file string) error {
	binary, err := elf.Open(file)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // no program
		return nil
	}
	if err != nil {
		return err
	}
	defer binary.Close()
	libraries, err := binary.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, library := range libraries {
		needs[library], _ = filepath.Rel(root, file)
	}
	return nil
}
