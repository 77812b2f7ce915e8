package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const longName = "usr/share/doc/a-package-with-quite-a-long-name/and-a-folder-in-it-of-which-the-same-can-be-said/" +
	"so-that-the-name-no-longer-fits-into-the-header-of-an-old-tar"

// folder makes a root file system. The time of the files differs from call to call.
func folder(t *testing.T, age time.Duration) string {
	t.Helper()
	root := t.TempDir()
	for name, mode := range map[string]fs.FileMode{
		"bin/program": 0o755, "etc/secret": 0o600, "bin/su": 0o755 | fs.ModeSetuid, longName: 0o644, "empty": 0o644,
	} {
		file := filepath.Join(root, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		content := "this is " + name
		if name == "empty" {
			content = ""
		}
		must(t, os.WriteFile(file, []byte(content), 0o600))
		must(t, os.Chmod(file, mode))
		must(t, os.Chtimes(file, time.Time{}, time.Now().Add(-age)))
	}
	must(t, os.Mkdir(filepath.Join(root, "tmp"), 0o755))
	must(t, os.Chmod(filepath.Join(root, "tmp"), 0o777|fs.ModeSticky))
	must(t, os.Symlink("../nowhere", filepath.Join(root, "bin/link")))
	return root
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var example = Image{
	Names:      []string{"registry.example/a/b:v1", "localhost:5000/c:v2"},
	Entrypoint: []string{"/bin/program"}, Cmd: []string{"go"}, Labels: map[string]string{"org.opencontainers.image.title": "b"},
}

func writeExample(t *testing.T, root string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	made := example
	made.Root = root
	must(t, Write(file, made))
	content, err := os.ReadFile(file)
	must(t, err)
	return content
}

// entry is a file in a tar.
type entry struct {
	tar.Header
	content []byte
}

func untar(t *testing.T, content []byte) (map[string]entry, []string) {
	t.Helper()
	files, names := map[string]entry{}, []string(nil)
	for from := tar.NewReader(bytes.NewReader(content)); ; {
		header, err := from.Next()
		if err == io.EOF {
			return files, names
		}
		must(t, err)
		content, err := io.ReadAll(from)
		must(t, err)
		files[header.Name], names = entry{*header, content}, append(names, header.Name)
	}
}

// read decodes a JSON file of an archive, and refuses what the type does not have.
func read(t *testing.T, archive map[string]entry, name string, into any) {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(archive[name].content))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		t.Fatalf("%s: %v: %s", name, err, archive[name].content)
	}
}

// follow returns the name of the blob that a descriptor names, which must be there as described.
func follow(t *testing.T, archive map[string]entry, to v1.Descriptor) string {
	t.Helper()
	name := "blobs/sha256/" + to.Digest.Encoded()
	content := archive[name].content
	if int64(len(content)) != to.Size || digest.FromBytes(content) != to.Digest {
		t.Errorf("%s (%s) is not what its descriptor says: %d bytes, not %d", name, to.MediaType, len(content), to.Size)
	}
	return name
}

func TestAnImageIsWhatTheSpecificationSays(t *testing.T) {
	archive, _ := untar(t, writeExample(t, folder(t, 0)))
	var layout v1.ImageLayout
	read(t, archive, "oci-layout", &layout)
	if layout.Version != "1.0.0" {
		t.Errorf("the layout's version is %q", layout.Version)
	}
	var index v1.Index
	read(t, archive, "index.json", &index)
	var names []string
	for _, m := range index.Manifests {
		names = append(names, m.Annotations["io.containerd.image.name"])
		if ref := m.Annotations["org.opencontainers.image.ref.name"]; ref != m.Annotations["io.containerd.image.name"] {
			t.Errorf("the image is %v for containerd, but %q for others", names, ref)
		}
	}
	if !slices.Equal(names, example.Names) {
		t.Errorf("the image's names are %q, not %q", names, example.Names)
	}
	var manifest v1.Manifest
	read(t, archive, follow(t, archive, index.Manifests[0]), &manifest)
	var config v1.Image
	configBlob := follow(t, archive, manifest.Config)
	read(t, archive, configBlob, &config)
	layerBlob := follow(t, archive, manifest.Layers[0])
	if want := []digest.Digest{manifest.Layers[0].Digest}; !slices.Equal(config.RootFS.DiffIDs, want) {
		t.Errorf("the configuration is for layers %v, but the manifest lists %v", config.RootFS.DiffIDs, want)
	}
	if config.Architecture != runtime.GOARCH || config.OS != "linux" {
		t.Errorf("the image is for %s/%s", config.OS, config.Architecture)
	}
	if c := config.Config; !slices.Equal(c.Entrypoint, example.Entrypoint) || !slices.Equal(c.Cmd, example.Cmd) ||
		!maps.Equal(c.Labels, example.Labels) || !slices.Equal(c.Env, []string{defaultPath}) {
		t.Errorf("the image's configuration is %+v", c)
	}
	var docker []dockerManifest
	read(t, archive, "manifest.json", &docker)
	want := []dockerManifest{{Config: configBlob, RepoTags: example.Names, Layers: []string{layerBlob}}}
	if !reflect.DeepEqual(docker, want) {
		t.Errorf("for docker load the image is %+v, not %+v", docker, want)
	}
}

func TestALayerHoldsTheFolder(t *testing.T) {
	archive, _ := untar(t, writeExample(t, folder(t, 0)))
	var docker []dockerManifest
	read(t, archive, "manifest.json", &docker)
	layer, names := untar(t, archive[docker[0].Layers[0]].content)
	if !slices.IsSorted(names) {
		t.Errorf("the layer is not sorted: %q", names)
	}
	for name, want := range map[string]struct {
		kind byte
		mode int64
	}{
		"bin/":        {tar.TypeDir, 0o755},
		"tmp/":        {tar.TypeDir, 0o1777},
		"bin/program": {tar.TypeReg, 0o755},
		"bin/su":      {tar.TypeReg, 0o4755},
		"etc/secret":  {tar.TypeReg, 0o600},
		"bin/link":    {tar.TypeSymlink, 0o777},
		"empty":       {tar.TypeReg, 0o644},
		longName:      {tar.TypeReg, 0o644},
	} {
		got, there := layer[name]
		if !there {
			t.Errorf("%s is missing: %q", name, names)
			continue
		}
		if got.Typeflag != want.kind || got.Mode != want.mode {
			t.Errorf("%s: type %q and mode %o, not %q and %o", name, got.Typeflag, got.Mode, want.kind, want.mode)
		}
		if got.Uid != 0 || got.Gid != 0 || got.Uname != "" || !got.ModTime.Equal(time.Unix(0, 0)) {
			t.Errorf("%s: it belongs to %d:%d (%s) and is of %v", name, got.Uid, got.Gid, got.Uname, got.ModTime)
		}
		if want.kind == tar.TypeReg && name != "empty" && string(got.content) != "this is "+name {
			t.Errorf("%s holds %q", name, got.content)
		}
	}
	if target := layer["bin/link"].Linkname; target != "../nowhere" {
		t.Errorf("bin/link leads to %q", target)
	}
}

func TestTheSameFolderMakesTheSameBytes(t *testing.T) {
	if !bytes.Equal(writeExample(t, folder(t, 0)), writeExample(t, folder(t, time.Hour))) {
		t.Error("two folders with the same in them, made at different times, made different images")
	}
}

func TestAnImageThatCannotBeMadeLeavesTheOldOne(t *testing.T) {
	root := folder(t, 0)
	must(t, syscall.Mkfifo(filepath.Join(root, "pipe"), 0o644))
	dir := t.TempDir()
	file := filepath.Join(dir, "image.tar")
	must(t, os.WriteFile(file, []byte("the old one"), 0o644))
	made := example
	made.Root = root
	if err := Write(file, made); err == nil || !strings.Contains(err.Error(), "pipe") {
		t.Errorf("a pipe in the root file system: the error must name it: %v", err)
	}
	made.Root = filepath.Join(root, "missing")
	if err := Write(file, made); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no root file system: %v", err)
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if content, _ := os.ReadFile(file); string(content) != "the old one" || len(entries) != 1 {
		t.Errorf("%q and %d files are left", content, len(entries))
	}
}

func TestANameThatLoadersWouldCompleteIsRefused(t *testing.T) {
	for _, names := range [][]string{nil, {"postern"}, {"postern:v1"}, {"a/b:v1"}, {"registry.example/a/b"}, {"localhost:5000/c"}} {
		made := example
		made.Root, made.Names = t.TempDir(), names
		if err := Write(filepath.Join(t.TempDir(), "image.tar"), made); err == nil {
			t.Errorf("%q was taken", names)
		}
	}
}
