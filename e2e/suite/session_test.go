package suite

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/postern-cni/postern/e2e/cluster"
	"github.com/postern-cni/postern/e2e/docs"
)

func TestStepsAreCheckedByWhatTheyPrintElseByTheirStatus(t *testing.T) {
	for _, test := range []struct {
		step           docs.Step
		output, status string
		ok             bool
	}{
		{docs.Step{}, "anything", "0", true},
		{docs.Step{}, "anything", "1", false},
		{docs.Step{Prints: []string{"TIMEOUT"}}, "TIMEOUT\ncommand terminated with exit code 1", "1", true},
		{docs.Step{Prints: []string{"TIMEOUT"}}, "", "0", false},
		{docs.Step{Prints: []string{"a", "b"}}, "x a\nb", "0", true},
		{docs.Step{Prints: []string{"a", "b"}}, "b a", "0", false},
		{docs.Step{Prints: []string{"a", "a"}}, "a", "0", false},
	} {
		if err := check(test.step, test.output, test.status); (err == nil) != test.ok {
			t.Errorf("%q with status %s for %q: %v", test.output, test.status, test.step.Prints, err)
		}
	}
}

func TestASessionKeepsVariablesAndSaysEachStatus(t *testing.T) {
	results := Runner{Cluster: &cluster.Cluster{Source: t.TempDir()}, Logs: t.TempDir()}.Run(t.Context(), []Case{{
		Name: "a session", Run: func(ctx context.Context, t *T) {
			s := t.newSession(ctx, t.Cluster.Source)
			for _, test := range []struct{ command, output, status string }{
				{"WORD='two words'", "", "0"},
				{`echo "$WORD"; echo to stderr >&2`, "two words\nto stderr", "0"},
				{"false", "", "1"},
				{"printf 'no newline'; (exit 7)", "no newline", "7"},
				{"cat # reads nothing", "", "0"},
			} {
				output, status, err := s.run(test.command)
				if err != nil || output != test.output || status != test.status {
					t.Errorf("%s: %q, status %s (%v); want %q, status %s", test.command, output, status, err, test.output, test.status)
				}
			}
			if _, _, err := s.run("exit 3"); err == nil {
				t.Errorf("the shell has ended, and there is no error")
			}
		}}})
	if results[0].Status != Passed {
		t.Error(results[0].Reason)
	}
}

// examples are the files, with their texts.
func examples(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("../../" + examplesFolder + "/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("the examples: %v (%v)", files, err)
	}
	texts := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(file)] = string(text)
	}
	return texts
}

func TestExamplesDecodeStrictlyAndUseTheImageThatClustersHave(t *testing.T) {
	decoder := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	for name, text := range examples(t) {
		reader := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
		for {
			document, err := reader.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			object, _, err := decoder.Decode(document, nil, nil)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if pod, is := object.(*corev1.Pod); is {
				for _, c := range pod.Spec.Containers {
					if c.Image != image {
						t.Errorf("%s: pod %s runs %s, and clusters of the tests have %s", name, pod.Name, c.Image, image)
					}
				}
			}
		}
	}
}

func TestExamplesSayInTheirHeadWhatToRun(t *testing.T) {
	source, err := os.ReadFile("walkthrough.go")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range examples(t) {
		steps := docs.Transcript(docs.HeadComment(text))
		if len(steps) == 0 || steps[0].Command != "kubectl apply -f "+examplesFolder+"/"+name {
			t.Errorf("%s: its head must begin with applying the file, and has the commands %q", name, steps)
		}
		if !bytes.Contains(source, []byte(`"`+name+`"`)) {
			t.Errorf("%s: no case of Walkthrough shows it", name)
		}
	}
}

// TestImageIsOfTheReleaseThatIsPinned needs the module of Kubernetes in Go's cache, which a build of the cluster puts there.
func TestImageIsOfTheReleaseThatIsPinned(t *testing.T) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	cmd.Dir, cmd.Env = "../kubernetes", append(os.Environ(), "GOPROXY=off")
	folder, err := cmd.Output()
	if err != nil || len(bytes.TrimSpace(folder)) == 0 {
		t.Skipf("the source of Kubernetes is not in Go's module cache (make e2e puts it there): %v", err)
	}
	version, err := os.ReadFile(filepath.Join(string(bytes.TrimSpace(folder)), "test/images/agnhost/VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("the source of Kubernetes is not in Go's module cache: %v", err)
	}
	if err != nil || !strings.HasSuffix(image, ":"+strings.TrimSpace(string(version))) {
		t.Errorf("the image is %s, and the release that is pinned has version %s (%v)", image, version, err)
	}
}
