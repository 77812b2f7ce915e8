package control

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// profiles is the folder, in that of the benchmark, with what pprof says of rows that fall short.
const profiles = "profiles"

// profileTime is how long policyd's CPU is looked at.
const profileTime = 5 * time.Second

// save keeps a page of policyd's pprof.
func (c *cluster) save(ctx context.Context, name, page string) error {
	body, err := c.get(ctx, page)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.env.Dir, profiles)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	c.env.Say("%s: the profile of what falls short is in %s", c.backend, filepath.Join(dir, name))
	return os.WriteFile(filepath.Join(dir, name), body, 0o644)
}

// explain looks at policyd's CPU while something is done again and again, if the last line that was added falls short.
func (c *cluster) explain(ctx context.Context, name string, lines []table.Line, again func(context.Context) error) error {
	if len(lines) == 0 || !c.short(lines, lines[len(lines)-1].Row) {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		done <- c.save(ctx, fmt.Sprintf("%s-%d.cpu", name, c.plan.Pods), fmt.Sprintf("/debug/pprof/profile?seconds=%d", int(profileTime.Seconds())))
	}()
	for {
		select {
		case err := <-done:
			return err
		default:
		}
		if err := again(ctx); err != nil {
			return err
		}
	}
}

// profileStart starts policyd and looks at its CPU from the beginning.
func (c *cluster) profileStart(ctx context.Context) error {
	var err error
	if c.policyd, err = c.node.StartPolicyd(ctx, "--kubeconfig", c.server.Kubeconfig, "--pprof"); err != nil {
		return err
	}
	for begin := time.Now(); time.Since(begin) < stepLimit; {
		if _, err = c.get(ctx, "/healthz"); err == nil {
			break
		}
	}
	if err == nil {
		err = c.save(ctx, fmt.Sprintf("start-%s-%d.cpu", c.backend, c.plan.Pods), fmt.Sprintf("/debug/pprof/profile?seconds=%d",
			int(profileTime.Seconds())))
	}
	if err == nil {
		err = c.ready(ctx)
	}
	return err
}
