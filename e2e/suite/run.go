package suite

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"time"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Runner runs cases in a cluster.
type Runner struct {
	Suite    string
	Cluster  *cluster.Cluster
	Logs     string         // a folder: every case has a file in it
	Focus    *regexp.Regexp // matched with "suite: case"; nil means every case
	Progress io.Writer      // gets a line when a case begins and when it ends; nil means none
}

// Run runs the cases that Focus selects, one after the other, each whatever became of those before it. When ctx ends, the running
// case is told so, and the rest has failed.
func (r Runner) Run(ctx context.Context, cases []Case) []Result {
	var results []Result
	for _, c := range cases {
		if r.Focus != nil && !r.Focus.MatchString(r.Suite+": "+c.Name) {
			continue
		}
		result := Result{Suite: r.Suite, Name: c.Name, Status: Failed, Reason: "the run was interrupted"}
		if ctx.Err() == nil {
			r.say("%s: %s ...\n", r.Suite, c.Name)
			result = r.one(ctx, c)
			r.say("%s: %s: %s, %s\n", r.Suite, c.Name, result.Status, seconds(result.Time))
			if result.Status != Passed {
				r.say("    %s\n", result.Reason)
			}
		}
		results = append(results, result)
	}
	return results
}

func (r Runner) say(format string, args ...any) {
	if r.Progress != nil {
		fmt.Fprintf(r.Progress, format, args...)
	}
}

// one runs a case and says how it ended.
func (r Runner) one(ctx context.Context, c Case) Result {
	result := Result{Suite: r.Suite, Name: c.Name, Status: Failed}
	log, err := logFile(r.Logs, r.Suite, c.Name)
	if err != nil {
		result.Reason = fmt.Sprintf("make the case's log: %v", err)
		return result
	}
	t := &T{Cluster: r.Cluster, name: c.Name, log: log, began: time.Now(), status: Passed}
	t.run(ctx, c)
	t.mu.Lock()
	defer t.mu.Unlock()
	// A case that was left behind may still write: from here on into nothing.
	t.log = io.Discard
	log.Close()
	result.Status, result.Reason, result.Time, result.Log = t.status, t.reason, time.Since(t.began), log.Name()
	return result
}
