package nodenet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
	"github.com/postern-cni/postern/pkg/sysctl"
)

// Surroundings looks for what on this machine would defeat the network. conflist is empty where none is written. What cannot
// be looked at is in the error and stops nothing else.
func Surroundings(ctx context.Context, p *Plan, conflist string) (found []Finding, err error) {
	var errs []error
	for _, look := range []func() ([]Finding, error){
		func() ([]Finding, error) { return otherCNI(conflist) },
		func() ([]Finding, error) { return twoBackends(ctx) },
		func() ([]Finding, error) { return forwarding(p), nil },
		ipvs,
		func() ([]Finding, error) { return otherRoutes(p) },
	} {
		list, err := look()
		found, errs = append(found, list...), append(errs, err)
	}
	return found, errors.Join(errs...)
}

// around looks for what would defeat policies where the network is somebody else's.
func around(ctx context.Context) ([]Finding, error) {
	found, err := ipvs()
	more, err2 := twoBackends(ctx)
	return append(found, more...), errors.Join(err, err2)
}

func finding(k Kind, format string, args ...any) []Finding {
	return []Finding{{Kind: k, What: fmt.Sprintf(format, args...)}}
}

func otherCNI(conflist string) ([]Finding, error) {
	if conflist == "" {
		return nil, nil
	}
	names, err := before(conflist)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	return finding(OtherCNI, "the container runtime takes %s before %s: remove it, or give --cni-conf a name that sorts "+
		"before", names[0], conflist), nil
}

// twoBackends: what one backend accepts the other may drop, and rules of kube-proxy in one are not those that an administrator
// sees in the other. Legacy comes first: to see that it holds nothing, as on most nodes, takes next to no time, however many rules
// nft has.
func twoBackends(ctx context.Context) ([]Finding, error) {
	for _, b := range []iptables.Backend{iptables.Legacy, iptables.NFT} {
		if n, err := iptables.Rules(ctx, b); err != nil || n == 0 {
			return nil, nil // one that is not installed holds nothing that could be seen
		}
	}
	return finding(TwoBackends, "both iptables backends hold rules: have all of the node's software use one of nft and legacy, and "+
		"flush the other"), nil
}

func forwarding(p *Plan) (found []Finding) {
	for f, s := range map[rule.Family]sysctl.Setting{
		rule.IPv4: sysctl.Of("ipv4/ip_forward", "1"), rule.IPv6: sysctl.Of("ipv6/conf/all/forwarding", "1"),
	} {
		if now, err := s.Read(); p.hasPods(f) && (err != nil || now == "0") {
			found = append(found, finding(NoForwarding, "the node does not forward %s, so its pods reach nobody: set the %s=1 and see who "+
				"has changed it", f, s)...)
		}
	}
	return found
}

// hasPods reports whether the node has addresses of a family for pods.
func (p *Plan) hasPods(f rule.Family) bool {
	for _, cidr := range p.Node.PodCIDRs {
		if rule.FamilyOf(cidr.Addr()) == f {
			return true
		}
	}
	return false
}

// ipvs: kube-proxy in this mode has a link of this name with all Service addresses.
func ipvs() ([]Finding, error) {
	_, err := netlink.LinkByName("kube-ipvs0")
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for kube-ipvs0: %w", err)
	}
	return finding(IPVS, "kube-proxy is in IPVS mode, or was and has left kube-ipvs0: its traffic to Services goes around FORWARD, "+
		"where policies are enforced; use mode iptables or nftables, and remove the link"), nil
}

// otherRoutes names routes of somebody else's that precede ours.
func otherRoutes(p *Plan) (found []Finding, err error) {
	wanted := map[netip.Prefix]bool{}
	for _, r := range p.Routes {
		wanted[r.Dst] = true
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			if wanted[prefixOf(&r)] && r.Protocol != Protocol && r.Priority <= Metric {
				found = append(found, finding(OtherRoute, "a route for %s that is not ours is there and precedes ours, by %s: remove it "+
					"if it is left over", r.Dst, by(&r))...)
			}
		}
	}
	return found, nil
}

func by(r *netlink.Route) string {
	if r.Gw != nil {
		return fmt.Sprintf("%s (protocol %d)", r.Gw, int(r.Protocol))
	}
	return fmt.Sprintf("link %d (protocol %d)", r.LinkIndex, int(r.Protocol))
}
