// Command demo shows postern at work on one machine, with nothing installed: `make demo`.
//
// It runs itself again in network, mount and PID namespaces of its own. In there its network namespace is a Kubernetes
// node: real pods are attached to it through libcni and the real plugin, the real policyd reads a folder of manifests. The
// demo edits that folder step by step, and at each step lets everybody try to connect to everybody, prints who reached
// whom, beside it who should by the words of the policies, and fails if they differ. Whichever way it ends, the kernel
// takes everything away with the last process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/isolate"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr *os.File) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	bin := flags.String("bin", "bin", "folder with the programs postern and policyd")
	backend := flags.String("iptables-backend", "auto", "nft, legacy or auto")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if !isolate.Inside() {
		code, err := isolate.Self{Args: args, Stdout: stdout, Stderr: stderr, Grace: stopLimit}.Run(ctx)
		if err != nil {
			fmt.Fprintln(stderr, "demo:", err)
		}
		return code
	}
	folder, err := filepath.Abs(*bin)
	if err == nil {
		err = demo(ctx, stdout, folder, *backend)
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "demo: interrupted; nothing is left behind")
		return 130
	case err != nil:
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	return 0
}

// errDiffers ends a demo that found somebody reached who should not be, or not reached who should be.
var errDiffers = errors.New("the kernel does not do what the policies say")

func demo(ctx context.Context, stdout *os.File, bin, backend string) error {
	begin := time.Now()
	style := styleFor(stdout)
	world, err := buildWorld(ctx, bin, backend)
	if err != nil {
		return err
	}
	defer world.close()
	style.welcome(stdout, world)
	if err := world.attachAll(ctx); err != nil {
		return err
	}

	var differences []string
	tried := 0
	for i, step := range steps {
		if err := step.change(world.cluster); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
		if err := world.enforce(ctx); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
		all, err := world.expect(step.tries(world))
		if err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
		if err := measure(ctx, all); err != nil {
			return err
		}
		style.step(stdout, i+1, step, world, all)
		tried += len(all)
		differences = append(differences, differing(i+1, all)...)
	}
	return summary(stdout, style, differences, tried, time.Since(begin))
}

// summary ends the demo's output; its error names the pairs that differ.
func summary(stdout io.Writer, style style, differences []string, tried int, took time.Duration) error {
	fmt.Fprintf(stdout, "%s\n", style.bold("Summary"))
	if len(differences) == 0 {
		fmt.Fprintf(stdout, "  %s %d steps, %d connections tried: each one went as the policies say. %.0f s.\n\n",
			style.good("ok"), len(steps), tried, took.Seconds())
		return nil
	}
	fmt.Fprintf(stdout, "  %s %d of %d connections went otherwise than the policies say:\n",
		style.bad("FAILED"), len(differences), tried)
	fmt.Fprintf(stdout, "    %s\n\n", strings.Join(differences, "\n    "))
	return errDiffers
}
