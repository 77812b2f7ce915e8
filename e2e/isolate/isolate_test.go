package isolate_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/e2e/isolate"
)

// The test's program is also the one that is run again.
func TestMain(m *testing.M) {
	if isolate.Inside() {
		if err := inside(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(3)
		}
		os.Exit(7)
	}
	os.Exit(m.Run())
}

func inside(what string) error {
	if what == "stay" {
		fmt.Println("here")
		time.Sleep(time.Hour) // it is ended from outside
	}
	if err := isolate.Enter(); err != nil {
		return err
	}
	links, err := net.Interfaces()
	if err != nil || len(links) != 1 {
		return fmt.Errorf("interfaces %v, error %v: want lo alone", links, err)
	}
	run, err := os.ReadDir("/run")
	if err != nil || len(run) != 0 {
		return fmt.Errorf("/run has %v, error %v", run, err)
	}
	if name, err := os.Readlink("/proc/self"); err != nil || name != "1" {
		return fmt.Errorf("/proc/self is %s, error %v", name, err)
	}
	if out, err := exec.Command("ip", "netns", "add", "inner").CombinedOutput(); err != nil {
		return fmt.Errorf("ip netns add: %w: %s", err, out)
	}
	if what == "deeper" { // as a benchmark that has sides
		var out bytes.Buffer
		if code, err := (isolate.Self{Args: []string{"once"}, Stdout: &out, Stderr: &out}).Run(context.Background()); code != 7 {
			return fmt.Errorf("inside of it: exit status %d, error %v: %s", code, err, out.String())
		}
	}
	return nil
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func TestTheProgramHasNamespacesOfItsOwnAlsoInsideOfSuch(t *testing.T) {
	needRoot(t)
	var out bytes.Buffer
	code, err := isolate.Self{Args: []string{"deeper"}, Stdout: &out, Stderr: &out}.Run(t.Context())
	if code != 7 || err != nil {
		t.Errorf("exit status %d, error %v: %s", code, err, out.String())
	}
	if _, err := os.Stat("/run/netns/inner"); err == nil {
		t.Error("what was made in there is out here")
	}
}

func TestItEndsWhenTheContextDoes(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	code, err := isolate.Self{Args: []string{"stay"}, Stdout: writer(func(p []byte) {
		if strings.Contains(string(p), "here") {
			cancel()
		}
	}), Grace: 50 * time.Millisecond}.Run(ctx)
	if code == 0 || err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("exit status %d, error %v", code, err)
	}
}

type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }
