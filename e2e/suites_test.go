package main

import (
	"strings"
	"testing"

	"github.com/postern-cni/postern/e2e/cluster"
)

func TestAClusterThatIsUpIsUsedOnlyIfItIsTheOneAskedFor(t *testing.T) {
	have, err := cluster.Config{Backend: "legacy"}.Complete()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		env  map[string]string
		says []string // what the error names; none: no error
	}{
		{nil, nil},
		{map[string]string{"BACKEND": "legacy", "NODES": "3"}, nil},
		{map[string]string{"FAMILY": "dual"}, []string{"FAMILY=ipv4, not dual"}},
		{map[string]string{"BACKEND": "nft", "NODES": "2", "PROXY": "iptables"}, []string{"BACKEND=legacy, not nft", "NODES=3, not 2"}},
	} {
		err := differs(have, func(variable string) string { return tt.env[variable] })
		if (err != nil) != (tt.says != nil) {
			t.Errorf("%v: %v", tt.env, err)
		}
		for _, words := range tt.says {
			if err == nil || !strings.Contains(err.Error(), words) {
				t.Errorf("%v: %v does not say %q", tt.env, err, words)
			}
		}
	}
}
