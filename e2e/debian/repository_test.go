package debian

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// needTools skips a test where the machine is no relative of Debian.
func needTools(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"apt-get", "dpkg", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("not a Debian machine: %v", err)
		}
	}
}

func architecture(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("dpkg", "--print-architecture").Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

// makePackage makes a package file in a folder. The files are made by fill, in the package's root.
func makePackage(t *testing.T, dir, control string, fill func(root string)) string {
	t.Helper()
	root := t.TempDir()
	must(t, os.Chmod(root, 0o755))
	must(t, os.Mkdir(filepath.Join(root, "DEBIAN"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "DEBIAN/control"), []byte(control), 0o644))
	fill(root)
	out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", root, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("dpkg-deb --build: %v: %s", err, out)
	}
	_, file, _ := strings.Cut(strings.TrimSuffix(strings.TrimSpace(string(out)), "'."), dir+"/")
	return filepath.Join(dir, file)
}

// repository is a place that apt fetches packages from, and the only one it knows in the test.
type repository struct {
	dir, cache string

	mu      sync.Mutex
	fetched map[string]int // package files, and how often
}

func newRepository(t *testing.T) *repository {
	t.Helper()
	needTools(t)
	nettest.Need(t) // a network for apt's requests
	r := &repository{dir: t.TempDir(), cache: filepath.Join(t.TempDir(), "cache"), fetched: map[string]int{}}
	files := http.FileServer(http.Dir(r.dir))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.mu.Lock()
		r.fetched[filepath.Base(request.URL.Path)]++
		r.mu.Unlock()
		request.Header.Del("If-Modified-Since") // times are in seconds: a list of the same second would count as unchanged
		files.ServeHTTP(w, request)
	}))
	t.Cleanup(server.Close)
	apt := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(apt, "lists/partial"), 0o755))
	must(t, os.WriteFile(filepath.Join(apt, "sources"), []byte("deb [trusted=yes] "+server.URL+" ./\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(apt, "conf"), []byte(`
		Dir::Etc::main "/dev/null"; Dir::Etc::parts "/dev/null"; Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
		Dir::Etc::sourcelist "`+apt+`/sources"; Dir::State "`+apt+`"; Dir::Cache "`+apt+`"; APT::Sandbox::User "root";
	`), 0o644))
	t.Setenv("APT_CONFIG", filepath.Join(apt, "conf"))
	t.Setenv("http_proxy", "")
	return r
}

// publish replaces everything in the repository by packages, each "name version" and what it depends on.
func (r *repository) publish(t *testing.T, packages map[string]string) {
	t.Helper()
	old, err := filepath.Glob(filepath.Join(r.dir, "*"))
	must(t, err)
	for _, file := range old {
		must(t, os.Remove(file))
	}
	var list strings.Builder
	for nameVersion, depends := range packages {
		name, version, _ := strings.Cut(nameVersion, " ")
		control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: nobody <nobody@example.org>\n",
			name, version, architecture(t))
		if depends != "" {
			control += "Depends: " + depends + "\n"
		}
		control += "Description: of a test\n"
		file := makePackage(t, r.dir, control, func(root string) {
			must(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
			must(t, os.WriteFile(filepath.Join(root, "etc", name), []byte(version), 0o644))
		})
		content, err := os.ReadFile(file)
		must(t, err)
		fmt.Fprintf(&list, "%sFilename: ./%s\nSize: %d\nSHA256: %x\n\n",
			control, filepath.Base(file), len(content), sha256.Sum256(content))
	}
	must(t, os.WriteFile(filepath.Join(r.dir, "Packages"), []byte(list.String()), 0o644))
}
