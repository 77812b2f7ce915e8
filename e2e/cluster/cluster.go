package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Cluster is a running cluster, or one being made.
type Cluster struct {
	Config
	Dir    string // everything it needs and writes: programs, packages, images, logs, the nodes' files
	Source string // the tree that this program was built from
	Nodes  []*Node
	Client kubernetes.Interface // as administrator
	REST   *rest.Config
	Say    func(format string, args ...any) // progress, a line each
	state  state
}

// New is a cluster that is not up yet. Dir holds what package build made.
func New(config Config, dir, source string, say func(format string, args ...any)) (*Cluster, error) {
	config, err := config.Complete()
	if err != nil {
		return nil, err
	}
	c := &Cluster{Config: config, Dir: dir, Source: source, Say: say}
	for i := 1; i <= config.Nodes; i++ {
		n := &Node{Name: fmt.Sprintf("node%d", i), cluster: c, number: i}
		n.Addresses = config.nodeAddresses(i)
		c.Nodes = append(c.Nodes, n)
	}
	return c, nil
}

// Open is the cluster that is up in dir. The error is fs.ErrNotExist where none is.
func Open(dir, source string, say func(format string, args ...any)) (*Cluster, error) {
	data, err := os.ReadFile(filepath.Join(dir, "run", "state.json"))
	if err != nil {
		return nil, fmt.Errorf("find a cluster: %w", err)
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil {
		return nil, fmt.Errorf("read the state of the cluster in %s: %w", dir, err)
	}
	c, err := New(st.Config, dir, source, say)
	if err != nil {
		return nil, err
	}
	c.state = st
	return c, c.connect()
}

// connect makes the client; the API server need not run yet.
func (c *Cluster) connect() error {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig("admin"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a cluster that failed early: enough to take it down
	}
	if err != nil {
		return fmt.Errorf("read the administrator's kubeconfig: %w", err)
	}
	config.QPS, config.Burst = 200, 400
	c.REST = config
	c.Client, err = kubernetes.NewForConfig(config)
	return err
}

// Up brings the cluster up, to where its nodes are registered and wait for a network. What it made when it fails, Down removes.
func (c *Cluster) Up(ctx context.Context) error {
	for _, dir := range []string{"run", "nodes", "log"} {
		if err := os.RemoveAll(c.path(dir)); err != nil {
			return fmt.Errorf("empty %s: %w", c.path(dir), err)
		}
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return fmt.Errorf("make %s: %w", c.path(dir), err)
		}
	}
	c.state.Config = c.Config
	if err := c.save(); err != nil {
		return err
	}
	if err := c.makeNetwork(); err != nil {
		return err
	}
	if err := c.makePKI(); err != nil {
		return err
	}
	if err := c.connect(); err != nil {
		return err
	}
	if err := c.startControlPlane(ctx); err != nil {
		return err
	}
	c.Say("the control plane answers at %s", c.server())
	for _, n := range c.Nodes {
		if err := n.Start(ctx); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		podCIDRs, err := n.registered(ctx)
		if err != nil {
			return err
		}
		if err := c.routePods(n, podCIDRs); err != nil {
			return err
		}
		c.Say("%s is registered: address %v, pods %s", n.Name, n.Addresses[0], strings.Join(podCIDRs, " and "))
	}
	return c.startDNS(ctx)
}

// Down ends everything that was started and removes what was made, but for the logs. It goes on after an error, and may then be
// called again.
func (c *Cluster) Down() error {
	var errs []error
	for _, p := range slices.Backward(c.state.Processes) {
		errs = append(errs, p.stop(syscall.SIGKILL))
	}
	errs = append(errs, removeCgroups(c.state.Cgroups), c.keepPodLogs())
	for _, name := range namespaces() {
		errs = append(errs, removeNamespace(name))
	}
	for _, dir := range []string{etcdFolder, c.path("nodes")} {
		errs = append(errs, os.RemoveAll(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; what is left is still known: try e2e-down again", err)
	}
	return os.RemoveAll(c.path("run"))
}

// keepPodLogs moves what the pods that were there at the end have printed, policyd's among them, to the other logs.
func (c *Cluster) keepPodLogs() error {
	var errs []error
	for _, n := range c.Nodes {
		kept := c.path("log", n.Name+"-pods")
		if err := os.Rename(c.path("nodes", n.Name, "folders/var/log/pods"), kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("keep the logs of pods of %s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Running says whether everything that was started still runs.
func (c *Cluster) Running() bool {
	return len(c.state.Processes) > 0 && !slices.ContainsFunc(c.state.Processes, func(p process) bool { return !p.running() })
}

// Node finds a node by name.
func (c *Cluster) Node(name string) (*Node, error) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("there is no node %q in this cluster of %d", name, len(c.Nodes))
}

// NodesReady waits until all nodes are Ready.
func (c *Cluster) NodesReady(ctx context.Context, limit time.Duration) error {
	return eventually(ctx, limit, "all nodes are Ready", func() error {
		nodes, err := c.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var missing []string
		for _, n := range nodes.Items {
			if !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			}) {
				missing = append(missing, n.Name)
			}
		}
		if len(missing) > 0 || len(nodes.Items) < len(c.Nodes) {
			return fmt.Errorf("of %d nodes, these are not Ready: %s", len(nodes.Items), strings.Join(missing, ", "))
		}
		return nil
	})
}

// Kubectl runs kubectl as administrator and returns what it printed. The error holds that too.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is Kubectl with stdin.
func (c *Cluster) KubectlInput(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.program("kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig("admin"))
	cmd.Stdin = strings.NewReader(stdin)
	return output(cmd, "the cluster")
}

// program is one that package build made.
func (c *Cluster) program(name string) string { return c.path("bin", name) }

// debian is a file of the unpacked packages.
func (c *Cluster) debian(name string) string { return c.path("debian", name) }

// libraries is where programs of the unpacked packages find libraries that the machine may lack.
func (c *Cluster) libraries() string {
	all, _ := filepath.Glob(c.debian("usr/lib/*-linux-gnu"))
	return strings.Join(all, ":")
}

// nodePath is PATH on the nodes.
func (c *Cluster) nodePath() string {
	return c.debian("usr/bin") + ":" + c.debian("usr/sbin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// Environment is that of a shell for work on the cluster. Without what Enter leaves in it, so that a cluster made from there is
// one in a namespace of its own.
func (c *Cluster) Environment() []string {
	without := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, entered+"=") })
	return append(without, "KUBECONFIG="+c.Kubeconfig("admin"), "PATH="+c.path("bin")+":"+os.Getenv("PATH"))
}
