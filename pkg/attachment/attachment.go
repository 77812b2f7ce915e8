// Package attachment is the node's record of what is attached: one file for each (container, interface), written by the
// plugin, read by the plugin and by policyd. It is the one truth that both share; see [Store].
package attachment

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"strings"
	"time"
)

// DefaultStateDir is the node's state folder, a tmpfs: a reboot empties it.
const DefaultStateDir = "/run/postern"

// Prefixes of host interface names. Rules match "pst+", so an unguarded link is never mistaken for a guarded one.
const (
	GuardedPrefix   = "pst"
	UnguardedPrefix = "psx"
)

// Policy says whether policyd guards an attachment.
type Policy string

const (
	PolicyEnforce Policy = "enforce"
	PolicyNone    Policy = "none"
)

// Pod names the Kubernetes pod of an attachment; all fields are empty without Kubernetes.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// UID is what the runtime passed as K8S_POD_UID; some pass none.
	UID string `json:"uid,omitempty"`
}

// PortMapping maps a port of the node to a port of the pod, as the CNI capability portMappings gives it.
type PortMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp or sctp
	// HostIP is the node's address that answers; invalid (zero) means every address of both families, an unspecified one
	// (0.0.0.0, ::) every address of its family.
	HostIP netip.Addr `json:"hostIP,omitzero"`
}

// Attachment is one interface of one container. The record is written before the kernel is touched, so it says what is
// intended: everything in it is known by then.
type Attachment struct {
	Version     int    `json:"version"` // of the record's format: 1
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"` // the pod's interface: eth0
	NetNS       string `json:"netns"`  // path of the container's network namespace
	Network     string `json:"network"`
	Pod         Pod    `json:"pod,omitzero"`
	Policy      Policy `json:"policy"`

	HostInterface string       `json:"hostInterface"`
	HostMAC       string       `json:"hostMAC"`
	PodMAC        string       `json:"podMAC"`
	MTU           int          `json:"mtu"`
	Addresses     []netip.Addr `json:"addresses"` // the pod's, at most one of each family
	// Ranges are what the network gives out on this node; empty where it is not ours to say (another IPAM).
	Ranges []netip.Prefix `json:"ranges,omitempty"`
	// NodeAddresses are the node's own, at most one of each family: the source of the route to the pod, and what hostPort
	// traffic is translated to where it must be.
	NodeAddresses []netip.Addr  `json:"nodeAddresses,omitempty"`
	PortMappings  []PortMapping `json:"portMappings,omitempty"`
	// IPAM is the plugin that gave the addresses; empty for our own.
	IPAM    string    `json:"ipam,omitempty"`
	Created time.Time `json:"created"`
}

// Key names the attachment: container ID and interface, all that a DEL is sure to have.
type Key struct{ ContainerID, IfName string }

// Key returns the attachment's key.
func (a *Attachment) Key() Key { return Key{a.ContainerID, a.IfName} }

// Older orders attachments by their age, the older first; those of one time by their keys, so that whoever asks for the newest
// always gets the same.
func Older(a, b *Attachment) int {
	return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Key().String(), b.Key().String()))
}

// Identity is what the host interface is named after: the pod's UID, else its namespace/name, else the container ID.
func (a *Attachment) Identity() string {
	switch {
	case a.Pod.UID != "":
		return a.Pod.UID
	case a.Pod.Name != "":
		return a.Pod.Namespace + "/" + a.Pod.Name
	}
	return a.ContainerID
}

// HostInterface returns the name of the host end of a pod's link: the prefix and 12 hex digits of
// SHA-256(identity NUL ifName). policyd computes it as soon as the scheduler has placed the pod.
func HostInterface(prefix, identity, ifName string) string {
	sum := sha256.Sum256([]byte(identity + "\x00" + ifName))
	return prefix + hex.EncodeToString(sum[:6])
}
