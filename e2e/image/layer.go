package image

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// describeLayer returns the descriptor of the layer that a folder becomes.
func describeLayer(root string) (v1.Descriptor, error) {
	sum := digest.Canonical.Digester()
	var size counter
	if err := writeLayer(io.MultiWriter(&size, sum.Hash()), root); err != nil {
		return v1.Descriptor{}, err
	}
	return v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: sum.Digest(), Size: int64(size)}, nil
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// writeLayer writes a folder as a tar: sorted, everything owned by root, without times.
func writeLayer(to io.Writer, root string) error {
	layer := tar.NewWriter(to)
	err := filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || file == root {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		return writeEntry(layer, file, name)
	})
	if err != nil {
		return fmt.Errorf("make a layer of %s: %w", root, err)
	}
	return layer.Close()
}

func writeEntry(layer *tar.Writer, file, name string) error {
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	header := &tar.Header{Name: filepath.ToSlash(name), Mode: permissions(info.Mode()), ModTime: time.Unix(0, 0)}
	switch {
	case info.IsDir():
		header.Typeflag, header.Name = tar.TypeDir, header.Name+"/"
	case info.Mode().IsRegular():
		header.Typeflag, header.Size = tar.TypeReg, info.Size()
	case info.Mode()&fs.ModeSymlink != 0:
		header.Typeflag = tar.TypeSymlink
		header.Mode = 0o777
		if header.Linkname, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s: a file of type %s has no place in an image", name, info.Mode().Type())
	}
	if err := layer.WriteHeader(header); err != nil || header.Typeflag != tar.TypeReg {
		return err
	}
	content, err := os.Open(file)
	if err != nil {
		return err
	}
	defer content.Close()
	_, err = io.Copy(layer, content)
	return err
}

// permissions are the bits of a mode as tar has them.
func permissions(mode fs.FileMode) int64 {
	bits := int64(mode.Perm())
	for _, special := range []struct {
		mode fs.FileMode
		bit  int64
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if mode&special.mode != 0 {
			bits |= special.bit
		}
	}
	return bits
}
