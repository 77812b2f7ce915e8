package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

const (
	soon  = 5 * time.Second        // within which what must work does
	never = 300 * time.Millisecond // during which what must not does not
)

// call runs the plugin's binary as a runtime does: a command, a configuration, and CNI_ variables.
func call(t *testing.T, n *testnode.Node, command, config string, env ...string) (string, *types.Error) {
	t.Helper()
	cmd := n.NS.Command(context.Background(), nettest.Build(t, "plugin"))
	cmd.Env = append([]string{"CNI_COMMAND=" + command, "CNI_PATH=" + n.BinDir, "PATH=" + os.Getenv("PATH")}, env...)
	cmd.Stdin = strings.NewReader(config)
	var out bytes.Buffer
	cmd.Stdout = &out
	err := cmd.Run()
	if err == nil {
		return out.String(), nil
	}
	var cniErr types.Error
	if decode := json.Unmarshal(out.Bytes(), &cniErr); decode != nil {
		t.Fatalf("%s: %v, and stdout is no error of the specification: %s", command, err, out.String())
	}
	return "", &cniErr
}

// alone is a configuration for use without Kubernetes.
func alone(n *testnode.Node, version string, more ...string) string {
	return fmt.Sprintf(`{"cniVersion": %q, "name": "alone", "type": "postern", "policy": "none", "stateDir": %q,
		"iptablesBackend": "nft", "ipam": {"ranges": [{"subnet": "10.9.0.0/24"}]}%s}`, version, n.StateDir, strings.Join(more, ""))
}

func container(ns *nettest.NS, id string) []string {
	return []string{"CNI_CONTAINERID=" + id, "CNI_NETNS=" + ns.Path, "CNI_IFNAME=eth0"}
}

// Every version that is announced adds, checks and deletes, in the words of that version; what goes wrong has the code that
// the specification names for it.
func TestCNI1VersionsAndErrorCodes(t *testing.T) {
	n := testnode.New(t, testnode.Options{Policy: attachment.PolicyNone})
	out, err := call(t, n, "VERSION", `{"cniVersion": "1.1.0"}`)
	var versions struct {
		Supported []string `json:"supportedVersions"`
	}
	if decode := json.Unmarshal([]byte(out), &versions); err != nil || decode != nil {
		t.Fatalf("VERSION: %v, %v: %s", err, decode, out)
	}
	if want := []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}; !slices.Equal(versions.Supported, want) {
		t.Errorf("VERSION says %v, want %v", versions.Supported, want)
	}
	for _, v := range versions.Supported {
		box := nettest.NewNS(t, "box")
		env := container(box, "version-"+v)
		out, err := call(t, n, "ADD", alone(n, v), env...)
		if err != nil {
			t.Errorf("ADD, version %s: %v", v, err)
			continue
		}
		var head struct {
			CNIVersion string `json:"cniVersion"`
		}
		if decode := json.Unmarshal([]byte(out), &head); decode != nil || head.CNIVersion != v {
			t.Errorf("ADD, version %s, answers %v in version %q", v, decode, head.CNIVersion)
		}
		if v != "0.3.1" { // which has no CHECK
			if _, err := call(t, n, "CHECK", alone(n, v, `, "prevResult": `, out), env...); err != nil {
				t.Errorf("CHECK, version %s: %v", v, err)
			}
		}
		if _, err := call(t, n, "DEL", alone(n, v), env...); err != nil {
			t.Errorf("DEL, version %s: %v", v, err)
		}
	}
	box := nettest.NewNS(t, "box")
	pod := `CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=uid`
	away := strings.Replace(alone(n, "1.0.0", `, "gateTimeout": "200ms"`), `"policy": "none"`, `"policy": "enforce"`, 1)
	for _, tt := range []struct {
		what, command, config string
		env                   []string
		code                  uint
		says                  []string
	}{
		{"a version of the future", "ADD", alone(n, "9.0.0"), container(box, "c"), types.ErrIncompatibleCNIVersion, nil},
		{"a container ID that is none", "ADD", alone(n, "1.0.0"), container(box, "-c"), types.ErrInvalidEnvironmentVariables,
			[]string{"containerID"}},
		{"no container ID", "DEL", alone(n, "1.0.0"), container(box, "")[1:], types.ErrInvalidEnvironmentVariables,
			[]string{"CNI_CONTAINERID"}},
		{"content that is no JSON", "ADD", `{"cniVersion": "1.0.0", `, container(box, "c"), types.ErrDecodingFailure, nil},
		{"a wrong value", "ADD", alone(n, "1.0.0", `, "mtu": -5`), container(box, "c"), types.ErrInvalidNetworkConfig,
			[]string{"mtu", "-5"}},
		{"policyd away", "ADD", away, append(container(box, "c"), pod), types.ErrTryAgainLater, []string{"policyd", "policyd status"}},
		{"policyd never there", "STATUS", strings.Replace(away, "1.0.0", "1.1.0", 1), nil, 50, []string{"policyd"}},
	} {
		_, err := call(t, n, tt.command, tt.config, tt.env...)
		if err == nil || err.Code != tt.code {
			t.Errorf("%s: %s gives %v, want code %d", tt.what, tt.command, err, tt.code)
			continue
		}
		for _, word := range tt.says {
			if !strings.Contains(err.Msg+err.Details, word) {
				t.Errorf("%s: the error says %q and not %q", tt.what, err.Msg, word)
			}
		}
	}
	// A state folder that cannot be written is an I/O failure.
	blocked := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	broken := strings.Replace(alone(n, "1.0.0"), n.StateDir, blocked, 1)
	if _, err := call(t, n, "DEL", broken, container(box, "c")...); err == nil || err.Code != types.ErrIOFailure {
		t.Errorf("a state folder that is a file: %v, want code %d", err, types.ErrIOFailure)
	}
}

// STATUS is content while policyd is away for less than the grace time, so that its restart takes no node down, and then says
// what is wrong; so it does when a range is full, with the figures.
func TestCNI1StatusAndItsGraceTime(t *testing.T) {
	o := testnode.Options{Conf: map[string]any{"statusGrace": "2s", "gateTimeout": "200ms"}, Ranges: []string{"10.244.1.0/30"}}
	n := testnode.New(t, o)
	code := func(err error) uint {
		var e *types.Error
		if errors.As(err, &e) {
			return e.Code
		}
		return 0
	}
	if err := n.Status(); code(err) != 50 {
		t.Errorf("before policyd ever ran: %v, want code 50", err)
	}
	pod := &testnode.Pod{Namespace: "default", Name: "web", UID: "uid"}
	n.Write(t, "pod.yaml", pod.Manifest(nil))
	d := n.Policyd(t)
	if err := n.Status(); err != nil {
		t.Errorf("with policyd: %v", err)
	}
	n.Attach(t, pod) // the only address that the range has
	if err := n.Status(); code(err) != 50 || !strings.Contains(err.Error(), "10.244.1.0/30") {
		t.Errorf("with a full range: %v, want code 50 and the range's name", err)
	}
	if err := n.Del(pod); err != nil {
		t.Fatal(err)
	}
	n.Configure(t, testnode.Options{Policy: attachment.PolicyEnforce, Backend: "nft", CNIVersion: "1.0.0",
		Ranges: []string{"10.244.2.0/24"}, Conf: o.Conf})
	d.Stop(t, syscall.SIGTERM)
	if err := n.Status(); err != nil {
		t.Errorf("right after policyd's end: %v, want nothing before the grace time is over", err)
	}
	nettest.Eventually(t, 20*time.Second, "STATUS complains", func() error {
		if err := n.Status(); code(err) != 50 {
			return fmt.Errorf("got %v, want code 50", err)
		}
		return nil
	})
}

// previous is a plugin for tests: its result has a second interface, a route and DNS settings.
const previous = `#!/bin/sh
cat >/dev/null
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "net9", "sandbox": "'$CNI_NETNS'"}],
"ips": [{"address": "192.168.9.9/24", "interface": 0}], "routes": [{"dst": "192.168.0.0/16"}], "dns": {"nameservers": ["192.168.9.1"]}}'
`

// After another plugin, the result has both's, the other's first. With another ipam plugin, the addresses are that plugin's, and
// every call goes to it too.
func TestCNI2ChainsAndOtherIPAMPlugins(t *testing.T) {
	n := testnode.New(t, testnode.Options{Policy: attachment.PolicyNone})
	if err := os.WriteFile(filepath.Join(n.BinDir, "previous"), []byte(previous), 0o755); err != nil {
		t.Fatal(err)
	}
	hostLocal := nettest.Build(t, "github.com/containernetworking/plugins/plugins/ipam/host-local")
	if err := os.Symlink(hostLocal, filepath.Join(n.BinDir, "host-local")); err != nil {
		t.Fatal(err)
	}
	box := nettest.NewNS(t, "box")
	prev := `, "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "net9", "sandbox": "` + box.Path + `"}],
		"ips": [{"address": "192.168.9.9/24", "interface": 0}], "routes": [{"dst": "192.168.0.0/16"}],
		"dns": {"nameservers": ["192.168.9.1"]}}`
	out, err := call(t, n, "ADD", alone(n, "1.0.0", prev), container(box, "after")...)
	if err != nil {
		t.Fatal(err)
	}
	r := result(t, out)
	var names []string
	for _, i := range r.Interfaces {
		names = append(names, i.Name)
	}
	if len(names) != 3 || names[0] != "net9" || names[2] != "eth0" || len(r.IPs) != 2 || r.IPs[0].Address.IP.String() != "192.168.9.9" ||
		*r.IPs[1].Interface != 2 || len(r.Routes) != 2 || len(r.DNS.Nameservers) != 1 {
		t.Errorf("after another plugin the result is %s", out)
	}

	conf := strings.Replace(alone(n, "1.1.0"), `"ipam": {"ranges": [{"subnet": "10.9.0.0/24"}]}`,
		fmt.Sprintf(`"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.77.0.0/29"}], [{"subnet": "fd00:77::/64"}]],
		"routes": [{"dst": "0.0.0.0/0"}]}`, filepath.Join(n.StateDir, "host-local")), 1)
	held := func() int {
		files, err := filepath.Glob(filepath.Join(n.StateDir, "host-local", "alone", "10.77.*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	other := nettest.NewNS(t, "other")
	if out, err = call(t, n, "ADD", conf, container(other, "delegated")...); err != nil {
		t.Fatal(err)
	}
	r = result(t, out)
	if len(r.IPs) != 2 || !strings.HasPrefix(r.IPs[0].Address.String(), "10.77.0.") || held() != 1 {
		t.Errorf("with host-local: %s; it holds %d addresses", out, held())
	}
	addr, _ := netip.AddrFromSlice(r.IPs[0].Address.IP.To4())
	at := nettest.TCPServer(t, other, netip.AddrPortFrom(addr, 0))
	if err := nettest.Dial(n.NS, "tcp", netip.AddrPort{}, at, soon); err != nil {
		t.Errorf("the node to the pod with host-local's address: %v", err)
	}
	if _, err := call(t, n, "CHECK", conf[:len(conf)-1]+`, "prevResult": `+out+`}`, container(other, "delegated")...); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if _, err := call(t, n, "STATUS", conf); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	gone := conf[:len(conf)-1] + `, "cni.dev/valid-attachments": []}`
	if _, err := call(t, n, "GC", gone); err != nil || held() != 0 {
		t.Errorf("GC of all: %v; host-local still holds %d addresses", err, held())
	}
	if _, err := call(t, n, "ADD", conf, container(nettest.NewNS(t, "third"), "third")...); err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, n, "DEL", conf, container(other, "third")...); err != nil || held() != 0 {
		t.Errorf("DEL: %v; host-local still holds %d addresses", err, held())
	}
}

func result(t *testing.T, text string) *types100.Result {
	t.Helper()
	r, err := types100.NewResult([]byte(text))
	if err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	got, err := types100.GetResult(r)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// Keys of the runtime's that the plugin does not know are passed over. Wrong values are refused all at once, each with its
// key, its value and what is allowed, and nothing is changed.
func TestCNI3UnknownKeysPassAndWrongValuesAreRefused(t *testing.T) {
	n := testnode.New(t, testnode.Options{Policy: attachment.PolicyNone})
	box := nettest.NewNS(t, "box")
	more := `, "disableCheck": false, "cni.dev/attachments": [], "vendor.example/key": {"a": 1}, "args": {"cni": {"labels": []}},
		"runtimeConfig": {"bandwidth": {}, "dns": {}}`
	if _, err := call(t, n, "ADD", alone(n, "1.0.0", more), container(box, "known")...); err != nil {
		t.Errorf("with keys of a runtime's: %v", err)
	}
	bad := `, "mtu": 10, "gateTimeout": "soon", "hostPortConflict": "maybe", "runtimeConfig": {"portMappings":
		[{"hostPort": 70000, "containerPort": 80, "protocol": "icmp"}]}`
	_, err := call(t, n, "ADD", alone(n, "1.0.0", bad), container(nettest.NewNS(t, "box"), "bad")...)
	if err == nil || err.Code != types.ErrInvalidNetworkConfig {
		t.Fatalf("wrong values: %v, want code %d", err, types.ErrInvalidNetworkConfig)
	}
	for _, word := range []string{"mtu", "10", "gateTimeout", "soon", "hostPortConflict", "maybe", `"refuse"`, "70000", "icmp"} {
		if !strings.Contains(err.Msg+err.Details, word) {
			t.Errorf("the error does not say %q: %s %s", word, err.Msg, err.Details)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(n.StateDir, "attachments", "bad@*")); len(files) != 0 {
		t.Errorf("a refused ADD left %v", files)
	}
}

// Twenty pods at once, each with two interfaces, all get addresses of their own and reach each other.
func TestCNI4TwentyADDsAtOnceAndTwoInterfaces(t *testing.T) {
	n := testnode.New(t, testnode.Options{})
	const pods = 20
	var all [pods][2]*testnode.Pod
	var manifests strings.Builder
	for i := range all {
		first := &testnode.Pod{Namespace: "default", Name: fmt.Sprintf("pod-%02d", i), UID: fmt.Sprintf("uid-%02d", i)}
		n.Sandbox(t, first)
		second := *first
		second.IfName = "net1"
		all[i] = [2]*testnode.Pod{first, &second}
		manifests.WriteString(first.Manifest(nil))
	}
	n.Write(t, "pods.yaml", manifests.String())
	n.Policyd(t)
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() {
			for _, p := range all[i] {
				if err := n.Add(p); err != nil {
					t.Errorf("ADD %s %s: %v", p.Name, p.IfName, err)
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	seen := map[netip.Addr]string{}
	for i := range all {
		for _, p := range all[i] {
			for _, like := range []netip.Addr{testnode.Node4, testnode.Node6} {
				a := p.IP(t, like)
				if other, twice := seen[a]; twice {
					t.Errorf("%s has the address %s of %s", p.Name, a, other)
				}
				seen[a] = p.Name
				at := nettest.TCPServer(t, p.NS, netip.AddrPortFrom(a, 0))
				for _, from := range []*nettest.NS{n.NS, n.Outside, all[(i+1)%pods][0].NS} {
					if err := nettest.Dial(from, "tcp", netip.AddrPort{}, at, soon); err != nil {
						t.Errorf("to %s %s: %v", p.Name, p.IfName, err)
					}
				}
			}
			if err := n.Check(p); err != nil {
				t.Errorf("CHECK %s %s: %v", p.Name, p.IfName, err)
			}
		}
	}
	for i := range all {
		for _, p := range all[i] {
			if err := n.Del(p); err != nil {
				t.Errorf("DEL %s %s: %v", p.Name, p.IfName, err)
			}
		}
	}
	if links := n.NS.Run(t, "ip", "-o", "link"); strings.Contains(links, attachment.GuardedPrefix) {
		t.Errorf("links are left:\n%s", links)
	}
}

// A runtime that makes a pod's sandbox anew may delete the old one late, and again and again: the new one keeps its link,
// addresses and ports.
func TestCNI5ALateDELTouchesOnlyItsOwnSandbox(t *testing.T) {
	n := testnode.New(t, testnode.Options{})
	ports := []attachment.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	old := &testnode.Pod{Namespace: "default", Name: "web", UID: "uid-web", ContainerID: "old", Ports: ports}
	n.Write(t, "pod.yaml", old.Manifest(nil))
	n.Policyd(t)
	n.Attach(t, old)
	old.NS.Remove(t) // the sandbox has died
	fresh := n.Attach(t, &testnode.Pod{Namespace: "default", Name: "web", UID: "uid-web", ContainerID: "new", Ports: ports})
	for range 2 {
		if err := n.Del(old); err != nil {
			t.Errorf("the late DEL: %v", err)
		}
	}
	if err := n.Check(fresh); err != nil {
		t.Errorf("CHECK of the new sandbox: %v", err)
	}
	for _, like := range []netip.Addr{testnode.Node4, testnode.Node6} {
		nettest.TCPServer(t, fresh.NS, netip.AddrPortFrom(fresh.IP(t, like), 80))
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(fresh.IP(t, like), 80), netip.AddrPortFrom(like, 8080)} {
			if err := nettest.Dial(n.Outside, "tcp", netip.AddrPort{}, to, soon); err != nil {
				t.Errorf("the new sandbox at %s: %v", to, err)
			}
		}
	}
}
