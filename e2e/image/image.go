package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerdName is the annotation that holds an image's name for containerd.
const containerdName = "io.containerd.image.name"

// defaultPath is where programs are looked for in an image that does not say.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Image is what a container image is made of. It is one for the architecture of this machine.
type Image struct {
	Names      []string // in full: registry/path:tag
	Root       string   // the folder that becomes the one layer
	Entrypoint []string
	Cmd        []string
	Env        []string // NAME=value; without any, the usual PATH
	Labels     map[string]string
}

// Write writes an image to a file. The file is there only when it is complete.
func Write(file string, image Image) error {
	to, err := os.CreateTemp(filepath.Dir(file), ".image-*")
	if err != nil {
		return fmt.Errorf("write image %s: %w", file, err)
	}
	defer os.Remove(to.Name())
	err = write(to, image)
	err = errors.Join(err, to.Chmod(0o644), to.Close())
	if err == nil {
		err = os.Rename(to.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("write image %s: %w", file, err)
	}
	return nil
}

func write(to io.Writer, image Image) error {
	if err := checkNames(image.Names); err != nil {
		return err
	}
	layer, err := describeLayer(image.Root)
	if err != nil {
		return err
	}
	config, configJSON, err := describe(v1.MediaTypeImageConfig, configuration(image, layer.Digest))
	if err != nil {
		return err
	}
	manifest, manifestJSON, err := describe(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: config, Layers: []v1.Descriptor{layer},
	})
	if err != nil {
		return err
	}
	a := archive{tar: tar.NewWriter(to)}
	a.json(v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion})
	a.json(v1.ImageIndexFile, index(manifest, image.Names))
	a.json("manifest.json", []dockerManifest{{
		Config: blob(config.Digest), RepoTags: image.Names, Layers: []string{blob(layer.Digest)},
	}})
	a.file(blob(manifest.Digest), manifestJSON)
	a.file(blob(config.Digest), configJSON)
	a.layer(image.Root, layer)
	return a.close()
}

// checkNames refuses names that loaders would complete, each in its own way.
func checkNames(names []string) error {
	if len(names) == 0 {
		return errors.New("the image has no name")
	}
	for _, name := range names {
		registry, rest, _ := strings.Cut(name, "/")
		if !strings.ContainsAny(registry, ".:") || !strings.Contains(rest, ":") {
			return fmt.Errorf("image name %q is not complete: write registry/path:tag", name)
		}
	}
	return nil
}

func configuration(image Image, layer digest.Digest) v1.Image {
	env := image.Env
	if env == nil {
		env = []string{defaultPath}
	}
	created := time.Unix(0, 0).UTC()
	return v1.Image{
		Created:  &created,
		Platform: v1.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config: v1.ImageConfig{
			Entrypoint: image.Entrypoint, Cmd: image.Cmd, Env: env, Labels: image.Labels, WorkingDir: "/",
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer}},
		History: []v1.History{{Created: &created, CreatedBy: "github.com/postern-cni/postern/e2e/image"}},
	}
}

// index lists the one manifest, once for each name.
func index(manifest v1.Descriptor, names []string) v1.Index {
	list := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for _, name := range names {
		entry := manifest
		entry.Annotations = map[string]string{containerdName: name, v1.AnnotationRefName: name}
		entry.Platform = &v1.Platform{Architecture: runtime.GOARCH, OS: "linux"}
		list.Manifests = append(list.Manifests, entry)
	}
	return list
}

// dockerManifest is an entry of the manifest.json that `docker save` writes.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// describe returns the JSON of a value, and the descriptor that others refer to it by.
func describe(mediaType string, value any) (v1.Descriptor, []byte, error) {
	content, err := json.Marshal(value)
	return v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}, content, err
}

// blob is where an image layout has the content with a digest.
func blob(d digest.Digest) string {
	return v1.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

// archive is the tar that becomes the file. After an error it does nothing more; close returns the error.
type archive struct {
	tar *tar.Writer
	err error
}

func (a *archive) json(name string, value any) {
	var content bytes.Buffer
	if err := json.NewEncoder(&content).Encode(value); a.err == nil {
		a.err = err
	}
	a.file(name, content.Bytes())
}

func (a *archive) file(name string, content []byte) {
	a.header(name, int64(len(content)))
	if a.err == nil {
		_, a.err = a.tar.Write(content)
	}
}

func (a *archive) header(name string, size int64) {
	if a.err == nil {
		a.err = a.tar.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
		})
	}
}

// layer writes the layer, which was read once already to describe it.
func (a *archive) layer(root string, described v1.Descriptor) {
	a.header(blob(described.Digest), described.Size)
	if a.err != nil {
		return
	}
	sum := digest.Canonical.Digester()
	a.err = writeLayer(io.MultiWriter(a.tar, sum.Hash()), root)
	if a.err == nil && sum.Digest() != described.Digest {
		a.err = fmt.Errorf("%s changed while the image was written", root)
	}
}

func (a *archive) close() error {
	if a.err != nil {
		return a.err
	}
	return a.tar.Close()
}
