package cluster

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
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
	start := time.Now()
	if _, err := c.Kubectl(ctx, "apply", "-k", c.Manifests()); err != nil {
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

// Installed says whether Install has been done.
func (c *Cluster) Installed() bool { return c.state.Installed }

// DNSReady waits until names are answered.
func (c *Cluster) DNSReady(ctx context.Context) error {
	_, err := c.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", "deployment/coredns", "--timeout=3m")
	return err
}
