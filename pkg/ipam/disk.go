package ipam

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// disk makes every change to the state. Each is atomic, and step is called before each, so that tests can end a process
// between any two.
type disk struct {
	dir    string
	before func() // nil except in tests
}

func (d *disk) step() {
	if d.before != nil {
		d.before()
	}
}

func (d *disk) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}

// write puts a whole file in place. One temporary file is enough: the flock is held.
func (d *disk) write(path string, data []byte) error {
	temp := d.path("temp")
	d.step()
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return err
	}
	d.step()
	return os.Rename(temp, path)
}

func (d *disk) rename(from, to string) error {
	d.step()
	return os.Rename(from, to)
}

// remove succeeds where there is no such file.
func (d *disk) remove(path string) error {
	d.step()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (d *disk) exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// read returns nil where there is no such file.
func (d *disk) read(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

// names lists a folder, sorted; a missing one is empty.
func (d *disk) names(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}
