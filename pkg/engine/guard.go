package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/gate"
)

// waiter waits for an attachment to be guarded, or, without one, for a pass that began after it came and ended well.
type waiter struct {
	a    *attachment.Attachment
	done chan struct{}
	// reason says why it still waits.
	reason string
}

// wait registers a waiter, asks for a pass and waits. It returns why the wait was in vain.
func (e *Engine) wait(ctx context.Context, a *attachment.Attachment) error {
	w := &waiter{a: a, done: make(chan struct{}), reason: "policyd has not looked yet"}
	e.mu.Lock()
	e.waiters = append(e.waiters, w)
	e.mu.Unlock()
	e.kick()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiters = slices.DeleteFunc(e.waiters, func(o *waiter) bool { return o == w })
	if !e.Source.Synced() {
		return errors.New("not all objects have been read yet" + because(e.Source.Problems()))
	}
	return errors.New(w.reason)
}

func because(problems []string) string {
	if len(problems) == 0 {
		return ""
	}
	return ": " + strings.Join(problems, "; ")
}

// waitingNow returns those whom the pass that begins now may answer.
func (e *Engine) waitingNow() []*waiter {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.waiters)
}

// answer ends the wait of those whose wish is fulfilled.
func (e *Engine) answer(waiting []*waiter, failed error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, w := range waiting {
		w.reason = e.missing(w, failed)
		if w.reason != "" {
			continue
		}
		close(w.done)
		e.waiters = slices.DeleteFunc(e.waiters, func(o *waiter) bool { return o == w })
	}
}

// missing says what a waiter still waits for; empty if nothing.
func (e *Engine) missing(w *waiter, failed error) string {
	notUpToDate := ""
	if failed != nil {
		notUpToDate = "the kernel could not be brought up to date: " + failed.Error()
	}
	if w.a == nil {
		return notUpToDate
	}
	for _, addr := range w.a.Addresses {
		if e.guarded[pair{addr, w.a.HostInterface}] != w.a.Key() {
			if notUpToDate != "" {
				return notUpToDate
			}
			if _, why := match(e.index.Pod, w.a); why != "" {
				return why
			}
			return fmt.Sprintf("a newer sandbox of pod %s/%s has its link %s", w.a.Pod.Namespace, w.a.Pod.Name, w.a.HostInterface)
		}
	}
	return ""
}

// answerBefore is how long before the plugin's patience ends it gets its refusal.
const answerBefore = 200 * time.Millisecond

// Guard implements gate.Handler.
func (e *Engine) Guard(ctx context.Context, a *attachment.Attachment) error {
	if a.Policy != attachment.PolicyEnforce {
		return &gate.Refusal{Reason: fmt.Sprintf("attachment %s has policy %q: nothing to guard", a.Key(), a.Policy)}
	}
	begin := time.Now()
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-min(answerBefore, time.Until(deadline)/4)))
		defer cancel()
	}
	if err := e.wait(ctx, a); err != nil {
		e.Metrics.Refused.Inc()
		e.Log.Warn("refused to guard a pod", "pod", a.Pod.Namespace+"/"+a.Pod.Name, "container", a.ContainerID, "reason", err)
		return &gate.Refusal{Reason: fmt.Sprintf("pod %s/%s is not guarded after %s: %v", a.Pod.Namespace, a.Pod.Name,
			time.Since(begin).Round(time.Millisecond), err)}
	}
	e.Metrics.GuardSeconds.Observe(time.Since(begin).Seconds())
	return nil
}
