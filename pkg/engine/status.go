package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/object"
	"github.com/postern-cni/postern/pkg/policy"
)

// Status is what policyd tells of itself.
type Status struct {
	Version string    `json:"version"`
	Node    string    `json:"node"`
	Backend string    `json:"iptablesBackend"`
	Started time.Time `json:"started"`
	// Synced says that all objects have been read once; before that nothing is written.
	Synced bool `json:"synced"`
	// Enforced is when the kernel was last found or brought in accord with objects and records; zero if never.
	Enforced time.Time `json:"enforced,omitzero"`
	// Written is when something was last written for that.
	Written time.Time `json:"written,omitzero"`
	// Failing is the error of the last pass, tried again with growing pauses; FailingSince is when passes began to fail.
	Failing      string    `json:"failing,omitempty"`
	FailingSince time.Time `json:"failingSince,omitzero"`

	Pods     []PodStatus `json:"pods"`
	Policies int         `json:"policies"`
	// Unusable are policies that close the pods they select, for they cannot be used as written.
	Unusable []policy.Problem `json:"unusable,omitempty"`
	// Problems are what keeps policyd from knowing the objects or the records as they are.
	Problems []string `json:"problems,omitempty"`
}

// PodStatus is one pod interface of this node.
type PodStatus struct {
	Pod       string       `json:"pod"` // namespace/name; empty if it is not known
	Interface string       `json:"interface"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// State is guarded, expected (not attached yet), or unknown (attached, and closed, for no object is known for it).
	State           string `json:"state"`
	IngressIsolated bool   `json:"ingressIsolated"`
	EgressIsolated  bool   `json:"egressIsolated"`
}

// States of a [PodStatus].
const (
	Guarded  = "guarded"
	Expected = "expected"
	Unknown  = "unknown"
)

// account notes how a pass went: in the status, the metrics and the log.
func (e *Engine) account(d policy.Delta, begin time.Time, r dataplane.Result, failed error, broken []error) {
	now := time.Now()
	problems := slices.Clone(e.Source.Problems())
	for _, err := range slices.Concat(broken, r.Refused) {
		problems = append(problems, err.Error())
	}
	if len(r.Refused) > 0 {
		e.Metrics.Failures.WithLabelValues("restore").Add(float64(len(r.Refused)))
	}
	unusable := e.index.Problems()
	e.mu.Lock()
	for _, i := range d.Interfaces {
		if i.New == nil {
			delete(e.pods, i.Old.Interface)
		} else {
			e.pods[i.New.Interface] = podStatus(i.New)
		}
	}
	s := &e.status
	s.Synced, s.Policies, s.Unusable, s.Problems = true, e.index.Policies(), unusable, problems
	if failed != nil {
		if s.Failing == "" {
			s.FailingSince = now
		}
		s.Failing = failed.Error()
	} else {
		s.Enforced, s.Failing, s.FailingSince = now, "", time.Time{}
		if r.Wrote() || s.Written.IsZero() {
			s.Written = now
		}
	}
	if len(d.Interfaces) > 0 {
		e.countPods()
	}
	e.mu.Unlock()

	m := e.Metrics
	m.Restores.Add(float64(r.Restores))
	m.Chains.Add(float64(r.Chains))
	m.SetMessages.Add(float64(r.SetMessages))
	m.Policies.Set(float64(e.index.Policies()))
	m.Unusable.Set(float64(len(unusable)))
	e.report(unusable, problems)
	switch {
	case failed != nil:
		e.fail(kindOf(failed), "the kernel is not up to date; trying again", failed)
	case r.Wrote():
		m.Applied.Observe(now.Sub(begin).Seconds())
		level := slog.LevelInfo
		if r.Restores == 0 {
			level = slog.LevelDebug // pods elsewhere come and go all the time
		}
		e.Log.Log(context.Background(), level, "applied", "took", now.Sub(begin).Round(10*time.Microsecond), "restores",
			r.Restores, "chains", r.Chains, "setMessages", r.SetMessages)
	}
}

// kindOf names a failure's kind for the metrics.
func kindOf(err error) string {
	var refused *iptables.LineError
	var errno syscall.Errno
	switch {
	case errors.Is(err, iptables.ErrLocked):
		return "lock"
	case errors.Is(err, iptables.ErrMissingSet), errors.As(err, &refused):
		return "restore"
	case errors.Is(err, ipset.ErrFull):
		return "set_full"
	case errors.Is(err, ipset.ErrNotExist), errors.Is(err, ipset.ErrInUse):
		return "set"
	case errors.As(err, &errno):
		return "netlink"
	}
	return "apply"
}

func podStatus(g *policy.Guarded) PodStatus {
	p := PodStatus{Interface: g.Interface, Addresses: g.Addresses, State: Unknown,
		IngressIsolated: g.Ingress.Isolated, EgressIsolated: g.Egress.Isolated}
	if g.Pod != nil {
		p.Pod = g.Pod.Key()
	}
	switch {
	case g.Ready:
		p.State = Guarded
	case len(g.Addresses) == 0:
		p.State = Expected
	}
	return p
}

func (e *Engine) countPods() {
	count := map[string]int{}
	for _, p := range e.pods {
		count[p.State]++
	}
	for _, state := range []string{Guarded, Expected, Unknown} {
		e.Metrics.Pods.WithLabelValues(state).Set(float64(count[state]))
	}
}

// report logs each problem once, until it has gone.
func (e *Engine) report(unusable []policy.Problem, problems []string) {
	now := map[string]bool{}
	for _, p := range unusable {
		now[fmt.Sprintf("NetworkPolicy %s cannot be used as written and closes the pods it selects: %s", p.Policy, p.Reason)] = true
	}
	for _, p := range problems {
		now[p] = true
	}
	for _, text := range slices.Sorted(maps.Keys(now)) {
		if !e.reported[text] {
			e.Log.Warn(text)
		}
	}
	e.reported = now
}

// withRecords is the cluster with the addresses of this node's pods as their records have them.
func (e *Engine) withRecords(c object.Cluster) object.Cluster {
	e.mu.Lock()
	here := map[string][]netip.Addr{}
	for _, p := range e.pods {
		here[p.Pod] = append(here[p.Pod], p.Addresses...)
	}
	e.mu.Unlock()
	pods := slices.Clone(c.Pods)
	for i, p := range pods {
		if addrs := here[p.Key()]; len(addrs) > 0 {
			own := *p
			own.IPs = addrs
			pods[i] = &own
		}
	}
	c.Pods = pods
	return c
}

// Status returns what is enforced, since when, and what is wrong.
func (e *Engine) Status() Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.status
	s.Pods = make([]PodStatus, 0, len(e.pods))
	for _, link := range slices.Sorted(maps.Keys(e.pods)) {
		s.Pods = append(s.Pods, e.pods[link])
	}
	if !s.Synced {
		s.Problems = e.Source.Problems()
	}
	return s
}

// Healthy returns an error if the engine does not go on any more.
func (e *Engine) Healthy() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	const most = 60 * time.Second
	if since := time.Since(e.beat); since > most {
		return fmt.Errorf("a pass has been going on for %s", since.Round(time.Second))
	}
	return nil
}

// Ready returns an error unless policies are enforced.
func (e *Engine) Ready() error {
	s := e.Status()
	switch {
	case !s.Synced:
		return fmt.Errorf("not all objects have been read yet%s", because(s.Problems))
	case s.Failing != "":
		return fmt.Errorf("the kernel has not been up to date since %s: %s", s.FailingSince.Format(time.RFC3339), s.Failing)
	}
	return nil
}

// Settle returns once what the source holds now, and what is attached now, is enforced.
func (e *Engine) Settle(ctx context.Context) error {
	if err := e.Source.Reread(ctx); err != nil {
		return err
	}
	return e.wait(ctx, nil)
}

// Questions of [Engine.Ask].
const (
	AskStatus  = "status"
	AskExplain = "explain"
)

// StatusQuestion is the body of [AskStatus]; the answer is a [Status].
type StatusQuestion struct {
	// Wait for [Engine.Settle] first.
	Wait bool `json:"wait,omitempty"`
}

// ExplainQuestion is the body of [AskExplain]; the answer is an [Explanation].
type ExplainQuestion struct {
	From     string          `json:"from"` // NAMESPACE/POD or an IP address
	To       string          `json:"to"`
	Protocol corev1.Protocol `json:"protocol,omitempty"`
	Port     uint16          `json:"port,omitempty"`
}

// Explanation is what [explain.Between] says.
type Explanation struct {
	Allowed bool   `json:"allowed"` // in every family
	Text    string `json:"text"`
}

// Ask implements gate.Handler.
func (e *Engine) Ask(ctx context.Context, question string, body json.RawMessage) (any, error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-min(answerBefore, time.Until(deadline)/4)))
		defer cancel()
	}
	switch question {
	case AskStatus:
		var q StatusQuestion
		if err := json.Unmarshal(body, &q); err != nil {
			return nil, fmt.Errorf("question %q: %w", question, err)
		}
		if q.Wait {
			if err := e.Settle(ctx); err != nil {
				return nil, fmt.Errorf("what the source holds now is not enforced yet: %w", err)
			}
		}
		return e.Status(), nil
	case AskExplain:
		var q ExplainQuestion
		if err := json.Unmarshal(body, &q); err != nil {
			return nil, fmt.Errorf("question %q: %w", question, err)
		}
		return e.explain(q)
	}
	return nil, fmt.Errorf("question %q: %s and %s are known; policyd and its command are of different versions", question,
		AskStatus, AskExplain)
}

func (e *Engine) explain(q ExplainQuestion) (*Explanation, error) {
	own, err := nodeAddresses()
	if err != nil {
		return nil, err
	}
	answers, err := explain.Between(e.withRecords(e.Source.Snapshot()), q.From, q.To, q.Protocol, q.Port, slices.Collect(maps.Keys(own)))
	if err != nil {
		return nil, err
	}
	allowed, text := explain.All(answers)
	return &Explanation{Allowed: allowed, Text: text}, nil
}
