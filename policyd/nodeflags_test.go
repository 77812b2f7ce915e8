package main

import (
	"flag"
	"io"
	"strings"
	"testing"
)

func TestFlagsOfNodeNetworkingAreCheckedAllAtOnce(t *testing.T) {
	for _, tt := range []struct {
		args string
		want []string // parts of problems, one each
	}{
		{"", nil},
		{"--node-network --tunnel=always --no-masquerade=0.0.0.0/0,::/0 --cni-conf= --allow-ipvs --families=ipv4,ipv6", nil},
		{"--tunnel=yes --tunnel-port=0 --tunnel-vni=16777216 --no-masquerade=192.0.2.0/24,192.0.2.1 --cni-conf=net.d/a --cni-bin-dir=bin " +
			"--cni-network=a/b --cni-plugin=/nowhere --families=ipv4,ipv5", []string{`--families: "ipv5"`, `--tunnel "yes"`, "--tunnel-port 0", "--tunnel-vni 16777216", `"192.0.2.1"`,
			`--cni-conf "net.d/a"`, `--cni-bin-dir "bin"`, `--cni-network "a/b"`, `--cni-plugin "/nowhere"`}},
		{"--tunnel-port=65536 --no-masquerade=::ffff:192.0.2.0/120", []string{"--tunnel-port 65536", "--no-masquerade"}},
		{"--cni-plugin=/", []string{`--cni-plugin "/"`}},
	} {
		var o nodeOptions
		flags := flag.NewFlagSet("run", flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		o.register(flags)
		if err := flags.Parse(strings.Fields(tt.args)); err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		problems := o.check()
		all := strings.Join(problems, "\n")
		if len(problems) != len(tt.want) {
			t.Errorf("%s: problems\n%s\nwant %q", tt.args, all, tt.want)
		}
		for _, part := range tt.want {
			if !strings.Contains(all, part) {
				t.Errorf("%s: problems\n%s\nlack %s", tt.args, all, part)
			}
		}
	}
}
