package apiserver

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/postern-cni/postern/e2e/cluster"
)

const (
	// address is where the API server answers whoever measures, and Watched where it answers policyd: another address of the
	// loopback link, so that packets to policyd can be told from others.
	address = "127.0.0.1"
	Watched = "127.0.0.2"
	// Port of both.
	Port  = 6443
	token = "bench"
	etcd  = "http://127.0.0.1:2379"

	startLimit = time.Minute
)

// admission lists the plugins that would only slow down the making of objects: they fill in what the objects have already, or ask
// for limits, quotas, webhooks and accounts, of which there are none.
var admission = []string{
	"ServiceAccount", "LimitRanger", "ResourceQuota", "Priority", "DefaultTolerationSeconds", "TaintNodesByCondition", "PodSecurity",
	"RuntimeClass", "MutatingAdmissionWebhook", "ValidatingAdmissionWebhook", "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy",
	"PodTopologyLabels", "DefaultStorageClass", "StorageObjectInUseProtection", "DefaultIngressClass", "PodGroupProtection",
	"NodeDeclaredFeatureValidator", "PodResizeValidator", "PersistentVolumeClaimResize",
}

// Server is an API server, and the etcd behind it.
type Server struct {
	// Client asks for nothing to wait: no throttling of its own.
	Client *kubernetes.Clientset
	// Kubeconfig is the file for policyd.
	Kubeconfig string
	dir        string
	processes  []*exec.Cmd
}

// Start runs etcd and the API server, and waits until that is ready. bin is the folder of the end-to-end tests' programs, see
// [Programs]; all data is in dir, which should be on a tmpfs: etcd waits for the disk at each write.
func Start(ctx context.Context, bin, dir string) (*Server, error) {
	s := &Server{dir: dir, Kubeconfig: filepath.Join(dir, "kubeconfig")}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the API server's folder: %w", err)
	}
	err := s.files()
	if err == nil {
		err = s.run(ctx, "etcd", filepath.Join(bin, "bin/etcd"), "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
			"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--quota-backend-bytes=8589934592", "--log-level=warn")
	}
	if err == nil { // which waits for etcd by itself
		err = s.run(ctx, "kube-apiserver", filepath.Join(bin, "bin/kube-apiserver"), "--etcd-servers="+etcd,
			"--advertise-address="+address, "--endpoint-reconciler-type=none", fmt.Sprint("--secure-port=", Port),
			"--cert-dir="+filepath.Join(dir, "certificates"), "--token-auth-file="+filepath.Join(dir, "tokens"),
			"--authorization-mode=AlwaysAllow", "--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://bench",
			"--service-account-key-file="+filepath.Join(dir, "service-accounts.pub"),
			"--service-account-signing-key-file="+filepath.Join(dir, "service-accounts.key"),
			"--disable-admission-plugins="+strings.Join(admission, ","), "--enable-priority-and-fairness=false",
			"--max-requests-inflight=0", "--max-mutating-requests-inflight=0", "--etcd-compaction-interval=0", "--profiling=false",
			"--feature-gates=DetectCacheInconsistency=false,SizeBasedListCostEstimate=false")
	}
	if err == nil {
		err = s.ready(ctx)
	}
	if err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// files writes who may ask (everybody with the token), the keys that the API server insists on, and the kubeconfig.
func (s *Server) files() error {
	if err := os.WriteFile(filepath.Join(s.dir, "tokens"), []byte(token+",admin,admin,system:masters\n"), 0o600); err != nil {
		return err
	}
	if err := cluster.ServiceAccountKeys(s.dir); err != nil {
		return err
	}
	config := clientcmdapi.NewConfig()
	server := fmt.Sprintf("https://%s:%d", Watched, Port)
	config.Clusters["bench"] = &clientcmdapi.Cluster{Server: server, InsecureSkipTLSVerify: true}
	config.AuthInfos["admin"] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts["bench"] = &clientcmdapi.Context{Cluster: "bench", AuthInfo: "admin"}
	config.CurrentContext = "bench"
	if err := clientcmd.WriteToFile(*config, s.Kubeconfig); err != nil {
		return fmt.Errorf("write the kubeconfig: %w", err)
	}
	var err error
	s.Client, err = kubernetes.NewForConfig(Config())
	return err
}

// Config is for a client that is not throttled, and takes protobuf.
func Config() *rest.Config {
	return &rest.Config{
		Host: fmt.Sprintf("https://%s:%d", address, Port), TLSClientConfig: rest.TLSClientConfig{Insecure: true}, BearerToken: token,
		QPS: -1, ContentConfig: rest.ContentConfig{
			ContentType: runtime.ContentTypeProtobuf, AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON},
	}
}

// run starts a program, which ends with ctx or with Stop, with what it prints in a file.
func (s *Server) run(ctx context.Context, name, path string, args ...string) error {
	log, err := os.Create(s.log(name))
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	// A server that is being filled spends half of its time on collection otherwise, and with a hundred thousand pods in it takes
	// twelve GiB with this alone.
	cmd.Env = append(os.Environ(), "GOGC=200", "GOMEMLIMIT=6GiB")
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	s.processes = append(s.processes, cmd)
	return nil
}

func (s *Server) log(name string) string { return filepath.Join(s.dir, name+".log") }

// ready waits until the API server answers that it is.
func (s *Server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		_, err := s.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(s.log("kube-apiserver"))
			return fmt.Errorf("wait for the API server: %w; its log ends with\n%s", err, log[max(0, len(log)-2000):])
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop ends both; nothing of them is needed any more.
func (s *Server) Stop() {
	for _, cmd := range s.processes {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	s.processes = nil
}

// Programs is the folder of the end-to-end tests' programs, given that of the benchmarks': in it, or beside it.
func Programs(bin string) (string, error) {
	for _, dir := range []string{filepath.Join(bin, "e2e"), filepath.Join(filepath.Dir(bin), "e2e")} {
		_, err := os.Stat(filepath.Join(dir, "bin/kube-apiserver"))
		_, err2 := os.Stat(filepath.Join(dir, "bin/etcd"))
		if err == nil && err2 == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find bin/kube-apiserver and bin/etcd in a folder e2e in %s or beside it: bin/e2e/bin/e2e build makes them", bin)
}
