package cni

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

// programs is a folder with those of all sides.
func programs(t *testing.T) string {
	t.Helper()
	const plugins = "github.com/containernetworking/plugins/plugins/"
	return nettest.Programs(t, map[string]string{
		"postern": "plugin", "policyd": "policyd", "floor": "e2e/bench/floor", "nothing": "e2e/bench/nothing",
		"ptp": plugins + "main/ptp", "host-local": plugins + "ipam/host-local", "portmap": plugins + "meta/portmap",
	})
}

// The benchmark's node is the test's own network namespace, so there is one test, with one backend.
func TestEveryRowIsMeasured(t *testing.T) {
	nettest.Need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	env := table.Env{Rows: map[int]bool{}, Backends: []string{"nft"}, Bin: programs(t), Dir: t.TempDir(), Say: t.Logf}
	for _, row := range Bench().Rows {
		env.Rows[row] = true
	}
	report, err := run(ctx, env, size{pods: 4, rounds: 2, levels: []int{2, 5}, adds: 2, starts: 2})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range report.Lines {
		got = append(got, strings.TrimSpace(fmt.Sprint(l.Row, " ", l.Part)))
		if len(l.Ours) == 0 || len(l.Ours) != len(l.Theirs) || slices.Min(slices.Concat(l.Ours, l.Theirs)) <= 0 {
			t.Errorf("row %d %s has the values %v beside %v", l.Row, l.Part, l.Ours, l.Theirs)
		}
	}
	want := []string{"17 start", "17 size", "1", "2", "4 without ports", "3", "4 with two hostPorts", "5"}
	if !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
	for _, c := range report.Curves {
		if len(c.Points) != 2 || c.Points[1].X != 5 {
			t.Errorf("the curve of %s has the points %v", c.Name, c.Points)
		}
	}
}

func TestTheNodeStopsWhereSomethingIsMeasured(t *testing.T) {
	for _, tt := range []struct {
		rows []int
		want []int
	}{
		{[]int{1, 17}, []int{110}},
		{[]int{5}, []int{10, 1000}},
		{[]int{4, 5}, []int{10, 110, 1000}},
	} {
		b := &bench{size: sizeOf(true), env: table.Env{Rows: map[int]bool{}}}
		for _, row := range tt.rows {
			b.env.Rows[row] = true
		}
		if got := b.stops(); !slices.Equal(got, tt.want) {
			t.Errorf("rows %v: stops at %v, want %v", tt.rows, got, tt.want)
		}
	}
}
