package control

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/postern-cni/postern/e2e/bench/apiserver"
	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
	"github.com/postern-cni/postern/pkg/nettest"
)

// The node is the test's own network namespace, so there is one run, with one backend.
func TestEveryRowIsMeasuredInASmallCluster(t *testing.T) {
	nettest.Need(t)
	const beside = "../../../bin/bench"
	programs, err := apiserver.Programs(beside)
	if err != nil {
		t.Skip(err)
	}
	if programs, err = filepath.Abs(programs); err != nil {
		t.Fatal(err)
	}
	bin := nettest.Programs(t, map[string]string{"postern": "plugin", "policyd": "policyd"})
	if err := os.Symlink(programs, filepath.Join(bin, "e2e")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	rows := map[int]bool{}
	for _, row := range Bench().Rows {
		rows[row] = true
	}
	c := &cluster{
		env:     table.Env{Quick: true, Rows: rows, Bin: bin, Dir: t.TempDir(), Say: t.Logf},
		backend: "nft", curves: map[string]*table.Curve{},
		plan: apiserver.Plan{Seed: seed, Node: world.NodeName, Local: 12, Namespaces: 20, Policies: 30},
	}
	tiny := effort{pods: 200, joins: 2, policies: 1, starts: 1, restarts: 1, settling: time.Second, idle: time.Second,
		busy: time.Second, marked: true, mebibytes: 1000, rate: 20, curves: true}
	larger := tiny
	larger.pods, larger.marked, larger.mebibytes = 300, false, 0
	report, err := c.run(ctx, []effort{tiny, larger})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range report.Lines {
		delete(rows, l.Row)
		t.Logf("row %d %s: %v %s beside %v", l.Row, l.Part, l.Ours, l.Unit, l.Theirs)
	}
	if len(rows) > 0 {
		t.Errorf("there are no lines for rows %v", rows)
	}
	for _, curve := range report.Curves {
		if len(curve.Points) != 2 {
			t.Errorf("%s, %s: %v", curve.Plot, curve.Name, curve.Points)
		}
	}
}
