package manifests_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/postern-cni/postern/e2e/manifests"
)

var update = flag.Bool("update", false, "write the rendered files anew")

const folder = "../../manifests"

// rendered are the files that stand rendered in the folder, by what they are rendered from.
var rendered = map[string]string{
	"overlays/kubeadm":   "postern.yaml",
	"overlays/uninstall": "uninstall.yaml",
}

func TestRenderedFilesAreUpToDate(t *testing.T) {
	for from, to := range rendered {
		want, err := manifests.Render(folder, from)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(folder, to)
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what %s says (%v): run `make manifests`", file, from, err)
		}
	}
}
