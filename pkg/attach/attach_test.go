package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cniconf"
	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// node is a namespace with an address that the plugin's own process works in.
type node struct {
	*nettest.NS
	stateDir string
}

func newNode(t *testing.T) *node {
	n := &node{nettest.NewNS(t, "node"), t.TempDir()}
	other := nettest.NewNS(t, "other")
	nettest.Link(t, nettest.End{NS: n.NS, Name: "uplink", Addresses: nettest.Prefixes("192.0.2.1/24", "2001:db8::1/64")},
		nettest.End{NS: other, Name: "uplink", Addresses: nettest.Prefixes("192.0.2.2/24", "2001:db8::2/64")})
	return n
}

// config is a pod's configuration with a host port, of a network without policyd.
func (n *node) config(t *testing.T, backend, id, netns string) *cniconf.Config {
	t.Helper()
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "net", "type": "postern", "policy": "none", "stateDir": %q, "iptablesBackend": %q,
		"ipam": {"ranges": [{"subnet": "10.9.0.0/29"}, {"subnet": "fd00:9::/125"}], "reuseAfter": "0s"},
		"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}`, n.stateDir, backend)
	cfg, err := cniconf.Parse([]byte(text), cniconf.Environment{Command: "ADD", ContainerID: id, NetNS: netns, IfName: "eth0"})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// state lists everything that an ADD makes: records, addresses, links, routes, rules.
func (n *node) state(t *testing.T, backend string) string {
	t.Helper()
	var out strings.Builder
	for _, dir := range []string{"attachments", "ipam"} {
		err := filepath.WalkDir(filepath.Join(n.stateDir, dir), func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() && strings.Contains(path, "@") {
				fmt.Fprintln(&out, "file", filepath.Base(path))
			}
			return nil // a folder that nothing made yet
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, command := range []string{"ip -o link", "ip -4 route", "ip -6 route"} {
		for line := range strings.Lines(n.Run(t, "ip", strings.Fields(command)[1:]...)) {
			if strings.Contains(line, attachment.UnguardedPrefix) {
				fmt.Fprint(&out, command, ": ", line)
			}
		}
	}
	for _, tool := range []string{"iptables-", "ip6tables-"} {
		for line := range strings.Lines(n.Run(t, tool+backend+"-save", "-t", "nat")) {
			if strings.Contains(line, "--to-") {
				fmt.Fprint(&out, tool, ": ", line)
			}
		}
	}
	return out.String()
}

// Whichever step of ADD fails, before it or after it has done its work, nothing is left of it, and the next ADD works.
func TestAnADDThatFailsAtAnyStepLeavesNothing(t *testing.T) {
	broken := errors.New("broken on purpose")
	nettest.Backends(t, func(t *testing.T, backend string) {
		n := newNode(t)
		var steps []string
		for i, s := range (&adding{cfg: &cniconf.Config{}}).steps() {
			steps = append(steps, s.name)
			box := nettest.NewNS(t, "box")
			cfg := n.config(t, backend, fmt.Sprintf("c%d", i), box.Path)
			p := &Plugin{Fail: func(step string) error {
				if step == s.name {
					return broken
				}
				return nil
			}}
			var err error
			n.Do(t, func() { _, err = p.Add(context.Background(), cfg) })
			if err == nil || !strings.Contains(err.Error(), broken.Error()) {
				t.Errorf("%s: ADD says %v", s.name, err)
			}
			if left := n.state(t, backend); left != "" {
				t.Errorf("%s: a failed ADD left\n%s", s.name, left)
			}
			if out := box.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
				t.Errorf("%s: the pod kept its link: %s", s.name, out)
			}
		}
		if len(steps) < 7 {
			t.Fatalf("only the steps %v were tried", steps)
		}
		box := nettest.NewNS(t, "box")
		cfg := n.config(t, backend, "good", box.Path)
		var addErr, delErr error
		n.Do(t, func() { _, addErr = new(Plugin).Add(context.Background(), cfg) })
		if addErr != nil || n.state(t, backend) == "" {
			t.Fatalf("ADD after all the failures: %v", addErr)
		}
		n.Do(t, func() { delErr = new(Plugin).Del(context.Background(), cfg) })
		if left := n.state(t, backend); delErr != nil || left != "" {
			t.Errorf("DEL: %v; left\n%s", delErr, left)
		}
	})
}

// Collect removes what belongs to a container whose namespace and link are gone, and nothing else.
func TestCollectTakesTheDeadAlone(t *testing.T) {
	n := newNode(t)
	var errs [2]error
	boxes := [2]*nettest.NS{nettest.NewNS(t, "dead"), nettest.NewNS(t, "living")}
	for i, box := range boxes {
		cfg := n.config(t, "nft", box.Name, box.Path)
		cfg.PortMappings[0].HostPort += uint16(i)
		n.Do(t, func() { _, errs[i] = new(Plugin).Add(context.Background(), cfg) })
	}
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	collected := func() (count int) {
		var err error
		n.Do(t, func() { count, err = Collect(context.Background(), n.stateDir) })
		if err != nil {
			t.Fatal(err)
		}
		return count
	}
	if got := collected(); got != 0 {
		t.Errorf("collected %d of two living ones", got)
	}
	boxes[0].Remove(t)
	nettest.Eventually(t, 10*time.Second, "the kernel takes the link with its namespace", func() error {
		if out := n.Run(t, "ip", "-o", "link"); strings.Contains(out, "dead@eth0") {
			return errors.New(out)
		}
		return nil
	})
	if got := collected(); got != 1 {
		t.Errorf("collected %d, want the dead one", got)
	}
	if left := n.state(t, "nft"); strings.Contains(left, "dead") || !strings.Contains(left, "file living@eth0") ||
		strings.Contains(left, "8080 ") || !strings.Contains(left, "8081") {
		t.Errorf("left:\n%s", left)
	}
}
