package world

import (
	"context"
	"net/netip"

	"github.com/containernetworking/cni/libcni"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pod is one of the node's pods.
type Pod struct {
	Namespace, Name, UID string
	Labels               map[string]string
	Ports                []Port
	Box                  string // its sandbox's name, if that is not NAMESPACE-NAME
}

// Port is one of the node's that leads to a pod.
type Port struct {
	Host, Container uint16
	Protocol        string // tcp or udp
}

// Key is how people name the pod.
func (p Pod) Key() string { return p.Namespace + "/" + p.Name }

// Sandbox is the name of the pod's network namespace.
func (p Pod) Sandbox() string {
	if p.Box != "" {
		return p.Box
	}
	return p.Namespace + "-" + p.Name
}

// Path of the pod's network namespace.
func (p Pod) Path() string { return SandboxPath(p.Sandbox()) }

func (p Pod) uid() string {
	if p.UID != "" {
		return p.UID
	}
	return "uid-" + p.Namespace + "-" + p.Name
}

// Object is the pod as the API server has it: pending without addresses, else running with these.
func (p Pod) Object(addrs ...netip.Addr) *corev1.Pod {
	o := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.uid()), Labels: p.Labels},
		Spec:       corev1.PodSpec{NodeName: NodeName, Containers: []corev1.Container{{Name: "main", Image: "bench"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodPending},
	}
	for _, a := range addrs {
		o.Status.Phase = corev1.PodRunning
		o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if len(addrs) > 0 {
		o.Status.PodIP = addrs[0].String()
	}
	return o
}

func (p Pod) runtimeConf(args [][2]string) *libcni.RuntimeConf {
	id := "sandbox-" + p.Sandbox()
	conf := &libcni.RuntimeConf{ContainerID: id, NetNS: p.Path(), IfName: "eth0", Args: append([][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", id}, {"K8S_POD_UID", p.uid()},
	}, args...)}
	var ports []map[string]any
	for _, port := range p.Ports {
		ports = append(ports, map[string]any{"hostPort": port.Host, "containerPort": port.Container, "protocol": port.Protocol})
	}
	if ports != nil {
		conf.CapabilityArgs = map[string]any{"portMappings": ports}
	}
	return conf
}

// Attach makes a pod's sandbox, if it is not there, and attaches the pod with postern. It returns the pod's addresses.
func (n *Node) Attach(ctx context.Context, p Pod) ([]netip.Addr, error) {
	if _, err := n.Sandbox(p.Sandbox()); err != nil {
		return nil, err
	}
	return n.Postern.Add(ctx, p)
}

// Detach is postern's DEL for a pod. Its sandbox stays.
func (n *Node) Detach(ctx context.Context, p Pod) error { return n.Postern.Del(ctx, p) }
