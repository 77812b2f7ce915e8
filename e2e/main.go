// Command e2e brings up a Kubernetes cluster of namespaces on this machine, installs postern in it, and runs suites against it.
//
//	e2e build         build what the cluster needs
//	e2e up            bring a cluster up, ready for postern to be installed
//	e2e shell         a shell that reaches it
//	e2e run           build, up, install, all suites, a table, down; a cluster that is up is used, and left up
//	e2e down          take it down
//
// The environment chooses: NODES, BACKEND, FAMILY, PROXY, TUNNEL (see cluster.Config).
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/cluster"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "node" {
		return cluster.RunNode(args[1])
	}
	if len(args) == 2 && args[0] == "first" {
		return cluster.BeFirst(args[1])
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, source, err := folders()
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return errors.New("say what to do: build, up, shell, run, or down")
	}
	if args[0] != "build" {
		if err := cluster.Enter(); err != nil {
			return err
		}
	}
	switch args[0] {
	case "up":
		config, err := configFromEnvironment()
		if err != nil {
			return err
		}
		c, err := cluster.New(config, dir, source, progress())
		if err != nil {
			return err
		}
		return c.Up(ctx)
	case "install":
		c, err := cluster.Open(dir, source, progress())
		if err != nil {
			return err
		}
		took, err := c.Install(ctx)
		fmt.Println("took", took)
		return err
	case "down":
		c, err := cluster.Open(dir, source, progress())
		if errors.Is(err, fs.ErrNotExist) {
			c, err = cluster.New(cluster.Config{}, dir, source, progress())
		}
		if err != nil {
			return err
		}
		return c.Down()
	case "shell":
		c, err := cluster.Open(dir, source, progress())
		if err != nil {
			return err
		}
		cmd := exec.Command("bash", args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdin, os.Stdout, os.Stderr, c.Environment()
		return cmd.Run()
	}
	return fmt.Errorf("%q is not known", args[0])
}

// folders are that of the cluster, and of the source tree, which the program must be started in.
func folders() (dir, source string, err error) {
	if source, err = os.Getwd(); err != nil {
		return "", "", err
	}
	if _, err := os.Stat(filepath.Join(source, "e2e", "go.mod")); err != nil {
		return "", "", fmt.Errorf("%s is not the top of the source tree: start e2e there, or with make", source)
	}
	return filepath.Join(source, "bin", "e2e"), source, nil
}

func configFromEnvironment() (cluster.Config, error) {
	config := cluster.Config{
		Backend: os.Getenv("BACKEND"), Family: os.Getenv("FAMILY"), Proxy: os.Getenv("PROXY"), Tunnel: os.Getenv("TUNNEL"),
	}
	if nodes := os.Getenv("NODES"); nodes != "" {
		number, err := strconv.Atoi(nodes)
		if err != nil {
			return config, fmt.Errorf("NODES=%s: must be a number", nodes)
		}
		config.Nodes = number
	}
	return config.Complete()
}

// progress prints lines with the seconds since the start.
func progress() func(format string, args ...any) {
	start := time.Now()
	return func(format string, args ...any) {
		fmt.Printf("[%6.1fs] %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
}
