package gate_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/gate"
)

// limit is for what must happen; a machine under load takes long.
const limit = 60 * time.Second

// handler is a policyd made of two functions.
type handler struct {
	guard func(ctx context.Context, a *attachment.Attachment) error
	ask   func(ctx context.Context, question string, body json.RawMessage) (any, error)
}

func (h handler) Guard(ctx context.Context, a *attachment.Attachment) error { return h.guard(ctx, a) }

func (h handler) Ask(ctx context.Context, question string, body json.RawMessage) (any, error) {
	return h.ask(ctx, question, body)
}

// serve listens in a folder until the test ends, or until the returned function is called.
func serve(t *testing.T, dir string, h gate.Handler) (stop func()) {
	t.Helper()
	l, err := gate.Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- gate.Serve(ctx, l, h) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(limit):
			t.Error("Serve has not ended with its context")
		}
	}
	t.Cleanup(stop)
	return stop
}

func dial(t *testing.T, dir string) *gate.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c, err := gate.Dial(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func sample() *attachment.Attachment {
	return &attachment.Attachment{
		Version: 1, ContainerID: "c-1", IfName: "eth0", NetNS: "/run/netns/a", Network: "pods",
		Pod: attachment.Pod{Namespace: "shop", Name: "web", UID: "u-1"}, Policy: attachment.PolicyEnforce,
		HostInterface: "pst0123456789ab", MTU: 1500, Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Addresses:    []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		PortMappings: []attachment.PortMapping{{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"}},
	}
}

func TestGuardHandsTheAttachmentOverAndWaitsForTheAnswer(t *testing.T) {
	dir := t.TempDir()
	got, answer := make(chan *attachment.Attachment, 1), make(chan error)
	serve(t, dir, handler{guard: func(_ context.Context, a *attachment.Attachment) error {
		got <- a
		return <-answer
	}})
	client, result := dial(t, dir), make(chan error, 1)
	go func() { result <- client.Guard(within(t), sample()) }()
	if a := <-got; !reflect.DeepEqual(a, sample()) {
		t.Errorf("policyd got %+v\nof %+v", a, sample())
	}
	select {
	case err := <-result:
		t.Errorf("answered before policyd has: %v", err)
	default:
	}
	answer <- nil
	if err := <-result; err != nil {
		t.Errorf("guarded, and yet: %v", err)
	}
}

func TestARefusalComesWithItsReason(t *testing.T) {
	for _, tt := range []struct {
		name    string
		err     error
		refusal bool
	}{
		{"refusal", &gate.Refusal{Reason: "no pod of that name"}, true},
		{"wrapped refusal", fmt.Errorf("guard: %w", &gate.Refusal{Reason: "no pod of that name"}), true},
		{"another error", errors.New("no pod of that name"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			serve(t, dir, handler{guard: func(context.Context, *attachment.Attachment) error { return tt.err }})
			err := dial(t, dir).Guard(within(t), sample())
			var refusal *gate.Refusal
			if errors.As(err, &refusal) != tt.refusal {
				t.Errorf("%v: is a refusal: %v", err, !tt.refusal)
			}
			if err == nil || !strings.Contains(err.Error(), "no pod of that name") {
				t.Errorf("%v: lacks the reason", err)
			}
		})
	}
}

func TestAskCarriesQuestionAndAnswer(t *testing.T) {
	type body struct{ Words []string }
	dir := t.TempDir()
	serve(t, dir, handler{ask: func(_ context.Context, question string, raw json.RawMessage) (any, error) {
		var b body
		if err := json.Unmarshal(raw, &b); err != nil {
			return nil, err
		}
		if question != "echo" {
			return nil, fmt.Errorf("question %q is not known", question)
		}
		return body{append(b.Words, "back")}, nil
	}})
	var reply body
	if err := dial(t, dir).Ask(within(t), "echo", body{[]string{"a\nb", "ü"}}, &reply); err != nil {
		t.Fatal(err)
	}
	if want := (body{[]string{"a\nb", "ü", "back"}}); !reflect.DeepEqual(reply, want) {
		t.Errorf("got %q, want %q", reply, want)
	}
	if err := dial(t, dir).Ask(within(t), "other", body{}, &reply); err == nil || !strings.Contains(err.Error(), `"other" is not known`) {
		t.Errorf("a question that is not known: %v", err)
	}
	if err := dial(t, dir).Ask(within(t), "echo", func() {}, &reply); err == nil {
		t.Error("a body that is no JSON is sent")
	}
}

func TestAnAnswerThatIsNoJSONIsAnError(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, handler{ask: func(context.Context, string, json.RawMessage) (any, error) { return func() {}, nil }})
	if err := dial(t, dir).Ask(within(t), "x", nil, nil); err == nil || !strings.Contains(err.Error(), "json") {
		t.Errorf("got %v", err)
	}
}

func TestAClientThatGoesAwayEndsItsRequest(t *testing.T) {
	dir := t.TempDir()
	begun, ended := make(chan struct{}), make(chan error, 1)
	serve(t, dir, handler{guard: func(ctx context.Context, _ *attachment.Attachment) error {
		close(begun)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}})
	client := dial(t, dir)
	result := make(chan error, 1)
	go func() { result <- client.Guard(within(t), sample()) }()
	<-begun
	client.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the request's context ended with %v", err)
		}
	case <-time.After(limit):
		t.Fatal("the request goes on without its client")
	}
	if err := <-result; err == nil {
		t.Error("guarded by a connection that was closed")
	}
}

func TestTheClientsDeadlineIsInTheRequestsContext(t *testing.T) {
	dir := t.TempDir()
	got := make(chan time.Time, 1)
	serve(t, dir, handler{guard: func(ctx context.Context, _ *attachment.Attachment) error {
		deadline, ok := ctx.Deadline()
		if !ok {
			return errors.New("no deadline")
		}
		got <- deadline
		return nil
	}})
	want := time.Now().Add(limit)
	ctx, cancel := context.WithDeadline(context.Background(), want)
	defer cancel()
	if err := dial(t, dir).Guard(ctx, sample()); err != nil {
		t.Fatal(err)
	}
	if deadline := <-got; !deadline.Equal(want) {
		t.Errorf("policyd sees %v, the plugin has %v", deadline, want)
	}
	if err := dial(t, dir).Guard(context.Background(), sample()); err == nil || err.Error() != "no deadline" {
		t.Errorf("without a deadline: %v", err)
	}
}

func TestAnAnswerThatDoesNotComeInTimeIsAnError(t *testing.T) {
	dir := t.TempDir()
	release := make(chan struct{})
	serve(t, dir, handler{guard: func(context.Context, *attachment.Attachment) error {
		<-release
		return nil
	}})
	defer close(release)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := dial(t, dir).Guard(ctx, sample()); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "in time") {
		t.Errorf("got %v", err)
	}
}

func TestTheEndOfPolicydEndsTheRequestsUnderWay(t *testing.T) {
	dir := t.TempDir()
	begun := make(chan struct{})
	stop := serve(t, dir, handler{guard: func(ctx context.Context, _ *attachment.Attachment) error {
		close(begun)
		<-ctx.Done()
		return &gate.Refusal{Reason: "policyd ends"}
	}})
	client, result := dial(t, dir), make(chan error, 1)
	idle := dial(t, dir) // has asked nothing yet, and holds nobody up
	go func() { result <- client.Guard(within(t), sample()) }()
	<-begun
	stop()
	var refusal *gate.Refusal
	if err := <-result; !errors.As(err, &refusal) || refusal.Reason != "policyd ends" {
		t.Errorf("got %v", err)
	}
	if err := idle.Guard(within(t), sample()); err == nil {
		t.Error("guarded by a policyd that has ended")
	}
}

func TestTheSocketIsRootsAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	before := unix.Umask(0o022)
	unix.Umask(before)
	serve(t, dir, handler{})
	for path, want := range map[string]os.FileMode{gate.Socket(dir): os.ModeSocket | 0o600, dir: os.ModeDir | 0o700} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
		}
	}
	after := unix.Umask(before)
	if after != before {
		t.Errorf("the umask was %o and is %o", before, after)
	}
}

func TestAStaleSocketIsReplaced(t *testing.T) {
	dir := t.TempDir()
	for _, leave := range []func(path string) error{
		func(path string) error { // as a killed policyd leaves it
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		},
		func(path string) error { return os.WriteFile(path, []byte("x"), 0o644) },
		func(path string) error { return os.WriteFile(path+".new", []byte("x"), 0o644) },
		func(path string) error { return os.Symlink("/nowhere", path) },
	} {
		if err := os.RemoveAll(gate.Socket(dir)); err != nil {
			t.Fatal(err)
		}
		if err := leave(gate.Socket(dir)); err != nil {
			t.Fatal(err)
		}
		stop := serve(t, dir, handler{guard: func(context.Context, *attachment.Attachment) error { return nil }})
		if err := dial(t, dir).Guard(within(t), sample()); err != nil {
			t.Error(err)
		}
		stop()
	}
}

// During an update the new policyd listens while the old one ends, which must not take the new one's socket away.
func TestASuccessorsSocketSurvivesItsPredecessor(t *testing.T) {
	dir := t.TempDir()
	name := func(name string) handler {
		return handler{ask: func(context.Context, string, json.RawMessage) (any, error) { return name, nil }}
	}
	stop := serve(t, dir, name("old"))
	serve(t, dir, name("new"))
	stop()
	var reply string
	if err := dial(t, dir).Ask(within(t), "name", nil, &reply); err != nil || reply != "new" {
		t.Errorf("answered by %q, %v", reply, err)
	}
}

// lateContext has a deadline that passes before the context says so, as where its timer comes late.
type lateContext struct {
	context.Context
	deadline time.Time
}

func (c lateContext) Deadline() (time.Time, bool) { return c.deadline, true }

func TestADeadlineThatPassesInATryIsTheEnd(t *testing.T) {
	ctx := lateContext{context.Background(), time.Now().Add(100 * time.Millisecond)}
	if _, err := gate.Dial(ctx, t.TempDir()); !errors.Is(err, gate.ErrAway) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestDialWaitsUntilTheContextEnds(t *testing.T) {
	dir := t.TempDir()
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := gate.Dial(ctx, dir); !errors.Is(err, gate.ErrAway) || !strings.Contains(err.Error(), gate.Socket(dir)) {
		t.Errorf("nobody listens: %v", err)
	}
	if waited := time.Since(begin); waited < 100*time.Millisecond {
		t.Errorf("gave up after %v", waited)
	}
	if _, err := gate.DialOnce(context.Background(), dir); !errors.Is(err, gate.ErrAway) {
		t.Errorf("DialOnce: %v", err)
	}
}

func TestDialFindsAPolicydThatComesMeanwhile(t *testing.T) {
	dir := t.TempDir()
	type dialed struct {
		client *gate.Client
		err    error
	}
	result := make(chan dialed, 1)
	ctx := within(t)
	go func() {
		c, err := gate.Dial(ctx, dir)
		result <- dialed{c, err}
	}()
	serve(t, dir, handler{guard: func(context.Context, *attachment.Attachment) error { return nil }})
	d := <-result
	if d.err != nil {
		t.Fatal(d.err)
	}
	defer d.client.Close()
	if err := d.client.Guard(ctx, sample()); err != nil {
		t.Error(err)
	}
}

// What comes from another version, or from nobody of ours, is answered or left, and disturbs nobody else.
func TestForeignWordsDisturbNobody(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, handler{guard: func(context.Context, *attachment.Attachment) error { return nil }})
	for _, words := range []string{"", "x", "{}\n", `{"guard":3}` + "\n", `{"guard":`, "\x00\xff", `{"deadline":"soon"}` + "\n"} {
		conn, err := net.Dial("unix", gate.Socket(dir))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(words)); err != nil {
			t.Fatal(err)
		}
		if words == "{}\n" {
			var reply struct {
				OK    bool
				Error string
			}
			if err := json.NewDecoder(conn).Decode(&reply); err != nil || reply.OK || !strings.Contains(reply.Error, "versions") {
				t.Errorf("a request of neither kind: %+v, %v", reply, err)
			}
		}
		conn.Close()
	}
	if err := dial(t, dir).Guard(within(t), sample()); err != nil {
		t.Error(err)
	}
}

func TestManyAtOnceAreServed(t *testing.T) {
	dir := t.TempDir()
	const callers = 50
	together := make(chan struct{})
	in := make(chan struct{}, callers)
	serve(t, dir, handler{guard: func(_ context.Context, a *attachment.Attachment) error {
		in <- struct{}{}
		<-together
		if a.ContainerID == "c-7" {
			return &gate.Refusal{Reason: "not seven"}
		}
		return nil
	}})
	results := make(chan error, callers)
	for i := range callers {
		client := dial(t, dir)
		go func() {
			a := sample()
			a.ContainerID = fmt.Sprintf("c-%d", i)
			err := client.Guard(within(t), a)
			if (err != nil) == (i == 7) {
				err = nil
			} else if err == nil {
				err = fmt.Errorf("caller %d was not refused", i)
			}
			results <- err
		}()
	}
	for range callers {
		<-in // all are inside at the same time
	}
	close(together)
	for range callers {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}
