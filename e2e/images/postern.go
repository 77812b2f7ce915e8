package images

import (
	"context"
	"fmt"
	"path/filepath"
)

// docs is where Debian keeps the licences of what is installed.
const docs = "usr/share/doc/"

// Where postern's programs are in its image. The manifests name them.
const (
	Policyd  = "usr/local/bin/policyd"
	Plugin   = "opt/cni/bin/postern"
	Loopback = "opt/cni/bin/loopback"
)

// Labels of every postern image. Version and revision come with the build.
const (
	labelPrefix = "org.opencontainers.image."
	title       = "postern"
	licence     = "Apache-2.0"
	source      = "https://github.com/postern-cni/postern"
)

// PosternConfig says what postern's image is made of.
type PosternConfig struct {
	Name     string // in full, with the tag
	Version  string // what the programs say they are
	Revision string // the commit they are built from
	Bin      string // folder with policyd, postern and loopback
	Source   string // top of the source tree, for the licence
	Cache    string // folder for Debian packages
}

// Postern writes the image of postern to a file.
func Postern(ctx context.Context, config PosternConfig, out string) error {
	r, err := postern(ctx, config)
	if err != nil {
		return fmt.Errorf("build image %s: %w", out, err)
	}
	return r.build(ctx, out, config.Cache)
}

// PosternRoot makes the root file system of postern's image in a folder that must be empty or missing, for builds with a
// container engine.
func PosternRoot(ctx context.Context, config PosternConfig, root string) error {
	r, err := postern(ctx, config)
	if err != nil {
		return fmt.Errorf("make %s: %w", root, err)
	}
	packages, err := r.fetch(ctx, config.Cache)
	if err == nil {
		err = r.assemble(ctx, packages, root)
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", root, err)
	}
	return nil
}

// postern is a root file system with iptables in both backends and no shell: policyd runs programs directly.
func postern(ctx context.Context, config PosternConfig) (recipe, error) {
	programs := map[string]string{Policyd: "policyd", Plugin: "postern", Loopback: "loopback"}
	var files []file
	var built []string
	for _, place := range []string{Policyd, Plugin, Loopback} {
		program := filepath.Join(config.Bin, programs[place])
		files = append(files, file{Path: place, Mode: 0o755, From: program})
		built = append(built, program)
	}
	texts, err := licences(ctx, built...)
	if err != nil {
		return recipe{}, err
	}
	files = append(files, file{Path: docs + "postern/copyright", Mode: 0o644, From: filepath.Join(config.Source, "LICENSE")})
	return recipe{
		Names:      []string{config.Name},
		Packages:   []string{"iptables", "base-files"}, // base-files: the usual folders, and the texts that licences refer to
		Without:    []string{"mawk", "libgcc-s1", "gcc-12-base", "gcc-14-base"},
		Files:      append(files, texts...),
		Links:      installed(),
		Entrypoint: []string{"/" + Policyd},
		Labels: map[string]string{
			labelPrefix + "title": title, labelPrefix + "version": config.Version, labelPrefix + "revision": config.Revision,
			labelPrefix + "source": source, labelPrefix + "licenses": licence,
		},
	}, nil
}

// installed are the links that the packages make when they are installed: to the usual backend of iptables
// (update-alternatives(1)), and from where the run time folder was once.
func installed() map[string]string {
	links := map[string]string{"var/run": "/run"}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, program := range []string{"", "-restore", "-save"} {
			links["usr/sbin/"+family+program] = family + "-nft" + program
		}
	}
	return links
}
