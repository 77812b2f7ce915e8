// Package metrics holds every Prometheus collector of policyd. Names begin with postern_; times are in seconds.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are the collectors, in a registry of their own.
type Metrics struct {
	registry *prometheus.Registry

	Applied      prometheus.Histogram
	Failures     *prometheus.CounterVec // by kind
	Restores     prometheus.Counter
	Chains       prometheus.Counter
	SetMessages  prometheus.Counter
	Repairs      *prometheus.CounterVec // by scope
	FlowsEnded   prometheus.Counter
	GuardSeconds prometheus.Histogram
	Refused      prometheus.Counter
	Collected    prometheus.Counter

	Pods     *prometheus.GaugeVec // by state
	Policies prometheus.Gauge
	Unusable prometheus.Gauge
	Synced   prometheus.Gauge
	// NodeFindings are of package nodenet, by kind.
	NodeFindings *prometheus.GaugeVec
}

// New makes the collectors; version is policyd's.
func New(version string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "postern", Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "postern", Name: name, Help: help})
		m.registry.MustRegister(g)
		return g
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "postern", Name: name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16)})
		m.registry.MustRegister(h)
		return h
	}
	m.Applied = histogram("apply_seconds", "Time from the start of a pass that wrote to the kernel to its end.")
	m.Restores = counter("iptables_restores_total", "iptables-restore processes run.")
	m.Chains = counter("chains_written_total", "Chains written or removed.")
	m.SetMessages = counter("ipset_messages_total", "Netlink messages that changed a set.")
	m.FlowsEnded = counter("flows_ended_total", "Conntrack entries deleted because policies no longer allow their flow.")
	m.GuardSeconds = histogram("guard_seconds", "Time from the plugin's request to the pod being guarded.")
	m.Refused = counter("guards_refused_total", "Requests of the plugin that ended without a guard.")
	m.Collected = counter("attachments_collected_total", "Attachments removed whose container was gone.")
	m.Policies = gauge("policies", "NetworkPolicies known.")
	m.Unusable = gauge("policies_unusable", "NetworkPolicies that cannot be used as written; they close the pods they select.")
	m.Synced = gauge("synced", "1 once all objects have been read.")
	m.Failures = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "postern", Name: "failures_total",
		Help: "What failed and is tried again, by kind."}, []string{"kind"})
	m.Repairs = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "postern", Name: "repairs_total",
		Help: "Chains, hooks and sets found changed by somebody else and put right, by scope."}, []string{"scope"})
	m.Pods = prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "postern", Name: "pods",
		Help: "Pod interfaces of this node, by state: guarded, expected, unknown."}, []string{"state"})
	m.NodeFindings = prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "postern", Name: "node_findings",
		Help: "What defeats the node's network, or would, by kind."}, []string{"kind"})
	info := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "postern", Name: "build_info", Help: "1; the version is a label.",
		ConstLabels: prometheus.Labels{"version": version}})
	info.Set(1)
	m.registry.MustRegister(m.Failures, m.Repairs, m.Pods, m.NodeFindings, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}
