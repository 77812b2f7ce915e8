package table

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// sample is a run with a line of each kind.
func sample() Result {
	facts := Facts{
		Date: "2026-03-01T12:00:00Z", Revision: "v0.1.0", Kernel: "6.18.0", CPU: "Example CPU", CPUs: 2, Go: "go1.26.0",
		Iptables: "iptables v1.8.9", Programs: map[string]string{"ptp": "v1.9.1", "portmap": "v1.9.1"}, Took: "20m0s",
	}
	ours, theirs := rounds(41, 0.52)
	slow, _ := rounds(41, 0.7)
	return Judge(facts, Report{
		Lines: []Line{
			{Row: 13, Backend: "legacy", What: "new connections a second between two pods", Beside: "the same <pods> & no rules",
				Unit: "1/s", Ours: []float64{29000, 28800, 29100, 28900}, Theirs: []float64{30000, 30100, 29900, 31000}, Mark: AtLeast(0.98),
				Explain: "Two pods, twenty rules each."},
			{Row: 3, Backend: "nft", What: "ADD", Part: "two hostPorts", Beside: "ptp, host-local and portmap | chained", Unit: "ms",
				Ours: ours, Theirs: theirs, Mark: AtMost(0.6), Explain: "One ADD through libcni."},
			{Row: 3, Backend: "legacy", What: "ADD", Part: "two hostPorts", Beside: "ptp, host-local and portmap", Unit: "ms",
				Ours: slow, Theirs: theirs, Mark: AtMost(0.6), Explain: "One ADD through libcni."},
			{Row: 6, What: "a remote pod joins a peer list, from the event of the API server to the set in the kernel", Unit: "ms",
				Ours: []float64{0.61, 0.7, 0.65}, Theirs: []float64{0.021, 0.022, 0.021}, Beside: "one ipset add", Quantile: 0.99,
				Mark: NoMoreThan(5), Explain: strings.Repeat("Words that say how. ", 10)},
			{Row: 9, What: "writes to the kernel at a restart", Ours: []float64{0, 0, 0}, Mark: NoMoreThan(0)},
			{Row: 17, What: "size of the plugin", Beside: "a program that does nothing", Unit: "MiB",
				Ours: []float64{5.4}, Theirs: []float64{1.5}},
			{Row: 18, What: "nothing was measured", Mark: AtMost(1), Unit: "ms"},
		},
		Curves: []Curve{
			{Plot: "Memory & size", Name: "policyd", XLabel: "pods in the cluster", YLabel: "MiB",
				Points: []Point{{1000, 30}, {10000, 50}, {100000, 200}}},
			{Plot: "Time", Name: "label", XLabel: "pods in the cluster", YLabel: "ms", Points: []Point{{1000, 1}, {100000, 1.2}}},
			{Plot: "Time", Name: "policy", XLabel: "pods in the cluster", YLabel: "ms", Points: []Point{{1000, 0}, {100000, 3}}},
			{Plot: "Nothing", Name: "no points"},
		},
	}, []string{"cni with nft: exit status 1"})
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not as it should be (write it anew with -update, and read the difference):\n%s", name, got)
	}
}

func TestTheTableOnATerminal(t *testing.T) {
	var out bytes.Buffer
	if err := (Text{}).Write(&out, sample()); err != nil {
		t.Fatal(err)
	}
	golden(t, "table.txt", out.Bytes())
}

func TestColourOnlyPaints(t *testing.T) {
	var plain, painted bytes.Buffer
	if err := errors.Join((Text{}).Write(&plain, sample()), (Text{Colour: true}).Write(&painted, sample())); err != nil {
		t.Fatal(err)
	}
	text := painted.String()
	for _, code := range []string{"0", "1", "2", "32", "33", "1;31"} {
		text = strings.ReplaceAll(text, "\x1b["+code+"m", "")
	}
	if text != plain.String() {
		t.Errorf("without its colours it reads\n%s\nwant\n%s", text, plain.String())
	}
}

func TestTheSectionOfThePage(t *testing.T) {
	golden(t, "section.md", []byte(Section(sample(), "performance.svg")))
}

func TestPlotsAreWellFormed(t *testing.T) {
	for name, svg := range map[string][]byte{"ratios.svg": Ratios(sample()), "growth.svg": Growth(sample())} {
		golden(t, name, svg)
		decoder, elements := xml.NewDecoder(bytes.NewReader(svg)), 0
		for {
			token, err := decoder.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if start, is := token.(xml.StartElement); is {
				elements++
				for _, a := range start.Attr {
					if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") {
						t.Errorf("%s: <%s %s=%q>", name, start.Name.Local, a.Name.Local, a.Value)
					}
				}
			}
		}
		if elements < 20 {
			t.Errorf("%s has only %d elements", name, elements)
		}
	}
	if svg := Growth(Result{}); svg != nil {
		t.Errorf("a plot of no curves: %s", svg)
	}
}

func TestAScaleKeepsItsEnds(t *testing.T) {
	for name, s := range map[string]scale{
		"linear": fit([]float64{0, 3}, 100, 0), "logarithmic": fit([]float64{1, 100}, 0, 100), "one value": fit([]float64{7}, 0, 100),
		"nothing": fit(nil, 0, 100), "zero": fit([]float64{0}, 0, 100), "large": fit([]float64{1e-3, 1e5}, 0, 100),
	} {
		if s.at(s.low) != s.from || s.at(s.high) != s.to {
			t.Errorf("%s: %g to %g lie at %g and %g, want %g and %g", name, s.low, s.high, s.at(s.low), s.at(s.high), s.from, s.to)
		}
		if n := len(s.ticks()); n < 2 || n > 14 {
			t.Errorf("%s: %d ticks: %v", name, n, s.ticks())
		}
	}
}

func TestJSONHasTheSamplesAndWhatFollowsFromThem(t *testing.T) {
	text, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Facts Facts
		Lines []struct {
			Row     int
			Ours    []float64
			Value   *float64
			Low     *float64
			Verdict Verdict
		}
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	first, last := got.Lines[0], got.Lines[len(got.Lines)-1]
	if first.Row != 3 || len(first.Ours) != 41 || first.Value == nil || *first.Value != 0.52 || first.Verdict != Holds {
		t.Errorf("the first line reads %+v", first)
	}
	if last.Value != nil || last.Low != nil || last.Verdict != Short {
		t.Errorf("the line without samples reads %+v", last)
	}
	if got.Facts.Programs["ptp"] != "v1.9.1" {
		t.Errorf("the facts read %+v", got.Facts)
	}
}

func TestARunReplacesTheOneInThePage(t *testing.T) {
	page := "# Title\n\n" + begins + "\nold\n" + ends + "\n\n## Below\n"
	once, err := Replace(page, "new\n")
	if err != nil {
		t.Fatal(err)
	}
	if want := "# Title\n\n" + begins + "\n\nnew\n\n" + ends + "\n\n## Below\n"; once != want {
		t.Errorf("got\n%s\nwant\n%s", once, want)
	}
	if twice, err := Replace(once, "new\n"); err != nil || twice != once {
		t.Errorf("a second time it becomes (error %v)\n%s", err, twice)
	}
	if _, err := Replace("# Title\n", "new\n"); err == nil {
		t.Error("a page without a place for a run is no error")
	}
}

func TestANameSaysTheQuantileOnceAndTheBackendLast(t *testing.T) {
	for want, line := range map[string]Line{
		"joins": {What: "joins", Quantile: 0.5}, "joins, p99 (nft)": {What: "joins", Quantile: 0.99, Backend: "nft"},
		"joins: p99": {What: "joins", Part: "p99", Quantile: 0.99}, "joins: late, p99.9": {What: "joins", Part: "late", Quantile: 0.999},
	} {
		if got := line.name(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestNumbersHaveThreeDigitsThatMatter(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.000021: "2.1e-05", 0.021: "0.021", 0.0999: "0.0999", 0.1: "0.100", 0.9634: "0.963", 1: "1.00",
		9.99: "9.99", 9.996: "10.0", 12.34: "12.3", 99.97: "100", 123.4: "123", 999.6: "1,000", 29412: "29,412", 1234567: "1,234,567",
		-1234: "-1,234", 9999999: "9,999,999", 1345066563: "1,345 million",
	} {
		if got := number(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
}
