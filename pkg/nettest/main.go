package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stateEnv tells the test binary which of its lives it is in: unset in the one the user started; stateInside in scratch
// namespaces that are still bare; stateReady and the process's number once they are set up, which the workers of `go test
// -fuzz` inherit; stateNone and a reason where the system allows none.
const (
	stateEnv    = "POSTERN_NETTEST"
	stateInside = "inside"
	stateReady  = "ready: "
	stateNone   = "none: "
)

// exitNoProc is the status with which the inner process says that it could not mount /proc for its PID namespace.
const exitNoProc = 119

// Runner is a *testing.M, or a program that tests.
type Runner interface {
	// Run returns the exit status.
	Run() int
}

// The process's first thread is that of TestMain alone. Who enters a network namespace for good does so on a thread that ends with
// its goroutine, which the first does not: Go would leave it in there.
func init() { runtime.LockOSThread() }

// Main runs the tests of m in scratch namespaces and exits with their status. Call it from TestMain, and nothing before it.
func Main(m Runner) {
	switch state := os.Getenv(stateEnv); {
	case state == stateInside:
		os.Exit(inside(m))
	case strings.HasPrefix(state, stateReady):
		os.Exit(m.Run()) // a fuzz worker, in the namespaces of the process that started it
	}
	code, err := outside()
	if err == nil {
		os.Exit(code)
	}
	fmt.Fprintf(os.Stderr, "nettest: no namespaces here, so the tests that need the kernel are skipped: %v\n", err)
	if err := os.Setenv(stateEnv, stateNone+err.Error()); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// Need skips the test where the system allows no scratch namespaces, with the reason.
func Need(t testing.TB) {
	t.Helper()
	state := os.Getenv(stateEnv)
	if reason, none := strings.CutPrefix(state, stateNone); none {
		t.Skip("needs network namespaces: " + reason)
	}
	if !strings.HasPrefix(state, stateReady) {
		t.Fatal("nettest: TestMain does not call nettest.Main")
	}
}

// outside runs this binary again in new namespaces and returns its exit status; an error means that it could not start.
// First with a PID namespace, then, where /proc cannot be mounted for one (a container with a masked /proc), without.
func outside() (int, error) {
	// The kernel sends Pdeathsig when the thread that forked ends, so that thread must live as long as the process.
	runtime.LockOSThread()
	var errs []error
	for _, pid := range []uintptr{unix.CLONE_NEWPID, 0} {
		code, err := spawn(unix.CLONE_NEWNET | unix.CLONE_NEWNS | pid)
		if err == nil && code != exitNoProc {
			return code, nil
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return 0, errors.Join(errs...)
}

// spawn runs the inner process in namespaces of these kinds and serves its builds until it ends.
func spawn(flags uintptr) (int, error) {
	exe, err := os.Executable()
	if err != nil {
		return 0, fmt.Errorf("find the test binary: %w", err)
	}
	attr := &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	cmd.Env = append(os.Environ(), stateEnv+"="+stateInside)

	workshop, err := openWorkshop(cmd)
	if err != nil {
		return 0, err
	}
	defer workshop.close()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s in new namespaces: %w", exe, err)
	}
	workshop.serve()
	var exit *exec.ExitError
	if err := cmd.Wait(); errors.As(err, &exit) && !exit.Exited() {
		return 1, nil // killed: whatever it had to say is on stderr
	} else if err != nil && exit == nil {
		return 0, fmt.Errorf("wait for %s: %w", exe, err)
	}
	return cmd.ProcessState.ExitCode(), nil
}

// inside makes the scratch host around the process and runs the tests in it.
func inside(m Runner) int {
	if os.Getpid() == 1 {
		// Before anything else looks at /proc: the inherited one counts the processes of another PID namespace.
		if err := mountProc(); err != nil {
			return exitNoProc
		}
	}
	if err := setUp(); err != nil {
		fmt.Fprintf(os.Stderr, "nettest: set up the scratch namespaces: %v\n", err)
		return 1
	}
	if err := os.Setenv(stateEnv, ready()); err != nil {
		panic(err)
	}
	return m.Run()
}

// ready is the state of this process once its namespaces are set up.
func ready() string { return stateReady + strconv.Itoa(os.Getpid()) }

func mountProc() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

func setUp() error {
	// The pipes to the outer process must not live on in programs that tests start.
	unix.CloseOnExec(orderFD)
	unix.CloseOnExec(answerFD)
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// iptables-legacy's lock file, ip netns and postern's state all live in /run.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	if err := os.Mkdir(nsDir, 0o755); err != nil {
		return err
	}
	if err := bindNS(selfPath); err != nil {
		return err
	}
	// sbin is not in every user's PATH, and that is where iptables and ipset are.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	return upLoopback()
}
