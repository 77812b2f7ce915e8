package main

import (
	"fmt"
	"net/netip"
)

// step is one scene of the demo: a change of the cluster, and who then tries to reach whom.
type step struct {
	Title string
	Says  string // what the reader should see
	Files map[string]string
	// Gone are manifests that this step takes away.
	Gone []string
	// Labels are put on namespaces, by namespace; an empty map takes all off.
	Labels map[string]map[string]string
	// HostPort: besides the connections between all, those to the host port of lab/site.
	HostPort bool
}

const (
	defaultDeny = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: default-deny}
spec:
  podSelector: {}
  policyTypes: [Ingress]
`
	databaseFromWeb = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: database}
spec:
  podSelector: {matchLabels: {app: database}}
  ingress:
  - from:
    - podSelector: {matchLabels: {app: webserver}}
    ports:
    - {port: 5432}
`
	cartFromTenant = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: cart}
spec:
  podSelector: {matchLabels: {app: shopping-cart}}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {tenant: gold}}
    ports:
    - {port: 80}
`
	cartFromBlock = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: cart}
spec:
  podSelector: {matchLabels: {app: shopping-cart}}
  ingress:
  - from:
    - ipBlock: {cidr: 198.51.100.0/24}
`
	webToDatabase = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: web-egress}
spec:
  podSelector: {matchLabels: {app: webserver}}
  policyTypes: [Egress]
  egress:
  - to:
    - podSelector: {matchLabels: {app: database}}
    ports:
    - {port: 5432}
`
	siteFromLaptop = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: lab, name: site}
spec:
  podSelector: {matchLabels: {app: site}}
  ingress:
  - from:
    - ipBlock: {cidr: 198.51.100.0/24}
    - ipBlock: {cidr: "2001:db8:a::/64"}
`
)

// steps is the demo's story. A policy stays until a later step takes it away.
var steps = []step{
	{Title: "No policy", Says: "Everybody reaches everybody."},
	{Title: "Default deny in namespace shop", Files: map[string]string{"default-deny.yaml": defaultDeny},
		Says: "Nobody reaches a pod of shop, but the pod itself and its node. What those pods open themselves still works."},
	{Title: "The database admits web servers on 5432", Files: map[string]string{"database.yaml": databaseFromWeb},
		Says: "web-1 and web-2 reach db on its second port, and nobody else does."},
	{Title: "The cart admits namespaces labelled tenant=gold on 80", Files: map[string]string{"cart.yaml": cartFromTenant},
		Says: "No namespace has the label yet, so nothing changes."},
	{Title: "The label is put on namespace tenants", Labels: map[string]map[string]string{"tenants": {"tenant": "gold"}},
		Says: "app-1 and app-2 reach cart on its first port."},
	{Title: "The label is taken off again", Labels: map[string]map[string]string{"tenants": {}},
		Says: "They do not any more."},
	{Title: "The cart admits the address block 198.51.100.0/24", Files: map[string]string{"cart.yaml": cartFromBlock},
		Says: "The laptop reaches cart, by IPv4 alone: the block says nothing of IPv6. The office does not."},
	{Title: "Web servers may only reach the database on 5432", Files: map[string]string{"web-egress.yaml": webToDatabase},
		Says: "From web-1 and web-2 nothing goes out, neither to pods nor to machines outside, but to db."},
	{Title: "A host port: 9000 of the node leads to port 80 of lab/site", HostPort: true,
		Says: "From machines outside, from the node (its addresses and 127.0.0.1), from other pods, from the pod itself."},
	{Title: "lab/site admits the laptop's networks alone", Files: map[string]string{"site.yaml": siteFromLaptop},
		HostPort: true, Says: "Policies hold through the host port: the client keeps its address. The node and the pod itself always may."},
	{Title: "All policies are taken away", Gone: []string{
		"default-deny.yaml", "database.yaml", "cart.yaml", "web-egress.yaml", "site.yaml"}, Says: "As in the beginning."},
}

// change makes the step's change to the cluster.
func (s step) change(c *cluster) error {
	for name, text := range s.Files {
		c.policies[name] = text
	}
	for _, name := range s.Gone {
		if _, there := c.policies[name]; !there {
			return fmt.Errorf("take away %s: it is not there", name)
		}
		delete(c.policies, name)
	}
	for name, labels := range s.Labels {
		c.namespaces[name] = labels
	}
	return nil
}

// try is one connection that somebody tries to open.
type try struct {
	From, To *party
	Address  netip.Addr // dialled; the destination's own, or with a host port one of the node's
	Port     uint16     // dialled
	PodPort  uint16     // where the connection ends, and so what policies judge
	HostPort bool

	Expected bool   // it opens, by the words of the policies
	Opened   bool   // it did
	Why      string // what went wrong, where it did not open
}

// String names the try, for the list of what differs.
func (t *try) String() string {
	verb := map[bool]string{true: "reaches", false: "does not reach"}
	return fmt.Sprintf("%s %s %s at %s; the policies say it %s it", t.From.Name, verb[t.Opened], t.To.Name,
		netip.AddrPortFrom(t.Address, t.Port), map[bool]string{true: "may reach", false: "must not reach"}[t.Expected])
}

// tries are the step's connections: between all pairs, on every port, in both families, and with HostPort also those.
// From one machine outside to another, and from the node to them, nothing of postern's is on the way.
func (s step) tries(w *world) []*try {
	var out []*try
	for _, from := range w.parties {
		for _, to := range w.parties {
			if !to.Listens || from.pod == nil && to.pod == nil {
				continue
			}
			for _, address := range to.Addresses {
				for _, port := range ports {
					out = append(out, &try{From: from, To: to, Address: address, Port: port, PodPort: port})
				}
			}
		}
	}
	if s.HostPort {
		out = append(out, hostPortTries(w)...)
	}
	return out
}

// hostPortTries are connections to each mapped port, from everybody to the node's addresses.
func hostPortTries(w *world) []*try {
	var out []*try
	node := w.parties[len(w.parties)-1]
	for _, to := range w.parties {
		if to.pod == nil || to.pod.HostPort == 0 {
			continue
		}
		for _, from := range w.parties {
			at := node.Addresses
			if from == node {
				at = append(addresses("127.0.0.1"), at...)
			}
			for _, address := range at {
				out = append(out, &try{From: from, To: to, Address: address, Port: to.pod.HostPort, PodPort: ports[0], HostPort: true})
			}
		}
	}
	return out
}
