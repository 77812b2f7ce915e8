package packets

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// The benchmark's nodes have their sandboxes' names in the test's own mount namespace, so there is one test, with one backend.
func TestEveryRowIsMeasured(t *testing.T) {
	nettest.Need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bin := nettest.Programs(t, map[string]string{"postern": "plugin", "policyd": "policyd"})
	rows := map[int]bool{13: true, 14: true, 15: true}
	env := table.Env{Rows: rows, Backends: []string{"nft"}, Bin: bin, Dir: t.TempDir(), Say: t.Logf}
	s := size{few: 3, pods: 4, many: 5, rounds: 2, load: load{connections: 10, bursts: 2, packets: 10}}
	report, err := run(ctx, env, s)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range report.Lines {
		got = append(got, strings.TrimSpace(fmt.Sprint(l.Row, " ", l.Part)))
		if len(l.Ours) != s.rounds || len(l.Theirs) != s.rounds || slices.Min(slices.Concat(l.Ours, l.Theirs)) <= 0 {
			t.Errorf("row %d %s has the values %v beside %v", l.Row, l.Part, l.Ours, l.Theirs)
		}
	}
	if want := []string{"13", "14", "15 large packets", "15 small packets"}; !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
}
