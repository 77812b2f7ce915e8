// Package cniconf reads what a container runtime gives the plugin: the network configuration on stdin, and the CNI_
// environment variables. It looks at every value before it answers, and names all that are wrong at once: key, value and
// what is allowed. Unknown keys are the runtime's or another plugin's and are left alone, but for the ipam object of our
// own type, where an unknown key is a slip of the pen that would go unnoticed.
//
// The keys and codes are those of the CNI specification 1.1.0 (sections 1 to 3, and "Error"): 1 a version we do not speak, 4
// an environment variable, 6 something that is not JSON, 7 any other value of the configuration. The capability
// portMappings is in the CNI conventions.
package cniconf

import (
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/ipam"
)

// OwnIPAM is the ipam.type that means pkg/ipam; a missing one means the same.
const OwnIPAM = "postern"

// Defaults of the configuration.
const (
	DefaultGateTimeout = 10 * time.Second
	DefaultStatusGrace = 60 * time.Second
	DefaultReuseAfter  = 60 * time.Second
)

// Backend is which iptables the plugin uses.
type Backend string

const (
	BackendAuto   Backend = "auto" // what policyd uses, else detected
	BackendNFT    Backend = "nft"
	BackendLegacy Backend = "legacy"
)

// HostPortConflict says what to do about a process of the host that listens on a wanted host port.
type HostPortConflict string

const (
	ConflictRefuse HostPortConflict = "refuse"
	ConflictIgnore HostPortConflict = "ignore"
)

// Environment is what the CNI_ variables say.
type Environment struct {
	Command     string // ADD, DEL, CHECK; STATUS and GC, which have no container, go through [ParseNetwork]
	ContainerID string
	NetNS       string // a path; DEL may have none
	IfName      string
	Args        string // CNI_ARGS: KEY=value;KEY=value
}

// Config is the checked configuration.
type Config struct {
	CNIVersion string
	Name       string // of the network
	Type       string
	// Stdin is the configuration as it came, for the plugin that ipam.type names.
	Stdin []byte

	// Of the container; empty from [ParseNetwork].
	ContainerID string
	NetNS       string
	IfName      string
	Pod         attachment.Pod

	Policy           attachment.Policy
	MTU              int // 0: that of the interface with the node's address
	StateDir         string
	GateTimeout      time.Duration
	StatusGrace      time.Duration
	NodeAddresses    []netip.Addr // at most one of each family; a missing one is found out
	IPTablesBackend  Backend
	HostPortConflict HostPortConflict
	IPAM             IPAM

	PortMappings []attachment.PortMapping
	DNS          types.DNS
	PrevResult   *types100.Result // nil: first in the chain
	// ValidAttachments is GC's list; nil where the key is missing, which is not the same as an empty one.
	ValidAttachments []attachment.Key
}

// IPAM says where addresses come from.
type IPAM struct {
	Type       string // [OwnIPAM], or the name of the plugin to run
	Ranges     []ipam.Range
	ReuseAfter time.Duration
	Routes     []netip.Prefix // in the pod, through its gateway, besides the default route
}

// Own reports whether addresses come from pkg/ipam.
func (i IPAM) Own() bool { return i.Type == OwnIPAM }

// Key is the key of the container's attachment.
func (c *Config) Key() attachment.Key {
	return attachment.Key{ContainerID: c.ContainerID, IfName: c.IfName}
}

// HostInterface is the name of the host end of the container's link.
func (c *Config) HostInterface() string {
	prefix := attachment.GuardedPrefix
	if c.Policy == attachment.PolicyNone {
		prefix = attachment.UnguardedPrefix
	}
	a := attachment.Attachment{ContainerID: c.ContainerID, Pod: c.Pod}
	return attachment.HostInterface(prefix, a.Identity(), c.IfName)
}

// SupportedVersions returns the versions of the CNI specification that the plugin speaks.
func SupportedVersions() []string { return []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} }

// Parse reads configuration and environment of ADD, DEL or CHECK. The error is a *types.Error that names everything that is
// wrong. The Config is never nil: what could be read is in it, and defaults stand for the rest, so that DEL can do its
// work with a container ID and an interface name alone.
func Parse(stdin []byte, env Environment) (*Config, error) {
	var p problems
	c := newConfig(stdin)
	readNetwork(c, &p)
	readEnvironment(c, env, &p)
	return c, p.err()
}

// ParseNetwork reads the configuration of STATUS and GC, which have no container. It answers as [Parse] does.
func ParseNetwork(stdin []byte) (*Config, error) {
	var p problems
	c := newConfig(stdin)
	readNetwork(c, &p)
	return c, p.err()
}

func newConfig(stdin []byte) *Config {
	return &Config{
		Stdin:            slices.Clone(stdin),
		Policy:           attachment.PolicyEnforce,
		StateDir:         attachment.DefaultStateDir,
		GateTimeout:      DefaultGateTimeout,
		StatusGrace:      DefaultStatusGrace,
		IPTablesBackend:  BackendAuto,
		HostPortConflict: ConflictRefuse,
		IPAM:             IPAM{Type: OwnIPAM, ReuseAfter: DefaultReuseAfter},
	}
}
