// Command e2e brings up a Kubernetes cluster of namespaces on this machine, installs postern in it as a user would, and runs
// suites against it.
//
//	e2e build      build what the cluster needs; `e2e build apiserver`: kube-apiserver and etcd alone, for the benchmarks
//	e2e up         bring a cluster up, whose nodes wait for postern to be installed
//	e2e install    install postern in it, and wait until all nodes are Ready
//	e2e shell      a shell that reaches the cluster: kubectl, and the nodes' and pods' addresses; `e2e shell -c COMMAND` too
//	e2e node NAME COMMAND...   run a command on a node
//	e2e run        up, install, all suites, a table, down; a cluster that is up is used, and left up
//	e2e down       take it down
//
// The environment chooses: NODES, BACKEND, FAMILY, PROXY, TUNNEL for the cluster (see cluster.Config), SUITES, a list of names,
// and FOCUS, a regular expression for "suite: case", for what is run. Everything made is in bin/e2e, logs in bin/e2e/log.
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
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/build"
	"github.com/postern-cni/postern/e2e/cluster"
)

// The process's first thread is main's alone. Who enters a network namespace does so on a thread that ends with its goroutine,
// which the first does not: Go would leave it in there.
func init() { runtime.LockOSThread() }

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
}

// command is what the program does for a user.
type command struct {
	outside bool // it needs the machine's network, not the cluster's
	run     func(e env, ctx context.Context, args []string) error
}

// env is what commands work with.
type env struct {
	dir, source string
	say         func(format string, args ...any)
}

var commands = map[string]command{
	"build":   {true, env.build},
	"up":      {false, func(e env, ctx context.Context, _ []string) error { _, err := e.up(ctx); return err }},
	"install": {false, env.install},
	"shell":   {false, env.shell},
	"node":    {false, env.node},
	"run":     {false, env.suites},
	"down":    {false, env.down},
}

func run(args []string) error {
	switch { // not for users: a cluster's nodes start themselves so
	case len(args) == 2 && args[0] == "power":
		return cluster.RunNode(args[1])
	case len(args) == 2 && args[0] == "first":
		return cluster.BeFirst(args[1])
	}
	if len(args) == 0 || commands[args[0]].run == nil {
		return fmt.Errorf("%q: say build, up, install, shell, node, run, or down", strings.Join(args, " "))
	}
	todo := commands[args[0]]
	e, err := environment()
	if err != nil {
		return err
	}
	if !todo.outside {
		if os.Getuid() != 0 {
			return errors.New("needs root, for namespaces and control groups of its own")
		}
		if err := cluster.Enter(); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return todo.run(e, ctx, args[1:])
}

func (e env) build(ctx context.Context, args []string) error {
	tree := build.Tree{Source: e.source, Dir: e.dir, Say: e.say}
	switch {
	case len(args) == 0:
		return tree.All(ctx)
	case len(args) == 1 && args[0] == "apiserver":
		return tree.APIServer(ctx)
	}
	return fmt.Errorf("build %s: say nothing more, or apiserver", strings.Join(args, " "))
}

// environment finds the source tree, which the program must be started in.
func environment() (env, error) {
	source, err := os.Getwd()
	if err != nil {
		return env{}, err
	}
	if _, err := os.Stat(filepath.Join(source, "e2e", "go.mod")); err != nil {
		return env{}, fmt.Errorf("%s is not the top of the source tree: start e2e there, or by make", source)
	}
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Printf("[%6.1fs] %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	return env{filepath.Join(source, "bin", "e2e"), source, say}, nil
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

// up brings a cluster up, and takes down what there is of it if that fails.
func (e env) up(ctx context.Context) (*cluster.Cluster, error) {
	if c, err := cluster.Open(e.dir, e.source, e.say); err == nil {
		return nil, fmt.Errorf("a cluster is up already (%s): take it down with `make e2e-down`", c.Config)
	}
	config, err := configFromEnvironment()
	if err != nil {
		return nil, err
	}
	c, err := cluster.New(config, e.dir, e.source, e.say)
	if err != nil {
		return nil, err
	}
	e.say("a cluster: %s", config)
	if err := c.Up(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("%w; logs are in %s", err, filepath.Join(e.dir, "log")), c.Down())
	}
	e.say("up: the nodes wait for a network. `make e2e-shell`, then `kubectl apply -f manifests/postern.yaml`")
	return c, nil
}

func (e env) open() (*cluster.Cluster, error) {
	c, err := cluster.Open(e.dir, e.source, e.say)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("no cluster is up: `make e2e-up`")
	}
	return c, err
}

func (e env) install(ctx context.Context, _ []string) error {
	c, err := e.open()
	if err != nil {
		return err
	}
	took, err := c.Install(ctx)
	if err == nil {
		e.say("%s applied; all nodes were Ready %.1f s later", c.Manifests(), took.Seconds())
	}
	return err
}

// shell runs bash, with what there is in args.
func (e env) shell(_ context.Context, args []string) error {
	c, err := e.open()
	if err != nil {
		return err
	}
	cmd := exec.Command("bash", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdin, os.Stdout, os.Stderr, c.Environment()
	return cmd.Run()
}

func (e env) node(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("say which node, and what to run on it: e2e node node1 ip route")
	}
	c, err := e.open()
	if err != nil {
		return err
	}
	n, err := c.Node(args[0])
	if err != nil {
		return err
	}
	cmd, err := n.Command(ctx, args[1:]...)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func (e env) down(context.Context, []string) error {
	c, err := cluster.Open(e.dir, e.source, e.say)
	if errors.Is(err, fs.ErrNotExist) { // or one whose start was cut off before it was written down
		c, err = cluster.New(cluster.Config{}, e.dir, e.source, e.say)
	}
	if err != nil {
		return err
	}
	return c.Down()
}
