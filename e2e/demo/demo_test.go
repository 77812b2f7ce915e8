package main

import (
	"bytes"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sketch is a world of two pods and a machine outside, without a kernel.
func sketch() *world {
	return &world{parties: []*party{
		{Letter: "a", Name: "shop/web", Listens: true, pod: &pod{Namespace: "shop", Name: "web"},
			Addresses: addresses("10.244.1.2", "fd00::2")},
		{Letter: "b", Name: "shop/db", Listens: true, pod: &pod{Namespace: "shop", Name: "db", HostPort: 9000},
			Addresses: addresses("10.244.1.3", "fd00::3")},
		{Letter: "c", Name: "laptop", Listens: true, Addresses: addresses("198.51.100.10", "2001:db8:a::10")},
		{Letter: "-", Name: "the node", Addresses: addresses("192.0.2.2", "2001:db8:2::2")},
	}}
}

func TestAMatrixShowsPortsFamiliesAndDifferences(t *testing.T) {
	w := sketch()
	all := step{}.tries(w)
	for _, try := range all {
		try.Expected = try.To.Name == "shop/db" && try.Port == 5432 && (try.From.Name != "laptop" || try.Address.Is4())
		try.Opened = try.Expected
	}
	last := all[len(all)-1] // the node, to shop/db
	last.Opened = !last.Opened
	var out bytes.Buffer
	style{}.matrices(&out, w, all)
	want := strings.Join([]string{
		"                       connected   the policies say",
		"                       a  b  c     a  b  c",
		"  a shop/web           .. .O ..    .. .O ..",
		"  b shop/db            .. .O ..    .. .O ..",
		"  c laptop             .. .4       .. .4",
		"  - the node           .. .4       .. .O     !",
	}, "\n")
	var got []string
	for line := range strings.Lines(strings.TrimRight(out.String(), "\n")) {
		got = append(got, strings.TrimRight(line, " \n"))
	}
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
}

func TestADifferenceNamesBothAndWhatThePoliciesSay(t *testing.T) {
	w := sketch()
	all := []*try{
		{From: w.parties[0], To: w.parties[1], Address: netip.MustParseAddr("10.244.1.3"), Port: 80, Opened: true},
		{From: w.parties[2], To: w.parties[1], Address: netip.MustParseAddr("10.244.1.3"), Port: 80, Expected: true,
			Why: "refused"},
		{From: w.parties[1], To: w.parties[0], Opened: true, Expected: true},
	}
	got := strings.Join(differing(3, all), "\n")
	want := "step 3: shop/web reaches shop/db at 10.244.1.3:80; the policies say it must not reach it\n" +
		"step 3: laptop does not reach shop/db at 10.244.1.3:80; the policies say it may reach it (refused)"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	var out bytes.Buffer
	if err := summary(&out, style{}, differing(3, all), len(all), 0); err == nil || !strings.Contains(out.String(), want[:40]) {
		t.Errorf("the summary (error %v) does not name the pairs:\n%s", err, out.String())
	}
}

func TestHostPortsAreTriedFromEverybody(t *testing.T) {
	from := map[string]int{}
	for _, try := range hostPortTries(sketch()) {
		if try.To.Name != "shop/db" || try.Port != 9000 || try.PodPort != 80 {
			t.Errorf("unexpected try: %s", try)
		}
		from[try.From.Name]++
	}
	if want := map[string]int{"shop/web": 2, "shop/db": 2, "laptop": 2, "the node": 3}; !maps.Equal(from, want) {
		t.Errorf("tries by client: %v, want %v", from, want)
	}
}

func TestTheFolderHoldsWhatTheClusterHoldsAndNothingElse(t *testing.T) {
	dir := t.TempDir() + "/manifests"
	c := newCluster()
	for i, s := range steps {
		before, err := c.files()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.change(c); err != nil {
			t.Fatal(err)
		}
		if err := c.write(dir); err != nil {
			t.Fatal(err)
		}
		want, err := c.files()
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && maps.EqualFunc(before, want, bytes.Equal) && !s.HostPort {
			t.Errorf("step %q changes nothing", s.Title)
		}
		if err := c.write(dir); err != nil {
			t.Errorf("write the same again: %v", err)
		}
		if got := read(t, dir); !maps.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("after %q the folder holds %d files, want %d", s.Title, len(got), len(want))
		}
	}
	if len(c.policies) != 0 {
		t.Errorf("the last step leaves %d policies", len(c.policies))
	}
}

func read(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, entry := range entries {
		if out[entry.Name()], err = os.ReadFile(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return out
}
