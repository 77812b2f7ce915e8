package suite

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/postern-cni/postern/e2e/cluster"
)

// serverPort is where servers of our own cases listen.
const serverPort = 8080

// StartPod starts a pod of agnhost on a node, and does not wait for it.
func (t *T) StartPod(ctx context.Context, namespace, name string, node *cluster.Node, labels map[string]string, args ...string) {
	now := int64(1)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			NodeName: node.Name, TerminationGracePeriodSeconds: &now,
			Containers: []corev1.Container{{Name: "main", Image: image, Args: args}},
		},
	}
	if _, err := t.Cluster.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatalf("start pod %s/%s: %v", namespace, name, err)
	}
}

// server are the arguments of agnhost that make it listen on serverPort.
var server = []string{"netexec", fmt.Sprintf("--http-port=%d", serverPort), "--udp-port=-1"}

// Admit makes a policy: pods labelled app=APP admit pods labelled app=FROM of the same namespace on serverPort, and nothing else.
func (t *T) Admit(ctx context.Context, namespace, app, from string) {
	port, tcp := intstr.FromInt32(serverPort), corev1.ProtocolTCP
	t.policy(ctx, namespace, &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: app},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				Ports: []networkingv1.NetworkPolicyPort{{Port: &port, Protocol: &tcp}},
				From: []networkingv1.NetworkPolicyPeer{{
					PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": from}},
				}},
			}},
		},
	})
}

// DenyAll makes a policy that closes all pods of a namespace to everybody.
func (t *T) DenyAll(ctx context.Context, namespace string) {
	t.policy(ctx, namespace, &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "deny-all"},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
	})
}

func (t *T) policy(ctx context.Context, namespace string, policy *networkingv1.NetworkPolicy) {
	if _, err := t.Cluster.Client.NetworkingV1().NetworkPolicies(namespace).Create(ctx, policy, metav1.CreateOptions{}); err != nil {
		t.Fatalf("make policy %s/%s: %v", namespace, policy.Name, err)
	}
}

// scene is a server that admits its friend and nobody else. Friend and stranger are on the other node, so that what happens on
// the server's node alone decides.
type scene struct {
	namespace                string
	server, friend, stranger *Pod
}

// Scene sets a scene and waits until it is as it must be.
func (t *T) Scene(ctx context.Context, on, from *cluster.Node) scene {
	s := scene{namespace: t.Namespace(ctx, nil)}
	t.Admit(ctx, s.namespace, "server", "friend")
	t.StartPod(ctx, s.namespace, "server", on, map[string]string{"app": "server"}, server...)
	for _, client := range []string{"friend", "stranger"} {
		t.StartPod(ctx, s.namespace, client, from, map[string]string{"app": client}, "pause")
	}
	t.Ready(ctx, s.namespace)
	s.server, s.friend = t.Pod(ctx, s.namespace, "server"), t.Pod(ctx, s.namespace, "friend")
	s.stranger = t.Pod(ctx, s.namespace, "stranger")
	t.Expect(ctx, s.server.To(Connects, serverPort, s.friend), s.server.To(TimesOut, serverPort, s.stranger))
	return s
}

// traffic are connections that friend and stranger try to open while something happens.
type traffic struct{ friend, stranger *Prober }

// Traffic begins: each tries 50 times a second, in every family.
func (t *T) Traffic(s scene) traffic {
	const every = 20 * time.Millisecond
	to := places(s.server, serverPort)
	return traffic{t.Probe(s.friend, every, to...), t.Probe(s.stranger, every, to...)}
}

// Stop ends it. No connection of the stranger may have passed; how many of the friend's did not is returned.
func (c traffic) Stop(t *T) (lost int) {
	stranger := c.stranger.Stop(t)
	friend := c.friend.Stop(t)
	if stranger.Passed() > 0 || stranger.Tried == 0 {
		t.Errorf("of connections that no policy allows, %s", stranger)
	}
	lost = friend.Tried - friend.Connected
	t.Logf("allowed: %s, longest gap %v; not allowed: %s", friend, friend.Gap.Round(time.Millisecond), stranger)
	return lost
}

// SameAsEver expects of a scene what Scene did: after something has happened.
func (t *T) SameAsEver(ctx context.Context, s scene) {
	t.Expect(ctx, s.server.To(Connects, serverPort, s.friend), s.server.To(TimesOut, serverPort, s.stranger))
}
