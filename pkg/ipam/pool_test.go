package ipam

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
)

// workerEnv makes the test binary a child that reserves and releases until it is killed: "STATEDIR NUMBER".
const workerEnv = "POSTERN_IPAM_TEST_WORKER"

func TestMain(m *testing.M) {
	if task := os.Getenv(workerEnv); task != "" {
		work(task)
	}
	os.Exit(m.Run())
}

func key(n int) attachment.Key {
	return attachment.Key{ContainerID: fmt.Sprintf("c%d", n), IfName: "eth0"}
}

func subnet(text string) Range { return Range{Subnet: netip.MustParsePrefix(text)} }

// clock is a settable time for a pool.
type clock struct{ t time.Duration }

func (c *clock) now() (time.Duration, error) { return c.t, nil }

func testPool(t testing.TB, dir string, reuse time.Duration, ranges ...Range) (*Pool, *clock) {
	t.Helper()
	for _, r := range ranges {
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
	}
	p, c := Open(dir, "net", ranges, reuse), &clock{t: time.Hour}
	p.now = c.now
	return p, c
}

func reserve(t testing.TB, p *Pool, n int) []netip.Addr {
	t.Helper()
	got, err := p.Reserve(key(n))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func release(t testing.TB, p *Pool, n int) {
	t.Helper()
	if err := p.Release(key(n)); err != nil {
		t.Fatal(err)
	}
}

func TestRangeGivesOutEveryAddressButTheReservedOnes(t *testing.T) {
	r := subnet("10.0.0.0/28")
	r.Exclude = []netip.Prefix{netip.MustParsePrefix("10.0.0.4/30"), netip.MustParsePrefix("10.0.0.9/32")}
	p, _ := testPool(t, t.TempDir(), time.Minute, r)
	var got []string
	for i := range 20 {
		a, err := p.Reserve(key(i))
		if err != nil {
			break
		}
		got = append(got, a[0].String())
	}
	want := "10.0.0.2 10.0.0.3 10.0.0.8 10.0.0.10 10.0.0.11 10.0.0.12 10.0.0.13 10.0.0.14"
	if strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// Another process must find the file again, or every ADD takes the range for a changed one and looks from its beginning.
func TestARangesFileHasTheSameNameInEveryProcess(t *testing.T) {
	s := newSpan(Range{Subnet: netip.MustParsePrefix("10.0.0.0/24"), Exclude: []netip.Prefix{netip.MustParsePrefix("10.0.0.8/30")}})
	if got, want := s.file(), "10.0.0.0-10.0.0.255-04468eec"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestPrefixesOfARange(t *testing.T) {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	for _, tt := range []struct {
		r    Range
		want string
	}{
		{subnet("10.0.0.0/24"), "[10.0.0.0/24]"},
		{subnet("fd00::/64"), "[fd00::/64]"},
		{Range{Subnet: p("10.0.0.0/24"), Start: a("10.0.0.8"), End: a("10.0.0.23")}, "[10.0.0.8/29 10.0.0.16/29]"},
		{Range{Subnet: p("10.0.0.0/28"), Exclude: []netip.Prefix{p("10.0.0.4/30")}}, "[10.0.0.2/31 10.0.0.8/30 10.0.0.12/31 10.0.0.14/32]"},
		{Range{Subnet: p("10.0.0.0/29"), Gateway: a("10.0.0.6")}, "[10.0.0.1/32 10.0.0.2/31 10.0.0.4/31]"},
		{Range{Subnet: p("255.255.255.0/24"), Start: a("255.255.255.254"), End: a("255.255.255.255"), Gateway: a("255.255.255.1")},
			"[255.255.255.254/32]"},
	} {
		if got := fmt.Sprint(tt.r.Prefixes()); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.r, got, tt.want)
		}
		s := newSpan(tt.r)
		for addr := s.from(s.first); addr.IsValid() && s.size() < 1000; addr = s.from(addr.Next()) {
			if !slices.ContainsFunc(tt.r.Prefixes(), func(p netip.Prefix) bool { return p.Contains(addr) }) {
				t.Errorf("%+v: %s is given out and in none of the prefixes", tt.r, addr)
			}
		}
	}
}

func TestRangeSizes(t *testing.T) {
	for _, tt := range []struct {
		r    Range
		size uint64
	}{
		{subnet("10.0.0.0/24"), 253},
		{subnet("10.0.0.0/31"), 2},
		{subnet("10.0.0.7/32"), 1},
		{subnet("fd00::/64"), 1<<64 - 1},
		{subnet("fd00::/120"), 254},
		{subnet("255.255.255.240/28"), 13},
		{subnet("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0/124"), 14},
		{Range{Subnet: netip.MustParsePrefix("10.0.0.0/8"), Start: netip.MustParseAddr("10.1.0.0"),
			End: netip.MustParseAddr("10.1.0.9")}, 10},
		{Range{Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.9")}, 253},
	} {
		s := newSpan(tt.r)
		if got := s.size(); got != tt.size {
			t.Errorf("%s: size %d, want %d", tt.r, got, tt.size)
		}
	}
	for _, bad := range []Range{
		{}, {Subnet: netip.MustParsePrefix("10.0.0.0/24"), Start: netip.MustParseAddr("10.0.0.9"),
			End: netip.MustParseAddr("10.0.0.8")},
		{Subnet: netip.MustParsePrefix("10.0.0.0/24"), Start: netip.MustParseAddr("10.0.1.9")},
		{Subnet: netip.MustParsePrefix("10.0.0.0/24"), Exclude: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}},
	} {
		if bad.Check() == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

func TestOwnerKeepsItsAddresses(t *testing.T) {
	p, _ := testPool(t, t.TempDir(), time.Minute, subnet("10.0.0.0/24"), subnet("fd00::/64"))
	first := reserve(t, p, 1)
	if len(first) != 2 || !first[0].Is4() || !first[1].Is6() {
		t.Fatalf("one address of each family is wanted: %v", first)
	}
	if again := reserve(t, p, 1); !slices.Equal(first, again) {
		t.Errorf("%v, then %v", first, again)
	}
	if held, err := p.Held(key(1)); err != nil || !slices.Equal(held, first) {
		t.Errorf("held %v (%v), want %v", held, err, first)
	}
	release(t, p, 1)
	release(t, p, 1)
	if owners, err := p.Owners(); err != nil || len(owners) != 0 {
		t.Errorf("owners %v (%v) after release", owners, err)
	}
}

func TestReleasedAddressRests(t *testing.T) {
	r := Range{Subnet: netip.MustParsePrefix("10.0.0.0/29"), Start: netip.MustParseAddr("10.0.0.2"),
		End: netip.MustParseAddr("10.0.0.3")}
	p, c := testPool(t, t.TempDir(), time.Minute, r)
	first := reserve(t, p, 1)
	release(t, p, 1)
	if next := reserve(t, p, 2); next[0] == first[0] {
		t.Fatalf("%s was given again at once", next[0])
	}
	_, err := p.Reserve(key(3))
	var full *FullError
	if !errors.As(err, &full) {
		t.Fatalf("got %v, want a FullError", err)
	}
	if u := full.Ranges[0]; u.Size != 2 || u.Used != 1 || u.Resting != 1 || !u.Full() {
		t.Errorf("figures of the error: %+v", u)
	}
	want := "10.0.0.0/29 (10.0.0.2 to 10.0.0.3): 2 addresses, 1 in use, 1 released less than 1m0s ago"
	if !strings.Contains(err.Error(), want) {
		t.Errorf("error %q does not say %q", err, want)
	}
	c.t += time.Minute
	if again := reserve(t, p, 3); again[0] != first[0] {
		t.Errorf("got %v after the rest, want %v", again, first)
	}
}

func TestFirstRangeWithRoomIsUsed(t *testing.T) {
	p, _ := testPool(t, t.TempDir(), time.Minute, subnet("10.0.0.0/30"), subnet("10.0.1.0/30"))
	if a, b := reserve(t, p, 1)[0], reserve(t, p, 2)[0]; a.String() != "10.0.0.2" || b.String() != "10.0.1.2" {
		t.Errorf("got %s and %s", a, b)
	}
}

func TestAChangedRangeHonoursWhatIsUsedAndWhatRests(t *testing.T) {
	dir := t.TempDir()
	old, _ := testPool(t, dir, time.Minute, subnet("10.0.0.0/24"))
	used := reserve(t, old, 1)[0]
	resting := reserve(t, old, 2)[0]
	release(t, old, 2)
	p, c := testPool(t, dir, time.Minute, subnet("10.0.0.0/28"))
	for i := range 11 {
		if a := reserve(t, p, 10+i)[0]; a == used || a == resting {
			t.Fatalf("%s was given again", a)
		}
	}
	c.t += time.Minute
	if a := reserve(t, p, 30)[0]; a != resting {
		t.Errorf("got %s, want %s, which has rested", a, resting)
	}
	release(t, p, 1)
}

func TestReleaseWorksWithoutRanges(t *testing.T) {
	dir := t.TempDir()
	p, c := testPool(t, dir, time.Minute, subnet("10.0.0.0/30"))
	a := reserve(t, p, 1)
	bare, _ := testPool(t, dir, time.Minute)
	release(t, bare, 1)
	c.t += time.Minute
	if b := reserve(t, p, 2); b[0] != a[0] {
		t.Errorf("got %v, want %v", b, a)
	}
}

func TestADeletedRangeFileLosesNoAddress(t *testing.T) {
	p, c := testPool(t, t.TempDir(), time.Minute, subnet("10.0.0.0/30"))
	a := reserve(t, p, 1)
	release(t, p, 1)
	s := newSpan(subnet("10.0.0.0/30"))
	if err := os.Remove(p.disk.path(rangesDir, s.file())); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Reserve(key(2)); err == nil {
		t.Error("a resting address was given out")
	}
	c.t += time.Minute
	if b := reserve(t, p, 2); b[0] != a[0] {
		t.Errorf("got %v, want %v", b, a)
	}
}

func TestATornQueueLineIsCutOff(t *testing.T) {
	dir := t.TempDir()
	p, _ := testPool(t, dir, 0, subnet("10.0.0.0/29"))
	reserve(t, p, 1)
	release(t, p, 1)
	s := newSpan(subnet("10.0.0.0/29"))
	f, err := os.OpenFile(p.disk.path(rangesDir, s.file()), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("10.0.0.3 12")
	f.Close()
	for i := range 5 {
		reserve(t, p, 2+i)
	}
	for i := range 5 {
		release(t, p, 2+i)
		reserve(t, p, 2+i)
	}
}

func TestTheQueueFileStaysSmall(t *testing.T) {
	p, _ := testPool(t, t.TempDir(), 0, subnet("10.0.0.0/30"))
	for i := range 6000 {
		reserve(t, p, i)
		release(t, p, i)
	}
	s := newSpan(subnet("10.0.0.0/30"))
	info, err := os.Stat(p.disk.path(rangesDir, s.file()))
	if err != nil || info.Size() > 2*compactAt {
		t.Errorf("size %v (%v), want at most %d", info.Size(), err, 2*compactAt)
	}
}

// crash is what the hook panics with in place of a SIGKILL.
type crash struct{}

// dieAt runs do with a pool that ends before its step number n; it reports whether it came that far.
func dieAt(p *Pool, n int, do func()) (died bool) {
	p.disk.before = func() {
		if n == 0 {
			panic(crash{})
		}
		n--
	}
	defer func() {
		p.disk.before = nil
		if r := recover(); r != nil {
			if _, ok := r.(crash); !ok {
				panic(r)
			}
			died = true
		}
	}()
	do()
	return false
}

// model is what the pool must agree with: who holds what, and when an address was let go. An operation that died may have
// happened or not; the owner is then settled by a DEL, as a runtime does.
type model struct {
	held     map[attachment.Key][]netip.Addr
	released map[netip.Addr]time.Duration
}

func TestAgreesWithAModelWhereverItIsKilled(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runModel(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func runModel(t *testing.T, rnd *rand.Rand) {
	const owners, rest = 7, 10 * time.Second
	dir := t.TempDir()
	shapes := [][]Range{
		{subnet("10.0.0.0/29"), subnet("fd00::/125")},
		{subnet("10.0.0.0/30"), subnet("10.0.0.8/30"), subnet("fd00::/64")},
	}
	ranges := shapes[0]
	m := model{map[attachment.Key][]netip.Addr{}, map[netip.Addr]time.Duration{}}
	now := time.Hour
	for range 250 {
		if rnd.IntN(40) == 0 {
			ranges = shapes[rnd.IntN(2)]
		}
		now += time.Duration(rnd.IntN(4)) * time.Second
		p, c := testPool(t, dir, rest, ranges...)
		c.t = now
		k := key(rnd.IntN(owners))
		steps := 1 << 30
		if rnd.IntN(3) == 0 {
			steps = rnd.IntN(25)
		}
		if rnd.IntN(2) == 0 {
			m.reserve(t, p, k, steps, now, rest)
		} else {
			m.release(t, p, k, steps, now)
		}
	}
	p, _ := testPool(t, dir, rest, ranges...)
	for i := range owners {
		release(t, p, i)
	}
	p, c := testPool(t, dir, rest, ranges...)
	c.t = now + time.Hour
	mustGiveOutAll(t, p)
}

func (m model) reserve(t *testing.T, p *Pool, k attachment.Key, steps int, now, rest time.Duration) {
	var got []netip.Addr
	var err error
	if dieAt(p, steps, func() { got, err = p.Reserve(k) }) {
		m.release(t, p, k, 1<<30, now)
		return
	}
	var full *FullError
	if err != nil && !errors.As(err, &full) {
		t.Fatal(err)
	}
	for _, a := range got {
		if slices.Contains(m.held[k], a) {
			continue
		}
		for other, held := range m.held {
			if slices.Contains(held, a) {
				t.Fatalf("%s given to %s while %s holds it", a, k, other)
			}
		}
		if when, ok := m.released[a]; ok && now-when < rest {
			t.Fatalf("%s given again after %s", a, now-when)
		}
		m.held[k] = append(m.held[k], a)
	}
}

func (m model) release(t *testing.T, p *Pool, k attachment.Key, steps int, now time.Duration) {
	held, err := p.Held(k)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range m.held[k] {
		if !slices.Contains(held, a) {
			t.Fatalf("%s lost %s: it holds %v", k, a, held)
		}
	}
	if dieAt(p, steps, func() { err = p.Release(k) }) {
		err = p.Release(k)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range held {
		m.released[a] = now
	}
	delete(m.held, k)
	if held, err := p.Held(k); err != nil || len(held) > 0 {
		t.Fatalf("%s holds %v (%v) after release", k, held, err)
	}
}

// mustGiveOutAll checks that nothing was lost: every address of the smallest family can be had, and nothing is left over.
func mustGiveOutAll(t *testing.T, p *Pool) {
	t.Helper()
	usage, err := p.Usage()
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[bool]uint64{}
	for _, u := range usage {
		if u.Used != 0 {
			t.Errorf("in use after every release: %s", u)
		}
		sizes[u.Range.Subnet.Addr().Is4()] += u.Size
	}
	want := sizes[true]
	if six, ok := sizes[false]; ok {
		want = min(want, six)
	}
	for i := range want {
		if _, err := p.Reserve(key(int(1000 + i))); err != nil {
			t.Fatalf("address %d of %d: %v", i+1, want, err)
		}
	}
	if names, _ := p.disk.names(p.disk.path(releasingDir)); len(names) > 0 {
		t.Errorf("left in releasing/: %v", names)
	}
}

func TestAReserveKilledBetweenAnyTwoStepsLeavesNothing(t *testing.T) {
	for n := 0; ; n++ {
		dir := t.TempDir()
		p, c := testPool(t, dir, time.Second, subnet("10.0.0.0/30"), subnet("fd00::/126"))
		died := dieAt(p, n, func() { reserve(t, p, 1) })
		release(t, p, 1)
		c.t += time.Minute
		reserve(t, p, 2)
		if !died {
			t.Logf("%d steps", n)
			if n < 10 {
				t.Errorf("only %d steps were tried", n)
			}
			return
		}
	}
}

func TestAReleaseKilledBetweenAnyTwoStepsIsFinished(t *testing.T) {
	for n := 0; ; n++ {
		p, c := testPool(t, t.TempDir(), time.Second, subnet("10.0.0.0/30"), subnet("fd00::/126"))
		reserve(t, p, 1)
		died := dieAt(p, n, func() { release(t, p, 1) })
		release(t, p, 1)
		c.t += time.Minute
		reserve(t, p, 2)
		if !died {
			if n < 6 {
				t.Errorf("only %d steps were tried", n)
			}
			return
		}
	}
}

const workerOwners = 4

func workerPool(dir string) *Pool {
	return Open(dir, "net", []Range{subnet("10.0.0.0/25"), subnet("fd00::/64")}, time.Millisecond)
}

// work is the child: it reserves and releases for its own owners for ever.
func work(task string) {
	dir, number, _ := strings.Cut(task, " ")
	p := workerPool(dir)
	for i := 0; ; i++ {
		k := attachment.Key{ContainerID: fmt.Sprintf("w%s-%d", number, i%workerOwners), IfName: "eth0"}
		if _, err := p.Reserve(k); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		if i%3 != 0 {
			if err := p.Release(k); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(2)
			}
		}
	}
}

func TestProcessesKilledAtAnyInstantLoseNothing(t *testing.T) {
	dir := t.TempDir()
	const children, rounds = 4, 25
	rnd := rand.New(rand.NewPCG(7, 7))
	for range rounds {
		var started []*exec.Cmd
		for n := range children {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", workerEnv, dir, n))
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			started = append(started, cmd)
		}
		// The kill is to come at an arbitrary instant of their work, so this is a random time and waits for nothing.
		time.Sleep(time.Duration(10+rnd.IntN(40)) * time.Millisecond)
		for _, cmd := range started {
			cmd.Process.Kill()
			if cmd.Wait(); cmd.ProcessState.Exited() {
				t.Fatalf("a worker ended by itself: %s", cmd.ProcessState)
			}
		}
		mustBeConsistent(t, workerPool(dir))
	}
	p := workerPool(dir)
	owners, err := p.Owners()
	if err != nil || len(owners) == 0 {
		t.Fatalf("owners %v (%v): the workers did nothing", owners, err)
	}
	for _, k := range owners {
		if err := p.Release(k); err != nil {
			t.Fatal(err)
		}
	}
	p.now = func() (time.Duration, error) {
		now, err := sinceBoot()
		return now + time.Minute, err
	}
	mustGiveOutAll(t, p)
}

// mustBeConsistent checks that every address in use is held by exactly the owner it names.
func mustBeConsistent(t *testing.T, p *Pool) {
	t.Helper()
	owners, err := p.Owners()
	if err != nil {
		t.Fatal(err)
	}
	holder := map[string]attachment.Key{}
	for _, k := range owners {
		held, err := p.Held(k)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range held {
			if other, twice := holder[a.String()]; twice {
				t.Fatalf("%s is held by %s and %s", a, other, k)
			}
			holder[a.String()] = k
		}
	}
	names, err := p.disk.names(p.disk.path(usedDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, ok := holder[name]; !ok {
			t.Errorf("%s is in use by nobody", name)
		}
	}
}

func TestTwentyCallersAtOnceGetDifferentAddresses(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	seen := map[netip.Addr]int{}
	var wg sync.WaitGroup
	for caller := range 20 {
		wg.Go(func() {
			p := Open(dir, "net", []Range{subnet("10.0.0.0/23"), subnet("fd00::/64")}, time.Minute)
			for i := range 10 {
				got, err := p.Reserve(key(caller*10 + i))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, a := range got {
					seen[a]++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for a, n := range seen {
		if n > 1 {
			t.Errorf("%s was given %d times", a, n)
		}
	}
	if len(seen) != 400 {
		t.Errorf("%d addresses given, want 400", len(seen))
	}
}

// BenchmarkReserve shows that a reservation costs the same whatever the number of pods: it prints what number 1,000 and
// number 10,000 cost as multiples of number 10, by the medians.
func BenchmarkReserve(b *testing.B) {
	levels := []int{10, 1000, 10000}
	var pools []*Pool
	for _, level := range levels {
		dir, err := os.MkdirTemp("/dev/shm", "postern-ipam") // a tmpfs, as in production
		if err != nil {
			b.Skipf("no tmpfs: %v", err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		p := Open(dir, "net", []Range{subnet("10.0.0.0/8"), subnet("fd00::/64")}, time.Minute)
		for n := 1; n < level; n++ {
			reserve(b, p, n)
		}
		pools = append(pools, p)
	}
	times := make([][]time.Duration, len(levels))
	for b.Loop() {
		for i, p := range pools {
			start := time.Now()
			reserve(b, p, levels[i])
			times[i] = append(times[i], time.Since(start))
			release(b, p, levels[i])
		}
	}
	var median []float64
	for _, all := range times {
		slices.Sort(all)
		median = append(median, float64(all[len(all)/2]))
	}
	b.ReportMetric(median[0]/1000, "us/reserve#10")
	b.ReportMetric(median[1]/median[0], "ratio#1000:#10")
	b.ReportMetric(median[2]/median[0], "ratio#10000:#10")
}
