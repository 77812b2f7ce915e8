package cluster

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// BeFirst is the first process of a node (RunNode starts it): it mounts what the node sees, starts what runs on a node, and then
// collects the processes whose parents have ended, as a first process must. It returns only with an error.
func BeFirst(file string) error {
	config, err := readInside(file)
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		config.mountKernel, config.keepKernelSettings, config.mountFiles, config.writeFiles, config.startRuntime, config.importImages,
		config.startKubelet,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("%s: %w", config.Name, err)
		}
	}
	proxy, err := config.startProxy()
	for {
		if err != nil {
			return fmt.Errorf("%s: %w", config.Name, err)
		}
		var status syscall.WaitStatus
		ended, gone := syscall.Wait4(-1, &status, 0, nil)
		if errors.Is(gone, syscall.ECHILD) {
			time.Sleep(100 * time.Millisecond) // nothing runs, yet the node is there until it is stopped
		}
		if ended == proxy {
			time.Sleep(time.Second)
			proxy, err = config.startProxy()
		}
	}
}

func mount(what, where, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(where, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(what, where, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s (%s %s): %w", what, where, kind, options, err)
	}
	return nil
}

// mountKernel mounts the kernel's file systems for the node's namespaces, and the control groups with the node's own for their
// roots.
func (c insideConfig) mountKernel() error {
	if err := unix.Sethostname([]byte(c.Name)); err != nil {
		return fmt.Errorf("set the host's name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts from the machine: %w", err)
	}
	if err := mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	all, err := hierarchies() // before the next mount hides them
	if err != nil {
		return err
	}
	if err := mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	if len(all) == 1 && all[0].Options == "" {
		return mountUnified()
	}
	if err := mount("tmpfs", "/sys/fs/cgroup", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, h := range all {
		if err := mount("cgroup", filepath.Join("/sys/fs/cgroup", h.Name), "cgroup", 0, h.Options); err != nil {
			return err
		}
	}
	return nil
}

// mountUnified mounts control groups of version 2, where a group holds processes or groups with controllers, and not both.
func mountUnified() error {
	const root = "/sys/fs/cgroup"
	if err := mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		return err
	}
	first := filepath.Join(root, "first")
	if err := os.Mkdir(first, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(first, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("enter control group %s: %w", first, err)
	}
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
			return fmt.Errorf("give the node's control groups %s: %w", controller, err)
		}
	}
	return nil
}

// keepKernelSettings hides the settings that are one for the whole machine and that kubelet writes: it finds files that already
// say what it wants.
func (c insideConfig) keepKernelSettings() error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file := filepath.Join(c.Folder, "sysctl", strings.ReplaceAll(name, "/", "_"))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("hide /proc/sys/%s: %w", name, err)
		}
	}
	return nil
}

// mountFiles gives the node its own view of the places that it writes to: an empty /run, layers over what the machine has, and
// plain folders where a container runtime needs them.
func (c insideConfig) mountFiles() error {
	if err := mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, dir := range []string{"etc", "opt", "var"} {
		upper, work := filepath.Join(c.Folder, "layers", dir, "upper"), filepath.Join(c.Folder, "layers", dir, "work")
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := mount("overlay", "/"+dir, "overlay", 0, "lowerdir=/"+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/var/log/containers",
		"/opt/cni/bin", "/etc/cni/net.d", "/etc/kubernetes/manifests"} {
		own := filepath.Join(c.Folder, "folders", dir)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		if err := mount(own, dir, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil { // kubelet wants volumes to be seen by containers
		return fmt.Errorf("share mounts on the node: %w", err)
	}
	return nil
}

// writeFiles writes what makes it a host of its own.
func (c insideConfig) writeFiles() error {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	for _, address := range c.Addresses {
		hosts += address.String() + " " + c.Name + "\n"
	}
	for file, text := range map[string]string{
		"/etc/hosts": hosts, "/etc/resolv.conf": "nameserver 127.0.0.1\n", "/etc/machine-id": hex.EncodeToString(id) + "\n",
		"/run/containerd.toml": strings.ReplaceAll(containerdConfig, "PAUSE-IMAGE", c.Pause),
	} {
		_ = os.Remove(file) // /etc/resolv.conf may be a link to somewhere else
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return c.chooseBackend()
}

// chooseBackend sets which iptables the names without a backend are, as update-alternatives(1) does.
func (c insideConfig) chooseBackend() error {
	backend := "nft"
	if c.Legacy {
		backend = "legacy"
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			link := "/etc/alternatives/" + family + suffix
			_ = os.Remove(link)
			if err := os.Symlink("/usr/sbin/"+family+"-"+backend+suffix, link); err != nil {
				return fmt.Errorf("choose the backend of iptables: %w", err)
			}
		}
	}
	return nil
}

const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE-IMAGE"
  restrict_oom_score_adj = true # less than its own is not allowed without CAP_SYS_RESOURCE
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
`

// environment of everything on the node.
func (c insideConfig) environment() []string {
	return []string{"PATH=" + c.Path, "LD_LIBRARY_PATH=" + c.Libraries, "HOME=/root"}
}

// start starts a program that goes on, with its output in the cluster's log folder.
func (c insideConfig) start(name string, argv ...string) (pid int, err error) {
	log, err := os.OpenFile(filepath.Join(c.Dir, "log", c.Name+"-"+name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	process, err := os.StartProcess(argv[0], argv, &os.ProcAttr{
		Env: c.environment(), Files: []*os.File{nil, log, log}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", name, err)
	}
	pid = process.Pid
	return pid, errors.Join(os.WriteFile("/run/"+name+".pid", fmt.Appendln(nil, pid), 0o644), process.Release())
}

func (c insideConfig) startRuntime() error {
	_, err := c.start("containerd", filepath.Join(c.Dir, "debian/usr/bin/containerd"), "--config", "/run/containerd.toml")
	if err != nil {
		return err
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = c.ctr("version"); err == nil {
			return nil
		}
	}
	return fmt.Errorf("wait until containerd answers: %w", err)
}

// importImages gives containerd the images that it does not have, for there is no registry.
func (c insideConfig) importImages() error {
	archives, err := filepath.Glob(filepath.Join(c.Dir, "images", "*.tar"))
	if err != nil {
		return err
	}
	done := filepath.Join(c.Folder, "imported")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	for _, archive := range archives {
		if err := c.ctr("--namespace", "k8s.io", "images", "import", archive); err != nil {
			return fmt.Errorf("import image %s: %w", archive, err)
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

func (c insideConfig) ctr(args ...string) error {
	cmd := exec.Command(filepath.Join(c.Dir, "debian/usr/bin/ctr"), args...)
	cmd.Env = c.environment()
	_, err := output(cmd, c.Name)
	return err
}

// kubernetesConfig is a file of the cluster for one of the node's programs.
func (c insideConfig) kubernetesConfig(name string) string {
	return filepath.Join(c.Dir, "run", c.Name+name)
}

func (c insideConfig) startKubelet() error {
	var addresses []string
	for _, a := range c.Addresses {
		addresses = append(addresses, a.String())
	}
	_, err := c.start("kubelet", filepath.Join(c.Dir, "bin/kubelet"), "--config="+c.kubernetesConfig("-kubelet.yaml"),
		"--kubeconfig="+c.kubernetesConfig(".kubeconfig"), "--hostname-override="+c.Name,
		"--node-ip="+strings.Join(addresses, ","), "--v=2")
	return err
}

// startProxy starts kube-proxy, and is called again when that has ended: it ends by itself to begin anew with other addresses of
// the node, which it also finds where it is quicker than kubelet is with the first ones. Elsewhere a DaemonSet starts it again.
func (c insideConfig) startProxy() (pid int, err error) {
	return c.start("kube-proxy", filepath.Join(c.Dir, "bin/kube-proxy"), "--config="+c.kubernetesConfig("-proxy.yaml"), "--v=2")
}
