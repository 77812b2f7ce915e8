package verify

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// quick are sizes for every day; `make verify` has larger ones.
func quick(t *testing.T) (options, *printer) {
	return options{packets: enough, kernelPackets: 400, walks: 10, seed: 1}, &printer{out: t.Output()}
}

// What the compiled rules and sets let pass, what the model allows, and what the API's words mean are one.
func TestRulesModelAndWordsAgree(t *testing.T) {
	o, p := quick(t)
	got := checkRules(o, p)
	if got.found != "" {
		t.Fatal(got.found)
	}
	if missing := got.kinds.missing(); len(missing) > 0 {
		t.Errorf("of %d packets, none are of these kinds: %s", got.packets, strings.Join(missing, "; "))
	}
}

func TestTheKernelAndTheWordsAgree(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, p := quick(t)
		o.backends = []iptables.Backend{iptables.Backend(backend)}
		got, err := checkKernels(o, p)
		if err != nil {
			t.Fatal(err)
		}
		if got[0].found != "" {
			t.Fatal(got[0].found)
		}
		if missing := lacking(options{kernelPackets: o.kernelPackets, backends: o.backends}, part{}, got); len(missing) > 0 {
			t.Errorf("of %d packets, none are of these kinds, passed and dropped: %s", got[0].packets, strings.Join(missing, "; "))
		}
	})
}

// Each way in which the compiler could break a line of the semantics is found within the worlds that are compared.
func TestEveryMutationIsFoundByTheRules(t *testing.T) {
	o, _ := quick(t)
	for i, m := range mutations() {
		t.Run(m.name, func(t *testing.T) {
			if text, found := m.search(o, uint64(i)); !found {
				t.Error(text)
			}
		})
	}
}

func TestMutationsAreFoundByPackets(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		o, _ := quick(t)
		err := onBench(iptables.Backend(backend), 0, func(b *bench) error {
			for i, m := range mutations() {
				if m.line != 9 && m.line != 10 || !m.kernel {
					continue
				}
				if text, found, err := m.searchKernel(o, b, uint64(i)); err != nil || !found {
					return fmt.Errorf("%s: %s: %w", m.name, text, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestTheProofFailsWhereTheRulesAreBroken(t *testing.T) {
	for _, breaks := range []string{"", "exceptions are passed over"} {
		var out strings.Builder
		ok, err := verifyAll(options{packets: 4000, seed: 1, broken: mutationNamed(breaks)}, &printer{out: &out})
		want := "checked 4000 packets in 100 clusters: 0 divergences\n"
		if breaks != "" {
			want = "clusters: 1 divergences\n"
		}
		if err != nil || ok != (breaks == "") || !strings.HasSuffix(out.String(), want) {
			t.Errorf("broken by %q: %v, %v, and the last line is not %q:\n%s", breaks, ok, err, want, out.String())
		}
		if breaks != "" && !strings.Contains(out.String(), "\nkind: NetworkPolicy\n") {
			t.Errorf("no manifests: %s", out.String())
		}
	}
}

// A difference is cut down to few objects, and is the same difference when it has been written as manifests and read again.
func TestADifferenceIsShrunkToAFileThatShowsItAgain(t *testing.T) {
	for _, name := range []string{"exceptions are passed over", "hostNetwork pods are peers", "one number for a name in all pods"} {
		t.Run(name, func(t *testing.T) {
			m := mutationNamed(name)
			differs := func(w *World, p Packet) bool {
				j := judge(w, m, dice{})
				rules, err := j.rules(p)
				return err == nil && rules != j.words(p).passes
			}
			w, p := firstDifference(t, differs)
			w = shrink(w, func(less *World) bool { return differs(less, p) })
			if n := len(w.Cluster.Policies) + len(w.Cluster.Pods) + len(w.Cluster.Namespaces); n > 5 {
				t.Errorf("%d objects are left: %s", n, file(w, ""))
			}
			read, packets, err := parse(file(w, "two lines\nof comment", expected{p, false}))
			if err != nil {
				t.Fatal(err)
			}
			if len(packets) != 1 || packets[0].Packet != p || !differs(read, p) {
				t.Errorf("no difference for %v after reading again:\n%s", packets, file(read, ""))
			}
		})
	}
}

func firstDifference(t *testing.T, differs func(*World, Packet) bool) (*World, Packet) {
	t.Helper()
	for n := range uint64(1000) {
		w, d := newWorld(1, n), throw(1, n, forPackets)
		for range packetsOfAWorld {
			if p := w.packet(d); differs(w, p) {
				return w, p
			}
		}
	}
	t.Fatal("no difference")
	return nil, Packet{}
}

func TestAWorldComesBackFromItsManifests(t *testing.T) {
	for n := range uint64(80) {
		if _, err := throughManifests(newWorld(2, n)); err != nil {
			t.Fatal(err)
		}
	}
}

// regressions are worlds that were wrong once, or that are easily got wrong, with what must become of their packets.
func regressions(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("testdata/regressions/*.yaml")
	if err != nil || len(names) == 0 {
		t.Fatal("no regressions", err)
	}
	texts := map[string]string{}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts[strings.TrimSuffix(filepath.Base(name), ".yaml")] = string(text)
	}
	return texts
}

func TestRegressionsInTheRules(t *testing.T) {
	for name, text := range regressions(t) {
		t.Run(name, func(t *testing.T) {
			w, packets, err := parse(text)
			if err != nil {
				t.Fatal(err)
			}
			j := judge(w, nil, dice{})
			for _, p := range packets {
				words := j.words(p.Packet)
				if words.passes != p.Passes {
					t.Errorf("%s: words say %s, want %s:\n%s", p, pass(words.passes), pass(p.Passes), words)
				}
				if text := j.differs(p.Packet, words); text != "" {
					t.Errorf("%s: %s:\n%s", p, text, words)
				}
			}
		})
	}
}

func TestRegressionsInTheKernel(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		err := onBench(iptables.Backend(backend), 0, func(b *bench) error {
			for name, text := range regressions(t) {
				w, packets, err := parse(text)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				var first []Packet
				for _, p := range packets {
					if p.State == stateNew {
						first = append(first, p.Packet)
					}
				}
				found, _, err := b.compare(judge(w, nil, dice{}), first, census{})
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if found != nil {
					t.Errorf("%s: %s: %s", name, found.packet, found.text)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}
