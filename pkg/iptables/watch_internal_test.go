package iptables

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

func TestARestoreMakesSoManyRulesOfThoseThatWere(t *testing.T) {
	before := map[string]int{"FORWARD": 2, "POSTERN-FORWARD": 9, "PST-I-1": 3, "KUBE-SERVICES": 4}
	jump := rule.Rule{Action: rule.Jump{Chain: "POSTERN-FORWARD"}}
	drop := rule.Rule{Action: rule.Drop{}}
	text := Render(Change{
		Table:   rule.Mangle,
		Replace: []rule.Chain{{Name: "POSTERN-FORWARD", Rules: []rule.Rule{drop, drop}}, {Name: "PST-I-2", Rules: []rule.Rule{drop}}},
		Append:  []rule.Chain{{Name: "PST-I-2", Rules: []rule.Rule{drop}}},
		Unhook:  []rule.Hook{{Table: rule.Mangle, Chain: "FORWARD", Rule: jump}},
		Hook: []rule.Hook{{Table: rule.Mangle, Chain: "FORWARD", Rule: jump},
			{Table: rule.Mangle, Chain: "FORWARD", Rule: jump, Last: true}},
		Delete: []string{"PST-I-1"},
	}, Change{Table: rule.Filter, Append: []rule.Chain{{Name: "KUBE-SERVICES", Rules: []rule.Rule{drop}}}})
	want := map[string]int{"FORWARD": 3, "POSTERN-FORWARD": 2, "PST-I-2": 2, "KUBE-SERVICES": 4}
	if got := expected(before, sections(text)[rule.Mangle]); !maps.Equal(got, want) {
		t.Errorf("%v becomes %v, not %v, by\n%s", before, got, want, text)
	}
}

// Somebody who waits for the xtables lock commits right after our restore, before we can look. That must not pass for ours.
func TestAForeignCommitBetweenOurCommitAndOurLookIsNoticed(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for _, test := range []struct {
			name, before, after string
			noticed             bool
		}{
			{name: "nothing"},
			{name: "a flush before", before: "-F", noticed: true},
			{name: "a flush after", after: "-F", noticed: true},
			{name: "a foreign rule after", after: "-A FORWARD -j ACCEPT", noticed: true},
			{name: "a rule of ours deleted after", after: "-D PST-I-1 1", noticed: true},
		} {
			t.Run(test.name, func(t *testing.T) {
				nettest.NewNS(t, "between").Do(t, func() { between(t, Backend(backend), test.before, test.after, test.noticed) })
			})
		}
	})
}

func between(t *testing.T, backend Backend, before, after string, noticed bool) {
	w, err := NewWatcher(backend)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	tables, err := New(backend, rule.IPv4)
	if err != nil {
		t.Fatal(err)
	}
	tables.Watcher = w
	foreign := func(args string) {
		if args != "" {
			name := strings.TrimSuffix(tables.restore, "-restore")
			if _, err := tables.run(context.Background(), name, nil, strings.Fields("-w -t mangle "+args)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	drop := rule.Rule{Action: rule.Drop{}}
	first := Render(Change{Table: rule.Mangle, Replace: []rule.Chain{{Name: "PST-I-1", Rules: []rule.Rule{drop, drop}}}})
	if err := tables.Restore(context.Background(), first); err != nil {
		t.Fatal(err)
	}
	// What Restore does, step by step.
	text := Render(Change{Table: rule.Mangle, Replace: []rule.Chain{{Name: "PST-I-2", Rules: []rule.Rule{drop}}}})
	write := w.begin(tables, text)
	foreign(before)
	if _, err := tables.run(context.Background(), tables.restore, &input{text, write.started}, "--noflush"); err != nil {
		t.Fatal(err)
	}
	foreign(after)
	write.ended(true)
	select {
	case notices := <-w.Changes():
		t.Logf("noticed: %+v", notices)
		if !noticed {
			t.Errorf("our own work was reported: %+v", notices)
		}
	default:
		if noticed {
			t.Error("not noticed")
		}
	}
}

// The costs that comments speak of: go test -bench . -run NONE ./pkg/iptables
func BenchmarkLegacyFigures(b *testing.B) {
	large(b, Legacy, func(w *Watcher, _ *Tables) {
		for b.Loop() {
			if err := w.source.(*legacyWatch).kernel[rule.IPv4].poll(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkLegacyRulesByChain(b *testing.B) {
	large(b, Legacy, func(w *Watcher, _ *Tables) {
		for b.Loop() {
			chains, err := w.source.(*legacyWatch).kernel[rule.IPv4].x.chains(rule.Mangle)
			if err != nil || len(chains) < 1000 {
				b.Fatal(len(chains), err)
			}
		}
	})
}

func BenchmarkALegacyRestoreUnwatched(b *testing.B) { benchmarkRestore(b, false) }
func BenchmarkALegacyRestoreWatched(b *testing.B)   { benchmarkRestore(b, true) }

func benchmarkRestore(b *testing.B, watched bool) {
	large(b, Legacy, func(w *Watcher, tables *Tables) {
		if !watched {
			tables.Watcher = nil
		}
		one := rule.Chain{Name: "PST-I-0"}
		for b.Loop() {
			one.Rules = append(one.Rules, rule.Rule{Action: rule.Return{}})
			text := Render(Change{Table: rule.Mangle, Replace: []rule.Chain{one}})
			if err := tables.Restore(context.Background(), text); err != nil {
				b.Fatal(err)
			}
		}
		select {
		case notices := <-w.Changes():
			b.Fatalf("reported as foreign: %+v", notices)
		default:
		}
	})
}

func BenchmarkReadingWhatNFTAnnounces(b *testing.B) {
	large(b, NFT, func(w *Watcher, _ *Tables) {
		n := w.source.(*nftWatch)
		if err := n.read(); err != nil {
			b.Fatal(err)
		}
		select {
		case notices := <-w.Changes():
			b.Fatalf("ten thousand rules were too many, or reported as foreign: %+v", notices[0])
		default:
		}
	})
}

// large is a namespace with a thousand chains of ten rules in mangle, written in one restore that is ours.
func large(b *testing.B, backend Backend, do func(*Watcher, *Tables)) {
	nettest.NewNS(b, "large").Do(b, func() {
		w, err := NewWatcher(backend)
		if err != nil {
			b.Fatal(err)
		}
		defer w.Close()
		tables, err := New(backend, rule.IPv4)
		if err != nil {
			b.Fatal(err)
		}
		tables.Watcher = w
		change := Change{Table: rule.Mangle}
		for i := range 1000 {
			c := rule.Chain{Name: fmt.Sprintf("PST-I-%d", i)}
			for range 10 {
				c.Rules = append(c.Rules, rule.Rule{Action: rule.Return{}, Comment: "team-a/allow-web ingress 0"})
			}
			change.Replace = append(change.Replace, c)
		}
		if err := tables.Restore(context.Background(), Render(change)); err != nil {
			b.Fatal(err)
		}
		do(w, tables)
	})
}

// What overflows the socket may have been anything: every table is to be read again.
func TestLostNotificationsAreReportedForEveryTable(t *testing.T) {
	nettest.NewNS(t, "lost").Do(t, func() {
		w, err := NewWatcher(NFT) // nobody reads
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		tables, err := New(NFT, rule.IPv4)
		if err != nil {
			t.Fatal(err)
		}
		n := w.source.(*nftWatch)
		if err := n.socket.SetRoom(1); err != nil {
			t.Fatal(err)
		}
		foreign := "*nat\n:KUBE-SERVICES - [0:0]\n" + strings.Repeat("-A KUBE-SERVICES -j RETURN\n", 100) + "COMMIT\n"
		if err := tables.Restore(context.Background(), foreign); err != nil {
			t.Fatal(err)
		}
		if err := n.read(); err != nil {
			t.Fatal(err)
		}
		var notices []Notice
		select {
		case notices = <-w.Changes():
		default:
		}
		if len(notices) != len(rule.Families)*len(watched) || !strings.Contains(notices[len(notices)-1].What, "lost") {
			t.Errorf("%d tables were reported: %+v", len(notices), notices)
		}
	})
}
