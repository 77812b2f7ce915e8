package world

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Write puts an object of the API, or a v1 List of them, into the folder that policyd reads, in one step, so that a reader never
// sees half of it. Name is of the file, without its ending; what had it is replaced.
func (n *Node) Write(name string, object any) error {
	text, err := json.Marshal(object)
	if err != nil {
		return fmt.Errorf("write manifest %s: %w", name, err)
	}
	path := filepath.Join(n.manifests, name+".json")
	if err := os.WriteFile(n.manifests+".new", text, 0o644); err != nil {
		return fmt.Errorf("write manifest %s: %w", name, err)
	}
	return os.Rename(n.manifests+".new", path)
}

// Remove takes away what [Node.Write] wrote. That it is not there is no error.
func (n *Node) Remove(name string) error {
	err := os.Remove(filepath.Join(n.manifests, name+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
