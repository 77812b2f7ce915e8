package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
	"github.com/postern-cni/postern/pkg/nodenet"
)

// Without --node-network too, where Services would go around policies, policyd says so and is not ready, until that has gone.
func TestIPVSIsFoundWhoeverKeepsTheNetwork(t *testing.T) {
	n := testnode.New(t, testnode.Options{})
	nettest.Link(t, nettest.End{NS: n.NS, Name: "kube-ipvs0"}, nettest.End{NS: n.Outside, Name: "other"})
	d := n.Policyd(t)
	policyd := nettest.Build(t, "policyd")
	status := func() (s nodeStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(n.NS.Run(t, policyd, "status", "--json", "--state-dir", n.StateDir)), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	nettest.Eventually(t, 30*time.Second, "the finding", func() error {
		if s := status(); len(s.Findings) != 1 || s.Findings[0].Kind != nodenet.IPVS || s.NodeNotReady != s.Findings[0].What {
			return errors.New(s.NodeNotReady)
		}
		return nil
	})
	if out := n.NS.Run(t, policyd, "status", "--state-dir", n.StateDir); !strings.Contains(out, "NOT READY for pods: kube-proxy is in IPVS") {
		t.Errorf("policyd status says\n%s", out)
	}
	if !strings.Contains(d.Log(), "kind=ipvs") {
		t.Error("the log says nothing")
	}
	n.NS.Run(t, "ip", "link", "del", "kube-ipvs0")
	nettest.Eventually(t, 30*time.Second, "the end of it", func() error {
		if s := status(); len(s.Findings) > 0 || s.NodeNotReady != "" {
			return errors.New(s.NodeNotReady)
		}
		return nil
	})
	n.StopPolicyd(t)

	nettest.Link(t, nettest.End{NS: n.NS, Name: "kube-ipvs0"}, nettest.End{NS: n.Outside, Name: "other"})
	n.Policyd(t, "--allow-ipvs")
	nettest.Eventually(t, 30*time.Second, "readiness beside IPVS", func() error {
		if s := status(); len(s.Findings) != 1 || s.NodeNotReady != "" {
			return errors.New(s.NodeNotReady)
		}
		return nil
	})
	if out := n.NS.Run(t, policyd, "status", "--state-dir", n.StateDir); !strings.Contains(out, "finding ipvs: kube-proxy") {
		t.Errorf("policyd status says\n%s", out)
	}
}
