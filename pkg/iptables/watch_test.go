package iptables_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/rule"
)

// limit is for what must happen, however busy the machine is.
const limit = 30 * time.Second

// guarded is a namespace with chains of ours, and a watcher in it.
type guarded struct {
	ns      *nettest.NS
	backend iptables.Backend
	tables  map[rule.Family]*iptables.Tables

	mu   sync.Mutex
	seen []sighting
}

type sighting struct {
	iptables.Notice
	at time.Time
}

// guard writes a chain of ours with its hook into mangle and filter of both families, and begins to watch.
func guard(t *testing.T, backend string) *guarded {
	t.Helper()
	g := &guarded{ns: nettest.NewNS(t, "watched"), backend: iptables.Backend(backend), tables: map[rule.Family]*iptables.Tables{}}
	var w *iptables.Watcher
	g.ns.Do(t, func() {
		var err error
		if w, err = iptables.NewWatcher(g.backend); err != nil {
			t.Fatal(err)
		}
		for _, f := range rule.Families {
			if g.tables[f], err = iptables.New(g.backend, f); err != nil {
				t.Fatal(err)
			}
			g.tables[f].Watcher = w
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Run(ctx); err != nil {
			t.Errorf("the watcher ended: %v", err)
		}
	})
	wg.Go(func() { g.collect(ctx, w) })
	t.Cleanup(func() { cancel(); wg.Wait(); w.Close() })
	for _, f := range rule.Families {
		g.write(t, f, iptables.Change{Table: rule.Mangle, Replace: []rule.Chain{chain(3)}, Hook: []rule.Hook{hook(rule.Mangle)}},
			iptables.Change{Table: rule.Filter, Replace: []rule.Chain{chain(1)}, Hook: []rule.Hook{hook(rule.Filter)}})
	}
	return g
}

func chain(rules int) rule.Chain {
	c := rule.Chain{Name: "POSTERN-FORWARD"}
	for i := range rules {
		c.Rules = append(c.Rules, rule.Rule{Matches: []rule.Match{rule.In{Name: fmt.Sprintf("pst%d", i)}}, Action: rule.Return{}})
	}
	return c
}

func hook(table rule.Table) rule.Hook {
	return rule.Hook{Table: table, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: "POSTERN-FORWARD"}}}
}

func (g *guarded) collect(ctx context.Context, w *iptables.Watcher) {
	for {
		select {
		case <-ctx.Done():
			return
		case notices := <-w.Changes():
			g.mu.Lock()
			for _, n := range notices {
				g.seen = append(g.seen, sighting{n, time.Now()})
			}
			g.mu.Unlock()
		}
	}
}

// notices returns what has been reported so far.
func (g *guarded) notices() []sighting {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.seen)
}

// write is a restore of ours.
func (g *guarded) write(t testing.TB, f rule.Family, changes ...iptables.Change) {
	t.Helper()
	if err := nettest.Enter(g.ns, func() {
		if err := g.tables[f].Restore(context.Background(), iptables.Render(changes...)); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Error(err)
	}
}

// noticed waits for a notice of a table that came after the first ones, and returns when it came.
func (g *guarded) noticed(t *testing.T, after int, f rule.Family, table rule.Table) (s sighting) {
	t.Helper()
	nettest.Eventually(t, limit, fmt.Sprintf("a notice of table %s (%s)", table, f), func() error {
		seen := g.notices()[after:]
		i := slices.IndexFunc(seen, func(n sighting) bool { return n.Family == f && n.Table == table })
		if i < 0 {
			return fmt.Errorf("noticed %v", seen)
		}
		s = seen[i]
		return nil
	})
	return s
}

// program is iptables or ip6tables of the backend, with a verb: "", "-restore".
func (g *guarded) program(f rule.Family, verb string) string {
	name := "iptables-"
	if f == rule.IPv6 {
		name = "ip6tables-"
	}
	return name + string(g.backend) + verb
}

// foreign runs the backend's program as somebody else does. nft takes no lock and so no -w.
func (g *guarded) foreign(t testing.TB, f rule.Family, args ...string) {
	t.Helper()
	if _, err := g.ns.Try(g.program(f, ""), append([]string{"-w"}, args...)...); err != nil {
		t.Error(err)
	}
}

func TestAForeignChangeIsNoticed(t *testing.T) {
	flush := func(g *guarded, f rule.Family) {
		g.ns.Try("sh", "-c", fmt.Sprintf("printf '*mangle\\nCOMMIT\\n' | %s", g.program(f, "-restore")))
	}
	for _, test := range []struct {
		name  string
		table rule.Table
		args  string
		do    func(*guarded, rule.Family)
	}{
		{name: "a flush of the table", table: rule.Mangle, args: "-t mangle -F"},
		{name: "a flush by a restore of nothing", table: rule.Mangle, do: flush},
		{name: "our chain emptied", table: rule.Mangle, args: "-t mangle -F POSTERN-FORWARD"},
		{name: "one rule of ours deleted", table: rule.Mangle, args: "-t mangle -D POSTERN-FORWARD 2"},
		{name: "a rule added to our chain", table: rule.Mangle, args: "-t mangle -A POSTERN-FORWARD -j ACCEPT"},
		{name: "our hook deleted", table: rule.Mangle, args: "-t mangle -D FORWARD -j POSTERN-FORWARD"},
		{name: "a rule before our hook", table: rule.Mangle, args: "-t mangle -I FORWARD -j ACCEPT"},
		{name: "a rule before our hook in filter", table: rule.Filter, args: "-I FORWARD -j ACCEPT"},
		{name: "a flush of filter", table: rule.Filter, args: "-F"},
	} {
		t.Run(test.name, func(t *testing.T) {
			nettest.Backends(t, func(t *testing.T, backend string) {
				g := guard(t, backend)
				for _, f := range rule.Families {
					before := len(g.notices())
					if test.do != nil {
						test.do(g, f)
					} else {
						g.foreign(t, f, strings.Fields(test.args)...)
					}
					done := time.Now()
					s := g.noticed(t, before, f, test.table)
					t.Logf("noticed %v after the command had returned: %s", s.at.Sub(done).Round(10*time.Microsecond), s.What)
				}
				// Nothing but what was done, and none of it twice over another table.
				for _, s := range g.notices() {
					if s.Table != test.table {
						t.Errorf("also noticed: %s", s.What)
					}
				}
			})
		})
	}
}

// What `nft flush ruleset` sends, by a process that is not our child but this one.
func TestTheDeletionOfAllNFTTablesIsNoticed(t *testing.T) {
	if nettest.Need(t); testing.Short() {
		t.Skip("-short: it deletes tables for a while")
	}
	g := guard(t, string(iptables.NFT))
	before := len(g.notices())
	g.ns.Do(t, func() { flushRuleset(t) })
	done := time.Now()
	for _, f := range rule.Families {
		for _, table := range []rule.Table{rule.Mangle, rule.Filter} {
			s := g.noticed(t, before, f, table)
			t.Logf("noticed %v after the answer: %s", s.at.Sub(done).Round(10*time.Microsecond), s.What)
			if !strings.Contains(s.What, "deleted table") {
				t.Errorf("%q does not say that the table was deleted", s.What)
			}
		}
	}
}

// flushRuleset asks nf_tables to delete every table of every family, in one transaction.
func flushRuleset(t *testing.T) {
	message := func(typ uint16, flags uint16, seq uint32, subsystem uint16) []byte {
		b := make([]byte, unix.NLMSG_HDRLEN+4)
		binary.NativeEndian.PutUint32(b, uint32(len(b)))
		binary.NativeEndian.PutUint16(b[4:], typ)
		binary.NativeEndian.PutUint16(b[6:], flags|unix.NLM_F_REQUEST)
		binary.NativeEndian.PutUint32(b[8:], seq)
		binary.BigEndian.PutUint16(b[unix.NLMSG_HDRLEN+2:], subsystem)
		return b
	}
	const begin, end = 0x10, 0x11 // NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
	batch := slices.Concat(message(begin, 0, 1, unix.NFNL_SUBSYS_NFTABLES),
		message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE, unix.NLM_F_ACK, 2, 0),
		message(end, 0, 3, unix.NFNL_SUBSYS_NFTABLES))
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil || n < unix.NLMSG_HDRLEN+4 {
		t.Fatalf("%d bytes of answer: %v", n, err)
	}
	if errno := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); errno != 0 {
		t.Fatalf("flush the ruleset: %v", unix.Errno(-errno))
	}
}

// Hundreds of restores of ours, of every kind, and only then something foreign: that alone is reported.
func TestOurOwnRestoresAreNotReported(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		g := guard(t, backend)
		const rounds = 100
		for i := range rounds {
			f := rule.Families[i%2]
			own := rule.Chain{Name: fmt.Sprintf("PST-I-%d", i/2), Rules: chain(i % 5).Rules}
			g.write(t, f, iptables.Change{Table: rule.Mangle, Replace: []rule.Chain{own, chain(i % 7)},
				Unhook: []rule.Hook{hook(rule.Mangle)}, Hook: []rule.Hook{hook(rule.Mangle)}},
				iptables.Change{Table: rule.NAT, Replace: []rule.Chain{own}})
			if i%4 >= 2 {
				g.write(t, f, iptables.Change{Table: rule.Mangle, Append: []rule.Chain{chain(1)}, Delete: []string{own.Name}})
			}
		}
		if seen := g.notices(); len(seen) > 0 {
			t.Fatalf("%d of our restores were reported, the first: %+v", len(seen), seen[0])
		}
		g.foreign(t, rule.IPv6, "-t", "nat", "-I", "POSTROUTING", "-j", "ACCEPT")
		g.noticed(t, 0, rule.IPv6, rule.NAT)
		if seen := g.notices(); len(seen) != 1 {
			t.Errorf("also reported: %v", seen)
		}
	})
}

// A foreign change at any instant of our own restores is noticed, and nothing of ours is taken for one.
func TestForeignChangesAmongOurRestoresAreNoticed(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		g := guard(t, backend)
		const rounds = 60
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		var restores int
		wg.Go(func() {
			for ; ctx.Err() == nil; restores++ {
				for _, f := range rule.Families {
					g.write(t, f, iptables.Change{Table: rule.Mangle, Replace: []rule.Chain{chain(restores % 5)}})
				}
			}
		})
		var slowest time.Duration
		for i := range rounds {
			before := len(g.notices())
			if i%2 == 0 {
				g.foreign(t, rule.IPv4, "-t", "mangle", "-I", "FORWARD", "-j", "ACCEPT")
			} else {
				g.foreign(t, rule.IPv4, "-t", "mangle", "-D", "FORWARD", "-j", "ACCEPT")
			}
			done := time.Now()
			slowest = max(slowest, g.noticed(t, before, rule.IPv4, rule.Mangle).at.Sub(done))
		}
		cancel()
		wg.Wait()
		t.Logf("%d foreign changes among %d restores of ours; the slowest was noticed %v after it had returned", rounds,
			2*restores, slowest.Round(10*time.Microsecond))
		for _, s := range g.notices() {
			if s.Family != rule.IPv4 || s.Table != rule.Mangle || strings.HasPrefix(s.What, "iptables-nft-re") {
				t.Errorf("reported, and nobody else's work: %s", s.What)
			}
		}
	})
}

// A restore of ours that fails after its first table was written must not hide that, and must not be taken for good.
func TestAWatcherSurvivesRestoresThatFail(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		g := guard(t, backend)
		g.ns.Do(t, func() {
			err := g.tables[rule.IPv4].Restore(context.Background(), "*mangle\n-A POSTERN-FORWARD -j NOWHERE\nCOMMIT\n")
			if err == nil {
				t.Error("a jump to a chain that is not there was accepted")
			}
		})
		g.write(t, rule.IPv4, iptables.Change{Table: rule.Mangle, Replace: []rule.Chain{chain(2)}})
		before := len(g.notices())
		if before != 0 {
			t.Errorf("reported: %v", g.notices())
		}
		g.foreign(t, rule.IPv4, "-t", "mangle", "-F")
		g.noticed(t, before, rule.IPv4, rule.Mangle)
	})
}

// kube-proxy rewrites its own chains all the time. With nft that is none of our business.
func TestChangesInForeignChainsAreNotReportedWithNFT(t *testing.T) {
	if nettest.Need(t); testing.Short() {
		t.Skip("-short: it writes many foreign chains")
	}
	g := guard(t, string(iptables.NFT))
	var services strings.Builder
	services.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	for i := range 100 { // an ordinary user's socket takes no larger transaction
		a := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
		fmt.Fprintf(&services, ":KUBE-SVC-%d - [0:0]\n-A KUBE-SERVICES -d %s/32 -p tcp -j KUBE-SVC-%d\n-A KUBE-SVC-%d -j RETURN\n",
			i, a, i, i)
	}
	services.WriteString("COMMIT\n*filter\n:KUBE-FORWARD - [0:0]\n-A KUBE-FORWARD -j RETURN\nCOMMIT\n")
	sync := func() {
		g.ns.Run(t, "sh", "-c", "printf '"+services.String()+"' | iptables-nft-restore --noflush")
	}
	sync()
	g.foreign(t, rule.IPv4, "-t", "nat", "-A", "PREROUTING", "-j", "KUBE-SERVICES")
	g.noticed(t, 0, rule.IPv4, rule.NAT) // its hook stands where ours do
	// Notices come in order: with this one, all before it are there.
	g.foreign(t, rule.IPv6, "-t", "filter", "-F")
	g.noticed(t, 0, rule.IPv6, rule.Filter)
	before := len(g.notices())
	for range 3 {
		sync()
	}
	g.foreign(t, rule.IPv6, "-t", "mangle", "-F")
	g.noticed(t, before, rule.IPv6, rule.Mangle)
	for _, s := range g.notices()[before:] {
		if s.Family == rule.IPv4 {
			t.Errorf("reported: %s", s.What)
		}
	}
}
