package manifests_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/e2e/manifests"
)

var update = flag.Bool("update", false, "write the rendered files anew")

const folder = "../../manifests"

// rendered are the files that stand rendered in the folder, by what they are rendered from.
var rendered = map[string]string{
	"overlays/kubeadm":   "postern.yaml",
	"overlays/uninstall": "uninstall.yaml",
}

// folders are all kustomizations.
func folders(t *testing.T) (list []string) {
	t.Helper()
	for _, pattern := range []string{"base", "overlays/*"} {
		found, err := filepath.Glob(filepath.Join(folder, pattern, "kustomization.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			name, err := filepath.Rel(folder, filepath.Dir(f))
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, name)
		}
	}
	if len(list) < 6 {
		t.Fatalf("only %v are there", list)
	}
	return list
}

// objects are what a kustomization gives, by kind and name; read as an API server reads them, which refuses unknown fields.
func objects(t *testing.T, name string) map[string]any {
	t.Helper()
	text, err := manifests.Render(folder, name)
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]func() any{
		"ServiceAccount": func() any { return &corev1.ServiceAccount{} }, "ClusterRole": func() any { return &rbacv1.ClusterRole{} },
		"ClusterRoleBinding": func() any { return &rbacv1.ClusterRoleBinding{} }, "Role": func() any { return &rbacv1.Role{} },
		"RoleBinding": func() any { return &rbacv1.RoleBinding{} }, "DaemonSet": func() any { return &appsv1.DaemonSet{} },
	}
	all := map[string]any{}
	for docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		var head struct {
			Kind     string
			Metadata struct{ Name, Namespace string }
		}
		if err := errors.Join(err, yaml.Unmarshal(doc, &head)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if kinds[head.Kind] == nil {
			t.Fatalf("%s: kind %s: give it a type in this test", name, head.Kind)
		}
		o := kinds[head.Kind]()
		if err := yaml.UnmarshalStrict(doc, o); err != nil {
			t.Fatalf("%s: %s %s: %v", name, head.Kind, head.Metadata.Name, err)
		}
		all[head.Kind+" "+head.Metadata.Name] = o
	}
}

// daemonSets are the pods' templates of all kustomizations.
func daemonSets(t *testing.T) map[string]*appsv1.DaemonSet {
	t.Helper()
	all := map[string]*appsv1.DaemonSet{}
	for _, name := range folders(t) {
		for _, o := range objects(t, name) {
			if d, ok := o.(*appsv1.DaemonSet); ok {
				all[name] = d
			}
		}
	}
	return all
}

func containers(d *appsv1.DaemonSet) []corev1.Container {
	return slices.Concat(d.Spec.Template.Spec.InitContainers, d.Spec.Template.Spec.Containers)
}

func TestRenderedFilesAreUpToDate(t *testing.T) {
	for from, to := range rendered {
		want, err := manifests.Render(folder, from)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(folder, to)
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what %s says (%v): run `make manifests`", file, from, err)
		}
	}
}

func TestEveryOverlayGivesWhatAClusterNeeds(t *testing.T) {
	install := []string{"ClusterRole postern", "ClusterRoleBinding postern", "DaemonSet postern", "Role postern", "RoleBinding postern",
		"ServiceAccount postern"}
	for _, name := range folders(t) {
		want := install
		if name == "overlays/uninstall" {
			want = []string{"DaemonSet postern-uninstall"}
		}
		var got []string
		for key := range objects(t, name) {
			got = append(got, key)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s gives %q, want %q", name, got, want)
		}
	}
}

// The programs know the arguments that they are given, and take their values.
func TestPolicydKnowsTheFlags(t *testing.T) {
	policyd := filepath.Join(t.TempDir(), "policyd")
	build := exec.CommandContext(context.Background(), "go", "build", "-o", policyd, "./policyd")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build policyd: %v: %s", err, out)
	}
	for name, d := range daemonSets(t) {
		for _, c := range containers(d) {
			// -h is read last: what comes before it has been understood by then.
			if out, err := exec.CommandContext(context.Background(), policyd, append(c.Args, "-h")...).CombinedOutput(); err != nil {
				t.Errorf("%s, container %s: policyd %s: %v\n%s", name, c.Name, strings.Join(c.Args, " "), err, out)
			}
		}
	}
	if exec.CommandContext(context.Background(), policyd, "run", "--no-such-flag", "-h").Run() == nil {
		t.Error("a flag that policyd does not know passes, so this test proves nothing")
	}
}

// What a container may do and see is listed here too, so that more of it is a decision and not a slip.
func TestContainersHaveTheRightsAndMountsThatTheyNeed(t *testing.T) {
	type rights struct{ capabilities, mounts string }
	want := map[string]rights{
		"install": {"DAC_OVERRIDE", "/etc:/host/etc /opt/cni/bin:/host/opt/cni/bin"},
		"policyd": {"NET_ADMIN NET_RAW", "/run/postern:/run/postern /run/xtables.lock:/run/xtables.lock /var/run/netns:/var/run/netns:ro " +
			"/proc/sys/net:/host/proc/sys/net /etc/cni/net.d:/etc/cni/net.d"},
		"cleanup": {"NET_ADMIN NET_RAW DAC_OVERRIDE", "/run:/host/run /run/xtables.lock:/run/xtables.lock /etc:/host/etc " +
			"/opt/cni/bin:/host/opt/cni/bin"},
	}
	for name, d := range daemonSets(t) {
		pod := d.Spec.Template.Spec
		paths := map[string]string{}
		for _, v := range pod.Volumes {
			if v.HostPath == nil || v.HostPath.Type == nil || *v.HostPath.Type == corev1.HostPathUnset {
				t.Errorf("%s: volume %s is no path of the node with a type", name, v.Name)
				continue
			}
			paths[v.Name] = v.HostPath.Path
		}
		used := map[string]bool{}
		for _, c := range containers(d) {
			var got rights
			s := c.SecurityContext
			if s == nil || s.Privileged == nil || *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
				s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
				t.Fatalf("%s, container %s: it may do more than it must: %+v", name, c.Name, s)
			}
			for _, right := range s.Capabilities.Add {
				got.capabilities = strings.TrimSpace(got.capabilities + " " + string(right))
			}
			for _, m := range c.VolumeMounts {
				used[m.Name] = true
				mount := paths[m.Name] + ":" + m.MountPath
				if m.ReadOnly {
					mount += ":ro"
				}
				got.mounts = strings.TrimSpace(got.mounts + " " + mount)
			}
			if got != want[c.Name] {
				t.Errorf("%s, container %s has\n%+v\nwant\n%+v", name, c.Name, got, want[c.Name])
			}
		}
		if len(used) != len(paths) {
			t.Errorf("%s: volumes %v, of which %v are used", name, paths, used)
		}
		if pod.HostPID || pod.HostIPC || !pod.HostNetwork {
			t.Errorf("%s: host namespaces: %+v", name, pod)
		}
		if p := pod.SecurityContext.SeccompProfile; p == nil || p.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: seccomp %+v", name, p)
		}
	}
}

func TestItRunsOnEveryNodeAndFirst(t *testing.T) {
	for name, d := range daemonSets(t) {
		pod := d.Spec.Template.Spec
		if pod.PriorityClassName != "system-node-critical" || !slices.Equal(pod.Tolerations, []corev1.Toleration{{Operator: "Exists"}}) ||
			d.Namespace != "kube-system" {
			t.Errorf("%s: priority %q, tolerations %v, namespace %s", name, pod.PriorityClassName, pod.Tolerations, d.Namespace)
		}
		for _, c := range containers(d) {
			image, tag, ok := strings.Cut(c.Image, ":")
			if !ok || image != "ghcr.io/postern-cni/postern" || !strings.HasPrefix(tag, "v") {
				t.Errorf("%s, container %s: image %s", name, c.Name, c.Image)
			}
			for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
				if p != nil && !slices.Contains(c.Args, fmt.Sprintf("--listen=%s:%d", p.HTTPGet.Host, p.HTTPGet.Port.IntValue())) {
					t.Errorf("%s, container %s: it does not listen where a probe asks: %v, %+v", name, c.Name, c.Args, p.HTTPGet)
				}
			}
		}
	}
}

// The role allows what policyd asks for (package cluster, package events), and nothing else.
func TestTheRolesAreTheLeast(t *testing.T) {
	all := objects(t, "base")
	rules := func(list []rbacv1.PolicyRule) (out []string) {
		for _, r := range list {
			for _, resource := range r.Resources {
				out = append(out, strings.Join(r.APIGroups, ",")+"/"+resource+" "+strings.Join(r.Verbs, ","))
			}
		}
		slices.Sort(out)
		return out
	}
	cluster := all["ClusterRole postern"].(*rbacv1.ClusterRole)
	if got, want := rules(cluster.Rules), []string{"/namespaces list,watch", "/nodes list,watch", "/pods list,watch",
		"networking.k8s.io/networkpolicies list,watch"}; !slices.Equal(got, want) {
		t.Errorf("ClusterRole: %q, want %q", got, want)
	}
	role := all["Role postern"].(*rbacv1.Role)
	if got, want := rules(role.Rules), []string{"/events create,patch"}; !slices.Equal(got, want) || role.Namespace != "default" {
		t.Errorf("Role in %s: %q, want %q", role.Namespace, got, want)
	}
	subject := rbacv1.Subject{Kind: "ServiceAccount", Name: "postern", Namespace: "kube-system"}
	for _, subjects := range [][]rbacv1.Subject{all["ClusterRoleBinding postern"].(*rbacv1.ClusterRoleBinding).Subjects,
		all["RoleBinding postern"].(*rbacv1.RoleBinding).Subjects} {
		if !slices.Equal(subjects, []rbacv1.Subject{subject}) {
			t.Errorf("bound to %v", subjects)
		}
	}
}
