package control

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// profiles is the folder, in that of the benchmark, with what pprof says of rows that fall short.
const profiles = "profiles"

// profile is the page with what policyd's CPU does from now on, for a time.
func (c *cluster) profile(seconds int) string {
	if c.env.Quick {
		seconds = 2
	}
	return fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds)
}

// Seconds of a profile: beyond policyd's repair interval, where it does little else.
const (
	busySeconds = 5
	idleSeconds = 12
)

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
func (c *cluster) explain(ctx context.Context, name string, seconds int, again func(context.Context) error) error {
	lines := c.report.Lines
	if len(lines) == 0 || !c.short(lines[len(lines)-1].Row) {
		return nil
	}
	return c.during(ctx, fmt.Sprintf("%s-%d.cpu", name, c.plan.Pods), c.profile(seconds), again)
}

// during saves a page of policyd's pprof while something is done again and again.
func (c *cluster) during(ctx context.Context, name, page string, again func(context.Context) error) error {
	done := make(chan error, 1)
	go func() { done <- c.save(ctx, name, page) }()
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
		err = c.save(ctx, fmt.Sprintf("start-%s-%d.cpu", c.backend, c.plan.Pods), c.profile(busySeconds))
	}
	if err == nil {
		err = c.ready(ctx)
	}
	return err
}
