package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/postern-cni/postern/pkg/object"
)

// Folder is a folder of manifests: files that end in .yaml, .yml or .json, and do not begin with a dot; folders in it are not
// looked into. A file that cannot be read as manifests keeps what it last declared; until every file could be read once, the
// folder is not [Folder.Synced].
type Folder struct {
	dir     string
	changes signal
	nodes   signal // nodes have changed

	mu       sync.Mutex
	synced   bool
	files    map[string]*file
	snapshot object.Cluster
	taken    object.Cluster // what Take has told of
	told     bool           // that is the snapshot
	problems []string
}

// file is what is known of one file.
type file struct {
	text    []byte
	objects *objects // what it last declared; nil if it never could be read
	err     error
}

// FromFolder returns a source that reads a folder once it runs.
func FromFolder(dir string) *Folder {
	return &Folder{dir: dir, changes: newSignal(), nodes: newSignal(), files: map[string]*file{}}
}

// ReadFolder reads a folder once. The error joins all that is wrong with all files.
func ReadFolder(dir string) (object.Cluster, error) {
	f := FromFolder(dir)
	if err := f.read(); err != nil {
		return object.Cluster{}, err
	}
	if len(f.problems) > 0 {
		return object.Cluster{}, errors.New(strings.Join(f.problems, "\n"))
	}
	return f.snapshot, nil
}

// Changes implements [Source].
func (f *Folder) Changes() <-chan struct{} { return f.changes }

// Synced implements [Source].
func (f *Folder) Synced() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.synced
}

// NodeChanges implements [Source].
func (f *Folder) NodeChanges() <-chan struct{} { return f.nodes }

// Nodes implements [Source].
func (f *Folder) Nodes() ([]*object.Node, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snapshot.Nodes, f.synced
}

// Snapshot implements [Source].
func (f *Folder) Snapshot() object.Cluster {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snapshot
}

// Take implements [Source].
func (f *Folder) Take() object.Changes {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.told {
		return object.Changes{}
	}
	changes := object.Diff(f.taken, f.snapshot)
	f.taken, f.told = f.snapshot, true
	return changes
}

// Problems implements [Source].
func (f *Folder) Problems() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problems
}

// Reread implements [Source].
func (f *Folder) Reread(context.Context) error { return f.read() }

// Times in which a folder is looked at again.
const (
	// settle is how long after a write in place a file is read, for its writer may not be done, and after its end.
	settle = 50 * time.Millisecond
	// look finds what notifications missed, and a folder that was replaced as a whole.
	look = 10 * time.Second
)

// Run implements [Source]: it watches the folder.
func (f *Folder) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.dir, err)
	}
	defer watcher.Close()
	if err := watcher.Add(f.dir); err != nil {
		return fmt.Errorf("watch %s: %w", f.dir, err)
	}
	if err := f.read(); err != nil {
		return err
	}
	pending := map[string]bool{} // files to be read once they have settled
	var wait <-chan time.Time
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watcher.Events:
			if now, name := f.ready(e, pending); now {
				f.readFiles(name)
			} else if wait == nil {
				wait = time.After(settle)
			}
			continue
		case <-wait:
			wait = nil
			f.readFiles(slices.Collect(maps.Keys(pending))...)
			clear(pending)
			continue
		case <-watcher.Errors: // events were lost: read everything
		case <-ticker.C:
			_ = watcher.Add(f.dir) // the folder may be another one of that name by now; if it is gone, read says so
		}
		_ = f.read() // shown by Problems
	}
}

// ready reports whether the file of an event can be read at once, as one that was put into its place whole. What is being written
// may not be done; what went may be about to come under another name, and until then it must not be missed.
func (f *Folder) ready(e fsnotify.Event, pending map[string]bool) (now bool, name string) {
	name = filepath.Base(e.Name)
	if e.Has(fsnotify.Create) && len(pending) == 0 && !strings.HasPrefix(name, swapped) {
		return true, name
	}
	pending[name] = true
	return false, name
}

// swapped begins the names in a volume made of a ConfigMap: all its files change when the link "..data" does.
const swapped = ".."

// readFiles brings what is known of some files up to date.
func (f *Folder) readFiles(names ...string) {
	if slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, swapped) }) {
		_ = f.read() // shown by Problems
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := false
	for _, name := range names {
		if !manifest(name) {
			continue
		}
		same, present := f.readFile(name)
		if !present {
			delete(f.files, name)
		}
		changed = changed || !same
	}
	if changed {
		f.assemble()
		f.changes.send()
	}
}

// read brings what is known up to date with the folder. A file that is gone may have got another name since the folder was listed,
// so it is listed again before anything is dropped.
func (f *Folder) read() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed, gone, err := f.readListed()
	if err == nil && len(gone) > 0 {
		var more bool
		more, gone, err = f.readListed()
		changed = changed || more
	}
	if err != nil {
		err = fmt.Errorf("read the folder of manifests: %w", err)
		f.problems = []string{err.Error()}
		return err
	}
	for _, name := range gone {
		delete(f.files, name)
	}
	if changed || len(gone) > 0 || !f.synced {
		f.assemble()
		f.changes.send()
	}
	return nil
}

// readListed reads the files that are there, and says which of the known ones are not.
func (f *Folder) readListed() (changed bool, gone []string, err error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return false, nil, err
	}
	there := map[string]bool{}
	for _, e := range entries {
		if !manifest(e.Name()) {
			continue
		}
		same, present := f.readFile(e.Name())
		there[e.Name()] = present
		changed = changed || !same
	}
	for name := range f.files {
		if !there[name] {
			gone = append(gone, name)
		}
	}
	return changed, gone, nil
}

// readFile reads one file, unless its text is what it was.
func (f *Folder) readFile(name string) (same, present bool) {
	text, err := os.ReadFile(filepath.Join(f.dir, name))
	was := f.files[name]
	if errors.Is(err, fs.ErrNotExist) { // gone since the folder was listed
		return was == nil, false
	}
	if was == nil {
		was = &file{}
		f.files[name] = was
	} else if err == nil && bytes.Equal(text, was.text) {
		return true, true
	}
	was.text, was.err = text, err
	if err != nil {
		return false, true
	}
	objects, err := parse(text)
	was.err = err
	if err == nil {
		was.objects = objects
	}
	return false, true
}

func manifest(name string) bool {
	return !strings.HasPrefix(name, ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// assemble makes one cluster of what the files declare.
func (f *Folder) assemble() {
	var files []named
	var problems []string
	complete := true
	for name, is := range f.files {
		if is.err != nil {
			problems = append(problems, fmt.Sprintf("%s: %s", name, oneLine(is.err)))
		}
		if is.objects == nil {
			complete = false
			continue
		}
		files = append(files, named{name, is.objects})
	}
	slices.SortFunc(files, func(a, b named) int { return strings.Compare(a.file, b.file) })
	var twice []string
	was := f.snapshot.Nodes
	f.snapshot, twice = merge(files)
	f.told = false
	if !f.synced && complete || !reflect.DeepEqual(was, f.snapshot.Nodes) {
		f.nodes.send()
	}
	slices.Sort(problems)
	f.problems = append(problems, twice...)
	f.synced = f.synced || complete
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
