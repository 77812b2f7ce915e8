package hostport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// pod returns an attachment of pod team/NAME, number n, with mappings like "8080:80/tcp" or "192.0.2.1/8080:80/tcp".
func pod(n int, mappings ...string) *attachment.Attachment {
	a := &attachment.Attachment{
		ContainerID: fmt.Sprintf("c%d", n), IfName: "eth0", HostInterface: fmt.Sprintf("pst%d", n),
		Pod: attachment.Pod{Namespace: "team", Name: fmt.Sprintf("p%d", n)},
		Addresses: []netip.Addr{
			netip.MustParseAddr(fmt.Sprintf("10.244.1.%d", n)), netip.MustParseAddr(fmt.Sprintf("fd00:1::%d", n)),
		},
		NodeAddresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("fd00:2::1")},
		Created:       time.Unix(int64(n), 0),
	}
	for _, text := range mappings {
		var m attachment.PortMapping
		if ip, rest, ok := strings.Cut(text, "/"); ok && strings.ContainsAny(rest, "/") {
			m.HostIP, text = netip.MustParseAddr(ip), rest
		}
		if _, err := fmt.Sscanf(text, "%d:%d/%s", &m.HostPort, &m.ContainerPort, &m.Protocol); err != nil {
			panic(err)
		}
		a.PortMappings = append(a.PortMappings, m)
	}
	return a
}

func TestStateDoesNotDependOnTheOrderOfRecords(t *testing.T) {
	all := []*attachment.Attachment{pod(1, "80:80/tcp"), pod(2, "53:53/udp"), pod(3), pod(4, "9:9/sctp")}
	want := State(rule.IPv4, all)
	if len(want.Chains[rule.NAT][0].Rules) != 3 {
		t.Fatalf("%d DNAT rules, want 3", len(want.Chains[rule.NAT][0].Rules))
	}
	for range 20 {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		if got := State(rule.IPv4, all); !reflect.DeepEqual(got, want) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
	}
}

func TestNewerSandboxOfAPodSupersedesTheOlder(t *testing.T) {
	old, fresh := pod(1, "80:80/tcp"), pod(2, "80:80/tcp")
	fresh.HostInterface = old.HostInterface
	got := State(rule.IPv4, []*attachment.Attachment{fresh, old})
	if want := State(rule.IPv4, []*attachment.Attachment{fresh}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if err := Conflicts(fresh, []*attachment.Attachment{old}, false); err != nil {
		t.Error(err)
	}
}

func TestMappingHasRulesInTheFamiliesOfItsHostIP(t *testing.T) {
	for _, tt := range []struct {
		mapping string
		v4, v6  int
	}{
		{"80:80/tcp", 1, 1},
		{"0.0.0.0/80:80/udp", 1, 0},
		{"::/80:80/sctp", 0, 1},
		{"192.0.2.1/80:80/tcp", 1, 0},
		{"fd00:2::1/80:80/tcp", 0, 1},
	} {
		all := []*attachment.Attachment{pod(1, tt.mapping)}
		for family, want := range map[rule.Family]int{rule.IPv4: tt.v4, rule.IPv6: tt.v6} {
			if got := len(State(family, all).Chains[rule.NAT][0].Rules); got != want {
				t.Errorf("%s: %d rules in %s, want %d", tt.mapping, got, family, want)
			}
		}
	}
}

func TestConflictsBetweenPods(t *testing.T) {
	for _, tt := range []struct {
		asked, held string
		conflict    bool
	}{
		{"80:80/tcp", "80:8080/tcp", true},
		{"80:80/tcp", "80:80/udp", false},
		{"80:80/tcp", "81:80/tcp", false},
		{"80:80/tcp", "192.0.2.1/80:80/tcp", true},
		{"192.0.2.1/80:80/tcp", "192.0.2.1/80:80/tcp", true},
		{"192.0.2.1/80:80/tcp", "192.0.2.2/80:80/tcp", false},
		{"0.0.0.0/80:80/tcp", "192.0.2.1/80:80/tcp", true},
		{"0.0.0.0/80:80/tcp", "::/80:80/tcp", false},
		{"0.0.0.0/80:80/tcp", "fd00:2::1/80:80/tcp", false},
		{"::/80:80/tcp", "80:80/tcp", true},
		{"80:80/sctp", "80:80/sctp", true},
	} {
		err := Conflicts(pod(2, tt.asked), []*attachment.Attachment{pod(1, tt.held)}, false)
		var conflict *ConflictError
		if errors.As(err, &conflict) != tt.conflict {
			t.Errorf("%s beside %s: %v, want a conflict: %v", tt.asked, tt.held, err, tt.conflict)
		}
		if tt.conflict && !strings.Contains(fmt.Sprint(err), "team/p1") {
			t.Errorf("%v does not name the owner", err)
		}
	}
	if Conflicts(pod(1, "80:80/tcp", "80:81/tcp"), nil, false) == nil {
		t.Error("one pod maps a port twice: no conflict")
	}
}

func TestMappingsThatNoRuleCanServeAreRefused(t *testing.T) {
	single := pod(1, "fd00:2::1/80:80/tcp")
	single.Addresses = single.Addresses[:1]
	if err := check(single); err == nil || !strings.Contains(err.Error(), "hostIP") {
		t.Errorf("%v: %v, want an error that names hostIP", single.PortMappings, err)
	}
}
