package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/e2e/build"
)

// Node is one of the cluster's nodes, seen from outside.
type Node struct {
	Name      string
	Addresses []netip.Addr // the first is the one of the cluster's first family
	cluster   *Cluster
	number    int // from 1
}

// insideConfig is what the programs of a node are told: RunNode and BeFirst read it from a file.
type insideConfig struct {
	Name      string
	Namespace string
	Addresses []netip.Addr
	Dir       string // the cluster's
	Folder    string // where everything that the node writes is
	Path      string // PATH of everything on the node
	Libraries string // LD_LIBRARY_PATH of programs from unpacked packages
	Legacy    bool   // iptables' backend
	Pause     string // the image of sandboxes
	Cgroups   []string
}

func (n *Node) namespace() string { return Namespace + "-" + n.Name }

// file is one of the node's in the cluster's run folder.
func (n *Node) file(suffix string) string { return n.cluster.path("run", n.Name+suffix) }

// Start makes the node's namespaces and starts what runs on it. Its files are as it left them, or empty the first time; /run is
// empty.
func (n *Node) Start(ctx context.Context) error {
	if err := n.makeNetwork(); err != nil {
		return err
	}
	groups, err := makeCgroups(n.namespace())
	n.cluster.state.Cgroups = append(n.cluster.state.Cgroups, groups...)
	if err != nil {
		return err
	}
	names, err := build.ReadNames(n.cluster.Dir)
	if err != nil {
		return err
	}
	config, err := json.MarshalIndent(insideConfig{
		Name: n.Name, Namespace: n.namespace(), Addresses: n.Addresses, Dir: n.cluster.Dir, Folder: n.cluster.path("nodes", n.Name),
		Path: n.cluster.nodePath(), Libraries: n.cluster.libraries(), Legacy: n.cluster.Backend == "legacy", Pause: names.Pause,
		Cgroups: groups,
	}, "", "  ")
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{".json": config, "-kubelet.yaml": n.kubeletConfig(), "-proxy.yaml": n.proxyConfig()} {
		if err := os.WriteFile(n.file(name), text, 0o600); err != nil {
			return fmt.Errorf("start %s: %w", n.Name, err)
		}
	}
	_ = os.Remove(n.file(".pid"))
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := n.cluster.spawn(n.Name, self, "power", n.file(".json")); err != nil {
		return err
	}
	return eventually(ctx, 20*time.Second, n.Name+" has its first process", func() error {
		_, err := n.pid()
		return err
	})
}

// Stop is a power cut: everything that runs on the node ends, and its namespaces, /run and memory are gone; its disk stays.
func (n *Node) Stop(context.Context) error {
	if err := n.cluster.stop(n.Name, syscall.SIGKILL); err != nil {
		return err
	}
	// The kernel takes its time to end a namespace and the links in it; the other end of the node's is here.
	if link, err := netlink.LinkByName(n.Name); err == nil {
		if err := netlink.LinkDel(link); err != nil {
			return fmt.Errorf("remove the link of %s: %w", n.Name, err)
		}
	}
	return removeNamespace(n.namespace())
}

// pid is that of the node's first process.
func (n *Node) pid() (int, error) {
	data, err := os.ReadFile(n.file(".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// Run runs a command in all of the node's namespaces and returns what it printed. The error holds that too.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	cmd, err := n.Command(ctx, args...)
	if err != nil {
		return "", err
	}
	return output(cmd, n.Name)
}

// Command is a command in all of the node's namespaces, to be run by the caller.
func (n *Node) Command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	pid, err := n.pid()
	if err != nil {
		return nil, fmt.Errorf("%s: run %s: the node does not run: %w", n.Name, strings.Join(args, " "), err)
	}
	enter := []string{"--target", strconv.Itoa(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--", "env",
		"PATH=" + n.cluster.nodePath(), "LD_LIBRARY_PATH=" + n.cluster.libraries()}
	return exec.CommandContext(ctx, "nsenter", append(enter, args...)...), nil
}

// Path is a file of the node's as it is seen from here: what its mounts hide or add is in it.
func (n *Node) Path(file string) (string, error) {
	pid, err := n.pid()
	if err != nil {
		return "", fmt.Errorf("find %s of %s: the node does not run: %w", file, n.Name, err)
	}
	return filepath.Join("/proc", strconv.Itoa(pid), "root", file), nil
}

// Within runs fn with its thread in the node's network namespace.
func (n *Node) Within(fn func() error) error {
	handle, err := netns.GetFromName(n.namespace())
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", n.namespace(), err)
	}
	defer handle.Close()
	return InNamespace(handle, fn)
}

// output runs a command and returns what it printed; an error says it too.
func output(cmd *exec.Cmd, where string) (string, error) {
	out, err := cmd.CombinedOutput()
	text := strings.TrimRight(string(out), "\n")
	if err != nil {
		return text, fmt.Errorf("%s: %s: %w: %s", where, strings.Join(cmd.Args, " "), err, text)
	}
	return text, nil
}

// registered waits until the API server has the node with its pod ranges, and returns them.
func (n *Node) registered(ctx context.Context) (podCIDRs []string, err error) {
	err = eventually(ctx, 2*time.Minute, n.Name+" is registered with a pod range", func() error {
		node, err := n.cluster.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err == nil && len(node.Spec.PodCIDRs) < len(n.Addresses) {
			err = fmt.Errorf("the pod ranges are %v", node.Spec.PodCIDRs)
		}
		if err == nil {
			podCIDRs = node.Spec.PodCIDRs
		}
		return err
	})
	return podCIDRs, err
}

func (n *Node) kubeletConfig() []byte {
	return []byte(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0  # less is not allowed without CAP_SYS_RESOURCE
maxPods: 200
staticPodPath: /etc/kubernetes/manifests
clusterDomain: cluster.local
clusterDNS: [` + n.cluster.dns() + `]
resolvConf: /etc/resolv.conf
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: ` + n.cluster.path("run", "ca.crt") + `}
authorization: {mode: Webhook}
# The disk is the machine's: how full it is is not the cluster's affair.
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
`)
}

func (n *Node) proxyConfig() []byte {
	return []byte(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: ` + n.cluster.Kubeconfig("proxy") + `}
hostnameOverride: ` + n.Name + `
mode: ` + n.cluster.Proxy + `
clusterCIDR: ` + n.cluster.each(func(f string) string { return networks[f].pods }) + `
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}  # the limit is the machine's
iptables: {minSyncPeriod: 1s, syncPeriod: 30s}
nftables: {minSyncPeriod: 1s, syncPeriod: 30s}
`)
}

// RunNode is the program that stands for a node's power: it enters the node's network namespace and control groups, and starts
// the node's first process in namespaces of its own, which ends with it. It returns when that has ended.
func RunNode(file string) error {
	config, err := readInside(file)
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the child's end is bound to this thread's
	handle, err := netns.GetFromName(config.Namespace)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", config.Namespace, err)
	}
	if err := netns.Set(handle); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", config.Namespace, err)
	}
	if err := joinCgroups(config.Cgroups); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "first", file)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID | syscall.CLONE_NEWCGROUP,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the first process of %s: %w", config.Name, err)
	}
	pidFile := strings.TrimSuffix(file, ".json") + ".pid"
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		return err
	}
	return cmd.Wait()
}

func readInside(file string) (insideConfig, error) {
	var config insideConfig
	data, err := os.ReadFile(file)
	if err != nil {
		return config, err
	}
	if err := json.Unmarshal(data, &config); err != nil {
		return config, fmt.Errorf("read %s: %w", file, err)
	}
	return config, nil
}
