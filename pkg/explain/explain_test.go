package explain_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/object"
)

var update = flag.Bool("update", false, "write the stories under testdata anew; commit only a difference that you understand")

func ip(text string) netip.Addr { return netip.MustParseAddr(text) }

// shop is the cluster of these tests: a database, two web servers on two stacks, a cart without address yet, a job that has ended
// and whose address another pod has, a pod on its node's network, and a tool in another namespace.
func shop(policies ...*networkingv1.NetworkPolicy) object.Cluster {
	tcp := func(name string, number uint16) object.Port {
		return object.Port{Name: name, Protocol: corev1.ProtocolTCP, Number: number}
	}
	pod := func(namespace, name, app string, ips ...netip.Addr) *object.Pod {
		return &object.Pod{Namespace: namespace, Name: name, Labels: object.LabelsOf(map[string]string{"app": app}), IPs: ips}
	}
	web1, web2 := pod("shop", "web-1", "web", ip("10.0.0.1"), ip("fd00::1")), pod("shop", "web-2", "web", ip("10.0.0.2"))
	web1.Ports, web2.Ports = []object.Port{tcp("http", 8080)}, []object.Port{tcp("http", 9090)}
	db := pod("shop", "db", "db", ip("10.0.0.3"), ip("fd00::3"))
	db.Ports = []object.Port{tcp("sql", 5432), {Name: "sql", Protocol: corev1.ProtocolUDP, Number: 5433}}
	job := pod("shop", "job", "web", ip("10.0.0.9"))
	job.Ended = true
	host := pod("lab", "agent", "web", ip("192.0.2.10"))
	host.HostNetwork = true
	twinA, twinB := pod("lab", "twin-a", "web", ip("10.0.0.20")), pod("lab", "twin-b", "other", ip("10.0.0.20"))
	return object.Cluster{
		Pods: []*object.Pod{host, pod("lab", "tools", "tools", ip("10.0.0.9")), twinA, twinB, pod("shop", "cart", "cart"), db, job, web1, web2},
		Namespaces: []*object.Namespace{{Name: "lab", Labels: map[string]string{"tenant": "lab"}},
			{Name: "shop", Labels: map[string]string{"tenant": "shop"}}},
		Policies: policies,
	}
}

// policy reads a spec; its namespace is shop.
func policy(t *testing.T, name, spec string) *networkingv1.NetworkPolicy {
	t.Helper()
	np := &networkingv1.NetworkPolicy{}
	np.Namespace, np.Name = "shop", name
	if err := yaml.UnmarshalStrict([]byte(spec), &np.Spec); err != nil {
		t.Fatalf("%s: %v", spec, err)
	}
	return np
}

// ask puts a question, "FROM TO PORT"; the port is "5432/TCP", or "-" for none.
func ask(t *testing.T, c object.Cluster, question string) []explain.Answer {
	t.Helper()
	parts := strings.Fields(question)
	var port uint64
	var protocol corev1.Protocol
	if parts[2] != "-" {
		number, name, _ := strings.Cut(parts[2], "/")
		var err error
		if port, err = strconv.ParseUint(number, 10, 16); err != nil {
			t.Fatal(err)
		}
		protocol = corev1.Protocol(name)
	}
	answers, err := explain.Between(c, parts[0], parts[1], protocol, uint16(port), []netip.Addr{ip("192.0.2.10"), ip("2001:db8::10")})
	if err != nil {
		t.Fatalf("%s: %v", question, err)
	}
	return answers
}

func TestAnswersAndTheWordsOfTheirReasons(t *testing.T) {
	const toDB = "shop/web-1 shop/db 5432/TCP"
	for _, tt := range []struct {
		name, spec, question string
		allowed              bool
		words                string // of the answer's text
	}{
		{"no policy selects", "podSelector: {matchLabels: {app: other}}", toDB, true, "ingress of shop/db: allowed: no policy isolates it"},
		{"no rules", "podSelector: {}", toDB, false, "shop/p: has no ingress rule: it admits nothing"},
		{"no egress rules", "{podSelector: {}, policyTypes: [Egress]}", toDB, false, "shop/p: has no egress rule: it admits nothing"},
		{"egress alone leaves ingress open", "{podSelector: {matchLabels: {app: db}}, policyTypes: [Egress]}", toDB, true,
			"ingress of shop/db: allowed: no policy isolates it"},
		{"policyTypes left out mean ingress alone", "{podSelector: {matchLabels: {app: web}}, ingress: []}", toDB, true,
			"egress of shop/web-1: allowed: no policy isolates it"},
		{"policyTypes left out, egress rules there", "{podSelector: {matchLabels: {app: web}}, egress: [{ports: [{port: 1}]}]}", toDB, false,
			"egress[0] does not: wants port 1/TCP, not 5432/TCP"},
		{"everyone, every port", "{podSelector: {}, ingress: [{}]}", toDB, true, "ingress[0] admits: everyone, every port"},
		{"everyone, one port", "{podSelector: {}, ingress: [{ports: [{port: 5432}]}]}", toDB, true, "admits: everyone, port 5432/TCP"},
		{"the port's protocol is TCP by default", "{podSelector: {}, ingress: [{ports: [{port: 5432}]}]}", "shop/web-1 shop/db 5432/UDP", false,
			"wants port 5432/TCP, not 5432/UDP"},
		{"a protocol without port", "{podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}", "shop/web-1 shop/db 7/UDP", true, "port any/UDP"},
		{"a range's ends count", "{podSelector: {}, ingress: [{ports: [{port: 5000, endPort: 5432}]}]}", toDB, true, "port 5000-5432/TCP"},
		{"a range ends", "{podSelector: {}, ingress: [{ports: [{port: 5000, endPort: 5431}]}]}", toDB, false,
			"wants port 5000-5431/TCP, not 5432/TCP"},
		{"one of several ports", "{podSelector: {}, ingress: [{ports: [{port: 1}, {port: 5432}]}]}", toDB, true, "port 5432/TCP"},
		{"none of several ports", "{podSelector: {}, ingress: [{ports: [{port: 1}, {port: 2, protocol: SCTP}]}]}", toDB, false,
			"wants port 1/TCP or 2/SCTP, not 5432/TCP"},
		{"a named port of the selected pod", "{podSelector: {}, ingress: [{ports: [{port: sql}]}]}", toDB, true, "port sql/TCP"},
		{"a name has a number for each protocol", "{podSelector: {}, ingress: [{ports: [{port: sql, protocol: UDP}]}]}",
			"shop/web-1 shop/db 5432/UDP", false, "wants port sql/UDP, not 5432/UDP"},
		{"a named port nobody has", "{podSelector: {}, ingress: [{ports: [{port: none}]}]}", toDB, false, "wants port none/TCP"},
		{"a named port of the peer, egress", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}], ports: [{port: http}]}]}",
			"shop/web-1 shop/web-2 9090/TCP", true, "port http/TCP"},
		{"another peer's number, egress", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}], ports: [{port: http}]}]}",
			"shop/web-1 shop/web-2 8080/TCP", false, "to[0] matches shop/web-2, but wants port http/TCP, not 8080/TCP"},
		{"a named port and an address block, egress", "{podSelector: {}, policyTypes: [Egress], " +
			"egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: http}]}]}", "shop/web-1 shop/web-2 9090/TCP", false,
			"holds 10.0.0.2 in 10.0.0.0/8, but wants port http/TCP"},
		{"a named port of nobody, egress", "{podSelector: {}, egress: [{ports: [{port: http}]}]}", "shop/web-2 203.0.113.1 8080/TCP", false,
			"wants port http/TCP"},
		{"no port at all, ICMP", "{podSelector: {}, ingress: [{}]}", "shop/web-1 shop/db -", true, "port none"},
		{"a port rule admits no ICMP", "{podSelector: {}, ingress: [{ports: [{port: 5432}]}]}", "shop/web-1 shop/db -", false, "not none"},
		{"pods of the namespace", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}", toDB, true, "from[0] matches shop/web-1"},
		{"pods of another namespace", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}", "lab/tools shop/db 5432/TCP", false,
			"from[0] selects pods of namespace shop alone"},
		{"labels of pods", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: cart}}}]}]}", toDB, false,
			"wants pods with (app=cart), and shop/web-1 has (app=web)"},
		{"labels of namespaces", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: lab}}}]}]}",
			"lab/tools shop/db 5432/TCP", true, "from[0] matches lab/tools"},
		{"labels of the wrong namespace", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: lab}}}]}]}", toDB, false,
			"wants namespaces with (tenant=lab), and shop has (tenant=shop)"},
		{"both, and one does not hold", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}]}]}",
			"lab/tools shop/db 5432/TCP", false, "wants pods with (app=web), and lab/tools has (app=tools)"},
		{"an operator", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}}]}]}", toDB,
			false, "wants pods with (app notin (web))"},
		{"one of two peers", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: x}}}, {podSelector: {}}]}]}", toDB, true,
			"from[1] matches shop/web-1"},
		{"each peer says why not", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: x}}}, {ipBlock: {cidr: 172.16.0.0/12}}]}]}",
			toDB, false, "has (app=web); from[1] wants 172.16.0.0/12"},
		{"a block holds pods too", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/24}}, {ipBlock: {cidr: fd00::/64}}]}]}", toDB, true,
			"holds 10.0.0.1 in 10.0.0.0/24"},
		{"a block of one family says nothing of the other", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]}", toDB, false,
			"from[0] wants 0.0.0.0/0"},
		{"an exception", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/30]}}]}]}", "shop/web-2 shop/db 5432/TCP",
			false, "wants 10.0.0.0/8 except 10.0.0.0/30"},
		{"another block's exception takes nothing away",
			"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/30]}}, {ipBlock: {cidr: 10.0.0.2/32}}]}]}",
			"shop/web-2 shop/db 5432/TCP", true, "from[1] holds 10.0.0.2 in 10.0.0.2/32"},
		{"host bits do not count", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.77/24}}]}]}", "shop/web-2 shop/db 5432/TCP", true,
			"in 10.0.0.77/24"},
		{"an outside address", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24}}]}]}", "203.0.113.7 shop/db 5432/TCP", true,
			"allowed: 203.0.113.7 -> shop/db (10.0.0.3)"},
		{"an outside address is no pod", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}", "203.0.113.7 shop/db 5432/TCP", false,
			"selects pods, and 203.0.113.7 is none"},
		{"a pod that has ended has no address", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}", "10.0.0.9 shop/db 5432/TCP", false,
			"from[0] selects pods of namespace shop alone"},
		{"the second rule admits", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: x}}}]}, {}]}", toDB, true,
			"ingress[1] admits: everyone, every port"},
		{"a pod without an address is known by its labels", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: cart}}}]}]}",
			"shop/cart shop/db 5432/TCP", true, "shop/cart (no address yet)"},
		{"and by no block", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]}", "shop/cart shop/db 5432/TCP", false, "wants 0.0.0.0/0"},
		{"of two pods with one address both must match",
			"{podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}]}]}", "10.0.0.20 shop/db 5432/TCP", false,
			"and lab/twin-b has (app=other)"},
		{"two pods with one address that both match", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: lab}}}]}]}",
			"10.0.0.20 shop/db 5432/TCP", true, "lab/twin-a and lab/twin-b (10.0.0.20)"},
		{"the node reaches its pods", "podSelector: {}", "192.0.2.10 shop/db 5432/TCP", true, "a node always reaches its own pods"},
		{"a pod reaches its node", "{podSelector: {}, policyTypes: [Egress]}", "shop/db 2001:db8::10 22/TCP", true, "a pod always reaches its own node"},
		{"a pod reaches itself", "{podSelector: {}, policyTypes: [Egress, Ingress]}", "shop/db shop/db 5432/TCP", true, "a pod always reaches itself"},
		{"a pod without an address too", "{podSelector: {}, policyTypes: [Egress, Ingress]}", "shop/cart shop/cart 5432/TCP", true,
			"a pod always reaches itself"},
		{"neither end is a pod", "podSelector: {}", "203.0.113.7 198.51.100.1 80/TCP", true, "neither end is a pod"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// Where several families answer, each must be allowed; the words may come from any.
			allowed, text := explain.All(ask(t, shop(policy(t, "p", tt.spec)), tt.question))
			if allowed != tt.allowed {
				t.Errorf("allowed is %v:\n%s", allowed, text)
			}
			if !strings.Contains(text, tt.words) {
				t.Errorf("%q is not in:\n%s", tt.words, text)
			}
		})
	}
}

func TestAPolicyThatCannotBeUsedAdmitsNothingAndSaysWhy(t *testing.T) {
	for _, tt := range []struct{ spec, words string }{
		{"{podSelector: {}, policyTypes: [Sideways]}", `policyTypes has "Sideways"`},
		{"{podSelector: {matchExpressions: [{key: app, operator: Is}]}}", "podSelector: "},
		{"{podSelector: {}, ingress: [{from: [{}]}]}", "ingress[0] has an empty peer"},
		{"{podSelector: {}, ingress: [{}, {from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}", "ingress[1] has an ipBlock beside a selector"},
		{"{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {\"a b\": c}}}]}]}", "ingress[0] has a selector that cannot be read"},
		{"{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {\"a b\": c}}}]}]}", "ingress[0] has a selector that cannot be read"},
		{"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}", `ingress[0] has cidr "10.0.0.0", which is none`},
		{"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: \"::ffff:10.0.0.0/104\"}}]}]}", "which is none"},
		{"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [x]}}]}]}", `exception "x", which is no CIDR`},
		{"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}", "11.0.0.0/16, which is not in 10.0.0.0/8"},
		{"{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [0.0.0.0/0]}}]}]}", "0.0.0.0/0, which is not in 10.0.0.0/8"},
		{"{podSelector: {}, egress: [{ports: [{protocol: ICMP}]}], policyTypes: [Ingress, Egress]}", `egress[0] has protocol "ICMP"`},
		{"{podSelector: {}, ingress: [{ports: [{port: 0}]}]}", "ingress[0] has port 0"},
		{"{podSelector: {}, ingress: [{ports: [{port: 65536}]}]}", "ingress[0] has port 65536"},
		{"{podSelector: {}, ingress: [{ports: [{port: 90, endPort: 80}]}]}", "ingress[0] has endPort 80, which ends no range"},
		{"{podSelector: {}, ingress: [{ports: [{port: http, endPort: 80}]}]}", "ingress[0] has endPort 80, which ends no range"},
		{"{podSelector: {}, ingress: [{ports: [{endPort: 80}]}]}", "ingress[0] has endPort 80, which ends no range"},
	} {
		allowed, text := explain.All(ask(t, shop(policy(t, "p", tt.spec)), "203.0.113.7 shop/db 5432/TCP"))
		if allowed || !strings.Contains(text, "shop/p: cannot be used as written, so it admits nothing: ") || !strings.Contains(text, tt.words) {
			t.Errorf("%s: allowed is %v, and %q should be in:\n%s", tt.spec, allowed, tt.words, text)
		}
		other := policy(t, "q", "{podSelector: {}, ingress: [{}]}")
		if allowed, text := explain.All(ask(t, shop(policy(t, "p", tt.spec), other), "203.0.113.7 shop/db 5432/TCP")); !allowed {
			t.Errorf("%s: it takes away what another policy gives:\n%s", tt.spec, text)
		}
	}
}

func TestWhatCannotBeAskedIsAnErrorThatSaysWhatToDo(t *testing.T) {
	c := shop()
	for _, tt := range []struct{ from, to, words string }{
		{"shop/none", "shop/db", `"shop/none": no such pod, and not an IP address; name a pod as NAMESPACE/POD`},
		{"web-1", "shop/db", "name a pod as NAMESPACE/POD"},
		{"shop/db", "10.0.0.0/8", "not an IP address"},
		{"shop/job", "shop/db", "pod shop/job has ended"},
		{"shop/web-2", "2001:db8::1", "no address of one family"},
	} {
		if _, err := explain.Between(c, tt.from, tt.to, corev1.ProtocolTCP, 80, nil); err == nil || !strings.Contains(err.Error(), tt.words) {
			t.Errorf("%s to %s: %v; want %q", tt.from, tt.to, err, tt.words)
		}
	}
	_, err := explain.Between(c, "shop/none", "shop/never", corev1.ProtocolTCP, 80, nil)
	if err == nil || !strings.Contains(err.Error(), "shop/none") || !strings.Contains(err.Error(), "shop/never") {
		t.Errorf("both ends are wrong, and the error is: %v", err)
	}
}

func TestAnAnswerForEachFamilyThatBothEndsHave(t *testing.T) {
	for question, want := range map[string]int{"shop/web-1 shop/db 80/TCP": 2, "shop/web-2 shop/db 80/TCP": 1, "shop/cart shop/db 80/TCP": 2,
		"shop/cart shop/cart 80/TCP": 1, "10.0.0.1 shop/db 80/TCP": 1, "::ffff:10.0.0.1 shop/db 80/TCP": 1} {
		if got := ask(t, shop(), question); len(got) != want {
			t.Errorf("%s: %d answers, want %d", question, len(got), want)
		}
	}
}

// A story is a file under testdata: policies, then questions, each with the whole answer below it.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.story")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".story"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			told := tell(t, string(text))
			if *update {
				if err := os.WriteFile(file, []byte(told), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if told != string(text) {
				t.Errorf("%s is told otherwise now; go test -run Stories ./pkg/explain -update rewrites it:\n%s", file, told)
			}
		})
	}
}

// tell goes through a story: lines that begin with "policy " declare one for all questions that follow (with no spec, they take it
// away), those that begin with "? " ask, lines with "#" are the storyteller's, and all others are answers, told anew.
func tell(t *testing.T, text string) string {
	t.Helper()
	var out strings.Builder
	var policies []*networkingv1.NetworkPolicy
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "policy "):
			name, spec, _ := strings.Cut(strings.TrimPrefix(line, "policy "), ": ")
			var rest []*networkingv1.NetworkPolicy
			for _, p := range policies {
				if p.Name != name {
					rest = append(rest, p)
				}
			}
			if policies = rest; spec != "none" {
				policies = append(policies, policy(t, name, spec))
			}
			fmt.Fprintln(&out, line)
		case strings.HasPrefix(line, "? "):
			allowed, told := explain.All(ask(t, shop(policies...), strings.TrimPrefix(line, "? ")))
			fmt.Fprintf(&out, "%s\n%s=> %v\n", line, told, map[bool]string{true: "yes", false: "no"}[allowed])
		case strings.HasPrefix(line, "#"), line == "":
			fmt.Fprintln(&out, line)
		}
	}
	return out.String()
}
