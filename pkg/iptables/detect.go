package iptables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/postern-cni/postern/pkg/rule"
)

// Detect finds the backend that the node's other software uses, as the Kubernetes project's iptables-wrapper does: the one
// in which kubelet has left its hint chains; else the one with more rules; else nft where it is installed.
func Detect(ctx context.Context) (Backend, error) {
	best, most := Backend(""), -1
	for _, b := range []Backend{NFT, Legacy} {
		rules, hint, err := look(ctx, b)
		switch {
		case err != nil:
			continue
		case hint:
			return b, nil
		case rules > most:
			best, most = b, rules
		}
	}
	if best == "" {
		return "", fmt.Errorf("no iptables backend works: neither iptables-nft-save nor iptables-legacy-save runs; install iptables")
	}
	return best, nil
}

// Rules counts the rules that a backend holds, of both families. Where legacy has no table, no program is started to say so.
func Rules(ctx context.Context, b Backend) (int, error) {
	if b == Legacy {
		v4, err := legacyTables(rule.IPv4)
		v6, err2 := legacyTables(rule.IPv6)
		if err := errors.Join(err, err2); err != nil || len(v4)+len(v6) == 0 {
			return 0, err
		}
	}
	rules, _, err := look(ctx, b)
	return rules, err
}

// look counts a backend's rules in both families and looks for kubelet's chains (KEP-3178).
func look(ctx context.Context, b Backend) (rules int, hint bool, err error) {
	for _, program := range []string{"iptables-" + string(b) + "-save", "ip6tables-" + string(b) + "-save"} {
		out, err := exec.CommandContext(ctx, program).Output()
		if err != nil {
			return 0, false, err
		}
		for line := range strings.Lines(string(out)) {
			hint = hint || strings.HasPrefix(line, ":KUBE-IPTABLES-HINT") || strings.HasPrefix(line, ":KUBE-KUBELET-CANARY")
			if strings.HasPrefix(line, "-A") {
				rules++
			}
		}
	}
	return rules, hint, nil
}
