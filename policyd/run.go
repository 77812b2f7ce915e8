package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/engine"
	"github.com/postern-cni/postern/pkg/events"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/metrics"
	"github.com/postern-cni/postern/pkg/nodenet"
)

// options are the flags of run.
type options struct {
	from, kubeconfig string
	node             string
	stateDir         string
	backend          string
	listen           string
	repair           time.Duration
	logLevel         slog.Level
	logJSON          bool
	pprof            bool
	nodes            nodeOptions
}

func (o *options) register(flags *flag.FlagSet) {
	host, _ := os.Hostname() // empty: check asks for --node
	if name := os.Getenv("NODE_NAME"); name != "" {
		host = name
	}
	flags.StringVar(&o.from, "from", "", "read manifests from this `folder`, in place of an API server")
	flags.StringVar(&o.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "`file` that says how to reach the API server; "+
		"without it and --from, the pod's service account is used")
	flags.StringVar(&o.node, "node", host, "this node's `name` in the API; default $NODE_NAME, else the host's name")
	flags.StringVar(&o.stateDir, "state-dir", attachment.DefaultStateDir, "the node's state `folder`, shared with the plugin")
	flags.StringVar(&o.backend, "iptables-backend", "auto", "`backend`: nft, legacy, or auto: what the node's other software uses")
	flags.StringVar(&o.listen, "listen", "127.0.0.1:9478", "`address` for /metrics, /healthz and /readyz; empty for none")
	flags.DurationVar(&o.repair, "repair-interval", time.Minute, "how often links, hostPorts and\n"+
		"the sizes of sets are compared with what they should be, and every tenth time (less than a minute: always)\n"+
		"all rules and entries; most changes by others are noticed at once")
	flags.TextVar(&o.logLevel, "log-level", slog.LevelInfo, "debug, info, warn or error")
	flags.BoolVar(&o.logJSON, "log-json", false, "log in JSON")
	flags.BoolVar(&o.pprof, "pprof", false, "serve /debug/pprof/ too")
	o.nodes.register(flags)
}

func (o *options) check() (problems []string) {
	if o.from != "" && o.kubeconfig != "" {
		problems = append(problems, "--from and --kubeconfig: objects come from one of them")
	}
	if o.from != "" {
		if s, err := os.Stat(o.from); err != nil || !s.IsDir() {
			problems = append(problems, fmt.Sprintf("--from %q: not a folder", o.from))
		}
	}
	if o.node == "" {
		problems = append(problems, "--node: missing, and neither $NODE_NAME nor the host's name can stand in")
	}
	if !filepath.IsAbs(o.stateDir) {
		problems = append(problems, fmt.Sprintf("--state-dir %q: must be an absolute path", o.stateDir))
	}
	switch o.backend {
	case "auto", string(iptables.NFT), string(iptables.Legacy):
	default:
		problems = append(problems, fmt.Sprintf("--iptables-backend %q: nft, legacy and auto are known", o.backend))
	}
	if o.repair < 100*time.Millisecond || o.repair > time.Hour {
		problems = append(problems, fmt.Sprintf("--repair-interval %s: must be between 100ms and 1h", o.repair))
	}
	if o.listen != "" {
		if _, _, err := net.SplitHostPort(o.listen); err != nil {
			problems = append(problems, fmt.Sprintf("--listen %q: ADDRESS:PORT is expected: %v", o.listen, err))
		}
	}
	return append(problems, o.nodes.check()...)
}

func runCommand(ctx context.Context, flags *flag.FlagSet, args []string, _ io.Writer) error {
	var o options
	o.register(flags)
	if err := parse(flags, args, o.check); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: o.logLevel}))
	if o.logJSON {
		log = slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: o.logLevel}))
	}
	slog.SetLogLoggerLevel(slog.LevelDebug) // what libraries print
	slog.SetDefault(log)
	klog.SetSlogLogger(log) // client-go's words go the same way
	source, recorder, err := o.source(log)
	if err != nil {
		return err
	}
	backend := iptables.Backend(o.backend)
	if o.backend == "auto" {
		if backend, err = iptables.Detect(ctx); err != nil {
			return err
		}
	}
	lock, err := onlyOne(ctx, o.stateDir, log)
	if err != nil {
		return err
	}
	defer lock.Release()
	m := metrics.New(version)
	e, err := engine.New(engine.Config{Source: source, StateDir: o.stateDir, Node: o.node, Unplaced: o.from != "", Backend: backend,
		RepairInterval: o.repair, Metrics: m, Log: log, Version: version})
	if err != nil {
		return err
	}
	var teller nodenet.Teller
	if recorder != nil {
		teller = recorder
	}
	node, err := o.nodePart(source, backend, e.Ready, teller, m, log)
	if err != nil {
		return err
	}
	log.Info("policyd starts", "version", version, "node", o.node, "iptablesBackend", backend, "stateDir", o.stateDir)
	err = serve(ctx, &o, e, node, recorder, m, log)
	log.Info("policyd ends; the rules stay in force")
	return err
}

// onlyOne makes sure that one policyd writes for a state folder at a time. During an update, the new one waits for the old.
func onlyOne(ctx context.Context, stateDir string, log *slog.Logger) (*attachment.Lock, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state folder: %w", err)
	}
	slow := time.AfterFunc(time.Second, func() { log.Warn("another policyd is running; waiting for its end", "stateDir", stateDir) })
	defer slow.Stop()
	return attachment.LockFile(ctx, filepath.Join(stateDir, "policyd.lock"), true)
}

// source returns where objects come from and, with an API server, what writes events to it.
func (o *options) source(log *slog.Logger) (cluster.Source, *events.Recorder, error) {
	if o.from != "" {
		return cluster.FromFolder(o.from), nil, nil
	}
	config, err := restConfig(o.kubeconfig)
	if err != nil {
		return nil, nil, err
	}
	recorder, err := events.For(config, o.node, log)
	if err != nil {
		return nil, nil, err
	}
	api, err := cluster.FromAPI(config)
	return api, recorder, err
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("reach the API server: %w; outside of a pod, give --kubeconfig FILE or --from FOLDER", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read --kubeconfig %s: %w", kubeconfig, err)
	}
	return config, nil
}

// serve runs the engine, the node's part, what writes events if there is one, the socket and the port until the context ends or
// one of them fails.
func serve(
	ctx context.Context, o *options, e *engine.Engine, node nodePart, recorder *events.Recorder, m *metrics.Metrics, log *slog.Logger,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	socket, err := gate.Listen(o.stateDir)
	if err != nil {
		return err
	}
	var port net.Listener
	if o.listen != "" {
		if port, err = net.Listen("tcp", o.listen); err != nil {
			return errors.Join(fmt.Errorf("listen on --listen %s: %w", o.listen, err), socket.Close())
		}
		log.Info("serving metrics and health", "address", port.Addr())
	}
	var wg sync.WaitGroup
	part := func(run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	part(e.Run)
	part(node.Run)
	part(func(ctx context.Context) error { return settle(ctx, e.Ready) })
	if recorder != nil {
		part(recorder.Run)
	}
	part(func(ctx context.Context) error { return gate.Serve(ctx, socket, answers{e, node}) })
	if port != nil {
		part(func(ctx context.Context) error { return serveHTTP(ctx, port, handler(e, node, m, o.pprof)) })
	}
	<-ctx.Done()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// A policyd that has read everything makes little garbage, and what it keeps is most of its memory: collecting twice as often costs
// little, and saves a quarter of that.
const (
	settledPercent = 50 // GOGC, unless it is set
	settleAfter    = 2 * time.Second
)

// settle gives the memory back that reading everything took, once it has been read.
func settle(ctx context.Context, ready func() error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settleAfter):
		}
		if ready() != nil {
			continue
		}
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(settledPercent)
		}
		debug.FreeOSMemory()
		return nil
	}
}

func handler(e *engine.Engine, node nodePart, m *metrics.Metrics, profiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	health := func(check func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if err := check(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.HandleFunc("GET /healthz", health(e.Healthy))
	mux.HandleFunc("GET /readyz", health(func() error { return errors.Join(e.Ready(), node.Ready()) }))
	if profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	}
	return nil
}
