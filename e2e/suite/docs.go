package suite

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/postern-cni/postern/e2e/docs"
)

// manifestsFolder is where the pages and what they apply are in the source tree.
const manifestsFolder = "manifests"

// Docs is the documentation: each page followed from its beginning to its end, and the commands that are for other machines taken
// by the programs they are for.
func Docs() []Case {
	return []Case{
		{Name: "kind.md, followed as far as the cluster allows", Run: page("kind.md")},
		{Name: "kubeadm.md, followed as far as the cluster allows", Run: page("kubeadm.md")},
		{Name: "migrating.md, followed as far as the cluster allows", Run: page("migrating.md")},
		{Name: "kubeadm takes the pages' commands", Run: kubeadm},
		{Name: "ctr takes the image as the pages say", Run: ctr},
	}
}

// page follows a page in a folder that looks like the top of the source tree.
func page(name string) func(context.Context, *T) {
	return func(ctx context.Context, t *T) {
		blocks, err := docs.Read(filepath.Join(t.Cluster.Source, manifestsFolder, name))
		if err != nil {
			t.Fatalf("%v", err)
		}
		folder, err := os.MkdirTemp("", "page-")
		if err != nil {
			t.Fatalf("make a folder: %v", err)
		}
		t.Cleanup(func(context.Context) { os.RemoveAll(folder) })
		for _, there := range []string{manifestsFolder, "bin"} {
			if err := os.Symlink(filepath.Join(t.Cluster.Source, there), filepath.Join(folder, there)); err != nil {
				t.Fatalf("make the folder look like the source tree: %v", err)
			}
		}
		t.leaveAsItWas()
		var steps []docs.Step
		for _, b := range blocks {
			if b.Mark != docs.Run {
				t.Logf("%s is not run: %s", b, b.Reason)
				continue
			}
			for _, step := range b.Steps() {
				steps = append(steps, t.here(step)...)
			}
		}
		t.Follow(ctx, folder, steps)
	}
}

// installs are the commands that install postern in the pages.
var installs = []string{"kubectl apply -f manifests/postern.yaml", "kubectl apply -k manifests/overlays/kind"}

// here is a step as this cluster needs it. What installs postern on another kind of cluster is only tried, for the API server to
// check it, and what this cluster was installed from is applied. Names of nodes and the kubeconfig are this cluster's.
func (t *T) here(step docs.Step) []docs.Step {
	last := t.Cluster.Nodes[len(t.Cluster.Nodes)-1].Name
	step.Command = strings.NewReplacer("worker-1", last, "~/.kube/config", `"$KUBECONFIG"`).Replace(step.Command)
	for _, install := range installs {
		if step.Command == install {
			return []docs.Step{{Command: install + " --dry-run=server"}, {Command: "kubectl apply -k " + t.Cluster.Manifests()}}
		}
	}
	return []docs.Step{step}
}

// leaveAsItWas undoes what a page does to the cluster, also if it breaks off.
func (t *T) leaveAsItWas() {
	t.Cleanup(func(ctx context.Context) {
		t.Kubectl(ctx, "delete", "namespace", "shop", "--ignore-not-found")
		t.Kubectl(ctx, "delete", "--ignore-not-found", "-f",
			filepath.Join(t.Cluster.Source, manifestsFolder, "examples", "from-pods.yaml"))
		for _, n := range t.Cluster.Nodes {
			t.Kubectl(ctx, "uncordon", n.Name)
			t.Kubectl(ctx, "label", "node", n.Name, "network-")
		}
		t.Kubectl(ctx, "apply", "-k", t.Cluster.Manifests())
		t.Kubectl(ctx, "rollout", "status", "-n", "kube-system", "daemonset/postern", "--timeout=2m")
		t.Kubectl(ctx, "rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=2m")
	})
}

// checked are the commands of the pages that are not run and begin so, without what they begin with.
func (t *T) checked(prefix string) map[string][]string {
	all := map[string][]string{}
	for _, name := range []string{"kind.md", "kubeadm.md", "migrating.md"} {
		blocks, err := docs.Read(filepath.Join(t.Cluster.Source, manifestsFolder, name))
		if err != nil {
			t.Fatalf("%v", err)
		}
		for _, b := range blocks {
			for _, step := range b.Steps() {
				if args, is := strings.CutPrefix(step.Command, prefix); is && b.Mark == docs.Checked {
					all[b.String()] = append(all[b.String()], args)
				}
			}
		}
	}
	if len(all) == 0 {
		t.Fatalf("no command of the pages begins with %q", prefix)
	}
	return all
}

// kubeadm makes the pages' control planes on a node, up to where it would begin to change something, and reads the other
// commands.
func kubeadm(ctx context.Context, t *T) {
	if t.Cluster.Family == "ipv6" {
		t.Skipf("the pages' ranges are of IPv4 or of both families, and kubeadm refuses them on nodes that have IPv6 alone")
	}
	node := t.Cluster.Nodes[0]
	program := filepath.Join(t.Cluster.Dir, "bin", "kubeadm")
	version := t.version(ctx)
	for where, commands := range t.checked("sudo kubeadm ") {
		for _, command := range commands {
			args := append([]string{program}, strings.Fields(command)...)
			wants := "Usage:"
			if args[1] == "init" {
				// The node is one already, and so has all that preflight checks complain of.
				args = append(args, "--dry-run", "--ignore-preflight-errors=all", "--kubernetes-version="+version)
				wants = "initialized successfully"
			} else {
				args = append(args, "--help")
			}
			out, err := node.Run(ctx, args...)
			t.Logf("%s: kubeadm %s:\n%s", where, command, out)
			if err != nil || !strings.Contains(out, wants) {
				t.Errorf("%s: kubeadm %s: it does not print %q (%v)", where, command, wants, err)
			}
		}
	}
	if _, err := node.Run(ctx, "rm", "-rf", "/etc/kubernetes/tmp"); err != nil {
		t.Errorf("clean up after kubeadm: %v", err)
	}
}

// version is the API server's.
func (t *T) version(context.Context) string {
	info, err := t.Cluster.Client.Discovery().ServerVersion()
	if err != nil {
		t.Fatalf("ask the API server for its version: %v", err)
	}
	return info.GitVersion
}

// ctr imports the image on a node, where it is already: nothing changes.
func ctr(ctx context.Context, t *T) {
	archive := filepath.Join(t.Cluster.Dir, "images", "postern.tar")
	for where, commands := range t.checked("sudo ctr ") {
		for _, command := range commands {
			args := append([]string{"ctr"}, strings.Fields(strings.ReplaceAll(command, "postern-image.tar", archive))...)
			out, err := t.Cluster.Nodes[0].Run(ctx, args...)
			if err != nil {
				t.Errorf("%s: ctr %s: %v", where, command, err)
			}
			image := fmt.Sprintf("%s:", "ghcr.io/postern-cni/postern")
			if !strings.Contains(out, image) {
				t.Errorf("%s: ctr %s: it does not say that it imported %s:\n%s", where, command, image, out)
			}
		}
	}
}
