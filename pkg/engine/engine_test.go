package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/object"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// objects is a source whose objects a test sets.
type objects struct {
	mu         sync.Mutex
	now, taken object.Cluster
	changes    chan struct{}
}

func (o *objects) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (o *objects) Changes() <-chan struct{}      { return o.changes }
func (o *objects) Synced() bool                  { return true }
func (o *objects) Problems() []string            { return nil }
func (o *objects) Reread(context.Context) error  { return nil }

func (o *objects) Snapshot() object.Cluster {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.now
}

func (o *objects) Take() object.Changes {
	o.mu.Lock()
	defer o.mu.Unlock()
	changes := object.Diff(o.taken, o.now)
	o.taken = o.now
	return changes
}

func (o *objects) set(c object.Cluster) {
	o.mu.Lock()
	o.now = c
	o.mu.Unlock()
	select {
	case o.changes <- struct{}{}:
	default:
	}
}

func podNumber(i int) *object.Pod {
	return &object.Pod{Namespace: "shop", Name: fmt.Sprint("p", i), UID: fmt.Sprint("uid", i), Node: "node",
		Labels: object.LabelsOf(map[string]string{"app": fmt.Sprint(i)})}
}

func recordOf(p *object.Pod, i int) *attachment.Attachment {
	return &attachment.Attachment{Version: 1, ContainerID: "c" + p.Name, IfName: "eth0", NetNS: "/proc/self/ns/net", Network: "pods",
		Pod: attachment.Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID}, Policy: attachment.PolicyEnforce,
		HostInterface: attachment.HostInterface(attachment.GuardedPrefix, p.UID, "eth0"),
		HostMAC:       "02:00:00:00:00:01", PodMAC: "02:00:00:00:00:02", MTU: 1500,
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, Created: time.Unix(1, 0)}
}

// admits is a policy for pod number i that admits one protocol, or nobody for "".
func admits(i int, protocol corev1.Protocol) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "np"},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint(i)}}}}
	if protocol != "" {
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Protocol: &protocol}}}}
	}
	return np
}

// scene is an engine in a namespace of its own, with two attached pods and a policy for the first.
type scene struct {
	*Engine
	source *objects
	ns     *nettest.NS
	fail   func(step string) error
}

func newScene(t *testing.T, backend string, test func(t *testing.T, s *scene)) {
	s := &scene{source: &objects{changes: make(chan struct{}, 1)}, ns: nettest.NewNS(t, "node")}
	s.ns.Do(t, func() {
		var err error
		s.Engine, err = New(Config{Source: s.source, StateDir: t.TempDir(), Node: "node", Backend: iptables.Backend(backend),
			RepairInterval: time.Hour, Metrics: metrics.New("test"), Log: slog.New(slog.DiscardHandler), Version: "test",
			Fail: func(step string) error {
				if s.fail == nil {
					return nil
				}
				return s.fail(step)
			}})
		if err != nil {
			t.Fatal(err)
		}
		defer s.plane.Close()
		var pods []*object.Pod
		for i := 1; i <= 2; i++ {
			pods = append(pods, podNumber(i))
			if err := s.store.Put(recordOf(pods[i-1], i)); err != nil {
				t.Fatal(err)
			}
		}
		s.source.set(object.Cluster{Pods: pods, Policies: []*networkingv1.NetworkPolicy{admits(1, corev1.ProtocolTCP)}})
		test(t, s)
	})
}

func eachScene(t *testing.T, test func(t *testing.T, s *scene)) {
	nettest.Backends(t, func(t *testing.T, backend string) { newScene(t, backend, test) })
}

func (s *scene) mustPass(t *testing.T) {
	t.Helper()
	if err := s.pass(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// owed are those who are still to be judged, once or twice.
func (s *scene) owed() suspects {
	owed := newSuspects()
	owed.add(s.unjudged)
	owed.add(s.judged)
	return owed
}

func (s *scene) replace(np *networkingv1.NetworkPolicy) {
	c := s.source.Snapshot()
	c.Policies = []*networkingv1.NetworkPolicy{np}
	s.source.set(c)
}

// instead puts a script in the place of one of iptables' programs, for as long as the test runs.
func instead(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestRecordsThatCannotBeReadLeaveWhoIsGuardedGuarded(t *testing.T) {
	newScene(t, "nft", func(t *testing.T, s *scene) {
		s.mustPass(t)
		if len(s.guarded) != 2 {
			t.Fatalf("%d guarded", len(s.guarded))
		}
		away := s.store.Dir() + ".away"
		if err := errors.Join(os.Rename(s.store.Dir(), away), os.WriteFile(s.store.Dir(), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		s.relist = true
		_ = s.pass(context.Background())
		if len(s.guarded) != 2 || !s.relist || len(s.Status().Problems) == 0 {
			t.Errorf("without the folder: %d guarded, read again %v, problems %v", len(s.guarded), s.relist, s.Status().Problems)
		}
		if err := errors.Join(os.Remove(s.store.Dir()), os.Rename(away, s.store.Dir())); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(s.store.Dir(), recordOf(podNumber(2), 2).Key().String()+"*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("files of the record: %v, %v", files, err)
		}
		if err := os.WriteFile(files[0], []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.mustPass(t)
		if len(s.guarded) != 2 || s.relist {
			t.Errorf("with the folder and a broken record: %d guarded, read again %v", len(s.guarded), s.relist)
		}
	})
}

func TestAFamilyThatFailsHoldsNobodyOfTheOtherUp(t *testing.T) {
	eachScene(t, func(t *testing.T, s *scene) {
		s.fail = func(step string) error { return nil }
		w := &waiter{a: recordOf(podNumber(1), 1), done: make(chan struct{})}
		s.waiters = append(s.waiters, w)
		reads := 0
		s.fail = func(step string) error {
			if step == "read" {
				if reads++; reads > 3 { // IPv4 has three tables
					return errors.New("no IPv6 here")
				}
			}
			return nil
		}
		if err := s.pass(context.Background()); err == nil {
			t.Fatal("the failure is not told")
		}
		select {
		case <-w.done:
		default:
			t.Errorf("a pod with an IPv4 address alone waits for IPv6: %s", w.reason)
		}
		if !s.started() {
			t.Error("nothing is repaired as long as one family fails")
		}
		s.fail = nil
		s.mustPass(t)
	})
}

// A kernel without a match that one policy needs.
func TestAPolicyThatIptablesRefusesStopsNoOtherPod(t *testing.T) {
	for _, how := range []struct{ name, blame string }{
		{"the line is named", `n=$(echo "$in" | grep -n -m1 -- "-p sctp" | cut -d: -f1)`},
		{"the whole commit is refused", `n=$(echo "$in" | grep -n -m1 -- "-p sctp" >/dev/null && echo "$in" | grep -n COMMIT | tail -n 1 | cut -d: -f1)`},
	} {
		t.Run(how.name, func(t *testing.T) {
			instead(t, "iptables-nft-restore", "in=$(cat)\n"+how.blame+`
				if [ -n "$n" ]; then echo "iptables-restore: line $n failed" >&2; exit 1; fi
				PATH=${PATH#*:}; echo "$in" | exec iptables-nft-restore "$@"`)
			newScene(t, "nft", func(t *testing.T, s *scene) {
				s.replace(admits(1, corev1.ProtocolSCTP))
				w := &waiter{a: recordOf(podNumber(2), 2), done: make(chan struct{})}
				s.waiters = append(s.waiters, w)
				if err := s.pass(context.Background()); err == nil {
					t.Error("nothing is tried again")
				}
				select {
				case <-w.done:
				default:
					t.Errorf("the other pod waits: %s", w.reason)
				}
				if p := s.Status().Problems; len(p) != 1 || s.Status().Failing != "" {
					t.Errorf("problems %q, failing %q; want the one chain among the problems", p, s.Status().Failing)
				}
				s.replace(admits(1, corev1.ProtocolTCP))
				s.mustPass(t)
				if p := s.Status().Problems; len(p) > 0 {
					t.Errorf("mended, and problems %q", p)
				}
			})
		})
	}
}

func TestWhatIsPutRightAfterAFailureHasAllFlowsJudged(t *testing.T) {
	eachScene(t, func(t *testing.T, s *scene) {
		s.mustPass(t)
		s.judged = newSuspects()
		backend := string(s.Backend)
		s.ns.Run(t, "iptables-"+backend, "-t", "mangle", "-F") // and a pass comes before anybody looks, and fails
		s.fail = func(step string) error {
			if step == "restore" {
				return errors.New("broken on purpose")
			}
			return nil
		}
		s.replace(admits(1, corev1.ProtocolUDP))
		if err := s.pass(context.Background()); err == nil {
			t.Fatal("the pass has not failed")
		}
		s.fail = nil
		s.mustPass(t)
		if !s.judged.all {
			t.Errorf("judged were %+v alone", s.judged)
		}
	})
}

func TestARestoreThatWasDoneAndIsSaidToHaveFailedIsJudged(t *testing.T) {
	flag := filepath.Join(t.TempDir(), "fail")
	instead(t, "iptables-nft-restore", `PATH=${PATH#*:}; iptables-nft-restore "$@" || exit $?
		if rm `+flag+` 2>/dev/null; then exit 4; fi`)
	newScene(t, "nft", func(t *testing.T, s *scene) {
		s.mustPass(t)
		s.judged = newSuspects()
		s.replace(admits(1, ""))
		if err := os.WriteFile(flag, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.pass(context.Background()); err == nil {
			t.Fatal("the pass has not failed")
		}
		s.mustPass(t)
		if owed := s.owed(); !owed.all && !owed.addresses[recordOf(podNumber(1), 1).Addresses[0]] {
			t.Errorf("to be judged are %+v, not the pod that was closed", owed)
		}
	})
}

// readings has the readings of the conntrack table counted, and fail with an error while one is set.
func (s *scene) readings() (n *int, broken *error) {
	n, broken = new(int), new(error)
	s.fail = func(step string) error {
		if step != "flows" {
			return nil
		}
		*n++
		return *broken
	}
	return n, broken
}

func TestChangesAfterAnotherAreJudgedTogether(t *testing.T) {
	newScene(t, "nft", func(t *testing.T, s *scene) {
		n, _ := s.readings()
		read := func(want int, when string) {
			t.Helper()
			if *n != want {
				t.Fatalf("%s: the table was read %d times, want %d", when, *n, want)
			}
		}
		long := func() { s.judgedAt = time.Now().Add(-judgePauseMax) } // the pause is over
		s.mustPass(t)
		read(1, "the start")
		long()
		s.replace(admits(1, ""))
		s.mustPass(t)
		read(2, "a change after a quiet time")
		for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
			s.replace(admits(1, protocol))
			s.mustPass(t)
		}
		if err := s.judge(false); err != nil || !s.unjudged.some() || !s.judged.some() {
			t.Errorf("within the pause: %v, %+v", err, s.owed())
		}
		read(2, "changes soon after")
		long()
		if err := s.judge(false); err != nil || s.unjudged.some() || !s.judged.some() {
			t.Errorf("after the pause: %v, never judged %+v, once %+v", err, s.unjudged, s.judged)
		}
		read(3, "after the pause")
		s.mustPass(t)
		read(3, "a pass without a change")
		long()
		if err := s.judge(false); err != nil || s.owed().some() {
			t.Errorf("after two readings: %v, %+v", err, s.owed())
		}
		read(4, "after another pause")
		if err := s.judge(true); err != nil {
			t.Error(err)
		}
		read(4, "with nobody to judge")
	})
}

func TestFlowsAreReadLessOftenWhereChangesComeAllTheTime(t *testing.T) {
	newScene(t, "nft", func(t *testing.T, s *scene) {
		change := func(number int, after time.Duration) {
			t.Helper()
			s.judgedAt = time.Now().Add(-after)
			s.replace(admits(1, []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP}[number%2]))
			s.fail = func(step string) error { // a large table
				if step == "flows" {
					time.Sleep(judgePauseBusy / judgeRest)
				}
				return nil
			}
			s.mustPass(t)
		}
		s.mustPass(t)
		for i := range judgeOften {
			if change(i, 2*s.judgeIn+time.Second); s.judgeIn != judgePauseMax {
				t.Fatalf("the pause after change %d, which came after a quiet time, is %s", i, s.judgeIn)
			}
		}
		for i := range judgeOften {
			want := judgePauseMax
			if i == judgeOften-1 {
				want = judgePauseBusy
			}
			if change(i, s.judgeIn); s.judgeIn != want {
				t.Errorf("the pause after change %d right after the pause before is %s, want %s", i, s.judgeIn, want)
			}
		}
		if change(0, 2*s.judgeIn+time.Second); s.judgeIn != judgePauseMax {
			t.Errorf("the pause after a quiet time is %s again", s.judgeIn)
		}
	})
}

func TestWhoWaitsForWhatIsInForceWaitsForFlowsToBeJudged(t *testing.T) {
	newScene(t, "nft", func(t *testing.T, s *scene) {
		n, broken := s.readings()
		s.mustPass(t)
		s.replace(admits(1, ""))
		s.mustPass(t)
		if *n != 1 || !s.unjudged.some() {
			t.Fatalf("soon after the start the table was read %d times, and to be judged are %+v", *n, s.unjudged)
		}
		w := &waiter{done: make(chan struct{})}
		s.waiters = append(s.waiters, w)
		*broken = errors.New("broken on purpose")
		if err := s.pass(context.Background()); err == nil || w.reason == "" {
			t.Errorf("with flows that cannot be read: %v, who waits was told %q", err, w.reason)
		}
		*broken = nil
		s.mustPass(t) // at once: who failed does not pause
		select {
		case <-w.done:
		default:
			t.Errorf("still waits: %s", w.reason)
		}
		if *n != 3 || s.unjudged.some() || !s.judged.some() {
			t.Errorf("the table was read %d times, never judged are %+v, once %+v", *n, s.unjudged, s.judged)
		}
	})
}

// The plugin holds the lock of hostPorts for as long as its iptables takes.
func TestPoliciesAndRecordsDoNotWaitForHostPorts(t *testing.T) {
	newScene(t, "nft", func(t *testing.T, s *scene) {
		with := recordOf(podNumber(1), 1)
		with.PortMappings = []attachment.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
		if err := s.store.Put(with); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			var err error
			done <- errors.Join(nettest.Enter(s.ns, func() { err = s.Run(ctx) }), err)
		}()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		guarded := func(want int) {
			t.Helper()
			nettest.Eventually(t, 30*time.Second, fmt.Sprint(want, " guarded pods"), func() error {
				n := 0
				for _, p := range s.Status().Pods {
					if p.State == Guarded {
						n++
					}
				}
				if n != want {
					return fmt.Errorf("%d are", n)
				}
				return nil
			})
		}
		guarded(2)
		lock, err := s.store.Lock(context.Background(), attachment.HostPorts)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Release()
		s.ns.Run(t, "iptables-nft", "-t", "nat", "-A", "PREROUTING", "-j", "ACCEPT") // reason to look at hostPort's rules
		if err := s.store.Delete(recordOf(podNumber(2), 2).Key()); err != nil {
			t.Fatal(err)
		}
		guarded(1)
	})
}
