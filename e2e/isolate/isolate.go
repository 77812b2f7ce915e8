package isolate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// insideEnv marks the process that runs in namespaces of its own.
const insideEnv = "POSTERN_E2E_ISOLATED"

// Inside reports whether this process is the one that [Self.Run] started.
func Inside() bool { return os.Getenv(insideEnv) != "" && os.Getpid() == 1 }

// Self is this program, to be run again.
type Self struct {
	Args           []string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Grace          time.Duration // how long it has to end once the context has ended: it gets SIGTERM, and then SIGKILL
}

// Run runs it as init of a new PID namespace, with network and mounts of its own, and returns its exit status; 1 if it was
// killed. If this process is killed, the kernel kills that one (Pdeathsig), and with it every process that it started.
func (s Self) Run(ctx context.Context) (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("make the namespaces: needs root: run it with sudo")
	}
	runtime.LockOSThread() // Pdeathsig is sent when the thread that forked ends
	defer runtime.UnlockOSThread()
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.CommandContext(ctx, exe, s.Args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.Stdin, s.Stdout, s.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it says that it was interrupted
	cmd.WaitDelay = s.Grace
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) && ctx.Err() == nil {
		return 1, fmt.Errorf("start in new namespaces: %w", err)
	}
	if cmd.ProcessState == nil {
		return 1, ctx.Err() // the context had ended before it started
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 1, nil // killed
}

// Enter gives the new namespaces what a node has: mounts that nobody else sees, the PID namespace's own /proc, and an empty
// tmpfs on /run, where ip netns, iptables-legacy's lock and postern keep their files.
func Enter() error {
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
