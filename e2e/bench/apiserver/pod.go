package apiserver

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Pod i of the plan, with a status unless it is local.
func (p Plan) Pod(i int) *corev1.Pod {
	r := p.chance(ofPods, i)
	application := app(r.IntN(apps))
	namespace, name := p.PodName(i)
	hash := fmt.Sprintf("%08x", p.hash(i))
	controller, owner := true, application+"-"+hash
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, GenerateName: owner + "-",
			Labels: map[string]string{
				"app": application, "tier": tiers[r.IntN(len(tiers))], "version": fmt.Sprintf("v%d", 1+r.IntN(3)),
				"pod-template-hash": hash, "app.kubernetes.io/part-of": "shop-" + namespace,
			},
			Annotations: map[string]string{
				"prometheus.io/scrape": "true", "checksum/config": strings.Repeat(hash, 8),
			},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: owner,
				UID: types.UID("5e9f3c1a-0000-4000-8000-0000" + hash), Controller: &controller, BlockOwnerDeletion: &controller}},
		},
		Spec: podSpec(application, hash),
	}
	pod.Spec.NodeName = p.Node
	if i < Fellows && i < p.Local {
		pod.Labels[Fellow] = "yes"
	}
	if i >= p.Local {
		node := 1 + (i-p.Local)/podsPerNode
		pod.Spec.NodeName = p.nodeName(node)
		pod.Status = Running(pod, nodeAddress(node), p.RemoteAddress(i).String())
	}
	return pod
}

// podSpec is of an ordinary service.
func podSpec(application, hash string) corev1.PodSpec {
	no, mode, seconds := false, int32(0o644), int64(3607)
	account := &corev1.ProjectedVolumeSource{DefaultMode: &mode, Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{ExpirationSeconds: &seconds, Path: "token"}},
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"},
			Items: []corev1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}}}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.namespace"}}}}},
	}}
	token := corev1.Volume{Name: "kube-api-access-" + hash[:5], VolumeSource: corev1.VolumeSource{Projected: account}}
	config := corev1.Volume{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: corev1.LocalObjectReference{Name: application + "-config"}, DefaultMode: &mode}}}
	mounts := []corev1.VolumeMount{{Name: "config", MountPath: "/etc/" + application, ReadOnly: true},
		{Name: token.Name, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true}}
	tolerate := func(key string) corev1.Toleration {
		limit := int64(300)
		return corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute,
			TolerationSeconds: &limit}
	}
	return corev1.PodSpec{
		ServiceAccountName: "default", EnableServiceLinks: &no, Volumes: []corev1.Volume{config, token},
		Containers:  []corev1.Container{container(application, "registry.example.com/shop/"+application+":1.27.3", mounts)},
		Tolerations: []corev1.Toleration{tolerate(corev1.TaintNodeNotReady), tolerate(corev1.TaintNodeUnreachable)},
	}
}

func container(name, image string, mounts []corev1.VolumeMount) corev1.Container {
	quantities := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	health := &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http")}
	probe := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: health}, PeriodSeconds: 10}
	ip := &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}
	env := []corev1.EnvVar{{Name: "POD_IP", ValueFrom: ip}}
	for _, v := range []string{"DATABASE_URL", "CACHE_URL"} {
		env = append(env, corev1.EnvVar{Name: v, Value: "tcp://" + name + ".example.internal:5432/" + v})
	}
	return corev1.Container{
		Name: name, Image: image, Args: []string{"--config", "/etc/" + name + "/config.yaml"}, Env: env, VolumeMounts: mounts,
		Ports: []corev1.ContainerPort{
			{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP},
			{Name: "metrics", ContainerPort: 9090, Protocol: corev1.ProtocolTCP},
		},
		Resources:      corev1.ResourceRequirements{Requests: quantities("100m", "128Mi"), Limits: quantities("500m", "256Mi")},
		ReadinessProbe: probe, ImagePullPolicy: corev1.PullIfNotPresent,
	}
}

// Running is the status that kubelet writes for a pod that runs.
func Running(pod *corev1.Pod, host string, addresses ...string) corev1.PodStatus {
	started := metav1.NewTime(time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC))
	s := corev1.PodStatus{Phase: corev1.PodRunning, HostIP: host, HostIPs: []corev1.HostIP{{IP: host}}, StartTime: &started,
		QOSClass: corev1.PodQOSBurstable}
	for _, a := range addresses {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: a})
	}
	s.PodIP = addresses[0]
	conditions := []corev1.PodConditionType{corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled}
	for _, c := range conditions {
		s.Conditions = append(s.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue, LastTransitionTime: started})
	}
	for _, c := range pod.Spec.Containers {
		yes := true
		s.ContainerStatuses = append(s.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Ready: true, Started: &yes, Image: c.Image,
			ImageID:     "registry.example.com/shop@sha256:" + strings.Repeat("0123456789abcdef", 4),
			ContainerID: "containerd://" + strings.Repeat("fedcba9876543210", 4),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: started}},
		})
	}
	return s
}
