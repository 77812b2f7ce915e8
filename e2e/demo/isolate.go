package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// isolatedEnv marks the process that runs in namespaces of its own.
const isolatedEnv = "POSTERN_DEMO_ISOLATED"

func isolated() bool { return os.Getenv(isolatedEnv) != "" && os.Getpid() == 1 }

// isolate runs the demo again as init of a new PID namespace, with network and mounts of its own, and returns its exit
// status. If this process is killed, the kernel kills that one (Pdeathsig), and with it every process that it started.
func isolate(ctx context.Context, stdout, stderr *os.File) (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("make the namespaces: needs root: run it with sudo")
	}
	runtime.LockOSThread() // Pdeathsig is sent when the thread that forked ends
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.CommandContext(ctx, exe, os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Env = append(os.Environ(), isolatedEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it says that it was interrupted
	cmd.WaitDelay = stopLimit
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) && ctx.Err() == nil {
		return 1, fmt.Errorf("start in new namespaces: %w", err)
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 1, nil // killed
}

// enterNode gives the new namespaces what a node has: mounts that nobody else sees, the PID namespace's own /proc, and an
// empty tmpfs on /run, where ip netns, iptables-legacy's lock and postern keep their files.
func enterNode() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	return nil
}
