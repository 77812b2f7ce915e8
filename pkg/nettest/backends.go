package nettest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// Backends runs a subtest for each iptables backend, "nft" and "legacy". One whose programs are missing, that the kernel
// does not support, or that POSTERN_TEST_BACKENDS leaves out, is skipped with the reason.
func Backends(t *testing.T, test func(t *testing.T, backend string)) {
	Need(t)
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			if only := os.Getenv("POSTERN_TEST_BACKENDS"); only != "" && only != backend {
				t.Skipf("POSTERN_TEST_BACKENDS is %s", only)
			}
			if err := tryBackend(backend); err != nil {
				t.Skip(err)
			}
			test(t, backend)
		})
	}
}

// tryBackend asks each family's program of a backend for its rules, in a namespace that ends with the question, so that no
// table is created in the test's own.
func tryBackend(backend string) error {
	for _, family := range []string{"iptables", "ip6tables"} {
		name := family + "-" + backend
		cmd := exec.Command(name, "-w", "-t", "mangle", "-S")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s does not work here: %w: %s", name, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
