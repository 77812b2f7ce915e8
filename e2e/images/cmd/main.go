// Command images makes container images without a container engine: `make image` and the end-to-end cluster.
//
//	images postern FILE    postern's own image, from the programs in -bin
//	images root FOLDER     the root file system of that image, for a build with a container engine
//	images cluster FOLDER  the images that a cluster and the suites need, from the programs in -bin
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/postern-cni/postern/e2e/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("images", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var postern images.PosternConfig
	flags.StringVar(&postern.Name, "name", "", "the image's full `name`, with registry and tag")
	flags.StringVar(&postern.Version, "version", "unknown", "`version` of the programs")
	flags.StringVar(&postern.Revision, "revision", "unknown", "`commit` that they are built from")
	flags.StringVar(&postern.Bin, "bin", "bin", "`folder` with the programs")
	flags.StringVar(&postern.Source, "source", ".", "`folder` of the source tree")
	flags.StringVar(&postern.Cache, "cache", "bin/debian", "`folder` that keeps Debian packages")
	kubernetes := flags.String("kubernetes", "", "`folder` of the module k8s.io/kubernetes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return errors.New("say what to make, and where: postern FILE, root FOLDER, or cluster FOLDER")
	}
	switch what, out := flags.Arg(0), flags.Arg(1); what {
	case "postern":
		return images.Postern(ctx, postern, out)
	case "root":
		return images.PosternRoot(ctx, postern, out)
	case "cluster":
		files, err := images.Build(ctx, images.Config{
			Binaries: postern.Bin, Kubernetes: *kubernetes, Out: out, Cache: postern.Cache,
		})
		for _, file := range files {
			fmt.Fprintln(stdout, file)
		}
		return err
	default:
		return fmt.Errorf("%q is not known: postern, root, or cluster", what)
	}
}
