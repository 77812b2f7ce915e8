// Package images makes the container images that a cluster runs: postern's own, and those that the end-to-end suites ask for.
//
// An image is a recipe: Debian packages with what they depend on, files over them, links. From it comes a folder, and of that an
// image file (package image). Nothing is run in the folder and nothing is pulled, so it takes no container engine, no registry
// and no root. Beside an image's file stands what it was made of (FILE.inputs); where that is the same again, nothing is done.
//
// The suites name their images in test/utils/image/manifest.go of the Kubernetes release, and so do these: the names are read
// from there. What is in them is ours: the upstream programs (agnhost, CoreDNS) built from their modules, with Debian's tools
// where upstream takes Alpine's. So the specs run unchanged, but they do not test the images that upstream publishes.
//
// Images are for the architecture of this machine.
package images
