package suite

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/cluster"
)

// Outcome is what becomes of an attempt to open a TCP connection.
type Outcome string

const (
	Connects Outcome = "connects"
	// TimesOut is what a dropped packet looks like: no answer.
	TimesOut Outcome = "times out"
	// Refused is the answer of a machine that was reached, and on which nobody listens.
	Refused Outcome = "is refused"
	// Fails is everything else: the attempt was not made, or a router said that there is no way.
	Fails Outcome = "fails"
)

// connectTimeout is how long an attempt waits. The kernel sends a lost SYN again after one second.
const connectTimeout = 3 * time.Second

// Client is a place to connect from.
type Client interface {
	fmt.Stringer
	// Dial tries once. The error says more where the outcome is Fails.
	Dial(ctx context.Context, to netip.AddrPort) (Outcome, error)
}

// Pod is a pod that runs agnhost.
type Pod struct {
	Namespace, Name, Container, Node string
	Addresses                        []netip.Addr
	t                                *T
}

func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// Dial connects from inside the pod.
func (p *Pod) Dial(ctx context.Context, to netip.AddrPort) (Outcome, error) {
	out, err := p.t.Cluster.Kubectl(ctx, "exec", "-n", p.Namespace, p.Name, "-c", p.Container, "--",
		"/agnhost", "connect", "--timeout="+connectTimeout.String(), to.String())
	switch {
	case err == nil:
		return Connects, nil
	case strings.Contains(out, "TIMEOUT"):
		return TimesOut, nil
	case strings.Contains(out, "REFUSED"):
		return Refused, nil
	}
	return Fails, err
}

// Exec runs a command in the pod and returns what it printed; the case ends if it fails.
func (p *Pod) Exec(ctx context.Context, command ...string) string {
	return p.t.Kubectl(ctx, append([]string{"exec", "-n", p.Namespace, p.Name, "-c", p.Container, "--"}, command...)...)
}

// OnNode is a node's own network: where kubelet and pods on the host network are.
type OnNode struct{ *cluster.Node }

func (n OnNode) String() string { return "node " + n.Name }

// Dial connects with what every node has: the shell's own TCP. Its exit status says how it went; timeout(1) says 124.
func (n OnNode) Dial(ctx context.Context, to netip.AddrPort) (Outcome, error) {
	script := `timeout "$1" bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$2" "$3" 2>&1; echo "status $?"`
	out, err := n.Run(ctx, "bash", "-c", script, "bash", fmt.Sprintf("%.0f", connectTimeout.Seconds()),
		to.Addr().String(), fmt.Sprint(to.Port()))
	switch {
	case err != nil:
		return Fails, err
	case strings.Contains(out, "status 0"):
		return Connects, nil
	case strings.Contains(out, "status 124"):
		return TimesOut, nil
	case strings.Contains(out, "refused"):
		return Refused, nil
	}
	return Fails, errors.New(strings.TrimSpace(out))
}

// Beside is the place of the end-to-end program itself: a machine in the nodes' network that is no node.
type Beside struct{}

func (Beside) String() string { return "a machine beside the nodes" }

// Dial connects from this process.
func (Beside) Dial(ctx context.Context, to netip.AddrPort) (Outcome, error) {
	dialer := net.Dialer{Timeout: connectTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", to.String())
	if err == nil {
		conn.Close()
	}
	if ctx.Err() != nil {
		return Fails, ctx.Err()
	}
	return outcome(err)
}

// outcome says what an error of this process' own attempt means.
func outcome(err error) (Outcome, error) {
	var timeout net.Error
	switch {
	case err == nil:
		return Connects, nil
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused, nil
	case errors.As(err, &timeout) && timeout.Timeout():
		return TimesOut, nil
	}
	return Fails, err
}

// Try is an attempt to connect, and what must become of it.
type Try struct {
	From Client
	To   netip.AddrPort
	Name string // of what is connected to
	Want Outcome
}

func (y Try) String() string { return fmt.Sprintf("%s %s to %s, %s", y.From, y.Want, y.Name, y.To) }

// Tries are attempts from each client to a port of each address.
func Tries(want Outcome, name string, addresses []netip.Addr, port uint16, from ...Client) []Try {
	var all []Try
	for _, client := range from {
		for _, address := range addresses {
			all = append(all, Try{From: client, To: netip.AddrPortFrom(address, port), Name: name, Want: want})
		}
	}
	return all
}

// To are attempts to reach a pod.
func (p *Pod) To(want Outcome, port uint16, from ...Client) []Try {
	return Tries(want, p.String(), p.Addresses, port, from...)
}

// clients makes a list of pods one of clients.
func clients(pods ...*Pod) []Client {
	var all []Client
	for _, p := range pods {
		all = append(all, p)
	}
	return all
}

// Expect makes the attempts, some at the same time, and says which do not end as they must. Whoever must connect may need some
// tries, for servers and Services take time; whoever must not is asked once, and must fail from the first.
func (t *T) Expect(ctx context.Context, tries ...[]Try) {
	all := slices.Concat(tries...)
	var wait sync.WaitGroup
	slots := make(chan struct{}, 6) // most of the time is waiting for answers that do not come
	for _, y := range all {
		slots <- struct{}{}
		wait.Go(func() {
			defer func() { <-slots }()
			if err := t.expect(ctx, y); err != nil {
				t.Errorf("%v: %v", y, err)
			}
		})
	}
	wait.Wait()
}

func (t *T) expect(ctx context.Context, y Try) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for attempt := 1; ; attempt++ {
		got, err := y.From.Dial(ctx, y.To)
		if got == y.Want {
			t.Logf("%v (attempt %d)", y, attempt)
			return nil
		}
		// An attempt that was not made says nothing: kubectl may have lost its connection.
		if final := y.Want != Connects && got != Fails; final || ctx.Err() != nil {
			return fmt.Errorf("it %s at attempt %d (%v)", got, attempt, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Until makes an attempt again and again until it ends as it must, and returns how long that took.
func (t *T) Until(ctx context.Context, y Try) time.Duration {
	return t.Eventually(ctx, settleLimit, y.String(), func(ctx context.Context) error {
		got, err := y.From.Dial(ctx, y.To)
		if got == y.Want {
			return nil
		}
		return fmt.Errorf("it %s (%v)", got, err)
	})
}

// Get asks a server of agnhost, from beside the nodes, and returns its answer: /hostname is the pod's name, /clientip the address
// that the pod sees.
func (t *T) Get(ctx context.Context, server netip.AddrPort, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s%s", server, path), nil)
	if err != nil {
		return "", err
	}
	request.Close = true // a new connection each time, which may end at another pod
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return strings.TrimSpace(string(body)), err
}
