package cluster

import (
	"net/netip"
	"strings"
	"testing"
)

func TestDefaultsAreFilledInAndEverythingWrongIsSaidAtOnce(t *testing.T) {
	config, err := Config{}.Complete()
	if want := (Config{3, "nft", "ipv4", "iptables", "auto"}); err != nil || config != want {
		t.Errorf("the zero value is completed to %+v (%v), want %+v", config, err, want)
	}
	_, err = Config{10, "ebtables", "ipv5", "ipvs", "sometimes"}.Complete()
	for _, name := range []string{"NODES=10", "BACKEND=ebtables", "FAMILY=ipv5", "PROXY=ipvs", "TUNNEL=sometimes"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not say %s: %v", name, err)
		}
	}
}

// Nodes on one link have one prefix; those behind a router have none in common, and each a way out on its own link.
func TestNodesShareALinkOrAPrefixWithNobody(t *testing.T) {
	for _, tunnel := range []string{"auto", "always"} {
		for _, family := range []string{"4", "6"} {
			config, err := Config{Family: "dual", Tunnel: tunnel}.Complete()
			if err != nil {
				t.Fatal(err)
			}
			seen := map[netip.Addr]bool{}
			first, _ := config.nodeLink(1, family)
			for node := 1; node <= 9; node++ {
				address, router := config.nodeLink(node, family)
				if seen[address.Addr()] || !address.Masked().Contains(router.Addr()) || address.Addr() == router.Addr() {
					t.Errorf("%s, node %d: address %v, router %v", tunnel, node, address, router)
				}
				seen[address.Addr()] = true
				if shared := first.Masked() == address.Masked(); node > 1 && shared == config.Routed() {
					t.Errorf("%s: nodes 1 and %d are on links %v and %v", tunnel, node, first.Masked(), address.Masked())
				}
			}
		}
	}
}

func TestAMountOfControlGroupsIsFoundByItsControllers(t *testing.T) {
	const mounts = `cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
`
	for controllers, want := range map[string]string{
		"cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "name=systemd": "/sys/fs/cgroup/systemd", "": "/sys/fs/cgroup/unified", "pids": "",
	} {
		if got := mountOf(mounts, controllers); got != want {
			t.Errorf("the mount of %q is %q, want %q", controllers, got, want)
		}
	}
}
