package cniconf

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// keysRead returns every key that the package's code reads, of the configuration and of CNI_ARGS.
func keysRead(t *testing.T) []string {
	t.Helper()
	readers := map[string]bool{"get": true, "choose": true, "duration": true, "value": true, "child": true, "children": true,
		"onlyKeys": true, "address": true, "prefix": true, "portNumber": true}
	word := regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_./-]*$`)
	var keys []string
	add := func(e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if key, err := strconv.Unquote(lit.Value); err == nil && word.MatchString(key) {
				keys = append(keys, key)
			}
		}
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if !readers[called(n.Fun)] {
					return true
				}
				for i, arg := range n.Args {
					if i < 2 || called(n.Fun) == "onlyKeys" { // what follows are words that are allowed
						add(arg)
					}
				}
			case *ast.AssignStmt:
				if to, ok := n.Lhs[0].(*ast.Ident); ok && to.Name == "key" {
					add(n.Rhs[0])
				}
			case *ast.CompositeLit:
				if of, ok := n.Type.(*ast.ArrayType); ok && called(of.Elt) == "argument" {
					for _, element := range n.Elts {
						add(element.(*ast.CompositeLit).Elts[0])
					}
				}
			}
			return true
		})
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// called is the name of a function or type, without its package, receiver or type arguments.
func called(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.IndexExpr:
		return called(e.X)
	}
	return ""
}

func TestTheReferenceHasEveryKeyThatIsRead(t *testing.T) {
	text, keys := readme(t), keysRead(t)
	for _, must := range []string{"cniVersion", "rangeStart", "hostIP", "dst", "K8S_POD_UID", "cni.dev/attachments", "ifname"} {
		if !slices.Contains(keys, must) {
			t.Errorf("the search for keys in the code misses %s, so this test proves little", must)
		}
	}
	for _, key := range keys {
		if !regexp.MustCompile("`([^`]*[.])?" + regexp.QuoteMeta(key) + "`").MatchString(text) {
			t.Errorf("README.md does not name the key %s", key)
		}
	}
}

func TestTheReferencesExampleIsGoodAndShowsTheDefaults(t *testing.T) {
	_, rest, found := strings.Cut(readme(t), "```json\n")
	example, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("README.md has no example of a conflist")
	}
	list, err := libcni.NetworkConfFromBytes([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	conf, err := libcni.InjectConf(list.Plugins[0], map[string]any{"cniVersion": list.CNIVersion, "name": list.Name})
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse(conf.Bytes, goodEnv())
	if err != nil {
		t.Fatal(err)
	}
	d := newConfig(nil)
	type settings struct {
		policy, dir, backend, conflict string
		mtu                            int
		gate, grace, reuse             time.Duration
		ipam                           string
	}
	of := func(c *Config) settings {
		return settings{string(c.Policy), c.StateDir, string(c.IPTablesBackend), string(c.HostPortConflict), c.MTU,
			c.GateTimeout, c.StatusGrace, c.IPAM.ReuseAfter, c.IPAM.Type}
	}
	if of(c) != of(d) {
		t.Errorf("the example has %+v, the defaults are %+v", of(c), of(d))
	}
}
