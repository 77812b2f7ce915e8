package docs

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/kind/pkg/cmd"
	"sigs.k8s.io/kind/pkg/cmd/kind"
	"sigs.k8s.io/kind/pkg/log"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/manifests"
)

const (
	folder      = "../../manifests"
	performance = "performance.md" // the page that `make bench RECORD=1` writes its part of
)

// pages are the documentation's pages with commands, by name.
func pages(t *testing.T) map[string][]Block {
	t.Helper()
	all := map[string][]Block{}
	for _, page := range []string{"kubeadm.md", "kind.md", "migrating.md"} {
		all[page] = read(t, filepath.Join(folder, page))
	}
	return all
}

func read(t *testing.T, file string) []Block {
	t.Helper()
	blocks, err := Read(file)
	if err != nil {
		t.Fatal(err)
	}
	return blocks
}

// each calls fn with every command of the pages in blocks with the given mark.
func each(t *testing.T, mark Mark, fn func(b Block, command string)) {
	t.Helper()
	for _, blocks := range pages(t) {
		for _, b := range blocks {
			for _, step := range b.Steps() {
				if b.Mark == mark {
					fn(b, step.Command)
				}
			}
		}
	}
}

func TestBlocksAreReadWithTheirCommands(t *testing.T) {
	got, err := parse("page.md", `# Title

`+"```sh"+`
# Not run by our tests: it is dangerous.
rm -rf x | \
    cat
`+"```"+`

## Below

`+"```sh"+`
cat <<'END'
$ text
END

# more
echo two
`+"```"+`
`+"```console"+`
$ true \
    --and this
$ false
no
`+"```"+`
`+"```yaml"+`
# Not run by our tests: no mark here.
`+"```"+`
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []Block{
		{Page: "page.md", Line: 3, Heading: "Title", Kind: "sh", Mark: NotRun, Reason: "it is dangerous",
			Text: "rm -rf x | \\\n    cat\n"},
		{Page: "page.md", Line: 11, Heading: "Below", Kind: "sh", Text: "cat <<'END'\n$ text\nEND\n\n# more\necho two\n"},
		{Page: "page.md", Line: 19, Heading: "Below", Kind: "console", Text: "$ true \\\n    --and this\n$ false\nno\n"},
		{Page: "page.md", Line: 25, Heading: "Below", Kind: "yaml", Text: "# Not run by our tests: no mark here.\n"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	for i, steps := range [][]Step{
		{{Command: "rm -rf x | \\\n    cat"}},
		{{Command: "cat <<'END'\n$ text\nEND"}, {Command: "echo two"}},
		{{Command: "true \\\n    --and this"}, {Command: "false", Prints: []string{"no"}}},
		nil,
	} {
		if !reflect.DeepEqual(got[i].Steps(), steps) {
			t.Errorf("%s: commands %q, want %q", got[i], got[i].Steps(), steps)
		}
	}
	if _, err := parse("page.md", "```sh\nx\n"); err == nil {
		t.Error("a block that is not closed is no error")
	}
}

func TestHeadCommentIsTheIndentedPartOfAManifest(t *testing.T) {
	got := Transcript(HeadComment(`# Words. $ no command
#
#   $ a \
#       b
#   prints
#
# More.
#
#   $ c
kind: Pod
#   $ d
`))
	want := []Step{{Command: "a \\\n    b", Prints: []string{"prints"}}, {Command: "c"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestEveryCommandIsRunCheckedOrSaidNotToBe holds the pages to what they promise: who adds a command that nobody checks must say
// so.
func TestEveryCommandIsRunCheckedOrSaidNotToBe(t *testing.T) {
	// By the first words: what the tests here and package suite check without running it.
	checked := []string{"git clone https://github.com/postern-cni/postern", "make ", "kind ", "sudo kubeadm ", "sudo ctr "}
	each(t, Checked, func(b Block, command string) {
		if !slices.ContainsFunc(checked, func(c string) bool { return strings.HasPrefix(command, c) }) {
			t.Errorf("%s: nothing checks %q: say that it is not run, or write a check", b, command)
		}
	})
	// What runs in the cluster of the tests.
	each(t, Run, func(b Block, command string) {
		if program, _, _ := strings.Cut(command, " "); program != "kubectl" && program != "bin/policyd" {
			t.Errorf("%s: %q cannot be run in the tests' cluster: say so", b, command)
		}
	})
	for _, blocks := range pages(t) {
		for _, b := range blocks {
			if b.Kind != "sh" && b.Kind != "console" && b.Kind != "yaml" {
				t.Errorf("%s: nothing checks blocks of kind %q", b, b.Kind)
			}
			if b.Mark != Run && b.Reason == "" {
				t.Errorf("%s: the block does not say why it is not run", b)
			}
		}
	}
}

func TestKindKnowsThePagesCommands(t *testing.T) {
	found := 0
	each(t, Checked, func(b Block, command string) {
		args, is := strings.CutPrefix(command, "kind ")
		if !is {
			return
		}
		found++
		root := kind.NewCommand(log.NoopLogger{}, cmd.IOStreams{In: &bytes.Buffer{}, Out: io.Discard, ErrOut: io.Discard})
		found, rest, err := root.Find(strings.Fields(args))
		if err != nil {
			t.Errorf("%s: %s: %v", b, command, err)
			return
		}
		if err := found.ParseFlags(rest); err != nil {
			t.Errorf("%s: %s: %v", b, command, err)
			return
		}
		if err := found.ValidateArgs(found.Flags().Args()); err != nil || !found.Runnable() {
			t.Errorf("%s: %s: %v", b, command, err)
		}
		if config := found.Flag("config"); config != nil {
			if _, err := os.Stat(filepath.Join(folder, "..", config.Value.String())); err != nil {
				t.Errorf("%s: %s: %v", b, command, err)
			}
		}
	})
	if found == 0 {
		t.Error("no command of kind was found")
	}
}

func TestKindConfigurationHasNoUnknownFieldAndNoOtherNetwork(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(folder, "kind.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var config v1alpha4.Cluster
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true) // as kind itself reads it
	if err := decoder.Decode(&config); err != nil {
		t.Fatal(err)
	}
	if config.APIVersion != "kind.x-k8s.io/v1alpha4" || config.Kind != "Cluster" {
		t.Errorf("it is of %s %s", config.APIVersion, config.Kind)
	}
	if !config.Networking.DisableDefaultCNI || len(config.Nodes) != 3 {
		t.Errorf("default CNI disabled: %v, nodes: %d; want true and 3", config.Networking.DisableDefaultCNI, len(config.Nodes))
	}
	if mode := config.Networking.KubeProxyMode; mode != v1alpha4.IPTablesProxyMode && mode != v1alpha4.NFTablesProxyMode {
		t.Errorf("kube-proxy's mode is %q, beside which postern does not work", mode)
	}
}

func TestMakeHasThePagesTargets(t *testing.T) {
	each(t, Checked, func(b Block, command string) { dryRun(t, b, command) })
	for _, b := range read(t, performance) {
		for _, step := range b.Steps() {
			if b.Mark != Checked || !dryRun(t, b, step.Command) {
				t.Errorf("%s: nothing checks %q", b, step.Command)
			}
		}
	}
}

// dryRun sees that make knows a command's target, if it is one of make's.
func dryRun(t *testing.T, b Block, command string) bool {
	t.Helper()
	target, is := strings.CutPrefix(command, "make ")
	if !is {
		return false
	}
	run := exec.Command("make", "--dry-run", target)
	run.Dir = "../.."
	if out, err := run.CombinedOutput(); err != nil {
		t.Errorf("%s: %s: %v: %s", b, command, err, out)
	}
	return true
}

func TestThePageAboutSpeedHasAPlaceForARun(t *testing.T) {
	page, err := os.ReadFile(performance)
	if err != nil {
		t.Fatal(err)
	}
	with, err := table.Replace(string(page), "a run\n")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(with, "## How to read it") || !strings.Contains(with, "a run") || len(with) < 1000 {
		t.Errorf("with a run it reads\n%s", with)
	}
}

// TestKustomizationsInThePagesSayWhatTheyShould renders each as if it stood beside the folder of manifests.
func TestKustomizationsInThePagesSayWhatTheyShould(t *testing.T) {
	shows := map[string]string{
		"kubeadm.md":   "image: registry.example.com/postern:v0.1.0",
		"migrating.md": "network: postern",
	}
	for page, blocks := range pages(t) {
		for _, b := range blocks {
			if b.Kind != "yaml" {
				continue
			}
			top := t.TempDir()
			if err := os.CopyFS(filepath.Join(top, "manifests"), os.DirFS(folder)); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(top, "kustomization.yaml"), []byte(b.Text), 0o644); err != nil {
				t.Fatal(err)
			}
			text, err := manifests.Render(top, ".")
			if err != nil {
				t.Errorf("%s: %v", b, err)
				continue
			}
			want, published := shows[page], bytes.Contains(text, []byte("image: ghcr.io"))
			if want == "" || !bytes.Contains(text, []byte(want)) || published == (page == "kubeadm.md") {
				t.Errorf("%s: it does not render to what the page wants (%q):\n%s", b, want, text)
			}
		}
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)#:]+)#?([^):]*)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	noSlug  = regexp.MustCompile("[^a-z0-9 _-]")
)

// anchors are those that a page's headings give, as GitHub makes them.
func anchors(page []byte) map[string]bool {
	all := map[string]bool{"": true}
	for _, m := range heading.FindAllSubmatch(page, -1) {
		all[strings.ReplaceAll(noSlug.ReplaceAllString(strings.ToLower(string(m[1])), ""), " ", "-")] = true
	}
	return all
}

func TestLinksToFilesLeadSomewhere(t *testing.T) {
	files := []string{performance}
	for page := range pages(t) {
		files = append(files, filepath.Join(folder, page))
	}
	for _, page := range files {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			target, anchor := string(m[1]), string(m[2])
			at := filepath.Join(filepath.Dir(page), target)
			info, err := os.Stat(at)
			if err != nil {
				t.Errorf("%s: %v", page, err)
				continue
			}
			if info.IsDir() {
				continue
			}
			linked, err := os.ReadFile(at)
			if err != nil {
				t.Fatal(err)
			}
			if !anchors(linked)[anchor] {
				t.Errorf("%s: %s has no heading for #%s", page, target, anchor)
			}
		}
	}
}
