package cluster

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/pager"

	"github.com/postern-cni/postern/pkg/object"
)

// API watches an API server. Each object is stripped before it is kept: client-go's reflectors list and watch, and store into
// a [cacheOf] in place of an informer's queue and indexer.
type API struct {
	changes    signal
	pods       *cacheOf[*object.Pod]
	namespaces *cacheOf[*object.Namespace]
	policies   *cacheOf[*networkingv1.NetworkPolicy]
	nodes      *cacheOf[*object.Node]
}

// FromAPI returns a source that lists and watches once it runs.
func FromAPI(config *rest.Config) (*API, error) {
	config = rest.CopyConfig(config)
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	if config.QPS == 0 { // client-go's 5 a second hold up who asks for rereads; reflectors pause by themselves
		config.QPS, config.Burst = 20, 40
	}
	config.NegotiatedSerializer = codecs()
	streams(config)
	clients := map[string]client{}
	for resource, group := range map[string]schema.GroupVersion{
		"pods": corev1.SchemeGroupVersion, "namespaces": corev1.SchemeGroupVersion, "nodes": corev1.SchemeGroupVersion,
		"networkpolicies": networkingv1.SchemeGroupVersion,
	} {
		var err error
		if clients[resource], err = newClient(config, resource, group); err != nil {
			return nil, err
		}
	}
	a := &API{changes: newSignal()}
	lately := newLately()
	a.pods = newCache(a.changes, clients["pods"], &wirePod{}, func(o runtime.Object) *object.Pod {
		p := o.(*wirePod).object
		lately.share(p)
		return p
	})
	a.namespaces = newCache(a.changes, clients["namespaces"], &corev1.Namespace{},
		func(o runtime.Object) *object.Namespace { return toNamespace(o.(*corev1.Namespace)) })
	a.policies = newCache(a.changes, clients["networkpolicies"], &networkingv1.NetworkPolicy{},
		func(o runtime.Object) *networkingv1.NetworkPolicy { return toPolicy(o.(*networkingv1.NetworkPolicy)) })
	a.nodes = newCache(a.changes, clients["nodes"], &corev1.Node{},
		func(o runtime.Object) *object.Node { return toNode(o.(*corev1.Node)) })
	a.nodes.also = newSignal()
	return a, nil
}

// streams sets up connections for long streams of which the beginning is large: a connection for each, without HTTP/2, whose
// reader answers every few KiB with frames that both sides encrypt; and without compression, which costs the API server more than
// it saves. Keepalives stand in for HTTP/2's pings: that a server has gone without a word is noticed within a minute.
func streams(config *rest.Config) {
	config.DisableCompression = true
	config.NextProtos = []string{"http/1.1"}
	if config.Dial == nil {
		config.Dial = (&net.Dialer{Timeout: 30 * time.Second, KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: 20 * time.Second, Interval: 10 * time.Second, Count: 3}}).DialContext
	}
}

// client reads objects of one kind, over connections of its own.
type client struct {
	*rest.RESTClient
	resource string
	pace     *pace
}

func newClient(config *rest.Config, resource string, group schema.GroupVersion) (client, error) {
	c := client{resource: resource, pace: &pace{}}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/apis", &group
	if group.Group == "" {
		config.APIPath = "/api"
	}
	config.Dial = c.pace.dial(config.Dial)
	config.NegotiatedSerializer = pacedCodecs{config.NegotiatedSerializer, c.pace}
	var err error
	if c.RESTClient, err = rest.RESTClientFor(config); err != nil {
		return c, fmt.Errorf("client for %s: %w", config.Host, err)
	}
	return c, nil
}

// Run implements [Source].
func (a *API) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, run := range []func(context.Context){a.pods.run, a.namespaces.run, a.policies.run, a.nodes.run} {
		wg.Go(func() { run(ctx) })
	}
	wg.Wait()
	return nil
}

// Changes implements [Source].
func (a *API) Changes() <-chan struct{} { return a.changes }

// Synced implements [Source].
func (a *API) Synced() bool {
	return a.pods.synced() && a.namespaces.synced() && a.policies.synced() && a.nodes.synced()
}

// NodeChanges implements [Source].
func (a *API) NodeChanges() <-chan struct{} { return a.nodes.also }

// Nodes implements [Source].
func (a *API) Nodes() ([]*object.Node, bool) {
	c := object.Cluster{Nodes: a.nodes.list()}
	order(&c)
	return c.Nodes, a.nodes.synced()
}

// Snapshot implements [Source].
func (a *API) Snapshot() object.Cluster {
	c := object.Cluster{Pods: a.pods.list(), Namespaces: a.namespaces.list(), Policies: a.policies.list(), Nodes: a.nodes.list()}
	order(&c)
	return c
}

// Take implements [Source].
func (a *API) Take() object.Changes {
	return object.Changes{Pods: a.pods.take(), Namespaces: a.namespaces.take(), Policies: a.policies.take(), Nodes: a.nodes.take()}
}

// Problems implements [Source].
func (a *API) Problems() []string {
	return slices.Concat(a.pods.problems(), a.namespaces.problems(), a.policies.problems(), a.nodes.problems())
}

// Reread implements [Source].
func (a *API) Reread(ctx context.Context) error {
	return errors.Join(a.pods.reread(ctx), a.namespaces.reread(ctx), a.policies.reread(ctx), a.nodes.reread(ctx))
}

// cacheOf keeps the stripped objects of one kind; it is the store that a reflector fills.
type cacheOf[T comparable] struct {
	resource string
	like     runtime.Object
	strip    func(runtime.Object) T
	source   *cache.ListWatch
	pace     *pace
	changes  signal
	also     signal // nil, or told of this kind's changes alone

	mu    sync.Mutex
	full  bool
	items map[string]versioned[T]
	// changed are the keys of objects that take has not told of yet.
	changed map[string]bool
	// newest is the highest version seen. Events come in their order: with one later than a list, all of the list is in.
	newest uint64
	err    error // of the last list or watch
}

type versioned[T comparable] struct {
	object  T
	version uint64 // metadata.resourceVersion
}

func newCache[T comparable](
	changes signal, client client, like runtime.Object, strip func(runtime.Object) T,
) *cacheOf[T] {
	c := &cacheOf[T]{resource: client.resource, like: like, strip: strip, changes: changes, pace: client.pace,
		items: map[string]versioned[T]{}, changed: map[string]bool{}}
	plain := cache.NewFilteredListWatchFromClient(client, client.resource, metav1.NamespaceAll, func(*metav1.ListOptions) {})
	c.source = &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := plain.ListWithContext(ctx, o)
			c.note("list", err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			c.pace.steady.Store(o.SendInitialEvents == nil)
			w, err := plain.WatchWithContext(ctx, o)
			c.note("watch", err)
			return w, err
		},
	}
	return c
}

// An API server that is back is noticed within seconds; client-go's own pauses grow to a minute.
const (
	backoffFirst = 500 * time.Millisecond
	backoffMost  = 5 * time.Second
)

func (c *cacheOf[T]) run(ctx context.Context) {
	backoff := &wait.Backoff{Duration: backoffFirst, Factor: 2, Jitter: 1, Cap: backoffMost, Steps: math.MaxInt32}
	o := cache.ReflectorOptions{Name: c.resource, Backoff: backoff}
	cache.NewReflectorWithOptions(c.source, c.like, c, o).RunWithContext(ctx)
}

// note keeps the error of a list or watch, until one works.
func (c *cacheOf[T]) note(verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = nil
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err // without the address: a watch has another time limit in it each time, and so would be another problem
	}
	if err != nil {
		c.err = fmt.Errorf("%s %s: %w", verb, c.resource, err)
	}
}

func (c *cacheOf[T]) problems() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return []string{c.err.Error()}
	case !c.full: // a connection that ends without an answer is no error to client-go
		return []string{fmt.Sprintf("list %s: the API server has not answered yet", c.resource)}
	}
	return nil
}

func (c *cacheOf[T]) synced() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.full
}

func (c *cacheOf[T]) list() []T {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]T, 0, len(c.items))
	for _, i := range c.items {
		list = append(list, i.object)
	}
	return list
}

// take returns the changed objects by their "namespace/name", or by their name if they have no namespace.
func (c *cacheOf[T]) take() map[string]T {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed := make(map[string]T, len(c.changed))
	for key := range c.changed {
		changed[strings.TrimPrefix(key, "/")] = c.items[key].object // nil if it is gone
	}
	c.changed = map[string]bool{} // to clear it would leave it as large as the first list had made it, and slow to go through
	return changed
}

// arrival is a stripped object on its way from a streamed list to [cacheOf.Replace]. client-go gathers such a list before it
// hands it over: of whole pods, that is some hundred times what is kept of them. For it to tell objects apart, an arrival is a
// metav1.Object as far as it asks.
type arrival[T any] struct {
	metav1.Object            // nil
	namespace, name, version string
	object                   T
}

func (a *arrival[T]) GetNamespace() string       { return a.namespace }
func (a *arrival[T]) GetName() string            { return a.name }
func (a *arrival[T]) GetResourceVersion() string { return a.version }

// Transformer implements cache.TransformingStore.
func (c *cacheOf[T]) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		whole, ok := o.(runtime.Object)
		if !ok {
			return o, nil
		}
		m, err := meta.Accessor(whole)
		if err != nil {
			return nil, err
		}
		return &arrival[T]{namespace: m.GetNamespace(), name: m.GetName(), version: m.GetResourceVersion(), object: c.strip(whole)}, nil
	}
}

// stripped strips an object, unless it has been.
func (c *cacheOf[T]) stripped(o any) T {
	if a, done := o.(*arrival[T]); done {
		return a.object
	}
	return c.strip(o.(runtime.Object))
}

// identify returns an object's key and version.
func identify(o any) (key string, version uint64, err error) {
	m, err := meta.Accessor(o)
	if err != nil {
		return "", 0, err
	}
	version, err = strconv.ParseUint(m.GetResourceVersion(), 10, 64)
	return m.GetNamespace() + "/" + m.GetName(), version, err
}

// keep puts a stripped object in the place of the one of that key. One that is the same in all that matters is no change, and the
// one that is there stays.
func (c *cacheOf[T]) keep(items map[string]versioned[T], key string, o T, version uint64) {
	if was, there := c.items[key]; there && reflect.DeepEqual(was.object, o) {
		o = was.object
	} else {
		c.changed[key] = true
	}
	items[key] = versioned[T]{o, version}
}

// gone notes that there is no object of that key any more.
func (c *cacheOf[T]) gone(key string) {
	if _, there := c.items[key]; there {
		c.changed[key] = true
	}
}

// tell says that something has changed, if it has.
func (c *cacheOf[T]) tell() {
	if len(c.changed) > 0 {
		c.changes.send()
		c.also.send()
	}
}

// Add implements cache.ReflectorStore.
func (c *cacheOf[T]) Add(o any) error {
	key, version, err := identify(o)
	if err != nil {
		return err
	}
	stripped := c.strip(o.(runtime.Object))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(c.items, key, stripped, version)
	c.newest = max(c.newest, version)
	c.tell()
	return nil
}

// Update implements cache.ReflectorStore.
func (c *cacheOf[T]) Update(o any) error { return c.Add(o) }

// Delete implements cache.ReflectorStore.
func (c *cacheOf[T]) Delete(o any) error {
	key, version, err := identify(o)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone(key)
	delete(c.items, key)
	c.newest = max(c.newest, version)
	c.tell()
	return nil
}

// Replace implements cache.ReflectorStore.
func (c *cacheOf[T]) Replace(list []any, version string) error {
	newest, err := strconv.ParseUint(version, 10, 64)
	if err != nil {
		return fmt.Errorf("list %s: resourceVersion %q: %w", c.resource, version, err)
	}
	items := make(map[string]versioned[T], len(list))
	for _, o := range list {
		key, version, err := identify(o)
		if err != nil {
			return err
		}
		items[key] = versioned[T]{c.stripped(o), version}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.items {
		if _, stays := items[key]; !stays {
			c.gone(key)
		}
	}
	for key, i := range items {
		c.keep(items, key, i.object, i.version)
	}
	c.items, c.full, c.newest = items, true, newest
	c.pace.steady.Store(true)
	c.changes.send() // that the kind is full is news too
	c.also.send()
	return nil
}

// Resync implements cache.ReflectorStore; there is nothing to do.
func (c *cacheOf[T]) Resync() error { return nil }

// rereadPause is how often a waiting reread compares.
const rereadPause = 10 * time.Millisecond

// reread lists the kind afresh and waits until the cache is at least as new.
func (c *cacheOf[T]) reread(ctx context.Context) error {
	want := map[string]uint64{}
	list, _, err := pager.New(pager.ListPageFunc(c.source.ListWithContextFunc)).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list %s: %w", c.resource, err)
	}
	head, err := meta.ListAccessor(list)
	if err != nil {
		return fmt.Errorf("list %s: %w", c.resource, err)
	}
	until, err := strconv.ParseUint(head.GetResourceVersion(), 10, 64)
	if err != nil {
		return fmt.Errorf("list %s: resourceVersion: %w", c.resource, err)
	}
	err = meta.EachListItem(list, func(o runtime.Object) error {
		key, version, err := identify(o)
		want[key] = version
		return err
	})
	for err == nil && !c.has(want, until) {
		select {
		case <-ctx.Done():
			err = fmt.Errorf("the watch of %s lags behind: %w", c.resource, ctx.Err())
		case <-time.After(rereadPause):
		}
	}
	return err
}

// has reports whether the cache is at least as new as a list of that version.
func (c *cacheOf[T]) has(want map[string]uint64, until uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.full || c.newest > until {
		return c.full
	}
	for key, version := range want {
		if is, there := c.items[key]; !there || is.version < version {
			return false
		}
	}
	for key, is := range c.items {
		if _, wanted := want[key]; !wanted && is.version <= until {
			return false
		}
	}
	return true
}
