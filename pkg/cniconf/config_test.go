package cniconf

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/ipam"
)

const minimal = `{"cniVersion":"1.0.0","name":"pods","type":"postern","ipam":{"ranges":[{"subnet":"10.244.1.0/24"}]}}`

func goodEnv() Environment {
	return Environment{Command: "ADD", ContainerID: "abc", NetNS: "/run/netns/a", IfName: "eth0",
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7f0e;K8S_POD_INFRA_CONTAINER_ID=abc"}
}

// with returns the minimal configuration with one key set ("ipam.ranges" for a key of an object).
func with(t testing.TB, key, value string) []byte {
	t.Helper()
	var conf map[string]any
	if err := json.Unmarshal([]byte(minimal), &conf); err != nil {
		t.Fatal(err)
	}
	at := conf
	path := strings.Split(key, "/")
	for _, part := range path[:len(path)-1] {
		next, ok := at[part].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[part] = next
		}
		at = next
	}
	at[path[len(path)-1]] = json.RawMessage(value)
	data, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestDefaults(t *testing.T) {
	c, err := Parse([]byte(minimal), goodEnv())
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		CNIVersion: "1.0.0", Name: "pods", Type: "postern", Stdin: []byte(minimal),
		ContainerID: "abc", NetNS: "/run/netns/a", IfName: "eth0",
		Pod:    attachment.Pod{Namespace: "shop", Name: "web-0", UID: "7f0e"},
		Policy: attachment.PolicyEnforce, StateDir: "/run/postern", GateTimeout: 10 * time.Second, StatusGrace: time.Minute,
		IPTablesBackend: BackendAuto, HostPortConflict: ConflictRefuse,
		IPAM: IPAM{Type: OwnIPAM, ReuseAfter: time.Minute, Ranges: []ipam.Range{{Subnet: netip.MustParsePrefix("10.244.1.0/24")}}},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestEveryKeyIsRead(t *testing.T) {
	conf := `{"cniVersion":"1.1.0","cniVersions":["1.0.0","1.1.0"],"name":"pods","type":"postern","policy":"none","mtu":1400,
		"stateDir":"/var/lib/p/","gateTimeout":"5s","statusGrace":"0s","nodeAddresses":["192.0.2.1","2001:db8::1"],
		"iptablesBackend":"legacy","hostPortConflict":"ignore","dns":{"nameservers":["10.96.0.10"]},
			"capabilities":{"portMappings":true},
		"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"TCP","hostIP":"::"},
			{"hostPort":80,"containerPort":8080,"protocol":"tcp","hostIP":"::"},{"hostPort":53,"containerPort":53,"protocol":"udp",
				"hostIP":""}]},
		"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.9.0.2/24"}]},
		"ipam":{"type":"postern","reuseAfter":"30s","routes":[{"dst":"10.96.0.5/12"}],"ranges":[
			{"subnet":"10.244.1.7/24","rangeStart":"10.244.1.10","rangeEnd":"10.244.1.20","gateway":"10.244.1.1",
				"exclude":["10.244.1.12","10.244.1.16/30"]},
			{"subnet":"fd00:1::/64"}]},
		"cni.dev/valid-attachments":[{"containerID":"abc","ifname":"eth0"}],"somebody/else":{"x":1}}`
	c, err := ParseNetwork([]byte(conf))
	if err != nil {
		t.Fatal(err)
	}
	if c.PrevResult == nil || c.PrevResult.IPs[0].Address.String() != "10.9.0.2/24" {
		t.Errorf("prevResult %v", c.PrevResult)
	}
	c.PrevResult, c.Stdin = nil, nil
	p := netip.MustParsePrefix
	a := netip.MustParseAddr
	want := &Config{
		CNIVersion: "1.1.0", Name: "pods", Type: "postern", Policy: attachment.PolicyNone, MTU: 1400, StateDir: "/var/lib/p",
		GateTimeout: 5 * time.Second, NodeAddresses: []netip.Addr{a("192.0.2.1"), a("2001:db8::1")},
		IPTablesBackend: BackendLegacy, HostPortConflict: ConflictIgnore, DNS: types.DNS{Nameservers: []string{"10.96.0.10"}},
		PortMappings: []attachment.PortMapping{{HostPort: 80, ContainerPort: 8080, Protocol: "tcp", HostIP: a("::")},
			{HostPort: 53, ContainerPort: 53, Protocol: "udp"}},
		IPAM: IPAM{Type: OwnIPAM, ReuseAfter: 30 * time.Second, Routes: []netip.Prefix{p("10.96.0.0/12")}, Ranges: []ipam.Range{
			{Subnet: p("10.244.1.0/24"), Start: a("10.244.1.10"), End: a("10.244.1.20"), Gateway: a("10.244.1.1"),
				Exclude: []netip.Prefix{p("10.244.1.12/32"), p("10.244.1.16/30")}},
			{Subnet: p("fd00:1::/64")}}},
		ValidAttachments: []attachment.Key{{ContainerID: "abc", IfName: "eth0"}},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestPortMappingsAreReadAsRuntimesWriteThem(t *testing.T) {
	want := []attachment.PortMapping{{HostPort: 9000, ContainerPort: 8080, Protocol: "tcp"}}
	for runtime, mapping := range map[string]string{
		"containerd": `{"HostPort":9000,"ContainerPort":8080,"Protocol":"tcp","HostIP":""}`,
		"CRI-O":      `{"hostPort":9000,"containerPort":8080,"protocol":"tcp","hostIP":""}`,
		"both":       `{"hostPort":9000,"HostPort":1,"ContainerPort":8080,"containerport":2}`,
	} {
		c, err := ParseNetwork([]byte(with(t, "runtimeConfig/portMappings", "["+mapping+"]")))
		if err != nil {
			t.Errorf("%s: %v", runtime, err)
		} else if !reflect.DeepEqual(c.PortMappings, want) {
			t.Errorf("%s: got %+v, want %+v", runtime, c.PortMappings, want)
		}
	}
	_, err := ParseNetwork([]byte(with(t, "runtimeConfig/portMappings", `[{"HostPort":0,"ContainerPort":8080}]`)))
	if err == nil || !strings.Contains(err.Error(), "hostPort: 0") {
		t.Errorf("a wrong port under another name: %v", err)
	}
}

// mustRefuse checks the code, and that the message names the key.
func mustRefuse(t *testing.T, err error, code uint, parts ...string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want an error of code %d", err, code)
		return
	}
	if e.Code != code {
		t.Errorf("code %d, want %d: %v", e.Code, code, e)
	}
	for _, part := range parts {
		if !strings.Contains(e.Details, part) {
			t.Errorf("%q does not say %q", e.Details, part)
		}
	}
}

// The key of a case is where it is set; the second column what the message must begin with.
func TestEveryWrongValueOfTheConfigurationIsRefusedByItsKey(t *testing.T) {
	for _, tt := range []struct {
		key, says string
		values    []string
		code      uint
	}{
		{"cniVersion", "cniVersion: ", []string{`"0.2.0"`, `"9.9.9"`, `""`, `null`}, 1},
		{"cniVersion", "cniVersion: ", []string{`1`, `[]`}, 7},
		{"name", "name: ", []string{`""`, `"../x"`, `"a b"`, `".x"`, `7`, `null`, `"` + strings.Repeat("n", 201) + `"`}, 7},
		{"type", "type: ", []string{`{}`}, 7},
		{"policy", "policy: ", []string{`"off"`, `""`, `true`}, 7},
		{"mtu", "mtu: ", []string{`-1`, `67`, `65536`, `"1500"`, `1.5`, `1e30`}, 7},
		{"stateDir", "stateDir: ", []string{`""`, `"run"`, `"/run/../etc"`, `"/"`, `3`, `"/a//b"`, `"/a\u0000"`}, 7},
		{"gateTimeout", "gateTimeout: ", []string{`"0s"`, `"10"`, `10`, `"-1s"`, `"25h"`, `""`}, 7},
		{"statusGrace", "statusGrace: ", []string{`"-1s"`, `"x"`, `60`}, 7},
		{"nodeAddresses", "nodeAddresses: ", []string{`"10.0.0.1"`, `[1]`}, 7},
		{"nodeAddresses", "nodeAddresses[0]: ", []string{`["x"]`, `["0.0.0.0"]`, `["127.0.0.1"]`, `["fe80::1"]`,
			`["fd00::1%eth0"]`, `[""]`}, 7},
		{"nodeAddresses", "nodeAddresses[1]: ", []string{`["10.0.0.1","10.0.0.2"]`}, 7},
		{"iptablesBackend", "iptablesBackend: ", []string{`"nftables"`, `1`}, 7},
		{"hostPortConflict", "hostPortConflict: ", []string{`"allow"`, `false`}, 7},
		{"dns", "dns: ", []string{`"10.0.0.1"`, `{"nameservers":"x"}`}, 7},
		{"runtimeConfig", "runtimeConfig: ", []string{`[]`, `"x"`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings: ", []string{`{}`, `1`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[0]: ", []string{`[1]`, `[null]`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[0].hostPort: ", []string{`[{"containerPort":1}]`,
			`[{"hostPort":0,"containerPort":1}]`, `[{"hostPort":65536,"containerPort":1}]`,
			`[{"hostPort":"80","containerPort":1}]`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[0].containerPort: ", []string{`[{"hostPort":1}]`,
			`[{"hostPort":1,"containerPort":-1}]`, `[{"hostPort":1,"containerPort":65536}]`,
			`[{"hostPort":1,"containerPort":1.5}]`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[0].protocol: ", []string{
			`[{"hostPort":1,"containerPort":1,"protocol":"icmp"}]`, `[{"hostPort":1,"containerPort":1,"protocol":6}]`,
			`[{"hostPort":1,"containerPort":1,"protocol":""}]`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[0].hostIP: ", []string{
			`[{"hostPort":1,"containerPort":1,"hostIP":"any"}]`, `[{"hostPort":1,"containerPort":1,"hostIP":"fe80::1%x"}]`}, 7},
		{"runtimeConfig/portMappings", "runtimeConfig.portMappings[1].hostPort: ", []string{
			`[{"hostPort":1,"containerPort":1},{"hostPort":1,"containerPort":2}]`}, 7},
		{"prevResult", "prevResult: ", []string{`[]`, `{"ips":"x"}`, `"x"`}, 7},
		{"ipam", "ipam: ", []string{`[]`, `"x"`}, 7},
		{"ipam/type", "ipam.type: ", []string{`"../sh"`, `".."`, `1`}, 7},
		{"ipam/dataDir", "ipam.dataDir: ", []string{`"/x"`}, 7},
		{"ipam/reuseAfter", "ipam.reuseAfter: ", []string{`"-1s"`, `60`, `"25h"`}, 7},
		{"ipam/routes", "ipam.routes: ", []string{`{}`, `"10.0.0.0/8"`}, 7},
		{"ipam/routes", "ipam.routes[0].dst: ", []string{`[{}]`, `[{"dst":"10.0.0.0"}]`, `[{"dst":1}]`}, 7},
		{"ipam/routes", "ipam.routes[0].gw: ", []string{`[{"dst":"10.0.0.0/8","gw":"10.0.0.1"}]`}, 7},
		{"ipam/ranges", "ipam.ranges: ", []string{`[]`, `null`, `{}`}, 7},
		{"ipam/ranges", "ipam.ranges[0]: ", []string{`[[]]`, `["10.0.0.0/8"]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].subnet: ", []string{`[{}]`, `[{"subnet":"10.0.0.0"}]`,
			`[{"subnet":"::ffff:10.0.0.0/104"}]`, `[{"subnet":5}]`,
			`[{"subnet":"10.0.0.0/30","exclude":["10.0.0.0/30"]}]`,
			`[{"subnet":"10.0.0.0/24","rangeStart":"10.0.0.9","rangeEnd":"10.0.0.8"}]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].rangeStart: ", []string{`[{"subnet":"10.0.0.0/24","rangeStart":"10.0.1.1"}]`,
			`[{"subnet":"10.0.0.0/24","rangeStart":"x"}]`, `[{"subnet":"10.0.0.0/24","rangeStart":1}]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].rangeEnd: ", []string{`[{"subnet":"10.0.0.0/24","rangeEnd":"fd00::1"}]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].gateway: ", []string{`[{"subnet":"10.0.0.0/24","gateway":"10.1.0.1"}]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].exclude", []string{`[{"subnet":"10.0.0.0/24","exclude":["x"]}]`,
			`[{"subnet":"10.0.0.0/24","exclude":["10.1.0.0/24"]}]`, `[{"subnet":"10.0.0.0/24","exclude":"10.0.0.1"}]`}, 7},
		{"ipam/ranges", "ipam.ranges[0].range: ", []string{`[{"subnet":"10.0.0.0/24","range":"x"}]`}, 7},
		{"ipam/ranges", "ipam.ranges[1].subnet: ", []string{`[{"subnet":"10.0.0.0/24"},{"subnet":"10.0.0.128/25"}]`}, 7},
	} {
		for _, value := range tt.values {
			t.Run(tt.key+"="+value[:min(len(value), 60)], func(t *testing.T) {
				_, err := Parse(with(t, tt.key, value), goodEnv())
				mustRefuse(t, err, tt.code, tt.says, "allowed")
			})
		}
	}
}

func TestIPv6NeedsAnMTUOf1280(t *testing.T) {
	conf := strings.Replace(minimal, `"10.244.1.0/24"`, `"fd00::/64"`, 1)
	_, err := Parse([]byte(strings.Replace(conf, `{`, `{"mtu":1279,`, 1)), goodEnv())
	mustRefuse(t, err, 7, "mtu: 1279: ", "1280")
}

func TestWhatIsNotAJSONObjectDoesNotDecode(t *testing.T) {
	for _, stdin := range []string{"", "x", "[]", "null", `"a"`, minimal[:20]} {
		c, err := Parse([]byte(stdin), goodEnv())
		mustRefuse(t, err, 6, "stdin: ")
		if c == nil || c.Key() != (attachment.Key{ContainerID: "abc", IfName: "eth0"}) {
			t.Errorf("%q: DEL cannot work with %+v", stdin, c)
		}
	}
}

func TestValidAttachments(t *testing.T) {
	gc := func(value string) (*Config, error) {
		return ParseNetwork([]byte(strings.Replace(minimal, `{`, `{"cni.dev/valid-attachments":`+value+`,`, 1)))
	}
	for _, value := range []string{`{}`, `[1]`, `[{}]`, `[{"containerID":"a"}]`, `[{"containerID":"../a","ifname":"eth0"}]`,
		`[{"containerID":"a","ifname":"e/0"}]`} {
		_, err := gc(value)
		mustRefuse(t, err, 7, "cni.dev/valid-attachments")
	}
	if c, err := gc(`[]`); err != nil || c.ValidAttachments == nil {
		t.Errorf("an empty list is %v (%v), want an empty list", c.ValidAttachments, err)
	}
	if c, err := gc(`null`); err != nil || c.ValidAttachments != nil {
		t.Errorf("a missing list is %v (%v), want nil", c.ValidAttachments, err)
	}
}

func TestEveryWrongEnvironmentVariableIsRefusedByItsName(t *testing.T) {
	for _, tt := range []struct {
		says   string
		set    func(*Environment, string)
		values []string
	}{
		{"CNI_CONTAINERID: ", func(e *Environment, v string) { e.ContainerID = v }, []string{"", "a/b", "-a", "a b", "..",
			"a@b", strings.Repeat("a", 201)}},
		{"CNI_IFNAME: ", func(e *Environment, v string) { e.IfName = v }, []string{"", "a/b", "a:b", "a b", ".", "..",
			"0123456789abcdef", "é"}},
		{"CNI_NETNS: ", func(e *Environment, v string) { e.NetNS = v }, []string{"", "netns/a", "/a\x00"}},
		{"CNI_ARGS: ", func(e *Environment, v string) { e.Args = v }, []string{"", "X", "=1", "K8S_POD_NAME=a",
			"K8S_POD_NAMESPACE=a"}},
		{"CNI_ARGS IgnoreUnknown: ", func(e *Environment, v string) {
			e.Args = "IgnoreUnknown=" + v + ";K8S_POD_NAME=a;K8S_POD_NAMESPACE=b"
		}, []string{"yes", "2"}},
		{"CNI_ARGS K8S_POD_NAMESPACE: ", func(e *Environment, v string) { e.Args = "K8S_POD_NAME=a;K8S_POD_NAMESPACE=" + v },
			[]string{"A", "a.b", "../x", "-a", strings.Repeat("a", 64)}},
		{"CNI_ARGS K8S_POD_NAME: ", func(e *Environment, v string) { e.Args = "K8S_POD_NAMESPACE=a;K8S_POD_NAME=" + v },
			[]string{"A", "a/b", "a..b", "a=b", strings.Repeat("a", 254)}},
		{"CNI_ARGS K8S_POD_UID: ", func(e *Environment, v string) { e.Args += ";X=1;K8S_POD_UID=" + v }, []string{"second"}},
		{"CNI_ARGS K8S_POD_UID: ", func(e *Environment, v string) {
			e.Args = "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=" + v
		}, []string{"a b", "a/b", strings.Repeat("a", 129)}},
		{"CNI_ARGS K8S_POD_INFRA_CONTAINER_ID: ", func(e *Environment, v string) {
			e.Args = "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_INFRA_CONTAINER_ID=" + v
		}, []string{"a b", "$x"}},
	} {
		for _, value := range tt.values {
			t.Run(tt.says+value[:min(len(value), 40)], func(t *testing.T) {
				env := goodEnv()
				tt.set(&env, value)
				_, err := Parse([]byte(minimal), env)
				mustRefuse(t, err, 4, tt.says)
			})
		}
	}
}

// CNI 3: unknown keys from the runtime are fine.
func TestUnknownKeysOfTheRuntimeAreFine(t *testing.T) {
	env := goodEnv()
	env.Args = "IgnoreUnknown=0;SOMETHING=else;" + strings.TrimPrefix(env.Args, "IgnoreUnknown=1;") + ";"
	if _, err := Parse(with(t, "args", `{"cni":{"x":"y"}}`), env); err != nil {
		t.Error(err)
	}
}

func TestDelNeedsContainerAndInterfaceAlone(t *testing.T) {
	c, err := Parse([]byte(minimal), Environment{Command: "DEL", ContainerID: "abc", IfName: "eth0"})
	if err != nil || c.NetNS != "" {
		t.Errorf("got %+v, %v", c, err)
	}
	c, err = Parse([]byte(`{"name":"pods","stateDir":"/x","ipam":7}`), Environment{Command: "DEL", ContainerID: "abc",
		IfName: "eth0"})
	mustRefuse(t, err, 1, "cniVersion: ", "ipam: 7: ")
	if c.Name != "pods" || c.StateDir != "/x" || c.ContainerID != "abc" {
		t.Errorf("what can be read is not in %+v", c)
	}
}

func TestAllThatIsWrongIsNamedAtOnce(t *testing.T) {
	conf := `{"cniVersion":"1.0.0","name":"","policy":"x","mtu":5,"gateTimeout":"x",
		"ipam":{"ranges":[{"subnet":"x"},{"gateway":"y"}]}}`
	_, err := Parse([]byte(conf), Environment{Command: "ADD", IfName: "a/b", ContainerID: "c", NetNS: "/x",
		Args: "K8S_POD_UID=%"})
	mustRefuse(t, err, 7, `name: ""`, `policy: "x": one of "enforce", "none" is allowed`, "mtu: 5", "gateTimeout",
		"ipam.ranges[0].subnet",
		"ipam.ranges[1].gateway", "ipam.ranges[1].subnet: missing", `CNI_IFNAME: "a/b"`, "K8S_POD_UID")
}

func TestAnotherIPAMIsLeftAlone(t *testing.T) {
	c, err := Parse(with(t, "ipam", `{"type":"host-local","dataDir":"/x","ranges":[[{"subnet":"10.1.0.0/16"}]]}`), goodEnv())
	if err != nil || c.IPAM.Own() || c.IPAM.Type != "host-local" {
		t.Errorf("got %+v, %v", c.IPAM, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal), "abc", "eth0", "/n", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b")
	f.Add(with(f, "runtimeConfig/portMappings", `[{"hostPort":1,"containerPort":2,"protocol":"udp","hostIP":"::1"}]`),
		"a", "e", "/n", "")
	f.Add(with(f, "ipam/ranges", `[{"subnet":"fd00::/64","exclude":["fd00::/65"]},{"subnet":"255.255.255.255/32"}]`),
		"a", "e", "/n", "X=1;;")
	f.Add(with(f, "prevResult", `{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":0}]}`), "a", "e", "/n", "=")
	f.Add([]byte(`{"mtu":null,"ipam":{"ranges":[null]}}`), "", "", "", "K8S_POD_NAME")
	f.Fuzz(func(t *testing.T, stdin []byte, id, ifName, netns, args string) {
		c, err := Parse(stdin, Environment{Command: "ADD", ContainerID: id, IfName: ifName, NetNS: netns, Args: args})
		if c == nil {
			t.Fatal("no configuration")
		}
		var e *types.Error
		if err != nil && (!errors.As(err, &e) || e.Details == "") {
			t.Fatalf("%v is no *types.Error with details", err)
		}
		if err == nil {
			mustBeUsable(t, c)
		}
	})
}

// mustBeUsable holds what the rest of the plugin counts on once Parse has not complained.
func mustBeUsable(t *testing.T, c *Config) {
	t.Helper()
	if c.Key().Check() != nil || c.Name == "" || strings.ContainsAny(c.Name, "/\x00") || !strings.HasPrefix(c.StateDir, "/") {
		t.Fatalf("key %v, name %q, stateDir %q", c.Key(), c.Name, c.StateDir)
	}
	if c.GateTimeout <= 0 || c.MTU != 0 && (c.MTU < 68 || c.MTU > 65535) ||
		!slices.Contains(SupportedVersions(), c.CNIVersion) {
		t.Fatalf("gateTimeout %v, mtu %d, version %q", c.GateTimeout, c.MTU, c.CNIVersion)
	}
	for i, r := range c.IPAM.Ranges {
		if r.Check() != nil || slices.ContainsFunc(c.IPAM.Ranges[:i], r.Overlaps) {
			t.Fatalf("range %d of %v", i, c.IPAM.Ranges)
		}
	}
	for _, m := range c.PortMappings {
		if m.HostPort == 0 || m.ContainerPort == 0 || m.HostIP.Is4In6() || m.HostIP.Zone() != "" {
			t.Fatalf("mapping %+v", m)
		}
	}
}
