// Package image writes container images as files, without a container engine: a folder becomes the one layer of an image.
//
// The file is a tar with two descriptions of the same blobs, so that whatever loads images from files takes it: an OCI image
// layout (github.com/opencontainers/image-spec, image-layout.md), which `ctr images import`, `podman load`, `skopeo` and
// `kind load image-archive` read; and the manifest.json of `docker save`, for `docker load` before release 25.
//
// A folder gives the same bytes each time, whoever owns it: entries are sorted, without times and owners. That makes the
// digest of an image say whether something changed.
//
// What it stands on:
//
//   - Names: containerd takes an image's name from the annotation io.containerd.image.name of its entry in index.json, and
//     where that is missing from org.opencontainers.image.ref.name. It does not complete names, as Docker does, so they are
//     given in full, with registry and tag.
//   - The layer is not compressed: it is read from a local file, where compressing costs more than it saves. So the digest of
//     the blob is also the diff ID in the configuration.
package image
