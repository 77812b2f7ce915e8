package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nodefiles"
	"github.com/postern-cni/postern/pkg/nodenet"
)

// Where container runtimes look by default.
const (
	defaultConflist = "/etc/cni/net.d/10-postern.conflist"
	defaultBinDir   = "/opt/cni/bin"
)

func rootFlag(flags *flag.FlagSet) *string {
	return flags.String("root", "/", "`folder` under which the node's own folders are; in a container they are mounted")
}

// ourLinks are those of ours on the node.
func ourLinks() nodefiles.Links {
	return nodefiles.Links{Pods: []string{attachment.GuardedPrefix + "*", attachment.UnguardedPrefix + "*"},
		Tunnels: []string{nodenet.DevicePrefix + "*"}}
}

// installCommand is what the node's folders are needed for before policyd runs, so that a process with few rights, that ends, has
// them mounted and policyd has not.
func installCommand(_ context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error {
	root := rootFlag(flags)
	binDir := flags.String("cni-bin-dir", defaultBinDir, "`folder` of the node where the container runtime looks for plugins")
	plugin := flags.String("cni-plugin", filepath.Join(defaultBinDir, nodefiles.Plugin), "the plugin's program, a `file` to "+
		"install; empty for none")
	loopback := flags.String("loopback", filepath.Join(defaultBinDir, "loopback"), "the CNI project's loopback plugin, a `file` to "+
		"install where the node\nhas none; empty for none")
	if err := parse(flags, args, noCheck); err != nil {
		return err
	}
	say := func(installed bool, from string, err error) error {
		if err != nil {
			return fmt.Errorf("install %s: %w", from, err)
		}
		if installed {
			fmt.Fprintf(stdout, "installed %s in %s\n", from, *binDir)
		}
		return nil
	}
	var errs []error
	dir := filepath.Join(*root, *binDir)
	if *plugin != "" {
		installed, err := nodefiles.InstallPlugin(*plugin, dir)
		errs = append(errs, say(installed, *plugin, err))
	}
	if *loopback != "" {
		installed, err := nodefiles.InstallLoopback(*loopback, dir)
		errs = append(errs, say(installed, *loopback, err))
	}
	written, err := nodefiles.TellManagers(*root, ourLinks())
	for _, path := range written {
		fmt.Fprintln(stdout, "wrote", path)
	}
	if err != nil { // most leave links of others alone without being told
		fmt.Fprintf(flags.Output(), "a network manager of the node could not be told to leave pods' links alone: %v\n", err)
	}
	return errors.Join(errs...)
}
