// Command policyd guards a node's pods: it watches NetworkPolicies, pods and namespaces, and keeps in the kernel what they allow.
//
//	policyd run       guard the pods of this node until stopped; the rules stay in force
//	policyd status    what is enforced, since when, and what is wrong
//	policyd explain   whether a connection is allowed, and why
//	policyd render    the rules and sets for given manifests, without touching the kernel
//	policyd install   put the plugin onto the node, and keep the node's network managers from our links
//	policyd cleanup   remove everything of ours from the kernel, or from the node
//
// `policyd COMMAND -h` lists a command's flags.
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
)

// version is set when the programs are built.
var version = "unknown"

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1 // it did not work, or the answer is no
	exitUsage  = 2 // the command line is wrong; nothing was done
)

// errUsage is an error of the command line, which was printed already.
var errUsage = errors.New("usage")

// errNo ends a command whose answer is no.
var errNo = errors.New("no")

// command is one word after policyd.
type command struct {
	name, summary string
	run           func(ctx context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error
}

var commands = []command{
	{"run", "guard the pods of this node until stopped", runCommand},
	{"status", "what is enforced, since when, and what is wrong", statusCommand},
	{"explain", "whether a connection is allowed, and why", explainCommand},
	{"render", "the rules and sets for given manifests", renderCommand},
	{"install", "put the plugin onto the node, and keep network managers from its links", installCommand},
	{"cleanup", "remove everything of ours from the kernel, or from the node", cleanupCommand},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := dispatch(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && (args[0] == "version" || args[0] == "--version") {
		fmt.Fprintln(stdout, "policyd", version)
		return exitOK
	}
	for _, c := range commands {
		if len(args) == 0 || args[0] != c.name {
			continue
		}
		flags := flag.NewFlagSet("policyd "+c.name, flag.ContinueOnError)
		flags.SetOutput(stderr)
		err := c.run(ctx, flags, args[1:], stdout)
		switch {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.Is(err, errUsage):
			return exitUsage
		case errors.Is(err, errNo):
			return exitFailed
		}
		fmt.Fprintf(stderr, "policyd %s: %v\n", c.name, err)
		return exitFailed
	}
	fmt.Fprintln(stderr, "policyd guards a node's pods. Commands:")
	for _, c := range commands {
		fmt.Fprintf(stderr, "  policyd %-8s %s\n", c.name, c.summary)
	}
	fmt.Fprintln(stderr, "  policyd version  print the version")
	if len(args) == 1 && (args[0] == "help" || args[0] == "-h" || args[0] == "--help") {
		return exitOK
	}
	return exitUsage
}

// parse reads the flags; no command takes arguments beside them. problems, all at once, are about their values.
func parse(flags *flag.FlagSet, args []string, check func() []string) error {
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage // the flag package has said what is wrong
	}
	problems := check()
	if flags.NArg() > 0 {
		problems = append(problems, fmt.Sprintf("%q: only flags are known", flags.Args()))
	}
	if len(problems) == 0 {
		return nil
	}
	for _, p := range problems {
		fmt.Fprintf(flags.Output(), "%s: %s\n", flags.Name(), p)
	}
	return errUsage
}

// noCheck is for commands whose flags need none.
func noCheck() []string { return nil }
