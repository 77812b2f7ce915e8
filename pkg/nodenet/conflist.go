package nodenet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/postern-cni/postern/pkg/iptables"
)

// PluginName is the file name of the plugin, and its type in configurations.
const PluginName = "postern"

// Runtime is what the container runtime's configuration of the plugin says besides a plan.
type Runtime struct {
	Network  string // its name; addresses are kept by it
	StateDir string
	Backend  iptables.Backend
}

// The types are the plugin's configuration, in the order of its reference.
type (
	conflist struct {
		CNIVersion  string      `json:"cniVersion"`
		CNIVersions []string    `json:"cniVersions"`
		Name        string      `json:"name"`
		Plugins     []pluginRef `json:"plugins"`
	}
	pluginRef struct {
		Type          string          `json:"type"`
		Capabilities  map[string]bool `json:"capabilities"`
		MTU           int             `json:"mtu"`
		StateDir      string          `json:"stateDir"`
		NodeAddresses []string        `json:"nodeAddresses"`
		Backend       string          `json:"iptablesBackend"`
		IPAM          ipamRef         `json:"ipam"`
	}
	ipamRef struct {
		Type   string     `json:"type"`
		Ranges []rangeRef `json:"ranges"`
	}
	rangeRef struct {
		Subnet  string `json:"subnet"`
		Gateway string `json:"gateway,omitempty"`
	}
)

// Conflist returns the text of the runtime's configuration for a plan's node.
//
// The version is 1.0.0, for a runtime with an older library fails on 1.1.0, and one that knows cniVersions takes the latest
// of them (CNI specification 1.1.0, section 1). The gateway of a range is the node's address in the tunnel.
func Conflist(p *Plan, r Runtime) ([]byte, error) {
	ref := pluginRef{Type: PluginName, Capabilities: map[string]bool{"portMappings": true}, MTU: p.MTU, StateDir: r.StateDir,
		NodeAddresses: []string{}, Backend: string(r.Backend), IPAM: ipamRef{Type: PluginName}}
	for _, a := range p.Addresses {
		ref.NodeAddresses = append(ref.NodeAddresses, a.String())
	}
	for _, cidr := range p.Node.PodCIDRs {
		gateway := ""
		if a := Gateway(cidr); a.IsValid() {
			gateway = a.String()
		}
		ref.IPAM.Ranges = append(ref.IPAM.Ranges, rangeRef{Subnet: cidr.String(), Gateway: gateway})
	}
	list := conflist{CNIVersion: "1.0.0", CNIVersions: []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}, Name: r.Network,
		Plugins: []pluginRef{ref}}
	text, err := json.MarshalIndent(list, "", "  ")
	return append(text, '\n'), err
}

// WriteConflist puts the text into a file, whole at once, and reports whether it was not there already. The folder is made if it
// is missing.
func WriteConflist(path string, text []byte) (written bool, err error) {
	now, err := os.ReadFile(path)
	if err == nil && bytes.Equal(now, text) {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	return true, replace(path, bytes.NewReader(text), 0o644)
}

// Install puts the program from into the runtime's folder of plugins, whole at once, and reports whether it was not there
// already. A plugin that runs goes on with the file that it was started from.
func Install(from, dir string) (installed bool, err error) {
	to := filepath.Join(dir, PluginName)
	if same, err := sameFile(from, to); err != nil || same {
		return false, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	file, err := os.Open(from)
	if err != nil {
		return false, err
	}
	defer file.Close()
	return true, replace(to, file, 0o755)
}

// sameFile compares a program with what is installed, and whether that can be run.
func sameFile(from, to string) (bool, error) {
	want, err := os.ReadFile(from)
	if err != nil {
		return false, err
	}
	now, err := os.ReadFile(to)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	info, err := os.Stat(to)
	return err == nil && info.Mode().Perm() == 0o755 && bytes.Equal(want, now), err
}

// replace gives a file other content by renaming a new one, which is on the disk by then, to its name. The new one's own name has
// an ending that no runtime reads; what a killed call left under it is written over.
func replace(path string, content io.Reader, mode fs.FileMode) error {
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}

// before returns the configurations in the conflist's folder that the runtime takes before it: of files that end in .conf,
// .conflist or .json, the first by name.
func before(path string) (names []string, err error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		known := slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name()))
		if known && !e.IsDir() && e.Name() < filepath.Base(path) {
			names = append(names, e.Name())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("look for other CNI configurations: %w", err)
	}
	return names, nil
}
