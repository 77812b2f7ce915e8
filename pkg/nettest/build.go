package nettest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// module is the main module's path.
const module = "github.com/postern-cni/postern"

// The inner process asks for builds on one pipe and reads the answers from another. The numbers follow stdin, stdout and
// stderr (exec.Cmd.ExtraFiles).
const (
	orderFD  = 3
	answerFD = 4
)

// An order asks the outer process for a program, with a version of its own if it is to be another build; an answer says where
// it is.
type order struct{ Package, Version string }
type answer struct{ Path, Error string }

// counter is where the inner process places its orders, one at a time.
type counter struct {
	sync.Mutex
	orders  *json.Encoder
	answers *json.Decoder
}

// theCounter is the process's one end of the pipes.
var theCounter = sync.OnceValue(func() *counter {
	return &counter{
		orders:  json.NewEncoder(os.NewFile(orderFD, "orders")),
		answers: json.NewDecoder(os.NewFile(answerFD, "answers")),
	}
})

// Build returns the path of a program built from source, once a test process. pkg is a folder below the module's root
// ("plugin", "e2e/libcni112", which may be a module of its own), an import path of the test's module, or one of a module that the
// test's module requires. The build runs outside of the scratch namespaces, since it may have to fetch modules.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	return BuildVersion(t, pkg, "")
}

// Programs returns a folder with programs by their names, each as [Build] makes it from what is given.
func Programs(t testing.TB, sources map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, source := range sources {
		if err := os.Symlink(Build(t, source), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// BuildVersion is [Build] for a second build of the same source, whose main.version is the given one.
func BuildVersion(t testing.TB, pkg, version string) string {
	t.Helper()
	Need(t)
	if os.Getenv(stateEnv) != ready() {
		t.Fatalf("build %s: a fuzz worker cannot build: it has other pipes under the numbers of ours", pkg)
	}
	path, err := theCounter().place(order{Package: pkg, Version: version})
	if err != nil {
		t.Fatalf("build %s: %v", pkg, err)
	}
	return path
}

func (c *counter) place(o order) (string, error) {
	c.Lock()
	defer c.Unlock()
	if err := c.orders.Encode(o); err != nil {
		return "", err
	}
	var a answer
	if err := c.answers.Decode(&a); err != nil {
		return "", fmt.Errorf("no answer from the outer process: %w", err)
	}
	if a.Error != "" {
		return "", errors.New(a.Error)
	}
	return a.Path, nil
}

// workshop is the outer process's side: it builds what the inner process orders.
type workshop struct {
	orders  *os.File
	answers *os.File
	inner   []*os.File // the inner process's ends
	dir     string     // of the programs; made with the first
	built   map[order]answer
}

// openWorkshop gives cmd its ends of the pipes.
func openWorkshop(cmd *exec.Cmd) (*workshop, error) {
	orders, ordersIn, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	answersIn, answers, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, orders.Close(), ordersIn.Close())
	}
	w := &workshop{orders: orders, answers: answers, inner: []*os.File{ordersIn, answersIn}, built: map[order]answer{}}
	cmd.ExtraFiles = append(cmd.ExtraFiles, w.inner...)
	return w, nil
}

// serve builds what is ordered until the inner process is gone.
func (w *workshop) serve() {
	for _, file := range w.inner {
		file.Close() // or the end of the inner process would not be the end of the pipe
	}
	orders, answers := json.NewDecoder(bufio.NewReader(w.orders)), json.NewEncoder(w.answers)
	for {
		var o order
		if err := orders.Decode(&o); err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintf(os.Stderr, "nettest: read an order: %v\n", err)
			}
			return
		}
		a, known := w.built[o]
		if !known {
			a = w.build(o)
			w.built[o] = a
		}
		if err := answers.Encode(a); err != nil {
			return
		}
	}
}

func (w *workshop) close() {
	w.orders.Close()
	w.answers.Close()
	if w.dir != "" {
		os.RemoveAll(w.dir)
	}
}

// build runs go build for one package.
func (w *workshop) build(o order) answer {
	pkg := o.Package
	root, err := moduleRoot()
	if err != nil {
		return answer{Error: err.Error()}
	}
	if w.dir == "" {
		if w.dir, err = os.MkdirTemp("", "postern-test-"); err != nil {
			return answer{Error: err.Error()}
		}
	}
	folder, target := "", pkg // the test's own folder
	local := strings.TrimPrefix(strings.TrimPrefix(pkg, module+"/"), "./")
	if info, err := os.Stat(filepath.Join(root, local)); err == nil && info.IsDir() {
		folder, target = filepath.Join(root, local), "."
	}
	// A folder for each, so that the program keeps its own name: CNI finds plugins by name.
	program := filepath.Join(w.dir, strconv.Itoa(len(w.built)), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", ldflags(o.Version), "-o", program, target)
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return answer{Error: fmt.Sprintf("%v: %s", err, out)}
	}
	return answer{Path: program}
}

func ldflags(version string) string {
	if version == "" {
		return ""
	}
	return "-X main.version=" + version
}

// moduleRoot walks up from the test's folder to the one with the main module's go.mod.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(text), "module "+module+"\n") {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", fmt.Errorf("find the module %s: no go.mod of it above the test's folder", module)
		}
		dir = parent
	}
}
