package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/cniconf"
)

// Another ipam.type is run as a plugin (CNI specification, section 4): found in CNI_PATH, with this plugin's own
// configuration and environment. The CNI project's package for that (invoke) links an HTTP stack (its tracing's), whose start every
// call of this plugin would pay for.

// delegate runs the ipam plugin for a command, with further variables in its environment, and returns what it wrote.
func delegate(ctx context.Context, cfg *cniconf.Config, command string, environ ...string) (stdout []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s of the ipam plugin %s: %w", command, cfg.IPAM.Type, err)
		}
	}()
	program, err := inPath(cfg.IPAM.Type)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(busyLimit); ; {
		var out, diagnostics bytes.Buffer
		cmd := exec.CommandContext(ctx, program)
		cmd.Env = append(append(os.Environ(), environ...), "CNI_COMMAND="+command)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(cfg.Stdin), &out, &diagnostics
		err := cmd.Run()
		_, _ = os.Stderr.Write(diagnostics.Bytes()) // for the runtime's log
		if err == nil {
			return out.Bytes(), nil
		}
		if errors.Is(err, unix.ETXTBSY) && time.Now().Before(deadline) {
			time.Sleep(busyPause)
			continue
		}
		said := &types.Error{}
		if json.Unmarshal(out.Bytes(), said) == nil && said.Msg != "" {
			return nil, said
		}
		return nil, fmt.Errorf("%w: %q", err, out.String()+diagnostics.String())
	}
}

// While a plugin is being replaced it cannot be run.
const (
	busyLimit = 5 * time.Second
	busyPause = 100 * time.Millisecond
)

// inPath finds a plugin in the folders of CNI_PATH.
func inPath(name string) (string, error) {
	dirs := os.Getenv("CNI_PATH")
	if name != filepath.Base(name) {
		return "", fmt.Errorf("%q is no name of a plugin; give ipam.type the name of a file in CNI_PATH", name)
	}
	for _, dir := range filepath.SplitList(dirs) {
		program := filepath.Join(dir, name)
		if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() {
			return program, nil
		}
	}
	return "", fmt.Errorf("there is no plugin %s in CNI_PATH %q", name, dirs)
}

func (add *adding) delegateAdd(ctx context.Context) ([]netip.Addr, error) {
	name := add.cfg.IPAM.Type
	stdout, err := delegate(ctx, add.cfg, "ADD")
	if err != nil {
		return nil, err
	}
	raw, err := resultOf(stdout, add.cfg.CNIVersion)
	if err != nil {
		return nil, fmt.Errorf("result of the ipam plugin %s: %w", name, err)
	}
	if add.ipam, err = types100.NewResultFromResult(raw); err != nil {
		return nil, fmt.Errorf("result of the ipam plugin %s: %w", name, err)
	}
	addrs, err := addressesOf(add.ipam)
	if err != nil {
		return nil, fmt.Errorf("result of the ipam plugin %s: %w", name, err)
	}
	for _, r := range add.ipam.Routes {
		if dst, ok := netip.AddrFromSlice(r.Dst.IP); ok {
			ones, _ := r.Dst.Mask.Size()
			if ones > 0 { // the default route is there in any case
				add.cfg.IPAM.Routes = append(add.cfg.IPAM.Routes, netip.PrefixFrom(dst.Unmap(), ones))
			}
		}
	}
	return addrs, nil
}

// resultOf reads a result. One that does not say its version has the configuration's.
func resultOf(text []byte, version string) (types.Result, error) {
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		return nil, fmt.Errorf("%q: %w", text, err)
	}
	if said, _ := fields["cniVersion"].(string); said != "" {
		return create.Create(said, text)
	}
	if fields == nil {
		fields = map[string]any{}
	}
	fields["cniVersion"] = version
	text, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	return create.Create(version, text)
}

// addressesOf takes the addresses of a result: at least one, and at most one of each family, for a pod has no more.
func addressesOf(result *types100.Result) (addrs []netip.Addr, err error) {
	seen := map[bool]bool{}
	for _, ip := range result.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, fmt.Errorf("%v is no address", ip.Address.IP)
		}
		if a = a.Unmap(); seen[a.Is4()] {
			return nil, fmt.Errorf("%s is a second address of its family; a pod has one of each", a)
		}
		seen[a.Is4()] = true
		addrs = append(addrs, a)
	}
	if len(addrs) == 0 {
		return nil, errors.New("it has no address")
	}
	return addrs, nil
}

// delegateDel says which container is meant by itself, for it is called from GC too, whose environment names none.
func delegateDel(ctx context.Context, cfg *cniconf.Config) error {
	_, err := delegate(ctx, cfg, "DEL", "CNI_CONTAINERID="+cfg.ContainerID, "CNI_NETNS="+cfg.NetNS, "CNI_IFNAME="+cfg.IfName)
	return err
}

func delegateCheck(ctx context.Context, cfg *cniconf.Config) error {
	_, err := delegate(ctx, cfg, "CHECK")
	return err
}

func delegateStatus(ctx context.Context, cfg *cniconf.Config) error {
	_, err := delegate(ctx, cfg, "STATUS")
	return err
}

func delegateGC(ctx context.Context, cfg *cniconf.Config) error {
	_, err := delegate(ctx, cfg, "GC")
	return err
}
