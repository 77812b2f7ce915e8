package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/engine"
	"github.com/postern-cni/postern/pkg/explain"
	"github.com/postern-cni/postern/pkg/gate"
	"github.com/postern-cni/postern/pkg/object"
)

func stateDirFlag(flags *flag.FlagSet) *string {
	return flags.String("state-dir", attachment.DefaultStateDir, "the node's state `folder`, with policyd's socket")
}

// dialer is gate.DialOnce, or gate.Dial for who waits for a policyd that is starting.
type dialer func(ctx context.Context, stateDir string) (*gate.Client, error)

// ask puts a question to the running policyd.
func ask(ctx context.Context, dial dialer, stateDir, question string, body, reply any) error {
	client, err := dial(ctx, stateDir)
	if errors.Is(err, gate.ErrAway) {
		return fmt.Errorf("%w; is it started, and is --state-dir the same?", err)
	}
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Ask(ctx, question, body, reply)
}

func statusCommand(ctx context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error {
	stateDir := stateDirFlag(flags)
	wait := flags.Bool("wait", false, "first wait until what the API server or the folder holds now is enforced")
	limit := flags.Duration("timeout", 30*time.Second, "give up after this long")
	asJSON := flags.Bool("json", false, "print JSON")
	if err := parse(flags, args, noCheck); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	var s nodeStatus
	dial := gate.DialOnce
	if *wait {
		dial = gate.Dial
	}
	if err := ask(ctx, dial, *stateDir, engine.AskStatus, engine.StatusQuestion{Wait: *wait}, &s); err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(s)
	}
	printStatus(stdout, &s)
	if !s.Synced || s.Failing != "" {
		return errNo
	}
	return nil
}

func printStatus(w io.Writer, s *nodeStatus) {
	ago := func(t time.Time) string {
		return fmt.Sprintf("%s (%s ago)", t.Format(time.RFC3339), time.Since(t).Round(time.Second))
	}
	fmt.Fprintf(w, "policyd %s on node %s, iptables-%s, since %s\n", s.Version, s.Node, s.Backend, ago(s.Started))
	switch {
	case !s.Synced:
		fmt.Fprintln(w, "NOT ENFORCING YET: not all objects have been read; what was in the kernel before stays in force")
	case s.Failing != "":
		fmt.Fprintf(w, "FAILING since %s: %s\n", ago(s.FailingSince), s.Failing)
	default:
		fmt.Fprintf(w, "enforcing %d policies; last found in order %s, last written %s\n", s.Policies, ago(s.Enforced), ago(s.Written))
	}
	if s.NodeNotReady != "" {
		fmt.Fprintf(w, "the node is NOT READY for pods: %s\n", s.NodeNotReady)
	}
	for _, f := range s.Findings {
		if !strings.Contains(s.NodeNotReady, f.What) { // which was just said
			fmt.Fprintf(w, "finding %s: %s\n", f.Kind, f.What)
		}
	}
	for _, p := range s.Unusable {
		fmt.Fprintf(w, "policy %s cannot be used as written and closes the pods it selects: %s\n", p.Policy, p.Reason)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "problem: %s\n", p)
	}
	if len(s.Pods) == 0 {
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "POD\tSTATE\tINGRESS\tEGRESS\tINTERFACE\tADDRESSES")
	side := map[bool]string{true: "isolated", false: "open"}
	for _, p := range s.Pods {
		in, out := side[p.IngressIsolated], side[p.EgressIsolated]
		if p.State == engine.Unknown {
			in, out, p.Pod = "closed", "closed", "?"
		}
		var addrs []string
		for _, a := range p.Addresses {
			addrs = append(addrs, a.String())
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Pod, p.State, in, out, p.Interface, strings.Join(addrs, " "))
	}
	_ = t.Flush() // stdout's errors show at the end of the program
}

func explainCommand(ctx context.Context, flags *flag.FlagSet, args []string, stdout io.Writer) error {
	stateDir := stateDirFlag(flags)
	from := flags.String("from", "", "who connects: `NAMESPACE/POD` or an IP address")
	to := flags.String("to", "", "to whom: `NAMESPACE/POD` or an IP address; behind a Service, the pod")
	port := flags.String("port", "", "`NUMBER/PROTOCOL` at the destination: 5432/tcp, 53/udp; left out for ICMP")
	manifests := flags.String("manifests", "", "ask a `folder` of manifests, not the running policyd")
	kubeconfig := flags.String("kubeconfig", "", "ask the API server of this `file`, not the running policyd")
	node := flags.String("node-addresses", "", "with --manifests or --kubeconfig: the pods' node's own `addresses`, comma separated")
	asJSON := flags.Bool("json", false, "print JSON")
	q := engine.ExplainQuestion{}
	var own []netip.Addr
	check := func() (problems []string) {
		q.From, q.To = *from, *to
		if q.From == "" || q.To == "" {
			problems = append(problems, "--from and --to: both are needed")
		}
		if *manifests != "" && *kubeconfig != "" {
			problems = append(problems, "--manifests and --kubeconfig: objects come from one of them")
		}
		var bad string
		if q.Port, q.Protocol, bad = parsePort(*port); bad != "" {
			problems = append(problems, bad)
		}
		for _, text := range strings.FieldsFunc(*node, func(r rune) bool { return r == ',' }) {
			a, err := netip.ParseAddr(text)
			if err != nil {
				problems = append(problems, fmt.Sprintf("--node-addresses: %v", err))
			}
			own = append(own, a)
		}
		return problems
	}
	if err := parse(flags, args, check); err != nil {
		return err
	}
	answer, err := answerExplain(ctx, *stateDir, *manifests, *kubeconfig, q, own)
	if err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false) // it is full of arrows
		err = enc.Encode(answer)
	} else {
		fmt.Fprint(stdout, answer.Text)
	}
	if err == nil && !answer.Allowed {
		return errNo
	}
	return err
}

func answerExplain(
	ctx context.Context, stateDir, manifests, kubeconfig string, q engine.ExplainQuestion, own []netip.Addr,
) (*engine.Explanation, error) {
	var c object.Cluster
	var err error
	switch {
	case manifests != "":
		c, err = cluster.ReadFolder(manifests)
	case kubeconfig != "":
		c, err = readAPI(ctx, kubeconfig)
	default:
		out := &engine.Explanation{}
		return out, ask(ctx, gate.DialOnce, stateDir, engine.AskExplain, q, out)
	}
	if err != nil {
		return nil, err
	}
	answers, err := explain.Between(c, q.From, q.To, q.Protocol, q.Port, own)
	if err != nil {
		return nil, err
	}
	allowed, text := explain.All(answers)
	return &engine.Explanation{Allowed: allowed, Text: text}, nil
}

// readAPI reads an API server's objects once.
func readAPI(ctx context.Context, kubeconfig string) (object.Cluster, error) {
	config, err := restConfig(kubeconfig)
	if err != nil {
		return object.Cluster{}, err
	}
	api, err := cluster.FromAPI(config)
	if err != nil {
		return object.Cluster{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	go func() { _ = api.Run(ctx) }() // ends with the context, without an error
	if err := api.Reread(ctx); err != nil {
		return object.Cluster{}, err
	}
	return api.Snapshot(), nil
}

// parsePort reads "5432/tcp"; the protocol defaults to TCP, and an empty text names none.
func parsePort(text string) (uint16, corev1.Protocol, string) {
	if text == "" {
		return 0, "", ""
	}
	number, protocol, _ := strings.Cut(text, "/")
	if protocol == "" {
		protocol = "tcp"
	}
	n, err := strconv.ParseUint(number, 10, 16)
	p := corev1.Protocol(strings.ToUpper(protocol))
	if err != nil || n == 0 || p != corev1.ProtocolTCP && p != corev1.ProtocolUDP && p != corev1.ProtocolSCTP {
		return 0, "", fmt.Sprintf("--port %q: NUMBER/PROTOCOL is expected, 1 to 65535, tcp, udp or sctp", text)
	}
	return uint16(n), p, ""
}
