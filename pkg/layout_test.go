// Package pkg_test holds the shape of the whole module: which package may import which, and that each says what it is for.
package pkg_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/postern-cni/postern/"

// tiers lists the module's packages from the ground up. A package imports only packages of lower tiers. A new package
// gets its place here.
var tiers = [][]string{
	{"pkg/rule", "pkg/object", "pkg/addrmap", "pkg/attachment", "pkg/metrics", "pkg/nlevents", "pkg/nfnetlink", "pkg/nodefiles", "pkg/sysctl"},
	{"pkg/gate", "pkg/iptables", "pkg/ipset", "pkg/conntrack", "pkg/policy", "pkg/explain", "pkg/ipam", "pkg/podlink"},
	{"pkg/hostport", "pkg/compile", "pkg/cluster", "pkg/cniconf", "pkg/dataplane"},
	{"pkg/attach", "pkg/nodenet"},
	{"pkg/engine", "pkg/events"},
	{"plugin", "policyd"},
}

// noKubernetes are the packages that no Kubernetes code may reach: the plugin starts in a millisecond, and what knows the
// kernel does not know the API.
var noKubernetes = []string{
	"plugin", "pkg/addrmap", "pkg/attach", "pkg/attachment", "pkg/cniconf", "pkg/conntrack", "pkg/dataplane", "pkg/gate", "pkg/hostport",
	"pkg/ipam", "pkg/ipset", "pkg/iptables", "pkg/nfnetlink", "pkg/nlevents", "pkg/nodefiles", "pkg/podlink", "pkg/rule", "pkg/sysctl",
}

// pure are the packages that compute and never touch the kernel.
var pure = []string{"pkg/rule", "pkg/object", "pkg/addrmap", "pkg/policy", "pkg/explain", "pkg/compile"}

// kernel are the ways to the kernel, by import path or a prefix that ends in a slash.
var kernel = []string{
	"os/exec", "syscall", "golang.org/x/sys/", "github.com/vishvananda/", "github.com/coreos/go-iptables/",
	module + "pkg/iptables", module + "pkg/ipset", module + "pkg/conntrack", module + "pkg/podlink",
	module + "pkg/dataplane", module + "pkg/sysctl",
}

// listed is what `go list -json` says of a package.
type listed struct {
	ImportPath string
	Doc        string
	GoFiles    []string
	Imports    []string
	Module     *struct{ Main bool }
}

// packages returns every package that the module's programs and libraries are made of, by import path.
func packages(t *testing.T) map[string]listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Doc,GoFiles,Imports,Module", "./...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	all := map[string]listed{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
}

// forTests reports whether a package is one that only tests import.
func forTests(path string) bool {
	return strings.HasPrefix(path, module+"pkg/nettest") || strings.HasPrefix(path, module+"pkg/verify")
}

// ours returns the import paths of the module's own packages, without folders that hold only tests.
func ours(all map[string]listed) []string {
	var own []string
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if m := all[path].Module; m != nil && m.Main && len(all[path].GoFiles) > 0 {
			own = append(own, path)
		}
	}
	return own
}

func TestImportsPointOneWay(t *testing.T) {
	tier := map[string]int{}
	for i, names := range tiers {
		for _, name := range names {
			tier[module+name] = i
		}
	}
	all := packages(t)
	for _, path := range ours(all) {
		if forTests(path) {
			continue
		}
		own, known := tier[path]
		if !known {
			t.Errorf("%s has no tier: give it one in this file", path)
			continue
		}
		for _, imported := range all[path].Imports {
			other, known := tier[imported]
			if known && other >= own {
				t.Errorf("%s imports %s, which is not below it", path, imported)
			}
			if forTests(imported) {
				t.Errorf("%s imports %s outside of its tests", path, imported)
			}
		}
	}
}

func TestThePluginAndTheKernelsPackagesLinkNoKubernetes(t *testing.T) {
	all := packages(t)
	for _, name := range noKubernetes {
		if way := reach(all, module+name, func(path string) bool {
			return strings.HasPrefix(path, "k8s.io/") || strings.HasPrefix(path, "sigs.k8s.io/")
		}); way != nil {
			t.Errorf("%s reaches Kubernetes: %s", name, strings.Join(way, " -> "))
		}
	}
}

func TestPurePackagesDoNotTouchTheKernel(t *testing.T) {
	all := packages(t)
	for _, name := range pure {
		for _, imported := range all[module+name].Imports {
			for _, k := range kernel {
				if imported == k || strings.HasSuffix(k, "/") && strings.HasPrefix(imported, k) {
					t.Errorf("%s imports %s", name, imported)
				}
			}
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	all := packages(t)
	for _, path := range ours(all) {
		if all[path].Doc == "" {
			t.Errorf("%s has no package comment", path)
		}
	}
}

// reach returns a shortest chain of imports from a package to one that is wanted, nil if there is none or no such package.
func reach(all map[string]listed, from string, wanted func(string) bool) []string {
	came := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		if wanted(queue[0]) {
			var way []string
			for at := queue[0]; at != ""; at = came[at] {
				way = append(way, strings.TrimPrefix(at, module))
			}
			slices.Reverse(way)
			return way
		}
		for _, next := range all[queue[0]].Imports {
			if _, seen := came[next]; !seen {
				came[next] = queue[0]
				queue = append(queue, next)
			}
		}
	}
	return nil
}
