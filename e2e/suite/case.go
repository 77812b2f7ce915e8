package suite

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Case is one thing that must hold in a cluster.
type Case struct {
	Name string
	Run  func(ctx context.Context, t *T)
	// Limit is the time that the case may take; 0 means defaultLimit.
	Limit time.Duration
}

const (
	defaultLimit = 8 * time.Minute
	// cleanupLimit is for all that a case registered with Cleanup, together.
	cleanupLimit = 4 * time.Minute
	// describeLimit is for looking at the cluster after a failure.
	describeLimit = time.Minute
	// grace is how long a case may go on after its context has ended before it is left behind.
	grace = 30 * time.Second
)

// T is what a case works with, in the manner of testing.T. Fatalf, Skipf and the helpers that fail end the case and must be
// called in its own goroutine; Logf and Errorf may be called in any.
type T struct {
	Cluster *cluster.Cluster

	name    string
	mu      sync.Mutex
	log     io.Writer
	began   time.Time
	status  Status
	reason  string // the first failure, or why it was skipped
	cleanup []func(ctx context.Context)
	unique  int
}

// Name is the case's.
func (t *T) Name() string { return t.name }

// Logf writes a line into the case's log.
func (t *T) Logf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logf(format, args...)
}

// logf is called with the lock held. Lines carry the time since the case began.
func (t *T) logf(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	fmt.Fprintf(t.log, "%8.3fs  %s\n", time.Since(t.began).Seconds(), strings.ReplaceAll(text, "\n", "\n           "))
}

// Errorf says what is wrong; the case has failed and goes on.
func (t *T) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status != Failed {
		t.status, t.reason = Failed, fmt.Sprintf(format, args...)
	}
	t.logf("FAILED: "+format, args...)
}

// Fatalf says what is wrong and ends the case.
func (t *T) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

// Skipf ends the case and says why it does not apply here.
func (t *T) Skipf(format string, args ...any) {
	t.mu.Lock()
	if t.status != Failed {
		t.status, t.reason = Skipped, fmt.Sprintf(format, args...)
	}
	t.logf("SKIPPED: "+format, args...)
	t.mu.Unlock()
	runtime.Goexit()
}

// Failed reports whether something was wrong so far.
func (t *T) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.status == Failed
}

// Cleanup registers what to do when the case has ended, however it ended; the last is done first.
func (t *T) Cleanup(fn func(ctx context.Context)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanup = append(t.cleanup, fn)
}

// run runs the case's function, and then what it registered, and returns when both have ended or would not end in time.
func (t *T) run(ctx context.Context, c Case) {
	limit := c.Limit
	if limit == 0 {
		limit = defaultLimit
	}
	body, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if !t.guard(body, limit, c.Run) {
		t.Errorf("the case did not end within %v, nor when it was told to", limit)
	}
	if t.Failed() {
		look, cancel := context.WithTimeout(context.WithoutCancel(ctx), describeLimit)
		defer cancel()
		t.guard(look, describeLimit, func(ctx context.Context, t *T) { t.describe(ctx) })
	}
	// Also when the run was interrupted: what a case made in the cluster would spoil the next run.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	for {
		t.mu.Lock()
		last := len(t.cleanup) - 1
		if last < 0 {
			t.mu.Unlock()
			return
		}
		fn := t.cleanup[last]
		t.cleanup = t.cleanup[:last]
		t.mu.Unlock()
		if !t.guard(after, cleanupLimit, func(ctx context.Context, _ *T) { fn(ctx) }) {
			t.Errorf("the clean-up did not end within %v", cleanupLimit)
			return
		}
	}
}

// guard runs fn in a goroutine, so that Fatalf ends it alone, and keeps a panic as a failure. It returns false if fn did not end
// although its context had: then it is left behind.
func (t *T) guard(ctx context.Context, limit time.Duration, fn func(context.Context, *T)) bool {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer func() {
			if p := recover(); p != nil {
				stack := make([]byte, 64<<10)
				t.Errorf("panic: %v", p)
				t.Logf("%s", stack[:runtime.Stack(stack, false)])
			}
		}()
		fn(ctx, t)
	}()
	select {
	case <-ended:
		return true
	case <-ctx.Done():
	case <-time.After(limit):
	}
	select {
	case <-ended:
		return true
	case <-time.After(grace):
		return false
	}
}

// logFile makes the case's log, named after it.
func logFile(folder, suite, name string) (*os.File, error) {
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-':
			return r
		}
		return '-'
	}, suite+"-"+name)
	if len(safe) > 120 {
		safe = safe[:120]
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder of logs: %w", err)
	}
	return os.Create(folder + "/" + safe + ".log")
}
