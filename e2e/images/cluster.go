package images

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
)

// Config says what the cluster's images are made of, and where they go.
type Config struct {
	Binaries   string // folder with agnhost, coredns and pause, static
	Kubernetes string // the folder of the module k8s.io/kubernetes that the suites are built from
	Out        string // folder for the image files
	Cache      string // folder for Debian packages
}

// Names of the suites' images in Kubernetes' list (the constants of test/utils/image/manifest.go).
const (
	Pause    = "Pause"
	Agnhost  = "Agnhost"
	Busybox  = "BusyBox"
	GlibcDNS = "GlibcDnsTesting"
)

// Build makes the images that a cluster and the suites need, as far as they are not there or their parts have changed, and
// returns all their files.
func Build(ctx context.Context, config Config) ([]string, error) {
	var files []string
	for _, one := range []struct {
		file string
		make func(Config) (recipe, error)
	}{{"pause", pause}, {"agnhost", agnhost}, {"busybox", busybox}, {"coredns", coreDNS}} {
		out := filepath.Join(config.Out, one.file+".tar")
		r, err := one.make(config)
		if err != nil {
			return nil, fmt.Errorf("build image %s: %w", out, err)
		}
		if err := r.build(ctx, out, config.Cache); err != nil {
			return nil, err
		}
		files = append(files, out)
	}
	return files, nil
}

func pause(config Config) (recipe, error) {
	name, err := Name(config.Kubernetes, Pause)
	return recipe{
		Names:      []string{name},
		Files:      []file{{Path: "pause", Mode: 0o755, From: filepath.Join(config.Binaries, "pause")}},
		Entrypoint: []string{"/pause"},
	}, err
}

// unneeded are packages that only maintainer scripts need, and what comes with those.
var unneeded = []string{"debconf", "debianutils", "dpkg", "libcap2-bin", "mawk", "perl-base", "tar"}

// agnhost is the suites' program for both ends of a connection, with the tools that specs run beside it. Its shell is dash, for
// busybox's runs its own nc and ip, whatever else is in PATH.
//
// The image goes by two names: upstream's looks names up as musl does, and that for DNS as glibc does; here both are glibc, and
// specs that ask for the second say what to run in it. What upstream has in it besides, a CoreDNS and container images, only
// specs that are not Conformance ask for, and every node would unpack it.
func agnhost(config Config) (recipe, error) {
	name, err := Name(config.Kubernetes, Agnhost)
	if err != nil {
		return recipe{}, err
	}
	glibc, err := Name(config.Kubernetes, GlibcDNS)
	porter := filepath.Join(config.Kubernetes, "test/images/agnhost/porter")
	return recipe{
		Names: []string{name, glibc},
		Packages: []string{
			"base-files", "bash", "bind9-dnsutils", "busybox-static", "curl", "dash", "iperf", "iproute2", "libc-bin", "netcat-openbsd",
			"socat",
		},
		Without: unneeded,
		Applets: true,
		Folders: map[string]fs.FileMode{"uploads": 0o777},
		Files: []file{
			{Path: "agnhost", Mode: 0o755, From: filepath.Join(config.Binaries, "agnhost")},
			{Path: "localhost.crt", Mode: 0o644, From: filepath.Join(porter, "localhost.crt")},
			{Path: "localhost.key", Mode: 0o644, From: filepath.Join(porter, "localhost.key")},
			passwd, group, nsswitch,
		},
		Links: map[string]string{
			"agnhost-2": "agnhost", "usr/bin/sh": "dash", "usr/bin/nc": "nc.openbsd", "usr/local/bin/iperf": "/usr/bin/iperf",
		},
		Entrypoint: []string{"/agnhost"},
		Cmd:        []string{"pause"},
	}, err
}

// The users of agnhost's image that specs ask for by name, and where names are looked up.
var (
	passwd = file{Path: "etc/passwd", Mode: 0o644, Content: "root:x:0:0:root:/root:/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n"}
	group = file{Path: "etc/group", Mode: 0o644, Content: "root:x:0:\nnobody:x:65534:\nuser-defined-in-image:x:1000:\n" +
		"group-defined-in-image:x:50000:user-defined-in-image\n"}
	nsswitch = file{Path: "etc/nsswitch.conf", Mode: 0o644, Content: "hosts: files dns\n"}
)

func busybox(config Config) (recipe, error) {
	name, err := Name(config.Kubernetes, Busybox)
	return recipe{
		Names:    []string{name},
		Packages: []string{"base-files", "busybox-static"},
		Without:  unneeded,
		Applets:  true,
		Files:    []file{passwd, group},
		Cmd:      []string{"sh"},
	}, err
}

func coreDNS(config Config) (recipe, error) {
	program := filepath.Join(config.Binaries, "coredns")
	name, err := CoreDNSName(program)
	return recipe{
		Names:      []string{name},
		Files:      []file{{Path: "coredns", Mode: 0o755, From: program}},
		Entrypoint: []string{"/coredns"},
	}, err
}

// CoreDNSName is the name of the image that upstream publishes of a CoreDNS program's release.
func CoreDNSName(program string) (string, error) {
	const module = "github.com/coredns/coredns"
	modules, err := modulesOf(program)
	if err != nil {
		return "", err
	}
	if modules[module] == "" {
		return "", fmt.Errorf("name the image of %s: it is not built from a release of the module %s", program, module)
	}
	return "registry.k8s.io/coredns/coredns:" + modules[module], nil
}

var (
	registryLine = regexp.MustCompile(`(?m)^\s+(\w+):\s+"([^"]+)",$`)
	imageLine    = regexp.MustCompile(`(?m)^\s+configs\[(\w+)\] += Config\{list\.(\w+), "([^"]+)", "([^"]+)"\}$`)
)

// Name is the full name of an image that the suites of a Kubernetes release use, by its constant there.
func Name(kubernetes, constant string) (string, error) {
	list := filepath.Join(kubernetes, "test/utils/image/manifest.go")
	content, err := os.ReadFile(list)
	if err != nil {
		return "", fmt.Errorf("find the image %s: %w", constant, err)
	}
	registries := map[string]string{}
	for _, match := range registryLine.FindAllStringSubmatch(string(content), -1) {
		registries[match[1]] = match[2]
	}
	for _, match := range imageLine.FindAllStringSubmatch(string(content), -1) {
		if registry := registries[match[2]]; match[1] == constant && registry != "" {
			return registry + "/" + match[3] + ":" + match[4], nil
		}
	}
	return "", fmt.Errorf("find the image %s: %s does not list it in a way that is understood", constant, list)
}
