package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// Files that a run writes: the first in its folder, the plots there and beside the page.
const (
	resultFile = "results.json"
	ratiosFile = "performance.svg"
	growthFile = "performance-growth.svg"
	pageFile   = "performance.md"
)

// tell prints what was found, and writes it. Its error is that a line falls short, or that something could not be written.
func (o options) tell(r table.Result, stdout io.Writer) error {
	if err := (table.Text{Colour: wantsColour(stdout)}).Write(stdout, r); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.dir, resultFile), text, 0o644); err != nil {
		return err
	}
	if _, err := plots(o.dir, r); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "Every sample is in %s, plots are beside it.\n", filepath.Join(o.dir, resultFile))
	if o.record != "" {
		if err := record(o.record, r); err != nil {
			return err
		}
	}
	if short := r.Short(); len(short) > 0 {
		return fmt.Errorf("%d lines fall short of their marks", len(short))
	}
	return nil
}

// plots writes them into a folder, and returns their names.
func plots(folder string, r table.Result) ([]string, error) {
	var names []string
	for _, plot := range []struct {
		name string
		text []byte
	}{{ratiosFile, table.Ratios(r)}, {growthFile, table.Growth(r)}} {
		if plot.text == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(folder, plot.name), plot.text, 0o644); err != nil {
			return nil, err
		}
		names = append(names, plot.name)
	}
	return names, nil
}

// record makes the page show this run.
func record(folder string, r table.Result) error {
	if len(r.Failed) > 0 {
		return errors.New("the page is left as it is: it shows runs in which nothing broke")
	}
	file := filepath.Join(folder, pageFile)
	page, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read the page: %w", err)
	}
	names, err := plots(folder, r)
	if err != nil {
		return err
	}
	text, err := table.Replace(string(page), table.Section(r, names...))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, []byte(text), 0o644)
}

// wantsColour: a terminal does, if its user has not said otherwise (no-color.org).
func wantsColour(out io.Writer) bool {
	file, isFile := out.(*os.File)
	if !isFile || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}
