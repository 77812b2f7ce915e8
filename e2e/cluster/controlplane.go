package cluster

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

// etcdFolder is on a tmpfs: the cluster's objects need not outlive a crash, and etcd waits for the disk at each write.
const etcdFolder = "/dev/shm/" + Namespace + "-etcd"

// server is the API server's address.
func (c *Cluster) server() string {
	return "https://" + net.JoinHostPort(c.controlPlane().String(), "6443")
}

// Kubeconfig is the file for "admin", or another one with a certificate: see makePKI.
func (c *Cluster) Kubeconfig(name string) string { return c.path("run", name+".kubeconfig") }

// startControlPlane starts etcd and the API server, and once that answers, what works through it.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	if err := os.RemoveAll(etcdFolder); err != nil {
		return fmt.Errorf("empty etcd's folder: %w", err)
	}
	const clients, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	if _, err := c.spawn("etcd", c.debian("usr/bin/etcd"), "--data-dir="+etcdFolder,
		"--listen-client-urls="+clients, "--advertise-client-urls="+clients, "--listen-peer-urls="+peers,
		"--initial-advertise-peer-urls="+peers, "--initial-cluster=default="+peers); err != nil {
		return err
	}
	if err := eventually(ctx, time.Minute, "etcd answers", func() error { return answers(clients + "/health") }); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	if _, err := c.spawn("kube-controller-manager", append([]string{
		c.program("kube-controller-manager"), "--kubeconfig=" + c.Kubeconfig("controller-manager"),
		"--leader-elect=false", "--use-service-account-credentials",
		"--service-account-private-key-file=" + c.path("run", "service-accounts.key"), "--root-ca-file=" + c.path("run", "ca.crt"),
		"--cluster-signing-cert-file=" + c.path("run", "ca.crt"), "--cluster-signing-key-file=" + c.path("run", "ca.key"),
		"--allocate-node-cidrs", "--cluster-cidr=" + c.each(func(f string) string { return networks[f].pods }),
		"--service-cluster-ip-range=" + c.services(),
	}, c.nodeMasks()...)...); err != nil {
		return err
	}
	_, err := c.spawn("kube-scheduler", c.program("kube-scheduler"), "--kubeconfig="+c.Kubeconfig("scheduler"),
		"--leader-elect=false")
	return err
}

func (c *Cluster) services() string {
	return c.each(func(f string) string { return networks[f].services })
}

// nodeMasks are the controller manager's flags for the length of a node's pod range: a dual-stack cluster has two of other names.
func (c *Cluster) nodeMasks() []string {
	if families := c.families(); len(families) == 1 {
		return []string{"--node-cidr-mask-size=" + networks[families[0]].nodeMask}
	}
	return []string{"--node-cidr-mask-size-ipv4=" + networks["4"].nodeMask, "--node-cidr-mask-size-ipv6=" + networks["6"].nodeMask}
}

const apiServer = "kube-apiserver"

// StartAPIServer starts the API server and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	run := func(file string) string { return c.path("run", file) }
	if _, err := c.spawn(apiServer, c.program("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address="+c.controlPlane().String(), "--bind-address="+c.controlPlane().String(), "--secure-port=6443",
		"--service-cluster-ip-range="+c.services(), "--client-ca-file="+run("ca.crt"),
		"--tls-cert-file="+run("apiserver.crt"), "--tls-private-key-file="+run("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+run("service-accounts.pub"), "--service-account-signing-key-file="+run("service-accounts.key"),
		"--kubelet-client-certificate="+run("apiserver-kubelet.crt"), "--kubelet-client-key="+run("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP", "--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"); err != nil {
		return err
	}
	return eventually(ctx, 2*time.Minute, "the API server is ready", func() error {
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
}

// StopAPIServer ends the API server as a crash would.
func (c *Cluster) StopAPIServer() error { return c.stop(apiServer, syscall.SIGKILL) }

// stop ends the program of this name.
func (c *Cluster) stop(name string, how syscall.Signal) error {
	kept := c.state.Processes[:0:0]
	for _, p := range c.state.Processes {
		if p.Name != name {
			kept = append(kept, p)
		} else if err := p.stop(how); err != nil {
			return err
		}
	}
	c.state.Processes = kept
	return c.save()
}

// answers says whether a server answers with status 200.
func answers(url string) error {
	client := http.Client{Timeout: time.Second}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s says %s", url, response.Status)
	}
	return nil
}

// eventually tries until check has no error.
func eventually(ctx context.Context, limit time.Duration, what string, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: not within %v: %w", what, limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
