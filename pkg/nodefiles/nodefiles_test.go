package nodefiles_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/nodefiles"
)

// write makes a file with its folder.
func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tree lists the files and links below a folder, with what links lead to.
func tree(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if to, err := os.Readlink(path); err == nil {
			name += " -> " + to
		}
		list = append(list, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestThePluginIsReplacedWhileItRuns(t *testing.T) {
	dir, from := filepath.Join(t.TempDir(), "bin"), filepath.Join(t.TempDir(), "plugin")
	install := func(want bool) {
		t.Helper()
		if installed, err := nodefiles.InstallPlugin(from, dir); err != nil || installed != want {
			t.Fatalf("installed %v, %v; want %v", installed, err, want)
		}
	}
	program, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Skip(err)
	}
	write(t, from, string(program))
	install(true)
	install(false)
	running := exec.Command(filepath.Join(dir, nodefiles.Plugin), "60")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := running.Process.Kill(); err != nil { // it still runs
			t.Error(err)
		}
		_ = running.Wait()
	}()
	write(t, from, "#!/bin/sh\necho new\n")
	install(true)
	if out, err := exec.Command(filepath.Join(dir, nodefiles.Plugin)).Output(); err != nil || string(out) != "new\n" {
		t.Errorf("the installed plugin says %q, %v", out, err)
	}
	if got := tree(t, dir); len(got) != 1 {
		t.Errorf("the folder holds %v", got)
	}
}

func TestOnlyALoopbackOfOursIsReplacedAndRemoved(t *testing.T) {
	from := write(t, filepath.Join(t.TempDir(), "loopback"), "ours")
	for _, tt := range []struct {
		name      string
		there     func(t *testing.T, dir string)
		installed bool
		after     []string // in the folder, after the installation
	}{
		{"none", func(*testing.T, string) {}, true, []string{"loopback -> postern-loopback", "postern-loopback"}},
		{"an older one of ours", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "postern-loopback"), "old")
			if err := os.Symlink("postern-loopback", filepath.Join(dir, "loopback")); err != nil {
				t.Fatal(err)
			}
		}, true, []string{"loopback -> postern-loopback", "postern-loopback"}},
		{"somebody else's", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "loopback"), "theirs")
		}, false, []string{"loopback"}},
		{"somebody else's link", func(t *testing.T, dir string) {
			if err := os.Symlink("/usr/lib/cni/loopback", filepath.Join(dir, "loopback")); err != nil {
				t.Fatal(err)
			}
		}, false, []string{"loopback -> /usr/lib/cni/loopback"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.there(t, dir)
			for _, want := range []bool{tt.installed, false} {
				if installed, err := nodefiles.InstallLoopback(from, dir); err != nil || installed != want {
					t.Fatalf("installed %v, %v; want %v", installed, err, want)
				}
			}
			if got := tree(t, dir); !slices.Equal(got, tt.after) {
				t.Errorf("the folder holds %q, want %q", got, tt.after)
			}
			if tt.installed {
				if text, err := os.ReadFile(filepath.Join(dir, "loopback")); err != nil || string(text) != "ours" {
					t.Errorf("loopback is %q, %v", text, err)
				}
			}
			for range 2 {
				if _, err := nodefiles.RemovePrograms(dir); err != nil {
					t.Fatal(err)
				}
			}
			if got := tree(t, dir); (len(got) == 0) != tt.installed {
				t.Errorf("after the removal the folder holds %q", got)
			}
		})
	}
}

func TestNetworkManagersAreToldWhereTheyAre(t *testing.T) {
	links := nodefiles.Links{Pods: []string{"pst*"}, Tunnels: []string{"postern-vx*"}}
	for _, tt := range []struct {
		folders []string
		files   []string
	}{
		{nil, nil},
		{[]string{"etc/systemd", "etc/udev", "etc/NetworkManager"}, nil},
		{[]string{"etc/udev/rules.d"}, []string{"etc/udev/rules.d/70-postern.rules"}},
		{[]string{"etc/udev/rules.d", "etc/systemd/network", "etc/NetworkManager/conf.d", "etc/sysctl.d"},
			[]string{"etc/NetworkManager/conf.d/postern.conf", "etc/sysctl.d/99-zz-postern.conf", "etc/systemd/network/05-postern.link",
				"etc/systemd/network/05-postern.network", "etc/udev/rules.d/70-postern.rules"}},
	} {
		root := t.TempDir()
		for _, f := range tt.folders {
			if err := os.MkdirAll(filepath.Join(root, f), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []int{len(tt.files), 0} { // the second time, all is there already
			if written, err := nodefiles.TellManagers(root, links); err != nil || len(written) != want {
				t.Errorf("%v: wrote %v, %v; want %d files", tt.folders, written, err, want)
			}
		}
		if got := tree(t, root); !slices.Equal(got, tt.files) {
			t.Errorf("%v: %v is there, want %v", tt.folders, got, tt.files)
		}
		for _, f := range tt.files {
			text, err := os.ReadFile(filepath.Join(root, f))
			if err != nil || !strings.Contains(string(text), "pst*") || !strings.Contains(string(text), "postern-vx*") {
				t.Errorf("%s does not speak of all links, %v:\n%s", f, err, text)
			}
		}
		for range 2 {
			if _, err := nodefiles.ForgetManagers(root); err != nil {
				t.Error(err)
			}
		}
		if got := tree(t, root); len(got) > 0 {
			t.Errorf("%v: %v is left", tt.folders, got)
		}
	}
}

func TestWhatCannotBeWrittenKeepsNothingElseFromBeing(t *testing.T) {
	root := t.TempDir()
	for _, f := range []string{"etc/udev/rules.d/70-postern.rules/in-the-way", "etc/systemd/network"} {
		if err := os.MkdirAll(filepath.Join(root, f), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	written, err := nodefiles.TellManagers(root, nodefiles.Links{Pods: []string{"pst*"}})
	if err == nil || !strings.Contains(err.Error(), "70-postern.rules") || len(written) != 2 {
		t.Errorf("wrote %v, %v", written, err)
	}
}
