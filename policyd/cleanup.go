package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-cni/postern/pkg/attach"
	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/nodefiles"
	"github.com/postern-cni/postern/pkg/nodenet"
)

// cleanup is what is to be removed, and where.
type cleanup struct {
	root, stateDir, conf, binDir string
	listen                       string
	all, force                   bool
}

func cleanupCommand(ctx context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error {
	var c cleanup
	stateDir, root := stateDirFlag(flags), rootFlag(flags)
	flags.BoolVar(&c.force, "force", false, "also while policyd is running, which writes everything anew")
	flags.BoolVar(&c.all, "all", false, "uninstall: first wait for policyd's end, then remove pods' links, state and files too;\n"+
		"pods that are still there are cut off")
	flags.StringVar(&c.conf, "cni-conf", defaultConflist, "with --all: the `file` that policyd has written for the container "+
		"runtime")
	flags.StringVar(&c.binDir, "cni-bin-dir", defaultBinDir, "with --all: the `folder` in which plugins were installed")
	flags.StringVar(&c.listen, "listen", "", "with --all: when done, stay, and say so at /readyz of this `address`")
	check := func() (problems []string) {
		if c.all && c.force {
			problems = append(problems, "--all and --force: with --all policyd has to end, for it would write everything anew")
		}
		if c.listen != "" && !c.all {
			problems = append(problems, "--listen: goes with --all")
		}
		return problems
	}
	if err := parse(flags, args, check); err != nil {
		return err
	}
	c.root, c.stateDir = *root, filepath.Join(*root, *stateDir)
	if c.all {
		return c.uninstall(ctx, stdout)
	}
	if client, err := gate.DialOnce(ctx, c.stateDir); err == nil {
		client.Close()
		if !c.force {
			return fmt.Errorf("policyd is running on %s and would write everything anew: end it first, or give --force", c.stateDir)
		}
	}
	if err := unguard(ctx); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "removed all chains, rules and sets of postern, in both iptables backends, and routes and tunnels "+
		"to other nodes; pods are not guarded any more")
	return nil
}

// unguard removes what guards pods and connects them with other nodes.
func unguard(ctx context.Context) error {
	return errors.Join(nodenet.Unwire(), dataplane.Cleanup(ctx))
}

// uninstall takes everything of ours off the node, and looks again as long as it stays: an ADD that was under way may have left
// something.
func (c *cleanup) uninstall(ctx context.Context, stdout io.Writer) error {
	if err := c.everything(ctx, stdout); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "removed everything of postern from this node")
	if c.listen == "" {
		return nil
	}
	port, err := net.Listen("tcp", c.listen)
	if err != nil {
		return fmt.Errorf("listen on --listen %s: %w", c.listen, err)
	}
	served := make(chan error, 1)
	done := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	go func() { served <- serveHTTP(ctx, port, done) }()
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		select {
		case err := <-served:
			return err
		case <-again.C:
			// An empty folder is the first thing of a pod that brings postern again, which has its plugin by now.
			if left, err := os.ReadDir(c.stateDir); err != nil || len(left) == 0 {
				continue
			}
			if err := c.everything(ctx, stdout); err != nil {
				fmt.Fprintln(stdout, "cannot remove what has come back:", err)
			}
		}
	}
}

// everything removes all that is there. Pods lose their links before their rules go, so that none is open on the way, and nothing
// can attach a pod any more before that. What cannot be removed stops nothing else.
func (c *cleanup) everything(ctx context.Context, stdout io.Writer) error {
	lock, err := onlyOne(ctx, c.stateDir, slog.New(slog.NewTextHandler(stdout, nil)))
	if err != nil {
		return err
	}
	defer lock.Release()
	var errs []error
	removed := func(paths []string, err error) {
		if len(paths) > 0 {
			fmt.Fprintln(stdout, "removed", strings.Join(paths, " "))
		}
		errs = append(errs, err)
	}
	removed(nodefiles.Remove(filepath.Join(c.root, c.conf)))
	removed(nodefiles.RemovePrograms(filepath.Join(c.root, c.binDir)))
	links, err := attach.RemoveAll(ctx, c.stateDir)
	removed(links, err)
	if err != nil {
		return errors.Join(errs...) // their rules stay as well
	}
	errs = append(errs, unguard(ctx))
	removed(nodefiles.ForgetManagers(c.root))
	if err := errors.Join(errs...); err != nil {
		return err // the state stays, and says what there is to remove
	}
	return os.RemoveAll(c.stateDir)
}
