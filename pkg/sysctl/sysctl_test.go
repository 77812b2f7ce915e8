package sysctl

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// readOnly mounts the folder of settings as a container has it, until the test ends.
func readOnly(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	err := errors.Join(unix.Mount(own, dir, "", unix.MS_BIND, ""),
		unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""))
	if err != nil {
		t.Skipf("no read-only mount of %s here: %v", own, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestASettingIsWrittenOnceAndByTheOtherMountIfItMust(t *testing.T) {
	for _, container := range []bool{false, true} {
		nettest.NewNS(t, "node").Do(t, func() {
			from := own
			if container {
				from = readOnly(t)
			}
			for _, value := range []string{"1", "0"} {
				s := Of("ipv4/ip_forward", value)
				for _, want := range []bool{true, false} {
					if now, err := s.Read(); err != nil || (now != value) != want {
						t.Fatalf("%s is %q, %v", s, now, err)
					}
					if changed, err := s.set(from, own); err != nil || changed != want {
						t.Errorf("in a container %v: set %s to %s: changed %v, %v; want %v", container, s, value, changed, err, want)
					}
				}
			}
			if _, err := Of("ipv4/no_such_setting", "1").set(from, own); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a setting that the kernel does not have: %v", err)
			}
			if _, err := os.Stat(filepath.Join(own, "ipv4/no_such_setting")); err == nil {
				t.Error("it was made")
			}
		})
	}
}

func TestAContainerWithoutTheMountIsToldSo(t *testing.T) {
	nettest.NewNS(t, "node").Do(t, func() {
		_, err := Of("ipv4/ip_forward", "1").set(readOnly(t), "/nowhere")
		if err == nil || !strings.Contains(err.Error(), "not mounted at /nowhere") || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the error is %v", err)
		}
	})
}

// What the plugin writes into the settings of a link: the folder is read-only in a container.
func TestSettingsOfAFolderAreWrittenTogether(t *testing.T) {
	for _, container := range []bool{false, true} {
		nettest.NewNS(t, "node").Do(t, func() {
			from := own
			if container {
				from = readOnly(t)
			}
			list := []Setting{Of("ipv4/conf/lo/rp_filter", "1"), Of("ipv4/conf/lo/send_redirects", "0"), Of("ipv4/conf/lo/no_such", "1")}
			if err := writeAll(from, own, list...); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no_such") {
				t.Errorf("in a container %v: a setting that the kernel does not have: %v", container, err)
			}
			for _, s := range list[:2] {
				if now, err := s.Read(); now != s.Value {
					t.Errorf("in a container %v: %s is %q, %v; want %s", container, s, now, err, s.Value)
				}
			}
			if err := Write(list[0], Of("ipv4/ip_forward", "1")); err == nil {
				t.Error("settings of two folders were taken for those of one")
			}
			if err := Write(Of("ipv4/conf/none/rp_filter", "1")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("settings of a link that is not there: %v", err)
			}
		})
	}
}
