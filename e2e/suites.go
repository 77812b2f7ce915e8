package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-cni/postern/e2e/cluster"
	"github.com/postern-cni/postern/e2e/suite"
)

// aSuite is one of those that a run consists of.
type aSuite struct {
	name string // for SUITES
	long string // for the table
	run  func(ctx context.Context, r suite.Runner) []suite.Result
}

func all() []aSuite {
	upstream := func(u suite.Upstream) func(context.Context, suite.Runner) []suite.Result {
		return func(ctx context.Context, r suite.Runner) []suite.Result { return r.Upstream(ctx, u) }
	}
	own := func(cases []suite.Case) func(context.Context, suite.Runner) []suite.Result {
		return func(ctx context.Context, r suite.Runner) []suite.Result { return r.Run(ctx, cases) }
	}
	sctp := map[string]string{`using SCTP|SCTPConnectivity`: suite.NoSCTP()}
	return []aSuite{
		{"networkpolicy", "upstream NetworkPolicy", upstream(suite.Upstream{Focus: `NetworkPolicy`, Cannot: sctp, Procs: 4})},
		{"hostport", "upstream HostPort", upstream(suite.Upstream{Focus: `HostPort`, Cannot: sctp, Procs: 1})},
		{"conformance", "upstream [sig-network] Conformance",
			upstream(suite.Upstream{Focus: `\[sig-network\].*\[Conformance\]`, Cannot: sctp, Procs: 4})},
		{"walkthrough", "walkthrough", own(suite.Walkthrough())},
		{"own", "a cluster's life", own(suite.Own())},
		{"docs", "documentation", own(suite.Docs())},
	}
}

// chosen are the suites that SUITES names; all without.
func chosen() ([]aSuite, error) {
	suites := all()
	wanted := strings.FieldsFunc(os.Getenv("SUITES"), func(r rune) bool { return r == ' ' || r == ',' })
	if len(wanted) == 0 {
		return suites, nil
	}
	var names []string
	for _, s := range suites {
		names = append(names, s.name)
	}
	for _, name := range wanted {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("SUITES: there is no %q: %s", name, strings.Join(names, ", "))
		}
	}
	return slices.DeleteFunc(suites, func(s aSuite) bool { return !slices.Contains(wanted, s.name) }), nil
}

// suites runs what is chosen, prints the table, and fails if a case did.
func (e env) suites(ctx context.Context, _ []string) (err error) {
	suites, err := chosen()
	if err != nil {
		return err
	}
	var focus *regexp.Regexp
	if text := os.Getenv("FOCUS"); text != "" {
		if focus, err = regexp.Compile(text); err != nil {
			return fmt.Errorf("FOCUS=%s: %w", text, err)
		}
	}
	c, openErr := cluster.Open(e.dir, e.source, e.say)
	if openErr == nil {
		if err := usable(c); err != nil {
			return err
		}
	} else {
		if c, err = e.up(ctx); err != nil {
			return err
		}
		defer func() {
			e.say("taking the cluster down; logs stay in %s", filepath.Join(e.dir, "log"))
			err = errors.Join(err, c.Down())
		}()
	}
	if !c.Installed() {
		took, err := c.Install(ctx)
		if err != nil {
			return err
		}
		e.say("postern is installed; all nodes were Ready %.1f s after kubectl apply", took.Seconds())
	}
	if err := c.DNSReady(ctx); err != nil {
		return err
	}
	began := time.Now()
	var results []suite.Result
	for _, s := range suites {
		results = append(results, s.run(ctx, suite.Runner{
			Suite: s.long, Cluster: c, Logs: filepath.Join(e.dir, "log"),
			Focus: focus, Progress: os.Stdout,
		})...)
	}
	fmt.Printf("\n%s, %s\n\n", c.Config, time.Since(began).Round(time.Second))
	suite.Table(os.Stdout, results)
	if suite.AnyFailed(results) {
		return errors.New("not everything passed")
	}
	if len(results) == 0 {
		return errors.New("FOCUS selects nothing")
	}
	return nil
}

// usable says why a cluster that is noted as up is not what the environment asks for.
func usable(c *cluster.Cluster) error {
	if !c.Running() {
		return errors.New("a cluster was up, and some of it has ended since: take the rest down with `make e2e-down`")
	}
	return differs(c.Config, os.Getenv)
}

// differs says which variables ask for another cluster than there is. One that is not set asks for nothing.
func differs(c cluster.Config, getenv func(string) string) error {
	var errs []error
	for _, have := range []struct{ variable, value string }{
		{"NODES", strconv.Itoa(c.Nodes)}, {"BACKEND", c.Backend}, {"FAMILY", c.Family}, {"PROXY", c.Proxy}, {"TUNNEL", c.Tunnel},
	} {
		if wanted := getenv(have.variable); wanted != "" && wanted != have.value {
			errs = append(errs, fmt.Errorf("the cluster that is up has %s=%s, not %s: take it down first with `make e2e-down`",
				have.variable, have.value, wanted))
		}
	}
	return errors.Join(errs...)
}
