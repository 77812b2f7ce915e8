package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/nettest/testnode"
)

// The range has room for the storm and little more, so that filling it up afterwards finds every address that is lost.
const (
	stormPods    = 200
	stormCallers = 20
	stormSubnet  = "10.244.0.0/24" // 253 addresses for pods: the network's, the broadcast's and the gateway's are kept
	stormRoom    = 253
)

// Two hundred pods attached by twenty callers at once, a third of them killed at a random moment. GC with the survivors must
// leave exactly what the survivors own: addresses, links, routes, rules, records and ports, nothing lost and nothing over.
func TestKilledADDsLeaveNothingAfterGC(t *testing.T) {
	nettest.Backends(t, func(t *testing.T, backend string) {
		for _, policy := range []attachment.Policy{attachment.PolicyNone, attachment.PolicyEnforce} {
			t.Run(string(policy), func(t *testing.T) {
				s := newStorm(t, backend, policy)
				killed := s.attachAll(t)
				t.Logf("%d pods, %d killed, %d attached", stormPods, killed, len(s.attached))
				if killed < stormPods/10 || len(s.attached) < stormPods/3 {
					t.Fatalf("the storm was none: %d killed, %d attached of %d", killed, len(s.attached), stormPods)
				}

				if err := s.node.GC(slices.Collect(maps.Values(s.attached))...); err != nil {
					t.Fatalf("GC: %v", err)
				}
				s.checkExactly(t)
				s.fillUp(t)
				s.checkExactly(t)

				for id, p := range s.attached {
					if err := s.node.Del(p); err != nil {
						t.Errorf("DEL %s: %v", p.Name, err)
					}
					delete(s.attached, id)
				}
				s.checkExactly(t)
			})
		}
	})
}

type storm struct {
	node    *testnode.Node
	binary  string
	backend string
	pods    []*testnode.Pod

	mu       sync.Mutex
	attached map[string]*testnode.Pod // by container ID
}

func newStorm(t *testing.T, backend string, policy attachment.Policy) *storm {
	s := &storm{
		node: testnode.New(t, testnode.Options{
			Backend: backend,
			Policy:  policy,
			Ranges:  []string{stormSubnet, "fd00:10:244::/64"},
			Conf:    map[string]any{"ipam": map[string]any{"reuseAfter": "0s"}},
		}),
		binary:   nettest.Build(t, "plugin"),
		backend:  backend,
		attached: map[string]*testnode.Pod{},
	}
	var manifests strings.Builder
	for i := range stormPods {
		p := &testnode.Pod{Namespace: "storm", Name: fmt.Sprintf("pod-%03d", i), UID: fmt.Sprintf("uid-%03d", i)}
		if i%4 == 0 {
			p.Ports = stormPorts(i)
		}
		s.pods = append(s.pods, s.node.Sandbox(t, p))
		manifests.WriteString(p.Manifest(nil))
	}
	if policy == attachment.PolicyEnforce {
		s.node.Write(t, "pods.yaml", manifests.String())
		s.node.Policyd(t)
	}
	return s
}

func stormPorts(i int) []attachment.PortMapping {
	port := uint16(20000 + i)
	return []attachment.PortMapping{
		{HostPort: port, ContainerPort: 80, Protocol: "tcp"},
		{HostPort: port, ContainerPort: 53, Protocol: "udp"},
	}
}

// attachAll adds every pod from twenty callers, kills every third ADD, and returns how many ended by that.
func (s *storm) attachAll(t *testing.T) (killed int) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	limits := make([]time.Duration, len(s.pods))
	for i := range limits {
		if i%3 == 0 {
			limits[i] = time.Duration(1 + rnd.IntN(int(60*time.Millisecond)))
		}
	}
	work := make(chan int)
	var wg sync.WaitGroup
	for range stormCallers {
		wg.Go(func() {
			for i := range work {
				err := s.add(s.pods[i], limits[i])
				s.mu.Lock()
				switch {
				case err == nil:
					s.attached[s.pods[i].ContainerID] = s.pods[i]
				case limits[i] > 0:
					killed++
				default:
					t.Errorf("ADD %s: %v", s.pods[i].Name, err)
				}
				s.mu.Unlock()
			}
		})
	}
	for i := range s.pods {
		work <- i
	}
	close(work)
	wg.Wait()
	return killed
}

// add runs the plugin itself, not through libcni, so that its process can be killed; limit 0 lets it live.
func (s *storm) add(p *testnode.Pod, limit time.Duration) error {
	stdin, err := s.stdin(p)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, s.binary)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID="+p.ContainerID, "CNI_NETNS="+p.NS.Path,
		"CNI_IFNAME="+p.IfName, "CNI_PATH="+s.node.BinDir, "CNI_ARGS="+cniArgs(p))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if enter := nettest.Enter(s.node.NS, func() { err = cmd.Start() }); enter != nil || err != nil {
		return fmt.Errorf("start: %v %v", enter, err)
	}
	if limit > 0 {
		timer := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() }) // an error means that it has ended already
		defer timer.Stop()
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s%s", err, &stdout, &stderr)
	}
	p.Result = &types100.Result{}
	return json.Unmarshal(stdout.Bytes(), p.Result)
}

func cniArgs(p *testnode.Pod) string {
	var args []string
	for _, kv := range p.Runtime().Args {
		args = append(args, kv[0]+"="+kv[1])
	}
	return strings.Join(args, ";")
}

// stdin is the plugin's configuration as libcni writes it: the list's entry with the list's name and version, and the
// capabilities' values.
func (s *storm) stdin(p *testnode.Pod) ([]byte, error) {
	var list struct {
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal(s.node.ConfList(), &list); err != nil {
		return nil, err
	}
	conf := maps.Clone(list.Plugins[0])
	conf["name"], conf["cniVersion"] = list.Name, "1.0.0"
	if len(p.Ports) > 0 {
		conf["runtimeConfig"] = map[string]any{"portMappings": p.Ports}
	}
	return json.Marshal(conf)
}

// fillUp attaches pods until the range is full: as many as it has room for, with the ports of those that were killed.
func (s *storm) fillUp(t *testing.T) {
	t.Helper()
	for _, p := range s.pods {
		if s.attached[p.ContainerID] != nil {
			continue
		}
		if err := s.add(p, 0); err != nil {
			t.Fatalf("ADD %s after GC, its address and ports free again: %v", p.Name, err)
		}
		s.attached[p.ContainerID] = p
	}
	// One of the storm's pods under a second interface name stands for a further pod: its own address and link.
	for i := 0; len(s.attached) < stormRoom; i++ {
		p := *s.pods[i]
		p.IfName, p.Ports = "eth1", nil
		if err := s.add(&p, 0); err != nil {
			t.Fatalf("ADD with %d of %d addresses in use: %v", len(s.attached), stormRoom, err)
		}
		s.attached[p.ContainerID+"/eth1"] = &p
	}
	over := *s.pods[0]
	over.IfName, over.Ports = "eth2", nil
	err := s.add(&over, 0)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d", stormRoom)) {
		t.Fatalf("ADD with every address in use: got %v, want a refusal with the figure %d", err, stormRoom)
	}
}

// checkExactly compares everything of ours on the node with what the attached pods own.
func (s *storm) checkExactly(t *testing.T) {
	t.Helper()
	var links, routes, records, ports []string
	for _, p := range s.attached {
		links = append(links, p.Result.Interfaces[0].Name)
		records = append(records, p.ContainerID+" "+p.IfName)
		for _, ip := range p.Result.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			routes = append(routes, a.Unmap().String()+" "+p.Result.Interfaces[0].Name)
			for _, m := range p.Ports {
				to := netip.AddrPortFrom(a.Unmap(), m.ContainerPort)
				ports = append(ports, fmt.Sprintf("%s %d %s", m.Protocol, m.HostPort, to))
			}
		}
	}
	same(t, "links", s.links(t), links)
	same(t, "routes", s.routes(t), routes)
	same(t, "records", s.records(t), records)
	same(t, "port mappings", s.mappings(t), ports)
	if held := len(s.usedAddresses(t)); held != len(routes) {
		t.Errorf("addresses in use: %d, want the %d of the attached pods", held, len(routes))
	}
}

func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	for _, g := range got {
		if _, found := slices.BinarySearch(want, g); !found {
			t.Errorf("%s left over: %s", what, g)
		}
	}
	for _, w := range want {
		if _, found := slices.BinarySearch(got, w); !found {
			t.Errorf("%s lost: %s", what, w)
		}
	}
	if len(slices.Compact(got)) != len(got) {
		t.Errorf("%s: some twice", what)
	}
}

func (s *storm) links(t *testing.T) (names []string) {
	for _, line := range strings.Split(s.node.NS.Run(t, "ip", "-o", "link"), "\n") {
		if f := strings.Fields(line); len(f) > 1 && ours(f[1]) {
			name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			names = append(names, name)
		}
	}
	return names
}

func ours(link string) bool {
	return strings.HasPrefix(link, attachment.GuardedPrefix) || strings.HasPrefix(link, attachment.UnguardedPrefix)
}

func (s *storm) routes(t *testing.T) (routes []string) {
	for _, family := range []string{"-4", "-6"} {
		for _, line := range strings.Split(s.node.NS.Run(t, "ip", family, "route"), "\n") {
			f := strings.Fields(line)
			if at := slices.Index(f, "dev"); at > 0 && ours(f[at+1]) && !strings.HasPrefix(f[0], "fe80:") {
				routes = append(routes, f[0]+" "+f[at+1])
			}
		}
	}
	return routes
}

func (s *storm) records(t *testing.T) (keys []string) {
	list, errs := attachment.Open(s.node.StateDir).List()
	if len(errs) > 0 {
		t.Errorf("records: %v", errs)
	}
	for _, a := range list {
		keys = append(keys, a.ContainerID+" "+a.IfName)
	}
	return keys
}

// mappings lists the DNAT rules of both families as "tcp 20000 10.244.0.5:80".
func (s *storm) mappings(t *testing.T) (found []string) {
	for _, save := range []string{"iptables-" + s.backend + "-save", "ip6tables-" + s.backend + "-save"} {
		for _, line := range strings.Split(s.node.NS.Run(t, save, "-t", "nat"), "\n") {
			f := strings.Fields(line)
			to, proto, port := slices.Index(f, "--to-destination"), slices.Index(f, "-p"), slices.Index(f, "--dport")
			if to > 0 && proto > 0 && port > 0 {
				found = append(found, f[proto+1]+" "+f[port+1]+" "+f[to+1])
			}
		}
	}
	return found
}

func (s *storm) usedAddresses(t *testing.T) []string {
	used, err := filepath.Glob(filepath.Join(s.node.StateDir, "ipam", "*", "used", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return used
}
