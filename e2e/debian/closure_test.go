package debian

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestWhatAptPrintsIsUnderstood(t *testing.T) {
	const printed = `'http://deb.example/libb/libbpf1_1%3a1.1.2-0_amd64.deb' libbpf1_1%3a1.1.2-0+deb12u1_amd64.deb 14 MD5Sum:cc
'http://deb.example/pool/main/g/gcc-12/libstdc%2b%2b6_12.2.0-14_amd64.deb' libstdc++6_12.2.0-14_amd64.deb 612604 MD5Sum:d5
'http://deb.example/pool/main/b/brotli/libbrotli1_1.0.9-2_amd64.deb' libbrotli1_1.0.9-2_amd64.deb 274704 ` + `
`
	got, err := parseURIs(printed)
	must(t, err)
	want := []Package{
		{"libbpf1", "1:1.1.2-0+deb12u1", "libbpf1_1%3a1.1.2-0+deb12u1_amd64.deb"},
		{"libbrotli1", "1.0.9-2", "libbrotli1_1.0.9-2_amd64.deb"},
		{"libstdc++6", "12.2.0-14", "libstdc++6_12.2.0-14_amd64.deb"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, not %q", got, want)
	}
	for _, wrong := range []string{"Reading package lists...", "'http://deb.example/a_1_all.deb' a.deb 1", "'x' a_%zz_all.deb 1"} {
		if got, err := parseURIs(wrong); err == nil {
			t.Errorf("%q was taken for %q", wrong, got)
		}
	}
}

// names of package files, without the architecture.
func names(files []string) []string {
	var all []string
	for _, file := range files {
		name := filepath.Base(file)
		all = append(all, name[:strings.LastIndexByte(name, '_')])
	}
	return all
}

func TestAPackageComesWithWhatItDependsOn(t *testing.T) {
	r := newRepository(t)
	r.publish(t, map[string]string{
		"top 1:1.0": "left, right (>= 2)", "left 1.0": "bottom", "right 2.0": "bottom | nowhere", "bottom 1.0": "", "other 1.0": "",
	})
	files := fetchAsRoot(t, r, []string{"top"}, nil)
	if got, want := names(files), []string{"bottom_1.0", "left_1.0", "right_2.0", "top_1%3a1.0"}; !slices.Equal(got, want) {
		t.Fatalf("got %q, not %q", got, want)
	}
	files = fetchAsRoot(t, r, []string{"top"}, []string{"right"})
	if got, want := names(files), []string{"bottom_1.0", "left_1.0", "top_1%3a1.0"}; !slices.Equal(got, want) {
		t.Errorf("without right: got %q, not %q", got, want)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for file, times := range r.fetched {
		if strings.HasSuffix(file, ".deb") && times != 1 {
			t.Errorf("%s was fetched %d times: the cache is not used", file, times)
		}
	}
	left, err := filepath.Glob(filepath.Join(r.cache, ".*"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("%q is left in the cache", left)
	}
	root := t.TempDir()
	must(t, Root(t.Context(), r.cache, root, []string{"right"}, nil, nil))
	for _, file := range []string{"etc/right", "etc/bottom", "var/lib/dpkg/status.d/right", "usr/lib", "bin"} {
		if _, err := os.Stat(filepath.Join(root, file)); err != nil {
			t.Error(err)
		}
	}
}

// fetchAsRoot fetches, as the root of the test's namespaces, who may update apt's lists: at first there are none.
func fetchAsRoot(t *testing.T, r *repository, packages, without []string) []string {
	t.Helper()
	files, err := Fetch(t.Context(), r.cache, packages, without)
	must(t, err)
	for _, file := range files {
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}
	return files
}

func TestListsThatAreOutOfDateAreRenewed(t *testing.T) {
	r := newRepository(t)
	r.publish(t, map[string]string{"top 1.0": "bottom", "bottom 1.0": ""})
	if _, err := apt(t.Context(), "", "-qq", "update"); err != nil {
		t.Fatal(err)
	}
	r.publish(t, map[string]string{"top 1.1": "bottom", "bottom 1.0": ""}) // and the file of 1.0 is gone
	if got, want := names(fetchAsRoot(t, r, []string{"top"}, nil)), []string{"bottom_1.0", "top_1.1"}; !slices.Equal(got, want) {
		t.Errorf("got %q, not %q", got, want)
	}
}

func TestAPackageThatThereIsNotIsAnError(t *testing.T) {
	r := newRepository(t)
	r.publish(t, map[string]string{"top 1.0": "nowhere"})
	_, err := Fetch(t.Context(), r.cache, []string{"nowhere"}, nil)
	if !errors.Is(err, ErrNoLists) || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("an unknown package: %v", err)
	}
	if _, err := Fetch(t.Context(), r.cache, []string{"top"}, nil); err == nil {
		t.Error("a package that depends on an unknown one was fetched")
	}
}
