package cluster

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/postern-cni/postern/e2e/build"
)

// dnsManifest is CoreDNS, which many of the upstream suites' specs ask for names.
//
//go:embed coredns.yaml
var dnsManifest string

func (c *Cluster) dns() string { return networks[c.families()[0]].dns }

// startDNS gives the cluster its DNS server, which waits for a network.
func (c *Cluster) startDNS(ctx context.Context) error {
	names, err := build.ReadNames(c.Dir)
	if err != nil {
		return err
	}
	manifest := strings.NewReplacer("CLUSTER-DNS", c.dns(), "COREDNS-IMAGE", names.CoreDNS).Replace(dnsManifest)
	_, err = c.KubectlInput(ctx, manifest, "apply", "-f", "-")
	return err
}

// Manifests is the kustomization that a builder of a cluster of this kind would apply.
func (c *Cluster) Manifests() string {
	switch {
	case c.Tunnel == "always":
		return filepath.Join(c.Source, "manifests/overlays/vxlan")
	case c.Tunnel == "never":
		return c.path("run", "kustomization")
	case c.Family == "dual":
		return filepath.Join(c.Source, "manifests/overlays/dual-stack")
	default:
		return filepath.Join(c.Source, "manifests/base")
	}
}

// writeKustomization is for what no overlay of the project does.
func (c *Cluster) writeKustomization() error {
	dir := c.path("run", "kustomization")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	base, err := filepath.Rel(dir, filepath.Join(c.Source, "manifests/base"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(`resources: [`+base+`]
patches:
- target: {kind: DaemonSet, name: postern}
  patch: |
    [{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--tunnel=`+c.Tunnel+`"}]
`), 0o644)
}

// Install applies the manifests and waits until all nodes are Ready; it returns how long that took.
func (c *Cluster) Install(ctx context.Context) (time.Duration, error) {
	if err := c.writeKustomization(); err != nil {
		return 0, fmt.Errorf("write a kustomization: %w", err)
	}
	if c.state.Before == nil {
		c.state.Before = map[string]string{}
		for _, n := range c.Nodes {
			files, err := n.files(ctx)
			if err != nil {
				return 0, err
			}
			c.state.Before[n.Name] = files
		}
	}
	return c.apply(ctx, "-k", c.Manifests())
}

// InstallRendered is Install with the one rendered file.
func (c *Cluster) InstallRendered(ctx context.Context) (time.Duration, error) {
	return c.apply(ctx, "-f", filepath.Join(c.Source, "manifests/postern.yaml"))
}

func (c *Cluster) apply(ctx context.Context, how, what string) (time.Duration, error) {
	start := time.Now()
	if _, err := c.Kubectl(ctx, "apply", how, what); err != nil {
		return 0, err
	}
	if err := c.NodesReady(ctx, 5*time.Minute); err != nil {
		return 0, err
	}
	took := time.Since(start)
	if _, err := c.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", "daemonset/postern", "--timeout=2m"); err != nil {
		return 0, err
	}
	c.state.Installed = true
	return took, c.save()
}

// Uninstall takes postern out of the cluster and off its nodes, as manifests/README.md says.
func (c *Cluster) Uninstall(ctx context.Context) error {
	uninstaller := filepath.Join(c.Source, "manifests/uninstall.yaml")
	for _, args := range [][]string{
		{"delete", "-f", filepath.Join(c.Source, "manifests/postern.yaml"), "--ignore-not-found", "--timeout=2m"},
		{"apply", "-f", uninstaller},
		{"--namespace=kube-system", "rollout", "status", "daemonset/postern-uninstall", "--timeout=3m"},
		{"delete", "-f", uninstaller, "--cascade=foreground", "--timeout=2m"},
	} {
		if _, err := c.Kubectl(ctx, args...); err != nil {
			return err
		}
	}
	c.state.Installed = false
	return c.save()
}

// files are those of the places where software puts itself, one a line.
func (n *Node) files(ctx context.Context) (string, error) {
	return n.Run(ctx, "find", "/etc", "/opt", "-not", "-type", "d", "-not", "-path", "/etc/kubernetes/*")
}

// KernelTraces are what each line of Traces about the kernel begins with. All are there while postern is.
var KernelTraces = []string{"chains and rules", "sets", "links", "routes"}

// Traces looks for what postern leaves on a node: nothing, after Uninstall.
func (n *Node) Traces(ctx context.Context) ([]string, error) {
	var found []string
	for _, look := range []struct {
		what    string
		command string // prints a line for each trace
	}{
		{"chains and rules", `for save in ip{,6}tables-{nft,legacy}-save; do
			$save 2>/dev/null | grep -iE 'postern|pst' | sed "s/^/$save: /"; done`},
		{"sets", `ipset list -name | grep -iE '^(pst|postern)'`},
		{"links", `ip -oneline link show | grep -E ' (pst|psx|postern)'`},
		{"routes", `ip -4 route show table all proto 112; ip -6 route show table all proto 112`},
		{"files of its name", `find /etc /opt /run /var/lib/cni -path /run/containerd -prune -o -iname '*postern*' -print`},
		{"mentions in files", `grep -rlE 'postern|pst\*' /etc/NetworkManager /etc/systemd/network /etc/udev /etc/cni 2>/dev/null`},
	} {
		// grep's exit status 1 means that there are none.
		out, err := n.Run(ctx, "bash", "-c", look.command+`; true`)
		if err != nil {
			return nil, fmt.Errorf("look for %s: %w", look.what, err)
		}
		for line := range strings.Lines(out) {
			found = append(found, look.what+": "+strings.TrimSpace(line))
		}
	}
	files, err := n.files(ctx)
	if err != nil {
		return nil, err
	}
	before := strings.Split(n.cluster.state.Before[n.Name], "\n")
	for file := range strings.SplitSeq(files, "\n") {
		if !slices.Contains(before, file) {
			found = append(found, "a file that was not there before: "+file)
		}
	}
	return found, nil
}

// Installed says whether Install has been done.
func (c *Cluster) Installed() bool { return c.state.Installed }

// DNSReady waits until names are answered.
func (c *Cluster) DNSReady(ctx context.Context) error {
	_, err := c.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", "deployment/coredns", "--timeout=3m")
	return err
}
