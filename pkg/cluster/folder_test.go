package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/nettest"
)

// limit is for what must happen; a machine under load takes long.
const limit = 2 * time.Minute

// put writes a file in one go, as editors and package managers do: under another name, then renamed.
func put(t *testing.T, dir, name, text string) {
	t.Helper()
	temp := filepath.Join(dir, "."+name+".new")
	if err := os.WriteFile(temp, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// run runs a source until the test ends, and sees that it ends without an error.
func run(t *testing.T, s cluster.Source) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(limit):
			t.Error("Run has not ended with its context")
		}
	})
}

// waitFor waits until the source holds exactly these objects.
func waitFor(t *testing.T, s cluster.Source, want ...string) {
	t.Helper()
	nettest.Eventually(t, limit, fmt.Sprintf("the source to hold %q", want), func() error {
		if got := contents(s.Snapshot()); !slices.Equal(got, want) {
			return fmt.Errorf("it holds %q, problems %q", got, s.Problems())
		}
		return nil
	})
}

// hear waits for a value of Changes.
func hear(t *testing.T, s cluster.Source) {
	t.Helper()
	select {
	case <-s.Changes():
	case <-time.After(limit):
		t.Fatal("Changes says nothing")
	}
}

func quiet(s cluster.Source) bool {
	select {
	case <-s.Changes():
		return false
	default:
		return true
	}
}

func TestAFolderIsWatched(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "web.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "notes.txt", "not a manifest: [")
	put(t, dir, ".hidden.yaml", "not a manifest: [")
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "folder"), "db.yaml", manifestOf("Pod", "shop", "db"))
	f := cluster.FromFolder(dir)
	if f.Synced() {
		t.Error("synced before it has read anything")
	}
	run(t, f)
	hear(t, f)
	waitFor(t, f, "pod shop/web", "namespace shop")
	if !f.Synced() || len(f.Problems()) > 0 {
		t.Errorf("synced %v, problems %q", f.Synced(), f.Problems())
	}

	put(t, dir, "db.json", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"db","namespace":"shop"}}`)
	hear(t, f)
	waitFor(t, f, "pod shop/db", "pod shop/web", "namespace shop")

	if err := os.WriteFile(filepath.Join(dir, "policy.yml"), []byte(manifestOf("NetworkPolicy", "shop", "p")), 0o600); err != nil {
		t.Fatal(err)
	}
	hear(t, f)
	waitFor(t, f, "pod shop/db", "pod shop/web", "namespace shop", "policy shop/p")

	put(t, dir, "web.yaml", manifestOf("Pod", "lab", "web"))
	hear(t, f)
	waitFor(t, f, "pod lab/web", "pod shop/db", "namespace lab", "namespace shop", "policy shop/p")

	if err := os.Remove(filepath.Join(dir, "db.json")); err != nil {
		t.Fatal(err)
	}
	hear(t, f)
	waitFor(t, f, "pod lab/web", "namespace lab", "namespace shop", "policy shop/p")
}

func TestAFileThatIsWrittenInPlaceAndInPartsIsReadWhole(t *testing.T) {
	dir := t.TempDir()
	f := cluster.FromFolder(dir)
	run(t, f)
	waitFor(t, f)
	file, err := os.Create(filepath.Join(dir, "a.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{}
	for i := range 20 {
		if _, err := fmt.Fprint(file, manifestOf("Pod", "shop", fmt.Sprintf("web-%02d", i))+"---\n"); err != nil {
			t.Fatal(err)
		}
		want = append(want, fmt.Sprintf("pod shop/web-%02d", i))
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, f, append(want, "namespace shop")...)
}

func TestABrokenFileKeepsWhatItLastSaid(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "b.yaml", manifestOf("Pod", "shop", "db"))
	f := cluster.FromFolder(dir)
	run(t, f)
	waitFor(t, f, "pod shop/db", "pod shop/web", "namespace shop")

	put(t, dir, "a.yaml", "a: [\n")
	put(t, dir, "b.yaml", manifestOf("Pod", "shop", "db-2"))
	waitFor(t, f, "pod shop/db-2", "pod shop/web", "namespace shop")
	nettest.Eventually(t, limit, "a problem that names the file", func() error {
		if p := f.Problems(); len(p) != 1 || !strings.HasPrefix(p[0], "a.yaml: document 1: ") || strings.Contains(p[0], "\n") {
			return fmt.Errorf("problems: %q", p)
		}
		return nil
	})
	if !f.Synced() {
		t.Error("not synced any more, though everything could be read once")
	}

	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web-2"))
	waitFor(t, f, "pod shop/db-2", "pod shop/web-2", "namespace shop")
	if p := f.Problems(); len(p) > 0 {
		t.Errorf("mended, and yet: %q", p)
	}

	put(t, dir, "a.yaml", "a: [\n")
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	waitFor(t, f, "pod shop/db-2", "namespace shop")
}

func TestAFolderIsNotSyncedBeforeEveryFileCouldBeReadOnce(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "b.yaml", "kind: Pod\n")
	f := cluster.FromFolder(dir)
	run(t, f)
	nettest.Eventually(t, limit, "a problem", func() error {
		if p := f.Problems(); len(p) != 1 || !strings.HasPrefix(p[0], "b.yaml: ") {
			return fmt.Errorf("problems: %q", p)
		}
		return nil
	})
	if f.Synced() {
		t.Error("synced, though b.yaml may hold a policy")
	}
	if err := f.Reread(context.Background()); err != nil || f.Synced() {
		t.Errorf("after Reread: %v, synced %v", err, f.Synced())
	}
	put(t, dir, "b.yaml", manifestOf("Pod", "shop", "db"))
	waitFor(t, f, "pod shop/db", "pod shop/web", "namespace shop")
	if !f.Synced() {
		t.Error("not synced, though every file can be read")
	}
}

func TestOfAnObjectInTwoFilesTheFirstFileCounts(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {from: a}}\n")
	put(t, dir, "b.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {from: b}}\n")
	f := cluster.FromFolder(dir)
	run(t, f)
	label := func(want string, problems int) {
		t.Helper()
		nettest.Eventually(t, limit, "the pod of file "+want, func() error {
			pods := f.Snapshot().Pods
			if len(pods) != 1 || pods[0].Labels.Get("from") != want || len(f.Problems()) != problems {
				return fmt.Errorf("pods %v, problems %q", pods, f.Problems())
			}
			return nil
		})
	}
	label("a", 1)
	if p := f.Problems()[0]; !strings.Contains(p, "a.yaml") || !strings.Contains(p, "b.yaml") || !strings.Contains(p, "shop/web") {
		t.Errorf("%q does not name object and files", p)
	}
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	label("b", 0)
}

func TestRereadHoldsWhatWasWrittenBeforeTheCall(t *testing.T) {
	dir := t.TempDir()
	f := cluster.FromFolder(dir)
	run(t, f)
	waitFor(t, f)
	for i := range 20 {
		name := fmt.Sprintf("web-%02d", i)
		put(t, dir, "a.yaml", manifestOf("Pod", "shop", name))
		if err := f.Reread(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := contents(f.Snapshot()); !slices.Equal(got, []string{"pod shop/" + name, "namespace shop"}) {
			t.Fatalf("after Reread: %q, want %s", got, name)
		}
	}
}

func TestWhatDoesNotChangeIsNoChange(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web"))
	f := cluster.FromFolder(dir)
	run(t, f)
	hear(t, f)
	waitFor(t, f, "pod shop/web", "namespace shop")
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "a.txt", "x")
	if err := f.Reread(context.Background()); err != nil {
		t.Fatal(err)
	}
	if !quiet(f) {
		t.Error("a change is told where nothing has changed")
	}
}

// A folder that another one takes the place of, as a mounted ConfigMap's does, is followed, if only after some seconds.
func TestAFolderThatWasReplacedIsFollowed(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "web"))
	f := cluster.FromFolder(dir)
	run(t, f)
	waitFor(t, f, "pod shop/web", "namespace shop")

	if err := os.Rename(dir, filepath.Join(parent, "old")); err != nil {
		t.Fatal(err)
	}
	if err := f.Reread(context.Background()); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("without the folder, Reread: %v", err)
	}
	if got := contents(f.Snapshot()); len(got) != 2 || len(f.Problems()) != 1 {
		t.Errorf("without the folder: %q, problems %q; want the former objects, and a problem", got, f.Problems())
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "a.yaml", manifestOf("Pod", "shop", "db"))
	waitFor(t, f, "pod shop/db", "namespace shop")
	put(t, dir, "b.yaml", manifestOf("Pod", "shop", "cart"))
	waitFor(t, f, "pod shop/cart", "pod shop/db", "namespace shop")
}

func TestAFolderThatIsNotThereIsAnErrorAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	if err := cluster.FromFolder(dir).Run(context.Background()); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("Run: %v", err)
	}
	if _, err := cluster.ReadFolder(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("ReadFolder: %v", err)
	}
}

func TestReadFolderNamesAllThatIsWrong(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", "a: [\n")
	put(t, dir, "b.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "c.yaml", manifestOf("Pod", "shop", "web"))
	put(t, dir, "d.yaml", manifestOf("Pod", "shop", "db")+"---\nkind: Pod\n")
	_, err := cluster.ReadFolder(dir)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"a.yaml: document 1: ", "c.yaml: Pod shop/web", "d.yaml: document 2: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\ndoes not say %q", err, want)
		}
	}
	for _, name := range []string{"a.yaml", "c.yaml", "d.yaml"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := cluster.ReadFolder(dir); err != nil || !slices.Equal(contents(c), []string{"pod shop/web", "namespace shop"}) {
		t.Errorf("got %q, %v", contents(c), err)
	}
}

// Whoever gives a file another name takes nothing away, not for a moment.
func TestAManifestThatGetsAnotherNameIsNeverMissed(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: shop}\nspec: {podSelector: {}}\n")
	s := cluster.FromFolder(dir)
	run(t, s)
	waitFor(t, s, "namespace shop", "policy shop/p")
	s.Take()
	var stop, done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-s.Changes():
			}
			if np, changed := s.Take().Policies["shop/p"]; changed && np == nil {
				t.Error("a change says that the policy is gone")
			}
		}
	}()
	names := []string{"a.yaml", "b.yaml"}
	for i := range 100 {
		if err := os.Rename(filepath.Join(dir, names[i%2]), filepath.Join(dir, names[1-i%2])); err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 {
			if err := s.Reread(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(i%7) * time.Millisecond) // before, in and after what the source waits for a file to settle
	}
	close(stop)
	<-done
}
