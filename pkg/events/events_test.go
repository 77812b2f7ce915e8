package events

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/postern-cni/postern/pkg/nodenet"
)

// server keeps events as an API server does, as far as the recorder asks.
type server struct {
	mu     sync.Mutex
	events map[string]*corev1.Event
	calls  []string
	broken bool
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, r.Method)
	const path = "/api/v1/namespaces/default/events"
	name := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, path), "/")
	var e corev1.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil || !strings.HasPrefix(r.URL.Path, path) {
		http.Error(w, fmt.Sprintf("%s: %v", r.URL.Path, err), http.StatusBadRequest)
		return
	}
	answer := func(code int, body any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(body)
	}
	switch {
	case s.broken:
		answer(http.StatusForbidden, metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonForbidden, Code: 403})
	case r.Method == http.MethodPost && s.events[e.Name] != nil:
		answer(http.StatusConflict, metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonAlreadyExists, Code: 409})
	case r.Method == http.MethodPost:
		s.events[e.Name] = &e
		answer(http.StatusCreated, e)
	case r.Method == http.MethodPatch && s.events[name] != nil:
		s.events[name].LastTimestamp = e.LastTimestamp
		answer(http.StatusOK, s.events[name])
	default:
		answer(http.StatusNotFound, metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: 404})
	}
}

// story is a recorder with a clock of its own.
type story struct {
	*Recorder
	*server
	url  string
	time time.Time
}

func newStory(t *testing.T) *story {
	t.Helper()
	s := &story{server: &server{events: map[string]*corev1.Event{}}, time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	h := httptest.NewServer(s.server)
	t.Cleanup(h.Close)
	s.url = h.URL
	s.restart(t)
	return s
}

func (s *story) restart(t *testing.T) {
	t.Helper()
	r, err := For(&rest.Config{Host: s.url}, "node-1", slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	r.now = func() time.Time { return s.time }
	s.Recorder = r
}

// says lets some time pass, reports findings, and checks which calls that made and how many events there are.
func (s *story) says(t *testing.T, when string, after time.Duration, calls string, events int, list ...nodenet.Finding) {
	t.Helper()
	s.time, s.calls = s.time.Add(after), nil
	s.write(context.Background(), list)
	if got := strings.Join(s.calls, " "); got != calls || len(s.events) != events {
		t.Errorf("%s: calls %q and %d events, want %q and %d", when, got, len(s.events), calls, events)
	}
}

var (
	ipvs = nodenet.Finding{Kind: nodenet.IPVS, What: "kube-proxy is in IPVS mode"}
	cidr = nodenet.Finding{Kind: nodenet.NoPodCIDR, What: "node node-1 has no podCIDR"}
)

func TestAFindingIsOneEventAlsoAcrossRestarts(t *testing.T) {
	s := newStory(t)
	s.says(t, "found", 0, "POST", 1, ipvs)
	s.says(t, "still so", 10*time.Second, "", 1, ipvs)
	s.says(t, "another beside it", 10*time.Second, "POST", 2, ipvs, cidr)
	s.restart(t)
	s.says(t, "after a restart", 10*time.Second, "POST PATCH POST PATCH", 2, ipvs, cidr)
	s.says(t, "before it would be forgotten", 30*time.Minute, "POST PATCH", 2, ipvs)
	s.says(t, "gone", time.Second, "", 2)
	s.says(t, "and back at once", time.Second, "", 2, ipvs)
	s.says(t, "and back", 2*time.Minute, "POST PATCH", 2, ipvs)
	for _, e := range s.events {
		if e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != "node-1" || e.InvolvedObject.UID != "node-1" ||
			e.Namespace != "default" || e.Type != "Warning" || e.Source.Component != "postern" {
			t.Errorf("the event is %+v", e)
		}
		if e.Reason == "Ipvs" && !e.LastTimestamp.Time.Equal(s.time) {
			t.Errorf("last seen %s, and it is %s", e.LastTimestamp, s.time)
		}
	}
}

func TestAnEventThatCannotBeWrittenIsTriedAgainLater(t *testing.T) {
	s := newStory(t)
	s.broken = true
	s.says(t, "refused", 0, "POST", 0, ipvs)
	s.says(t, "soon after", 10*time.Second, "", 0, ipvs)
	s.broken = false
	s.says(t, "later", time.Minute, "POST", 1, ipvs)
}

func TestTellingDoesNotWait(t *testing.T) {
	s := newStory(t)
	for range 100 { // nobody listens
		s.Tell([]nodenet.Finding{cidr})
	}
	s.Tell([]nodenet.Finding{ipvs})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for len(s.latest) > 0 {
		time.Sleep(time.Millisecond)
	}
	s.Tell(nil) // taken only when what came before is written
	for len(s.latest) > 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.events) != 1 {
		t.Errorf("%d events; want only what was told last", len(s.events))
	}
}

func TestReasonsAndMessagesAreWhatTheAPITakes(t *testing.T) {
	for _, k := range nodenet.Kinds {
		e := event("node-1", nodenet.Finding{Kind: k, What: strings.Repeat("ä", 600)}, time.Now())
		if len(e.Message) > 1024 || !strings.HasSuffix(e.Message, "ä…") || strings.ContainsAny(e.Reason, "- ") || len(e.Name) > 63 {
			t.Errorf("%s: reason %q, name %q, message of %d bytes", k, e.Reason, e.Name, len(e.Message))
		}
	}
}
