package nodenet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/nodefiles"
)

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
	ref := pluginRef{Type: nodefiles.Plugin, Capabilities: map[string]bool{"portMappings": true}, MTU: p.MTU, StateDir: r.StateDir,
		NodeAddresses: []string{}, Backend: string(r.Backend), IPAM: ipamRef{Type: nodefiles.Plugin}}
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
