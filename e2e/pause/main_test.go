package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
)

// asPause, in the environment, makes the test binary the program, as the process that orphans fall to.
const asPause = "POSTERN_TEST_PAUSE"

func TestMain(m *testing.M) {
	if os.Getenv(asPause) == "" {
		os.Exit(m.Run())
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		os.Exit(3)
	}
	main()
}

// start runs the program with children that it did not start, for a shell became it: one is dead already, two die together.
// It returns when the program has collected them all.
func start(t *testing.T) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `true & sleep 0.2 & sleep 0.2 & exec "$0"`, exe)
	cmd.Env = append(os.Environ(), asPause+"=1")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	nettest.Eventually(t, time.Minute, "children that have ended are collected", func() error {
		if name, err := os.Readlink("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/exe"); name != exe {
			return fmt.Errorf("the program is still %s (%v)", name, err)
		}
		if left := children(t, cmd.Process.Pid); len(left) > 0 {
			return fmt.Errorf("%v are left", left)
		}
		return nil
	})
	return cmd
}

// children lists a process's children, dead ones that were not collected among them.
func children(t *testing.T, pid int) []string {
	t.Helper()
	own, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, file := range own {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that ended
		}
		all = append(all, strings.Fields(string(content))...)
	}
	return all
}

func TestOrphansAreCollectedAndASignalEndsIt(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		pause := start(t)
		if err := pause.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if err := pause.Wait(); err != nil {
			t.Errorf("%v: it ended with %v, not with status 0", signal, err)
		}
	}
}
