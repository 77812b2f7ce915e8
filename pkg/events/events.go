// Package events tells of findings about a node by Events of the API, where `kubectl describe node` shows them.
//
// An event's name is made of what it says, so that the same finding is one event however often policyd starts: who finds it there
// already only says that it was seen again. An API server forgets events after an hour (its --event-ttl), so what is still so is
// told again before that. Nothing waits for an event, and one that cannot be written is only logged.
package events

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/postern-cni/postern/pkg/nodenet"
)

// Times of an event.
const (
	againAfter = 20 * time.Minute // what is still so is told again
	retryAfter = time.Minute      // what could not be told, or comes back all the time, is not told sooner
	writeLimit = 10 * time.Second
)

const component = "postern"

// Recorder writes events about one node.
type Recorder struct {
	node   string
	client *rest.RESTClient
	log    *slog.Logger
	latest chan []nodenet.Finding // holds one value at most
	now    func() time.Time

	// Used by the goroutine of Run alone.
	tried, told map[nodenet.Finding]time.Time
}

// For returns a recorder for a node; it writes once it runs.
func For(config *rest.Config, node string, log *slog.Logger) (*Recorder, error) {
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON // few and small
	config.APIPath, config.GroupVersion = "/api", &corev1.SchemeGroupVersion
	scheme := runtime.NewScheme() // client-go's own has all of the API, which would be a third of policyd
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Event{})
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("client for %s: %w", config.Host, err)
	}
	return &Recorder{node: node, client: client, log: log, latest: make(chan []nodenet.Finding, 1),
		now: time.Now, tried: map[nodenet.Finding]time.Time{}, told: map[nodenet.Finding]time.Time{}}, nil
}

// Tell implements nodenet.Teller: the list is what is so now. One goroutine calls it.
func (r *Recorder) Tell(list []nodenet.Finding) {
	select {
	case <-r.latest: // nobody has taken it, and it is old
	default:
	}
	r.latest <- slices.Clone(list)
}

// Run writes what it is told until the context ends.
func (r *Recorder) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case list := <-r.latest:
			r.write(ctx, list)
		}
	}
}

// write writes the events that are due.
func (r *Recorder) write(ctx context.Context, list []nodenet.Finding) {
	now := r.now()
	for f := range r.told {
		if !slices.Contains(list, f) {
			delete(r.told, f) // if it comes back, that is news
		}
	}
	for f, at := range r.tried {
		if now.Sub(at) >= retryAfter {
			delete(r.tried, f)
		}
	}
	for _, f := range list {
		_, soon := r.tried[f]
		if at, told := r.told[f]; soon || told && now.Sub(at) < againAfter {
			continue
		}
		r.tried[f] = now
		if err := r.event(ctx, f, now); err != nil {
			if ctx.Err() == nil {
				r.log.Info("cannot write an event about the node; going on", "kind", f.Kind, "error", err)
			}
			continue
		}
		r.told[f] = now
	}
}

// event makes an event, or says of the one that is there that it was seen again.
func (r *Recorder) event(ctx context.Context, f nodenet.Finding, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	e := event(r.node, f, now)
	// Events about what has no namespace are in this one.
	err := r.client.Post().Namespace(metav1.NamespaceDefault).Resource("events").Body(e).Do(ctx).Error()
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	patch, err := json.Marshal(map[string]any{"lastTimestamp": e.LastTimestamp})
	if err != nil {
		return err
	}
	return r.client.Patch(types.MergePatchType).Namespace(metav1.NamespaceDefault).Resource("events").Name(e.Name).Body(patch).
		Do(ctx).Error()
}

// event is what a finding looks like as an Event.
func event(node string, f nodenet.Finding, now time.Time) *corev1.Event {
	sum := sha256.Sum256([]byte(node + "\n" + string(f.Kind) + "\n" + f.What))
	at := metav1.NewTime(now.Truncate(time.Second)) // the API's precision
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: component + "." + hex.EncodeToString(sum[:10]), Namespace: metav1.NamespaceDefault},
		// kubectl finds events about a node by its name in place of the UID, as kubelet writes it.
		InvolvedObject: corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: node, UID: types.UID(node)},
		Type:           corev1.EventTypeWarning, Reason: reason(f.Kind), Message: cut(f.What), Count: 1,
		FirstTimestamp: at, LastTimestamp: at,
		Source: corev1.EventSource{Component: component, Host: node}, ReportingController: component, ReportingInstance: node,
	}
}

// reason is the kind in the form of reasons: "no-pod-cidr" becomes "NoPodCidr".
func reason(k nodenet.Kind) string {
	var b strings.Builder
	for word := range strings.SplitSeq(string(k), "-") {
		b.WriteString(strings.ToUpper(word[:1]) + word[1:])
	}
	return b.String()
}

// cut shortens a message to what the API takes.
func cut(text string) string {
	const most = 1024
	if len(text) <= most {
		return text
	}
	end := most - len("…")
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}
