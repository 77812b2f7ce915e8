package cluster_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// fakeAPI is an API server as far as a client can tell who lists and watches: one growing version, a history that may be
// forgotten, watches that may be cut or held up.
type fakeAPI struct {
	*httptest.Server
	mediaType string
	watchList bool // it knows sendInitialEvents, as servers do since 1.34

	mu      sync.Mutex
	version uint64
	objects map[string]map[string]runtime.Object // by resource, then by namespace and name
	history []happened
	oldest  uint64        // what a watch may begin with
	changed chan struct{} // closed at every change
	cut     chan struct{} // closed to end all watches
	away    absence
	held    bool // watches tell nothing new
	calls   map[string]int
}

// absence is how a server is away.
type absence int

const (
	here        absence = iota
	unavailable         // it answers 503 to everything
	mute                // it takes connections and ends them without an answer, as a load balancer with nothing behind it does
)

// happened is an event of the history.
type happened struct {
	resource string
	version  uint64
	event    watch.Event
}

// groups are the resources that are served, by path.
var groups = map[string]schema.GroupVersion{
	"/api/v1/pods":       corev1.SchemeGroupVersion,
	"/api/v1/namespaces": corev1.SchemeGroupVersion,
	"/api/v1/nodes":      corev1.SchemeGroupVersion,
	"/apis/networking.k8s.io/v1/networkpolicies": networkingv1.SchemeGroupVersion,
}

func newFakeAPI(t *testing.T, mediaType string, watchList bool) *fakeAPI {
	t.Helper()
	a := &fakeAPI{mediaType: mediaType, watchList: watchList, version: 100, objects: map[string]map[string]runtime.Object{},
		changed: make(chan struct{}), cut: make(chan struct{}), calls: map[string]int{}}
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() {
		a.CutWatches()
		a.CloseClientConnections()
		a.Close()
	})
	return a
}

// Config is how to reach it.
func (a *fakeAPI) Config() *rest.Config { return &rest.Config{Host: a.URL} }

func resourceOf(o runtime.Object) string {
	switch o.(type) {
	case *corev1.Pod:
		return "pods"
	case *corev1.Namespace:
		return "namespaces"
	case *corev1.Node:
		return "nodes"
	case *networkingv1.NetworkPolicy:
		return "networkpolicies"
	}
	panic(fmt.Sprintf("%T is not served", o))
}

// Put adds or updates objects, each with a version of its own.
func (a *fakeAPI) Put(list ...runtime.Object) { a.apply(list, false) }

// Delete removes objects, named by what is given.
func (a *fakeAPI) Delete(list ...runtime.Object) { a.apply(list, true) }

func (a *fakeAPI) apply(list []runtime.Object, remove bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range list {
		o = o.DeepCopyObject()
		m, err := meta.Accessor(o)
		if err != nil {
			panic(err)
		}
		a.version++
		m.SetResourceVersion(strconv.FormatUint(a.version, 10))
		resource, key := resourceOf(o), m.GetNamespace()+"/"+m.GetName()
		if a.objects[resource] == nil {
			a.objects[resource] = map[string]runtime.Object{}
		}
		e := watch.Event{Type: watch.Added, Object: o}
		if _, known := a.objects[resource][key]; known {
			e.Type = watch.Modified
		}
		a.objects[resource][key] = o
		if remove {
			e.Type = watch.Deleted
			delete(a.objects[resource], key)
		}
		a.history = append(a.history, happened{resource, a.version, e})
	}
	a.tell()
}

// tell wakes the watches; the caller holds the lock.
func (a *fakeAPI) tell() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// CutWatches ends the connections of all watches.
func (a *fakeAPI) CutWatches() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.cut)
	a.cut = make(chan struct{})
}

// Forget makes the server say to watches that begin with an older version that it is gone.
func (a *fakeAPI) Forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.oldest, a.history = a.version, nil
}

// SetAway takes the server away, or brings it back, and ends all watches.
func (a *fakeAPI) SetAway(how absence) {
	a.mu.Lock()
	a.away = how
	a.mu.Unlock()
	a.CutWatches()
}

// Hold makes watches tell nothing new, until set back.
func (a *fakeAPI) Hold(held bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.held = held
	a.tell()
}

// Calls counts the requests for a verb, "list" or "watch", and a resource.
func (a *fakeAPI) Calls(verb, resource string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls[verb+" "+resource]
}

func (a *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	gv, known := groups[r.URL.Path]
	resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	verb := "list"
	if r.URL.Query().Get("watch") == "true" || r.URL.Query().Get("watch") == "1" {
		verb = "watch"
	}
	a.mu.Lock()
	away := a.away
	a.calls[verb+" "+resource]++
	a.mu.Unlock()
	switch {
	case away == mute:
		panic(http.ErrAbortHandler)
	case away == unavailable:
		a.answer(w, gv, http.StatusServiceUnavailable, &metav1.Status{Status: metav1.StatusFailure,
			Reason: metav1.StatusReasonServiceUnavailable, Code: http.StatusServiceUnavailable, Message: "closed today"})
	case !known || r.Method != http.MethodGet:
		a.answer(w, gv, http.StatusNotFound, &metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: 404})
	case verb == "list":
		a.answer(w, gv, http.StatusOK, a.list(resource))
	default:
		a.watch(w, r, gv, resource)
	}
}

func (a *fakeAPI) serializer() runtime.SerializerInfo {
	for _, info := range scheme.Codecs.SupportedMediaTypes() {
		if info.MediaType == a.mediaType {
			return info
		}
	}
	panic("no serializer for " + a.mediaType)
}

func (a *fakeAPI) answer(w http.ResponseWriter, gv schema.GroupVersion, code int, o runtime.Object) {
	w.Header().Set("Content-Type", a.mediaType)
	w.WriteHeader(code)
	if gv.Version == "" {
		gv = corev1.SchemeGroupVersion
	}
	_ = scheme.Codecs.EncoderForVersion(a.serializer().Serializer, gv).Encode(o, w) // a client that has gone needs no answer
}

func (a *fakeAPI) list(resource string) runtime.Object {
	a.mu.Lock()
	defer a.mu.Unlock()
	head := metav1.ListMeta{ResourceVersion: strconv.FormatUint(a.version, 10)}
	list := map[string]runtime.Object{
		"pods": &corev1.PodList{ListMeta: head}, "namespaces": &corev1.NamespaceList{ListMeta: head},
		"networkpolicies": &networkingv1.NetworkPolicyList{ListMeta: head}, "nodes": &corev1.NodeList{ListMeta: head},
	}[resource]
	if err := meta.SetList(list, a.sorted(resource)); err != nil {
		panic(err)
	}
	return list
}

// sorted are a resource's objects; the caller holds the lock.
func (a *fakeAPI) sorted(resource string) []runtime.Object {
	var keys []string
	for key := range a.objects[resource] {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var all []runtime.Object
	for _, key := range keys {
		all = append(all, a.objects[resource][key])
	}
	return all
}

// watch sends events until the client goes or the watch is cut.
func (a *fakeAPI) watch(w http.ResponseWriter, r *http.Request, gv schema.GroupVersion, resource string) {
	initial := r.URL.Query().Get("sendInitialEvents") == "true"
	from, _ := strconv.ParseUint(r.URL.Query().Get("resourceVersion"), 10, 64)
	if initial && !a.watchList {
		a.answer(w, gv, http.StatusUnprocessableEntity, &metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid,
			Code: 422, Message: "sendInitialEvents is not known here"})
		return
	}
	a.mu.Lock()
	var first []watch.Event
	if initial {
		for _, o := range a.sorted(resource) {
			first = append(first, watch.Event{Type: watch.Added, Object: o})
		}
		from = a.version
		first = append(first, watch.Event{Type: watch.Bookmark, Object: endOfInitialEvents(resource, from)})
	} else if from < a.oldest {
		a.mu.Unlock()
		a.answer(w, gv, http.StatusGone, &metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonExpired, Code: 410})
		return
	}
	cut := a.cut
	a.mu.Unlock()
	w.Header().Set("Content-Type", a.mediaType+";stream=watch")
	if a.mediaType == runtime.ContentTypeJSON {
		w.Header().Set("Content-Type", a.mediaType)
	}
	w.WriteHeader(http.StatusOK)
	flush := w.(http.Flusher)
	flush.Flush()
	send := a.sender(w, gv)
	for _, e := range first {
		send(e)
	}
	for {
		flush.Flush()
		a.mu.Lock()
		changed, held := a.changed, a.held
		var news []happened
		for _, h := range a.history {
			if h.resource == resource && h.version > from && !held {
				news = append(news, h)
			}
		}
		a.mu.Unlock()
		for _, h := range news {
			send(h.event)
			from = h.version
		}
		if len(news) > 0 {
			continue
		}
		select {
		case <-r.Context().Done():
			return
		case <-cut:
			panic(http.ErrAbortHandler)
		case <-changed:
		}
	}
}

// sender returns what writes one event: a frame with the object inside of it, encoded by itself.
func (a *fakeAPI) sender(w http.ResponseWriter, gv schema.GroupVersion) func(watch.Event) {
	info := a.serializer()
	object := scheme.Codecs.EncoderForVersion(info.Serializer, gv)
	frames := streaming.NewEncoder(info.StreamSerializer.NewFrameWriter(w),
		scheme.Codecs.EncoderForVersion(info.StreamSerializer.Serializer, gv))
	return func(e watch.Event) {
		var text strings.Builder
		if err := object.Encode(e.Object, &text); err != nil {
			panic(err)
		}
		_ = frames.Encode(&metav1.WatchEvent{Type: string(e.Type), Object: runtime.RawExtension{Raw: []byte(text.String())}})
	}
}

func endOfInitialEvents(resource string, version uint64) runtime.Object {
	head := metav1.ObjectMeta{ResourceVersion: strconv.FormatUint(version, 10),
		Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
	return map[string]runtime.Object{"pods": &corev1.Pod{ObjectMeta: head}, "namespaces": &corev1.Namespace{ObjectMeta: head},
		"networkpolicies": &networkingv1.NetworkPolicy{ObjectMeta: head}, "nodes": &corev1.Node{ObjectMeta: head}}[resource]
}
