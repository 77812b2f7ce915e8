package packets

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/postern-cni/postern/e2e/bench/table"
	"github.com/postern-cni/postern/e2e/bench/world"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestPlay(t *testing.T) {
	dir := os.Getenv("PLAY")
	if dir == "" {
		t.Skip()
	}
	ctx := context.Background()
	bin := t.TempDir()
	os.Symlink(nettest.Build(t, "plugin"), filepath.Join(bin, "postern"))
	env := table.Env{Backends: []string{"nft"}, Bin: bin, Dir: t.TempDir(), Say: t.Logf}
	first, err := world.New(ctx, env, "nft")
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(dir + "/*.rules")
	if only := os.Getenv("ONLY"); only != "" {
		files = slices.DeleteFunc(files, func(f string) bool { return !slices.Contains(strings.Fields(only), strings.TrimSuffix(filepath.Base(f), ".rules")) })
	}
	files = append([]string{"base"}, files...)
	var sides []*side
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".rules")
		node, err := first.Beside(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		s := &side{pods: 2, node: node, rates: map[string][]float64{}}
		if err := s.bare(ctx); err != nil {
			t.Fatal(err)
		}
		for i, p := range []*pod{&s.client, &s.server} {
			b := newPod(name, i)
			a, err := node.Attach(ctx, b)
			if err != nil {
				t.Fatal(err)
			}
			*p = pod{b.Path(), a[0]}
		}
		node.In(func() error {
			os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(clientPorts), 0o644)
			return nil
		})
		sides = append(sides, s)
		if f == "base" {
			continue
		}
		rules, _ := os.ReadFile(f)
		backend := "nft"
		if strings.HasPrefix(name, "legacy") {
			backend = "legacy"
		}
		sets, rest, _ := strings.Cut(string(rules), "====\n")
		err = node.In(func() error {
			ifof := func(p pod) string {
				r, err := netlink.RouteGet(p.addr.AsSlice())
				if err != nil {
					t.Fatal(err)
				}
				l, _ := netlink.LinkByIndex(r[0].LinkIndex)
				return l.Attrs().Name
			}
			rep := strings.NewReplacer("{A}", s.client.addr.String(), "{B}", s.server.addr.String(), "{IA}", ifof(s.client), "{IB}", ifof(s.server))
			run := func(text string, name string, args ...string) error {
				cmd := exec.Command(name, args...)
				cmd.Stdin = strings.NewReader(rep.Replace(text))
				out, err := cmd.CombinedOutput()
				if err != nil {
					return fmt.Errorf("%s: %w %s", name, err, out)
				}
				return nil
			}
			if sets != "" {
				if err := run(sets, "ipset", "restore"); err != nil {
					return err
				}
			}
			return run(rest, "iptables-"+backend+"-restore")
		})
		if err != nil {
			t.Fatal(f, err)
		}
	}
	kinds := []string{connections, large, small}
	if k := os.Getenv("KINDS"); k != "" {
		kinds = strings.Split(k, ",")
	}
	rounds := 25
	fmt.Sscan(os.Getenv("ROUNDS"), &rounds)
	for range rounds {
		for _, kind := range kinds {
			for _, s := range sides {
				r, err := s.measure(kind, fullLoad)
				if err != nil {
					t.Fatal(kind, err)
				}
				s.rates[kind] = append(s.rates[kind], r)
			}
		}
		slices.Reverse(sides)
	}
	if rounds%2 == 1 {
		slices.Reverse(sides)
	}
	for i, s := range sides {
		line := fmt.Sprintf("%-22s", strings.TrimSuffix(filepath.Base(files[i]), ".rules"))
		for _, kind := range kinds {
			base := table.Quantile(sides[0].rates[kind], .5)
			v := table.Quantile(s.rates[kind], .5)
			scale := 1e9
			if kind == large {
				scale = 65536
			}
			l := table.Line{Row: 1, Ours: s.rates[kind], Theirs: sides[0].rates[kind]}
			lo, hi := l.Interval()
			line += fmt.Sprintf(" | %s %8.0f ns (%+6.0f) %.3f (%.3f-%.3f)", kind[:5], scale/v, scale/v-scale/base, v/base, lo, hi)
		}
		fmt.Println(line)
	}
}
